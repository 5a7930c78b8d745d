"""Every kind of input, output and call; what a trace leaves behind."""

# ruff: noqa: ARG005 - every forward takes (network, x), used or not

from __future__ import annotations

from dataclasses import dataclass
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
    randomise,
    two_convolutions,
)
from torch import Tensor, nn

import pathconvert
from pathconvert.conversion.groups import find_units
from pathconvert.conversion.tracing.parts import trace_network


@dataclass
class Both:
    features: Tensor
    logits: Tensor


class OwnDict(dict):
    """A dict class as libraries define it; torch's pytree does not look inside."""


@pytest.mark.parametrize("pack", [
    lambda f, y: (f, [y, None]), lambda f, y: {"f": f, "y": (y, 3)}, Both,
    lambda f, y: OwnDict(f=f, y=y),
    lambda f, y: {f, y},
], ids=["tuple", "dict", "dataclass", "dict subclass", "set"])  # fmt: skip
def test_every_output_is_pinned(pack: Any) -> None:
    def forward(s: Net, x: Tensor) -> Any:
        features = F.relu(s.a(x))
        return pack(features, s.b(features))

    net = randomise(Net(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1)))
    units = find_units(trace_network(net, images()).trace)
    assert pinned(units) == {"a": OUTPUT, "b": OUTPUT}


def test_auxiliary_head_in_training_mode_alone() -> None:
    def forward(s: Net, x: Tensor) -> Any:
        x = F.relu(s.a(x))
        return (s.b(x), s.aux(x), x[:, :1]) if s.training else s.b(x)

    net = randomise(
        Net(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1), aux=nn.Conv2d(4, 2, 1))
    )
    units, traced = factors_keep(net, images())
    assert free(units) == {"a#2": 3}, "channel 0 is an output in training mode"
    assert pinned(units)["aux"] == OUTPUT
    assert traced.left_alone == {}


def test_several_inputs_and_keyword_calls() -> None:
    net = randomise(
        Net(
            lambda s, x, y: s.b(input=F.relu(input=s.a(input=x))) + y,
            a=nn.Conv2d(3, 4, 1),
            b=nn.Conv2d(4, 3, 1),
        )
    )
    assert free(factors_keep(net, (images(), images()))[0]) == {"a": 4}


def test_parameters_that_are_never_used_are_reported() -> None:
    net = two_convolutions(lambda s, x: F.relu(x), unused=nn.Conv2d(1, 1, 1, bias=False))
    assert pathconvert.reparameterize(net, images()).left_alone == {
        "unused.weight": "never used by the forward"
    }


def test_cached_tensors_survive_the_trace() -> None:
    def middle(s: Net, x: Tensor) -> Tensor:
        s.cache = torch.arange(6, device=x.device, dtype=x.dtype)
        s.seen.append(x)
        s.ema = 0.9 * s.ema + 0.1 * x.mean()
        return x * s.cache

    net = two_convolutions(middle, ema=torch.zeros(1).double())
    net.cache, net.seen = None, []
    pathconvert.reparameterize(net, images())
    assert net.cache is None
    assert net.seen == []
    assert net.ema.device.type == "cpu"
    assert float(net.ema) == 0
