"""Entering Path-BN form from a network in path form: which layers, their statistics, the record.

Every layer that holds pivots takes the form, but for the last of the network; ``calibration.py`` gives the statistics
of its off-pivot sum.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pathconvert.conversion.equivalence import forward_outputs, run_dtype
from pathconvert.conversion.groups import Layer
from pathconvert.conversion.parts import observe
from pathconvert.conversion.record import attach_record, encode_runs, form_of, unwrapped
from pathconvert.conversion.reparameterize import Conversion, reparameterize
from pathconvert.conversion.rescale import rescale
from pathconvert.conversion.scales import Gauge, choose_scales
from pathconvert.conversion.trace import IdVector, as_arguments
from pathconvert.errors import EquivalenceError, PathconvertError
from pathconvert.path_bn.form import FORMAT_VERSION, pivots_of, replace_layer
from pathconvert.path_bn.layer import BATCH_NORM_OF, PathBN, kind_of
from pathconvert.path_bn.statistics import (
    Measured,
    Places,
    Statistics,
    estimate_sum,
    measure,
    refer_to_running,
    unit_moments,
)

#: Which of the network's functions training mode begins with (:func:`to_path_bn`).
Beginning = Literal["training", "evaluation"]
LAST = "is the last layer: no normalization comes before an output"
NO_PIVOT = "holds no pivot: it begins a chain, or what it reads has its pivots elsewhere"


@dataclass(frozen=True)
class _Candidate:
    """A layer that takes Path-BN.

    Attributes:
        layer: its places in the network's units.
        name: the module's path.
        bn: path of the BatchNorm that alone follows it; None without.
        units, rows, columns: of its pivots, [pivots].
    """

    layer: Layer
    name: str
    bn: str | None
    units: IdVector
    rows: IdVector
    columns: IdVector

    def entry(self) -> dict[str, Any]:
        """Its part of the record."""
        readers = [
            {"bn": bn, "rows": encode_runs(rows), "channels": encode_runs(channels)}
            for bn, rows, channels in (self.layer.readers if self.bn is None else ())
        ]
        return {"name": self.name, "bn": self.bn, "pivots": len(self.units), "readers": readers}


@dataclass(frozen=True)
class _Entered:
    """A layer in Path-BN form whose statistics are to come; y = a · (w z) + b before, a and b float64 [out]."""

    candidate: _Candidate
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

    Args:
        conversion_or_model: a conversion, or a network, which is converted first (scope block, pivot matching).
        example_input: a tensor, or a tuple of the forward's positional arguments; the network runs on it once.
        calibration: images [N, …], or an iterable of batches; None estimates the statistics from BatchNorms.
        skip_scale: λ. Other than 1, units are rescaled first so that pivots become ±λ: λ never changes the function.
        begin: what training mode computes on the calibration images at first, where the running statistics of the
            network are those of others: ``training``, what it computed in training mode; ``evaluation``, what it
            computes in evaluation mode, which is the better beginning on a new data set (``benchmarks/``).

    Returns:
        The network, its layers replaced by :class:`~pathconvert.path_bn.layer.PathBN`; ``path_record["path_bn"]`` says
        which, what was left and why, and where the statistics come from.

    Raises:
        PathconvertError: no layer can take it; the network has no BatchNorm to estimate statistics from; or
            calibration images give none.
        EquivalenceError: the result is not the same function (a guard).
    """
    if begin not in get_args(Beginning):
        raise PathconvertError(f"begin is {begin!r}", f"Choose one of {', '.join(get_args(Beginning))}.")
    if isinstance(conversion_or_model, nn.Module):
        conversion_or_model = unwrapped(conversion_or_model)
    if isinstance(conversion_or_model, nn.Module) and form_of(conversion_or_model) == "path-bn":
        raise PathconvertError("the network is in Path-BN form already", "leave_path_bn(model) takes it back.")
    conversion = (
        conversion_or_model
        if isinstance(conversion_or_model, Conversion)
        else reparameterize(conversion_or_model, example_input)
    )
    conversion = with_skip_scale(conversion, skip_scale)
    chosen, left = _choose(conversion, example_input)
    statistics: dict[str, Statistics] = {}
    if calibration is None:
        statistics = _estimates(conversion, chosen)
        left |= {
            c.name: "no BatchNorm before it tells its statistics; calibrate with images"
            for c in chosen
            if c.name not in statistics
        }
        if chosen and not statistics:
            raise PathconvertError(
                f"{type(conversion.model).__name__} has no BatchNorm to estimate Path-BN's statistics from",
                "Give calibration images: --calibrate DIR, or calibration=images.",
            )
        chosen = [c for c in chosen if c.name in statistics]
    if not chosen:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:3]) or "none holds a pivot"
        tip = "Convert the checkpoint to float32 first." if any("held back" in why for why in left.values()) else ""
        raise PathconvertError(f"no layer of {type(conversion.model).__name__} can take Path-BN: {reasons}", tip)
    model = copy.deepcopy(conversion.model)
    entered = [_enter(model, c, conversion, skip_scale) for c in chosen]
    source: dict[str, Any] = {"source": "gaussian"}
    if calibration is not None:
        for one in entered:
            _set_statistics(one, torch.zeros_like(one.shift), torch.ones_like(one.shift), normalise=False)
        measured, count = measure(model, {one.candidate.name: one.module for one in entered}, calibration)
        statistics = {c.name: _of_images(conversion.model, c, measured[c.name], begin) for c in chosen}
        source = {"source": "images", "images": count}
    for one in entered:
        _set_statistics(one, *statistics[one.candidate.name], normalise=one.candidate.bn is None)
    path_bn = {
        "format_version": FORMAT_VERSION,
        "skip_scale": skip_scale,
        "layers": [c.entry() for c in chosen],
        "left": left,
        "calibration": source,
    }
    attach_record(model, conversion.record | {"form": "path-bn", "path_bn": path_bn})
    _require_same(conversion.model, model, example_input)
    return model


