"""Scale groups: the solution of a trace's ties and pins.

A **unit** is a set of ids that share one factor; usually it is a feature map. Units that the same
layers produce form a **scale group**. Units are numbered group by group, so that one vector [units]
holds all factors. ``-1`` stands for a factor that is 1 by construction (network inputs, the input
of a BatchNorm).

==========  =======================================================================================
pinned      the factor must be 1; the reason names the operation
residual    an ``add`` of two activations ties it (scope ``block`` does not scale it)
absorbed    only BatchNorms read it: a factor would have no effect, so it does not count as a unit
==========  =======================================================================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pathconvert.conversion.carrying import Carriers, carriers
from pathconvert.conversion.tracing.trace import (
    PINNED,
    BatchNormCall,
    IdVector,
    Offender,
    Slot,
    Trace,
)

FIXED = -1
#: How the reason of a channel begins that is pinned because a BatchNorm reads it.
READ_BY_BATCH_NORM = "enters the BatchNorm "


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer as a consumer and producer of units.

    Attributes:
        parameter: the weight's name.
        rows: unit of every output row, [rows]; ``FIXED`` where its factor is 1.
        columns: unit of every input column, [columns].
        groups, transposed: as in :class:`~pathconvert.conversion.tracing.trace.Slot`.
        next_units: the unit that a row ends in, [rows]: its own, or that of the one BatchNorm that
            absorbs it.
        batch_norms: index of that BatchNorm in :attr:`Units.batch_norms`, [rows]; -1 if there is
            none.
        channels: the row's channel in that BatchNorm, [rows].
        follower: the BatchNorm that is the only reader of the layer and reads nothing else
            (:meth:`Trace.followers`); None if there is none.
        readers: if there is no follower, the BatchNorms that read some of its rows (through a
            concat): name, rows, channels.
    """

    parameter: str
    rows: IdVector
    columns: IdVector
    groups: int
    transposed: bool
    next_units: IdVector
    batch_norms: IdVector
    channels: IdVector
    follower: str | None = None
    readers: tuple[tuple[str, IdVector, IdVector], ...] = ()


@dataclass(frozen=True)
class Group:
    """A scale group: the units from ``start`` up to ``start + size``.

    Attributes:
        name: the first layer that produces it, with a number if several groups have the same one.
        start, size: its units.
        producers: all layers that produce it.
        pinned_by: why its factors are 1; None if they are free.
        residual: whether an ``add`` of two activations ties it.
    """

    name: str
    start: int
    size: int
    producers: tuple[str, ...]
    pinned_by: str | None
    residual: bool


@dataclass(frozen=True)
class Units:
    """A network's scale groups and how every parameter is indexed by units.

    Attributes:
        groups: all scale groups, in the order in which the forward produces them.
        slots: one per parameter that can be rescaled; here, rows and columns are units.
        layers: the consumers among them.
        batch_norms: the BatchNorms that ``layers`` refer to.
    """

    groups: tuple[Group, ...]
    slots: tuple[Slot, ...]
    layers: tuple[Layer, ...]
    batch_norms: tuple[BatchNormCall, ...]

    @property
    def count(self) -> int:
        """The number of units."""
        return sum(group.size for group in self.groups)

    def group_of(self) -> IdVector:
        """The index of each unit's group, [units]."""
        return np.repeat(np.arange(len(self.groups)), [group.size for group in self.groups])


