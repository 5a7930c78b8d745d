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

from pathconvert.conversion.modules import in_dtype, meta_inputs, mode_of

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
    """Records in which stacks of running modules each of some tensors is used."""

    def __init__(self, tensors: Iterable[Tensor], stack: list[nn.Module]) -> None:
        super().__init__()
        self.stack = stack
        self.stacks: dict[int, set[tuple[nn.Module, ...]]] = {id(t): set() for t in tensors}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if id(leaf) in self.stacks:
                self.stacks[id(leaf)].add(tuple(self.stack))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def tensor_uses(model: nn.Module) -> Iterator[dict[str, set[Stack]]]:
    """Record where the tensors of ``model`` are used inside the context.

    Yields:
        Parameter or buffer, by name → the stacks of modules in which it was used; filled at the
        end. A tensor that was not used has no entry.
    """
    names = {id(t): name for name, t in (*model.named_buffers(), *model.named_parameters())}
    paths = {module: path for path, module in model.named_modules()}
    stack: list[nn.Module] = []
    uses = _Uses((*model.buffers(), *model.parameters()), stack)
    found: dict[str, set[Stack]] = {}
    with running_modules(stack), uses:
        yield found
    for tensor, stacks in uses.stacks.items():
        if stacks:
            found[names[tensor]] = {
                tuple(paths[module] for module in modules if module in paths) for modules in stacks
            }


@dataclass(frozen=True)
class Observed:
    """What one run of a network showed.

    Attributes:
        calls: module, by name → the arguments of each of its calls, as meta tensors.
        uses: parameter or buffer, by name → the stacks of modules in which it was used.
    """

    calls: dict[str, list[Arguments]]
    uses: dict[str, set[Stack]]


def observe(model: nn.Module, arguments: tuple[Any, ...], dtype: torch.dtype) -> Observed:
    """Run the network once in evaluation mode, in ``dtype``, and watch its modules."""
    calls: dict[str, list[Arguments]] = {}

    def note(name: str, call: Arguments) -> None:
        calls.setdefault(name, []).append(_one_at_least(meta_inputs(call, None)))

    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with (
            mode_of(model, training=False),
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            watched(dict(model.named_modules()), before=note),
            tensor_uses(model) as uses,
        ):
            model(*in_dtype(arguments, dtype))
    finally:
        for buffer, was in buffers:  # a forward may change them, for example to count its calls
            buffer.copy_(was)
    return Observed(calls, uses)


def _one_at_least(call: Arguments) -> Arguments:
    """The call with batches of one in place of empty ones, as ids need at least one element.

    A detector that found no box calls its heads with empty batches.
    """

    def filled(tensor: Tensor) -> Tensor:
        return tensor.new_empty((1, *tensor.shape[1:])) if tensor.shape[:1] == (0,) else tensor

    filled_call: Arguments = tree_map_only(Tensor, filled, call)
    return filled_call
