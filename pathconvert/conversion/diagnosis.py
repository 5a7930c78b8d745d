"""Where in a network a run goes wrong, for the messages of refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pathconvert.conversion.calls import Arguments, watched


def first_not_finite(model: nn.Module, run: Callable[[], Any]) -> str | None:
    """The path of the first module whose result contains NaN or infinity; None without one.

    Args:
        model: not changed.
        run: runs the network, or a copy of it.
    """
    found: list[str] = []

    def note(name: str, result: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            found.append(name)

    with watched(dict(model.named_modules()), after=note):
        run()
    return found[0] if found else None


def failing_module(model: nn.Module, run: Callable[[], Any]) -> str:
    """The path of the innermost module that is running when ``run`` fails.

    Empty if it fails outside of all inner modules, or does not fail. Arguments are as above.
    """
    running: list[str] = []

    def enter(name: str, _: Arguments) -> None:
        running.append(name)

    def leave(_: str, __: Any) -> None:
        running.pop()

    try:
        with watched(dict(model.named_modules()), before=enter, after=leave):
            run()
    except Exception:  # the caller knows it, and reports it
        return running[-1] if running else ""
    return ""