def find_units(trace: Trace) -> Units:
    """Solve ``trace``: its units are the connected components of the ties.

    A unit is pinned if one of its ids is.
    """
    slots = _one_slot_a_parameter(trace)
    label_of = _components(trace)
    label_count = int(label_of.max()) + 1
    carrying = carriers(trace, slots, label_of)
    absorbed, reasons, names = _status(trace, slots, label_of, label_count, carrying)
    residual = np.zeros(label_count, dtype=bool)
    residual[label_of[_concatenate(trace.residual)]] = True
    groups, unit_of_label = _bundle(slots, label_of, absorbed, reasons, names, residual)

    unit_of = unit_of_label[label_of]
    unit_of[: PINNED + 1] = FIXED
    unit_slots = tuple(_in_units(slot, unit_of) for slot in slots)
    statistics = tuple(_in_units(slot, unit_of) for pair in carrying.values() for slot in pair)
    free = np.repeat([group.pinned_by is None for group in groups], [g.size for g in groups])
    statistics = tuple(s for s in statistics if free[s.rows[s.rows >= 0]].any())
    batch_norms = tuple({call.name: call for call in trace.batch_norms}.values())
    reader, position = _single_readers(trace, batch_norms, label_of, absorbed)
    bn_units = [unit_of[call.rows] for call in batch_norms]
    norm_names = {call.name for call in batch_norms}
    followers = {name: sink for name, sink in trace.followers().items() if sink in norm_names}
    reads = _Reads(trace, label_of)
    layers = []
    for raw, slot in zip(slots, unit_slots, strict=True):
        if slot.columns is None:
            continue
        rows = label_of[raw.rows]
        layer = _layer(slot, reader[rows], position[rows], bn_units)
        follower = followers.get(slot.parameter)
        readers = () if follower or not absorbed[rows].any() else reads.of(rows)
        layers.append(dataclasses.replace(layer, follower=follower, readers=readers))
    return Units(groups, unit_slots + statistics, tuple(layers), batch_norms)


def _in_units(slot: Slot, unit_of: IdVector) -> Slot:
    """A slot with units in place of ids."""
    columns = None if slot.columns is None else unit_of[slot.columns]
    return dataclasses.replace(slot, rows=unit_of[slot.rows], columns=columns)


def offenders_inside(trace: Trace) -> list[Offender]:
    """The activations that are not homogeneous and whose results a layer or a BatchNorm reads."""
    if not trace.offenders:
        return []
    label_of = _components(trace)
    columns = [slot.columns for slot in trace.slots if slot.columns is not None]
    read = np.zeros(int(label_of.max()) + 1, dtype=bool)
    read[label_of[_concatenate((*columns, *(call.columns for call in trace.batch_norms)))]] = True
    return [one for one in trace.offenders if read[label_of[one.made]]]


def _concatenate(vectors: Iterable[IdVector]) -> IdVector:
    """``np.concatenate``, also of no vectors."""
    return np.concatenate([np.zeros(0, dtype=np.int64), *vectors])


def _one_slot_a_parameter(trace: Trace) -> list[Slot]:
    """The first slot of each parameter.

    Further uses of it (a second call, tied weights) are tied to the first.
    """
    first: dict[str, Slot] = {}
    for slot in trace.slots:
        known = first.setdefault(slot.parameter, slot)
        if known is slot:
            continue
        where = f"a second use of {slot.parameter}"
        shapes = [(use.groups, use.transposed, len(use.rows)) for use in (known, slot)]
        same_kind = shapes[0] == shapes[1]
        if known.columns is None and slot.columns is None and same_kind:
            trace.tie(known.rows, slot.rows, where)
        elif known.columns is not None and slot.columns is not None and same_kind:
            trace.tie(known.rows, slot.rows, where)
            trace.tie(known.columns, slot.columns, where)
        else:
            for use in (known, slot):
                ids = _concatenate(v for v in (use.rows, use.columns) if v is not None)
                trace.pin(ids, f"meets {where} in another role")
    return [slot for slot in first.values() if (slot.rows > PINNED).any()]


def _components(trace: Trace) -> IdVector:
    """Id → label of its connected component."""
    left = _concatenate(a for a, _ in trace.ties)
    right = _concatenate(b for _, b in trace.ties)
    graph = coo_array(
        (np.ones(len(left), dtype=np.int8), (left, right)), shape=(trace.id_count,) * 2
    )
    labels: IdVector = connected_components(graph, directed=False)[1].astype(np.int64)
    return labels


