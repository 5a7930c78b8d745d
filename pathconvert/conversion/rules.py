"""One rule per operation: what it produces, consumes, carries, ties and pins.

Every supported operation stands in :data:`RULES`, by torch's name for it; its in-place, dunder and method variants
follow the same rule. An operation that is not there pins whatever it reads and yields factor 1: never a guess.

``f`` carries a factor if f(c·x) = c·f(x) for every c > 0 (docs/design.md, "Positive scale invariance").
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pathconvert.conversion.trace import (
    PINNED,
    ZERO,
    BatchNormCall,
    Call,
    Rule,
    Slot,
    changes_its_input,
    compact,
    metadata,
    pinned_like,
)


def is_variant(call: Call) -> bool:
    """Whether the call changes its first argument in place."""
    return changes_its_input(call.func) or call.kwargs.get("inplace") is True


# ---- carries: one tensor in, the same ids out ------------------------------------------------------------------


def carry(call: Call) -> Any:
    """relu(c·x) = c·relu(x), element by element: the ids stay. Dropout multiplies by what it does not read."""
    return call.give(call.run(), call.ids(call.argument(0, "input")))


def prelu(call: Call) -> Any:
    """PReLU's slopes have factor 1, also where they are another layer's parameter or computed."""
    slopes = call.argument(1, "weight")
    name = call.tracer.name_of(slopes)
    if name is None:
        call.trace.pin(call.ids(slopes).flatten().numpy(), f"is a slope in {call.where}")
    else:
        call.trace.slots.append(Slot(name, np.full(slopes.numel(), PINNED)))
    return carry(call)


def new(call: Call) -> Any:
    """zeros_like, new_empty…: a new tensor, which the numbers of the old one do not enter."""
    result = call.run()
    ids = pinned_like(result)
    return call.give(result, ids * ZERO if "zeros" in call.name else ids)


def convert_kind(call: Call) -> Any:
    """``to``, ``float``, ``cpu``: another dtype or place; the meta device is kept."""
    kinds = [leaf for leaf in (*call.args, *call.kwargs.values()) if isinstance(leaf, torch.dtype)]
    named = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}
    x = call.args[0]
    others = [leaf.dtype for leaf in call.args[1:] if isinstance(leaf, Tensor)]
    dtype = (kinds or others or [named.get(call.name, x.dtype)])[0]
    if not dtype.is_floating_point:
        return pin(call)
    if dtype == x.dtype:
        return x
    return call.give(torch.empty_like(x, dtype=dtype, device="meta"), call.ids(x))


def window(dims: int) -> Rule:
    """Pooling and linear resizing over the last ``dims`` dimensions: windows tie what they read together."""

    def rule(call: Call) -> Any:
        x = call.argument(0, "input")
        ids = call.tied(call.ids(x), range(x.dim() - dims, x.dim()))
        return call.give(call.run(), ids)

    return rule


def interpolate(call: Call) -> Any:
    """Nearest, linear, cubic and area resizing are linear in x."""
    x = call.argument(0, "input")
    return window(x.dim() - 2)(call)


def reindex(call: Call) -> Any:
    """view, permute, cat, chunk, getitem…: done to the ids themselves."""
    if call.name in ("cat", "concat", "concatenate"):
        return cat(call)
    if any(call.tracer.is_live(tensor) and not tensor.is_floating_point() for tensor in call.tensors()):
        return pin(call)  # an index that depends on numbers
    try:
        ids = call.run_on_ids()
    except RuntimeError:  # an index that only the numbers know
        return pin(call)
    result = call.run()
    pairs = zip(tree_leaves(result), tree_leaves(ids), strict=True)
    for tensor, its_ids in pairs:
        call.tracer.set(tensor, compact(its_ids))
    return result


def iterate(call: Call) -> Any:
    """``for row in x``."""
    return iter(reindex(dataclasses.replace(call, func=torch.unbind)))


def view(call: Call) -> Any:
    """view needs contiguous memory, which expanded ids have not: reshape them."""
    x, *shape = call.args
    result = call.run()
    if shape and isinstance(shape[0], torch.dtype):
        return pin(call)
    ids = call.ids(x).expand(x.shape).reshape(result.shape)
    return call.give(result, compact(ids))


def cat(call: Call) -> Any:
    """Concatenation, at full size along its own dimension alone."""
    tensors = [t for t in call.argument(0, "tensors") if t.dim() > 1 or t.numel()]
    dim = call.argument(1, "dim", 0)
    all_ids = [call.ids(t) for t in tensors]
    rank = tensors[0].dim()
    dim %= rank
    shape = [max(ids.shape[d] for ids in all_ids) for d in range(rank)]
    sizes = [[*shape[:dim], t.shape[dim], *shape[dim + 1 :]] for t in tensors]
    full = [ids.expand(size) for ids, size in zip(all_ids, sizes, strict=True)]
    return call.give(call.run(), torch.cat(full, dim))


def reduce(call: Call) -> Any:
    """sum, mean, amax over some dimensions tie what they read together."""
    x = call.argument(0, "input")
    dims = call.argument(1, "dim", call.kwargs.get("axis"))
    if isinstance(dims, Tensor) or "other" in call.kwargs:
        return tie(call)  # torch.max(x, y)
    dims = range(x.dim()) if dims is None else [dims] if isinstance(dims, int) else dims or range(x.dim())
    dims = [d % x.dim() for d in dims]
    ids = call.tied(call.ids(x), dims)
    result = call.run()
    first = next(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
    if first.dim() < x.dim():
        ids = ids.reshape([size for d, size in enumerate(ids.shape) if d not in dims])
    return call.give(result, ids)


def pad(call: Call) -> Any:
    """Zero, reflecting, replicating and circular padding; another constant is a constant."""
    x, mode, value = call.argument(0, "input"), call.argument(2, "mode", "constant"), call.argument(3, "value")
    if mode == "constant" and value:
        return pin(call)
    ids = call.ids(x)
    widths = list(call.argument(1, "pad"))
    ends = [(x.dim() - 1 - i, widths[2 * i], widths[2 * i + 1]) for i in range(len(widths) // 2)]
    if any(dim == 1 for dim, _, _ in ends):  # channels are kept apart even where they share an id
        ids = ids.expand([size if dim == 1 else ids.shape[dim] for dim, size in enumerate(x.shape)])
    ends = [end for end in ends if ids.shape[end[0]] > 1 or end[0] == 1]  # elsewhere padding continues the channel
    if ends and mode != "constant":
        ids = call.tied(ids, [dim for dim, _, _ in ends])
        ends = []
    for dim, before, after in ends:
        length = ids.shape[dim]
        kept = ids.narrow(dim, max(0, -before), length + min(0, before) + min(0, after))
        zeros = [list(ids.shape), list(ids.shape)]
        zeros[0][dim], zeros[1][dim] = max(0, before), max(0, after)
        ids = torch.cat([torch.full(zeros[0], ZERO), kept, torch.full(zeros[1], ZERO)], dim)
    return call.give(call.run(), ids)


# ---- several tensors -------------------------------------------------------------------------------------------


def aligned(call: Call, tensors: list[Tensor]) -> list[Tensor]:
    """The operands' ids, broadcast against each other as the operands are."""
    rank = max(t.dim() for t in tensors)
    all_ids = [call.ids(t) for t in tensors]
    padded = [ids[(None,) * (rank - ids.dim())] for ids in all_ids]
    shape = torch.broadcast_shapes(*[ids.shape for ids in padded])
    return [ids.expand(shape) for ids in padded]


