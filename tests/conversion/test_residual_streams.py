"""Residual streams in both scopes, gates, and products of two streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_networks import (
    OUTPUT,
    RESIDUAL,
    Net,
    assert_same,
    factors_keep,
    free,
    images,
    pinned,
    randomise,
    residual_network,
    two_convolutions,
)
from torch import Tensor, nn

import pathconvert


def test_residual_stream_in_both_scopes() -> None:
    net = residual_network()
    units, _ = factors_keep(net, images())
    assert free(units) == {"n0": 4, "n1": 6, "n3": 6}
    block = pathconvert.reparameterize(net, images())
    assert {g.name: g.pinned_by for g in block.groups} == {
        "n0": RESIDUAL,
        "n1": None,
        "n3": None,
        "head": OUTPUT,
    }
    network = pathconvert.reparameterize(net, images(), scope="network")
    stream = network.groups[0]
    assert stream.producers == ("n0", "n2", "n4")
    assert stream.pinned_by is None
    assert {p.parameter for p in stream.pivots} == {"head.weight"}, (
        "the pivot lies outside of the stream"
    )
    assert_same(net, network.model, images())
    assert_same(net, network.model, images(), training=True)


def test_option_a_shortcut() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        x = F.relu(s.a(x))
        return s.c(F.relu(s.b(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2))))

    net = Net(forward, a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 6, 3, 2, 1), c=nn.Conv2d(6, 2, 1))
    units, _ = factors_keep(randomise(net), images())
    assert [(g.producers, g.size, g.residual) for g in units.groups if g.pinned_by is None] == [
        (("a", "b"), 3, True), (("b",), 3, False),
    ]  # fmt: skip


def test_option_a_shortcut_of_the_input_pins_its_own_channels_alone() -> None:
    net = two_convolutions(lambda s, x: s.c(x), c=nn.Conv2d(4, 4, 1))
    net._forward = lambda s, x: s.b(s.a(x) + F.pad(x, (0, 0, 0, 0, 0, 1)))
    units, _ = factors_keep(net, images())
    assert free(units) == {"a#2": 1}
    assert pinned(units)["a"] == "meets a tensor that is not rescaled in the network (add)"


@pytest.mark.parametrize("gate", [torch.sigmoid, F.hardsigmoid])
def test_squeeze_excitation(gate: Any) -> None:
    def middle(s: Net, x: Tensor) -> Tensor:
        return x * gate(s.e(F.relu(s.s(x.mean((2, 3), keepdim=True)))))

    units, traced = factors_keep(
        two_convolutions(middle, s=nn.Conv2d(4, 2, 1), e=nn.Conv2d(2, 4, 1)), images()
    )
    assert free(units) == {"a": 4, "s": 2}
    assert pinned(units)["e"] == f"enters the network ({gate.__name__}), which is not homogeneous"
    assert traced.trace.offenders == []


def test_product_of_two_free_streams_pins_exactly_one() -> None:
    units, _ = factors_keep(
        two_convolutions(lambda s, x: x * s.c(x), c=nn.Conv2d(4, 4, 1)), images()
    )
    assert free(units) == {"a": 4}
    assert pinned(units)["c"] == "multiplies a rescaled tensor in the network (mul)"


def test_transform_input() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        x = torch.cat([x[:, i : i + 1] * (0.3 + i) + 0.1 * i for i in range(3)], 1)
        return s.b(F.relu(s.a(x)))

    net = randomise(Net(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1)))
    assert free(factors_keep(net, images())[0]) == {"a": 4}
