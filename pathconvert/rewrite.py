"""Apply factors to a copy of the weights: ``parameter[row, column] · s[row] / s[column]``, in float64.

The same call with ``inverse=True`` divides by that very factor, so restoring undoes a conversion to within the
rounding of the weights' dtype, and exactly when factors are powers of two.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Size, Tensor, nn

from pathconvert.pivots import FloatVector
from pathconvert.trace import Slot

#: Elements that are rescaled at a time.
BLOCK = 1 << 16


def factor_of(slot: Slot, padded_scales: Tensor, shape: Size) -> Tensor:
    """The float64 factor of every element of a parameter, broadcastable to ``shape``.

    Args:
        slot: its rows and columns, as units.
        padded_scales: [units + 1], the last entry 1 (for ``FIXED``).
        shape: the parameter's shape.
    """
    rows = padded_scales[torch.from_numpy(slot.rows)]
    if slot.columns is None:
        return rows.view(shape)
    columns = padded_scales[torch.from_numpy(slot.columns)]
    kernel = (1,) * (len(shape) - 2)
    if slot.groups == 1:
        factor = rows[:, None] / columns
        return (factor.T if slot.transposed else factor).reshape(*shape[:2], *kernel)
    blocks = rows.view(slot.groups, -1, 1) / columns.view(slot.groups, 1, -1)  # [groups, out / groups, in / groups]
    if slot.transposed:
        blocks = blocks.transpose(1, 2)
    return blocks.reshape(*shape[:2], *kernel)


def rescale(model: nn.Module, slots: Sequence[Slot], scales: FloatVector, *, inverse: bool = False) -> nn.Module:
    """A copy of ``model`` with every slot's parameter rescaled; all else is copied as it is.

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
        if not (changed[slot.rows].any() or (slot.columns is not None and changed[slot.columns].any())):
            continue
        old = tensors[slot.parameter]
        factor = factor_of(slot, padded, old.shape).to(old.device)
        memo[id(old)] = _scaled(old, factor, inverse)
    return copy.deepcopy(model, memo)


def _scaled(old: Tensor, factor: Tensor, inverse: bool) -> Tensor:
    """``old · factor`` or ``old / factor``, computed in float64 block by block, so that the cache holds the block."""
    new = torch.empty_like(old, memory_format=torch.contiguous_format)
    source, factor = old.detach().reshape(len(old), -1), factor.reshape(len(old), -1)
    if source.shape[1] != factor.shape[1]:  # one factor for all of a kernel
        source = source.view(len(old), factor.shape[1], -1)
        factor = factor[:, :, None]
    rows = max(1, BLOCK * len(old) // max(1, old.numel()))
    for target, block, scale in zip(
        new.view(source.shape).split(rows), source.split(rows), factor.split(rows), strict=True
    ):
        wide = block.to(torch.float64, copy=True)
        target.copy_(wide.div_(scale) if inverse else wide.mul_(scale))
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, requires_grad=old.requires_grad)
    return new