def tie(call: Call) -> Any:
    """x + y, maximum(x, y): both operands have one factor. Between two activations it is a residual ``add``."""
    operands = [arg for arg in (*call.args, *call.kwargs.values()) if isinstance(arg, Tensor)][:2]
    numbers = [arg for arg in (*call.args[:2], call.kwargs.get("other", 0)) if not isinstance(arg, Tensor)]
    if any(number != 0 for number in numbers):
        return pin(call)
    if len(operands) == 1:
        return call.give(call.run(), call.ids(operands[0]))
    if is_variant(call) and not call.tracer.is_live(operands[0]):
        return pin(call)
    a, b = aligned(call, operands)
    left, right = a.flatten().numpy(), b.flatten().numpy()
    call.trace.tie(left, right, call.where)
    if not any(call.tracer.name_of(operand) for operand in operands):
        merged = left[(left > PINNED) & (right > PINNED) & (left != right)]
        call.trace.residual.extend([np.unique(merged)] if merged.size else [])
    if is_variant(call) and bool((a == ZERO).any()):
        return pin(call)  # views of the zeros would keep their ids
    return call.give(call.run(), compact(torch.where(a == ZERO, b, a)))


def where(call: Call) -> Any:
    """where(condition, x, y) selects: x and y have one factor, 0 has any; a condition on numbers would see it."""
    condition, x, y = (call.argument(i, name) for i, name in enumerate(("condition", "input", "other")))
    return _select(call, condition, x, y)