def _status(
    trace: Trace, slots: list[Slot], label_of: IdVector, count: int, carrying: Carriers
) -> tuple[NDArray[np.bool_], IdVector, list[str]]:
    """Which labels are absorbed or pinned.

    A label that layers and BatchNorms read is free if all these BatchNorms are in ``carrying``.

    Returns:
        Whether a label is absorbed, [labels]; the index of the reason why it is pinned, [labels],
        -1 if it is free; and the reasons.
    """
    names: dict[str, int] = {}
    reasons = np.full(count, np.iinfo(np.int64).max)

    def pin(ids: IdVector, reason: str) -> None:
        np.minimum.at(reasons, label_of[ids[ids > PINNED]], names.setdefault(reason, len(names)))

    for ids, reason in trace.pins:
        pin(ids, reason)
    pinned_otherwise = reasons < np.iinfo(np.int64).max

    def holds(vectors: Iterable[IdVector]) -> NDArray[np.bool_]:
        mask = np.zeros(count, dtype=bool)
        mask[label_of[_concatenate(vectors)]] = True
        return mask

    read_by_norm = holds(call.columns for call in trace.batch_norms)
    made_by_norm = holds(call.rows for call in trace.batch_norms)
    read_by_layer = holds(slot.columns for slot in slots if slot.columns is not None)
    absorbed = read_by_norm & ~made_by_norm & ~read_by_layer & ~pinned_otherwise
    for call in trace.batch_norms:
        carried = read_by_layer if call.name in carrying else np.zeros(count, dtype=bool)
        columns = call.columns[~carried[label_of[call.columns]]]
        pin(columns, f"{READ_BY_BATCH_NORM}{call.name}, which normalises any factor away")
    reasons[reasons == np.iinfo(np.int64).max] = -1
    return absorbed, reasons, list(names)


def _bundle(
    slots: list[Slot],
    label_of: IdVector,
    absorbed: NDArray[np.bool_],
    reasons: IdVector,
    names: list[str],
    residual: NDArray[np.bool_],
) -> tuple[tuple[Group, ...], IdVector]:
    """Bundle units that have the same producing layers, reason and residual flag into groups.

    Returns:
        The groups; and the unit of every label, [labels], ``FIXED`` if it is not a unit.
    """
    titles = {slot.parameter: slot.parameter.rpartition(".")[0] or slot.parameter for slot in slots}
    layer_names = list(dict.fromkeys(titles.values()))
    index = {name: i for i, name in enumerate(layer_names)}
    rows = label_of[_concatenate(slot.rows for slot in slots)]
    made_by = np.repeat(
        [index[titles[slot.parameter]] for slot in slots] or [0],
        [len(s.rows) for s in slots] or [0],
    )
    # [2, pairs]: every label with each layer that produces it, sorted by label
    pairs = np.stack(
        np.divmod(np.unique(rows * len(layer_names) + made_by), max(1, len(layer_names)))
    )

    labels, first_row = np.unique(rows, return_index=True)
    keep = ~absorbed[labels]
    signature = _signatures(pairs, len(layer_names), reasons, len(names), residual)
    labels, starts, sizes = _in_runs(labels[keep], first_row[keep], signature)
    unit_of_label = np.full(len(reasons), FIXED)
    unit_of_label[labels] = np.arange(len(labels))
    groups: list[Group] = []
    taken: dict[str, int] = {}
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        label = labels[start]
        lo, hi = np.searchsorted(pairs[0], [label, label + 1])
        producers = tuple(layer_names[i] for i in pairs[1, lo:hi])
        taken[producers[0]] = taken.get(producers[0], 0) + 1
        name = producers[0] if taken[producers[0]] == 1 else f"{producers[0]}#{taken[producers[0]]}"
        reason = names[reasons[label]] if reasons[label] >= 0 else None
        groups.append(Group(name, start, size, producers, reason, bool(residual[label])))
    return tuple(groups), unit_of_label


def _signatures(
    pairs: IdVector,
    layer_count: int,
    reasons: IdVector,
    reason_count: int,
    residual: NDArray[np.bool_],
) -> IdVector:
    """A hash of every label's producing layers, reason and residual flag, [labels]."""
    hashes = np.random.default_rng(0).integers(1, 2**62, (3, max(layer_count, reason_count) + 1))
    signature = np.zeros(len(reasons), dtype=np.int64)
    # The sum, which may wrap around, does not depend on the order: it is a hash of the set of
    # layers.
    np.add.at(signature, pairs[0], hashes[0][pairs[1]])
    signature += hashes[1][reasons] + hashes[2][residual.astype(np.int64)]
    return signature


