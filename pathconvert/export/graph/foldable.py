"""What folding can take into a layer, and the arithmetic (``folding.py`` has the formulas)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pathconvert.conversion.arithmetic import affine_map
from pathconvert.conversion.frozen import is_frozen
from pathconvert.conversion.remainder import Remainder, is_derived
from pathconvert.conversion.tracing.trace import Trace
from pathconvert.export.graph.observing import NormalizationCall, Run
from pathconvert.path_bn.normalizations import split

_LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
_LAYER_FORWARDS = {kind.forward for kind in _LAYERS}
_CONV_FORWARDS = {kind._conv_forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}


@dataclass(frozen=True)
class Foldable:
    """A BatchNorm that can be folded: y = gain · x + shift.

    Attributes:
        gain, shift: float64 [C].
        rest: makes what takes the module's place in the network.
    """

    gain: Tensor
    shift: Tensor
    rest: Callable[[nn.Module], nn.Module]

    def is_finite(self) -> bool:
        """Whether its affine map can be folded at all."""
        return bool(self.gain.isfinite().all()) and bool(self.shift.isfinite().all())


# ---- what can be folded --------------------------------------------------------------------------


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm of torch, derived from one, or a frozen one."""
    return isinstance(module, _BatchNorm) or is_frozen(module)


class Folder:
    """Folds BatchNorms into the layers next to them.

    Args:
        model: the network in evaluation mode and float64; its layers are changed in place.
        trace: the trace of ``model``, or of another copy of it.
        run: what a run of ``model`` or of another copy showed.

    Attributes:
        batch_norms: name → BatchNorm that can be folded.
        layers: name of the weight → layer that a BatchNorm can be folded into.
        after, before: the neighbour that a layer or BatchNorm feeds, or is fed by, channel by
            channel.
    """

    def __init__(self, model: nn.Module, trace: Trace, run: Run) -> None:
        counts: dict[int, int] = {}
        for _, parameter in model.named_parameters(remove_duplicate=False):
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
        named = (*model.named_parameters(), *model.named_buffers())
        barred = {id(tensor) for name, tensor in named if name in run.foreign}
        barred |= {tensor for tensor, count in counts.items() if count > 1}
        own = {name: module for name, module in model.named_modules() if _is_simple(module)}
        found = {name: _foldable(name, module, run, barred) for name, module in own.items()}
        self.model = model
        self.batch_norms = {
            name: one for name, one in found.items() if one is not None and one.is_finite()
        }
        self.layers = {
            f"{name}.weight".lstrip("."): module
            for name, module in own.items()
            if isinstance(module, _LAYERS) and _has_own_weights(module, barred)
        }
        self.after = {
            name: sink
            for name, sink in trace.followers().items()
            if _channelwise(trace, name, sink)
        }
        self.before = {sink: name for name, sink in self.after.items()}

    def fold(self, allowed: Collection[str] | None = None) -> list[str]:
        """Fold into every layer the BatchNorms directly after it, then those directly before it.

        Args:
            allowed: names of the BatchNorms that may be folded; None for all of them.

        Returns:
            The names of the BatchNorms that were folded, in order.
        """
        norms = {
            name: one
            for name, one in self.batch_norms.items()
            if allowed is None or name in allowed
        }
        taken: list[str] = []
        for weight_name, layer in self.layers.items():
            name = self.after.get(weight_name, "")
            while name in norms and _take_after(layer, norms[name].gain, norms[name].shift):
                taken.append(name)
                name = self.after.get(name, "")
        for weight_name, layer in self.layers.items():
            name = self.before.get(weight_name, "")
            while name in norms and name not in taken and _pads_nothing(layer):
                _take_before(layer, norms[name].gain, norms[name].shift)
                taken.append(name)
                name = self.before.get(name, "")
        self._remove(taken)
        return taken

    def _remove(self, taken: Collection[str]) -> None:
        """Put what is left of the folded BatchNorms in their place, under all of their names."""
        rests: dict[nn.Module, nn.Module] = {}
        for name, module in list(self.model.named_modules(remove_duplicate=False)):
            if name in taken:
                rests[module] = self.batch_norms[name].rest(module)
        for parent in [*self.model.modules(), *rests.values()]:
            for leaf, child in parent._modules.items():
                if child in rests:
                    parent._modules[leaf] = rests[child]


def _is_simple(module: nn.Module) -> bool:
    """Whether only a module's own forward decides on what it returns, and nothing computes its
    tensors.
    """
    return not (
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or nn.utils.parametrize.is_parametrized(module)
    )


def _has_own_weights(layer: nn.Module, barred: set[int]) -> bool:
    """Whether only a layer uses its weight and bias, and its weight is a parameter."""
    if not isinstance(layer._parameters.get("weight"), Tensor):
        return False  # weight_norm and pruning store a computed tensor there
    return not any(
        id(tensor) in barred for tensor in (*layer.parameters(False), *layer.buffers(False))
    )


def _foldable(name: str, module: nn.Module, run: Run, barred: set[int]) -> Foldable | None:
    """A module as a BatchNorm that can be folded; None for any other module.

    Either its forward is that of torch's BatchNorm, or it is a frozen BatchNorm, or it calls
    ``batch_norm`` on its own tensors.
    """
    if is_batch_norm(module) and (is_frozen(module) or not is_derived(module)):
        own = (*module.parameters(False), *module.buffers(False))
        fixed = all(isinstance(t, Tensor) for t in (module.running_mean, module.running_var))
        if module.training or not fixed or any(id(tensor) in barred for tensor in own):
            return None
        gain, shift, _ = affine_map(module)
        return Foldable(gain, shift, lambda module: split(module)[1].eval())
    calls = run.normalizations.get(name, set())
    if not name or len(calls) != 1:
        return None
    return _foldable_call(module, next(iter(calls)), barred)


def _foldable_call(module: nn.Module, call: NormalizationCall, barred: set[int]) -> Foldable | None:
    """A module that calls ``batch_norm`` itself; None if the call is not on fixed tensors of its
    own.
    """
    names = (call.mean, call.var, call.weight, call.bias)
    if call.training or call.mean is None or call.var is None:
        return None
    if any(name is not None and name.rpartition(".")[0] != call.module for name in names):
        return None
    leaves = [None if name is None else name.rpartition(".")[2] for name in names]
    tensors = [None if leaf is None else getattr(module, leaf) for leaf in leaves]
    if any(id(tensor) in barred for tensor in tensors):
        return None
    mean, var, weight, bias = (None if one is None else one.detach() for one in tensors)
    values = SimpleNamespace(
        running_mean=mean, running_var=var, weight=weight, bias=bias, eps=call.eps
    )
    gain, shift, _ = affine_map(values)
    dropped = {leaf for leaf in leaves if leaf is not None}
    if isinstance(module, _BatchNorm):
        dropped.add("num_batches_tracked")
    return Foldable(gain, shift, lambda module: Remainder(module, dropped))


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
    """Whether a layer is torch's own code that reads its input without adding zeros to it."""
    kind: Any = type(layer)
    if kind.forward not in _LAYER_FORWARDS:
        return False
    if isinstance(layer, nn.Linear):
        return True
    if isinstance(layer, _ConvTransposeNd) or not isinstance(layer, _ConvNd):
        return False
    if kind._conv_forward not in _CONV_FORWARDS or "_conv_forward" in vars(layer):
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
