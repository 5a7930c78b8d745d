"""Pivots: one outgoing weight for every unit.

The papers call them skeleton weights (PBN Theorem 1, PBN-A D.1).

Every unit has one **host**, the consumer that holds its pivot: of all layers that read the unit,
the one with the most output rows per group, and the first of these if several have as many. In the
host, the unit has one column (after a flatten, the middle one of its H·W columns, just as the
centre tap is the middle of a kernel), and the rule chooses the row by the effective weight a = γ /
√(var + eps) · w at the centre tap.

========  =========================================================================================
rule      row
========  =========================================================================================
diagonal  i mod K for column i of K rows (the papers)
max       the largest |a| of the column
matching  the assignment of columns to rows that maximises Σ log|a|; no row is used twice while rows
          are free
========  =========================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from pathconvert.choices import PivotRule
from pathconvert.conversion.arithmetic import centre_tap, gain_of
from pathconvert.conversion.groups import FIXED, Layer, Units
from pathconvert.conversion.trace import BatchNormCall, IdVector

#: Columns × rows above which ``matching`` falls back to ``max``: linear_sum_assignment takes 3 s at
#: 4096².
WIDEST_MATCHING = 2048 * 2048

#: Number of elements of a layer that are handled together where columns are independent of each
#: other.
BLOCK = 1 << 18

FloatVector = NDArray[np.float64]


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
        circular: whether the unit lies on a circle of pivots, [units]; its factor is then 1 (found
            by ``scales.py``).
    """

    layer: IdVector
    row: IdVector
    column: IdVector
    value: FloatVector
    next_unit: IdVector
    fallbacks: tuple[str, ...]
    circular: NDArray[np.bool_] | None = None


