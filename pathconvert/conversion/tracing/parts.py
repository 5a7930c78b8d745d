"""Tracing a whole network, or the largest parts of it that can be traced.

Every forward is traced in evaluation *and* in training mode, into one trace: auxiliary heads run
only in training mode, and a rescaling has to be right in both. If a network cannot be followed as a
whole (the boxes of a detector depend on numbers), it is run once on the example, and its children
are traced with the inputs that they received. The inputs and outputs of a part have factor 1, and a
parameter that code outside the part also uses is pinned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pathconvert.conversion.calls import Arguments, Observed, Stack, observe, one_at_least
from pathconvert.conversion.equivalence import run_dtype
from pathconvert.conversion.modules import as_arguments, meta_inputs, refuse_unreadable
from pathconvert.conversion.tracing.rules import rule_of
from pathconvert.conversion.tracing.ties import first_names, overlaps
from pathconvert.conversion.tracing.trace import Trace
from pathconvert.conversion.tracing.tracer import Tracer, run
from pathconvert.errors import TraceError, first_line


class TrainingModeError(TraceError):
    """Only evaluation mode can be followed, but some parameters are only used in training mode."""


@dataclass(frozen=True)
class Traced:
    """The trace of a network or of its parts.

    Attributes:
        trace: ties, pins and slots of all parts.
        parts: paths of the modules that were traced; ``("",)`` for the whole network.
        left_alone: module or parameter → why it was not traced.
    """

    trace: Trace
    parts: tuple[str, ...]
    left_alone: dict[str, str]


def trace_network(model: nn.Module, example_input: Any) -> Traced:
    """Trace ``model``, or the largest parts of it that can be traced.

    Args:
        model: not changed.
        example_input: a tensor, or a tuple of positional arguments. If the whole network can be
            traced, only its shapes matter; otherwise the network is run on it once.

    Returns:
        What was traced, and why the rest was not.

    Raises:
        TraceError: no part of the network can be traced, a lazy module has not run yet, or the
            example has no elements.
    """
    refuse_unreadable(model)
    arguments, _ = one_at_least((as_arguments(example_input), {}))
    _require_elements(arguments)
    dtype = run_dtype(model)
    try:
        trace, seen, notes = _trace_calls(
            model, model, Trace(), [(meta_inputs(arguments, dtype), {})]
        )
        parts: tuple[str, ...] = ("",)
    except TrainingModeError:
        raise
    except TraceError as error:
        trace, parts, seen, notes = _trace_parts(model, arguments, dtype, error)
    _pin_overlapping(trace, overlaps(model))
    first = first_names(model)
    unused = [name for name, _ in model.named_parameters() if first[name] not in seen]
    notes |= {name: "never used by the forward" for name in unused if not _inside(name, notes)}
    return Traced(trace, parts, notes)


def _require_elements(arguments: tuple[Any, ...]) -> None:
    """Refuse an example without elements, which would not show how channels go together.

    Raises:
        TraceError: a tensor of the example is empty.
    """
    for leaf in tree_leaves(arguments):
        if isinstance(leaf, Tensor) and not leaf.numel():
            size = "×".join(map(str, leaf.shape))
            raise TraceError(
                f"the example input is empty: its size is {size}",
                "Give an example of at least one image.",
            )


def _pin_overlapping(trace: Trace, shared: dict[str, str]) -> None:
    """Pin the tensors that share a part of their memory with others (``ties.py``)."""
    for slot in trace.every_slot():
        if slot.parameter in shared:
            reason = f"{slot.parameter} shares a part of its memory with {shared[slot.parameter]}"
            for vector in (slot.rows, slot.columns):
                if vector is not None:
                    trace.pin(vector, reason)


def _inside(name: str, notes: dict[str, str]) -> bool:
    """Whether a parameter belongs to a module that has a note."""
    return any(name.startswith(f"{path}.") for path in notes)


def _trace_calls(
    model: nn.Module, module: nn.Module, trace: Trace, calls: Sequence[Arguments | Observed]
) -> tuple[Trace, set[str], dict[str, str]]:
    """Trace all given calls of ``module`` in both modes.

    Returns:
        A copy of ``trace`` that contains the calls; the names of the parameters that they use; and
        notes on what could not be traced.
    """
    trace = trace.copy()
    seen: set[str] = set()
    notes: dict[str, str] = {}
    for training in (False, True):
        for call in calls:
            observed = call if isinstance(call, Observed) else None
            args, kwargs = call.arguments if isinstance(call, Observed) else call
            before = trace.copy()
            tracer = Tracer(model, trace, rule_of, None if training else observed)
            try:
                run(tracer, module, args, kwargs, training=training)
            except TraceError as error:
                own = {
                    name for name, parameter in model.named_parameters() if _owns(module, parameter)
                }
                if not training:
                    raise
                if own - seen:
                    raise TrainingModeError(
                        f"{min(own - seen)} is only used in training mode, whose forward cannot be"
                        f" followed: {error}",
                        "Give an example input that the network can also train on, usually a larger"
                        " one: --input-size.",
                    ) from error
                trace = before
                notes["training mode"] = str(error)
            seen |= tracer.seen
    return trace, seen, notes


def _owns(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether a parameter is one of the module's own or of its children."""
    return any(parameter is own for own in module.parameters())