def masked_fill(call: Call) -> Any:
    """masked_fill(x, mask, y) is where(mask, y, x)."""
    x, mask, value = (call.argument(i, name) for i, name in enumerate(("input", "mask", "value")))
    return pin(call) if is_variant(call) else _select(call, mask, value, x)


def _select(call: Call, condition: Tensor, *choices: Any) -> Any:
    tensors = [choice for choice in choices if isinstance(choice, Tensor)]
    numbers = [choice for choice in choices if not isinstance(choice, Tensor)]
    if call.tracer.is_live(condition) or not tensors or any(number != 0 for number in numbers):
        return pin(call)
    _, *ids = aligned(call, [condition, *tensors])
    a, b = ids[0], ids[-1]
    call.trace.tie(a.flatten().numpy(), b.flatten().numpy(), call.where)
    return call.give(call.run(), compact(torch.where(a == ZERO, b, a)))


def product(call: Call) -> Any:
    """x · y is bilinear: exactly one operand carries its factor, the other is pinned (a gate, usually)."""
    operands = [arg for arg in (*call.args, *call.kwargs.values()) if isinstance(arg, Tensor)]
    if call.argument(2, "rounding_mode") is not None:
        return pin(call)
    if len(operands) == 1:
        if call.args and operands[0] is not call.args[0] and call.name != "mul":
            return pin(call)  # number / x
        return call.give(call.run(), call.ids(operands[0]))
    carrier, gate = _carrier_and_gate(call, operands)
    call.trace.pin(call.ids(gate).flatten().numpy(), f"multiplies a rescaled tensor in {call.where}")
    both = dict(zip((id(operands[0]), id(operands[1])), aligned(call, operands), strict=True))
    return call.give(call.run(), compact(both[id(carrier)]))


