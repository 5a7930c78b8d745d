"""One rule per operation: what it produces, consumes, carries, ties and pins.

:data:`RULES` lists all supported operations by torch's name; the in-place, dunder and method
variants of an operation follow the same rule. An operation that is not listed pins everything that
it reads, and its result has factor 1: no rule is ever guessed.

A function f carries a factor if f(c·x) = c·f(x) for every c > 0 (docs/design.md, "Positive scale
invariance").
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

from pathconvert.conversion.layer_rules import batch_norm, convolution, normalization
from pathconvert.conversion.pinning import activation, gate, pin, works_in_place
from pathconvert.conversion.trace import PINNED, ZERO, Slot
from pathconvert.conversion.tracer import Call, Rule, compact, metadata, pinned_like

# ---- carries: one tensor in, the same ids out ----------------------------------------------------


def carry(call: Call) -> Any:
    """relu(c·x) = c·relu(x) for each element, so the ids stay.

    The mask of dropout does not depend on its input.
    """
    return call.with_ids(call.run(), call.ids(call.argument(0, "input")))


def prelu(call: Call) -> Any:
    """Pin PReLU's slopes to factor 1.

    This holds even where they are computed or are another layer's parameter.
    """
    slopes = call.argument(1, "weight")
    name = call.tracer.name_of(slopes)
    if name is None:
        call.trace.pin(call.ids(slopes).flatten().numpy(), f"is a slope in {call.where}")
    else:
        call.trace.slots.append(Slot(name, np.full(slopes.numel(), PINNED)))
    return carry(call)


def new(call: Call) -> Any:
    """zeros_like, new_empty, …: a new tensor that does not depend on the numbers of the old one."""
    result = call.run()
    ids = pinned_like(result)
    return call.with_ids(result, ids * ZERO if "zeros" in call.name else ids)


def convert_kind(call: Call) -> Any:
    """``to``, ``float``, ``cpu``: the dtype or the device changes.

    Here the result stays on the meta device.
    """
    kinds = [leaf for leaf in (*call.args, *call.kwargs.values()) if isinstance(leaf, torch.dtype)]
    named = {
        "float": torch.float32,
        "double": torch.float64,
        "half": torch.float16,
        "bfloat16": torch.bfloat16,
    }
    x = call.args[0]
    others = [leaf.dtype for leaf in call.args[1:] if isinstance(leaf, Tensor)]
    dtype = (kinds or others or [named.get(call.name, x.dtype)])[0]
    if not dtype.is_floating_point:
        return pin(call)
    if dtype == x.dtype:
        return x
    return call.with_ids(torch.empty_like(x, dtype=dtype, device="meta"), call.ids(x))


def window(dims: int) -> Rule:
    """Pooling and linear resizing over the last ``dims`` dimensions.

    Elements that share a window are tied.
    """

    def rule(call: Call) -> Any:
        x = call.argument(0, "input")
        ids = call.tied(call.ids(x), range(x.dim() - dims, x.dim()))
        return call.with_ids(call.run(), ids)

    return rule


def interpolate(call: Call) -> Any:
    """Nearest, linear, cubic and area resizing are linear in x."""
    x = call.argument(0, "input")
    return window(x.dim() - 2)(call)


def reindex(call: Call) -> Any:
    """view, permute, cat, chunk, getitem, …: the same operation is applied to the ids."""
    if call.name in ("cat", "concat", "concatenate"):
        return cat(call)
    if any(
        call.tracer.is_live(tensor) and not tensor.is_floating_point() for tensor in call.tensors()
    ):
        return pin(call)  # the index depends on numbers
    try:
        ids = call.run_on_ids()
    except RuntimeError:  # the index depends on numbers
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
    """view needs contiguous memory, which expanded ids do not have, so they are reshaped."""
    x, *shape = call.args
    result = call.run()
    if shape and isinstance(shape[0], torch.dtype):
        return pin(call)
    ids = call.ids(x).expand(x.shape).reshape(result.shape)
    return call.with_ids(result, compact(ids))


def cat(call: Call) -> Any:
    """Concatenation; only along its own dimension are the ids expanded to full size."""
    tensors = [t for t in call.argument(0, "tensors") if t.dim() > 1 or t.numel()]
    dim = call.argument(1, "dim", 0)
    all_ids = [call.ids(t) for t in tensors]
    rank = tensors[0].dim()
    dim %= rank
    shape = [max(ids.shape[d] for ids in all_ids) for d in range(rank)]
    sizes = [[*shape[:dim], t.shape[dim], *shape[dim + 1 :]] for t in tensors]
    full = [ids.expand(size) for ids, size in zip(all_ids, sizes, strict=True)]
    return call.with_ids(call.run(), torch.cat(full, dim))


def reduce(call: Call) -> Any:
    """sum, mean, amax over some dimensions: elements that are reduced together are tied."""
    x = call.argument(0, "input")
    dims = call.argument(1, "dim", call.kwargs.get("axis"))
    if isinstance(dims, Tensor) or "other" in call.kwargs:
        return tie(call)  # torch.max(x, y)
    dims = (
        range(x.dim())
        if dims is None
        else [dims]
        if isinstance(dims, int)
        else dims or range(x.dim())
    )
    dims = [d % x.dim() for d in dims]
    ids = call.tied(call.ids(x), dims)
    result = call.run()
    first = next(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
    if first.dim() < x.dim():
        ids = ids.reshape([size for d, size in enumerate(ids.shape) if d not in dims])
    return call.with_ids(result, ids)


def pad(call: Call) -> Any:
    """Zero, reflecting, replicating and circular padding; padding with another constant pins."""
    x, mode, value = (
        call.argument(0, "input"),
        call.argument(2, "mode", "constant"),
        call.argument(3, "value"),
    )
    if mode == "constant" and value:
        return pin(call)
    ids = call.ids(x)
    widths = list(call.argument(1, "pad"))
    ends = [(x.dim() - 1 - i, widths[2 * i], widths[2 * i + 1]) for i in range(len(widths) // 2)]
    if any(dim == 1 for dim, _, _ in ends):  # channels are kept apart even where they share an id
        ids = ids.expand([size if dim == 1 else ids.shape[dim] for dim, size in enumerate(x.shape)])
    # elsewhere padding continues the channel
    ends = [end for end in ends if ids.shape[end[0]] > 1 or end[0] == 1]
    if ends and mode != "constant":
        ids = call.tied(ids, [dim for dim, _, _ in ends])
        ends = []
    for dim, before, after in ends:
        length = ids.shape[dim]
        kept = ids.narrow(dim, max(0, -before), length + min(0, before) + min(0, after))
        zeros = [list(ids.shape), list(ids.shape)]
        zeros[0][dim], zeros[1][dim] = max(0, before), max(0, after)
        ids = torch.cat([torch.full(zeros[0], ZERO), kept, torch.full(zeros[1], ZERO)], dim)
    return call.with_ids(call.run(), ids)


# ---- several tensors -----------------------------------------------------------------------------


def aligned(call: Call, tensors: list[Tensor]) -> list[Tensor]:
    """The operands' ids, broadcast to a common shape in the same way as the operands."""
    rank = max(t.dim() for t in tensors)
    all_ids = [call.ids(t) for t in tensors]
    padded = [ids[(None,) * (rank - ids.dim())] for ids in all_ids]
    shape = torch.broadcast_shapes(*[ids.shape for ids in padded])
    return [ids.expand(shape) for ids in padded]


