"""What carries a channel's factor on: every operation with a rule."""

# ruff: noqa: ARG005 - every forward takes (network, x), used or not

from __future__ import annotations

from collections.abc import Callable

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
}  # fmt: skip


@pytest.mark.parametrize("name", CARRIES)
def test_carries(name: str) -> None:
    into, middle = CARRIES[name]
    units, _ = factors_keep(two_convolutions(middle, into), images())
    kept = {"split": 3, "strided slice": 2}.get(name, 4)
    assert sum(size for group, size in free(units).items() if group.startswith("a")) in (kept, 4)
    read = {unit for unit in unit_vector(units, "b.weight", "columns") if unit >= 0}
    assert len(read) == kept
    assert pinned(units)["b"] == OUTPUT
