"""Rules for products of matrices: matmul, einsum, attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pathconvert.conversion.tracing.elementwise import carrier_and_gate
from pathconvert.conversion.tracing.function_call import Call
from pathconvert.conversion.tracing.pinning import pin
from pathconvert.conversion.tracing.trace import Slot


def matmul(call: Call) -> Any:
    """A product of matrices; one with a parameter is a linear layer."""
    first, second = call.input, call.argument("other", call.argument("mat2"))
    if not isinstance(second, Tensor) or first.dim() < 2 or second.dim() < 2:
        return pin(call)
    letters = "abcdefghij"
    result = max(first.dim(), second.dim())
    batch = letters[: result - 2]
    left = batch[result - first.dim() :] + "xy"
    right = batch[result - second.dim() :] + "yz"
    return _contraction(call, (first, second), (left, right), batch + "xz")


def einsum(call: Call) -> Any:
    """A sum over indices of two operands; one with a parameter is a linear layer."""
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if (
        not isinstance(equation, str)
        or len(operands) != 2
        or "..." in equation
        or "->" not in equation
    ):
        return pin(call)
    given, wanted = equation.replace(" ", "").split("->")
    left, _, right = given.partition(",")
    if any(len(set(part)) != len(part) for part in (left, right, wanted)):
        return pin(call)
    return _contraction(call, (operands[0], operands[1]), (left, right), wanted)


def _contraction(
    call: Call, operands: tuple[Tensor, Tensor], letters: tuple[str, str], wanted: str
) -> Any:
    """Σ over the letters that are not wanted; every operand has one letter per dimension."""
    for which in (0, 1):
        layer = _layer(call, operands, letters, wanted, which)
        if layer is not None:
            return layer
    carrier, gate = carrier_and_gate(call, list(operands))
    if call.tracer.is_live(gate):
        call.tracer.pin_tensor(gate, f"multiplies a rescaled tensor in {call.where}")
    own = letters[0] if carrier is operands[0] else letters[1]
    ids = call.tied(call.ids(carrier), [i for i, letter in enumerate(own) if letter not in wanted])
    kept = [letter for letter in own if letter in wanted]
    ids = ids.reshape([ids.shape[own.index(letter)] for letter in kept])
    ids = ids.permute([kept.index(letter) for letter in wanted if letter in kept])
    for place, letter in enumerate(wanted):
        if letter not in kept:
            ids = ids.unsqueeze(place)
    return call.with_ids(call.run(), ids)


def _layer(
    call: Call, operands: tuple[Tensor, Tensor], letters: tuple[str, str], wanted: str, which: int
) -> Any:
    """The result of a linear layer with the weight ``operands[which]``; None if it is not one."""
    weight, x = operands[which], operands[1 - which]
    name, own, others = call.tracer.name_of(weight), letters[which], letters[1 - which]
    if name is None or weight.dim() != 2 or call.tracer.has_ids(weight) or call.tracer.name_of(x):
        return None
    made = [letter for letter in own if letter in wanted and letter not in others]
    read = [letter for letter in own if letter in others and letter not in wanted]
    if len(made) != 1 or len(read) != 1:
        return None
    columns = call.channel_ids(call.ids(x), others.index(read[0]), weight.shape[own.index(read[0])])
    rows = call.trace.fresh(weight.shape[own.index(made[0])])
    call.trace.slots.append(Slot(name, rows, columns, transposed=own.index(read[0]) == 0))
    result = call.run()
    shape = [1] * len(wanted)
    shape[wanted.index(made[0])] = -1
    call.tracer.step(name, x, result)
    return call.with_ids(result, torch.from_numpy(rows).view(shape))


def attention(call: Call) -> Any:
    """softmax(q k) v: linear in v, whose elements are added up over the sequence."""
    value = call.argument("value")
    for name in ("query", "key", "attn_mask"):
        tensor = call.argument(name)
        if isinstance(tensor, Tensor) and call.tracer.is_live(tensor):
            call.tracer.pin_tensor(tensor, f"is the {name} in {call.where}")
    result, ids = call.run(), call.tied(call.ids(value), [value.dim() - 2])
    if call.argument("enable_gqa") and ids.shape[-3] > 1:  # several heads read one head of v
        ids = ids.repeat_interleave(result.shape[-3] // value.shape[-3], -3)
    return call.with_ids(result, ids)