def _require_same(before: nn.Module, after: nn.Module, example_input: Any) -> None:
    """A guard: both networks on the example, in float64; weights and statistics were rounded to their dtype."""
    tolerance = min(2.0**16 * torch.finfo(run_dtype(before)).eps, 0.25)
    pairs = zip(*(forward_outputs(model, example_input, dtype=torch.float64) for model in (before, after)), strict=True)
    for a, b in pairs:
        difference = float((a - b).abs().max()) if a.numel() else 0.0
        if not difference <= tolerance * float(a.abs().max()):
            raise EquivalenceError(
                f"Path-BN form changed the network's output by {difference:.2e}", "Report it: it never should."
            )


# ---- pivots of ±λ --------------------------------------------------------------------------------------------------


def with_skip_scale(conversion: Conversion, skip_scale: float) -> Conversion:
    """The conversion with its pivots at ±λ in place of ±1; itself where they are there already.

    Raises:
        PathconvertError: λ is not positive.
    """
    if not (math.isfinite(skip_scale) and skip_scale > 0):
        raise PathconvertError(
            f"skip_scale is {skip_scale}, and has to be positive", "1 is the papers', 0.1 in ResNets."
        )
    units, scales = conversion.units, conversion.scales
    pivots, held = conversion.pivots, conversion.held_back()
    with_pivot = (pivots.layer >= 0) & ~held & ~conversion.circular()
    now = pivots.value * np.append(scales, 1.0)[pivots.next_unit] / scales
    off = np.abs(np.log2(np.abs(now[with_pivot]) / skip_scale))
    if off.max(initial=0.0) <= (0.5 if conversion.gauge == "pow2" else 0.0) + _rounding(conversion.model):
        return conversion
    start = dataclasses.replace(
        pivots, value=np.where(with_pivot, now, 0.0), layer=np.where(with_pivot, pivots.layer, -1)
    )
    tensors = _tensors(conversion.model)
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
    attach_record(rescaled.model, rescaled.record)
    return rescaled


