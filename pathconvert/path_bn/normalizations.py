"""The BatchNorm that Path-BN takes in from a module, and the rest, which stays in its place.

=========================  =====================================================================
a BatchNorm of torch       is taken in as it is
derived from one of them   is split into a BatchNorm of torch and a
                           :class:`~pathconvert.conversion.remainder.Remainder`
a frozen BatchNorm         is taken in frozen (``frozen.py``): its constants are no parameters in
                           Path-BN form either, and training mode computes what evaluation mode
                           does
=========================  =====================================================================

What derives from ``nn.SyncBatchNorm`` has a remainder of its own: among several processes its
forward calls no ``batch_norm`` that could be left out. It calls ``super().forward``, in whose place
it is given another one.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pathconvert.conversion.frozen import FrozenRemainder, is_frozen, plain_frozen_batch_norm
from pathconvert.conversion.remainder import (
    OWN,
    Remainder,
    is_derived,
    is_split_exactly,
    plain_batch_norm,
)

#: Number of dimensions of an input → the BatchNorm of torch for it.
_OF_RANK = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def split(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The normalization that Path-BN takes in, and what stays in the module's place.

    Both share the module's tensors.

    Raises:
        TypeError: the module is not a BatchNorm.
    """
    if is_frozen(module):
        if next(module.children(), None) is not None:
            return plain_frozen_batch_norm(module), FrozenRemainder(module)
        return module, nn.Identity().train(module.training)
    if not isinstance(module, _BatchNorm):
        raise TypeError(f"{type(module).__name__} is not a BatchNorm")
    if not is_derived(module):
        return module, nn.Identity().train(module.training)
    if isinstance(module, nn.SyncBatchNorm):
        return _plain_sync_batch_norm(module), SyncRemainder(module)
    return plain_batch_norm(module), Remainder(module)


def can_be_split(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a BatchNorm is what :func:`split` makes of it, one after the other, in both modes.

    Args:
        module: a BatchNorm; not changed.
        shape: of an input, [N, C, …].
    """
    if is_frozen(module) or not is_derived(module):
        return True
    if isinstance(module, nn.SyncBatchNorm):
        module = _as_class(module, type(module), _Unsynchronised, _OF_RANK[len(shape)])
    return is_split_exactly(module, shape)


class _Unsynchronised(nn.SyncBatchNorm):
    """A SyncBatchNorm in one process."""

    forward = _BatchNorm.forward


class _Nothing(nn.SyncBatchNorm):
    """A SyncBatchNorm without its normalization."""

    def forward(self, input: Tensor) -> Tensor:
        return input


class SyncRemainder(Remainder):
    """What a module derived from ``nn.SyncBatchNorm`` does besides normalising."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the module returns if its normalization changes nothing."""
        (module,) = self._module
        bare = _as_class(module, type(module), _Nothing)
        bare.training = self.training
        return bare.forward(*args, **kwargs)


def _as_class(module: nn.Module, *kinds: Any) -> nn.Module:
    """A module with the same attributes whose ``super()`` finds each kind after the one before."""
    twin: nn.Module = object.__new__(_combined(kinds))
    vars(twin).update(vars(module))
    return twin


@functools.cache
def _combined(kinds: tuple[Any, ...]) -> Any:
    """A class that derives from several."""
    return type(kinds[0].__name__, kinds, {})


def _plain_sync_batch_norm(module: nn.SyncBatchNorm) -> nn.SyncBatchNorm:
    """The normalization of a module that is derived from SyncBatchNorm; the tensors are its own."""
    plain = nn.SyncBatchNorm(1, process_group=module.process_group)
    for name in plain.__constants__:  # num_features, eps, momentum, …
        setattr(plain, name, getattr(module, name))
    plain._parameters = {name: module._parameters.get(name) for name in OWN[:2]}
    plain._buffers = {name: module._buffers.get(name) for name in OWN[2:]}
    plain.training = module.training
    return plain
