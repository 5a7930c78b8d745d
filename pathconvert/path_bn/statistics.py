"""Mean μ' and variance var' of a layer's off-pivot sum: measured, or estimated from BatchNorms.

**With images**: all images go through the network once, in evaluation mode. Entering Path-BN form
does not change what a layer computes in evaluation mode, so all layers are measured together, in
float64, with batches weighted by their size. With the statistics of these images, training mode
computes on them what evaluation mode computes. In training mode the original network normalised the
full sum s by its mean m and variance v over the images. In evaluation mode it used running
statistics μ and σ², which may come from many more images or from another data set. To let training
mode begin as in the original network, the measured statistics are *referred* to the running ones
(this changes nothing if m = μ and v = σ²)::

    var' + eps ← (var' + eps) (σ² + eps) / (v + eps)      μ' ← μ' + μ − m

**Without images**: units are modelled as independent Gaussians after a ReLU, z_k = max(0, β_k +
|γ_k| n) with n ~ N(0, 1), where γ and β are those of the BatchNorms that make the unit::

    μ'   = E[full sum] − Σ w_jk E[z_k]
    var' = Var[full sum] − Σ w_jk² Var[z_k]

The sums go over the pivots of row j; the full sum's mean and variance are the running statistics of
the layer's own BatchNorm. For a layer without its own BatchNorm, they are Σ u E[z] and Σ u² Var[z]
over all units that it reads.

**Other images than in training** show at the first BatchNorm of the network, which no conversion
changes: :func:`compare_first` puts what it reads beside its running statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pathconvert.conversion.arithmetic import centre_tap, gain_of
from pathconvert.conversion.calls import Arguments, watched
from pathconvert.conversion.groups import Layer, Units
from pathconvert.conversion.modules import as_arguments, mode_of
from pathconvert.conversion.tracing.trace import FloatVector, IdVector
from pathconvert.errors import PathconvertError, first_line
from pathconvert.path_bn.form import index_tensor
from pathconvert.path_bn.layer import PathBN

#: Number of images of a calibration tensor that go through the network together.
CHUNK = 32
EXPECTED = (
    "Give images [N, …] or an iterable of batches; for a loader of (image, label) pairs, (x for x,"
    " _ in loader). On the command line, give a folder: --calibrate DIR."
)
#: The estimate of var' is at least this share of the full sum's variance, as units are not quite
#: independent.
LEAST_VARIANCE = 0.25

_RUNNING = ("running_mean", "running_var")

#: Mean and variance, float64 [out].
Statistics = tuple[Tensor, Tensor]


class Places(NamedTuple):
    """The places of a layer's pivots: units, rows and columns, [pivots] each."""

    units: IdVector
    rows: IdVector
    columns: IdVector


class _Moments:
    """Mean and variance of every channel over batches, float64 (Chan, Golub and LeVeque 1983)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self.squares = torch.zeros(())

    def add(self, batch: Tensor) -> None:
        """Take a batch [N, C, …] into account."""
        if not batch.numel():
            return
        dims = [d for d in range(batch.dim()) if d != 1]
        count = batch.numel() // batch.shape[1]
        var, mean = (t.cpu() for t in torch.var_mean(batch.double(), dims, correction=0))
        total = self.count + count
        delta = mean - self.mean
        self.squares = self.squares + var * count + delta**2 * self.count * count / total
        self.mean = self.mean + delta * count / total
        self.count = total

    @property
    def var(self) -> Tensor:
        return self.squares / self.count


class Measured(NamedTuple):
    """Statistics of a layer's off-pivot sum and of its output y over the calibration images."""

    off_pivot: Statistics
    output: Statistics


def measure(
    model: nn.Module, modules: Mapping[str, PathBN], calibration: Any
) -> tuple[dict[str, Measured], int]:
    """Measure the statistics of every layer over the calibration images.

    Args:
        model: a network in Path-BN form, with the evaluation outputs of the original.
        modules: its Path-BN layers, by name.
        calibration: images [N, …], or an iterable of batches, each a tensor or a tuple of the
            forward's arguments.

    Returns:
        The statistics of every layer, by name; and the number of images.

    Raises:
        PathconvertError: there are no images; they are not tensors that the network can run on; a
            layer does not run on them; or a sum is not finite.
    """
    moments = {name: (_Moments(), _Moments()) for name in modules}

    def note_sum(name: str, call: Arguments) -> None:
        moments[name][0].add(call[0][0])

    def note_output(name: str, result: Tensor) -> None:
        moments[name][1].add(result)

    count = 0
    tensor = next(model.parameters())
    with (
        mode_of(model, training=False),
        torch.no_grad(),
        watched({name: module.bn for name, module in modules.items()}, before=note_sum),
        watched(modules, after=note_output),
    ):
        for batch in _chunks(calibration):
            arguments = _arguments(batch, tensor)
            _run(model, arguments)
            count += len(arguments[0])
    if not count:
        raise PathconvertError("the calibration contains no images", "Give at least one batch.")
    for name, (off_pivot, _) in moments.items():
        if not off_pivot.count:
            raise PathconvertError(
                f"{name} does not run on the calibration images",
                "Give images on which it runs, or none.",
            )
        if not bool(torch.isfinite(off_pivot.var).all()):
            raise PathconvertError(
                f"the off-pivot sum of {name} is not finite on the calibration images"
            )
    return {
        name: Measured(*((one.mean, one.var) for one in both)) for name, both in moments.items()
    }, count


