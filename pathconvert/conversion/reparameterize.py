"""The conversion as a whole: trace → groups → pivots → scales → rescale, and its record."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pathconvert.choices import Gauge, PivotRule, Scope, require_choice
from pathconvert.conversion.groups import Group, Units, find_units, offenders_inside
from pathconvert.conversion.modules import named_tensors, unwrapped
from pathconvert.conversion.parts import Traced, trace_network
from pathconvert.conversion.pivots import FloatVector, Pivots, choose_pivots, pivots_at
from pathconvert.conversion.record import (
    Record,
    RecordedGroup,
    RecordedPivots,
    attach_record,
    form_of,
)
from pathconvert.conversion.rescale import rescale
from pathconvert.conversion.scales import choose_scales
from pathconvert.errors import PathconvertError, RecordError, RefusedNetwork


class Pivot(NamedTuple):
    """A unit's skeleton weight: ``parameter[row, column]`` at the kernel's centre.

    Attributes:
        parameter, row, column: its place.
        sign: 1 or -1.
        magnitude: |a| of its effective weight before the conversion (docs/design.md, "Effective
            weight").
    """

    parameter: str
    row: int
    sign: int
    column: int
    magnitude: float


@dataclass(frozen=True)
class ScaleGroup:
    """The channels that the same layers produce; each channel has its own factor.

    Attributes:
        name: the first layer that produces it.
        size: number of channels.
        scales: factor of every channel, float64 [size]; 1 if the channel was not scaled.
        pinned_by: why no channel of the group is scaled; None if they are free.
        producers: all layers that produce it.
        held_back: channels whose factor would leave the dtype's normal range, [size].
    """

    name: str
    size: int
    scales: FloatVector
    pinned_by: str | None
    producers: tuple[str, ...]
    held_back: NDArray[np.bool_]
    _pivots: Callable[[], tuple[Pivot | None, ...]] = field(repr=False)

    @functools.cached_property
    def pivots(self) -> tuple[Pivot | None, ...]:
        """The pivot of each channel; None for a channel that was not scaled."""
        return self._pivots()


@dataclass(frozen=True)
class Conversion:
    """A converted network and everything that is known about its conversion.

    Attributes:
        model: a rescaled copy with the same class and tensor names; its attribute ``path_record``
            is the record.
        groups: every scale group of the network, in forward order.
        parts: the modules that were converted; ``("",)`` for the whole network.
        left_alone: module or parameter → why it was not traced.
        pivot_fallbacks: layers that were too wide for ``matching`` and used ``max`` instead.
        scope, pivot, gauge: as given to :func:`reparameterize`.
        units, pivots: the network's scale groups and pivots, as the steps of the conversion use
            them.
    """

    model: nn.Module
    groups: tuple[ScaleGroup, ...]
    parts: tuple[str, ...]
    left_alone: dict[str, str]
    pivot_fallbacks: tuple[str, ...]
    scope: str
    pivot: str
    gauge: str
    units: Units
    pivots: Pivots

    @functools.cached_property
    def scales(self) -> FloatVector:
        """All factors, [units]."""
        return np.concatenate([np.zeros(0), *(group.scales for group in self.groups)])

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """Everything that :func:`restore` needs, as a JSON object (``record.py``)."""
        return make_record(self).to_json()

    def counts(self) -> dict[str, int]:
        """The number of groups, and the numbers of channels by what became of them.

        Channels are rescaled, pinned, dead, held back or circular.
        """
        free = [group for group in self.groups if group.pinned_by is None]
        held = sum(int(group.held_back.sum()) for group in free)
        with_pivot = sum(int((self.pivots.layer[_span(g)] >= 0).sum()) for g in self._free_groups())
        return {
            "groups": len(self.groups),
            "groups_pinned": len(self.groups) - len(free),
            "channels_rescaled": with_pivot - held - int(self.circular().sum()),
            "channels_pinned": sum(
                group.size for group in self.groups if group.pinned_by is not None
            ),
            "channels_dead": sum(group.size for group in free) - with_pivot,
            "channels_held_back": held,
            "channels_circular": int(self.circular().sum()),
        }

    def held_back(self) -> NDArray[np.bool_]:
        """Which units are held back, [units]."""
        return np.concatenate(
            [np.zeros(0, dtype=bool), *(group.held_back for group in self.groups)]
        )

    def circular(self) -> NDArray[np.bool_]:
        """Which units lie on a circle of pivots, [units]."""
        circular = self.pivots.circular
        return circular if circular is not None else np.zeros(self.units.count, dtype=bool)

    def _free_groups(self) -> list[Group]:
        pairs = zip(self.units.groups, self.groups, strict=True)
        return [group for group, public in pairs if public.pinned_by is None]


def _span(group: Group) -> slice:
    """The group's units, as a slice of a vector [units]."""
    return slice(group.start, group.start + group.size)


def reparameterize(
    model: nn.Module,
    example_input: Any,
    scope: Scope = "block",
    pivot: PivotRule = "matching",
    gauge: Gauge = "unit",
    *,
    partial: bool = False,
) -> Conversion:
    """Rescale every hidden unit so that its pivot is ±1 (PBN Theorem 1, PBN-A Theorem 3.1 and D.1).

    Args:
        model: any ``nn.Module``; not changed.
        example_input: a tensor, or a tuple of the forward's positional arguments. Only shapes
            matter, unless the network can only be converted in parts (detectors); it is then run
            once.
        scope: ``block`` does not scale channels that a residual ``add`` ties; ``network`` scales
            these too.
        pivot: ``matching``, ``max`` or ``diagonal`` (``pivots.py``).
        gauge: ``unit`` (pivots ±1) or ``pow2`` (bit-identical outputs; ``scales.py``).
        partial: pin the units that enter an activation that is not homogeneous, instead of refusing
            the network.

    Raises:
        RefusedNetwork: the network has an activation that is not positively homogeneous (ReLU6,
            GELU, …), and ``partial`` is not set.
        TraceError: the forward cannot be followed.
        PathconvertError: the network is in Path-BN form already, or a choice is not known.
    """
    model = unwrapped(model)
    if form_of(model) == "path-bn":
        raise PathconvertError(
            "the network is in Path-BN form already", "Call leave_path_bn(model) first."
        )
    for value, kind in ((scope, Scope), (pivot, PivotRule), (gauge, Gauge)):
        require_choice(value, kind)
    traced = trace_network(model, example_input)
    return convert_traced(model, traced, scope, pivot, gauge, partial=partial)


def convert_traced(
    model: nn.Module,
    traced: Traced,
    scope: Scope,
    pivot: PivotRule,
    gauge: Gauge,
    *,
    partial: bool = False,
) -> Conversion:
    """:func:`reparameterize` for a network that is traced already.

    One trace serves all scopes, pivots and gauges.
    """
    units = find_units(traced.trace)
    offenders = offenders_inside(traced.trace)
    if offenders and not partial:
        raise RefusedNetwork(
            f"{offenders[0].what}, which is not positively homogeneous: "
            f"{type(model).__name__} cannot be moved to path space as a whole",
            "--partial (partial=True) pins what enters such an activation and converts the rest",
        )
    tensors = named_tensors(model)
    reasons = [_pinned_by(group, scope) for group in units.groups]
    free = np.repeat(
        [reason is None for reason in reasons], [group.size for group in units.groups]
    ).astype(bool)
    pivots = choose_pivots(units, tensors, free, pivot)
    scales, held, circular = choose_scales(units, pivots, tensors, gauge)
    pivots = dataclasses.replace(pivots, circular=circular)
    left = held | circular | (pivots.layer < 0)
    rescaled = rescale(model, units.slots, scales)
    conversion = Conversion(
        model=rescaled,
        groups=_scale_groups(units, pivots, scales, held, left, reasons),
        parts=traced.parts,
        left_alone=traced.left_alone,
        pivot_fallbacks=pivots.fallbacks,
        scope=scope,
        pivot=pivot,
        gauge=gauge,
        units=units,
        pivots=pivots,
    )
    attach_record(rescaled, make_record(conversion))
    return conversion


def _scale_groups(
    units: Units,
    pivots: Pivots,
    scales: FloatVector,
    held: NDArray[np.bool_],
    left: NDArray[np.bool_],
    reasons: Sequence[str | None],
) -> tuple[ScaleGroup, ...]:
    """The public description of every group.

    Args:
        units, pivots: of the network.
        scales: factors, [units].
        held: which units are held back, [units].
        left: which units were not scaled, [units].
        reasons: why a group is not scaled, one per group; None if it is.
    """
    return tuple(
        ScaleGroup(
            name=group.name,
            size=group.size,
            scales=scales[_span(group)],
            pinned_by=reason,
            producers=group.producers,
            held_back=held[_span(group)],
            _pivots=functools.partial(_named_pivots, units, pivots, left, group),
        )
        for group, reason in zip(units.groups, reasons, strict=True)
    )


def _pinned_by(group: Group, scope: Scope) -> str | None:
    """Why a group is not scaled in this scope; None if it is."""
    if group.pinned_by is None and group.residual and scope == "block":
        return "is tied by a residual add, which scope block does not rescale (scope network does)"
    return group.pinned_by


def _named_pivots(
    units: Units, pivots: Pivots, left: NDArray[np.bool_], group: Group
) -> tuple[Pivot | None, ...]:
    """The pivot of each unit of a group.

    None for those in ``left``, [units], which were not scaled.
    """
    return tuple(
        (
            None
            if left[i]
            else Pivot(
                units.layers[pivots.layer[i]].parameter,
                int(pivots.row[i]),
                1 if pivots.value[i] > 0 else -1,
                int(pivots.column[i]),
                abs(float(pivots.value[i])),
            )
        )
        for i in range(group.start, group.start + group.size)
    )


def resume(model: nn.Module, example_input: Any, record: Record | Mapping[str, Any]) -> Conversion:
    """Rebuild the conversion of a network in path form from its record, with a new trace.

    Args:
        model: the converted network, which may be fine-tuned; neither changed nor copied.
        example_input: as for :func:`reparameterize`.
        record: its record, as JSON or read already.

    Raises:
        RecordError: the record has another format version, is damaged, or belongs to another
            network.
    """
    record = Record.read(record)
    tensors, scales, places = named_tensors(model), record.scales, record.pivots
    record.require_fit({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    traced = trace_network(model, example_input)
    units = find_units(traced.trace)
    same_layers = tuple(layer.parameter for layer in units.layers) == places.parameters
    if not (same_layers and units.count == len(scales) == len(places.layer)):
        raise RecordError(
            "the conversion record belongs to another network: its layers differ from this one's"
        )
    pivots = pivots_at(units, tensors, places.layer, places.row, places.column)
    values = pivots.value * scales / np.append(scales, 1.0)[pivots.next_unit]
    pivots = dataclasses.replace(pivots, value=values)
    held = np.zeros(units.count, dtype=bool)
    held[record.held_back] = True
    left = held | (pivots.layer < 0)
    reasons = [group.pinned_by for group in record.groups]
    return Conversion(
        model=model,
        groups=_scale_groups(units, pivots, scales, held, left, reasons),
        parts=traced.parts,
        left_alone=traced.left_alone,
        pivot_fallbacks=(),
        scope=record.scope,
        pivot=record.pivot,
        gauge=record.gauge,
        units=units,
        pivots=pivots,
    )


# ---- the record ----------------------------------------------------------------------------------


def make_record(conversion: Conversion) -> Record:
    """The record of ``conversion``."""
    pivots, layers = conversion.pivots, conversion.units.layers
    return Record(
        form="path",
        scope=conversion.scope,
        pivot=conversion.pivot,
        gauge=conversion.gauge,
        parts=conversion.parts,
        groups=tuple(
            RecordedGroup(g.name, g.size, g.pinned_by, g.producers) for g in conversion.groups
        ),
        scales=conversion.scales,
        pivots=RecordedPivots(
            parameters=tuple(layer.parameter for layer in layers),
            layer=np.where(conversion.circular(), -1, pivots.layer),
            row=pivots.row,
            column=pivots.column,
            negative=pivots.value < 0,
            next_unit=pivots.next_unit,
            magnitude=_magnitudes(conversion) if conversion.gauge == "pow2" else None,
        ),
        held_back=np.flatnonzero(conversion.held_back()),
        slots=conversion.units.slots,
        row_ends={
            layer.parameter: layer.next_units
            for layer in layers
            if not np.array_equal(layer.next_units, layer.rows)
        },
    )


def _magnitudes(conversion: Conversion) -> FloatVector:
    """|a| of the pivots after the conversion, [units]; 0 for a unit without a pivot."""
    pivots, scales = conversion.pivots, conversion.scales
    magnitudes: FloatVector = (
        np.abs(pivots.value) * np.append(scales, 1.0)[pivots.next_unit] / scales
    )
    return magnitudes
