"""Fold BatchNorms into the layers next to them, for evaluation only.

In evaluation mode, a BatchNorm computes z ↦ a·z + b in every channel, with a = γ/√(var + eps)
and b = β − a·mean. For a layer with weight W and bias c:

================  ==================================================================================
BatchNorm after   a·(W x + c) + b = (a W) x + (a c + b): scales rows of W, in every layer, with any
                  padding
BatchNorm before  W (a x + b) + c = (W a) x + (W b + c): scales columns of W. Only in layers that do
                  not pad, because padding adds 0 to x, where −b/a would be needed after folding
================  ==================================================================================

A BatchNorm is folded if, in *every* call of the two, the layer's result goes into the BatchNorm
only, channel by channel, and if both are torch's own code on parameters that nothing else uses.
Other BatchNorms are left as they are. *Every* call means every call on the example input: a forward
that does something else with other arguments, or on inputs of another rank, is only folded
correctly for the example's.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torchvision.ops.misc import FrozenBatchNorm2d

from pathconvert.conversion.arithmetic import affine_map
from pathconvert.conversion.calls import tensor_uses
from pathconvert.conversion.equivalence import run_dtype
from pathconvert.conversion.modules import (
    as_arguments,
    computed_tensors,
    meta_inputs,
    output_tensors,
    own_inputs,
    unwrapped,
)
from pathconvert.conversion.parts import TrainingModeError, trace_network
from pathconvert.conversion.rules import rule_of
from pathconvert.conversion.trace import Trace
from pathconvert.conversion.tracer import Tracer, run
from pathconvert.errors import (
    ArchitectureError,
    EquivalenceError,
    PathconvertError,
    TraceError,
    first_line,
)
from pathconvert.networks import architectures

BATCH_NORMS = (_BatchNorm, FrozenBatchNorm2d)
_LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
_FORWARDS = {kind.forward for kind in (*_LAYERS, _BatchNorm, nn.SyncBatchNorm, FrozenBatchNorm2d)}
_CONV_FORWARDS = {kind._conv_forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}
#: Largest error of the folded network in float64, relative to an output's largest value. Rounding
#: costs about 1e-15 per layer, so that even a network of a thousand layers stays below it.
TOLERANCE = 1e-9


def fold(model: nn.Module, example_input: Any = None) -> nn.Module:
    """Return a copy of ``model`` in evaluation mode, with its BatchNorms folded.

    Every one is folded that can be (see the module's docstring). A Path-BN network is taken out of
    that form first. Folded BatchNorms become ``nn.Identity``, and their layers get a bias. The
    arithmetic is in float64, and is checked there by running both networks; the weights are then
    cast back to their own dtype.

    Args:
        model: not changed.
        example_input: a tensor, or a tuple of the forward's positional arguments; None if the
            network is one of torchvision's, whose input size is known.

    Raises:
        ArchitectureError: ``example_input`` is None, but the network is not one of torchvision's.
        TraceError: the forward cannot be traced, or cannot be run in float64.
        PathconvertError: a folded weight does not fit the network's dtype, or the network's outputs
            are not finite.
        EquivalenceError: folding changed an output.
    """
    from pathconvert.path_bn.form import has_path_bn, leave_path_bn

    model = unwrapped(model)
    folded = copy.deepcopy(model, computed_tensors(model)).double().eval()
    if has_path_bn(model):
        folded = leave_path_bn(folded).double().eval()
    inputs = example_for(folded) if example_input is None else example_input
    trace = _trace(folded, inputs)
    if trace is not None:
        _fold_traced(folded, trace, inputs)
    return _in_dtypes_of(folded, model)


def unfolded(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the BatchNorms in ``model``.

    In a folded network, those that could not be folded.
    """
    return tuple(name for name, module in model.named_modules() if isinstance(module, BATCH_NORMS))


def example_for(model: nn.Module) -> Tensor:
    """Return a random input, [2, …], of the size that a torchvision network takes.

    Raises:
        ArchitectureError: the network is not one of torchvision's.
    """
    try:
        size = architectures.recognise(model.state_dict()).input_size
    except ArchitectureError as error:
        message = (
            f"{type(model).__name__} is not a torchvision network, so the size of its input is not"
            " known"
        )
        raise ArchitectureError(
            message, "Pass example_input, a tensor such as torch.zeros(1, 3, 224, 224)."
        ) from error
    assert size is not None
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(0))


def _trace(model: nn.Module, inputs: Any) -> Trace | None:
    """The trace of the whole network.

    None if only parts can be traced, because other code may use their layers too.
    """
    # the input may be too small for an auxiliary head, which does not run in evaluation mode
    try:
        traced = trace_network(model, inputs)
    except TrainingModeError:
        trace, arguments = Trace(), meta_inputs(as_arguments(inputs), run_dtype(model))
        run(Tracer(model, trace, rule_of), model, arguments, {}, training=False)
        return trace
    return traced.trace if traced.parts == ("",) else None


