"""The balanced gauge: scale channels by powers of two so that their ranges fit into float16.

Multiplying the weights that produce a hidden unit by s > 0, and those that read it by 1/s, does not
change the network's function (positive scale invariance). If s is a power of two, every product is
exact, and the network in float32 gives the same bits as long as nothing leaves float32's range.
float16 has eleven bits of precision between 2⁻¹⁴ and 2¹⁶. Every unit that is not pinned is scaled
by s = 2ᵉ:

1. e = 5 − log₂ z, where z is the largest |result| for this unit of a convolution, linear layer or
   BatchNorm on a batch. Its largest activation is then near 2⁵. This is eleven binades below
   overflow, which leaves room for an ``add`` and for other inputs than the batch, and nineteen
   above the subnormal numbers. Units that an ``add`` ties share one factor, which the largest of
   them decides.
2. A unit that is always 0 has no z. For it e = ½ log₂(c / p), which makes the largest weight that
   produces it (p, including the bias) and the largest weight that reads it (c) equally large.
3. If the largest producing weight is now above 2¹² (for a unit that is nearly always 0), e is
   lowered until it is not. This enlarges the weights that read the unit, which may produce other
   units, so the step is repeated until all fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pathconvert.conversion.calls import leaves, watched
from pathconvert.conversion.groups import Units, find_units
from pathconvert.conversion.modules import as_arguments, mode_of, own_inputs
from pathconvert.conversion.rescale import rescale
from pathconvert.conversion.tracing.parts import trace_network
from pathconvert.conversion.tracing.trace import FloatVector, Slot

#: log₂ of the largest activation that a channel is scaled to.
TARGET = 5
#: log₂ of the largest weight allowed; float16 ends at 2^16.
WEIGHT_TOP = 12
#: The largest exponent, which is float32's own; in path space, channels of 2^±100 are common.
LARGEST_EXPONENT = 126
#: Rounds of the third step. Consecutive layers that are all too large need one each; in practice
#: one or two suffice.
ROUNDS = 20


def balanced(model: nn.Module, example_input: Any, calibration: Tensor | None = None) -> nn.Module:
    """Return a copy of ``model`` whose channels have even ranges, and the same function.

    The module's docstring says how.

    Args:
        model: usually a folded network in float32; not changed.
        example_input: a tensor, or a tuple of positional arguments.
        calibration: images to measure activations on, [N, C, H, W]; None for standard normal noise
            of ``example_input``'s shape.

    Raises:
        TraceError: the forward cannot be traced.
    """
    units = find_units(trace_network(model, example_input).trace)
    batch = as_arguments(example_input if calibration is None else calibration)
    if calibration is None:
        generator = torch.Generator().manual_seed(0)
        batch = tuple(
            torch.randn(x.shape, generator=generator) if isinstance(x, Tensor) else x for x in batch
        )
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
    """Leaf module with a weight → the largest |result| of each channel, [channels].

    It is the largest over all calls of the module.
    """
    largest: dict[str, Tensor] = {}
    layers = {
        name: module
        for name, module in leaves(model).items()
        if getattr(module, "weight", None) is not None
    }

    def note(name: str, result: Any) -> None:
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return
        channel = result.dim() - 1 if isinstance(layers[name], nn.Linear) else 1
        peak = result.abs().transpose(0, channel).flatten(1).amax(1).double()
        largest[name] = torch.maximum(peak, largest[name]) if name in largest else peak

    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    with torch.no_grad(), mode_of(model, training=False), watched(layers, after=note):
        model(*own_inputs(inputs, dtype))
    return largest


def _free(units: Units) -> NDArray[np.bool_]:
    """Which units can be scaled, [units].

    They are not pinned, and no BatchNorm reads them, whose variance could not carry every factor.
    """
    sizes = [group.size for group in units.groups]
    pinned = np.repeat([group.pinned_by is not None for group in units.groups], sizes)
    free = np.append(~pinned.astype(bool), False)
    for slot in units.slots:
        if slot.statistic is not None:
            free[slot.rows] = False
    return free[:-1]


def _log2_up(values: FloatVector) -> FloatVector:
    """⌈log₂ v⌉ for every value; 0 if v is 0 or not finite."""
    usable = np.isfinite(values) & (values > 0)
    rounded: FloatVector = np.where(usable, np.ceil(np.log2(np.where(usable, values, 1.0))), 0.0)
    return rounded


def _by_activations(units: Units, results: Mapping[str, Tensor]) -> FloatVector:
    """The exponents of the first step, [units]; NaN for units that are not pinned and always 0."""
    peaks = np.zeros(units.count + 1)  # the last entry takes FIXED = -1
    for slot in units.slots:
        module = slot.parameter.rpartition(".")[0]
        if slot.statistic is None and module in results and len(results[module]) == len(slot.rows):
            np.maximum.at(peaks, slot.rows, results[module].numpy())
    peaks = peaks[:-1]
    exponents = np.clip(TARGET - _log2_up(peaks), -LARGEST_EXPONENT, LARGEST_EXPONENT)
    chosen: FloatVector = np.where(_free(units), np.where(peaks > 0, exponents, np.nan), 0.0)
    return chosen


def _for_dead_units(model: nn.Module, units: Units, exponents: FloatVector) -> FloatVector:
    """The exponents of the second step, which replace the NaN of the first, [units]."""
    dead = np.isnan(exponents)
    exponents = np.where(dead, 0.0, exponents)
    if not dead.any():
        return exponents
    rows, columns = _weight_peaks(rescale(model, units.slots, np.exp2(exponents)), units)
    middle = np.where(
        (rows > 0) & (columns > 0), np.round((_log2_up(columns) - _log2_up(rows)) / 2), 0.0
    )
    balanced_exponents: FloatVector = np.where(
        dead, np.clip(middle, -LARGEST_EXPONENT, LARGEST_EXPONENT), exponents
    )
    return balanced_exponents


def _weight_peaks(model: nn.Module, units: Units) -> tuple[FloatVector, FloatVector]:
    """The largest weights of every unit.

    Returns:
        The largest |weight| that produces each unit, [units]; and the largest one that reads it,
        [units].
    """
    produced, read = np.zeros(units.count + 1), np.zeros(units.count + 1)
    tensors = dict(model.named_buffers()) | dict(model.named_parameters())
    for slot in units.slots:
        if slot.statistic is not None:
            continue
        rows, columns = _slot_peaks(tensors[slot.parameter], slot)
        np.maximum.at(produced, slot.rows, rows)
        if slot.columns is not None:
            np.maximum.at(read, slot.columns, columns)
    return produced[:-1], read[:-1]


def _slot_peaks(tensor: Tensor, slot: Slot) -> tuple[FloatVector, FloatVector]:
    """The largest weights of a slot.

    Returns:
        The largest |weight| of every row, [rows]; and of every column, [columns] (empty if it has
        none).
    """
    magnitude = tensor.detach().abs().double()
    if slot.columns is None:
        return magnitude.flatten().numpy(), np.zeros(0)
    blocks = magnitude.reshape(
        slot.groups, magnitude.shape[0] // slot.groups, magnitude.shape[1], -1
    ).amax(3)
    if slot.transposed:  # stored [in, out / groups, …]
        blocks = blocks.transpose(1, 2)
    return blocks.amax(2).flatten().numpy(), blocks.amax(1).flatten().numpy()
