"""The conversion as a whole: trace → groups → pivots → scales → rescale, and its record."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pathconvert.choices import Gauge, PivotRule, Scope, require_choice
from pathconvert.conversion.groups import Group, Units, find_units, offenders_inside
from pathconvert.conversion.modules import named_tensors, unwrapped
from pathconvert.conversion.pivots import (
    MIN_PIVOT,
    Pivots,
    choose_pivots,
    pivots_at,
)
from pathconvert.conversion.record import (
    Record,
    RecordedGroup,
    RecordedPivots,
    attach_record,
    form_of,
)
from pathconvert.conversion.rescale import rescale
from pathconvert.conversion.scale_groups import ScaleGroup, scale_groups
from pathconvert.conversion.scales import choose_scales
from pathconvert.conversion.tracing.parts import Traced, trace_network
from pathconvert.conversion.tracing.trace import FloatVector, IdVector
from pathconvert.errors import PathconvertError, RecordError, RefusedNetwork


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
        skip_scale: λ, the size of the pivots.
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
    skip_scale: float = 1.0

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

        Channels are rescaled, pinned, dead, near-dead, held back or circular.
        """
        pinned = np.repeat(
            [group.pinned_by is not None for group in self.groups],
            [group.size for group in self.groups],
        ).astype(bool)
        held, circular, near_dead = self.held_back(), self.circular(), self.near_dead()
        rescaled = self.rescaled()
        dead = ~(pinned | rescaled | held | circular | near_dead)
        return {
            "groups": len(self.groups),
            "groups_pinned": sum(group.pinned_by is not None for group in self.groups),
            "channels_rescaled": int(rescaled.sum()),
            "channels_pinned": int(pinned.sum()),
            "channels_dead": int(dead.sum()),
            "channels_near_dead": int(near_dead.sum()),
            "channels_held_back": int(held.sum()),
            "channels_circular": int(circular.sum()),
        }

    def rescaled(self) -> NDArray[np.bool_]:
        """Which units have a factor that comes from their pivot, [units]."""
        rescaled: NDArray[np.bool_] = (
            (self.pivots.layer >= 0) & ~self.held_back() & ~self.circular()
        )
        return rescaled

    def near_dead(self) -> NDArray[np.bool_]:
        """Which units are near-dead, [units]."""
        return self.pivots.near_dead

    def held_back(self) -> NDArray[np.bool_]:
        """Which units are held back, [units]."""
        return np.concatenate(
            [np.zeros(0, dtype=bool), *(group.held_back for group in self.groups)]
        )

    def circular(self) -> NDArray[np.bool_]:
        """Which units are left alone because their pivots run in a circle, [units]."""
        return self.pivots.circular

    def exponents(self) -> IdVector:
        """e of every unit, [units]: its pivot is ±λ·2^e after the conversion (``scales.py``).

        In the gauge ``pow2``, it is up to half a power of two from there. 0 for units that are not
        rescaled.
        """
        rescaled, exponents = self.rescaled(), np.zeros(self.units.count, dtype=np.int64)
        sizes = self.magnitudes()[rescaled] / self.skip_scale
        exponents[rescaled] = np.round(np.log2(sizes)).astype(np.int64)
        return exponents

    def magnitudes(self) -> FloatVector:
        """|a| of the pivots after the conversion, [units]; 0 for a unit without a pivot."""
        scales = self.scales
        magnitudes: FloatVector = (
            np.abs(self.pivots.value) * np.append(scales, 1.0)[self.pivots.next_unit] / scales
        )
        return magnitudes