def _carrier_and_gate(call: Call, operands: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Only a numerator can carry; in x · y the operand that is not pinned anyway, else the larger one."""
    first, second = operands
    if call.name == "div" or is_variant(call):
        return first, second
    free = [bool((call.ids(t) > PINNED).any()) and not call.tracer.name_of(t) for t in operands]
    size = [t.numel() for t in operands]
    return (second, first) if (free[1], size[1]) > (free[0], size[0]) else (first, second)


# ---- layers ----------------------------------------------------------------------------------------------------


def convolution(spatial: int, transposed: bool = False) -> Rule:
    """W[j, k] z[k] + b[j]: columns read, rows produce; a grouped one reads its own block."""

    def rule(call: Call) -> Any:
        x, weight, bias = (call.argument(i, name) for i, name in enumerate(("input", "weight", "bias")))
        groups = int(call.argument(6, "groups", 1))
        result = call.run()
        channel = result.dim() - 1 - spatial
        names = _weight_names(call, weight, bias)
        if names is None or weight.dim() != spatial + 2 or (names[1] and bias.numel() != result.shape[channel]):
            return pin(call, result)
        columns = call.vector(call.ids(x), channel, x.shape[channel])
        rows = call.trace.fresh(result.shape[channel])
        call.trace.slots.append(Slot(names[0], rows, columns, groups, transposed))
        if names[1]:
            call.trace.slots.append(Slot(names[1], rows))
        shape = [1] * result.dim()
        shape[channel] = -1
        call.tracer.step(names[0], x, result)
        return call.give(result, torch.from_numpy(rows).view(shape))

    return rule


def _weight_names(call: Call, weight: Tensor, bias: Tensor | None) -> tuple[str, str | None] | None:
    """The names of a layer's parameters; None where one of them is computed and cannot be rescaled."""
    name, bias_name = call.tracer.name_of(weight), call.tracer.name_of(bias)
    if name is None or not weight.is_floating_point() or (bias is not None and bias_name is None):
        return None
    return name, bias_name


def batch_norm(call: Call) -> Any:
    """BatchNorm normalises away what comes in (its running statistics stay) and γ, β produce new units."""
    names = ("input", "running_mean", "running_var", "weight", "bias")
    x, mean, var, weight, bias = (call.argument(i, name) for i, name in enumerate(names))
    eps = float(call.argument(7, "eps", 1e-5))
    columns = call.vector(call.ids(x), 1, x.shape[1])
    name_of = call.tracer.name_of
    title = (name_of(weight) or name_of(mean) or call.tracer.path).rpartition(".")[0] or call.tracer.path
    rows = _affine_rows(call, weight, bias, x.shape[1], f"the BatchNorm {title}")
    call.trace.batch_norms.append(BatchNormCall(title, rows, columns, name_of(weight), name_of(var), eps))
    shape = [1] * x.dim()
    shape[1] = -1
    result = torch.empty_like(x, device="meta")
    call.tracer.step(title, x, result)
    return call.give(result, torch.from_numpy(rows).view(shape))


def _affine_rows(call: Call, weight: Tensor | None, bias: Tensor | None, size: int, title: str) -> Any:
    """Ids of the units that γ and β produce; without them the units are pinned."""
    rows = call.trace.fresh(size)
    names = [call.tracer.name_of(parameter) for parameter in (weight, bias)]
    for parameter, name in zip((weight, bias), names, strict=True):
        if name is not None:
            call.trace.slots.append(Slot(name, rows))
        elif parameter is not None:
            call.trace.pin(rows, f"comes from {title}, whose γ or β is computed")
    if names[0] is None:
        call.trace.pin(rows, f"comes from {title}, which has no γ")
    return rows


def normalization(weight_at: int, channels_last: bool) -> Rule:
    """LayerNorm, GroupNorm, InstanceNorm mix channels or keep no γ-free factor: input pinned, γ and β produce."""

    def rule(call: Call) -> Any:
        x = call.argument(0, "input")
        weight = call.argument(weight_at, "weight")
        bias = call.argument(weight_at + 1, "bias")
        title = f"the normalization {call.tracer.path or call.name}"
        call.trace.pin(call.ids(x).flatten().numpy(), f"enters {title}, which is not homogeneous")
        result = torch.empty_like(x, device="meta")
        if weight is None:
            return call.give(result, pinned_like(x))
        rows = torch.from_numpy(_affine_rows(call, weight, bias, weight.numel(), title))
        shape = [1] * (x.dim() - weight.dim()) + list(weight.shape) if channels_last else [1, -1] + [1] * (x.dim() - 2)
        return call.give(result, rows.view(shape))

    return rule


# ---- what is not homogeneous -----------------------------------------------------------------------------------


def gate(call: Call) -> Any:
    """sigmoid, softmax: not homogeneous, and common as gates and as outputs: pinned, no reason to refuse."""
    x = call.argument(0, "input")
    call.trace.pin(call.ids(x).flatten().numpy(), f"enters {call.where}, which is not homogeneous")
    return call.give(call.run(), pinned_like(x))


def pin(call: Call, result: Any = None) -> Any:
    """Everything read has factor 1, and so has the result."""
    reason = f"enters {call.where}, which is not known to be homogeneous"
    for tensor in call.tensors():
        if call.tracer.is_live(tensor):
            call.tracer.leave_alone(tensor, reason)
    if is_variant(call):
        call.tracer.set(call.args[0], pinned_like(call.args[0]))
        call.run()
        return call.args[0]
    result = call.run() if result is None else result
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor) and not call.tracer.is_live(leaf):
            call.tracer.set(leaf, pinned_like(leaf))
    return result


def activation(call: Call) -> Any:
    """An activation that is not homogeneous: pinned, and the network is refused unless ``partial``."""
    x = call.argument(0, "input")
    module = call.tracer.stack[-1] if call.tracer.stack else None
    kind = type(module).__name__ if module is not None and not list(module.children()) else call.name
    call.trace.offenders.append((call.tracer.path, kind))
    call.trace.pin(call.ids(x).flatten().numpy(), f"enters {call.tracer.path} ({kind}), which is not homogeneous")
    return call.give(call.run(), pinned_like(x))


def clamp(call: Call) -> Any:
    """clamp(x, min=0) is ReLU; other bounds see the factor."""
    low, high = call.argument(1, "min"), call.argument(2, "max")
    bounds_are_homogeneous = high is None and isinstance(low, int | float) and low == 0
    return carry(call) if bounds_are_homogeneous else activation(call)


def threshold(call: Call) -> Any:
    """threshold(x, 0, 0) is ReLU."""
    return carry(call) if call.argument(1, "threshold") == call.argument(2, "value") == 0 else activation(call)


_DIMS = (1, 2, 3)
_POOLS = ("max", "avg", "lp", "adaptive_avg", "adaptive_max")

