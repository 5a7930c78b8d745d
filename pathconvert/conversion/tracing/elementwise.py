"""Rules for operations that work on every element by itself: activations, arithmetic, masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathconvert.conversion.tracing.function_call import Call, compact, pinned_like
from pathconvert.conversion.tracing.pinning import activation, gate, is_zero, pin, works_in_place
from pathconvert.conversion.tracing.trace import PINNED, ZERO, Slot

# ---- one operand ---------------------------------------------------------------------------------


def carry(call: Call) -> Any:
    """relu(c·x) = c·relu(x) for each element, so the ids stay.

    The mask of dropout does not depend on its input.
    """
    return call.with_ids(call.run(), call.ids(call.input))


def prelu(call: Call) -> Any:
    """Pin PReLU's slopes to factor 1.

    This holds even where they are computed or are another layer's parameter.
    """
    slopes = call.argument("weight")
    name = call.tracer.name_of(slopes)
    if name is None:
        call.trace.pin(call.ids(slopes).flatten().numpy(), f"is a slope in {call.where}")
    else:
        call.trace.slots.append(Slot(name, np.full(slopes.numel(), PINNED)))
    return carry(call)


#: Functions whose result holds zeros, or nothing yet.
HOLDS_NO_NUMBER = ("new_zeros", "zeros_like", "new_empty", "empty_like")


def new(call: Call) -> Any:
    """zeros_like, new_empty, …: a new tensor that does not depend on the numbers of the old one."""
    result = call.run()
    ids = pinned_like(result)
    return call.with_ids(result, ids * ZERO if call.name in HOLDS_NO_NUMBER else ids)


#: What the methods named after a dtype convert to.
NAMED_KINDS = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}


def convert_kind(call: Call) -> Any:
    """``to``, ``type``, ``float``, ``cpu``: the dtype or the device changes.

    Here the result of an activation stays on the meta device.
    """
    x = call.input
    given = [*call.args[1:], *call.kwargs.values()]
    if call.name == "type" and not given:
        return call.func(torch.empty(0, dtype=x.dtype))
    kinds = [leaf for leaf in given if isinstance(leaf, torch.dtype)]
    if call.name == "type" and not kinds:  # "torch.FloatTensor" or torch.FloatTensor
        kind = given[0]
        name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__name__}"
        kinds = [getattr(torch, name.rpartition(".")[2]).dtype]
    others = [leaf.dtype for leaf in call.tensors() if leaf is not x]
    dtype = (kinds or others or [NAMED_KINDS.get(call.name, x.dtype)])[0]
    if dtype == x.dtype:
        return x
    if not call.tracer.is_live(x) and x.device.type != "meta":
        return x.to(dtype)  # a constant keeps its numbers
    if not dtype.is_floating_point:
        return pin(call)
    return call.with_ids(torch.empty_like(x, dtype=dtype, device="meta"), call.ids(x))


def clamp(call: Call) -> Any:
    """clamp(x, min=0) is ReLU; other bounds are not homogeneous.

    One from below, as GeM pooling has it, pins and does not refuse the network.
    """
    low, high = call.argument("min"), call.argument("max")
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return carry(call) if high is None and is_zero(call, low) else pin(call)
    is_number = isinstance(low, int | float)
    if high is None and is_number and low == 0:
        return carry(call)
    if high is None and is_number and low > 0:
        return gate(call)  # GeM pooling keeps its base away from 0
    return activation(call)


def threshold(call: Call) -> Any:
    """threshold(x, 0, 0) is ReLU."""
    is_relu = call.argument("threshold") == call.argument("value") == 0
    return carry(call) if is_relu else activation(call)


def compare(call: Call) -> Any:
    """x > 0, x == 0, sign(x): a positive factor does not change the result, which has factor 1.

    In place it pins, as other views of x would keep their ids.
    """
    if works_in_place(call) or not is_zero(call, call.argument("other", 0)):
        return pin(call)
    return call.with_ids(call.run(), pinned_like(call.input))


# ---- several operands ----------------------------------------------------------------------------


def aligned(call: Call, tensors: list[Tensor]) -> list[Tensor]:
    """The operands' ids, broadcast to a common shape in the same way as the operands.

    A constant 0 has the id ``ZERO``, which fits any factor.
    """
    rank = max(t.dim() for t in tensors)
    all_ids = [pinned_like(t) * ZERO if is_zero(call, t) else call.ids(t) for t in tensors]
    padded = [ids[(None,) * (rank - ids.dim())] for ids in all_ids]
    shape = torch.broadcast_shapes(*[ids.shape for ids in padded])
    return [ids.expand(shape) for ids in padded]


def tie(call: Call) -> Any:
    """x + y, maximum(x, y): both operands share a factor.

    Between two activations this is a residual ``add``.
    """
    both = [call.argument(name) for name in ("input", "other")]
    operands = [one for one in both if isinstance(one, Tensor)]
    numbers = [one for one in both if not isinstance(one, Tensor)]
    if any(number != 0 for number in numbers):
        return pin(call)
    if len(operands) == 1:
        return call.with_ids(call.run(), call.ids(operands[0]))
    if works_in_place(call) and not call.tracer.is_live(operands[0]):
        return pin(call)
    a, b = aligned(call, operands)
    left, right = a.flatten().numpy(), b.flatten().numpy()
    call.trace.tie(left, right, call.where)
    if not any(call.tracer.name_of(operand) for operand in operands):
        merged = left[(left > PINNED) & (right > PINNED) & (left != right)]
        call.trace.residual.extend([np.unique(merged)] if merged.size else [])
    if works_in_place(call) and bool((a == ZERO).any()):
        return pin(call)  # other views of the zeros would keep their ids
    return call.with_ids(call.run(), compact(torch.where(a == ZERO, b, a)))


def where(call: Call) -> Any:
    """where(condition, x, y): x and y share a factor (0 fits any).

    The result is pinned if the condition depends on numbers.
    """
    condition, x, y = (call.argument(name) for name in ("condition", "input", "other"))
    return _select(call, condition, x, y)


def masked_fill(call: Call) -> Any:
    """masked_fill(x, mask, y) is where(mask, y, x)."""
    x, mask, value = (call.argument(name) for name in ("input", "mask", "value"))
    return pin(call) if works_in_place(call) else _select(call, mask, value, x)


def _select(call: Call, condition: Tensor, *choices: Any) -> Any:
    """The common rule of where and masked_fill; a number among ``choices`` has to be 0."""
    tensors = [choice for choice in choices if isinstance(choice, Tensor)]
    numbers = [choice for choice in choices if not isinstance(choice, Tensor)]
    if not tensors or any(number != 0 for number in numbers) or not _has_factor_1(call, condition):
        return pin(call)
    _, *ids = aligned(call, [condition, *tensors])
    a, b = ids[0], ids[-1]
    call.trace.tie(a.flatten().numpy(), b.flatten().numpy(), call.where)
    return call.with_ids(call.run(), compact(torch.where(a == ZERO, b, a)))


#: The names of a quotient.
QUOTIENTS = ("div", "divide", "true_divide", "truediv")


def product(call: Call) -> Any:
    """x · y is bilinear: exactly one operand carries its factor.

    The other, usually a gate, is pinned.
    """
    both = [call.argument(name) for name in ("input", "other")]
    operands = [one for one in both if isinstance(one, Tensor)]
    if call.argument("rounding_mode") is not None:
        return pin(call)
    if len(operands) == 1:
        if not isinstance(both[0], Tensor) and call.name in QUOTIENTS:
            return pin(call)  # number / x
        return call.with_ids(call.run(), call.ids(operands[0]))
    carrier, gate = carrier_and_gate(call, operands)
    call.trace.pin(
        call.ids(gate).flatten().numpy(), f"multiplies a rescaled tensor in {call.where}"
    )
    ids = dict(zip((id(operands[0]), id(operands[1])), aligned(call, operands), strict=True))
    return call.with_ids(call.run(), compact(ids[id(carrier)]))


def carrier_and_gate(call: Call, operands: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The operand that carries its factor, and the other one.

    Of a quotient the numerator carries; of a product, the operand that is not pinned already, else
    the larger one.

    Returns:
        Carrier and gate.
    """
    first, second = operands
    if call.name in QUOTIENTS or works_in_place(call):
        return first, second
    free = [bool((call.ids(t) > PINNED).any()) and not call.tracer.name_of(t) for t in operands]
    size = [t.numel() for t in operands]
    return (second, first) if (free[1], size[1]) > (free[0], size[0]) else (first, second)


def _has_factor_1(call: Call, condition: Tensor) -> bool:
    """Whether no factor changes a condition: it is a constant, or compares with 0."""
    return not call.tracer.is_live(condition) or bool((call.ids(condition) == PINNED).all())