def _fold_traced(folded: nn.Module, trace: Trace, inputs: Any) -> None:
    """Fold in place, and check that the outputs did not change."""
    before, foreign = _run_observed(folded, inputs)
    taken = _Folder(folded, trace, foreign).fold()
    for name, module in list(folded.named_modules(remove_duplicate=False)):
        if name in taken:
            assert isinstance(module, BATCH_NORMS)
            parent, _, leaf = name.rpartition(".")
            folded.get_submodule(parent)._modules[leaf] = nn.Identity().eval()
    if taken:
        after, _ = _run_observed(folded, inputs)
        _check(before, after)


# ---- what can be folded --------------------------------------------------------------------------


class _Folder:
    """Folds BatchNorms into the layers next to them.

    Args:
        model: the network in evaluation mode and float64; its layers are changed in place.
        trace: the trace of ``model``.
        foreign: names of tensors that code outside of their own module uses.

    Attributes:
        batch_norms: name → BatchNorm that can be folded.
        layers: name of the weight → layer that a BatchNorm can be folded into.
        after, before: the neighbour that a layer or BatchNorm feeds, or is fed by, channel by
            channel.
    """

    def __init__(self, model: nn.Module, trace: Trace, foreign: set[str]) -> None:
        counts: dict[int, int] = {}
        for _, parameter in model.named_parameters(remove_duplicate=False):
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
        named = (*model.named_parameters(), *model.named_buffers())
        barred = {id(tensor) for name, tensor in named if name in foreign}
        barred |= {tensor for tensor, count in counts.items() if count > 1}
        own = {name: module for name, module in model.named_modules() if _is_plain(module, barred)}
        self.batch_norms = {
            name: m for name, m in own.items() if isinstance(m, BATCH_NORMS) and _is_fixed(m)
        }
        self.layers = {
            f"{name}.weight".lstrip("."): m for name, m in own.items() if isinstance(m, _LAYERS)
        }
        self.after = {
            name: sink
            for name, sink in trace.followers().items()
            if _channelwise(trace, name, sink)
        }
        self.before = {sink: name for name, sink in self.after.items()}

    def fold(self) -> set[str]:
        """Fold into every layer the BatchNorms directly after it, then those directly before it.

        Returns:
            The names of the BatchNorms that were folded.
        """
        taken: set[str] = set()
        for weight_name, layer in self.layers.items():
            name = self.after.get(weight_name, "")
            while name in self.batch_norms and _take_after(
                layer, *affine_map(self.batch_norms[name])[:2]
            ):
                taken.add(name)
                name = self.after.get(name, "")
        for weight_name, layer in self.layers.items():
            name = self.before.get(weight_name, "")
            while name in self.batch_norms and name not in taken and _pads_nothing(layer):
                _take_before(layer, *affine_map(self.batch_norms[name])[:2])
                taken.add(name)
                name = self.before.get(name, "")
        return taken


def _is_plain(module: nn.Module, barred: set[int]) -> bool:
    """Whether a module is torch's own code without hooks, with parameters of its own.

    None of the parameters may be computed.
    """
    kind = type(module)
    if kind.forward not in _FORWARDS or "forward" in vars(module):
        return False
    if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
        conv_forward = getattr(kind, "_conv_forward", None)
        if conv_forward not in _CONV_FORWARDS or "_conv_forward" in vars(module):
            return False
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or nn.utils.parametrize.is_parametrized(module)
    ):
        return False
    if isinstance(module, _LAYERS) and not isinstance(module._parameters.get("weight"), Tensor):
        return False  # weight_norm and pruning store a computed tensor there
    return not any(
        id(tensor) in barred for tensor in (*module.parameters(False), *module.buffers(False))
    )


def _is_fixed(module: nn.Module) -> bool:
    """Whether a BatchNorm uses running statistics and its affine map is finite."""
    if (
        module.training
        or not isinstance(module.running_mean, Tensor)
        or not isinstance(module.running_var, Tensor)
    ):
        return False
    return all(bool(part.isfinite().all()) for part in affine_map(module)[:2])


def _channelwise(trace: Trace, name: str, sink: str) -> bool:
    """Whether ``sink`` reads exactly the channels that ``name`` produces.

    A BatchNorm1d after a linear layer on [N, L, F], for example, normalises along L, not along the
    layer's channels.
    """
    calls = [
        (slot.parameter, slot.rows, slot.columns)
        for slot in trace.slots
        if slot.parameter in (name, sink)
    ]
    calls += [
        (call.name, call.rows, call.columns)
        for call in trace.batch_norms
        if call.name in (name, sink)
    ]
    made = {rows.tobytes() for of, rows, _ in calls if of == name}
    return all(
        columns is not None and columns.tobytes() in made for of, _, columns in calls if of == sink
    )


