"""Rescaling units so that pivots become ±λ in place of ±1 (λ is the skip scale)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import nn

from pathconvert.choices import Gauge
from pathconvert.conversion.equivalence import run_dtype
from pathconvert.conversion.modules import named_tensors
from pathconvert.conversion.record import attach_record
from pathconvert.conversion.reparameterize import Conversion, make_record
from pathconvert.conversion.rescale import rescale
from pathconvert.conversion.scales import choose_scales
from pathconvert.conversion.tracing.trace import IdVector
from pathconvert.errors import PathconvertError


def with_skip_scale(conversion: Conversion, skip_scale: float) -> Conversion:
    """The conversion with pivots of ±λ in place of ±1, and recentred as before (``scales.py``).

    The same object if the pivots have that size already.

    Raises:
        PathconvertError: λ is not a positive number.
    """
    if not (math.isfinite(skip_scale) and skip_scale > 0):
        raise PathconvertError(
            f"skip_scale is {skip_scale} but must be positive",
            "The papers use 1, and 0.1 for ResNets.",
        )
    units, pivots, base = conversion.units, conversion.pivots, conversion.scales
    with_pivot = conversion.rescaled()
    start = dataclasses.replace(
        pivots,
        value=np.where(with_pivot, pivots.value, 0.0),
        layer=np.where(with_pivot, pivots.layer, -1),
    )
    tensors = named_tensors(conversion.model)
    gauge: Gauge = "pow2" if conversion.gauge == "pow2" else "unit"
    scales, newly_held, on_circle = choose_scales(units, start, tensors, gauge, skip_scale, base)
    groups = tuple(
        dataclasses.replace(
            public,
            scales=scales[group.start : group.start + group.size],
            held_back=public.held_back | newly_held[group.start : group.start + group.size],
        )
        for group, public in zip(units.groups, conversion.groups, strict=True)
    )
    rescaled = dataclasses.replace(
        conversion,
        groups=groups,
        pivots=dataclasses.replace(pivots, circular=on_circle | pivots.circular),
        skip_scale=skip_scale,
    )
    if _has_size(conversion, skip_scale, rescaled.exponents()):
        return conversion
    rescaled = dataclasses.replace(
        rescaled, model=rescale(conversion.model, units.slots, scales / base)
    )
    attach_record(rescaled.model, make_record(rescaled))
    return rescaled


def _has_size(conversion: Conversion, skip_scale: float, exponents: IdVector) -> bool:
    """Whether the pivots of ``conversion`` are ±λ·2^e already; e is ``exponents``, [units]."""
    mine = conversion.rescaled()
    off = np.abs(np.log2(conversion.magnitudes()[mine] / skip_scale) - exponents[mine])
    half = 0.5 if conversion.gauge == "pow2" else 0.0
    return bool(off.max(initial=0.0) <= half + pivot_rounding(conversion.model))


def pivot_rounding(model: nn.Module) -> float:
    """How far from ±1 a pivot may be because weights, γ and statistics are rounded."""
    return 8 * float(torch.finfo(run_dtype(model)).eps)