class FirstBatchNorm(NamedTuple):
    """What the first BatchNorm of a network reads on some images, beside its running statistics.

    Attributes:
        name: its path in the network.
        spread: variance of the images / running variance, of the channel that only one in ten
            exceed. Many channels look for fine structure, which enlarged images do not have, but
            some see the brightness of areas in all images.
        shift: |mean of the images − running mean| in running standard deviations, the median of the
            channels.
    """

    name: str
    spread: float
    shift: float


class _Reached(Exception):
    """The first BatchNorm was about to run."""


def compare_first(model: nn.Module, images: Iterable[Tensor]) -> FirstBatchNorm | None:
    """Compare images with those that a network was trained on, by its first BatchNorm that runs.

    Args:
        model: a network in any form; it runs in evaluation mode up to that BatchNorm.
        images: batches [N, C, …], prepared for the network.

    Returns:
        None if no BatchNorm runs, or if its running statistics were never updated.

    Raises:
        PathconvertError: the network cannot run on the images.
    """
    norms: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "running_var", None), Tensor)
    }
    moments = {name: _Moments() for name in norms}

    def note_input(name: str, call: Arguments) -> None:
        moments[name].add(call[0][0])
        raise _Reached

    tensor = next(model.parameters())
    with mode_of(model, training=False), torch.no_grad(), watched(norms, before=note_input):
        for batch in images:
            with suppress(_Reached):
                _run(model, _arguments(batch, tensor))
    first = next((name for name, one in moments.items() if one.count), None)
    if first is None:
        return None
    mean, var = (norms[first].get_buffer(name).double().cpu() for name in _RUNNING)
    if bool((mean == 0).all()) and bool((var == 1).all()):
        return None
    eps = norms[first].eps
    spread = ((moments[first].var + eps) / (var + eps)).quantile(0.9)
    shift = ((moments[first].mean - mean).abs() / (var + eps).sqrt()).median()
    return FirstBatchNorm(first, float(spread), float(shift))


def refer_to_running(measured: Measured, bn: nn.modules.batchnorm._BatchNorm) -> Statistics:
    """The off-pivot sum's statistics, referred to the running statistics.

    The module's docstring gives the formula.

    Args:
        measured: statistics of a layer; with the full sum s, y = γ (s − μ) / √(σ² + eps) + β.
        bn: the BatchNorm that follows it in path form.
    """
    tensors: list[Any] = [bn.running_var, bn.weight, bn.bias]
    running_var, gamma, beta = (t.detach().double().cpu() for t in tensors)
    (mean, var), (output_mean, output_var) = measured
    gain = gain_of(gamma, running_var, bn.eps)
    kept = gain == 0  # y does not depend on the sum
    gain = gain.masked_fill(kept, 1.0)
    ratio = (running_var + bn.eps) / (output_var / gain**2 + bn.eps)
    referred = ((var + bn.eps) * ratio - bn.eps).clamp(min=0.0)
    return (
        torch.where(kept, mean, mean - (output_mean - beta) / gain),
        torch.where(kept, var, referred),
    )


def _chunks(calibration: Any) -> Iterator[Any]:
    """The batches of a calibration tensor or iterable."""
    if isinstance(calibration, Tensor):
        yield from calibration.split(CHUNK)
    elif isinstance(calibration, Iterable) and not isinstance(calibration, str | bytes | Mapping):
        yield from calibration
    else:
        raise PathconvertError(
            f"the calibration is a {type(calibration).__name__}, not images", EXPECTED
        )


def _arguments(batch: Any, tensor: Tensor) -> tuple[Any, ...]:
    """A batch as the forward's arguments, on the device of ``tensor`` and in its dtype."""
    arguments = tuple(_like(argument, tensor) for argument in as_arguments(batch))
    if not arguments or not isinstance(arguments[0], Tensor) or not arguments[0].dim():
        raise PathconvertError(
            f"a calibration batch is a {type(batch).__name__}, not images", EXPECTED
        )
    return arguments


