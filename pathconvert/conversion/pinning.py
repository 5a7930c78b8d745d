"""Rules for operations that are not homogeneous.

What they read and what they return is pinned to factor 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pathconvert.conversion.function_call import Call, changes_its_input, pinned_like
from pathconvert.conversion.trace import Offender


def works_in_place(call: Call) -> bool:
    """Whether the call changes its first argument in place."""
    return changes_its_input(call.func) or call.kwargs.get("inplace") is True


def gate(call: Call) -> Any:
    """Pin what a sigmoid or a softmax reads and returns, without refusing the network.

    They are not homogeneous, but common as gates and outputs.
    """
    x = call.input
    call.trace.pin(call.ids(x).flatten().numpy(), f"enters {call.where}, which is not homogeneous")
    return call.with_ids(call.run(), pinned_like(x))


def pin(call: Call, result: Any = None) -> Any:
    """Pin everything that the call reads, and its result.

    What is computed from weights alone is a constant then, and keeps its numbers.

    Args:
        call: the call.
        result: what it returns, where the caller has run it already.
    """
    reason = f"enters {call.where}, which is not known to be homogeneous"
    tensors = call.tensors()
    for tensor in tensors:
        if call.tracer.is_live(tensor):
            call.tracer.pin_tensor(tensor, reason)
    if all(tensor.device.type != "meta" for tensor in tensors) and not works_in_place(call):
        return call.func(*call.args, **call.kwargs)
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
    x = call.input
    module = call.tracer.stack[-1] if call.tracer.stack else None
    is_module = module is not None and not list(module.children())
    kind = type(module).__name__ if is_module else call.name
    place = call.tracer.path or "the network"
    reason = f"{place} ({kind}), which is not homogeneous"
    call.trace.pin(call.ids(x).flatten().numpy(), f"enters {reason}")
    made = call.trace.fresh(1)
    call.trace.pin(made, f"comes from {reason}")
    what = f"{place} is {kind}" if is_module else f"{place} calls {kind}"
    call.trace.offenders.append(Offender(what, int(made[0])))
    return call.with_ids(call.run(), torch.from_numpy(made).view((1,) * x.dim()))
