"""Watching modules run.

What is recorded: their arguments, their results, and the tensors that code uses meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from pathconvert.conversion.frozen import frozen_batch_norms_as_calls
from pathconvert.conversion.modules import (
    meta_inputs,
    mode_of,
    own_inputs,
)
from pathconvert.errors import TraceError, first_line

#: Positional and keyword arguments of a call.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
#: The modules that run at some moment, by name, outermost first.
Stack = tuple[str, ...]


@contextlib.contextmanager
def watched(
    modules: Mapping[str, nn.Module],
    *,
    before: Callable[[str, Arguments], None] | None = None,
    after: Callable[[str, Any], Any] | None = None,
) -> Iterator[None]:
    """Watch every call of some modules.

    Args:
        modules: the modules, by name.
        before: is given the name and the arguments of a call before it runs.
        after: is given the name and the result; what it returns, unless None, becomes the result.
    """
    handles = []
    for name, module in modules.items():
        if before is not None:

            def enter(
                _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name
            ) -> None:
                before(name, (args, kwargs))

            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        if after is not None:

            def leave(_: nn.Module, __: Any, result: Any, name: str = name) -> Any:
                return after(name, result)

            handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of ``model`` that have no children, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if next(module.children(), None) is None
    }


@contextlib.contextmanager
def running_modules(stack: list[nn.Module]) -> Iterator[None]:
    """Keep the modules that are currently running in ``stack``, outermost first."""

    def pop(*_: Any) -> None:
        stack.pop()

    handles = [
        module_hooks.register_module_forward_pre_hook(lambda module, _: stack.append(module)),
        module_hooks.register_module_forward_hook(pop),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        stack.clear()


class _Uses(TorchFunctionMode):
    """Records which tensors torch's functions use and make.

    Attributes:
        paused: nothing is recorded while it is True.
        stacks: id of a tensor of the network → the stacks of running modules in which it was used.
        names: names of all functions in the order of their calls.
        last_read: (number of a call, place in its result) → number of the last call that read it.
    """

    def __init__(self, tensors: Iterable[Tensor], stack: list[nn.Module]) -> None:
        super().__init__()
        self.stack = stack
        self.stacks: dict[int, set[tuple[nn.Module, ...]]] = {id(t): set() for t in tensors}
        self.paused = False
        self.names: list[str] = []
        self.last_read: dict[tuple[int, int], int] = {}
        self._made = WeakIdKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.paused:
            return func(*args, **(kwargs or {}))
        number = len(self.names)
        self.names.append(function_name(func))
        for leaf in tree_leaves((args, kwargs)):
            if id(leaf) in self.stacks:
                self.stacks[id(leaf)].add(tuple(self.stack))
            elif isinstance(leaf, Tensor):
                self.last_read |= dict.fromkeys(self.makers(leaf), number)
        result = func(*args, **(kwargs or {}))
        for place, leaf in enumerate(tree_leaves(result)):
            if isinstance(leaf, Tensor) and id(leaf) not in self.stacks:
                self._made[leaf] = [*self.makers(leaf), (number, place)]
        return result

    def makers(self, tensor: Tensor) -> list[tuple[int, int]]:
        """The calls that made a tensor or changed it, and its place in their results."""
        made: list[tuple[int, int]] = self._made.get(tensor, [])
        return made


def function_name(func: Any) -> str:
    """A name by which two runs of the same code can be compared."""
    owner = getattr(func, "__self__", None)
    return f"{getattr(owner, '__name__', '')}.{getattr(func, '__name__', func)}"


@contextlib.contextmanager
def _uses_of(model: nn.Module) -> Iterator[_Uses]:
    """Record what the functions of torch use and make inside the context."""
    stack: list[nn.Module] = []
    uses = _Uses((*model.buffers(), *model.parameters()), stack)
    with running_modules(stack), uses:
        yield uses


@contextlib.contextmanager
def tensor_uses(model: nn.Module) -> Iterator[dict[str, set[Stack]]]:
    """Record where the tensors of ``model`` are used inside the context.

    Yields:
        Parameter or buffer, by name → the stacks of modules in which it was used; filled at the
        end. A tensor that was not used has no entry.
    """
    found: dict[str, set[Stack]] = {}
    with _uses_of(model) as uses:
        yield found
    found.update(_by_name(model, uses))


def _by_name(model: nn.Module, uses: _Uses) -> dict[str, set[Stack]]:
    """The stacks of ``uses`` as paths of modules, by the names of the tensors."""
    names = {id(t): name for name, t in (*model.named_buffers(), *model.named_parameters())}
    paths = {module: path for path, module in model.named_modules()}
    return {
        names[tensor]: {
            tuple(paths[module] for module in modules if module in paths) for modules in stacks
        }
        for tensor, stacks in uses.stacks.items()
        if stacks
    }


@dataclass(frozen=True)
class Observed:
    """What one call of a module showed.

    Attributes:
        arguments: of the call, as meta tensors.
        functions: names of torch's functions that the call ran, in order.
        escapes: (number of a function among ``functions``, place in its result) for every tensor
            that was made in the call and read after it, but is not a part of the call's result.
    """

    arguments: Arguments
    functions: tuple[str, ...]
    escapes: frozenset[tuple[int, int]]


@dataclass(frozen=True)
class Observation:
    """What a run of a network showed.

    Attributes:
        calls: module, by name → its calls.
        uses: parameter or buffer, by name → the stacks of modules in which it was used.
    """

    calls: dict[str, list[Observed]]
    uses: dict[str, set[Stack]]


@dataclass
class _Span:
    """A call of a module: its arguments, its first and last function, and what made its result."""

    arguments: Arguments
    first: int
    last: int = -1
    result: frozenset[tuple[int, int]] = frozenset()

    def observed(self, uses: _Uses) -> Observed:
        """What the run showed of the call."""
        escapes = {
            (number - self.first, place)
            for (number, place), read in uses.last_read.items()
            if self.first <= number < self.last <= read and (number, place) not in self.result
        }
        functions = tuple(uses.names[self.first : self.last])
        return Observed(self.arguments, functions, frozenset(escapes))


def observe(
    model: nn.Module, arguments: tuple[Any, ...], dtype: torch.dtype, *, runs: int = 1
) -> Observation:
    """Run the network in evaluation mode and watch its modules.

    Args:
        model: not changed, except by what its forward itself keeps between two runs.
        arguments: of the forward.
        dtype: that its floating-point arguments get.
        runs: what one run keeps may be read in the next one. The calls are those of the first.

    Raises:
        TraceError: the network cannot run on the arguments.
    """
    spans: dict[str, list[_Span]] = {}
    running: list[_Span] = []

    def enter(name: str, call: Arguments) -> None:
        uses.paused = True  # the copies of the arguments are not the network's own work
        running.append(_Span(one_at_least(meta_inputs(call, None)), len(uses.names)))
        uses.paused = False
        spans.setdefault(name, []).append(running[-1])

    def leave(_: str, result: Any) -> None:
        span = running.pop()
        span.last = len(uses.names)
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        span.result = frozenset(maker for tensor in tensors for maker in uses.makers(tensor))

    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with (
            mode_of(model, training=False),
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            frozen_batch_norms_as_calls(model),
            _uses_of(model) as uses,
        ):
            with watched(dict(model.named_modules()), before=enter, after=leave):
                model(*own_inputs(arguments, dtype))
            for _ in range(runs - 1):
                model(*own_inputs(arguments, dtype))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise TraceError(
            f"the network cannot run on the example input: {first_line(error)}",
            "Give an example input that the network takes, in the dtype of its weights.",
        ) from error
    finally:
        for buffer, was in buffers:  # a forward may change them, for example to count its calls
            buffer.copy_(was)
    calls = {name: [span.observed(uses) for span in called] for name, called in spans.items()}
    return Observation(calls, _by_name(model, uses))


def one_at_least(call: Arguments) -> Arguments:
    """The call with batches of one in place of empty ones, as ids need at least one element.

    A detector that found no box calls its heads with empty batches.
    """

    def filled(tensor: Tensor) -> Tensor:
        return tensor.new_zeros((1, *tensor.shape[1:])) if tensor.shape[:1] == (0,) else tensor

    filled_call: Arguments = tree_map_only(Tensor, filled, call)
    return filled_call
