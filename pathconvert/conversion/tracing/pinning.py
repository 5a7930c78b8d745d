"""Rules for operations that are not homogeneous.

What they read and what they return is pinned to factor 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pathconvert.conversion.tracing.function_call import Call, changes_its_input, pinned_like
from pathconvert.conversion.tracing.trace import PINNED, ZERO, Offender


def works_in_place(call: Call) -> bool:
    """Whether the call changes its first argument in place."""
    return changes_its_input(call.func) or call.kwargs.get("inplace") is True


def is_constant(call: Call, tensor: Tensor) -> bool:
    """Whether a tensor has factor 1 and is not a weight: no unit's factor reaches it."""
    if call.tracer.name_of(tensor) is not None:
        return False
    return not call.tracer.is_live(tensor) or bool((call.ids(tensor) <= PINNED).all())


def is_zero(call: Call, value: Any) -> bool:
    """Whether a number or a tensor is 0 in every call of the network.

    A buffer may be written between two calls, so that its numbers do not tell.
    """
    if not isinstance(value, Tensor):
        return isinstance(value, int | float) and value == 0
    if call.tracer.is_live(value):
        return bool((call.ids(value) == ZERO).all())
    known = value.device.type != "meta" and id(value) not in call.tracer.names
    return known and not bool(value.any())


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
