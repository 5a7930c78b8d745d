"""Rules for operations that are not homogeneous.

What they read and what they return is pinned to factor 1.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from pathconvert.conversion.tracer import Call, changes_its_input, pinned_like


def works_in_place(call: Call) -> bool:
    """Whether the call changes its first argument in place."""
    return changes_its_input(call.func) or call.kwargs.get("inplace") is True


def gate(call: Call) -> Any:
    """Pin what a sigmoid or a softmax reads and returns, without refusing the network.

    They are not homogeneous, but common as gates and outputs.
    """
    x = call.argument(0, "input")
    call.trace.pin(call.ids(x).flatten().numpy(), f"enters {call.where}, which is not homogeneous")
    return call.with_ids(call.run(), pinned_like(x))


def pin(call: Call, result: Any = None) -> Any:
    """Pin everything that the call reads, and its result.

    The caller gives ``result`` if it has run the call already.
    """
    reason = f"enters {call.where}, which is not known to be homogeneous"
    for tensor in call.tensors():
        if call.tracer.is_live(tensor):
            call.tracer.pin_tensor(tensor, reason)
    if works_in_place(call):
        call.tracer.set(call.args[0], pinned_like(call.args[0]))
        call.run()
        return call.args[0]
    result = call.run() if result is None else result
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor) and not call.tracer.is_live(leaf):
            call.tracer.set(leaf, pinned_like(leaf))
    return result


def activation(call: Call) -> Any:
    """Pin an activation that is not homogeneous.

    Unless ``partial`` is set, the network is refused because of it.
    """
    x = call.argument(0, "input")
    module = call.tracer.stack[-1] if call.tracer.stack else None
    kind = (
        type(module).__name__ if module is not None and not list(module.children()) else call.name
    )
    call.trace.offenders.append((call.tracer.path, kind))
    call.trace.pin(
        call.ids(x).flatten().numpy(),
        f"enters {call.tracer.path} ({kind}), which is not homogeneous",
    )
    return call.with_ids(call.run(), pinned_like(x))