def _trace_parts(
    model: nn.Module, arguments: tuple[Any, ...], dtype: torch.dtype, error: TraceError
) -> tuple[Trace, tuple[str, ...], set[str], dict[str, str]]:
    """Trace the largest parts that can be traced.

    Args:
        model, arguments, dtype: as for :func:`~pathconvert.conversion.calls.observe`.
        error: why the whole network cannot be traced; raised if no part can either.

    Returns:
        The trace of all parts; their paths; the names of the parameters that they use; and module
        or parameter → why it was not traced.
    """
    try:
        observed = observe(model, arguments, dtype, runs=2)
    except Exception as cause:
        error.tip = error.tip or f"running it on the example input failed too: {first_line(cause)}"
        raise error from cause
    search = _PartSearch(model, observed.calls, error)
    search.descend(model, "")
    if not search.parts:
        raise error
    _pin_shared(search.trace, set(search.parts), observed.uses)
    return search.trace, tuple(search.parts), search.seen, search.notes


class _PartSearch:
    """Finds the largest parts of a network that can be traced, from the top down.

    Attributes:
        trace: of all parts found so far.
        parts: their paths.
        seen: names of the parameters that they use.
        notes: module or parameter → why it was not traced.
    """

    def __init__(
        self, model: nn.Module, calls: dict[str, list[Observed]], error: TraceError
    ) -> None:
        self.model, self.calls, self.error = model, calls, error
        self.trace = Trace()
        self.parts: list[str] = []
        self.seen: set[str] = set()
        self.notes: dict[str, str] = {}

    def descend(self, module: nn.Module, path: str) -> None:
        """Trace a module as one part; if that fails, go on with its children."""
        if not list(module.parameters()):
            return
        why = "" if self.calls.get(path) else "is not called by the forward"
        if path and not why:
            why = self._refusal(module, path)
            if not why:
                return
        children = list(module.named_children())
        if why and not children:
            self.notes[path] = why
        for name, _ in module.named_parameters(recurse=False):
            self.notes[f"{path}.{name}".lstrip(".")] = (
                f"belongs to {path or 'the network'}: {why or self.error}"
            )
        for name, child in children:
            self.descend(child, f"{path}.{name}".lstrip("."))

    def _refusal(self, module: nn.Module, path: str) -> str:
        """Trace a module as a part, or say why it cannot be traced; empty if it was."""
        try:
            self.trace, seen, _ = _trace_calls(self.model, module, self.trace, self.calls[path])
        except TraceError as error:
            return str(error) or type(error).__name__
        self.parts.append(path)
        self.seen |= seen
        return ""


def _pin_shared(trace: Trace, parts: set[str], uses: dict[str, set[Stack]]) -> None:
    """Pin the parameters of parts that are also used outside of all parts."""
    for slot in trace.every_slot():
        if any(not parts.intersection(stack) for stack in uses.get(slot.parameter, ())):
            for vector in (slot.rows, slot.columns):
                if vector is not None:
                    trace.pin(
                        vector,
                        f"{slot.parameter} is also used outside the parts that could be traced",
                    )
