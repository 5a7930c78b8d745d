"""BatchNorms that read rescaled channels, and carry the channels' factors in their statistics.

A BatchNorm that reads an activation directly (the identity branch of RepVGG and MobileOne) has no
weight in front of it that could be divided by a channel's factor s. Its running mean is multiplied
by s instead, and its running variance v becomes s² · (v + eps) − eps, so that it normalises s · z
to the same values as z before.

In evaluation mode this is exact. In training mode the batch's own variance takes the place of v,
and eps does not grow with it: the result is √((v + eps) / (v + eps / s²)) times what it was. A
factor that would make this differ from 1 by more than ``TRAINING_CHANGE``, or the new variance
negative, is recentred (``scales.py``); a channel for which that is not possible is held back. In
the gauge ``pow2``, which promises the same bits, all these channels are held back, because v + eps
would not be rounded as before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pathconvert.conversion.tracing.trace import (
    PINNED,
    BatchNormCall,
    FloatVector,
    IdVector,
    Slot,
    Trace,
)

#: Name of a BatchNorm → its running mean and variance.
Carriers = dict[str, tuple[Slot, Slot]]

#: Largest relative change, in training mode, of what a BatchNorm makes of a rescaled channel.
TRAINING_CHANGE = 0.01


def carriers(trace: Trace, slots: Sequence[Slot], label_of: IdVector) -> Carriers:
    """The BatchNorms whose statistics can carry the factors of what they read.

    Args:
        trace: of the network.
        slots: of the network's parameters.
        label_of: id → label of its connected component.

    Returns:
        The name of each such BatchNorm → its statistics, whose rows are the ids that it reads.
    """
    alone = _alone(trace, slots, label_of)
    parameters = {slot.parameter for slot in slots}
    owners: dict[str, list[BatchNormCall]] = {}  # name of a variance → the calls that use it
    for call in trace.batch_norms:
        if call.statistics is not None:
            owners.setdefault(call.statistics[1].parameter, []).append(call)
    found: Carriers = {}
    for calls in owners.values():
        first, statistics = calls[0], calls[0].statistics
        assert statistics is not None
        if all(_same_use(first, call, label_of) for call in calls[1:]) and all(
            slot.parameter not in parameters and alone[label_of[slot.rows]].all()
            for call in calls
            for slot in call.statistics or ()
        ):
            mean, variance = statistics
            found[first.name] = (
                dataclasses.replace(mean, rows=first.columns),
                dataclasses.replace(variance, rows=first.columns),
            )
    return found


def _alone(trace: Trace, slots: Sequence[Slot], label_of: IdVector) -> NDArray[np.bool_]:
    """Which labels are those of one id that no tie, pin, layer or BatchNorm refers to, [labels]."""
    used = [ids for ids, _ in trace.pins]
    used += [vector for slot in slots for vector in (slot.rows, slot.columns) if vector is not None]
    used += [vector for call in trace.batch_norms for vector in (call.rows, call.columns)]
    alone: NDArray[np.bool_] = np.bincount(label_of) == 1
    alone[label_of[np.concatenate([np.zeros(1, dtype=np.int64), *used])]] = False
    return alone


def _same_use(first: BatchNormCall, other: BatchNormCall, label_of: IdVector) -> bool:
    """Whether two calls of BatchNorms with one variance read the same channels alike."""
    assert first.statistics is not None
    assert other.statistics is not None
    return (
        first.name == other.name
        and first.eps == other.eps
        and first.statistics[0].parameter == other.statistics[0].parameter
        and np.array_equal(label_of[first.columns], label_of[other.columns])
        and np.array_equal(first.columns > PINNED, other.columns > PINNED)
    )


def carried_range(
    variance: FloatVector, eps: float, largest: float
) -> tuple[FloatVector, FloatVector]:
    """The factors that the running variance of a BatchNorm can carry.

    The result in training mode, √((v + eps) / (v + eps / s²)), stays within 1 ± t for

        eps / ((v + eps) / (1 - t)² - v)  ≤  s²  ≤  eps / ((v + eps) / (1 + t)² - v)

    The upper bound is infinite where its denominator is not positive. The new variance is not
    negative for s² ≥ eps / (v + eps).

    Args:
        variance: v before the conversion, [channels].
        eps: of the BatchNorm.
        largest: the largest number of the variance's dtype.

    Returns:
        The smallest and the largest factor, [channels] each; they are 1 where v + eps is 0.
    """
    v, padded = variance, np.where(variance + eps > 0, variance + eps, 1.0)
    low = np.maximum(eps / (padded / (1 - TRAINING_CHANGE) ** 2 - v), eps / padded)
    denominator = padded / (1 + TRAINING_CHANGE) ** 2 - v
    high = np.divide(eps, denominator, out=np.full(v.shape, np.inf), where=denominator > 0)
    high = np.minimum(high, largest / np.maximum(padded, 1.0))
    usable = variance + eps > 0
    return np.sqrt(np.where(usable, low, 1.0)), np.sqrt(np.where(usable, high, 1.0))