def _rounding(model: nn.Module) -> float:
    """How far from ±1 the rounding of weights, γ and statistics may leave a pivot."""
    return 8 * float(torch.finfo(run_dtype(model)).eps)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in (*model.named_buffers(), *model.named_parameters())}


# ---- which layers --------------------------------------------------------------------------------------------------


def _choose(conversion: Conversion, example_input: Any) -> tuple[list[_Candidate], dict[str, str]]:
    """The layers that take Path-BN, and of all others why not."""
    model, units, pivots = conversion.model, conversion.units, conversion.pivots
    usable = (pivots.layer >= 0) & ~conversion.held_back() & ~conversion.circular()
    chosen, left = [], {}
    calls, uses = observe(model, as_arguments(example_input), run_dtype(model))
    last = _last_layers(conversion, calls)
    for index, layer in enumerate(units.layers):
        mine = np.flatnonzero(usable & (pivots.layer == index))
        name, _, leaf = layer.parameter.rpartition(".")
        obstacle = (
            _obstacle(model, layer, name, leaf, calls.get(name, []), uses)
            if mine.size
            else _without_pivot(conversion, index)
        )
        why = LAST if index in last else obstacle
        if why:
            left[name or layer.parameter] = why
        else:
            chosen.append(_Candidate(layer, name, layer.follower, mine, pivots.row[mine], pivots.column[mine]))
    without_bias = [c for c in chosen if c.bn is None and model.get_submodule(c.name).bias is None]
    lost = _no_way_for_a_bias(model, without_bias, example_input)
    return [c for c in chosen if c.name not in lost], left | lost


def _without_pivot(conversion: Conversion, index: int) -> str:
    """Why a layer holds no pivot."""
    pivots, units = conversion.pivots, conversion.units
    mine = pivots.layer == index
    if (mine & conversion.held_back()).any():
        return f"its pivots are held back: their factors leave the range of {_dtype_name(conversion.model)}"
    if (mine & conversion.circular()).any():
        return "its pivots would run in a circle"
    columns = units.layers[index].columns
    pinned = np.repeat([group.pinned_by or "" for group in conversion.groups], [g.size for g in conversion.groups])
    reasons = set(np.append(pinned, "")[columns].tolist())
    if len(reasons) == 1 and "" not in reasons:
        return f"holds no pivot, as what it reads {reasons.pop()}"
    return NO_PIVOT


def _dtype_name(model: nn.Module) -> str:
    return str(run_dtype(model)).removeprefix("torch.")


def _last_layers(conversion: Conversion, calls: Mapping[str, Any]) -> set[int]:
    """Layers that make the network's outputs: those whose rows are outputs, and, where an activation comes after it
    (softmax), the last layer that runs, if no other reads it."""
    units = conversion.units
    reasons = np.append(
        np.repeat([g.pinned_by or "" for g in conversion.groups], [g.size for g in conversion.groups]), ""
    )
    is_output = np.array([why.startswith(("is a network output", "is an output of")) for why in reasons], dtype=bool)
    found = {index for index, layer in enumerate(units.layers) if is_output[layer.rows].any()}
    running = [i for i, layer in enumerate(units.layers) if layer.parameter.rpartition(".")[0] in calls]
    if running:
        rows = units.layers[running[-1]].next_units
        read = np.concatenate([layer.columns for layer in units.layers])
        if (rows >= 0).all() and not np.isin(rows, read).any():
            found.add(running[-1])
    return found