def tie(call: Call) -> Any:
    """x + y, maximum(x, y): both operands share a factor.

    Between two activations this is a residual ``add``.
    """
    operands = [arg for arg in (*call.args, *call.kwargs.values()) if isinstance(arg, Tensor)][:2]
    numbers = [
        arg for arg in (*call.args[:2], call.kwargs.get("other", 0)) if not isinstance(arg, Tensor)
    ]
    if any(number != 0 for number in numbers):
        return pin(call)
    if len(operands) == 1:
        return call.with_ids(call.run(), call.ids(operands[0]))
    if works_in_place(call) and not call.tracer.is_live(operands[0]):
        return pin(call)
    a, b = aligned(call, operands)
    left, right = a.flatten().numpy(), b.flatten().numpy()
    call.trace.tie(left, right, call.where)
    if not any(call.tracer.name_of(operand) for operand in operands):
        merged = left[(left > PINNED) & (right > PINNED) & (left != right)]
        call.trace.residual.extend([np.unique(merged)] if merged.size else [])
    if works_in_place(call) and bool((a == ZERO).any()):
        return pin(call)  # other views of the zeros would keep their ids
    return call.with_ids(call.run(), compact(torch.where(a == ZERO, b, a)))


def where(call: Call) -> Any:
    """where(condition, x, y): x and y share a factor (0 fits any).

    The result is pinned if the condition depends on numbers.
    """
    condition, x, y = (
        call.argument(i, name) for i, name in enumerate(("condition", "input", "other"))
    )
    return _select(call, condition, x, y)


