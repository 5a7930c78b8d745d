"""Frozen BatchNorms: modules that normalise with constants, whatever their class is called.

torchvision's ``FrozenBatchNorm2d`` and timm's ``FrozenBatchNormAct2d`` keep γ, β, mean and variance
as buffers, and compute y = γ (x − mean) / √(var + eps) + β from them with their own arithmetic.
timm's has a drop layer and an activation behind it. A module counts as frozen if it has these four
buffers, no parameters of its own, and computes that and then its children, one after the other;
this is tried on numbers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from pathconvert.conversion.modules import copied
from pathconvert.conversion.remainder import Remainder

#: Names of the buffers of a frozen BatchNorm, each [C].
CONSTANTS = ("weight", "bias", "running_mean", "running_var")
#: The largest relative error in float64. Both sides do the same few operations.
_TOLERANCE = 1e-12


class FrozenRemainder(Remainder):
    """What a frozen BatchNorm does besides normalising: its children, one after the other."""

    def forward(self, x: Tensor) -> Any:
        """Whatever the module returns if its normalization changes nothing."""
        return _through_children(self, x)


def normalised(module: Any, x: Tensor) -> Any:
    """The forward of a frozen BatchNorm, with a single call of torch for its normalization."""
    y = F.batch_norm(
        x,
        module.running_mean,
        module.running_var,
        module.weight,
        module.bias,
        training=False,
        eps=module.eps,
    )
    return _through_children(module, y)


def _through_children(module: nn.Module, x: Any) -> Any:
    """The result of a module's children, each of which reads that of the one before it."""
    for child in module.children():
        x = child(x)
    return x


def plain_frozen_batch_norm(module: Any) -> nn.Module:
    """The normalization of a frozen BatchNorm that has children; the buffers are its own."""
    plain: nn.Module = FrozenBatchNorm2d(len(module.weight), module.eps)
    plain._buffers = {name: module._buffers[name] for name in CONSTANTS}
    plain.training = module.training
    return plain


def is_frozen(module: nn.Module) -> bool:
    """Whether a module is a frozen BatchNorm of [N, C, H, W] (see the docstring of this file).

    Args:
        module: not changed.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return False  # its forward and its tensors are not those of a Python class
    if type(module).forward is FrozenBatchNorm2d.forward:
        return True
    constants = [module._buffers.get(name) for name in CONSTANTS]
    if not all(isinstance(one, Tensor) and one.dim() == 1 for one in constants):
        return False
    own = [*module._parameters.values(), *module._buffers.values()]
    if sum(tensor is not None for tensor in own) > len(CONSTANTS):
        return False
    return all(_computes_a_batch_norm(module, training=training) for training in (False, True))


def _computes_a_batch_norm(module: nn.Module, *, training: bool) -> bool:
    """Whether a module with random constants does what :func:`normalised` does, in one mode."""
    generator = torch.Generator().manual_seed(0)
    try:
        twin: Any = copied(module).double().cpu().train(training)
        for name in CONSTANTS:
            twin._buffers[name].uniform_(0.5, 1.5, generator=generator)
        shape = (4, len(twin.weight), 3, 3)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a drop layer draws numbers
            found = twin(x.clone())
            torch.manual_seed(0)
            expected = normalised(twin, x.clone())
        return torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE)
    except Exception:  # the forward of a foreign module may raise anything
        return False


@contextlib.contextmanager
def frozen_batch_norms_as_calls(model: nn.Module) -> Iterator[None]:
    """Let the frozen BatchNorms of ``model`` call ``F.batch_norm``.

    The rule for BatchNorm then follows them.
    """
    frozen = [one for one in model.modules() if "forward" not in vars(one) and is_frozen(one)]
    for module in frozen:
        vars(module)["forward"] = functools.partial(normalised, module)
    try:
        yield
    finally:
        for module in frozen:
            vars(module).pop("forward", None)