def _obstacle(
    model: nn.Module, layer: Layer, name: str, leaf: str, calls: list[Any], uses: Mapping[str, set[tuple[str, ...]]]
) -> str | None:
    """Why a layer can't take Path-BN; None if it can. ``calls`` and ``uses`` are what ``observe`` saw."""
    module = model.get_submodule(name)
    kind = kind_of(module)
    if layer.transposed:
        return "is a transposed convolution, whose skip would be spread over the output"
    if kind is None or leaf != "weight":
        return f"is computed by {type(module).__name__}, not by a convolution or linear layer of torch"
    if parametrize.is_parametrized(module) or module._forward_hooks or module._forward_pre_hooks:
        return "has hooks or parametrizations"
    if sum(parameter is module.weight for owner in model.modules() for parameter in owner._parameters.values()) > 1:
        return "shares its weight with another layer"
    stacks = uses.get(layer.parameter, set())
    if any(not stack or stack[-1] != name for stack in stacks):
        return "has a weight that other code reads too"
    if not calls:
        return "runs in training mode alone (an auxiliary head)"
    rank = {nn.Linear: 2, nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}[kind]
    ranks = {(args[0] if args else kwargs["input"]).dim() for args, kwargs in calls}
    if ranks != {rank}:
        return f"reads {min(ranks)} dimensions, and BatchNorm wants {rank}"
    return _batch_norm_obstacle(model, layer, kind)


def _batch_norm_obstacle(model: nn.Module, layer: Layer, kind: type[nn.Module]) -> str | None:
    if layer.follower is None:
        return None
    bn: Any = model.get_submodule(layer.follower)
    if type(bn).forward not in (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward):
        return f"is followed by {layer.follower} ({type(bn).__name__}), which is no BatchNorm of torch's own"
    if not isinstance(bn, BATCH_NORM_OF[kind] | nn.SyncBatchNorm):
        return f"is followed by {layer.follower} ({type(bn).__name__}), which is made for other dimensions"
    if bn.weight is None or bn.running_mean is None or bn._forward_hooks or bn._forward_pre_hooks:
        return f"is followed by {layer.follower}, which has no γ, no running statistics, or hooks"
    return None


def _no_way_for_a_bias(model: nn.Module, candidates: list[_Candidate], example_input: Any) -> dict[str, str]:
    """Layers without BatchNorm and bias whose bias could not move into the means of BatchNorms that read them.

    Leaving Path-BN leaves a bias. It is shown to move, in float64: each candidate gets a large one, of either sign, its
    readers' means take it up, and what every one of these BatchNorms makes has to stay.
    """
    none = "has neither BatchNorm nor bias, and no BatchNorm after it takes up the bias that Path-BN leaves"
    lost = {c.name: none for c in candidates if _rows_read(c) < len(c.layer.rows)}
    remaining = [c for c in candidates if c.name not in lost]
    if not remaining:
        return lost
    readers = sorted({bn for c in remaining for bn, _, _ in c.layer.readers})
    plain = copy.deepcopy(model).double()
    for name in readers:
        bn: Any = plain.get_submodule(name)
        nn.init.ones_(bn.weight)
    before = _results(plain, [*readers, *(c.name for c in remaining)], example_input)
    if not _biases_move(plain, remaining, before, readers, example_input):
        lost |= {c.name: none for c in remaining if not _biases_move(plain, [c], before, readers, example_input)}
    return lost


def _biases_move(
    plain: nn.Module, candidates: list[_Candidate], before: dict[str, list[Tensor]], readers: list[str], example: Any
) -> bool:
    """Whether the readers' results stay when the candidates get a bias and the readers' means take it up."""
    biased = copy.deepcopy(plain)
    generator = torch.Generator().manual_seed(0)
    for c in candidates:
        layer: Any = biased.get_submodule(c.name)
        size = 4 * max(float(result.abs().max()) for result in before[c.name])
        signs = torch.randint(2, (len(c.layer.rows),), generator=generator).double() * 2 - 1
        layer.bias = nn.Parameter((size * signs).to(layer.weight))
        for bn, rows, channels in c.layer.readers:
            mean = cast(Tensor, biased.get_submodule(bn).running_mean)
            mean[pivots_of(channels).to(mean.device)] += (size * signs[pivots_of(rows)]).to(mean)
    after = _results(biased, readers, example)
    pairs = [pair for name in readers for pair in zip(before.get(name, []), after.get(name, []), strict=True)]
    return all(float((a - b).abs().max()) <= 1e-9 * float(a.abs().max()) for a, b in pairs)