def reparameterize(
    model: nn.Module,
    example_input: Any,
    scope: Scope = "block",
    pivot: PivotRule = "matching",
    gauge: Gauge = "unit",
    *,
    min_pivot: float = MIN_PIVOT,
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
        min_pivot: a channel whose pivot is smaller than this part of its neighbours' is near-dead
            and keeps the factor 1 (``pivots.py``); 0 turns this off.
        partial: pin the units that enter an activation that is not homogeneous, instead of refusing
            the network.

    Raises:
        RefusedNetwork: the network has an activation that is not positively homogeneous (ReLU6,
            GELU, …), and ``partial`` is not set.
        TraceError: the forward cannot be followed.
        PathconvertError: the network is in Path-BN form already, a choice is not known, or
            ``min_pivot`` is not at least 0 and below 1.
    """
    model = unwrapped(model)
    if form_of(model) == "path-bn":
        raise PathconvertError(
            "the network is in Path-BN form already", "Call leave_path_bn(model) first."
        )
    for value, kind in ((scope, Scope), (pivot, PivotRule), (gauge, Gauge)):
        require_choice(value, kind)
    if not 0 <= min_pivot < 1:
        raise PathconvertError(
            f"min_pivot is {min_pivot:g} but must be at least 0 and below 1",
            f"The default is {MIN_PIVOT:g}; 0 uses every pivot that is not exactly 0.",
        )
    traced = trace_network(model, example_input)
    return convert_traced(model, traced, scope, pivot, gauge, min_pivot=min_pivot, partial=partial)


def convert_traced(
    model: nn.Module,
    traced: Traced,
    scope: Scope,
    pivot: PivotRule,
    gauge: Gauge,
    *,
    min_pivot: float = MIN_PIVOT,
    partial: bool = False,
) -> Conversion:
    """:func:`reparameterize` for a network that is traced already.

    One trace serves all scopes, pivots and gauges.

    Args:
        model: the network; it is not changed.
        traced: its trace.
        scope, pivot, gauge, min_pivot, partial: as in :func:`reparameterize`.

    Raises:
        RefusedNetwork: a layer reads an activation that is not homogeneous, and ``partial`` is
            False.
        PathconvertError: a tensor is not finite.
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
    _require_finite(units, tensors)
    reasons = [_pinned_by(group, scope) for group in units.groups]
    free = np.repeat(
        [reason is None for reason in reasons], [group.size for group in units.groups]
    ).astype(bool)
    pivots = choose_pivots(units, tensors, free, pivot, min_pivot)
    scales, held, on_circle = choose_scales(units, pivots, tensors, gauge)
    pivots = dataclasses.replace(pivots, circular=pivots.circular | on_circle)
    left = held | on_circle | (pivots.layer < 0)
    rescaled = rescale(model, units.slots, scales)
    conversion = Conversion(
        model=rescaled,
        groups=scale_groups(units, pivots, scales, held, left, reasons),
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


def _require_finite(units: Units, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a network with NaN or infinite weights, whose effective weights mean nothing.

    Raises:
        PathconvertError: a parameter is not finite; the message names it.
    """
    for slot in units.slots:
        extrema = torch.aminmax(tensors[slot.parameter]) if tensors[slot.parameter].numel() else ()
        if not all(bool(extremum.isfinite()) for extremum in extrema):
            raise PathconvertError(
                f"{slot.parameter} has NaN or infinite values",
                "The training diverged, or values overflowed float16: give an earlier checkpoint.",
            )


def _pinned_by(group: Group, scope: Scope) -> str | None:
    """Why a group is not scaled in this scope; None if it is."""
    if group.pinned_by is None and group.residual and scope == "block":
        return "is tied by a residual add, which scope block does not rescale (scope network does)"
    return group.pinned_by


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
    held, near_dead, circular = np.zeros((3, units.count), dtype=bool)
    held[record.held_back], near_dead[record.near_dead] = True, True
    circular[record.circular] = True
    pivots = dataclasses.replace(pivots, value=values, near_dead=near_dead, circular=circular)
    left = held | (pivots.layer < 0)
    reasons = [group.pinned_by for group in record.groups]
    return Conversion(
        model=model,
        groups=scale_groups(units, pivots, scales, held, left, reasons),
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
            magnitude=_recorded_magnitudes(conversion),
        ),
        held_back=np.flatnonzero(conversion.held_back()),
        near_dead=np.flatnonzero(conversion.near_dead()),
        circular=np.flatnonzero(conversion.circular()),
        slots=conversion.units.slots,
        row_ends={
            layer.parameter: layer.next_units
            for layer in layers
            if not np.array_equal(layer.next_units, layer.rows)
        },
    )


def _recorded_magnitudes(conversion: Conversion) -> FloatVector | None:
    """The record's ``magnitude``, [units]; None if all pivots are ±λ.

    In the gauge ``unit`` it is λ times a power of two exactly, without the rounding of the factors.
    """
    if conversion.gauge == "pow2":
        return conversion.magnitudes()
    exponents = conversion.exponents()
    if not exponents.any():
        return None
    has_pivot = conversion.pivots.layer >= 0
    magnitudes: FloatVector = np.where(has_pivot, np.ldexp(conversion.skip_scale, exponents), 0.0)
    return magnitudes