def masked_fill(call: Call) -> Any:
    """masked_fill(x, mask, y) is where(mask, y, x)."""
    x, mask, value = (call.argument(i, name) for i, name in enumerate(("input", "mask", "value")))
    return pin(call) if works_in_place(call) else _select(call, mask, value, x)


def _select(call: Call, condition: Tensor, *choices: Any) -> Any:
    """The common rule of where and masked_fill; a number among ``choices`` has to be 0."""
    tensors = [choice for choice in choices if isinstance(choice, Tensor)]
    numbers = [choice for choice in choices if not isinstance(choice, Tensor)]
    if call.tracer.is_live(condition) or not tensors or any(number != 0 for number in numbers):
        return pin(call)
    _, *ids = aligned(call, [condition, *tensors])
    a, b = ids[0], ids[-1]
    call.trace.tie(a.flatten().numpy(), b.flatten().numpy(), call.where)
    return call.with_ids(call.run(), compact(torch.where(a == ZERO, b, a)))


def product(call: Call) -> Any:
    """x · y is bilinear: exactly one operand carries its factor.

    The other, usually a gate, is pinned.
    """
    operands = [arg for arg in (*call.args, *call.kwargs.values()) if isinstance(arg, Tensor)]
    if call.argument(2, "rounding_mode") is not None:
        return pin(call)
    if len(operands) == 1:
        if call.args and operands[0] is not call.args[0] and call.name != "mul":
            return pin(call)  # number / x
        return call.with_ids(call.run(), call.ids(operands[0]))
    carrier, gate = _carrier_and_gate(call, operands)
    call.trace.pin(
        call.ids(gate).flatten().numpy(), f"multiplies a rescaled tensor in {call.where}"
    )
    both = dict(zip((id(operands[0]), id(operands[1])), aligned(call, operands), strict=True))
    return call.with_ids(call.run(), compact(both[id(carrier)]))


