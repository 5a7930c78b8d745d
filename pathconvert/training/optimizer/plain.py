"""What G-SGD and Path-SGD share: torch's step of SGD, and the conventions of its optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd


def require_in_range(lr: float | Tensor, momentum: float, weight_decay: float) -> None:
    """Refuse settings that are negative or not numbers, worded as in torch.

    Raises:
        ValueError: a setting is out of its range.
    """
    for name, value in (
        ("learning rate", lr),
        ("momentum value", momentum),
        ("weight_decay value", weight_decay),
    ):
        if not value >= 0.0:
            raise ValueError(f"Invalid {name}: {value}")


def loss_of(closure: Callable[[], float] | None) -> float | None:
    """The loss that ``closure`` computes together with its gradients; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def step_plain(
    params: list[Tensor],
    gradients: list[Tensor],
    group: Mapping[str, Any],
    state: Mapping[Tensor, dict[str, Any]],
) -> None:
    """A step of torch's own SGD.

    Where the rate is a tensor on the parameters' device, the same step is written out here: torch
    would read the rate back to the CPU, which a CUDA graph cannot do.

    Args:
        params: changed in place.
        gradients: one per parameter; not changed.
        group: the parameter group, with ``lr``, ``momentum`` and ``weight_decay``. Lists of tensors
            are updated with one call unless its ``foreach`` is False or missing.
        state: the optimizer's; its momentum buffers are made and changed.
    """
    lr, momentum = group["lr"], group["momentum"]
    buffers = [state[p].get("momentum_buffer") if momentum else None for p in params]
    if params and isinstance(lr, Tensor) and all(p.device == lr.device for p in params):
        buffers = [
            torch.zeros_like(p) if b is None and momentum else b
            for p, b in zip(params, buffers, strict=True)
        ]
        _sgd_with_tensor_rate(
            params, gradients, buffers, lr.reshape(()), momentum, group["weight_decay"]
        )
    else:
        sgd(
            params,
            gradients,
            buffers,
            has_sparse_grad=False,
            foreach=group.get("foreach", False) is not False,
            fused=False,
            lr=lr,
            weight_decay=group["weight_decay"],
            momentum=momentum,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
    for p, buffer in zip(params, buffers, strict=True):
        if buffer is not None:
            state[p]["momentum_buffer"] = buffer


def _sgd_with_tensor_rate(
    params: list[Tensor],
    gradients: list[Tensor],
    buffers: Sequence[Tensor | None],
    lr: Tensor,
    momentum: float,
    weight_decay: float,
) -> None:
    """buffer ← μ · buffer + g + λ p and p ← p − lr · buffer (torch.optim.SGD), all on the device.

    Args:
        params: changed in place.
        gradients: one per parameter; not changed.
        buffers: momentum buffers, changed in place; all None without momentum.
        lr: the learning rate, a tensor of no dimensions on the parameters' device.
        momentum, weight_decay: the group's.
    """
    steps = torch._foreach_add(gradients, params, alpha=weight_decay) if weight_decay else gradients
    if momentum:
        held = [buffer for buffer in buffers if buffer is not None]
        torch._foreach_mul_(held, momentum)
        torch._foreach_add_(held, steps)
        steps = held
    torch._foreach_sub_(params, torch._foreach_mul(steps, lr))