def _in_runs(
    labels: IdVector, first_row: IdVector, signature: IdVector
) -> tuple[IdVector, IdVector, IdVector]:
    """Order labels so that those with the same signature follow one another.

    The runs, and the labels in each, are in the order of the forward.

    Args:
        labels: those that are units.
        first_row: the first row, in the order of the forward, that produces each of them.
        signature: of all labels.

    Returns:
        The labels in their new order; and start and length of every run of labels with the same
        signature.
    """
    _, bundle = np.unique(signature[labels], return_inverse=True)
    first_of_bundle = np.full(bundle.max(initial=-1) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first_of_bundle, bundle, first_row)
    order = np.lexsort([first_row, first_of_bundle[bundle]])
    labels, bundle = labels[order], bundle[order]
    starts = (
        np.flatnonzero(np.r_[True, bundle[1:] != bundle[:-1]])
        if len(bundle)
        else np.zeros(0, dtype=np.int64)
    )
    return labels, starts, np.diff(np.r_[starts, len(bundle)])


def _single_readers(
    trace: Trace,
    batch_norms: tuple[BatchNormCall, ...],
    label_of: IdVector,
    absorbed: NDArray[np.bool_],
) -> tuple[IdVector, IdVector]:
    """The one BatchNorm channel that reads each absorbed label.

    Returns:
        The BatchNorm's index, [labels], -1 if none or several read the label; and the channel,
        [labels].
    """
    index = {call.name: i for i, call in enumerate(batch_norms)}
    read = [(label_of[call.columns], index[call.name]) for call in trace.batch_norms]
    label = _concatenate(labels for labels, _ in read)
    which = _concatenate(np.full(len(labels), i) for labels, i in read)
    channel = _concatenate(np.arange(len(labels)) for labels, _ in read)
    reader = np.full(len(absorbed), -1)
    position = np.zeros(len(absorbed), dtype=np.int64)
    reader[label], position[label] = which, channel  # the last call that reads it wins
    several = (reader[label] != which) | (position[label] != channel)
    reader[label[several]] = -1
    reader[~absorbed] = -1
    return reader, position


class _Reads:
    """Which channels of which BatchNorms read each label."""

    def __init__(self, trace: Trace, label_of: IdVector) -> None:
        self.names = list(dict.fromkeys(call.name for call in trace.batch_norms))
        index = {name: i for i, name in enumerate(self.names)}
        labels = _concatenate(label_of[call.columns] for call in trace.batch_norms)
        order = np.argsort(labels, kind="stable")
        self.labels = labels[order]
        self.norm = _concatenate(
            np.full(len(call.columns), index[call.name]) for call in trace.batch_norms
        )[order]
        self.channel = _concatenate(np.arange(len(call.columns)) for call in trace.batch_norms)[
            order
        ]

    def of(self, labels: IdVector) -> tuple[tuple[str, IdVector, IdVector], ...]:
        """The BatchNorms that read any of ``labels``.

        Returns:
            For each BatchNorm: its name, positions in ``labels``, and the channels that read these.
        """
        low, high = (np.searchsorted(self.labels, labels, side) for side in ("left", "right"))
        counts = high - low
        row = np.repeat(np.arange(len(labels)), counts)
        place = np.arange(len(row)) + np.repeat(low - (np.cumsum(counts) - counts), counts)
        pairs = np.unique(np.stack([self.norm[place], row, self.channel[place]]), axis=1)
        return tuple((self.names[i], *pairs[1:, pairs[0] == i]) for i in np.unique(pairs[0]))


def _layer(slot: Slot, reader: IdVector, channel: IdVector, bn_units: list[IdVector]) -> Layer:
    """The layer of a slot; its rows end in the units of the BatchNorms that absorb them."""
    assert slot.columns is not None
    next_units = slot.rows.copy()
    for index in np.unique(reader[reader >= 0]):
        mask = reader == index
        next_units[mask] = bn_units[index][channel[mask]]
    return Layer(
        slot.parameter,
        slot.rows,
        slot.columns,
        slot.groups,
        slot.transposed,
        next_units,
        reader,
        channel,
    )