def _pads_nothing(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Linear):
        return True
    if isinstance(layer, _ConvTransposeNd) or not isinstance(layer, _ConvNd):
        return False
    if isinstance(layer.padding, str):
        return layer.padding == "valid"
    return all(width == 0 for width in layer.padding)


# ---- the arithmetic ------------------------------------------------------------------------------


def _take_after(layer: Any, a: Tensor, b: Tensor) -> bool:
    """Fold a BatchNorm after a layer: W ← a W, c ← a c + b.

    Returns:
        Whether it was folded; if the numbers of channels differ, nothing is changed.
    """
    weight = layer.weight.detach()
    out = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if len(a) != out:
        return False
    # stored [in, out / groups, …]; row block g of `in` makes block g of `out`
    if isinstance(layer, _ConvTransposeNd):
        # [groups, in / groups, out / groups, …]
        blocks = weight.view(layer.groups, -1, *weight.shape[1:])
        scaled = blocks * a.view(layer.groups, 1, -1, *(1,) * (weight.dim() - 2))
    else:
        scaled = weight * a.view(-1, *(1,) * (weight.dim() - 1))
    bias = b if layer.bias is None else a * layer.bias.detach() + b
    _set(layer, scaled.view(weight.shape), bias)
    return True


def _take_before(layer: Any, a: Tensor, b: Tensor) -> None:
    """Fold a BatchNorm before a layer: W ← W a, c ← W b + c."""
    weight = layer.weight.detach()
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    # [groups, out / groups, in / groups, k]
    blocks = weight.view(groups, len(weight) // groups, weight.shape[1], -1)
    columns = (groups, 1, weight.shape[1], 1)
    shift = (blocks * b.view(columns)).sum((2, 3)).flatten()
    bias = shift if layer.bias is None else layer.bias.detach() + shift
    _set(layer, (blocks * a.view(columns)).view(weight.shape), bias)


def _set(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    trained = bool(layer.weight.requires_grad)
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=trained)
    layer.bias = nn.Parameter(bias, requires_grad=trained)


# ---- running -------------------------------------------------------------------------------------


def _run_observed(model: nn.Module, inputs: Any) -> tuple[list[Tensor], set[str]]:
    """Run a network on ``inputs`` in float64.

    Returns:
        The outputs, and the names of tensors that code outside of their own module uses, such as
        in ``F.conv2d(x, self.conv.weight)``.

    Raises:
        TraceError: the network cannot be run in float64.
    """
    wide = own_inputs(as_arguments(inputs), torch.float64)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), tensor_uses(model) as uses:
            torch.manual_seed(0)
            outputs = output_tensors(model(*wide))
    except (RuntimeError, TypeError, ValueError) as error:
        raise TraceError(
            f"the network cannot be run in float64 on the example input: {first_line(error)}",
            "Make its forward compute in the dtype of its input.",
        ) from error
    foreign = {
        name
        for name, stacks in uses.items()
        if any(stack[-1:] != (name.rpartition(".")[0],) for stack in stacks)
    }
    return [output for output in outputs if output.is_floating_point()], foreign


def _check(before: list[Tensor], after: list[Tensor]) -> None:
    """Check that folding did not change any output.

    Raises:
        PathconvertError: the outputs are not finite.
        EquivalenceError: an output changed.
    """
    for old, new in zip(before, after, strict=True):
        if not bool(old.isfinite().all()):
            raise PathconvertError(
                "the network's own outputs are not finite",
                "Check its weights for NaN and infinity.",
            )
        error = float((old - new).abs().max()) if old.numel() else 0.0
        if not error <= TOLERANCE * float(old.abs().max() if old.numel() else 0.0):
            raise EquivalenceError(
                f"folding changed an output by {error:.1e}; please report this network"
            )


def _in_dtypes_of(folded: nn.Module, model: nn.Module) -> nn.Module:
    """Cast every tensor of ``folded`` to the dtype that it has in ``model``.

    Raises:
        PathconvertError: a weight is finite, but not in that dtype.
    """
    dtypes = {
        name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    usual = run_dtype(model)
    for name, tensor in (*folded.named_parameters(), *folded.named_buffers()):
        if not tensor.is_floating_point():
            continue
        cast = tensor.detach().to(dtypes.get(name, usual))
        if bool(tensor.isfinite().all()) and not bool(cast.isfinite().all()):
            raise PathconvertError(
                f"{name} does not fit {str(cast.dtype).removeprefix('torch.')} once its BatchNorm"
                " is folded in",
                "Fold the network in float32: fold(model.float()).",
            )
        tensor.data = cast
    return folded
