"""A call of a torch function inside a traced forward: what a rule reads, and what it may do."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pathconvert.conversion.modules import tensors_in, with_tensors
from pathconvert.conversion.tracing.signatures import bound_arguments
from pathconvert.conversion.tracing.trace import PINNED, IdVector, Trace

if TYPE_CHECKING:
    from pathconvert.conversion.tracing.tracer import Tracer


def compact(ids: Tensor) -> Tensor:
    """``ids`` with size 1 in every dimension along which they are constant."""
    for dim in range(ids.dim()):
        if ids.shape[dim] > 1 and ids.stride(dim) == 0:
            ids = ids.narrow(dim, 0, 1)
    for dim in range(ids.dim()):
        if ids.shape[dim] > 1:
            first = ids.narrow(dim, 0, 1)
            if bool((ids == first).all()):
                ids = first
    return ids


Rule = Callable[["Call"], Any]


class NotBound(Exception):
    """A call does not fit any signature of its function, so that no rule can read its arguments."""


@dataclass
class Call:
    """One call of a torch function inside a traced forward: what a rule is given."""

    tracer: Tracer
    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def trace(self) -> Trace:
        """The trace that the tracer extends."""
        return self.tracer.trace

    @property
    def where(self) -> str:
        """The place of the call, for messages: ``layer1.0 (add)``."""
        return f"{self.tracer.path or 'the network'} ({self.name})"

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments by name, without defaults, bound by the function's own signature.

        Raises:
            NotBound: the call fits none of the function's signatures.
        """
        bound = bound_arguments(self.func, self.name, self.args, self.kwargs)
        if bound is None:
            raise NotBound
        return bound

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument, whether it was given by position or by name."""
        return self.arguments.get(name, default)

    @property
    def input(self) -> Tensor:
        """The first argument."""
        tensor: Tensor = self.args[0] if self.args else self.arguments["input"]
        return tensor

    def dims(self) -> list[int]:
        """The dimensions that a reduction runs over: those given as ``dim``, or all."""
        rank, given = self.input.dim(), self.argument("dim")
        if given is None or given == [] or given == ():
            return list(range(rank))
        return [dim % rank for dim in ([given] if isinstance(given, int) else given)]

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, including those in nested lists."""
        return list(self._tensors)

    @functools.cached_property
    def _tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensors_in((self.args, self.kwargs)))

    def ids(self, tensor: Tensor) -> Tensor:
        """The tensor's ids (:meth:`Tracer.ids`)."""
        return self.tracer.ids(tensor)

    def run(self) -> Any:
        """The function's result on the meta device.

        Constant indices and masks keep their numbers, which may decide on the result's shape.
        """
        indices = {
            id(tensor)
            for tensor in self.tensors()
            if not tensor.is_floating_point() and not self.tracer.is_live(tensor)
        }
        if indices and not changes_its_input(self.func):
            with contextlib.suppress(RuntimeError):  # some functions want one device for all
                return self._on_meta(frozenset(indices))
        return self._on_meta(frozenset())

    def _on_meta(self, kept: frozenset[int]) -> Any:
        """The result on the meta device, but for the tensors with these ids."""
        args, kwargs = self.tracer.to_meta(self.args, kept), self.tracer.to_meta(self.kwargs, kept)
        return self.func(*args, **kwargs)

    def run_on_ids(self) -> Any:
        """The function's result on the ids of its tensors.

        The ids of each are expanded to the full size of the tensor.
        """

        def ids(tensor: Tensor) -> Tensor:
            followed = self.tracer.is_live(tensor) or tensor.is_floating_point()
            # an index is passed on as it is
            return self.ids(tensor).expand(tensor.shape) if followed else tensor

        return self.func(*with_tensors(ids, self.args), **with_tensors(ids, self.kwargs))

    def with_ids(self, result: Any, ids: Tensor) -> Any:
        """Give ``ids`` to ``result`` and return it.

        Of several results, the first gets them and the rest are pinned.
        """
        for position, tensor in enumerate(tensors_in(result)):
            self.tracer.set(tensor, ids if position == 0 else pinned_like(tensor))
        return result

    def channel_ids(self, ids: Tensor, dim: int, size: int) -> IdVector:
        """The ids along ``dim``, [size].

        Ids at the same index of ``dim`` are tied to each other.
        """
        return (
            self.tied(ids, [d for d in range(ids.dim()) if d != dim % ids.dim()])
            .flatten()
            .expand(size)
            .numpy()
        )

    def tied(self, ids: Tensor, dims: Sequence[int]) -> Tensor:
        """``ids`` with size 1 in ``dims``, after tying the ids that differ along them."""
        dims = [d for d in dims if ids.shape[d] > 1]
        if not dims:
            return ids
        kept = ids.amax(dims, keepdim=True)
        self.trace.tie(ids.flatten().numpy(), kept.expand_as(ids).flatten().numpy(), self.where)
        return kept


def metadata(call: Call) -> Any:
    """Rule for shapes and dtypes, which do not depend on the numbers."""
    return call.func(*call.args, **call.kwargs)


def device(_: Call) -> Any:
    """Constants that are made on an activation's device have numbers, unlike the activation."""
    return torch.device("cpu")


def constant(call: Call) -> Any:
    """new_tensor: the numbers do not depend on the tensor that it is called on."""
    like = torch.empty(0, dtype=call.input.dtype)
    kwargs = {key: value for key, value in call.kwargs.items() if key != "device"}
    return call.func(like, *call.args[1:], **kwargs)


#: Rules for what does not use a tensor's numbers.
NUMBERLESS = (metadata, device, constant)


def pinned_like(tensor: Tensor) -> Tensor:
    """Ids for a tensor whose factor is 1 everywhere; they broadcast to its shape."""
    return torch.full((1,) * tensor.dim(), PINNED)


def changes_its_input(func: Any) -> bool:
    """Whether a torch function works in place, according to torch's naming convention."""
    name = str(getattr(func, "__name__", ""))
    return (
        name == "__setitem__"
        or (name.startswith("__i") and name != "__invert__")
        or (name.endswith("_") and not name.endswith("__"))
    )
