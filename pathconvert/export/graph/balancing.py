"""The balanced gauge: powers of two that even out the ranges of channels, so that float16 holds them.

Scaling a hidden unit by s > 0 on its way in and by 1/s on its way out changes no function (positive scale invariance);
with s a power of two every product is exact, and the network in float32 is the same to the bit as long as nothing
leaves float32's range. float16 has eleven bits between 2⁻¹⁴ and 2¹⁶. Every free unit gets an exponent e:

1. e = 5 − log₂ z, with z its largest |result| of a convolution, linear layer or BatchNorm on a batch: its largest
   activation comes near 2⁵, eleven binades below overflow, so that an ``add``, and inputs other than the batch, have
   room, and nineteen above the end of the subnormals. Units that an ``add`` ties share one factor, by the largest.
2. A unit that is always 0 has no z: e = ½ log₂(c / p) makes the largest weights that produce it (p, with the bias)
   and that read it (c) equally large.
3. Where the largest producing weight is above 2¹² now, e is lowered to it (a unit that is nearly always 0). That
   enlarges the weights that read the unit, so it is looked at again until all fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pathconvert.conversion.groups import Units, find_units
from pathconvert.conversion.parts import trace_network
from pathconvert.conversion.pivots import FloatVector
from pathconvert.conversion.rescale import rescale
from pathconvert.conversion.trace import Slot, as_arguments, mode_of
from pathconvert.export.graph.verification import hooked

#: log₂ of a channel's largest activation.
TARGET = 5
#: log₂ of the largest weight; float16 ends at 2^16.
WEIGHT_TOP = 12
#: No exponent is larger, as float32's own; in path space channels of 2^±100 are common.
LARGEST_EXPONENT = 126
#: Rounds of the third step; a chain of layers that are all too large needs one each, in practice there are one or two.
ROUNDS = 20


def balanced(model: nn.Module, example_input: Any, calibration: Tensor | None = None) -> nn.Module:
    """A copy of ``model`` whose channels have even ranges (see the module's docstring); its function is the same.

    Args:
        model: a folded network in float32 usually; not changed.
        example_input: a tensor, or a tuple of positional arguments.
        calibration: images to measure activations on, [N, C, H, W]; None for standard normal noise of
            ``example_input``'s shape.

    Raises:
        TraceError: the forward cannot be followed.
    """
    units = find_units(trace_network(model, example_input).trace)
    batch = as_arguments(example_input if calibration is None else calibration)
    if calibration is None:
        generator = torch.Generator().manual_seed(0)
        batch = tuple(torch.randn(x.shape, generator=generator) if isinstance(x, Tensor) else x for x in batch)
    exponents = _by_activations(units, _largest_results(model, batch))
    exponents = _for_dead_units(model, units, exponents)
    for _ in range(ROUNDS):
        candidate = rescale(model, units.slots, np.exp2(exponents))
        rows, _ = _weight_peaks(candidate, units)
        excess = np.where(_free(units), np.maximum(0, _log2_up(rows) - WEIGHT_TOP), 0.0)
        if not excess.any():
            break
        exponents = np.maximum(exponents - excess, -LARGEST_EXPONENT)
    return candidate


def _largest_results(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """The largest |result| of every channel of every leaf module with a weight, [channels], over all its calls."""
    largest: dict[str, Tensor] = {}
    kinds = {name: module for name, module in model.named_modules() if getattr(module, "weight", None) is not None}

    def note(name: str, result: Tensor) -> None:
        if name not in kinds or not result.is_floating_point():
            return
        channel = result.dim() - 1 if isinstance(kinds[name], nn.Linear) else 1
        peak = result.abs().transpose(0, channel).flatten(1).amax(1).double()
        largest[name] = torch.maximum(peak, largest[name]) if name in largest else peak

    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    cast = tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
    with torch.no_grad(), mode_of(model, False), hooked(model, note):
        model(*cast)
    return largest


def _free(units: Units) -> NDArray[np.bool_]:
    """Which units may be scaled, [units]."""
    sizes = [group.size for group in units.groups]
    return np.repeat([group.pinned_by is None for group in units.groups], sizes).astype(bool)


def _log2_up(values: FloatVector) -> FloatVector:
    """⌈log₂ v⌉, and 0 where v is 0 or not finite."""
    usable = np.isfinite(values) & (values > 0)
    rounded: FloatVector = np.where(usable, np.ceil(np.log2(np.where(usable, values, 1.0))), 0.0)
    return rounded


def _by_activations(units: Units, results: Mapping[str, Tensor]) -> FloatVector:
    """The first step: exponents [units]; NaN for free units that are always 0."""
    peaks = np.zeros(units.count + 1)  # the last entry takes FIXED = -1
    for slot in units.slots:
        module = slot.parameter.rpartition(".")[0]
        if module in results and len(results[module]) == len(slot.rows):
            np.maximum.at(peaks, slot.rows, results[module].numpy())
    peaks = peaks[:-1]
    exponents = np.clip(TARGET - _log2_up(peaks), -LARGEST_EXPONENT, LARGEST_EXPONENT)
    chosen: FloatVector = np.where(_free(units), np.where(peaks > 0, exponents, np.nan), 0.0)
    return chosen


def _for_dead_units(model: nn.Module, units: Units, exponents: FloatVector) -> FloatVector:
    """The second step, on top of the first."""
    dead = np.isnan(exponents)
    exponents = np.where(dead, 0.0, exponents)
    if not dead.any():
        return exponents
    rows, columns = _weight_peaks(rescale(model, units.slots, np.exp2(exponents)), units)
    middle = np.where((rows > 0) & (columns > 0), np.round((_log2_up(columns) - _log2_up(rows)) / 2), 0.0)
    balanced_exponents: FloatVector = np.where(dead, np.clip(middle, -LARGEST_EXPONENT, LARGEST_EXPONENT), exponents)
    return balanced_exponents


def _weight_peaks(model: nn.Module, units: Units) -> tuple[FloatVector, FloatVector]:
    """The largest |weight| that produces a unit, and that reads it, [units] each."""
    produced, read = np.zeros(units.count + 1), np.zeros(units.count + 1)
    tensors = dict(model.named_buffers()) | dict(model.named_parameters())
    for slot in units.slots:
        rows, columns = _slot_peaks(tensors[slot.parameter], slot)
        np.maximum.at(produced, slot.rows, rows)
        if slot.columns is not None:
            np.maximum.at(read, slot.columns, columns)
    return produced[:-1], read[:-1]


def _slot_peaks(tensor: Tensor, slot: Slot) -> tuple[FloatVector, FloatVector]:
    """The largest |weight| of every row and of every column."""
    magnitude = tensor.detach().abs().double()
    if slot.columns is None:
        return magnitude.flatten().numpy(), np.zeros(0)
    blocks = magnitude.reshape(slot.groups, magnitude.shape[0] // slot.groups, magnitude.shape[1], -1).amax(3)
    if slot.transposed:  # stored [in, out / groups, …]
        blocks = blocks.transpose(1, 2)
    return blocks.amax(2).flatten().numpy(), blocks.amax(1).flatten().numpy()
