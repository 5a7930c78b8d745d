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
from pathconvert.errors import PathconvertError


def with_skip_scale(conversion: Conversion, skip_scale: float) -> Conversion:
    """The conversion with pivots of ±λ in place of ±1.

    The same object if the pivots have that size already.

    Raises:
        PathconvertError: λ is not a positive number.
    """
    if not (math.isfinite(skip_scale) and skip_scale > 0):
        raise PathconvertError(
            f"skip_scale is {skip_scale} but must be positive",
            "The papers use 1, and 0.1 for ResNets.",
        )
    units, scales = conversion.units, conversion.scales
    pivots, held = conversion.pivots, conversion.held_back()
    with_pivot = (pivots.layer >= 0) & ~held & ~conversion.circular()
    now = pivots.value * np.append(scales, 1.0)[pivots.next_unit] / scales
    off = np.abs(np.log2(np.abs(now[with_pivot]) / skip_scale))
    if off.max(initial=0.0) <= (0.5 if conversion.gauge == "pow2" else 0.0) + pivot_rounding(
        conversion.model
    ):
        return conversion
    start = dataclasses.replace(
        pivots, value=np.where(with_pivot, now, 0.0), layer=np.where(with_pivot, pivots.layer, -1)
    )
    tensors = named_tensors(conversion.model)
    gauge: Gauge = "pow2" if conversion.gauge == "pow2" else "unit"
    extra, newly_held, circular = choose_scales(units, start, tensors, gauge, skip_scale)
    groups = tuple(
        dataclasses.replace(
            public,
            scales=public.scales * extra[group.start : group.start + group.size],
            held_back=public.held_back | newly_held[group.start : group.start + group.size],
        )
        for group, public in zip(units.groups, conversion.groups, strict=True)
    )
    rescaled = dataclasses.replace(
        conversion,
        model=rescale(conversion.model, units.slots, extra),
        groups=groups,
        pivots=dataclasses.replace(pivots, circular=circular | conversion.circular()),
    )
    attach_record(rescaled.model, make_record(rescaled))
    return rescaled


def pivot_rounding(model: nn.Module) -> float:
    """How far from ±1 a pivot may be because weights, γ and statistics are rounded."""
    return 8 * float(torch.finfo(run_dtype(model)).eps)
