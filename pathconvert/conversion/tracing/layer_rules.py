"""Rules for the layers whose parameters produce and consume units.

They are convolutions, linear layers and normalizations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pathconvert.conversion.tracing.function_call import Call, Rule, pinned_like
from pathconvert.conversion.tracing.pinning import is_constant, is_zero, pin
from pathconvert.conversion.tracing.trace import ZERO, BatchNormCall, Slot


def convolution(spatial: int, *, transposed: bool = False) -> Rule:
    """W[j, k] z[k] + b[j]: columns read, rows produce.

    With groups, each row reads only its own block of columns.
    """

    def rule(call: Call) -> Any:
        x, weight, bias = (call.argument(name) for name in ("input", "weight", "bias"))
        groups = int(call.argument("groups", 1))
        result = call.run()
        channel = result.dim() - 1 - spatial
        names = _weight_names(call, weight, bias)
        if weight.dim() == spatial + 2 and is_constant(call, weight):
            return _constant_filter(call, result, channel, transposed=transposed)
        if (
            names is None
            or weight.dim() != spatial + 2
            or (names[1] and bias.numel() != result.shape[channel])
        ):
            return pin(call, result)
        columns = call.channel_ids(call.ids(x), channel, x.shape[channel])
        rows = call.trace.fresh(result.shape[channel])
        call.trace.slots.append(Slot(names[0], rows, columns, groups, transposed))
        if names[1]:
            call.trace.slots.append(Slot(names[1], rows))
        shape = [1] * result.dim()
        shape[channel] = -1
        call.tracer.step(names[0], x, result)
        return call.with_ids(result, torch.from_numpy(rows).view(shape))

    return rule


def _constant_filter(call: Call, result: Tensor, channel: int, *, transposed: bool) -> Any:
    """A convolution whose filter has no factor: a blur, a shift, a fixed basis.

    Its result is linear in x, so a row shares the factor of the channels that it reads. Those are
    the channels with a tap other than 0; all of its group where the filter has no numbers.
    """
    x, weight, bias = (call.argument(name) for name in ("input", "weight", "bias"))
    if bias is not None and not is_zero(call, bias):
        return pin(call, result)
    groups = int(call.argument("groups", 1))
    columns = call.channel_ids(call.ids(x), channel, x.shape[channel])
    taps = torch.ones(weight.shape[:2], dtype=torch.bool)
    if not call.tracer.is_live(weight):
        taps = (weight != 0).flatten(2).any(2) if weight.dim() > 2 else weight != 0
    blocks = taps.unflatten(0, (groups, -1))  # [groups, rows per group, columns per group]
    blocks = blocks.transpose(1, 2) if transposed else blocks
    read = np.where(blocks.numpy(), columns.reshape(groups, 1, -1), ZERO).reshape(
        -1, blocks.shape[2]
    )
    rows = read.max(1)
    call.trace.tie(read.ravel(), rows.repeat(read.shape[1]), call.where)
    shape = [1] * result.dim()
    shape[channel] = -1
    return call.with_ids(result, torch.from_numpy(rows).view(shape))


def _weight_names(call: Call, weight: Tensor, bias: Tensor | None) -> tuple[str, str | None] | None:
    """The names of a layer's weight and bias (None: no bias).

    None if one is computed and cannot be rescaled.
    """
    name, bias_name = call.tracer.name_of(weight), call.tracer.name_of(bias)
    if name is None or not weight.is_floating_point() or (bias is not None and bias_name is None):
        return None
    return name, bias_name


def batch_norm(call: Call) -> Any:
    """BatchNorm normalises any factor of its input away; γ and β produce new units.

    Its running statistics stay, or are rescaled with the channels that it reads (``carrying.py``).
    """
    names = ("input", "running_mean", "running_var", "weight", "bias")
    x, mean, var, weight, bias = (call.argument(name) for name in names)
    eps = float(call.argument("eps", 1e-5))
    columns = call.channel_ids(call.ids(x), 1, x.shape[1])
    name_of = call.tracer.name_of
    title = _title(call, (mean, var, weight), x.shape[1])
    statistics = _running_statistics(call, mean, var, eps)
    if statistics is None:
        _pin_statistics(call, (mean, var), f"is a statistic of the BatchNorm {title}")
    rows = _affine_rows(call, weight, bias, x.shape[1], f"the BatchNorm {title}")
    call.trace.batch_norms.append(
        BatchNormCall(title, rows, columns, name_of(weight), name_of(var), eps, statistics)
    )
    shape = [1] * x.dim()
    shape[1] = -1
    result = torch.empty_like(x, device="meta")
    call.tracer.step(title, x, result)
    return call.with_ids(result, torch.from_numpy(rows).view(shape))


def _running_statistics(
    call: Call, mean: Tensor | None, var: Tensor | None, eps: float
) -> tuple[Slot, Slot] | None:
    """The running statistics that the call normalises with, each with ids of its own.

    None if the call uses the statistics of its batch, or the network does anything else with them.
    """
    name_of, known = call.tracer.name_of, call.tracer.statistics
    mean_name, var_name = name_of(mean), name_of(var)
    if mean is None or var is None or mean_name is None or var_name is None:
        return None
    if isinstance(mean, nn.Parameter) or isinstance(var, nn.Parameter):
        return None
    for name, tensor in ((mean_name, mean), (var_name, var)):
        if call.tracer.has_ids(tensor):
            if name not in known or not np.array_equal(
                known[name], call.ids(tensor).flatten().numpy()
            ):
                return None
        else:
            known[name] = call.trace.fresh(tensor.numel())
            call.tracer.set(tensor, torch.from_numpy(known[name]).view(tensor.shape))
    if call.argument("training", False):
        return None
    return (
        Slot(mean_name, known[mean_name], statistic="mean"),
        Slot(var_name, known[var_name], statistic="variance", eps=eps),
    )


def _pin_statistics(call: Call, statistics: Sequence[Tensor | None], reason: str) -> None:
    """Give mean and variance the factor 1, wherever else the network reads or makes them."""
    for tensor in statistics:
        if tensor is None or not call.tracer.is_live(tensor):
            continue
        if call.tracer.has_ids(tensor):
            call.tracer.pin_tensor(tensor, reason)
        else:
            call.tracer.set(tensor, pinned_like(tensor))


def _title(call: Call, tensors: Sequence[Tensor | None], size: int) -> str:
    """A name for a BatchNorm: its module's path, else that of the module whose tensors it uses.

    Where a module's forward calls several, the further ones are named after their first tensor.
    A functional one without any is told from others in its module by its number and its size.
    """
    module = call.tracer.stack[-1] if call.tracer.stack else None
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return call.tracer.path or "the network"
    name_of = call.tracer.name_of
    names = [name for tensor in tensors if (name := name_of(tensor)) is not None]
    if names:
        title, mine = names[0].rpartition(".")[0] or call.tracer.path, tuple(map(name_of, tensors))
        others = [c for c in call.trace.batch_norms if c.name == title]
        is_other = any((c.var, c.weight) != mine[1:] for c in others)
        return names[0] if is_other else title
    return call.tracer.anonymous(f"{call.tracer.path}.batch_norm".lstrip("."), size)


def _affine_rows(
    call: Call, weight: Tensor | None, bias: Tensor | None, size: int, title: str
) -> Any:
    """Ids of the units that γ and β produce.

    They are pinned if γ is missing, or if γ or β is computed.
    """
    rows = call.trace.fresh(size)
    names = [call.tracer.name_of(parameter) for parameter in (weight, bias)]
    for parameter, name in zip((weight, bias), names, strict=True):
        if name is not None:
            call.trace.slots.append(Slot(name, rows))
        elif parameter is not None:
            call.trace.pin(rows, f"comes from {title}, whose γ or β is computed")
            call.trace.pin(call.ids(parameter).flatten().numpy(), f"is γ or β of {title}")
    if names[0] is None:
        call.trace.pin(rows, f"comes from {title}, which has no γ")
    return rows


def normalization(*, channels_last: bool) -> Rule:
    """LayerNorm, GroupNorm, InstanceNorm are not homogeneous: they pin their input.

    γ and β produce new units.
    """

    def rule(call: Call) -> Any:
        x, weight, bias = (call.argument(name) for name in ("input", "weight", "bias"))
        title = f"the normalization {call.tracer.path or call.name}"
        call.trace.pin(call.ids(x).flatten().numpy(), f"enters {title}, which is not homogeneous")
        statistics = [call.argument(name) for name in ("running_mean", "running_var")]
        _pin_statistics(call, statistics, f"is a statistic of {title}")
        result = torch.empty_like(x, device="meta")
        if weight is None:
            return call.with_ids(result, pinned_like(x))
        rows = torch.from_numpy(_affine_rows(call, weight, bias, weight.numel(), title))
        shape = (
            [1] * (x.dim() - weight.dim()) + list(weight.shape)
            if channels_last
            else [1, -1] + [1] * (x.dim() - 2)
        )
        return call.with_ids(result, rows.view(shape))

    return rule
