"""What carries a channel's factor on: every operation with a rule."""

# ruff: noqa: ARG005 - every forward takes (network, x), used or not

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_networks import (
    OUTPUT,
    Net,
    factors_keep,
    free,
    images,
    pinned,
    two_convolutions,
    unit_vector,
)
from torch import Tensor

CARRIES: dict[str, tuple[int, Callable[[Net, Tensor], Tensor]]] = {
    "relu": (4, lambda s, x: F.relu(x)),
    "relu in place": (4, lambda s, x: F.relu(x, inplace=True)),
    "relu_": (4, lambda s, x: x.relu_()),
    "leaky relu": (4, lambda s, x: F.leaky_relu(x, 0.2)),
    "prelu": (4, lambda s, x: F.prelu(x, torch.full((4,), 0.3, dtype=x.dtype))),
    "crelu": (8, lambda s, x: torch.cat([F.relu(x), F.relu(-x)], 1)),
    "clamp at zero": (4, lambda s, x: x.clamp(min=0)),
    "clip at zero": (4, lambda s, x: x.clip(0)),
    "clamp_min": (4, lambda s, x: torch.clamp_min(x, 0)),
    "threshold at zero": (4, lambda s, x: F.threshold(x, 0, 0)),
    "negative scalar": (4, lambda s, x: F.relu(-2 * x) / -3),
    "zero minus x": (4, lambda s, x: F.relu(0 - x)),
    "max pool": (4, lambda s, x: F.max_pool2d(x, 3, 2, 1)),
    "average pool": (4, lambda s, x: F.avg_pool2d(x, 3, 2, 1)),
    "lp pool": (4, lambda s, x: F.lp_pool2d(x, 2, 2)),
    "adaptive max pool": (4, lambda s, x: F.adaptive_max_pool2d(x, 2)),
    "nearest": (4, lambda s, x: F.interpolate(x, scale_factor=2)),
    "bilinear": (4,
        lambda s, x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)),
    "dropout": (4, lambda s, x: F.dropout(x, 0.5, s.training)),
    "dropout of channels": (4, lambda s, x: F.dropout2d(x, 0.5, s.training)),
    "nested concat": (14,
        lambda s, x: torch.cat([torch.cat([x[:, 2:], x], 1), torch.cat([x, x], 1)], 1)),
    "concat of itself": (8, lambda s, x: torch.cat([x, x], 1)),
    "concat with a constant": (6,
        lambda s, x: torch.concat([x, torch.ones(3, 2, 6, 6, dtype=x.dtype)], dim=1)),
    "channel shuffle": (4,
        lambda s, x: x.view(-1, 2, 2, 6, 6).transpose(1, 2).reshape(-1, 4, 6, 6)),
    "native channel shuffle": (4, lambda s, x: F.channel_shuffle(x, 2)),
    "chunk": (4, lambda s, x: torch.cat(x.chunk(2, 1)[::-1], 1)),
    "split": (3, lambda s, x: x.split([1, 3], 1)[1]),
    "strided slice": (2, lambda s, x: x[:, 1::2]),
    "unbind and stack": (4, lambda s, x: torch.stack(list(reversed(x.unbind(1))), 1)),
    "index with a list": (4, lambda s, x: x[:, [3, 1, 0, 2]]),
    "repeat_interleave": (8, lambda s, x: x.repeat_interleave(2, 1)),
    "flip": (4, lambda s, x: x.flip(1)),
    "x.data": (4, lambda s, x: x.data),
    "detach, clone": (4, lambda s, x: x.detach().clone().contiguous()),
    "reflecting padding": (4, lambda s, x: F.pad(x, (1, 1, 1, 1), mode="reflect")),
    "zero padding": (4, lambda s, x: F.pad(x, (1, 2, 0, 1))),
    "zero padding of channels": (7, lambda s, x: F.pad(x, (0, 0, 0, 0, 1, 2))),
    "concat with zeros_like": (8, lambda s, x: torch.cat([x, torch.zeros_like(x)], 1)),
    "noise like x": (4, lambda s, x: x * torch.rand_like(x)),
    "drop path": (4, lambda s, x: x * x.new_empty(3, 1, 1, 1).bernoulli_(0.5)),
    "where, condition on the input": (4,
        lambda s, x: torch.where(torch.zeros(1, dtype=torch.bool), x, F.relu(x))),
    "where, zero elsewhere": (4, lambda s, x: torch.where(torch.eye(6, dtype=torch.bool), x, 0)),
    "masked_fill, with zero": (4, lambda s, x: x.masked_fill(torch.eye(6, dtype=torch.bool), 0.0)),
    # comparisons with 0 have factor 1
    "greater than zero": (4, lambda s, x: x * (x > 0)),
    "greater, all by name": (4, lambda s, x: x * torch.gt(input=x, other=0)),
    "a tensor 0": (4, lambda s, x: x * (x > torch.zeros(1, dtype=x.dtype))),
    "zeros_like, compared": (4, lambda s, x: x * (x > torch.zeros_like(x))),
    "sign": (4, lambda s, x: x * x.sign().clamp(min=0)),
    "a comparison's mean": (4, lambda s, x: x * (x > 0).double().mean((2, 3), keepdim=True)),
    "both": (4, lambda s, x: x * ((x > 0) & ~(x.flip(1) < 0))),
    "where, by sign": (4, lambda s, x: torch.where(x > 0, x, 0.1 * x)),
    "masked_fill, by sign": (4, lambda s, x: x.masked_fill(x <= 0, 0)),
    "maximum with a constant 0": (4, lambda s, x: torch.maximum(x, torch.tensor(0.0).to(x))),
    "clamp at a constant 0": (4, lambda s, x: x.clamp(min=torch.tensor(0.0))),
    # writes
    "written into zeros": (4, lambda s, x: _written(torch.zeros_like(x), x, slice(0, 4))),
    "written into zeros, half": (4, lambda s, x: _written(torch.zeros_like(x), x, slice(0, 2))),
    "written into torch.zeros": (4, lambda s, x: _written(torch.zeros(x.shape).to(x), x, [1, 0])),
    "written into new_full": (4, lambda s, x: _written(x.new_full(x.shape, 0.7), x, [3])),
    "written by a mask": (4,
        lambda s, x: _written(torch.zeros_like(x), x, torch.tensor([True, False, True, True]))),
    "a number written": (4, lambda s, x: _write(x, slice(0, 2), 0.5)),
    "an element written": (4, lambda s, x: _write(x, (0, 0, 0), 0)),
    "a slice times a number": (4, lambda s, x: _halve(x)),
    # along dimensions
    "cumsum over rows": (4, lambda s, x: x.cumsum(axis=2)),
    "sort over columns": (4, lambda s, x: x.sort()[0]),
    "topk over columns": (4, lambda s, x: x.topk(3).values),
    "std of a map": (4, lambda s, x: x - x.std((2, 3), keepdim=True)),
    "norm of a map": (4, lambda s, x: x - x.norm(dim=(2, 3), keepdim=True)),
    "largest of a map": (4, lambda s, x: x - x.norm(float("inf"), (2, 3), keepdim=True)),
    "grid_sample": (4,
        lambda s, x: F.grid_sample(x, torch.zeros(3, 6, 6, 2).double(), align_corners=False)),
    "unpool": (4,
        lambda s, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), kernel_size=2)),
    "unfold": (4, lambda s, x: F.unfold(x, 3, padding=1).view(3, 4, 9, 6, 6).sum(2)),
    "fold": (4, lambda s, x: F.fold(F.unfold(x, 3, padding=1), 6, 3, padding=1)),
    "Tensor.unfold": (4, lambda s, x: x.unfold(2, 2, 1).sum(-1)),
    "attention over pixels": (4, lambda s, x: F.scaled_dot_product_attention(
        *(torch.ones(3, 36, 4).double(),) * 2, x.flatten(2).mT).mT.view(3, 4, 6, 6)),
    "attention, heads that share values": (4, lambda s, x: F.scaled_dot_product_attention(
        torch.ones(3, 4, 36, 1).to(x), torch.ones(3, 2, 36, 1).to(x),
        x[:, ::2].flatten(2)[..., None], enable_gqa=True).view(3, 4, 6, 6)),
    # constants
    "index tensor": (4, lambda s, x: x[:, torch.arange(3, -1, -1, device=x.device)]),
    "new_tensor": (4, lambda s, x: x * x.new_tensor([1, 2, 3, 4]).view(4, 1, 1)),
    "type by its name": (4, lambda s, x: x.type("torch.DoubleTensor")),
    "type of tensors": (4, lambda s, x: x.type(torch.DoubleTensor)),
    "a constant filter": (4, lambda s, x: F.conv2d(x, x.new_ones(4, 1, 3, 3), groups=4)),
    "a filter written tap by tap": (4, lambda s, x: F.conv2d(x, _shift(), groups=4)),
    "a constant permutation": (4,
        lambda s, x: F.conv2d(x, torch.eye(4).to(x)[[1, 0, 3, 2]].view(4, 4, 1, 1))),
    "a constant filter, transposed": (4,
        lambda s, x: F.conv_transpose2d(x, torch.ones(4, 1, 2, 2).to(x), stride=2, groups=4)),
    "a constant einsum": (4, lambda s, x: torch.einsum("nchw,hv->ncvw", x, torch.ones(6, 6).to(x))),
}  # fmt: skip


