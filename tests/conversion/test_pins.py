"""What pins channels, and the reason given; what ties them to one factor."""

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
    randomise,
    two_convolutions,
)
from torch import Tensor, nn

UNKNOWN = "enters the network ({}), which is not known to be homogeneous"
NORM = "enters the normalization {}_norm, which is not homogeneous"
PINS: dict[str, tuple[int, Callable[[Net, Tensor], Tensor], str]] = {
    "square": (4, lambda s, x: x * x, "multiplies a rescaled tensor in the network (mul)"),
    "add of a number": (4, lambda s, x: x + 1, UNKNOWN.format("add")),
    "add in place": (4, lambda s, x: x.add_(1), UNKNOWN.format("add")),
    "number minus x": (4, lambda s, x: 3 - x, UNKNOWN.format("sub")),
    "number over x": (4, lambda s, x: 1 / x, UNKNOWN.format("__rdiv__")),
    "constant over x": (4, lambda s, x: torch.ones(1) / x,
        "multiplies a rescaled tensor in the network (div)"),
    "floor division": (4, lambda s, x: torch.div(x, 2, rounding_mode="floor"),
        UNKNOWN.format("div")),
    "softmax": (4, lambda s, x: x.softmax(1),
        "enters the network (softmax), which is not homogeneous"),
    "padding with ones": (4, lambda s, x: F.pad(x, (1, 1, 1, 1), value=1.0), UNKNOWN.format("pad")),
    "pow": (4, lambda s, x: x.pow(2), UNKNOWN.format("pow")),
    "exp": (4, lambda s, x: x.exp(), UNKNOWN.format("exp")),
    "sign": (4, lambda s, x: x.sign(), UNKNOWN.format("sign")),
    "round": (4, lambda s, x: x.round(), UNKNOWN.format("round")),
    "norm": (4, lambda s, x: F.normalize(x), UNKNOWN.format("normalize")),
    "integers": (4, lambda s, x: x.int().double(), UNKNOWN.format("int")),
    "bit pattern": (4, lambda s, x: x.view(torch.int64).view(torch.float64),
        UNKNOWN.format("view")),
    "alpha dropout": (4, lambda s, x: F.alpha_dropout(x, 0.5, s.training),
        UNKNOWN.format("alpha_dropout")),
    "einsum": (4, lambda s, x: torch.einsum("nchw,cd->ndhw", x, torch.eye(4).double()),
        UNKNOWN.format("einsum")),
    "grid_sample": (
        4,
        lambda s, x: F.grid_sample(x, torch.zeros(3, 6, 6, 2).double(), align_corners=False),
        UNKNOWN.format("grid_sample"),
    ),
    "written by index": (4, lambda s, x: _write(x, 0.5), UNKNOWN.format("__setitem__")),
    "masked_fill, with one": (
        4,
        lambda s, x: x.masked_fill(torch.eye(6, dtype=torch.bool), 1.0),
        UNKNOWN.format("masked_fill"),
    ),
    "condition on numbers": (4, lambda s, x: torch.where(x > 0.3, x, -x), UNKNOWN.format("gt")),
    "an index that depends on numbers": (
        4,
        lambda s, x: x[:, torch.argsort(images(4).mean((0, 2, 3)).to(x.device))],
        UNKNOWN.format("getitem"),
    ),
    "an output as a slope": (4, lambda s, x: F.prelu(x, x.mean((0, 2, 3))),
        "is a slope in the network (prelu)"),
    "layer norm": (4, lambda s, x: F.layer_norm(x, (6, 6)), NORM.format("layer")),
    "group norm": (4, lambda s, x: F.group_norm(x, 2), NORM.format("group")),
    "instance norm": (
        4, lambda s, x: F.instance_norm(x), NORM.format("instance"),
    ),
}  # fmt: skip


def _write(x: Tensor, value: float) -> Tensor:
    x[:, :2] = value
    return x


@pytest.mark.parametrize("name", PINS)
def test_pins_with_a_reason(name: str) -> None:
    into, middle, reason = PINS[name]
    units, _ = factors_keep(two_convolutions(middle, into), images())
    assert pinned(units) == {"a": reason, "b": OUTPUT}


def test_what_ties_channels_leaves_one_factor() -> None:
    for middle in (
        lambda s, x: x + x.sum(1, keepdim=True),
        lambda s, x: x - x.amax(1, keepdim=True),
        lambda s, x: x.max(1, keepdim=True).values.expand(-1, 4, -1, -1),
        lambda s, x: F.pixel_shuffle(x, 2).repeat(1, 4, 1, 1),
    ):
        units, _ = factors_keep(two_convolutions(middle), images())
        assert free(units) == {"a": 1}


def test_maximum_by_keyword() -> None:
    net = two_convolutions(lambda s, x: torch.max(x, other=s.c(x)), c=nn.Conv2d(4, 4, 1))
    units, _ = factors_keep(net, images())
    assert free(units) == {"a": 4}


def test_mean_with_axis_as_numpy_calls_it() -> None:
    net = randomise(
        Net(lambda s, x: s.l(s.a(x).mean(axis=(2, 3))), a=nn.Conv2d(3, 4, 1), l=nn.Linear(4, 2))
    )
    units, _ = factors_keep(net, images())
    assert free(units) == {"a": 4}