RULES: dict[str, Rule] = {
    # carries
    **dict.fromkeys(("relu", "leaky_relu", "rrelu", "abs", "neg", "positive", "contiguous", "clone", "detach",
                     "alias", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"), carry),
    **dict.fromkeys(("to", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda"), convert_kind),
    "prelu": prelu,
    **dict.fromkeys(("new_empty", "new_zeros", "new_ones", "new_full", "empty_like", "zeros_like", "ones_like",
                     "full_like", "rand_like", "randn_like", "randint_like"), new),
    "clamp": clamp,
    "clip": clamp,
    "clamp_min": clamp,
    "threshold": threshold,
    # windows
    **{f"{kind}_pool{n}d": window(n) for n in _DIMS for kind in _POOLS},
    **{f"{kind}_pool{n}d_with_indices": window(n) for n in _DIMS for kind in ("max", "adaptive_max")},
    **dict.fromkeys(("interpolate", "upsample", "upsample_nearest", "upsample_bilinear"), interpolate),
    **dict.fromkeys(("sum", "mean", "amax", "amin", "max", "min", "nansum", "median"), reduce),
    # re-indexing
    **dict.fromkeys(("reshape", "flatten", "unflatten", "permute", "transpose", "t", "swapaxes", "swapdims", "movedim",
                     "moveaxis", "squeeze", "unsqueeze", "chunk", "split", "split_with_sizes", "tensor_split", "unbind",
                     "select", "narrow", "getitem", "expand", "expand_as", "broadcast_to", "repeat", "tile", "roll",
                     "flip", "rot90", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "index_select", "ravel",
                     "stack", "hstack", "vstack", "cat", "concat", "concatenate", "T", "mT", "data",
                     "repeat_interleave", "native_channel_shuffle", "reshape_as", "unfold"), reindex),
    "iter": iterate,
    **dict.fromkeys(("view", "view_as"), view),
    "pad": pad,
    # several tensors
    **dict.fromkeys(("add", "sub", "maximum", "minimum", "fmax", "fmin"), tie),
    **dict.fromkeys(("mul", "multiply", "div", "divide", "true_divide", "truediv"), product),
    "where": where,
    "masked_fill": masked_fill,
    # layers
    **{f"conv{n}d": convolution(n) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": convolution(n, transposed=True) for n in (1, 2, 3)},
    "linear": convolution(0),
    "batch_norm": batch_norm,
    "layer_norm": normalization(2, channels_last=True),
    "group_norm": normalization(2, channels_last=False),
    "instance_norm": normalization(3, channels_last=False),
    **dict.fromkeys(("sigmoid", "hardsigmoid", "softmax", "log_softmax"), gate),
    # activations that refuse the network
    **dict.fromkeys(("relu6", "hardtanh", "hardswish", "silu", "gelu", "mish", "elu", "celu", "selu", "softplus",
                     "tanh", "logsigmoid", "tanhshrink", "softshrink", "hardshrink", "softsign", "glu"), activation),
    # no use of the numbers
    **dict.fromkeys(("size", "dim", "ndimension", "numel", "nelement", "stride", "is_floating_point", "is_contiguous",
                     "shape", "dtype", "device", "ndim", "is_cuda", "is_meta", "requires_grad", "layout", "is_sparse",
                     "is_quantized", "is_complex", "is_nested", "names", "len", "get_device", "element_size", "is_leaf",
                     "is_mps", "is_cpu", "is_xpu", "storage_offset", "has_names", "data_ptr", "is_inference", "grad_fn",
                     "is_mkldnn", "is_vulkan", "is_ipu", "is_hpu", "is_xla", "is_mtia", "is_maia", "hash", "repr",
                     "_backward_hooks", "is_same_size", "__hash__", "itemsize", "nbytes"), metadata),
}  # fmt: skip


@functools.cache
def rule_of(func: Any) -> tuple[str, Callable[[Call], Any]]:
    """A torch function's plain name and its rule; functions that are not torch's own are pinned."""
    if not _is_torchs_own(func) or func.__name__ == "__float__":  # float(x) is a number, x.float() a tensor
        return str(getattr(func, "__name__", func)), pin
    name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
    plain = name if name in RULES else name.strip("_")
    if name.startswith(("__i", "__r")) and plain not in RULES and name not in ("__rtruediv__", "__rdiv__"):
        plain = plain[1:]  # __iadd__, __radd__
    return (plain, RULES[plain]) if plain in RULES else (name, pin)


def _is_torchs_own(func: Any) -> bool:
    """torch.*, Tensor methods and properties, torch.nn.functional, aten operators; not a library's custom operator."""
    module = getattr(func, "__module__", None) or "torch"
    if module.startswith("torch._ops"):
        return module == "torch._ops.aten"
    return bool(module == "torch" or module.startswith("torch."))
