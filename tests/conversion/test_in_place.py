"""Zeros that are overwritten, views, and changes in place."""

# ruff: noqa: ARG001, ARG005 - every forward takes (network, x), used or not

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_networks import Net, factors_keep, free, images, pinned, randomise, two_convolutions
from torch import Tensor, nn


def _zeros_overwritten_through(change: Callable[[Tensor, Tensor], Any]) -> Net:
    def forward(s: Net, x: Tensor) -> Tensor:
        zeros = torch.zeros_like(s.a(x))
        view = zeros[:, :]
        change(zeros, x)
        return s.b(F.relu(s.a(x)) + view)

    return randomise(Net(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1)))


@pytest.mark.parametrize(
    "change",
    [
        lambda zeros, x: zeros.copy_(x[:, :1].expand(-1, 4, -1, -1)),
        lambda zeros, x: zeros.add_(1.0),
        lambda zeros, x: zeros.view(-1).add_(1.0),
        lambda zeros, x: zeros.__setitem__((slice(None), 0), x[:, 0]),
        lambda zeros, x: F.hardsigmoid(zeros, inplace=True),
        lambda zeros, x: zeros.data.fill_(2.0),
    ],
    ids=["copy_", "add_", "view", "setitem", "hardsigmoid", "data"],
)  # fmt: skip
def test_a_view_of_zeros_that_were_overwritten_is_no_zero(
    change: Callable[[Tensor, Tensor], Any],
) -> None:
    units, _ = factors_keep(_zeros_overwritten_through(change), images())
    assert pinned(units)["a"] == "meets a tensor that is not rescaled in the network (add)"


def test_in_place_add_to_a_view() -> None:
    def middle(s: Net, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, :2].add_(y[:, 2:].clone())
        return y

    units, _ = factors_keep(two_convolutions(middle), images())
    assert free(units) == {"a": 2}


def test_in_place_product_with_a_view() -> None:
    def middle(s: Net, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, :2].mul_(y[:, 2:].clone())
        return y

    units, _ = factors_keep(two_convolutions(middle), images())
    assert free(units) == {"a": 2}
    assert pinned(units)["a#2"] == "multiplies a rescaled tensor in the network (mul)"


def test_in_place_residual() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        x = s.a(x)
        y = s.b(F.relu(x))
        y += x
        return s.c(y.relu_())

    net = randomise(Net(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 1), c=nn.Conv2d(4, 2, 1)))
    units, _ = factors_keep(net, images())
    assert [(g.size, g.residual, g.producers) for g in units.groups if g.pinned_by is None] == [
        (4, True, ("a", "b"))
    ]
