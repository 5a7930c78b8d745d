"""What of a network can be traced: all of it, or the largest parts that can.

Every forward is traced in evaluation *and* in training mode, into one trace: auxiliary heads run in training alone,
and a rescaling has to be right in both. A network that cannot be followed as a whole (a detector: its boxes depend on
numbers) is run once on the example, and its children are traced with the inputs that they received. A part's inputs
and outputs have factor 1; a parameter that other code uses too is pinned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pathconvert.conversion.equivalence import run_dtype
from pathconvert.conversion.rules import rule_of
from pathconvert.conversion.trace import Trace, Tracer, as_arguments, meta_inputs, mode_of, run
from pathconvert.errors import TraceError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class TrainingError(TraceError):
    """Evaluation can be followed, training cannot, and parameters are used there alone."""


@dataclass(frozen=True)
class Traced:
    """The outcome.

    Attributes:
        trace: ties, pins and slots of all parts.
        parts: the modules that were traced; ``("",)`` for the whole network.
        left_alone: module or parameter → why it was not looked at.
    """

    trace: Trace
    parts: tuple[str, ...]
    left_alone: dict[str, str]


def trace_network(model: nn.Module, example_input: Any) -> Traced:
    """Trace ``model``, or the largest parts of it that can be traced.

    Args:
        model: not changed.
        example_input: a tensor, or a tuple of positional arguments; only shapes matter while the whole can be traced.

    Raises:
        TraceError: nothing of it can be traced.
    """
    arguments = as_arguments(example_input)
    dtype = run_dtype(model)
    try:
        trace, seen, notes = _trace_calls(model, model, Trace(), [(meta_inputs(arguments, dtype), {})])
        parts: tuple[str, ...] = ("",)
    except TrainingError:
        raise
    except TraceError as error:
        trace, parts, seen, notes = _trace_parts(model, arguments, dtype, error)
    unused = [name for name, _ in model.named_parameters() if name not in seen]
    notes |= {name: "never used by the forward" for name in unused if not _inside(name, notes)}
    return Traced(trace, parts, notes)


def _inside(name: str, notes: dict[str, str]) -> bool:
    return any(name.startswith(f"{path}.") for path in notes)


def _trace_calls(
    model: nn.Module, module: nn.Module, trace: Trace, calls: list[Arguments]
) -> tuple[Trace, set[str], dict[str, str]]:
    """A copy of ``trace`` with all calls of ``module`` in both modes, the parameters seen, and notes."""
    trace = trace.copy()
    seen: set[str] = set()
    notes: dict[str, str] = {}
    for training in (False, True):
        for args, kwargs in calls:
            before = trace.copy()
            tracer = Tracer(model, trace, rule_of)
            try:
                run(tracer, module, args, kwargs, training)
            except TraceError as error:
                own = {name for name, parameter in model.named_parameters() if _owns(module, parameter)}
                if not training:
                    raise
                if own - seen:
                    raise TrainingError(
                        f"{min(own - seen)} is used in training mode alone, and that cannot be followed: {error}",
                        "Give an example input that also trains: --input-size, a larger one usually.",
                    ) from error
                trace = before
                notes["training mode"] = str(error)
            seen |= tracer.seen
    return trace, seen, notes


def _owns(module: nn.Module, parameter: nn.Parameter) -> bool:
    return any(parameter is own for own in module.parameters())


class _Watcher(TorchFunctionMode):
    """Notes which parameters are used while which modules run."""

    def __init__(self, model: nn.Module, stack: list[str]) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.stack = stack
        self.uses: dict[str, set[tuple[str, ...]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and id(leaf) in self.names:
                self.uses.setdefault(self.names[id(leaf)], set()).add(tuple(self.stack))
        return func(*args, **(kwargs or {}))


def observe(
    model: nn.Module, arguments: tuple[Any, ...], dtype: torch.dtype
) -> tuple[dict[str, list[Arguments]], dict[str, set[tuple[str, ...]]]]:
    """Run the network once in evaluation mode: what every module was called with (as meta tensors), and in which stacks
    of modules, outermost first, every parameter was used."""
    calls: dict[str, list[Arguments]] = {}
    stack: list[str] = []
    handles = []
    for name, module in model.named_modules():

        def enter(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            stack.append(name)
            calls.setdefault(name, []).append(_one_at_least((meta_inputs(args, None), meta_inputs(kwargs, None))))

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(lambda *_: stack.pop() and None))
    watcher = _Watcher(model, stack)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with mode_of(model, False), torch.no_grad(), torch.random.fork_rng(devices=[]), watcher:
            model(*_in_dtype(arguments, dtype))
    finally:
        for handle in handles:
            handle.remove()
        for buffer, was in buffers:  # a forward may count its calls
            buffer.copy_(was)
    return calls, watcher.uses


def _one_at_least(call: Arguments) -> Arguments:
    """A batch of one in place of an empty one (a detector that found no box): without elements there are no ids."""

    def filled(tensor: Tensor) -> Tensor:
        return tensor.new_empty((1, *tensor.shape[1:])) if tensor.shape[:1] == (0,) else tensor

    filled_call: Arguments = tree_map_only(Tensor, filled, call)
    return filled_call


def _in_dtype(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree)


def _trace_parts(
    model: nn.Module, arguments: tuple[Any, ...], dtype: torch.dtype, error: TraceError
) -> tuple[Trace, tuple[str, ...], set[str], dict[str, str]]:
    """Trace the largest children that can be; ``error`` says why the whole cannot."""
    try:
        calls, uses = observe(model, arguments, dtype)
    except Exception as cause:
        error.tip = error.tip or f"running it on the example input failed too: {str(cause).splitlines()[0]}"
        raise error from cause
    trace, seen, notes = Trace(), set[str](), dict[str, str]()
    parts: list[str] = []

    def descend(module: nn.Module, path: str) -> None:
        nonlocal trace, seen
        if not list(module.parameters()):
            return
        why = "is not called by the forward" if not calls.get(path) else ""
        if path and not why:
            try:
                trace, new, _ = _trace_calls(model, module, trace, calls[path])
            except TraceError as refusal:
                why = str(refusal)
            else:
                parts.append(path)
                seen |= new
                return
        children = list(module.named_children())
        if why and not children:
            notes[path] = why
        own = [name for name, _ in module.named_parameters(recurse=False)]
        notes.update(
            {f"{path}.{name}".lstrip("."): f"belongs to {path or 'the network'}: {why or error}" for name in own}
        )
        for name, child in children:
            descend(child, f"{path}.{name}".lstrip("."))

    descend(model, "")
    if not parts:
        raise error
    inside = set(parts)
    for slot in list(trace.slots):
        if any(not inside.intersection(stack) for stack in uses.get(slot.parameter, ())):
            for vector in (slot.rows, slot.columns):
                if vector is not None:
                    trace.pin(vector, f"{slot.parameter} is used outside of the parts that could be traced too")
    return trace, tuple(parts), seen, notes
