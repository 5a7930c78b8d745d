"""Arithmetic that several steps share: BatchNorm as an affine map, a kernel's centre tap."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class AffineMap(NamedTuple):
    """BatchNorm in evaluation mode, y = gain · x + shift for every channel; all float64 [C].

    Attributes:
        gain: a = γ / √(var + eps).
        shift: b = β − a · mean.
        deviation: √(var + eps).
    """

    gain: Tensor
    shift: Tensor
    deviation: Tensor


def gain_of(gamma: Tensor | None, var: Tensor | None, eps: float) -> Tensor:
    """a = γ / √(var + eps), float64 [C]; a γ or var that is None counts as 1."""
    one = torch.ones((), dtype=torch.float64)
    return (one if gamma is None else gamma.double()) / (
        (one if var is None else var.double()) + eps
    ).sqrt()


def affine_map(batch_norm: Any, bias: Tensor | float = 0.0) -> AffineMap:
    """The affine map of a BatchNorm that uses its running statistics.

    A missing γ counts as 1, a missing β as 0.

    Args:
        batch_norm: a BatchNorm of torch, or torchvision's FrozenBatchNorm2d; read only.
        bias: of the layer before it, float64 [C]; becomes part of the shift.
    """
    mean, var = batch_norm.running_mean.double(), batch_norm.running_var.double()
    gamma, beta = (
        None if t is None else t.detach().double() for t in (batch_norm.weight, batch_norm.bias)
    )
    gain = gain_of(gamma, var, batch_norm.eps)
    shift = gain * (bias - mean)
    return AffineMap(gain, shift if beta is None else beta + shift, (var + batch_norm.eps).sqrt())


def centre_tap(weight: Tensor) -> Tensor:
    """[out, in, *kernel] → the middle entry of every kernel, a view [out, in].

    Weights of linear layers are returned as they are.
    """
    for size in weight.shape[2:]:
        weight = weight.select(2, size // 2)
    return weight
