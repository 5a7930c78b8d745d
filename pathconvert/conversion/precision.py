"""Networks in another dtype than their own, and networks whose tensors have several.

Two things tie a network to a dtype: its tensors, and the *explicit casts* in its forward, such as
``x.half()`` or ``torch.zeros(n, dtype=torch.float32)``. To compute in float64, both have to change:
:func:`in_dtype` casts the tensors of a copy, and :class:`CastsTo` turns every explicit cast to a
floating-point dtype into one to the wanted dtype while the forward runs.

A network is *mixed* if its floating-point parameters and buffers have more than one dtype, such as
convolutions in float16 with BatchNorms in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pathconvert.conversion.modules import copied

#: Methods of tensors that cast to one floating-point dtype.
_CASTS = (Tensor.half, Tensor.bfloat16, Tensor.float, Tensor.double)
#: Ends of the names of tensor types, which ``Tensor.type`` takes in place of a dtype.
_TYPE_NAMES = ("HalfTensor", "BFloat16Tensor", "FloatTensor", "DoubleTensor")


def floating_tensors(model: nn.Module) -> Iterator[Tensor]:
    """The floating-point parameters and buffers of a network."""
    return (t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())


def is_mixed(model: nn.Module) -> bool:
    """Whether the floating-point parameters and buffers have more than one dtype."""
    return len({tensor.dtype for tensor in floating_tensors(model)}) > 1


def fits(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether no finite number of the network becomes infinite or 0 in ``dtype``."""
    return all(
        bool(((cast := tensor.detach().to(dtype)).isfinite() == tensor.isfinite()).all())
        and bool(((cast == 0) == (tensor == 0)).all())
        for tensor in floating_tensors(model)
    )


def input_dtypes(model: nn.Module, arguments: tuple[Any, ...]) -> tuple[torch.dtype, ...]:
    """The dtypes that the inputs of a mixed network may have, the likeliest first.

    They are those of the given arguments, then those of the network's tensors in their order.
    """
    given = [t for t in tree_leaves(arguments) if isinstance(t, Tensor) and t.is_floating_point()]
    return tuple(dict.fromkeys(t.dtype for t in (*given, *floating_tensors(model))))


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of ``model`` whose floating-point parameters and buffers have ``dtype``.

    They are converted while the network is copied, so that only one copy of them is in memory.
    """
    return _changed(model, lambda tensor: tensor.to(dtype, copy=True)).to(dtype)


def perturbed(model: nn.Module, seed: int) -> nn.Module:
    """A copy in float64 in which every number is half a unit in the last place away.

    The unit is that of the number's own dtype, and seeded random signs say in which direction it
    moves; zeros stay zeros, as no factor changes them. Rounding a number moves it by at most as
    much.
    """
    generator = torch.Generator().manual_seed(seed)

    def moved(tensor: Tensor) -> Tensor:
        wide, info = tensor.double(), torch.finfo(tensor.dtype)
        # wide = mantissa · 2^exponent with 1/2 ≤ |mantissa| < 1; subnormal numbers share one unit
        lead = torch.exp2(torch.frexp(wide).exponent.double() - 1).clamp(min=info.tiny)
        half_unit = torch.where(wide.isfinite() & (wide != 0), lead * (info.eps / 2), 0.0)
        up = torch.rand(wide.shape, generator=generator) < 0.5
        return wide + torch.where(up.to(wide.device), half_unit, -half_unit)

    return _changed(model, moved).to(torch.float64)


def _changed(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of ``model`` with every floating-point parameter and buffer changed."""
    memo: dict[int, Any] = {}
    for tensor in floating_tensors(model):
        new = change(tensor.detach())
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = new
    return copied(model, memo)


class CastsTo(TorchFunctionMode):
    """Turns explicit casts to any floating-point dtype into casts to ``dtype``."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CASTS:
            return args[0].to(self.dtype)
        if func is Tensor.type and len(args) > 1 and _is_tensor_type(args[1]):
            return args[0].to(self.dtype)
        args, kwargs = tree_map_only(torch.dtype, self._of, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)

    def _of(self, dtype: torch.dtype) -> torch.dtype:
        return self.dtype if dtype.is_floating_point else dtype


def _is_tensor_type(kind: Any) -> bool:
    """Whether ``kind`` is a floating-point tensor type or its name, ``torch.HalfTensor``."""
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
    return name.rpartition(".")[2] in _TYPE_NAMES
