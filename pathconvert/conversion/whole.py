"""Comparing networks as a whole that were converted part by part.

Such a network decides on numbers (a detector selects boxes), so that rounding alone may change its
outputs by any amount. Its parts are compared one by one (``equivalence.verify_conversion``); but
what leaves a part sideways, and is read elsewhere, shows only in the whole. The whole network is
compared as follows:

1. As the user will run it, :func:`~pathconvert.conversion.equivalence.verify`. If it passes on
   all inputs, nothing more is needed.
2. Otherwise in exact arithmetic. A float64 copy of the *original* is rescaled by the record's own
   factors. If the factors are right, it computes what the original computes in float64, up to
   float64's rounding; then only the rounding of the dtype makes the difference, provided that the
   tensors of the network at hand are the rescaled ones up to that rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pathconvert.conversion.equivalence import EquivalenceReport, forward_outputs, verify
from pathconvert.conversion.modules import named_tensors
from pathconvert.conversion.precision import in_dtype
from pathconvert.conversion.record import Record
from pathconvert.conversion.rescale import rescale
from pathconvert.errors import EquivalenceError

#: Largest difference in float64, relative to an output's largest value. Rounding costs about 1e-15
#: per layer, and boxes that are computed from logits may enlarge it a thousandfold.
EXACT_TOLERANCE = 1e-9
#: How far a tensor may be from the rescaled one, in units of its dtype: a conversion rounds once
#: and its restoration once more, each by up to half a unit.
TENSOR_UNITS = 2


def require_same_whole(
    original: nn.Module, converted: nn.Module, record: Record, inputs: Sequence[Any]
) -> EquivalenceReport | None:
    """Compare two networks as a whole (see the module's docstring).

    Args:
        original: the network before the conversion, or a restored one.
        converted: the network in path or Path-BN form; neither is changed.
        record: of the conversion.
        inputs: each as for :func:`~pathconvert.conversion.equivalence.verify`.

    Returns:
        The comparison if the networks agree as they are; None if they only agree in exact
        arithmetic.

    Raises:
        EquivalenceError: the networks differ.
    """
    report = _as_they_are(original, converted, inputs)
    if report is not None and report.passed:
        return report
    wide = in_dtype(original, torch.float64)
    rescaled = rescale(wide, record.slots, record.scales)
    for one in inputs:
        why = _difference(wide, rescaled, one)
        if why:
            raise EquivalenceError(
                f"the parts of the network agree, but the whole does not: {why} in float64",
                "A tensor leaves a part on a way that was not followed; please report this"
                " network.",
            )
    if record.path_bn is None:
        _require_tensors(rescaled, converted)
    return None


def _as_they_are(
    original: nn.Module, converted: nn.Module, inputs: Sequence[Any]
) -> EquivalenceReport | None:
    """The comparison in the networks' own dtype; None if their outputs differ in shape."""
    try:
        return EquivalenceReport.worst([verify(original, converted, one) for one in inputs])
    except EquivalenceError:
        return None


def _difference(wide: nn.Module, rescaled: nn.Module, inputs: Any) -> str:
    """How two networks in float64 differ, in words; empty if they do not."""
    before, after = (
        forward_outputs(model, inputs, dtype=torch.float64) for model in (wide, rescaled)
    )
    if [a.shape for a in before] != [b.shape for b in after]:
        return "its outputs have other shapes"
    for a, b in zip(before, after, strict=True):
        error = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
        scale = float(a.abs().max()) if a.numel() else 0.0
        if not error <= EXACT_TOLERANCE * scale:
            return f"an output changes by {error:.3g}, and its largest value is {scale:.3g},"
    return ""


def _require_tensors(rescaled: nn.Module, converted: nn.Module) -> None:
    """Check that the tensors of ``converted`` are those of ``rescaled`` up to rounding.

    Raises:
        EquivalenceError: one is not.
    """
    exact = named_tensors(rescaled)
    for name, tensor in named_tensors(converted).items():
        if name not in exact or not _is_rounded(tensor, exact[name]):
            raise EquivalenceError(
                f"{name} of the converted network is not the original's tensor times the recorded"
                " factors",
                "Convert the original again.",
            )


def _is_rounded(tensor: Tensor, exact: Tensor) -> bool:
    """Whether ``tensor`` is ``exact`` up to rounding to the dtype of ``tensor``."""
    if tensor.shape != exact.shape:
        return False
    if not tensor.is_floating_point():
        return torch.equal(tensor, exact.to(tensor.dtype))
    info = torch.finfo(tensor.dtype)
    unit = info.eps * exact.abs().clamp(min=info.tiny)
    difference = (tensor.double() - exact).abs()
    return bool(((difference <= TENSOR_UNITS * unit) | (tensor == exact)).all())
