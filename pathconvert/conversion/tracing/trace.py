"""What a traced forward says: which channels share a factor, which layers make and read them.

``tracer.py`` runs the forward once and keeps an integer tensor beside every activation, its
**ids**: one id for every scalar that may have a factor of its own.

===============  ===============================================================================
``ZERO``         the value is 0, whatever its factor is (zero padding)
``PINNED``       the factor is 1: network inputs, constants, results of operations that are not
                 homogeneous
``2, 3, …``      an element that a row of a parameter produces
===============  ===============================================================================

Nothing is merged here: a :class:`Trace` collects *ties* (two ids share a factor), *pins* (an id has
factor 1, for a stated reason) and *slots* (how each parameter is indexed by ids). ``groups.py``
solves them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

ZERO, PINNED = 0, 1

IdVector = NDArray[np.int64]
FloatVector = NDArray[np.float64]
Statistic = Literal["mean", "variance"]


@dataclass(frozen=True)
class Slot:
    """How a parameter is indexed by ids.

    Rescaling multiplies ``parameter[row, column]`` by ``factor[row] / factor[column]``. The running
    variance v of a BatchNorm becomes factor² · (v + eps) − eps, so that v + eps is multiplied by
    factor².

    Attributes:
        parameter: its name in ``model.named_parameters()`` (or buffers, for a frozen BatchNorm and
            for running statistics).
        rows: ids of the elements that it produces, [rows].
        columns: ids of the elements that it reads, [columns]; None for biases, γ and β.
        groups: number of groups of a convolution; row block g reads only column block g.
        transposed: whether it is stored as [in, out / groups, …], as transposed convolutions are.
        statistic: ``mean`` or ``variance`` if it is a running statistic of a BatchNorm that reads
            rescaled channels, which are its rows; None for everything else.
        eps: of the BatchNorm; only for ``variance``.
    """

    parameter: str
    rows: IdVector
    columns: IdVector | None = None
    groups: int = 1
    transposed: bool = False
    statistic: Statistic | None = None
    eps: float = 0.0


@dataclass(frozen=True)
class BatchNormCall:
    """One call of the BatchNorm ``name``.

    Attributes:
        name: the module's path.
        rows: ids that it produces, [C].
        columns: ids that it reads, [C].
        weight, var: names of γ and of the running variance; None if the call has none.
        eps: as in the module.
        statistics: the running mean and variance that the call normalises with, if they could be
            rescaled with the channels that it reads; their rows are ids of their own. None if the
            call uses the statistics of its batch.
    """

    name: str
    rows: IdVector
    columns: IdVector
    weight: str | None
    var: str | None
    eps: float
    statistics: tuple[Slot, Slot] | None = None


@dataclass(frozen=True)
class Step:
    """One call of a layer or of a BatchNorm, with its neighbours.

    Attributes:
        name: the name of a layer's weight, or a BatchNorm's :attr:`BatchNormCall.name`.
        source: the step whose result this step reads, if nothing else reads that result; None
            otherwise.
        sink: the step that reads this step's result, if nothing else reads it; None otherwise.
    """

    name: str
    source: str | None
    sink: str | None


@dataclass(frozen=True)
class Offender:
    """A call of an activation that is not homogeneous.

    Attributes:
        what: the module and the activation: ``features.2 is ReLU6``, ``layer1.0 calls silu``.
        made: the id of everything that it returns. The network is refused if a layer or a
            BatchNorm reads it, and not if it only leads to outputs.
    """

    what: str
    made: int


@dataclass
class Trace:
    """What one or several runs of a network say about its ids (see the module's docstring).

    Attributes:
        slots: how each parameter is indexed by ids.
        batch_norms: all calls of BatchNorms.
        ties: pairs of vectors; ``a[i]`` and ``b[i]`` share a factor.
        pins: ids that have factor 1, and the reason.
        residual: ids that an ``add`` of two activations ties.
        offenders: all calls of activations that are not homogeneous.
        steps: all calls of layers and BatchNorms.
        id_count: number of ids in use, ``ZERO`` and ``PINNED`` included.
    """

    slots: list[Slot] = field(default_factory=list)
    batch_norms: list[BatchNormCall] = field(default_factory=list)
    ties: list[tuple[IdVector, IdVector]] = field(default_factory=list)
    pins: list[tuple[IdVector, str]] = field(default_factory=list)
    residual: list[IdVector] = field(default_factory=list)
    offenders: list[Offender] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    id_count: int = 2

    def copy(self) -> Trace:
        """A copy that can be extended without changing this trace."""
        return Trace(
            list(self.slots),
            list(self.batch_norms),
            list(self.ties),
            list(self.pins),
            list(self.residual),
            list(self.offenders),
            list(self.steps),
            self.id_count,
        )

    def every_slot(self) -> list[Slot]:
        """The slots of all parameters and of the running statistics that calls normalise with."""
        statistics = (call.statistics or () for call in self.batch_norms)
        return [*self.slots, *(slot for pair in statistics for slot in pair)]

    def followers(self) -> dict[str, str]:
        """Names of steps → the one step that reads their result in every call.

        Only where that one reads nothing else.
        """
        sources: dict[str, set[str | None]] = {}
        sinks: dict[str, set[str | None]] = {}
        for step in self.steps:
            sources.setdefault(step.name, set()).add(step.source)
            sinks.setdefault(step.name, set()).add(step.sink)
        return {
            name: sink
            for name, (sink, *others) in ((name, tuple(reached)) for name, reached in sinks.items())
            if sink is not None and not others and sources[sink] == {name}
        }

    def fresh(self, count: int) -> IdVector:
        """``count`` new ids, [count]."""
        self.id_count += count
        return np.arange(self.id_count - count, self.id_count)

    def pin(self, ids: IdVector, reason: str) -> None:
        """Record that these ids have factor 1, for ``reason``."""
        ids = np.unique(ids[ids > PINNED])
        if ids.size:
            self.pins.append((ids, reason))

    def tie(self, a: IdVector, b: IdVector, where: str) -> None:
        """Record that ``a[i]`` and ``b[i]`` share a factor.

        If one of them is pinned, so is the other; the reason for that names ``where``.
        """
        free = (a > PINNED) & (b > PINNED) & (a != b)
        if free.any():
            self.ties.append((a[free], b[free]))
        reason = f"meets a tensor that is not rescaled in {where}"
        self.pin(a[b == PINNED], reason)
        self.pin(b[a == PINNED], reason)