def _results(model: nn.Module, names: list[str], example_input: Any) -> dict[str, list[Tensor]]:
    """What the modules of these names make on the example, call by call."""
    found: dict[str, list[Tensor]] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, __, result, name=name: found.setdefault(name, []).append(result.clone())
        )
        for name in names
    ]
    try:
        forward_outputs(model, example_input)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _rows_read(candidate: _Candidate) -> int:
    return len(
        np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *(rows for _, rows, _ in candidate.layer.readers)]))
    )


# ---- the form ------------------------------------------------------------------------------------------------------


def _enter(model: nn.Module, candidate: _Candidate, conversion: Conversion, skip_scale: float) -> _Entered:
    """Put the layer into Path-BN form; its BatchNorm is still the old one."""
    layer: Any = model.get_submodule(candidate.name)
    gain, shift = _affine(model, candidate)
    rows, columns = pivots_of(candidate.rows), pivots_of(candidate.columns)
    weight = layer.weight.detach().double().cpu()
    for size in weight.shape[2:]:
        weight = weight.select(2, size // 2)
    values = gain[rows] * weight[rows, columns % weight.shape[1]] / skip_scale
    if conversion.gauge == "unit":  # ±1 but for the rounding of the weights
        values = torch.where((values.abs() - 1).abs() <= _rounding(model), values.sign(), values)
    device = layer.weight.device
    module = replace_layer(model, candidate.entry(), rows.to(device), columns.to(device), values.to(device), skip_scale)
    return _Entered(candidate, module, gain, shift)


def _affine(model: nn.Module, candidate: _Candidate) -> tuple[Tensor, Tensor]:
    """a and b of y = a · (w z) + b, float64 [out]."""
    layer: Any = model.get_submodule(candidate.name)
    bias = layer.bias.detach().double().cpu() if layer.bias is not None else torch.zeros(len(layer.weight)).double()
    if candidate.bn is None:
        return torch.ones_like(bias), bias
    bn: Any = model.get_submodule(candidate.bn)
    mean, var, gamma, beta = (t.detach().double().cpu() for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
    gain = gamma / (var + bn.eps).sqrt()
    return gain, beta + gain * (bias - mean)


def _of_images(before: nn.Module, candidate: _Candidate, measured: Measured, begin: Beginning) -> Statistics:
    """μ' and var' from calibration images."""
    if candidate.bn is None or begin == "evaluation":
        return measured.off_pivot
    bn = before.get_submodule(candidate.bn)
    assert isinstance(bn, nn.modules.batchnorm._BatchNorm)
    return refer_to_running(measured, bn)


@torch.no_grad()
def _set_statistics(entered: _Entered, mean: Tensor, var: Tensor, *, normalise: bool) -> None:
    """μ', var', and γ' = a √(var' + eps), β' = b + a μ'.

    Args:
        entered: its module is changed.
        mean, var: of its off-pivot sum, float64 [out].
        normalise: scale all rows of u by powers of two so that var' is near 1 (in path space a network without
            BatchNorm has rows of any size, and eps should stay small beside var'); else only rows whose var' the
            dtype does not hold.
    """
    module, gain, bn = entered.module, entered.gain, cast(Any, entered.module.bn)
    info = torch.finfo(bn.running_var.dtype)
    rows_to_scale = (
        (var > info.max / 4) | (var < info.tiny) if not normalise else torch.ones_like(var, dtype=torch.bool)
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


def _estimates(conversion: Conversion, candidates: list[_Candidate]) -> dict[str, tuple[Tensor, Tensor]]:
    """The Gaussian estimate, by layer, where BatchNorms allow one (``calibration.py``)."""
    tensors = _tensors(conversion.model)
    moments = unit_moments(conversion.units, tensors)
    found = {}
    for c in candidates:
        estimate = estimate_sum(c.layer, c.bn, Places(c.units, c.rows, c.columns), tensors, moments)
        if all(bool(torch.isfinite(values).all()) for values in estimate):
            found[c.name] = estimate
    return found