def _run(model: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Run the network; turn its errors into one that names the size of the batch."""
    try:
        model(*arguments)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        size = "×".join(map(str, arguments[0].shape))
        raise PathconvertError(
            f"the network cannot run on a calibration batch of {size}: {first_line(error)}",
            EXPECTED,
        ) from error


def _like(value: Any, tensor: Tensor) -> Any:
    """A tensor on the device of ``tensor``, and in its dtype if it is floating-point.

    Other values as they are.
    """
    if not isinstance(value, Tensor):
        return value
    kind = tensor.dtype if value.is_floating_point() else value.dtype
    return value.to(tensor.device, kind, copy=True)  # a forward may change its inputs in place


def estimate_sum(
    layer: Layer,
    bn: str | None,
    pivots: Places,
    tensors: Mapping[str, Tensor],
    moments: tuple[FloatVector, FloatVector],
) -> Statistics:
    """The Gaussian estimate for one layer (see the module's docstring).

    NaN where a unit's moments are not known.

    Args:
        layer: a layer in path form.
        bn: path of the BatchNorm that follows it; None if there is none.
        pivots: the layer's pivots.
        tensors: parameters and buffers of the network in path form, by name.
        moments: E[z] and Var[z], :func:`unit_moments`.
    """
    weight = tensors[layer.parameter].double()
    if bn is None:
        return _sum_of_inputs(layer, pivots, weight, *moments)
    bias = tensors.get(f"{layer.parameter.removesuffix('weight')}bias", torch.zeros(())).double()
    full = tensors[f"{bn}.running_mean"].double() - bias, tensors[f"{bn}.running_var"].double()
    return _full_sum_less_pivots(pivots, weight, full, *moments)


def unit_moments(units: Units, tensors: Mapping[str, Tensor]) -> tuple[FloatVector, FloatVector]:
    """Mean and variance of every unit after its ReLU.

    Returns:
        E[z] and Var[z], [units] each; NaN for a unit that is not made by BatchNorms only.
    """
    mean, var = np.zeros(units.count), np.zeros(units.count)
    known = np.zeros(units.count, dtype=bool)
    rows_of = {slot.parameter: slot for slot in units.slots}
    for slot in units.slots:
        if slot.columns is not None:
            mean[slot.rows[slot.rows >= 0]] = np.nan
    for call in units.batch_norms:
        made = rows_of.get(call.weight or "")
        if made is None:
            continue
        gamma, beta = tensors[made.parameter].double().numpy(), tensors.get(f"{call.name}.bias")
        there = made.rows >= 0
        known[made.rows[there]] = True
        np.add.at(var, made.rows[there], gamma[there] ** 2)
        if beta is not None:
            np.add.at(mean, made.rows[there], beta.double().numpy()[there])
    mean[~known] = np.nan
    deviation = np.sqrt(var)
    t = torch.from_numpy(np.divide(mean, deviation, out=np.zeros_like(mean), where=deviation > 0))
    density = torch.exp(-(t**2) / 2) / math.sqrt(2 * math.pi)
    below = torch.special.ndtr(t)
    first = (torch.from_numpy(mean) * below + torch.from_numpy(deviation) * density).numpy()
    second = (
        (torch.from_numpy(mean**2 + var)) * below + torch.from_numpy(mean * deviation) * density
    ).numpy()
    return first, np.maximum(second - first**2, 0.0)


def _full_sum_less_pivots(
    pivots: Places, weight: Tensor, full: Statistics, mean_z: FloatVector, var_z: FloatVector
) -> Statistics:
    """The statistics ``full`` of the full sum without the contributions of the pivots."""
    rows = index_tensor(pivots.rows)
    taps = centre_tap(weight)[rows, index_tensor(pivots.columns) % weight.shape[1]]
    mean = full[0].index_add(0, rows, -taps * torch.from_numpy(mean_z[pivots.units]))
    var = full[1].index_add(0, rows, -(taps**2) * torch.from_numpy(var_z[pivots.units]))
    return mean, torch.maximum(var, LEAST_VARIANCE * full[1])


def _sum_of_inputs(
    layer: Layer, pivots: Places, weight: Tensor, mean_z: FloatVector, var_z: FloatVector
) -> Statistics:
    """Σ u E[z] and Σ u² Var[z] over all inputs of a layer.

    Here u is ``weight`` with zeros at the pivots.
    """
    centre = tuple(size // 2 for size in weight.shape[2:])
    rows, columns = index_tensor(pivots.rows), index_tensor(pivots.columns) % weight.shape[1]
    weight = weight.index_put((rows, columns, *map(torch.tensor, centre)), torch.zeros(()).double())
    first, second = (
        weight.flatten(2).sum(2) if centre else weight,
        (weight**2).flatten(2).sum(2) if centre else weight**2,
    )
    moments = [torch.from_numpy(np.append(m, np.nan)[layer.columns]) for m in (mean_z, var_z)]
    groups = layer.groups
    out, into = weight.shape[0] // groups, weight.shape[1]

    def product(taps: Tensor, moment: Tensor) -> Tensor:
        return (taps.view(groups, out, into) @ moment.view(groups, into, 1)).flatten()

    return product(first, moments[0]), product(second, moments[1])
