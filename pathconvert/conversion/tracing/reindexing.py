"""Rules for operations that move elements, or take several together along dimensions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pathconvert.conversion.tracing.elementwise import tie
from pathconvert.conversion.tracing.function_call import Call, Rule, compact
from pathconvert.conversion.tracing.pinning import is_zero, pin
from pathconvert.conversion.tracing.trace import PINNED, ZERO

# ---- elements that move --------------------------------------------------------------------------


def reindex(call: Call) -> Any:
    """permute, chunk, getitem, …: the same operation is applied to the ids."""
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
    """``for row in x``: every row takes the ids that it has in x."""
    return iter(reindex(dataclasses.replace(call, func=torch.unbind)))


def view(call: Call) -> Any:
    """view needs contiguous memory, which expanded ids do not have, so they are reshaped."""
    x = call.input
    if any(isinstance(one, torch.dtype) for one in (*call.args, *call.kwargs.values())):
        return pin(call)
    result = call.run()
    ids = call.ids(x).expand(x.shape).reshape(result.shape)
    return call.with_ids(result, compact(ids))


def cat(call: Call) -> Any:
    """Concatenation; only along its own dimension are the ids expanded to full size."""
    tensors = [t for t in call.argument("tensors") if t.dim() > 1 or t.numel()]
    dim = call.argument("dim", 0)
    all_ids = [call.ids(t) for t in tensors]
    rank = tensors[0].dim()
    dim %= rank
    shape = [max(ids.shape[d] for ids in all_ids) for d in range(rank)]
    sizes = [[*shape[:dim], t.shape[dim], *shape[dim + 1 :]] for t in tensors]
    full = [ids.expand(size) for ids, size in zip(all_ids, sizes, strict=True)]
    return call.with_ids(call.run(), torch.cat(full, dim))


def pad(call: Call) -> Any:
    """Zero, reflecting, replicating and circular padding; padding with another constant pins."""
    x, mode, value = call.input, call.argument("mode", "constant"), call.argument("value")
    if mode == "constant" and value:
        return pin(call)
    ids = call.ids(x)
    widths = [int(width) for width in call.argument("pad")]
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


def set_item(call: Call) -> Any:
    """``y[index] = x``: the elements that are overwritten take the ids of what is written.

    Other tensors that share the memory would keep their old ids, so that ids that change are pinned
    then.
    """
    target, index, value = call.args
    live = [t for t in tree_leaves(index) if isinstance(t, Tensor) and call.tracer.is_live(t)]
    if live or not call.tracer.has_ids(target) or id(target) in call.tracer.names:
        return pin(call)
    ids = call.ids(value) if isinstance(value, Tensor) else torch.tensor(PINNED)
    old = call.ids(target).expand(target.shape)
    new = old.clone()
    new[index] = torch.tensor(ZERO) if is_zero(call, value) else ids
    if torch.equal(old, new):  # x[:, 0] *= 2 writes a view back to where it lies already
        return None
    if call.tracer.has_other_views(target):
        return pin(call)
    call.tracer.set(target, compact(new))
    return None


def unfold(call: Call) -> Any:
    """Patches of an image [N, C, H, W] as columns [N, C · k · k, L], with zeros outside."""
    if call.func is not F.unfold:
        return reindex(call)  # Tensor.unfold is a view
    x = call.input
    arguments = {key: value for key, value in call.arguments.items() if key != "input"}
    ids = F.unfold(call.ids(x).expand(x.shape).double(), **arguments).long()
    return call.with_ids(call.run(), compact(ids))


def fold(call: Call) -> Any:
    """The inverse of unfold: overlapping patches are added, so that all of a channel is tied."""
    x, kernel = call.input, call.argument("kernel_size")
    taps = math.prod(kernel) if isinstance(kernel, Sequence) else kernel**2
    result = call.run()
    channel = result.dim() - 3
    ids = call.ids(x).expand(*x.shape)
    ids = ids.unflatten(-2, (result.shape[channel], taps))
    ids = call.tied(ids, [ids.dim() - 2, ids.dim() - 1])
    return call.with_ids(result, compact(ids))


# ---- elements that are taken together ------------------------------------------------------------


def window(dims: int) -> Rule:
    """Pooling and linear resizing over the last ``dims`` dimensions.

    Elements that share a window are tied.
    """

    def rule(call: Call) -> Any:
        x = call.input
        ids = call.tied(call.ids(x), range(x.dim() - dims, x.dim()))
        return call.with_ids(call.run(), ids)

    return rule


def interpolate(call: Call) -> Any:
    """Nearest, linear, cubic and area resizing are linear in x."""
    return window(call.input.dim() - 2)(call)


def reduce(call: Call) -> Any:
    """sum, mean, amax over some dimensions: elements that are reduced together are tied."""
    if "other" in call.arguments:
        return tie(call)  # torch.max(x, y)
    x, dims = call.input, call.dims()
    ids = call.tied(call.ids(x), dims)
    result = call.run()
    first = next(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
    if first.dim() < x.dim():
        ids = ids.reshape([size for d, size in enumerate(ids.shape) if d not in dims])
    return call.with_ids(result, ids)


def along(call: Call) -> Any:
    """cumsum, sort, topk, …: the elements along one dimension are tied; indices have factor 1."""
    x = call.input
    dim = call.argument("dim", -1)
    return call.with_ids(call.run(), call.tied(call.ids(x), [dim % x.dim()]))


def unpool(dims: int) -> Rule:
    """max_unpool: the maxima go back to where they were, among zeros."""

    def rule(call: Call) -> Any:
        x = call.input
        return call.with_ids(call.run(), call.tied(call.ids(x), range(x.dim() - dims, x.dim())))

    return rule


def grid_sample(call: Call) -> Any:
    """Sampling is linear in the image; the places to sample at have factor 1."""
    x, grid = call.input, call.argument("grid")
    if call.tracer.is_live(grid):
        call.tracer.pin_tensor(grid, f"gives places to sample in {call.where}")
    return call.with_ids(call.run(), call.tied(call.ids(x), range(2, x.dim())))


def norm(call: Call) -> Any:
    """std, norm: f(c · x) = c · f(x) over the dimensions that are taken together.

    The norm with p = 0 counts elements.
    """
    return pin(call) if call.argument("p", call.argument("ord", 2)) == 0 else reduce(call)
