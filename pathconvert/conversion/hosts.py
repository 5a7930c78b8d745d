"""Hosts: the layer that holds each unit's pivot.

Every unit has one **host**, a consumer that holds its pivot. The first choice is, of all layers
that read the unit, the one with the most output rows per group, and the first of these if several
have as many. A layer that leads back into a residual group is not a first choice for the pivots of
that group.

A unit is **settled** if its pivots lead, one after the other, to a factor that is 1. Pivots must
not run in a circle, as no factor would be known first. First choices can form circles in networks
that apply a block twice, and they can leave a stream without any host (octave convolutions, skip
additions in a decoder). Such units **move** to a host all of whose rows end in settled units, which
cannot close a circle. Each move settles units, so that further layers can become hosts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pathconvert.conversion.groups import Units
from pathconvert.conversion.tracing.trace import IdVector


@dataclass(frozen=True)
class Readers:
    """Every pair of a free unit and a layer that reads it.

    Pairs are sorted by unit, and those of a unit by preference. All vectors are [pairs].

    Attributes:
        unit: the unit.
        layer: the layer's index in ``Units.layers``.
        column: the unit's column in the layer. After a flatten, it is the middle one of its H·W
            columns, just as the centre tap is the middle of a kernel.
        outside: whether the layer does not lead back into the unit's residual group.
    """

    unit: IdVector
    layer: IdVector
    column: IdVector
    outside: NDArray[np.bool_]

    def first_of_each(self, mask: NDArray[np.bool_]) -> IdVector:
        """The first pair of each unit among those in ``mask``, [pairs]; as indices of pairs."""
        pairs = np.flatnonzero(mask)
        unit = self.unit[pairs]
        first: IdVector = pairs[np.r_[True, unit[1:] != unit[:-1]][: len(unit)]]
        return first


def find_readers(units: Units, free: NDArray[np.bool_]) -> Readers:
    """All pairs of free units, [units], and the layers that read them."""
    # Sort all (unit, layer, column) triples by unit, then by preference of the layer. Every run of
    # equal (unit, layer) is a pair, and the middle of the run gives the unit's column.
    read = [np.flatnonzero(layer.columns >= 0) for layer in units.layers]
    none = np.zeros(0, dtype=np.int64)
    column = np.concatenate([none, *read])
    layer = np.repeat(np.arange(len(read)), [len(columns) for columns in read])
    unit = np.concatenate(
        [none, *(one.columns[columns] for one, columns in zip(units.layers, read, strict=True))]
    )
    column, layer, unit = column[free[unit]], layer[free[unit]], unit[free[unit]]
    order = np.lexsort([column, layer, -_rows_per_group(units)[layer], unit])
    column, layer, unit = column[order], layer[order], unit[order]
    starts = np.flatnonzero(
        np.r_[True, (unit[1:] != unit[:-1]) | (layer[1:] != layer[:-1])][: len(unit)]
    )
    middle = starts + np.diff(np.r_[starts, len(unit)]) // 2
    column, layer, unit = column[middle], layer[middle], unit[middle]
    inside = _inside_own_stream(units, free)[layer, units.group_of()[unit]]
    return Readers(unit, layer, column, ~inside)


def next_move(
    units: Units,
    readers: Readers,
    next_unit: IdVector,
    has_pivot: NDArray[np.bool_],
    homeless: NDArray[np.bool_],
) -> IdVector | None:
    """The units that move next, and their new host.

    Args:
        units, readers: of the network.
        next_unit: the unit that each unit's pivot leads to, [units].
        has_pivot: whether a unit has a pivot, [units].
        homeless: units for which no layer was a first choice, [units].

    Returns:
        Indices of pairs in ``readers``, all of one layer; None if no unit can move.
    """
    settled = _settled(next_unit, has_pivot, homeless)
    stuck = homeless | _on_circles(next_unit, ~settled[:-1] & has_pivot)
    pairs = _safe_pairs(units, readers, settled, stuck)
    if not pairs.size:  # units that only lead to stuck ones may open the way for these
        pairs = _safe_pairs(units, readers, settled, ~settled[:-1])
    if not pairs.size:
        return None
    layers = np.unique(readers.layer[pairs])
    best = layers[np.argmax(_rows_per_group(units)[layers])]
    moving: IdVector = pairs[readers.layer[pairs] == best]
    return moving


def _safe_pairs(
    units: Units, readers: Readers, settled: NDArray[np.bool_], moving: NDArray[np.bool_]
) -> IdVector:
    """The pairs of units in ``moving``, [units], with layers whose rows all end in settled units.

    ``settled`` is [units + 1]; the result are indices of pairs in ``readers``.
    """
    pairs = np.flatnonzero(moving[readers.unit])
    safe = np.zeros(len(pairs), dtype=bool)
    for index in np.unique(readers.layer[pairs]):
        layer = units.layers[index]
        mine = readers.layer[pairs] == index
        block = readers.column[pairs[mine]] // (len(layer.columns) // layer.groups)
        safe[mine] = settled[layer.next_units].reshape(layer.groups, -1).all(axis=1)[block]
    found: IdVector = pairs[safe]
    return found


def _rows_per_group(units: Units) -> IdVector:
    """The number of output rows per group, [layers]; [1] if there are no layers."""
    return np.array([len(layer.rows) // layer.groups for layer in units.layers] or [0])


def _settled(
    next_unit: IdVector, has_pivot: NDArray[np.bool_], homeless: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Which units are settled, [units + 1]; the last stands for ``FIXED`` = -1."""
    settled = np.append(~has_pivot & ~homeless, True)
    while True:
        more = has_pivot & ~settled[:-1] & settled[next_unit]
        if not more.any():
            return settled
        settled[:-1] |= more


def _on_circles(next_unit: IdVector, unsettled: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The units with a pivot that lie on a circle, not those that only lead to one, [units]."""
    on_circle = unsettled.copy()
    while True:
        reached = np.zeros(len(on_circle) + 1, dtype=bool)
        reached[next_unit[on_circle]] = True
        if not (on_circle & ~reached[:-1]).any():
            return on_circle
        on_circle &= reached[:-1]


def _inside_own_stream(units: Units, free: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether a layer leads back into a residual group, [layers, groups]."""
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
