"""Apply factors to a copy of the weights, in float64.

Each element becomes ``parameter[row, column] · s[row] / s[column]``, a running variance v becomes
``s² · (v + eps) − eps`` (``carrying.py``). With ``inverse=True`` the same call undoes that.
Restoring therefore undoes a conversion up to the rounding of the weights' dtype, and exactly if the
factors are powers of two and no variance is rescaled.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Size, Tensor, nn

from pathconvert.conversion.modules import copied
from pathconvert.conversion.tracing.ties import first_names
from pathconvert.conversion.tracing.trace import FloatVector, Slot

#: Number of elements that are rescaled at a time.
BLOCK = 1 << 16


def factors(slot: Slot, padded_scales: Tensor, shape: Size, length: int) -> Iterator[Tensor]:
    """The float64 factors of a parameter, part by part.

    All of them together may need more memory than the parameter does.

    Args:
        slot: its rows and columns, as units.
        padded_scales: the units' factors, [units + 1]; the last is 1, for ``FIXED`` (−1).
        shape: the parameter's shape.
        length: size of a part along the first dimension.

    Yields:
        For each part, factors that broadcast to its shape.
    """
    rows = padded_scales[torch.from_numpy(slot.rows)]
    if slot.columns is None:
        yield from rows.view(shape).split(length)
        return
    columns = padded_scales[torch.from_numpy(slot.columns)]
    first, second = (columns, rows) if slot.transposed else (rows, columns)  # as stored
    kernel = (1,) * (len(shape) - 2)
    blocks = torch.arange(len(first)).div(len(first) // slot.groups, rounding_mode="floor")
    second = second.view(slot.groups, -1)  # [groups, second / groups]
    for part, block in zip(first.split(length), blocks.split(length), strict=True):
        other = second if slot.groups == 1 else second[block]
        factor = other / part[:, None] if slot.transposed else part[:, None] / other
        yield factor.view(*factor.shape, *kernel)


def rescale(
    model: nn.Module, slots: Sequence[Slot], scales: FloatVector, *, inverse: bool = False
) -> nn.Module:
    """A copy of ``model`` in which the parameter of every slot is rescaled.

    Everything else is copied unchanged.

    Args:
        model: not changed.
        slots: rows and columns as units.
        scales: a factor for every unit, float64 [units].
        inverse: divide by the factors instead.
    """
    tensors = dict(model.named_buffers()) | dict(model.named_parameters())
    padded = torch.from_numpy(np.append(scales, 1.0))
    changed = np.append(scales != 1, False)
    memo: dict[int, Tensor] = {}
    for slot in slots:
        if not (
            changed[slot.rows].any() or (slot.columns is not None and changed[slot.columns].any())
        ):
            continue
        old = tensors[slot.parameter]
        memo[id(old)] = _scaled(old, slot, padded, inverse)
    for name, first in first_names(model).items():
        other, kept = tensors.get(name), tensors.get(first)
        if other is not None and kept is not None and other is not kept:  # one memory, two objects
            shared = memo.setdefault(id(kept), copy.deepcopy(kept))
            memo[id(other)] = shared if isinstance(other, nn.Parameter) else shared.detach()
    return copied(model, memo)


def _scaled(old: Tensor, slot: Slot, padded_scales: Tensor, inverse: bool) -> Tensor:
    """``old · factor`` or ``old / factor``, in float64.

    It is computed in blocks that are small enough for the CPU's cache.
    """
    new = torch.empty_like(old, memory_format=torch.contiguous_format)
    if slot.statistic == "variance":
        new.copy_(_scaled_variance(old, slot, padded_scales, inverse))
        return new
    length = max(1, BLOCK * len(old) // max(1, old.numel()))
    parts = factors(slot, padded_scales, old.shape, length)
    for target, block, factor in zip(
        new.split(length), old.detach().split(length), parts, strict=True
    ):
        wide, scale = block.to(torch.float64, copy=True), factor.to(old.device)
        target.copy_(wide.div_(scale) if inverse else wide.mul_(scale))
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, requires_grad=old.requires_grad)
    return new


def _scaled_variance(old: Tensor, slot: Slot, padded_scales: Tensor, inverse: bool) -> Tensor:
    """s² · (v + eps) − eps or its inverse, float64 [C]."""
    scale = padded_scales[torch.from_numpy(slot.rows)].view_as(old).to(old.device)
    scale = 1 / scale if inverse else scale
    return torch.where(scale == 1, old.double(), scale**2 * (old.double() + slot.eps) - slot.eps)
