"""One rule per operation: what it produces, consumes, carries, ties and pins.

:data:`RULES` lists all supported operations by torch's name; the in-place, dunder and method
variants of an operation follow the same rule. An operation that is not listed pins everything that
it reads, and its result has factor 1: no rule is ever guessed.

A function f carries a factor if f(c·x) = c·f(x) for every c > 0 (docs/design.md, "Positive scale
invariance").
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from pathconvert.conversion.tracing.contractions import attention, einsum, matmul
from pathconvert.conversion.tracing.elementwise import (
    carry,
    clamp,
    compare,
    convert_kind,
    masked_fill,
    new,
    prelu,
    product,
    threshold,
    tie,
    where,
)
from pathconvert.conversion.tracing.function_call import (
    NUMBERLESS,
    Call,
    NotBound,
    Rule,
    constant,
    device,
    metadata,
)
from pathconvert.conversion.tracing.layer_rules import batch_norm, convolution, normalization
from pathconvert.conversion.tracing.pinning import activation, gate, pin
from pathconvert.conversion.tracing.reindexing import (
    along,
    cat,
    fold,
    grid_sample,
    interpolate,
    iterate,
    norm,
    pad,
    reduce,
    reindex,
    set_item,
    unfold,
    unpool,
    view,
    window,
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
        "to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda",
    ), convert_kind),
    "prelu": prelu,
    **dict.fromkeys((
        "new_empty", "new_zeros", "new_ones", "new_full", "empty_like", "zeros_like",
        "ones_like", "full_like", "rand_like", "randn_like", "randint_like",
    ), new),
    "new_tensor": constant,
    "device": device,
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
    **dict.fromkeys(("std", "norm", "vector_norm", "linalg_vector_norm"), norm),
    **dict.fromkeys(("cumsum", "sort", "topk", "cummax", "cummin"), along),
    **{f"max_unpool{n}d": unpool(n) for n in _DIMS},
    "grid_sample": grid_sample,
    # re-indexing
    **dict.fromkeys((
        "reshape", "flatten", "unflatten", "permute", "transpose", "t", "swapaxes",
        "swapdims", "movedim", "moveaxis", "squeeze", "unsqueeze", "chunk", "split",
        "split_with_sizes", "tensor_split", "unbind", "select", "narrow", "getitem",
        "expand", "expand_as", "broadcast_to", "repeat", "tile", "roll", "flip",
        "rot90", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "index_select",
        "ravel", "stack", "hstack", "vstack", "T", "mT",
        "data", "repeat_interleave", "native_channel_shuffle", "reshape_as",
    ), reindex),
    **dict.fromkeys(("cat", "concat", "concatenate"), cat),
    "setitem": set_item,
    "unfold": unfold,
    "fold": fold,
    "iter": iterate,
    **dict.fromkeys(("view", "view_as"), view),
    "pad": pad,
    # several tensors
    **dict.fromkeys(("add", "sub", "maximum", "minimum", "fmax", "fmin"), tie),
    **dict.fromkeys(("mul", "multiply", "div", "divide", "true_divide", "truediv"), product),
    **dict.fromkeys(("gt", "lt", "ge", "le", "eq", "ne", "greater", "less", "greater_equal",
                     "less_equal", "not_equal", "sign", "sgn", "signbit"), compare),
    "where": where,
    "masked_fill": masked_fill,
    # layers
    **{f"conv{n}d": convolution(n) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": convolution(n, transposed=True) for n in (1, 2, 3)},
    "linear": convolution(0),
    **dict.fromkeys(("matmul", "mm", "bmm"), matmul),
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
    "batch_norm": batch_norm,
    "layer_norm": normalization(channels_last=True),
    "group_norm": normalization(channels_last=False),
    "instance_norm": normalization(channels_last=False),
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
        "is_contiguous", "shape", "dtype", "ndim", "is_cuda", "is_meta",
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
    name = _attribute(func.__self__) if func.__name__ == "__get__" else func.__name__
    if isinstance(func, torch._ops.OpOverload):
        name = name.partition(".")[0]  # aten::add.Tensor
    plain = name if name in RULES else name.strip("_")
    if (
        name.startswith(("__i", "__r"))
        and plain not in RULES
        and name not in ("__rtruediv__", "__rdiv__")
    ):
        plain = plain[1:]  # __iadd__, __radd__
    return (plain, _pinned_if_not_bound(RULES[plain])) if plain in RULES else (name, pin)


def _pinned_if_not_bound(rule: Rule) -> Rule:
    """The rule, or :func:`pin` for a call that fits none of its function's signatures."""
    if rule in NUMBERLESS:
        return rule

    def bound(call: Call) -> Any:
        try:
            return rule(call)
        except NotBound:
            return pin(call)

    return bound


def _attribute(getter: Any) -> str:
    """The name of an attribute of tensors, from the object that gets it."""
    return str(getattr(getter, "__name__", None) or getter.fget.__name__)


def _is_torchs_own(func: Any) -> bool:
    """Whether a function is in torch.*, torch.nn.functional, Tensor or aten.

    Custom operators of libraries are not.
    """
    module = getattr(func, "__module__", None) or "torch"
    if module.startswith("torch._ops"):
        return module == "torch._ops.aten"
    return bool(module == "torch" or module.startswith("torch."))
