"""A network without the BatchNorms that its layers can take in, for evaluation only.

A BatchNorm in evaluation mode is z ↦ a·z + b with a = γ/√(var + eps), b = β − a·mean, channel by channel. Then

==================  =========================================================================================
BatchNorm after     a·(W x + c) + b = (a W) x + (a c + b): rows of W, in every layer, any padding
BatchNorm before    W (a x + b) + c = (W a) x + (W b + c): columns of W; where a layer pads, x is 0 there and
                    not −b/a, so only a layer that does not pad takes it
==================  =========================================================================================

A BatchNorm folds if in *every* call of either one the layer's result goes into it alone, channel by channel, and the
layer and the BatchNorm are torch's own code on parameters that nothing else uses. Whatever does not is left. *Every*
call is every one on the example: a forward that runs otherwise with other arguments, or on inputs of another rank, is
folded for the example's.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torchvision.ops.misc import FrozenBatchNorm2d

from pathconvert.conversion.equivalence import run_dtype
from pathconvert.conversion.parts import TrainingError, trace_network
from pathconvert.conversion.record import unwrapped
from pathconvert.conversion.rules import rule_of
from pathconvert.conversion.trace import Trace, Tracer, as_arguments, computed_tensors, meta_inputs, output_tensors, run
from pathconvert.errors import ArchitectureError, EquivalenceError, PathconvertError, TraceError, first_line
from pathconvert.networks import architectures

BATCH_NORMS = (_BatchNorm, FrozenBatchNorm2d)
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
_FORWARDS = {kind.forward for kind in (*_LAYERS, _BatchNorm, nn.SyncBatchNorm, FrozenBatchNorm2d)}
_CONV_FORWARDS = {kind._conv_forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}
#: Largest error of the folded network in float64, relative to an output's largest value; exact arithmetic gives 1e-15
#: per layer, and a network of a thousand layers stays below.
TOLERANCE = 1e-9


def fold(model: nn.Module, example_input: Any = None) -> nn.Module:
    """A copy of ``model`` in evaluation mode, with every BatchNorm folded that can be (see the module's docstring).

    A Path-BN network is first taken out of that form. Folded BatchNorms become ``nn.Identity``, their layers get a
    bias. The arithmetic is in float64, and checked there by running both networks; weights return to their dtype.

    Args:
        model: not changed.
        example_input: a tensor, or a tuple of the forward's positional arguments; None where the network is one of
            torchvision's, whose input size is known.

    Raises:
        ArchitectureError: ``example_input`` is needed.
        TraceError: the forward cannot be followed, or not be run in float64.
        PathconvertError: a folded weight does not fit the network's dtype.
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
    """The names of the BatchNorms in ``model``: in a folded network, those that are left."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, BATCH_NORMS))


def example_for(model: nn.Module) -> Tensor:
    """A random input, [2, …], of the size that torchvision's network of these tensors takes.

    Raises:
        ArchitectureError: it is none.
    """
    try:
        size = architectures.recognise(model.state_dict()).input_size
    except ArchitectureError as error:
        message = f"{type(model).__name__} is no torchvision network, so the size of its input is not known"
        raise ArchitectureError(message, "Pass example_input, a tensor such as torch.zeros(1, 3, 224, 224).") from error
    assert size is not None
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(0))


def _trace(model: nn.Module, inputs: Any) -> Trace | None:
    """The trace of the whole network; None where only parts can be traced: other code may use their layers too."""
    try:
        traced = trace_network(model, inputs)
    except TrainingError:  # an auxiliary head, which the input is too small for, is not there in evaluation
        trace, arguments = Trace(), meta_inputs(as_arguments(inputs), run_dtype(model))
        run(Tracer(model, trace, rule_of), model, arguments, {}, training=False)
        return trace
    return traced.trace if traced.parts == ("",) else None


def _fold_traced(folded: nn.Module, trace: Trace, inputs: Any) -> None:
    """Fold in place, and check that the outputs stayed."""
    before, foreign = _run_observed(folded, inputs)
    taken = _Chains(folded, trace, foreign).fold()
    for name, module in list(folded.named_modules(remove_duplicate=False)):
        if name in taken:
            assert isinstance(module, BATCH_NORMS)
            parent, _, leaf = name.rpartition(".")
            folded.get_submodule(parent)._modules[leaf] = nn.Identity().eval()
    if taken:
        after, _ = _run_observed(folded, inputs)
        _check(before, after)


# ---- what may fold ---------------------------------------------------------------------------------------------


class _Chains:
    """Layers, and the BatchNorms next to them.

    Args:
        model: evaluation mode, float64; its layers are changed in place.
        trace: of ``model``.
        foreign: ids of tensors that code outside of their own module uses.
    """

    def __init__(self, model: nn.Module, trace: Trace, foreign: set[int]) -> None:
        counts: dict[int, int] = {}
        for _, parameter in model.named_parameters(remove_duplicate=False):
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
        barred = foreign | {tensor for tensor, count in counts.items() if count > 1}
        own = {name: module for name, module in model.named_modules() if _is_plain(module, barred)}
        self.batch_norms = {name: m for name, m in own.items() if isinstance(m, BATCH_NORMS) and _is_fixed(m)}
        self.layers = {f"{name}.weight".lstrip("."): m for name, m in own.items() if isinstance(m, _LAYERS)}
        self.after = {name: sink for name, sink in trace.followers().items() if _channelwise(trace, name, sink)}
        self.before = {sink: name for name, sink in self.after.items()}

    def fold(self) -> set[str]:
        """Fold into every layer the BatchNorms directly after it, then those directly before it; their names."""
        taken: set[str] = set()
        for weight_name, layer in self.layers.items():
            name = self.after.get(weight_name, "")
            while name in self.batch_norms and _take_after(layer, *_affine(self.batch_norms[name])):
                taken.add(name)
                name = self.after.get(name, "")
        for weight_name, layer in self.layers.items():
            name = self.before.get(weight_name, "")
            while name in self.batch_norms and name not in taken and _pads_nothing(layer):
                _take_before(layer, *_affine(self.batch_norms[name]))
                taken.add(name)
                name = self.before.get(name, "")
        return taken


def _is_plain(module: nn.Module, barred: set[int]) -> bool:
    """Whether a module is torch's own code, without hooks, on parameters of its own that are not computed."""
    kind = type(module)
    if kind.forward not in _FORWARDS or "forward" in vars(module):
        return False
    if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
        conv_forward = getattr(kind, "_conv_forward", None)
        if conv_forward not in _CONV_FORWARDS or "_conv_forward" in vars(module):
            return False
    if module._forward_hooks or module._forward_pre_hooks or nn.utils.parametrize.is_parametrized(module):
        return False
    if isinstance(module, _LAYERS) and not isinstance(module._parameters.get("weight"), Tensor):
        return False  # weight_norm and pruning keep a computed tensor there
    return not any(id(tensor) in barred for tensor in (*module.parameters(False), *module.buffers(False)))


def _is_fixed(module: nn.Module) -> bool:
    """Whether a BatchNorm uses running statistics, so that it is an affine map with finite numbers."""
    if module.training or not isinstance(module.running_mean, Tensor) or not isinstance(module.running_var, Tensor):
        return False
    return all(bool(part.isfinite().all()) for part in _affine(module))


def _channelwise(trace: Trace, name: str, sink: str) -> bool:
    """Whether the channels that ``sink`` reads are those that ``name`` makes: a BatchNorm1d after a linear layer on
    [N, L, F] normalises along L."""
    calls = [(slot.parameter, slot.rows, slot.columns) for slot in trace.slots if slot.parameter in (name, sink)]
    calls += [(call.name, call.rows, call.columns) for call in trace.batch_norms if call.name in (name, sink)]
    made = {rows.tobytes() for of, rows, _ in calls if of == name}
    return all(columns is not None and columns.tobytes() in made for of, _, columns in calls if of == sink)


def _pads_nothing(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Linear):
        return True
    if isinstance(layer, _ConvTransposeNd) or not isinstance(layer, _ConvNd):
        return False
    if isinstance(layer.padding, str):
        return layer.padding == "valid"
    return all(width == 0 for width in layer.padding)


# ---- the arithmetic --------------------------------------------------------------------------------------------


def _affine(batch_norm: Any) -> tuple[Tensor, Tensor]:
    """a = γ/√(var + eps) and b = β − a·mean, [C] float64."""
    mean, var = batch_norm.running_mean.double(), batch_norm.running_var.double()
    a = (var + batch_norm.eps).rsqrt()
    if batch_norm.weight is not None:
        a = a * batch_norm.weight.detach().double()
    b = -a * mean
    return a, b if batch_norm.bias is None else b + batch_norm.bias.detach().double()


def _take_after(layer: Any, a: Tensor, b: Tensor) -> bool:
    """W ← a W, c ← a c + b; False, and nothing done, where the channels do not match."""
    weight = layer.weight.detach()
    out = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if len(a) != out:
        return False
    if isinstance(layer, _ConvTransposeNd):  # stored [in, out / groups, …]; row block g of `in` makes block g of `out`
        blocks = weight.view(layer.groups, -1, *weight.shape[1:])  # [groups, in / groups, out / groups, …]
        scaled = blocks * a.view(layer.groups, 1, -1, *(1,) * (weight.dim() - 2))
    else:
        scaled = weight * a.view(-1, *(1,) * (weight.dim() - 1))
    bias = b if layer.bias is None else a * layer.bias.detach() + b
    _set(layer, scaled.view(weight.shape), bias)
    return True


def _take_before(layer: Any, a: Tensor, b: Tensor) -> None:
    """W ← W a, c ← W b + c."""
    weight = layer.weight.detach()
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    blocks = weight.view(groups, len(weight) // groups, weight.shape[1], -1)  # [groups, out / groups, in / groups, k]
    columns = (groups, 1, weight.shape[1], 1)
    shift = (blocks * b.view(columns)).sum((2, 3)).flatten()
    bias = shift if layer.bias is None else layer.bias.detach() + shift
    _set(layer, (blocks * a.view(columns)).view(weight.shape), bias)


def _set(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    trained = bool(layer.weight.requires_grad)
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=trained)
    layer.bias = nn.Parameter(bias, requires_grad=trained)


# ---- running ---------------------------------------------------------------------------------------------------


class _Uses(TorchFunctionMode):
    """Notes the tensors that code outside of their own module uses: ``F.conv2d(x, self.conv.weight)``."""

    def __init__(self, model: nn.Module, stack: list[nn.Module]) -> None:
        super().__init__()
        self.stack = stack
        self.foreign: set[int] = set()
        self._owner: dict[int, nn.Module] = {}
        for module in model.modules():
            for tensor in (*module.parameters(False), *module.buffers(False)):
                self._owner[id(tensor)] = module

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            owner = self._owner.get(id(leaf))
            if owner is not None and (not self.stack or self.stack[-1] is not owner):
                self.foreign.add(id(leaf))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _running(stack: list[nn.Module]) -> Iterator[None]:
    """Keeps the modules that run in ``stack``, outermost first."""

    def leave(*_: Any) -> None:
        stack.pop()

    handles = [
        module_hooks.register_module_forward_pre_hook(lambda module, _: stack.append(module)),
        module_hooks.register_module_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run_observed(model: nn.Module, inputs: Any) -> tuple[list[Tensor], set[int]]:
    """The outputs on ``inputs`` in float64, and the ids of tensors that code outside of their module uses."""
    wide = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, as_arguments(inputs))
    stack: list[nn.Module] = []
    uses = _Uses(model, stack)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _running(stack), uses:
            torch.manual_seed(0)
            outputs = output_tensors(model(*wide))
    except (RuntimeError, TypeError, ValueError) as error:
        raise TraceError(
            f"the network cannot be run in float64 on the example input: {first_line(error)}",
            "Its forward must follow its input's dtype.",
        ) from error
    return [output for output in outputs if output.is_floating_point()], uses.foreign


def _check(before: list[Tensor], after: list[Tensor]) -> None:
    """The last guard: folding must not have changed any output."""
    for old, new in zip(before, after, strict=True):
        if not bool(old.isfinite().all()):
            raise PathconvertError("the network's own outputs are not finite", "Its weights hold NaN or infinity.")
        error = float((old - new).abs().max()) if old.numel() else 0.0
        if not error <= TOLERANCE * float(old.abs().max() if old.numel() else 0.0):
            raise EquivalenceError(f"folding changed an output by {error:.1e}; please report this network")


def _in_dtypes_of(folded: nn.Module, model: nn.Module) -> nn.Module:
    """``folded`` with every tensor in the dtype that it has in ``model``."""
    dtypes = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    usual = run_dtype(model)
    for name, tensor in (*folded.named_parameters(), *folded.named_buffers()):
        if not tensor.is_floating_point():
            continue
        cast = tensor.detach().to(dtypes.get(name, usual))
        if bool(tensor.isfinite().all()) and not bool(cast.isfinite().all()):
            raise PathconvertError(
                f"{name} does not fit {str(cast.dtype).removeprefix('torch.')} once its BatchNorm is folded in",
                "Fold the network in float32: fold(model.float()).",
            )
        tensor.data = cast
    return folded