def choose_pivots(
    units: Units, tensors: Mapping[str, Tensor], free: NDArray[np.bool_], rule: PivotRule
) -> Pivots:
    """Choose a pivot for every free unit.

    Args:
        units: the network's scale groups.
        tensors: parameters and buffers by name; they are only read.
        free: units that may be rescaled, [units].
        rule: how to choose the row of the host's column.
    """
    host, host_column = _hosts(units, free)
    row = np.zeros(units.count, dtype=np.int64)
    value = np.zeros(units.count)
    next_unit = np.full(units.count, FIXED)
    fallbacks = []
    for index, layer in enumerate(units.layers):
        hosted = np.flatnonzero(host == index)
        if not hosted.size:
            continue
        per_group = len(layer.rows) // layer.groups
        rule_here: PivotRule = "max" if per_group == 1 else rule
        if rule_here == "matching" and len(hosted) * per_group > WIDEST_MATCHING * layer.groups:
            fallbacks.append(layer.parameter)
            rule_here = "max"
        # columns per step
        length = max(1, BLOCK // per_group) if rule_here == "max" else len(hosted)
        for part in (hosted[start : start + length] for start in range(0, len(hosted), length)):
            effective = _effective_taps(layer, host_column[part], units.batch_norms, tensors)
            block = host_column[part] // (len(layer.columns) // layer.groups)
            row[part] = block * per_group + _choose_rows(
                layer, host_column[part], effective, rule_here
            )
            del effective
        value[hosted] = _values_at(
            layer, row[hosted], host_column[hosted], units.batch_norms, tensors
        )
        next_unit[hosted] = layer.next_units[row[hosted]]
    none = (value == 0) | ~np.isfinite(value)
    return Pivots(
        np.where(none, -1, host),
        row,
        host_column,
        np.where(none, 0.0, value),
        next_unit,
        tuple(fallbacks),
    )


def pivots_at(
    units: Units, tensors: Mapping[str, Tensor], layer: IdVector, row: IdVector, column: IdVector
) -> Pivots:
    """The pivots at the given places, [units] each; ``layer`` is -1 where a unit has no pivot."""
    value = np.zeros(units.count)
    next_unit = np.full(units.count, FIXED)
    for index, one in enumerate(units.layers):
        mine = np.flatnonzero(layer == index)
        if mine.size:
            value[mine] = _values_at(one, row[mine], column[mine], units.batch_norms, tensors)
            next_unit[mine] = one.next_units[row[mine]]
    none = (value == 0) | ~np.isfinite(value)
    return Pivots(np.where(none, -1, layer), row, column, np.where(none, 0.0, value), next_unit, ())


def _hosts(units: Units, free: NDArray[np.bool_]) -> tuple[IdVector, IdVector]:
    """The host of every unit.

    Returns:
        The layer's index, [units], -1 if no layer may host the unit's pivot; and the unit's column
        in it, [units].
    """
    # Sort all (unit, layer, column) triples in which an allowed layer reads a unit by unit, then by
    # preference of the layer. The first run of equal (unit, layer) then gives the host, and the
    # middle of that run gives its column.
    read = [np.flatnonzero(layer.columns >= 0) for layer in units.layers]
    column = np.concatenate([np.zeros(0, dtype=np.int64), *read])
    layer_index = np.repeat(np.arange(len(read)), [len(r) for r in read])
    unit = np.concatenate(
        [
            np.zeros(0, dtype=np.int64),
            *(lay.columns[r] for lay, r in zip(units.layers, read, strict=True)),
        ]
    )
    allowed = free[unit] & ~_inside_own_stream(units, free)[layer_index, units.group_of()[unit]]
    column, layer_index, unit = column[allowed], layer_index[allowed], unit[allowed]

    rows_per_group = np.array([len(layer.rows) // layer.groups for layer in units.layers] or [0])
    order = np.lexsort([column, layer_index, -rows_per_group[layer_index], unit])
    column, layer_index, unit = column[order], layer_index[order], unit[order]
    starts = np.flatnonzero(
        np.r_[True, (unit[1:] != unit[:-1]) | (layer_index[1:] != layer_index[:-1])][: len(unit)]
    )
    lengths = np.diff(np.r_[starts, len(unit)])
    first = np.r_[True, unit[starts][1:] != unit[starts][:-1]][: len(starts)]
    middle = (starts + lengths // 2)[first]
    host = np.full(units.count, -1)
    host_column = np.zeros(units.count, dtype=np.int64)
    host[unit[middle]] = layer_index[middle]
    host_column[unit[middle]] = column[middle]
    return host, host_column


def _inside_own_stream(units: Units, free: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether a layer may not host the pivots of a residual group, [layers, groups].

    It may not if it leads back into the group.
    """
    group_of = units.group_of()
    sources, targets, layer_targets = [], [], []
    for layer in units.layers:
        reads = np.unique(group_of[layer.columns[layer.columns >= 0]])
        ends = layer.next_units[layer.next_units >= 0]
        ends = np.unique(group_of[ends[free[ends]]])
        layer_targets.append(ends)
        sources.append(np.repeat(reads, len(ends)))
        targets.append(np.tile(ends, len(reads)))
    count = len(units.groups)
    source, target = (np.concatenate([np.zeros(0, dtype=np.int64), *v]) for v in (sources, targets))
    graph = coo_array((np.ones(len(source), dtype=np.int8), (source, target)), shape=(count, count))
    cycle_of = connected_components(graph, connection="strong")[1]
    residual = np.array([group.residual for group in units.groups], dtype=bool)
    return np.stack(
        [residual & np.isin(cycle_of, cycle_of[ends]) for ends in layer_targets]
        or [np.zeros(count, dtype=bool)]
    )


def _effective_taps(
    layer: Layer,
    columns: IdVector,
    batch_norms: tuple[BatchNormCall, ...],
    tensors: Mapping[str, Tensor],
) -> Tensor:
    """a = γ / √(var + eps) · w at the centre tap, float64 [hosted columns, rows per group]."""
    weight = centre_tap(tensors[layer.parameter])
    rows_per_group, columns_per_group = (
        len(layer.rows) // layer.groups,
        len(layer.columns) // layer.groups,
    )
    column = torch.from_numpy(columns)
    block = column // columns_per_group
    gain = _gains(layer, batch_norms, tensors).view(layer.groups, rows_per_group)
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
    batch_norms: tuple[BatchNormCall, ...],
    tensors: Mapping[str, Tensor],
) -> FloatVector:
    """a at the given rows and columns of the centre tap, float64 [places]."""
    weight = centre_tap(tensors[layer.parameter])
    row, column = torch.from_numpy(rows), torch.from_numpy(columns)
    first, second = (column, row) if layer.transposed else (row, column)  # as stored
    values = (
        weight[first, second % weight.shape[1]].double() * _gains(layer, batch_norms, tensors)[row]
    )
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


def _choose_rows(layer: Layer, columns: IdVector, effective: Tensor, rule: PivotRule) -> IdVector:
    """The row, counted within its group, for every hosted column; overwrites ``effective``."""
    rows_per_group, columns_per_group = (
        len(layer.rows) // layer.groups,
        len(layer.columns) // layer.groups,
    )
    if rule == "diagonal":
        return _positions(layer)[columns] % columns_per_group % rows_per_group
    chosen: IdVector = effective.abs_().argmax(dim=1).numpy()
    if rule == "max":
        return chosen
    block = columns // columns_per_group
    for index in np.unique(block):
        mine = np.flatnonzero(block == index)
        all_of_it = mine.size == len(effective)
        chosen[mine] = _match(
            effective if all_of_it else effective[torch.from_numpy(mine)], chosen[mine]
        )
    return chosen


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
