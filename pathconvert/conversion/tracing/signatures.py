"""The arguments of torch's functions by name, whichever way a function is called.

One operation has several callables with different orders of arguments: ``torch.batch_norm`` takes γ
before the mean, ``F.batch_norm`` after the variance; ``x.where(condition, y)`` is
``torch.where(condition, x, y)``. Arguments are therefore bound by the callable's own signature:
that of its Python code, or the schemas that torch's dispatcher has for it.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Names of parameters that torch also accepts, as NumPy has them.
ALIASES = {"axis": "dim", "keepdims": "keepdim", "x": "input", "a": "input", "x2": "other"}
#: Callables whose first argument is the tensor that they are a method of.
METHODS = (types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType)


@dataclass(frozen=True)
class Signature:
    """One way to call a function.

    Attributes:
        parameters: as in Python; a tensor's own method has the tensor as ``input``.
        types: parameter → torch's name of its type; empty for Python functions.
    """

    parameters: inspect.Signature
    types: dict[str, str]

    def names(self, count: int, keywords: tuple[str, ...]) -> tuple[str, ...] | None:
        """The parameter of each argument, in the order in which a call gives them.

        Args:
            count: number of arguments that are given by position.
            keywords: names of the others.

        Returns:
            The names; None if the call does not fit.
        """
        known = self.parameters.parameters
        named = [name if name in known else ALIASES.get(name, name) for name in keywords]
        places = dict(zip(named, range(count, count + len(named)), strict=True))
        try:
            bound = self.parameters.bind(*range(count), **places).arguments
        except TypeError:
            return None
        return tuple(sorted(bound, key=bound.__getitem__))

    def fits(self, arguments: dict[str, Any]) -> bool:
        """Whether the arguments, by name, have the types that the signature asks for."""
        return all(_fits(self.types.get(name, ""), value) for name, value in arguments.items())


def bound_arguments(
    func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """The arguments of a call by name; None if no signature of the function fits.

    Args:
        func: a torch function, method or operator.
        name: its plain name (``add`` for ``__iadd__``), under which torch's dispatcher knows it.
        args, kwargs: of the call; ``out`` is left aside.
    """
    kwargs = {key: value for key, value in kwargs.items() if key != "out"}
    values = (*args, *kwargs.values())
    for signature, names in _signatures_for(func, name, len(args), tuple(kwargs)):
        bound = dict(zip(names, values, strict=True))
        if signature.fits(bound):
            return bound
    return None


@functools.lru_cache(maxsize=1024)
def _signatures_for(
    func: Callable[..., Any], name: str, count: int, keywords: tuple[str, ...]
) -> tuple[tuple[Signature, tuple[str, ...]], ...]:
    """The signatures that a call may have, and the parameter of each of its arguments.

    They depend on the number of arguments and their names alone, and networks make the same few
    calls again and again, so that they are kept.
    """
    named = ((one, one.names(count, keywords)) for one in signatures_of(func, name))
    return tuple((one, names) for one, names in named if names is not None)


@functools.cache
def signatures_of(func: Callable[..., Any], name: str) -> tuple[Signature, ...]:
    """The signatures of a callable; several where it is overloaded."""
    if isinstance(func, types.FunctionType):
        signature = inspect.signature(func)
        kinds = {parameter.kind for parameter in signature.parameters.values()}
        if not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
            return (Signature(_with_input(signature), {}),)
    own = getattr(func, "_schema", None)
    schemas = [own] if own is not None else torch._C._jit_get_schemas_for_operator(f"aten::{name}")
    found = [_of_schema(schema, is_method=isinstance(func, METHODS)) for schema in schemas]
    if own is None and not any(found):
        return (Signature(_positional("input", "other"), {}), Signature(_positional("input"), {}))
    return tuple(one for one in found if one is not None)


def _positional(*names: str) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([inspect.Parameter(name, kind) for name in names])


def _with_input(signature: inspect.Signature) -> inspect.Signature:
    """A Python function's signature, with ``input`` in place of ``self``."""
    parameters = signature.parameters.values()
    renamed = [one.replace(name="input") if one.name == "self" else one for one in parameters]
    return signature.replace(parameters=renamed)


def _of_schema(schema: Any, *, is_method: bool) -> Signature | None:
    """The signature of one of the dispatcher's schemas; None if it is not about tensors."""
    arguments = [one for one in schema.arguments if not one.is_out]
    if not any(
        str(one.type).startswith(("Tensor", "Optional[Tensor", "List[Tensor")) for one in arguments
    ):
        return None
    if is_method:  # the tensor comes first, wherever the schema has it
        arguments.sort(key=lambda one: one.name != "self")
    parameters, kinds = [], {}
    for one in arguments:
        name = "input" if one.name == "self" else one.name
        kind = (
            inspect.Parameter.KEYWORD_ONLY
            if one.kwarg_only
            else inspect.Parameter.POSITIONAL_OR_KEYWORD
        )
        # torch leaves out any argument that has a default or may be None
        optional = one.has_default_value() or str(one.type).startswith("Optional")
        parameters.append(
            inspect.Parameter(name, kind, default=None if optional else inspect.Parameter.empty)
        )
        kinds[name] = str(one.type)
    return Signature(inspect.Signature(_with_defaults_last(parameters)), kinds)


def _with_defaults_last(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    """Python allows no parameter without a default after one with a default."""
    for i in range(len(parameters) - 1, 0, -1):
        here, before = parameters[i], parameters[i - 1]
        positional = here.kind is not inspect.Parameter.KEYWORD_ONLY
        if positional and here.default is inspect.Parameter.empty and before.default is None:
            parameters[i - 1] = before.replace(default=inspect.Parameter.empty)
    return parameters


def _fits(kind: str, value: Any) -> bool:
    """Whether a value can be an argument of a type, as far as that tells overloads apart."""
    if kind.startswith("Optional["):
        if value is None:
            return True
        kind = kind.removeprefix("Optional[").removesuffix("]")
    if kind == "Tensor":
        return isinstance(value, Tensor)
    if kind.startswith("List["):
        return isinstance(value, list | tuple) or (kind == "List[int]" and isinstance(value, int))
    if kind in ("int", "float", "number", "Scalar", "SymInt"):
        return isinstance(value, numbers.Number | torch.SymInt | torch.dtype | torch.layout) or (
            isinstance(value, Tensor) and value.dim() == 0
        )
    if kind == "bool":
        return isinstance(value, bool)  # torch.std(x, 1) is along a dimension
    if kind == "str":
        return isinstance(value, str)
    return True
