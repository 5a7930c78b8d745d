"""Pivots: one outgoing weight for every unit.

The papers call them skeleton weights (PBN Theorem 1, PBN-A D.1).

The pivot of a unit lies in its host (``hosts.py``), where the unit has one column. The rule chooses
the row by the effective weight a = γ / √(var + eps) · w at the centre tap.

========  =========================================================================================
rule      row
========  =========================================================================================
diagonal  i mod K for column i of K rows (the papers)
max       the largest |a| of the column
matching  the assignment of columns to rows that maximises Σ log|a|; no row is used twice while rows
          are free
========  =========================================================================================

A unit is **near-dead** if |a| of its pivot is below ``min_pivot`` times the larger of two numbers:
the largest |a| of its own column, and the median over the host's columns of their largest |a|
(columns of the units that it hosts, without those that hold zeros only). The first number finds a
bad choice of the row, the second a column that training has switched off. Both are ratios within
one layer, so that the factors of other units do not change the answer. A near-dead unit has no
pivot and keeps the factor 1. If its pivot became ±1, its other weights would become up to
1 / ``min_pivot`` times as large as those of its neighbours; the function would be the same, but
training would not profit, and float16 would not hold the weights. Where ``matching`` gives a pivot
that is too small, the unit takes the largest |a| of its column instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pathconvert.choices import PivotRule
from pathconvert.conversion.arithmetic import centre_tap, gain_of
from pathconvert.conversion.groups import FIXED, Layer, Units
from pathconvert.conversion.hosts import find_readers, next_move
from pathconvert.conversion.tracing.trace import BatchNormCall, FloatVector, IdVector

#: Columns × rows above which ``matching`` falls back to ``max``: linear_sum_assignment takes 3 s at
#: 4096².
WIDEST_MATCHING = 2048 * 2048

#: Number of elements of a layer that are handled together where columns are independent of each
#: other.
BLOCK = 1 << 18

#: Default of ``min_pivot``: a pivot below this part of its neighbours' size is not used.
MIN_PIVOT = 1e-6


@dataclass(frozen=True)
class Pivots:
    """The place and the value of every unit's pivot.

    Attributes:
        layer: the layer's index in ``Units.layers``, [units]; -1 if the unit has no pivot.
        row, column: the pivot's place in that layer, [units].
        value: the signed effective weight, [units]; 0 if the unit has no pivot.
        next_unit: the unit that the pivot's row ends in, [units]; ``FIXED`` if the factor there is
            1.
        fallbacks: names of layers that were too wide for ``matching``.
        near_dead: whether the unit has no pivot because all that it could have are too small,
            [units].
        circular: whether the unit is left alone because its pivot would close a circle, [units].
    """

    layer: IdVector
    row: IdVector
    column: IdVector
    value: FloatVector
    next_unit: IdVector
    fallbacks: tuple[str, ...]
    near_dead: NDArray[np.bool_]
    circular: NDArray[np.bool_]


def choose_pivots(
    units: Units,
    tensors: Mapping[str, Tensor],
    free: NDArray[np.bool_],
    rule: PivotRule,
    min_pivot: float = MIN_PIVOT,
) -> Pivots:
    """Choose a pivot for every free unit.

    Args:
        units: the network's scale groups.
        tensors: parameters and buffers by name; they are only read.
        free: units that may be rescaled, [units].
        rule: how to choose the row of the host's column.
        min_pivot: the relative size below which a pivot is not used; 0 uses every pivot.

    Returns:
        The pivots. Those that run in a circle which no other host opens are among them; their units
        are marked by :func:`~pathconvert.conversion.scales.choose_scales`. Units are marked
        circular here if every layer that reads them leads back into their own stream.
    """
    readers = find_readers(units, free)
    placing = _Placing(units, tensors, rule, min_pivot)
    homeless = np.zeros(units.count, dtype=bool)
    homeless[readers.unit] = True
    pairs: IdVector | None = readers.first_of_each(readers.outside)
    while pairs is not None:
        unit = readers.unit[pairs]
        placing.place(unit, readers.layer[pairs], readers.column[pairs])
        homeless[unit] = False
        pairs = next_move(units, readers, placing.next_unit, placing.layer >= 0, homeless)
    left = readers.first_of_each(homeless[readers.unit])
    unit = readers.unit[left]
    placing.place(unit, readers.layer[left], readers.column[left])
    circular = homeless & (placing.layer >= 0)  # the others are dead or near-dead
    placing.layer[circular], placing.value[circular] = -1, 0.0
    return Pivots(
        placing.layer,
        placing.row,
        placing.column,
        placing.value,
        placing.next_unit,
        tuple(placing.fallbacks),
        placing.near_dead,
        circular,
    )


class _Placing:
    """The pivots while they are chosen; the attributes are those of :class:`Pivots`."""

    def __init__(
        self, units: Units, tensors: Mapping[str, Tensor], rule: PivotRule, min_pivot: float
    ) -> None:
        self.units, self.tensors, self.rule, self.min_pivot = units, tensors, rule, min_pivot
        self.layer = np.full(units.count, -1)
        self.row = np.zeros(units.count, dtype=np.int64)
        self.column = np.zeros(units.count, dtype=np.int64)
        self.value = np.zeros(units.count)
        self.next_unit = np.full(units.count, FIXED)
        self.near_dead = np.zeros(units.count, dtype=bool)
        self.fallbacks: list[str] = []

    def place(self, unit: IdVector, layer: IdVector, column: IdVector) -> None:
        """Choose the pivots of some units in the given hosts, [places] each."""
        for index in np.unique(layer):
            mine = layer == index
            self._place_in(int(index), unit[mine], column[mine])

    def _place_in(self, index: int, unit: IdVector, column: IdVector) -> None:
        """Choose the pivots of the units that one layer hosts."""
        layer = self.units.layers[index]
        gains = _gains(layer, self.units.batch_norms, self.tensors)
        row, top_row = self._rows(layer, column, gains)
        value = _values_at(layer, row, column, gains, self.tensors)
        top_value = _values_at(layer, top_row, column, gains, self.tensors)
        top = np.abs(top_value)
        live = top[(top > 0) & np.isfinite(top)]
        limit = self.min_pivot * np.maximum(top, np.median(live) if live.size else 0.0)
        if self.rule == "matching":
            small = np.abs(value) < limit
            row, value = np.where(small, top_row, row), np.where(small, top_value, value)
        near_dead = (np.abs(value) < limit) & (value != 0)
        none = near_dead | (value == 0) | ~np.isfinite(value)
        self.layer[unit] = np.where(none, -1, index)
        self.row[unit], self.column[unit] = row, column
        self.value[unit] = np.where(none, 0.0, value)
        self.next_unit[unit] = layer.next_units[row]
        self.near_dead[unit] = near_dead

    def _rows(self, layer: Layer, column: IdVector, gains: Tensor) -> tuple[IdVector, IdVector]:
        """The row of each column by the rule, and that of its largest |a|, [columns] each."""
        per_group = len(layer.rows) // layer.groups
        rule: PivotRule = "max" if per_group == 1 else self.rule
        if rule == "matching" and len(column) * per_group > WIDEST_MATCHING * layer.groups:
            self.fallbacks.append(layer.parameter)
            rule = "max"
        # columns per step
        length = max(1, BLOCK // per_group) if rule == "max" else len(column)
        chosen = []
        for start in range(0, len(column), length):
            part = column[start : start + length]
            effective = _effective_taps(layer, part, gains, self.tensors)
            first_row = part // (len(layer.columns) // layer.groups) * per_group
            chosen.append(first_row + np.stack(_choose_rows(layer, part, effective, rule)))
        row, top_row = np.concatenate(chosen, axis=1)
        return row, top_row


def pivots_at(
    units: Units, tensors: Mapping[str, Tensor], layer: IdVector, row: IdVector, column: IdVector
) -> Pivots:
    """The pivots at the given places, [units] each; ``layer`` is -1 where a unit has no pivot."""
    value = np.zeros(units.count)
    next_unit = np.full(units.count, FIXED)
    for index, one in enumerate(units.layers):
        mine = np.flatnonzero(layer == index)
        if mine.size:
            gains = _gains(one, units.batch_norms, tensors)
            value[mine] = _values_at(one, row[mine], column[mine], gains, tensors)
            next_unit[mine] = one.next_units[row[mine]]
    none = (value == 0) | ~np.isfinite(value)
    return Pivots(
        np.where(none, -1, layer),
        row,
        column,
        np.where(none, 0.0, value),
        next_unit,
        (),
        np.zeros(units.count, dtype=bool),
        np.zeros(units.count, dtype=bool),
    )


def _effective_taps(
    layer: Layer, columns: IdVector, gains: Tensor, tensors: Mapping[str, Tensor]
) -> Tensor:
    """a = γ / √(var + eps) · w at the centre tap, float64 [hosted columns, rows per group].

    ``gains`` are those of :func:`_gains`, [rows].
    """
    weight = centre_tap(tensors[layer.parameter])
    rows_per_group, columns_per_group = (
        len(layer.rows) // layer.groups,
        len(layer.columns) // layer.groups,
    )
    column = torch.from_numpy(columns)
    block = column // columns_per_group
    gain = gains.view(layer.groups, rows_per_group)
    if layer.transposed:  # stored [in, out / groups]
        taps = weight[column]
    elif layer.groups == 1:  # stored [out, in]
        every = len(columns) == len(layer.columns) and bool((columns[1:] > columns[:-1]).all())
        taps = (weight if every else weight[:, column]).T
    else:
        taps = weight.view(layer.groups, rows_per_group, columns_per_group)[
            block, :, column % columns_per_group
        ]
    return taps.to(torch.float64, memory_format=torch.contiguous_format, copy=True).mul_(
        gain[block]
    )


def _values_at(
    layer: Layer,
    rows: IdVector,
    columns: IdVector,
    gains: Tensor,
    tensors: Mapping[str, Tensor],
) -> FloatVector:
    """a at the given rows and columns of the centre tap, float64 [places].

    ``gains`` are those of :func:`_gains`, [rows].
    """
    weight = centre_tap(tensors[layer.parameter])
    row, column = torch.from_numpy(rows), torch.from_numpy(columns)
    first, second = (column, row) if layer.transposed else (row, column)  # as stored
    values = weight[first, second % weight.shape[1]].double() * gains[row]
    found: FloatVector = values.numpy()
    return found


def _gains(
    layer: Layer, batch_norms: tuple[BatchNormCall, ...], tensors: Mapping[str, Tensor]
) -> Tensor:
    """γ / √(var + eps) of the BatchNorm that absorbs each row, float64 [rows].

    It is 1 where there is none.
    """
    gains = torch.ones(len(layer.rows), dtype=torch.float64)
    for index in np.unique(layer.batch_norms[layer.batch_norms >= 0]):
        call = batch_norms[index]
        gamma, var = (tensors[name] if name else None for name in (call.weight, call.var))
        gain = gain_of(gamma, var, call.eps).expand(len(call.rows))
        mask = layer.batch_norms == index
        gains[torch.from_numpy(mask)] = gain[torch.from_numpy(layer.channels[mask])]
    return gains


def _choose_rows(
    layer: Layer, columns: IdVector, effective: Tensor, rule: PivotRule
) -> tuple[IdVector, IdVector]:
    """The row by the rule, and that of the largest |a|, counted within their group.

    For every hosted column; overwrites ``effective``, [hosted columns, rows per group].
    """
    rows_per_group, columns_per_group = (
        len(layer.rows) // layer.groups,
        len(layer.columns) // layer.groups,
    )
    largest: IdVector = effective.abs_().argmax(dim=1).numpy()
    if rule == "diagonal":
        return _positions(layer)[columns] % columns_per_group % rows_per_group, largest
    if rule == "max":
        return largest, largest
    chosen = largest.copy()
    block = columns // columns_per_group
    for index in np.unique(block):
        mine = np.flatnonzero(block == index)
        all_of_it = mine.size == len(effective)
        chosen[mine] = _match(
            effective if all_of_it else effective[torch.from_numpy(mine)], largest[mine]
        )
    return chosen, largest


def _positions(layer: Layer) -> IdVector:
    """The position of each column's channel, [columns].

    The H·W columns of a channel after a flatten count once.
    """
    _, first, inverse = np.unique(layer.columns, return_index=True, return_inverse=True)
    is_first = (layer.columns < 0) | (first[inverse] == np.arange(len(layer.columns)))
    return (np.cumsum(is_first) - 1)[
        np.where(layer.columns < 0, np.arange(len(layer.columns)), first[inverse])
    ]


def _match(magnitude: Tensor, largest: IdVector) -> IdVector:
    """Choose rows by maximum-product matching.

    Where there are more columns than rows, every round matches as many columns as there are rows.

    Args:
        magnitude: |a|, [columns, rows]; overwritten.
        largest: the row of the largest |a| of each column, which is kept where the matching leaves
            only a zero.
    """
    # Minimising Σ −log|a| maximises the product. A zero costs more than any assignment without one
    # (`forbidden`).
    cost = magnitude.log_().neg_()
    zero = torch.isinf(cost)
    cost[zero] = 0.0
    forbidden = 4 * float(max(cost.max(), -cost.min())) * (min(cost.shape) + 1) + 1
    cost[zero] = forbidden
    is_zero = zero.numpy()
    chosen = largest.copy()
    left = np.arange(len(cost))
    while left.size:
        # a single round may overwrite it
        now = cost.numpy() if len(cost) <= cost.shape[1] else cost.numpy()[left]
        # A constant along a row or column that is used in any case does not change the optimum;
        # without it the search is five times as fast.
        if now.shape[1] <= now.shape[0]:
            now -= now.min(axis=0)
        if now.shape[0] <= now.shape[1]:
            now -= now.min(axis=1, keepdims=True)
        matched, rows = linear_sum_assignment(now)
        real = ~is_zero[left[matched], rows]
        chosen[left[matched[real]]] = rows[real]
        left = np.delete(left, matched)
    return chosen