def _carrier_and_gate(call: Call, operands: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The operand that carries its factor, and the other one.

    Of a quotient the numerator carries; of a product, the operand that is not pinned already, else
    the larger one.

    Returns:
        Carrier and gate.
    """
    first, second = operands
    if call.name == "div" or works_in_place(call):
        return first, second
    free = [bool((call.ids(t) > PINNED).any()) and not call.tracer.name_of(t) for t in operands]
    size = [t.numel() for t in operands]
    return (second, first) if (free[1], size[1]) > (free[0], size[0]) else (first, second)


# ---- what is not homogeneous ---------------------------------------------------------------------


def clamp(call: Call) -> Any:
    """clamp(x, min=0) is ReLU; other bounds are not homogeneous."""
    low, high = call.argument(1, "min"), call.argument(2, "max")
    bounds_are_homogeneous = high is None and isinstance(low, int | float) and low == 0
    return carry(call) if bounds_are_homogeneous else activation(call)


def threshold(call: Call) -> Any:
    """threshold(x, 0, 0) is ReLU."""
    return (
        carry(call)
        if call.argument(1, "threshold") == call.argument(2, "value") == 0
        else activation(call)
    )


_DIMS = (1, 2, 3)
_POOLS = ("max", "avg", "lp", "adaptive_avg", "adaptive_max")

RULES: dict[str, Rule] = {
    # one tensor in, the same ids out
    **dict.fromkeys((
        "relu", "leaky_relu", "rrelu", "abs", "neg", "positive", "contiguous", "clone",
        "detach", "alias", "dropout", "dropout1d", "dropout2d", "dropout3d",
        "feature_dropout",
    ), carry),
    **dict.fromkeys((
        "to", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda",
    ), convert_kind),
    "prelu": prelu,
    **dict.fromkeys((
        "new_empty", "new_zeros", "new_ones", "new_full", "empty_like", "zeros_like",
        "ones_like", "full_like", "rand_like", "randn_like", "randint_like",
    ), new),
    "clamp": clamp,
    "clip": clamp,
    "clamp_min": clamp,
    "threshold": threshold,
    # windows
    **{f"{kind}_pool{n}d": window(n) for n in _DIMS for kind in _POOLS},
    **{f"{kind}_pool{n}d_with_indices": window(n) for n in _DIMS
        for kind in ("max", "adaptive_max")},
    **dict.fromkeys((
        "interpolate", "upsample", "upsample_nearest", "upsample_bilinear",
    ), interpolate),
    **dict.fromkeys(("sum", "mean", "amax", "amin", "max", "min", "nansum", "median"), reduce),
    # re-indexing
    **dict.fromkeys((
        "reshape", "flatten", "unflatten", "permute", "transpose", "t", "swapaxes",
        "swapdims", "movedim", "moveaxis", "squeeze", "unsqueeze", "chunk", "split",
        "split_with_sizes", "tensor_split", "unbind", "select", "narrow", "getitem",
        "expand", "expand_as", "broadcast_to", "repeat", "tile", "roll", "flip",
        "rot90", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "index_select",
        "ravel", "stack", "hstack", "vstack", "cat", "concat", "concatenate", "T", "mT",
        "data", "repeat_interleave", "native_channel_shuffle", "reshape_as", "unfold",
    ), reindex),
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
    **dict.fromkeys((
        "relu6", "hardtanh", "hardswish", "silu", "gelu", "mish", "elu", "celu", "selu",
        "softplus", "tanh", "logsigmoid", "tanhshrink", "softshrink", "hardshrink",
        "softsign", "glu",
    ), activation),
    # these do not use the numbers
    **dict.fromkeys((
        "size", "dim", "ndimension", "numel", "nelement", "stride", "is_floating_point",
        "is_contiguous", "shape", "dtype", "device", "ndim", "is_cuda", "is_meta",
        "requires_grad", "layout", "is_sparse", "is_quantized", "is_complex",
        "is_nested", "names", "len", "get_device", "element_size", "is_leaf", "is_mps",
        "is_cpu", "is_xpu", "storage_offset", "has_names", "data_ptr", "is_inference",
        "grad_fn", "is_mkldnn", "is_vulkan", "is_ipu", "is_hpu", "is_xla", "is_mtia",
        "is_maia", "hash", "repr", "_backward_hooks", "is_same_size", "__hash__",
        "itemsize", "nbytes",
    ), metadata),
}  # fmt: skip


@functools.cache
def rule_of(func: Any) -> tuple[str, Callable[[Call], Any]]:
    """The plain name of a function and the rule that it follows.

    Functions that are not torch's own are pinned.

    Returns:
        The name, without dunders and the underscore of in-place variants where it is in
        :data:`RULES`, and the rule.
    """
    # float(x) is a number, x.float() a tensor
    if not _is_torchs_own(func) or func.__name__ == "__float__":
        return str(getattr(func, "__name__", func)), pin
    name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
    plain = name if name in RULES else name.strip("_")
    if (
        name.startswith(("__i", "__r"))
        and plain not in RULES
        and name not in ("__rtruediv__", "__rdiv__")
    ):
        plain = plain[1:]  # __iadd__, __radd__
    return (plain, RULES[plain]) if plain in RULES else (name, pin)


def _is_torchs_own(func: Any) -> bool:
    """Whether a function is in torch.*, torch.nn.functional, Tensor or aten.

    The custom operators of other libraries are not.
    """
    module = getattr(func, "__module__", None) or "torch"
    if module.startswith("torch._ops"):
        return module == "torch._ops.aten"
    return bool(module == "torch" or module.startswith("torch."))
