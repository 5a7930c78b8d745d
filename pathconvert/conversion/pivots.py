"""Pivots: one outgoing weight for every unit (the papers' skeleton weights; PBN Theorem 1, PBN-A D.1).

Every unit has one **host**, the consumer that holds its pivot: of all layers that read it, the one with the most
output rows a group, the first of equals. In the host the unit owns one column (after a flatten, the middle one of
its H·W columns, as the kernel's centre tap is the middle of a convolution), and the rule chooses the row by the
effective weight a = γ / √(var + eps) · w at the centre tap.

===========  ====================================================================================================
rule         row
===========  ====================================================================================================
diagonal     i mod K for column i of K rows (the papers)
max          the largest |a| of the column
matching     the assignment of columns to rows that maximises Σ log|a|: no row twice while there are free rows
===========  ====================================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from pathconvert.conversion.groups import FIXED, Layer, Units
from pathconvert.conversion.trace import BatchNormCall, IdVector

PivotRule = Literal["matching", "max", "diagonal"]

#: Columns × rows above which ``matching`` falls back to ``max``: linear_sum_assignment takes 3 s at 4096².
WIDEST_MATCHING = 2048 * 2048

#: Elements of a layer that are looked at together where every column is for itself.
BLOCK = 1 << 18

FloatVector = NDArray[np.float64]


@dataclass(frozen=True)
class Pivots:
    """Per unit: where its pivot is and what it is worth.

    Attributes:
        layer: index in ``Units.layers``, [units]; -1 without a pivot.
        row, column: the pivot's place in that layer, [units].
        value: the signed effective weight, [units]; 0 without a pivot.
        next_unit: the unit that the pivot's row ends in, [units]; ``FIXED`` where that one's factor is 1.
        fallbacks: layers that were too wide for ``matching``.
        circular: units whose pivots run in a circle, [units]; their factor is 1 (``scales.py`` finds them).
    """

    layer: IdVector
    row: IdVector
    column: IdVector
    value: FloatVector
    next_unit: IdVector
    fallbacks: tuple[str, ...]
    circular: NDArray[np.bool_] | None = None


def choose_pivots(units: Units, tensors: Mapping[str, Tensor], free: NDArray[np.bool_], rule: PivotRule) -> Pivots:
    """Choose a pivot for every free unit.

    Args:
        units: the network's scale groups.
        tensors: parameters and buffers by name; read only.
        free: units that may be rescaled, [units].
        rule: which row of the host's column.
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
        length = max(1, BLOCK // per_group) if rule_here == "max" else len(hosted)  # columns at a time
        for part in (hosted[start : start + length] for start in range(0, len(hosted), length)):
            effective = _effective_taps(layer, host_column[part], units.batch_norms, tensors)
            block = host_column[part] // (len(layer.columns) // layer.groups)
            row[part] = block * per_group + _choose_rows(layer, host_column[part], effective, rule_here)
            del effective
        value[hosted] = _values_at(layer, row[hosted], host_column[hosted], units.batch_norms, tensors)
        next_unit[hosted] = layer.next_units[row[hosted]]
    none = (value == 0) | ~np.isfinite(value)
    return Pivots(np.where(none, -1, host), row, host_column, np.where(none, 0.0, value), next_unit, tuple(fallbacks))


def pivots_at(units: Units, tensors: Mapping[str, Tensor], layer: IdVector, row: IdVector, column: IdVector) -> Pivots:
    """The pivots at given places, [units] each; ``layer`` is -1 where a unit has none."""
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
    """Per unit: the layer that hosts its pivot and its column there; -1 where no layer may."""
    read = [np.flatnonzero(layer.columns >= 0) for layer in units.layers]
    column = np.concatenate([np.zeros(0, dtype=np.int64), *read])
    layer_index = np.repeat(np.arange(len(read)), [len(r) for r in read])
    unit = np.concatenate(
        [np.zeros(0, dtype=np.int64), *(lay.columns[r] for lay, r in zip(units.layers, read, strict=True))]
    )
    allowed = free[unit] & ~_inside_own_stream(units, free)[layer_index, units.group_of()[unit]]
    column, layer_index, unit = column[allowed], layer_index[allowed], unit[allowed]

    rows_per_group = np.array([len(layer.rows) // layer.groups for layer in units.layers] or [0])
    order = np.lexsort([column, layer_index, -rows_per_group[layer_index], unit])
    column, layer_index, unit = column[order], layer_index[order], unit[order]
    starts = np.flatnonzero(np.r_[True, (unit[1:] != unit[:-1]) | (layer_index[1:] != layer_index[:-1])][: len(unit)])
    lengths = np.diff(np.r_[starts, len(unit)])
    first = np.r_[True, unit[starts][1:] != unit[starts][:-1]][: len(starts)]
    middle = (starts + lengths // 2)[first]
    host = np.full(units.count, -1)
    host_column = np.zeros(units.count, dtype=np.int64)
    host[unit[middle]] = layer_index[middle]
    host_column[unit[middle]] = column[middle]
    return host, host_column


def _inside_own_stream(units: Units, free: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[layers, groups]: whether a residual group may not have its pivot in a layer, which leads back into the group."""
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
        [residual & np.isin(cycle_of, cycle_of[ends]) for ends in layer_targets] or [np.zeros(count, dtype=bool)]
    )


def _effective_taps(
    layer: Layer, columns: IdVector, batch_norms: tuple[BatchNormCall, ...], tensors: Mapping[str, Tensor]
) -> Tensor:
    """a = γ / √(var + eps) · w at the centre tap: [hosted columns, rows of their group], float64."""
    weight = tensors[layer.parameter]
    for size in weight.shape[2:]:
        weight = weight.select(2, size // 2)
    rows_per_group, columns_per_group = len(layer.rows) // layer.groups, len(layer.columns) // layer.groups
    column = torch.from_numpy(columns)
    block = column // columns_per_group
    gain = _gains(layer, batch_norms, tensors).view(layer.groups, rows_per_group)
    if layer.transposed:  # stored [in, out / groups]
        taps = weight[column]
    elif layer.groups == 1:  # stored [out, in]
        every = len(columns) == len(layer.columns) and bool((columns[1:] > columns[:-1]).all())
        taps = (weight if every else weight[:, column]).T
    else:
        taps = weight.view(layer.groups, rows_per_group, columns_per_group)[block, :, column % columns_per_group]
    return taps.to(torch.float64, memory_format=torch.contiguous_format, copy=True).mul_(gain[block])


def _values_at(
    layer: Layer,
    rows: IdVector,
    columns: IdVector,
    batch_norms: tuple[BatchNormCall, ...],
    tensors: Mapping[str, Tensor],
) -> FloatVector:
    """a at single places of the centre tap, float64 [places]."""
    weight = tensors[layer.parameter]
    for size in weight.shape[2:]:
        weight = weight.select(2, size // 2)
    row, column = torch.from_numpy(rows), torch.from_numpy(columns)
    first, second = (column, row) if layer.transposed else (row, column)  # as stored
    values = weight[first, second % weight.shape[1]].double() * _gains(layer, batch_norms, tensors)[row]
    found: FloatVector = values.numpy()
    return found


def _gains(layer: Layer, batch_norms: tuple[BatchNormCall, ...], tensors: Mapping[str, Tensor]) -> Tensor:
    """γ / √(var + eps) of the BatchNorm that absorbs each row, float64 [rows]; 1 without."""
    gains = torch.ones(len(layer.rows), dtype=torch.float64)
    for index in np.unique(layer.batch_norms[layer.batch_norms >= 0]):
        call = batch_norms[index]
        one = torch.ones(len(call.rows), dtype=torch.float64)
        gamma = tensors[call.weight].double() if call.weight else one
        var = tensors[call.var].double() if call.var else one
        mask = layer.batch_norms == index
        gains[torch.from_numpy(mask)] = (gamma / (var + call.eps).sqrt())[torch.from_numpy(layer.channels[mask])]
    return gains


def _choose_rows(layer: Layer, columns: IdVector, effective: Tensor, rule: PivotRule) -> IdVector:
    """The row within its group for every hosted column; ``effective`` is used up."""
    rows_per_group, columns_per_group = len(layer.rows) // layer.groups, len(layer.columns) // layer.groups
    if rule == "diagonal":
        return _positions(layer)[columns] % columns_per_group % rows_per_group
    chosen: IdVector = effective.abs_().argmax(dim=1).numpy()
    if rule == "max":
        return chosen
    block = columns // columns_per_group
    for index in np.unique(block):
        mine = np.flatnonzero(block == index)
        all_of_it = mine.size == len(effective)
        chosen[mine] = _match(effective if all_of_it else effective[torch.from_numpy(mine)], chosen[mine])
    return chosen


def _positions(layer: Layer) -> IdVector:
    """Column → its channel's position: the H·W columns of one channel after a flatten count once."""
    _, first, inverse = np.unique(layer.columns, return_index=True, return_inverse=True)
    is_first = (layer.columns < 0) | (first[inverse] == np.arange(len(layer.columns)))
    return (np.cumsum(is_first) - 1)[np.where(layer.columns < 0, np.arange(len(layer.columns)), first[inverse])]


def _match(magnitude: Tensor, largest: IdVector) -> IdVector:
    """Rows by maximum-product matching, in rounds while columns outnumber rows; ``largest`` where zeros are left.

    ``magnitude`` is used up.
    """
    cost = magnitude.log_().neg_()
    zero = torch.isinf(cost)
    cost[zero] = 0.0
    forbidden = 4 * float(max(cost.max(), -cost.min())) * (min(cost.shape) + 1) + 1
    cost[zero] = forbidden
    is_zero = zero.numpy()
    chosen = largest.copy()
    left = np.arange(len(cost))
    while left.size:
        now = cost.numpy() if len(cost) <= cost.shape[1] else cost.numpy()[left]  # the only round may use it up
        # what is common to a line that is surely used decides nothing; without it the search is five times as fast
        if now.shape[1] <= now.shape[0]:
            now -= now.min(axis=0)
        if now.shape[0] <= now.shape[1]:
            now -= now.min(axis=1, keepdims=True)
        matched, rows = linear_sum_assignment(now)
        real = ~is_zero[left[matched], rows]
        chosen[left[matched[real]]] = rows[real]
        left = np.delete(left, matched)
    return chosen
