"""Gauges: the factor of every unit, computed from its pivot.

Going from the output to the input, unit i gets s_i = |a_i| · s_next(i), with a_i its pivot's
effective weight and next(i) the unit that the pivot's row ends in (PBN Theorem 1, PBN-A D.1).
Incoming weights are multiplied by s_i and outgoing ones divided, so that the pivot becomes a_i ·
s_next / s_i = ±1.

=======  ===========================================================================================
``unit``  as above: pivots are ±1
``pow2``  s_i rounded to a power of two: pivots land in [2^-½, 2^½] and every product is exact
=======  ===========================================================================================

Factors multiply along chains, so that without more ado they would leave every range in deep
networks. They are kept within 2^±40, or what the dtype allows if that is less, by **recentring**: a
factor that leaves this range is multiplied by a power of two, 2^k. Any positive factor keeps the
function, so that this is exact in both gauges, and restoring needs nothing but the factor. The
pivot then becomes ±2^(k_next − k), which is not ±1 only where k changes along the chain. All units
of a group get the same k, a multiple of the range's width that brings the group's median near 1, so
that the layers between two such places have the weights that they had before; a unit that is still
outside gets a k of its own. (The alternative, to hold such units back at 1, would put factors of 1
and 2^-40 next to each other in one layer, and its weights would be as far apart.) The record has
the pivots' magnitudes if any of them is not ±1.

Units that a BatchNorm reads have a narrower range, which its running variance sets
(``carrying.py``); their group gets the smallest k that brings all of them into it.

A unit is **held back**, which means that its factor stays 1, if its factor would move a weight out
of the normal range of its dtype or would leave too few exponents for the unit's activations.
Activations keep half of the exponents. With ``unit`` a factor may go further, up to 2²⁴ from the
ends of the range: an activation that then becomes subnormal is smaller than one rounding of the
channel's usual activations, so only the rounding changes. With ``pow2`` such an activation would no
longer be exact.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathconvert.choices import Gauge
from pathconvert.conversion.carrying import carried_range
from pathconvert.conversion.groups import FIXED, Units
from pathconvert.conversion.pivots import Pivots
from pathconvert.conversion.rescale import BLOCK, factors
from pathconvert.conversion.tracing.trace import FloatVector, Slot

#: Factors stay between 2 to the power of minus and plus this.
RANGE = 40


def choose_scales(
    units: Units,
    pivots: Pivots,
    tensors: Mapping[str, Tensor],
    gauge: Gauge,
    target: float = 1.0,
    base: FloatVector | None = None,
) -> tuple[FloatVector, NDArray[np.bool_], NDArray[np.bool_]]:
    """Choose the factors with which pivots become ±``target``, or that times a power of two.

    The factor of a unit is 1 if it has no pivot, is held back, or lies on a circle of pivots.

    Args:
        units, pivots: of the network; the pivots' values are those without any factor.
        tensors: parameters and buffers by name; they are only read.
        gauge: as in the module's docstring.
        target: the size of a pivot; λ of Path-BN.
        base: the factors that the tensors contain already, [units]; None if they contain none.

    Returns:
        The factors, [units]; which units are held back, [units]; and which lie on a circle of
        pivots, [units].
    """
    held = np.zeros(units.count, dtype=bool)
    ranges = _Ranges(units, tensors, gauge, 1.0 if base is None else base)
    while True:
        scales, circular = _propagate(pivots, gauge, held, target)
        scales = _recentred(units, scales, (pivots.layer >= 0) & ~held & ~circular, ranges)
        leaving = ranges.leaving(scales) & ~held
        if not leaving.any():
            return scales, held, circular
        held |= leaving


def _recentred(
    units: Units, scales: FloatVector, scaled: NDArray[np.bool_], ranges: _Ranges
) -> FloatVector:
    """Factors times powers of two, so that they are within the range of each.

    Args:
        units: the network's scale groups.
        scales: factors, [units].
        scaled: which units have a factor of their own, [units]; the others keep theirs.
        ranges: 2^±``width``, or from the exponent ``start`` on where a variance carries the factor.
    """
    exponent, width = np.log2(scales), ranges.width
    start, carried = ranges.start, ranges.start > -width
    outside = scaled & ((exponent < start) | (exponent > width))
    if not outside.any():
        return scales
    near_one = -width * np.round(exponent / width)
    from_start = width * np.ceil((start - exponent) / width)
    alone = np.where(carried, from_start, near_one)
    group_of = units.group_of()
    shift = np.zeros(len(scales))
    for index in np.unique(group_of[outside]):
        mine = scaled & (group_of == index)
        shift[mine] = -width * np.round(np.median(exponent[mine]) / width)
        if carried[mine].any():
            shift[mine] = from_start[mine & carried].max()
    moved = exponent + shift
    still = scaled & ((moved < start) | (moved > width))
    shift[still] = alone[still]
    recentred: FloatVector = np.ldexp(scales, shift.astype(np.int32))
    return recentred


def _propagate(
    pivots: Pivots, gauge: Gauge, held: NDArray[np.bool_], target: float
) -> tuple[FloatVector, NDArray[np.bool_]]:
    """s_i = |a_i| · s_next(i) / target, as soon as s_next(i) is known.

    Returns:
        The factors, [units]; and the units whose factor never becomes known as they lie on a
        circle, [units].
    """
    count = len(pivots.layer)
    scales = np.ones(count + 1)  # the last entry stands for FIXED = -1
    done = np.append((pivots.layer < 0) | held, True)
    while True:
        ready = np.flatnonzero(~done[:-1] & done[pivots.next_unit])
        if not ready.size:
            break
        raw = np.abs(pivots.value[ready]) * scales[pivots.next_unit[ready]] / target
        scales[ready] = np.exp2(np.round(np.log2(raw))) if gauge == "pow2" else raw
        done[ready] = True
    return scales[:-1], ~done[:-1]


class _Ranges:
    """Finds the units whose factors move a weight out of the normal range of its dtype."""

    def __init__(
        self,
        units: Units,
        tensors: Mapping[str, Tensor],
        gauge: Gauge,
        base: FloatVector | float,
    ) -> None:
        self.slots = [
            slot
            for slot in units.slots
            if tensors[slot.parameter].numel() and ((slot.rows >= 0).any() or _reads(slot))
        ]
        self.tensors, self.base = tensors, base
        self._spans: dict[str, tuple[float, float]] = {}
        infos = [torch.finfo(tensors[slot.parameter].dtype) for slot in self.slots]
        tiny = max((info.tiny for info in infos), default=0.0)
        largest = min((info.max for info in infos), default=np.inf)
        lowest, highest = tiny**0.5, largest**0.5
        if gauge == "unit":
            lowest, highest = min(lowest, tiny * 2**24), max(highest, largest / 2**24)
        widest = min(-np.log2(lowest), np.log2(highest)) if self.slots else RANGE
        #: the range to which factors are recentred, in powers of two
        self.width = int(min(RANGE, widest))
        self.lowest, self.highest = np.full(units.count, lowest), np.full(units.count, highest)
        #: the exponent from which on a unit's factor is in that range, [units]
        self.start = np.full(units.count, -float(self.width))
        for slot in self.slots:
            if slot.statistic == "variance":
                self._narrow(slot, gauge)

    def _narrow(self, slot: Slot, gauge: Gauge) -> None:
        """Narrow the ranges of the units that a BatchNorm reads (``carrying.py``)."""
        variance = self.tensors[slot.parameter].detach().double().flatten().numpy()
        present = np.append(self.base * np.ones(len(self.start)), 1.0)[slot.rows]
        largest = torch.finfo(self.tensors[slot.parameter].dtype).max
        low, high = carried_range((variance + slot.eps) / present**2 - slot.eps, slot.eps, largest)
        there = slot.rows >= 0
        if gauge == "pow2":
            low, high = np.ones_like(low), np.ones_like(high)
        np.maximum.at(self.lowest, slot.rows[there], low[there])
        np.minimum.at(self.highest, slot.rows[there], high[there])
        wide = there & (high >= 2.0**self.width) & (low > 0)
        np.maximum.at(self.start, slot.rows[wide], np.log2(low[wide]))

    def leaving(self, scales: FloatVector) -> NDArray[np.bool_]:
        """Which units have to be held back because of their factors, [units]."""
        leaving: NDArray[np.bool_] = (scales < self.lowest) | (scales > self.highest)
        padded = np.append(scales / self.base, 1.0)
        for slot in self.slots:
            if slot.statistic == "variance":
                continue
            rows, columns = (
                padded[slot.rows],
                padded[slot.columns] if slot.columns is not None else np.ones(1),
            )
            info = torch.finfo(self.tensors[slot.parameter].dtype)
            smallest, largest = self._span(slot.parameter)
            low, high = rows.min() / columns.max(), rows.max() / columns.min()
            if not (smallest * low >= info.tiny and largest * high <= info.max):
                self._mark(slot, padded, leaving)
        return leaving

    def _span(self, name: str) -> tuple[float, float]:
        """The smallest nonzero and the largest magnitude of a parameter."""
        if name not in self._spans:
            blocks = self.tensors[name].detach().reshape(-1).split(BLOCK)
            self._spans[name] = (
                min(map(_smallest, blocks)),
                max(float(block.abs().max()) for block in blocks),
            )
        return self._spans[name]

    def _mark(self, slot: Slot, padded: FloatVector, leaving: NDArray[np.bool_]) -> None:
        """Mark the units of all elements that leave the normal range.

        A subnormal element may still grow.
        """
        weight = self.tensors[slot.parameter].detach()
        info = torch.finfo(weight.dtype)
        factor = next(factors(slot, torch.from_numpy(padded), weight.shape, max(1, len(weight))))
        scaled = weight.abs().double() * factor
        bad = ((scaled < info.tiny) & (scaled > 0) & (factor < 1)) | (scaled > info.max)
        if not bool(bad.any()):
            return
        count = len(padded) - 1
        for vector, hit in zip((slot.rows, slot.columns), _hits(slot, bad), strict=True):
            if vector is not None:
                marked = vector[hit]
                leaving[marked[(marked != FIXED) & (padded[marked] != 1)] % count] = True


def _smallest(block: Tensor) -> float:
    """The smallest nonzero magnitude; infinity if all elements are zero."""
    magnitude = block.abs()
    smallest = float(magnitude.min())
    if smallest > 0:
        return smallest
    nonzero = magnitude[magnitude > 0]
    return float(nonzero.min()) if nonzero.numel() else np.inf


def _reads(slot: Slot) -> bool:
    """Whether a column of the slot reads a unit."""
    return slot.columns is not None and bool((slot.columns >= 0).any())


def _hits(slot: Slot, bad: Tensor) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """The places of bad elements.

    Returns:
        Which rows contain one, [rows]; and which columns do, [columns].
    """
    if slot.columns is None:
        return bad.flatten().numpy(), np.zeros(0, dtype=bool)
    out, into = len(slot.rows) // slot.groups, len(slot.columns) // slot.groups
    blocks = bad.reshape(slot.groups, *((into, out) if slot.transposed else (out, into)), -1).any(3)
    if slot.transposed:
        blocks = blocks.transpose(1, 2)
    return blocks.any(2).flatten().numpy(), blocks.any(1).flatten().numpy()
