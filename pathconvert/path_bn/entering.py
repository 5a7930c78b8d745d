"""Entering Path-BN form from a network in path form: its layers, their statistics, and the record.

Every layer that holds pivots takes the form, except for the last of the network
(``candidates.py``). The statistics of a layer's off-pivot sum come from ``statistics.py``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from pathconvert.conversion.arithmetic import affine_map, centre_tap
from pathconvert.conversion.bisection import working
from pathconvert.conversion.equivalence import forward_outputs, run_dtype
from pathconvert.conversion.frozen import is_frozen
from pathconvert.conversion.modules import copied, named_tensors, unwrapped
from pathconvert.conversion.path_bn_record import PathBnRecord
from pathconvert.conversion.record import attach_record, form_of, record_of
from pathconvert.conversion.reparameterize import Conversion, make_record, reparameterize, resume
from pathconvert.errors import EquivalenceError, PathconvertError
from pathconvert.path_bn.candidates import Candidate, choose_candidates
from pathconvert.path_bn.form import index_tensor, replace_layer
from pathconvert.path_bn.layer import PathBN
from pathconvert.path_bn.skip_scale import pivot_rounding, with_skip_scale
from pathconvert.path_bn.statistics import (
    Measured,
    Places,
    Statistics,
    estimate_sum,
    measure,
    refer_to_running,
    unit_moments,
)

#: The function that training mode computes at first (:func:`to_path_bn`).
Beginning = Literal["training", "evaluation"]


@dataclass(frozen=True)
class _Entered:
    """A layer in Path-BN form that has no statistics yet.

    Attributes:
        candidate: the layer in path form.
        module: its replacement in the network.
        gain, shift: a and b of the layer with its BatchNorm in path form, y = a · (w z) + b,
            float64 [out].
    """

    candidate: Candidate
    module: PathBN
    gain: Tensor
    shift: Tensor


def to_path_bn(
    conversion_or_model: Conversion | nn.Module,
    example_input: Any,
    calibration: Tensor | Iterable[Any] | None = None,
    skip_scale: float = 1.0,
    *,
    begin: Beginning = "training",
) -> nn.Module:
    """A copy in Path-BN form (PBN eq. 8-10), the same function in evaluation mode.

    A frozen BatchNorm (torchvision's ``FrozenBatchNorm2d``, timm's
    ``FrozenBatchNormAct2d``) stays frozen: its constants are no
    parameters in Path-BN form either, so that training mode computes what evaluation mode does. To
    train with the statistics of batches, make it a BatchNorm of torch first.

    Args:
        conversion_or_model: a conversion; or a network, which is converted first (scope block,
            pivot matching) unless it is in path form.
        example_input: a tensor, or a tuple of the forward's positional arguments; the network runs
            on it once.
        calibration: images [N, …], or an iterable of batches; None estimates the statistics from
            BatchNorms.
        skip_scale: λ. If it is not 1, units are first rescaled so that pivots become ±λ; λ never
            changes the function.
        begin: what training mode computes on the calibration images at first, if the running
            statistics come from other images. ``training``: what the network computed in training
            mode. ``evaluation``: what it computes in evaluation mode, which is the better beginning
            on a new data set (``benchmarks/``).

    Returns:
        The network, with layers replaced by :class:`~pathconvert.path_bn.layer.PathBN`.
        ``path_record["path_bn"]`` says which layers these are, why others were left, and where the
        statistics come from.

    Raises:
        PathconvertError: no layer can take Path-BN form; the network is in this form already; λ or
            ``begin`` is not valid; the network has no BatchNorm to estimate statistics from; or it
            cannot be measured on the calibration images.
        EquivalenceError: the result is not the same function. This is a safeguard.
    """
    if begin not in get_args(Beginning):
        raise PathconvertError(
            f"begin is {begin!r}", f"Choose one of {', '.join(get_args(Beginning))}."
        )
    conversion = with_skip_scale(_conversion_of(conversion_or_model, example_input), skip_scale)
    chosen, left = choose_candidates(conversion, example_input)
    statistics: dict[str, Statistics] = {}
    if calibration is None:
        statistics = _estimates(conversion, chosen)
        if chosen and not statistics:
            raise PathconvertError(
                f"{type(conversion.model).__name__} has no BatchNorm to estimate Path-BN's"
                " statistics from",
                "Give calibration images: --calibrate DIR, or calibration=images.",
            )
        unknown = (
            "its statistics cannot be estimated from the BatchNorms before it; calibrate with"
            " images"
        )
        left |= {c.name: unknown for c in chosen if c.name not in statistics}
        chosen = [c for c in chosen if c.name in statistics]
    chosen, asked = _not_asked_for(conversion, chosen, example_input, skip_scale)
    left |= asked
    if not chosen:
        raise _no_layer(conversion, left)

    model = copied(conversion.model)
    entered = [_enter(model, c, conversion, skip_scale) for c in chosen]
    source: dict[str, Any] = {"source": "gaussian"}
    if calibration is not None:
        statistics, count = _measured(model, conversion.model, entered, calibration, begin)
        source = {"source": "images", "images": count}
    for one in entered:
        _set_statistics(one, *statistics[one.candidate.name], normalise=one.candidate.bn is None)
    layers = tuple(candidate.recorded() for candidate in chosen)
    path_bn = PathBnRecord(skip_scale, layers, left, source)
    record = dataclasses.replace(make_record(conversion), form="path-bn", path_bn=path_bn)
    attach_record(model, record)
    _require_same(conversion.model, model, example_input)
    return model


def _conversion_of(conversion_or_model: Conversion | nn.Module, example_input: Any) -> Conversion:
    """A conversion as it is; a network in path form is taken up; any other is converted first."""
    if isinstance(conversion_or_model, Conversion):
        return conversion_or_model
    model = unwrapped(conversion_or_model)
    if form_of(model) == "path-bn":
        raise PathconvertError(
            "the network is in Path-BN form already", "Call leave_path_bn(model) first."
        )
    if form_of(model) == "path":
        return resume(model, example_input, record_of(model))
    return reparameterize(model, example_input)


def _no_layer(conversion: Conversion, left: Mapping[str, str]) -> PathconvertError:
    """The error for a network without any layer that can take Path-BN form.

    ``left`` says why, for every layer.
    """
    reasons = (
        "; ".join(f"{name}: {why}" for name, why in list(left.items())[:3]) or "none holds a pivot"
    )
    tip = (
        "Convert the checkpoint to float32 first."
        if any("held back" in why for why in left.values())
        else ""
    )
    return PathconvertError(
        f"no layer of {type(conversion.model).__name__} can take Path-BN: {reasons}", tip
    )


def _measured(
    model: nn.Module, before: nn.Module, entered: list[_Entered], calibration: Any, begin: Beginning
) -> tuple[dict[str, Statistics], int]:
    """Measure the statistics on calibration images.

    Args:
        model: the network whose layers ``entered`` Path-BN form.
        before: the network in path form.
        calibration, begin: as for :func:`to_path_bn`.

    Returns:
        μ' and var' of every layer, by name; and the number of images.
    """
    # any statistics give the outputs of evaluation mode; these are numerically harmless
    for one in entered:
        _set_statistics(
            one, torch.zeros_like(one.shift), torch.ones_like(one.shift), normalise=False
        )
    measured, count = measure(
        model, {one.candidate.name: one.module for one in entered}, calibration
    )
    candidates = [one.candidate for one in entered]
    return {c.name: _of_images(before, c, measured[c.name], begin) for c in candidates}, count


def _not_asked_for(
    conversion: Conversion, chosen: list[Candidate], example_input: Any, skip_scale: float
) -> tuple[list[Candidate], dict[str, str]]:
    """The candidates that the forward only calls.

    A forward may also ask a layer or its BatchNorm for its class or for an attribute, and do
    something else, or fail, if that is another one. This is tried with layers in Path-BN form that
    still compute what the original layer and BatchNorm do.

    Returns:
        These candidates; and for each other one, by name, why it is left.
    """
    expected = forward_outputs(conversion.model, example_input, dtype=torch.float64)
    if not all(bool(output.isfinite().all()) for output in expected):
        return chosen, {}  # nothing can be compared

    def works(candidates: list[Candidate]) -> bool:
        model = copied(conversion.model).double()
        for candidate in candidates:
            layer = model.get_submodule(candidate.name)
            module: Any = _enter(model, candidate, conversion, skip_scale).module
            parts = [layer] if candidate.bn is None else [layer, module.bn]
            module.forward = nn.Sequential(*parts).forward
        try:
            found = forward_outputs(model, example_input, dtype=torch.float64)
        except Exception:  # a forward may raise anything
            return False
        return _difference(expected, found, run_dtype(conversion.model)) is None

    kept = working(works, chosen)
    why = "is asked by the forward for what a layer in Path-BN form does not have"
    return kept, {c.name: why for c in chosen if c not in kept}


def _require_same(before: nn.Module, after: nn.Module, example_input: Any) -> None:
    """Compare both networks on the example in float64, as a safeguard.

    The limit allows for rounded weights and statistics.
    """
    old, new = (
        forward_outputs(model, example_input, dtype=torch.float64) for model in (before, after)
    )
    difference = _difference(old, new, run_dtype(before))
    if difference is not None:
        raise EquivalenceError(
            f"Path-BN form changed the network's output by {difference:.2e}",
            "This should never happen; please report it.",
        )


def _difference(before: list[Tensor], after: list[Tensor], dtype: torch.dtype) -> float | None:
    """By how much an output changed; None if none changed by more than rounding in ``dtype``."""
    tolerance = min(2.0**16 * torch.finfo(dtype).eps, 0.25)
    if [a.shape for a in before] != [b.shape for b in after]:
        return math.inf
    for a, b in zip(before, after, strict=True):
        difference = float((a - b).abs().max()) if a.numel() else 0.0
        if not difference <= tolerance * float(a.abs().max() if a.numel() else 0.0):
            return difference
    return None


def _enter(
    model: nn.Module, candidate: Candidate, conversion: Conversion, skip_scale: float
) -> _Entered:
    """Put a layer into Path-BN form; its BatchNorm still has the old parameters and statistics."""
    layer: Any = model.get_submodule(candidate.name)
    gain, shift = _affine(model, candidate)
    rows, columns = index_tensor(candidate.rows), index_tensor(candidate.columns)
    weight = centre_tap(layer.weight.detach().double().cpu())
    values = gain[rows] * weight[rows, columns % weight.shape[1]] / skip_scale
    if conversion.gauge == "unit":  # ±1 or another power of two, without the weights' rounding
        power = torch.exp2(values.abs().log2().round())
        is_power = (values.abs() / power - 1).abs() <= pivot_rounding(model)
        values = torch.where(is_power, values.sign() * power, values)
    device = layer.weight.device
    places = rows.to(device), columns.to(device), values.to(device)
    module = replace_layer(model, candidate.recorded(), *places, skip_scale)
    return _Entered(candidate, module, gain, shift)


def _affine(model: nn.Module, candidate: Candidate) -> tuple[Tensor, Tensor]:
    """The affine map of a layer with its BatchNorm, y = a · (w z) + b.

    Returns:
        a and b, float64 [out] each, on the CPU.
    """
    layer: Any = model.get_submodule(candidate.name)
    bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach()
    bias = bias.double()
    if candidate.bn is None:
        return torch.ones_like(bias).cpu(), bias.cpu()
    bn: Any = model.get_submodule(candidate.bn)
    affine = affine_map(bn, bias.to(bn.running_mean.device))
    return affine.gain.cpu(), affine.shift.cpu()


def _of_images(
    before: nn.Module, candidate: Candidate, measured: Measured, begin: Beginning
) -> Statistics:
    """μ' and var' of a layer from what was measured on calibration images."""
    bn = None if candidate.bn is None else before.get_submodule(candidate.bn)
    if isinstance(bn, nn.modules.batchnorm._BatchNorm):
        return refer_to_running(measured, bn) if begin == "training" else measured.off_pivot
    return measured.off_pivot if bn is None else _constants(before, candidate)


def _constants(before: nn.Module, candidate: Candidate) -> Statistics:
    """μ' and var' of a layer whose BatchNorm is frozen.

    With its own mean and variance all of its constants stay as they are, except that the mean takes
    in the layer's bias.
    """
    assert candidate.bn is not None
    layer: Any = before.get_submodule(candidate.name)
    bn: Any = before.get_submodule(candidate.bn)
    mean, var = bn.running_mean.double().cpu(), bn.running_var.double().cpu()
    return mean if layer.bias is None else mean - layer.bias.detach().double().cpu(), var


@torch.no_grad()
def _set_statistics(entered: _Entered, mean: Tensor, var: Tensor, *, normalise: bool) -> None:
    """Set μ' and var', and with them γ' = a √(var' + eps) and β' = b + a μ'.

    Args:
        entered: its module is changed.
        mean, var: of its off-pivot sum, float64 [out].
        normalise: whether to scale all rows of u by powers of two so that var' is near 1 (in path
            space, the rows of a network without BatchNorm have any size, and eps should be small
            compared to var'). Otherwise only those rows are scaled whose var' does not fit the
            dtype.
    """
    module, gain, bn = entered.module, entered.gain, cast(Any, entered.module.bn)
    info = torch.finfo(bn.running_var.dtype)
    rows_to_scale = (
        (var > info.max / 4) | (var < info.tiny)
        if not normalise
        else torch.ones_like(var, dtype=torch.bool)
    )
    rows_to_scale &= var > 0
    if bool(rows_to_scale.any()):
        power = torch.where(rows_to_scale, var, 1.0).sqrt().log2().round().neg()
        limit = math.log2(torch.finfo(module.weight.dtype).max) / 2
        factor = torch.exp2(power.clamp(-limit, limit))
        rows = factor.to(module.weight.device).view(-1, *[1] * (module.weight.dim() - 1))
        module.weight.copy_(module.weight.double() * rows)
        mean, var, gain = mean * factor, var * factor**2, gain / factor
    bn.running_mean.copy_(mean)
    bn.running_var.copy_(var)
    mean, var = bn.running_mean.double().cpu(), bn.running_var.double().cpu()  # as they are stored
    bn.weight.copy_(gain * (var + bn.eps).sqrt())
    bn.bias.copy_(entered.shift + gain * mean)


def _estimates(
    conversion: Conversion, candidates: list[Candidate]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The Gaussian estimates (``statistics.py``) by layer.

    They are for the layers whose units are made by BatchNorms. Frozen BatchNorms need none.
    """
    tensors = named_tensors(conversion.model)
    moments = unit_moments(conversion.units, tensors)
    found = {}
    for c in candidates:
        if c.bn is not None and is_frozen(conversion.model.get_submodule(c.bn)):
            found[c.name] = _constants(conversion.model, c)
            continue
        estimate = estimate_sum(c.layer, c.bn, Places(c.units, c.rows, c.columns), tensors, moments)
        if all(bool(torch.isfinite(values).all()) for values in estimate):
            found[c.name] = estimate
    return found
