"""What a BatchNorm's module does besides normalising.

timm's ``BatchNormAct2d`` is a BatchNorm, a drop layer and an activation in one module, and other
networks derive such modules from torch's BatchNorm themselves. When the normalization moves into
the layer before it, the rest has to stay. A :class:`Remainder` is that rest: it runs the module's
own forward, whose one call of ``batch_norm`` returns its input.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from pathconvert.conversion.modules import copied

#: The functions that normalise.
NORMALIZATIONS = (F.batch_norm, torch.batch_norm)
#: What belongs to the normalization of a module that is derived from torch's BatchNorm.
OWN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
#: The largest relative error of the split in float64. Both sides do the same few operations.
_TOLERANCE = 1e-12


class _WithoutNormalization(TorchFunctionMode):
    """Lets a ``batch_norm`` that is given no other tensor than its input return that input.

    Of the other ones, those of the module's children, it calls as they are.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in NORMALIZATIONS:
            others = (*args[1:], *(kwargs[name] for name in kwargs if name != "input"))
            if not any(isinstance(other, Tensor) for other in others):
                return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)


class Remainder(nn.Module):
    """The forward of another module without its normalization.

    The module's children, and those of its parameters and buffers that do not belong to the
    normalization, keep their names.

    Args:
        module: shares its children and tensors with the remainder; not changed.
        dropped: names of the parameters and buffers of its normalization.
    """

    def __init__(self, module: nn.Module, dropped: Iterable[str] = OWN) -> None:
        super().__init__()
        gone = set(dropped)

        def kept(tensors: dict[str, Any]) -> dict[str, Any]:
            return {name: None if name in gone else tensor for name, tensor in tensors.items()}

        self._parameters = kept(module._parameters)
        self._buffers = kept(module._buffers)
        self._modules = dict(module._modules)
        self.training = module.training
        # it shares these dictionaries, so that whatever moves or casts the remainder's tensors
        # does so for both; the tuple keeps it from becoming a submodule
        twin = _twin(module)
        for name in ("_parameters", "_buffers", "_modules"):
            vars(twin)[name] = vars(self)[name]
        self._module = (twin,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the module returns if its normalization changes nothing."""
        (module,) = self._module
        module.training = self.training
        with _WithoutNormalization():
            return type(module).forward(module, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{type(self._module[0]).__name__} without its normalization"

    def with_normalization(self, batch_norm: nn.Module) -> nn.Module:
        """The original kind of module again.

        Args:
            batch_norm: a BatchNorm of torch, whose tensors become those of the module.
        """
        restored = _twin(self._module[0])
        restored._parameters = {**self._parameters, **batch_norm._parameters}
        restored._buffers = {**self._buffers, **batch_norm._buffers}
        restored._modules = dict(self._modules)
        restored.training = self.training
        return restored


def _twin(module: nn.Module) -> nn.Module:
    """A module of the same class with the same attributes."""
    twin: nn.Module = object.__new__(type(module))
    vars(twin).update(vars(module))
    return twin


def is_derived(batch_norm: nn.Module) -> bool:
    """Whether a BatchNorm has a forward of its own, not that of torch's BatchNorm."""
    return type(batch_norm).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def plain_batch_norm(module: nn.Module) -> _BatchNorm:
    """The normalization of a module that is derived from torch's BatchNorm, as torch's own.

    The tensors are the module's own, not copies.

    Raises:
        TypeError: it is derived from another BatchNorm than those of 1, 2 or 3 dimensions.
    """
    kind = next((kind for kind in _KINDS if isinstance(module, kind)), None)
    if kind is None:
        raise TypeError(f"{type(module).__name__} is not a BatchNorm")
    plain = kind(1)
    for name in kind.__constants__:  # num_features, eps, momentum, …
        setattr(plain, name, getattr(module, name))
    plain._parameters = {name: module._parameters.get(name) for name in ("weight", "bias")}
    plain._buffers = {name: module._buffers.get(name) for name in OWN[2:]}
    plain.training = module.training
    return plain


def is_split_exactly(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a module is torch's BatchNorm followed by its :class:`Remainder`, in both modes.

    This is tried in float64 on random numbers, with the running statistics that training updates.

    Args:
        module: not changed.
        shape: of an input, [N, C, …].
    """
    if not isinstance(module, _KINDS):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return all(_is_split_exactly(module, x, training=training) for training in (False, True))


def _is_split_exactly(module: nn.Module, x: Tensor, *, training: bool) -> bool:
    """Whether the two parts compute what the module computes, in one mode."""
    whole, split = (copied(module).double().cpu().train(training) for _ in range(2))
    normalization = plain_batch_norm(split)
    try:
        expected = _seeded(whole, x)
        got = _seeded(nn.Sequential(normalization, Remainder(split)).train(training), x)
    except Exception:  # the forward of a foreign module may raise anything
        return False
    buffers = dict(whole.named_buffers())
    pairs = [(buffers[name], buffer) for name, buffer in normalization.named_buffers()]
    return all(_equal(a, b) for a, b in [(expected, got), *pairs])


def _seeded(module: nn.Module, x: Tensor) -> Any:
    """The result of a module, which may drop values at random."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return module(x.clone())


def _equal(a: Any, b: Any) -> bool:
    """Whether two tensors are equal up to the rounding of a few operations in float64."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
        return False
    return torch.allclose(a.double(), b.double(), rtol=_TOLERANCE, atol=_TOLERANCE)