#: Where fewer than 4 channels reach b: the rest is cut off or overwritten.
LEFT = {
    "split": 3,
    "attention, heads that share values": 2,
    "strided slice": 2,
    "written into zeros, half": 2,
    "written into torch.zeros": 2,
    "written into new_full": 1,
    "written by a mask": 3,
    "a number written": 2,
    "an element written": 3,
}


def _write(x: Tensor, index: Any, value: Any) -> Tensor:
    x[:, index] = value
    return x


def _written(y: Tensor, x: Tensor, index: Any) -> Tensor:
    return _write(y, index, x[:, index])


def _halve(x: Tensor) -> Tensor:
    x[:, :2] /= 2
    return x


def _shift() -> Tensor:
    weight = torch.zeros(4, 1, 3, 3, dtype=torch.float64)
    weight[:, :, 0, 0] = 1
    return weight


@pytest.mark.parametrize("name", CARRIES)
def test_carries(name: str) -> None:
    into, middle = CARRIES[name]
    units, _ = factors_keep(two_convolutions(middle, into), images())
    kept = LEFT.get(name, 4)
    assert sum(size for group, size in free(units).items() if group.startswith("a")) in (kept, 4)
    read = {unit for unit in unit_vector(units, "b.weight", "columns") if unit >= 0}
    assert len(read) == kept
    assert pinned(units)["b"] == OUTPUT
