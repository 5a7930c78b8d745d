"""The public description of scale groups: their factors and pivots, channel by channel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pathconvert.conversion.groups import Group, Units
from pathconvert.conversion.pivots import Pivots
from pathconvert.conversion.tracing.trace import FloatVector


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
        near_dead: channels whose pivot is too small to be used (``pivots.py``), [size].
    """

    name: str
    size: int
    scales: FloatVector
    pinned_by: str | None
    producers: tuple[str, ...]
    held_back: NDArray[np.bool_]
    near_dead: NDArray[np.bool_]
    _pivots: Callable[[], tuple[Pivot | None, ...]] = field(repr=False)

    @functools.cached_property
    def pivots(self) -> tuple[Pivot | None, ...]:
        """The pivot of each channel; None for a channel that was not scaled."""
        return self._pivots()


def scale_groups(
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
            near_dead=pivots.near_dead[_span(group)],
            _pivots=functools.partial(_named_pivots, units, pivots, left, group),
        )
        for group, reason in zip(units.groups, reasons, strict=True)
    )


def _span(group: Group) -> slice:
    """The group's units, as a slice of a vector [units]."""
    return slice(group.start, group.start + group.size)


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
