"""What pins channels, and the reason given; what ties them to one factor."""

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
    "torch.divide": (4, lambda s, x: torch.divide(torch.ones(1), x),
        "multiplies a rescaled tensor in the network (divide)"),
    "true_divide": (4, lambda s, x: torch.ones(1).true_divide(x),
        "multiplies a rescaled tensor in the network (true_divide)"),
    "floor division": (4, lambda s, x: torch.div(x, 2, rounding_mode="floor"),
        UNKNOWN.format("div")),
    "softmax": (4, lambda s, x: x.softmax(1),
        "enters the network (softmax), which is not homogeneous"),
    "padding with ones": (4, lambda s, x: F.pad(x, (1, 1, 1, 1), value=1.0), UNKNOWN.format("pad")),
    "pow": (4, lambda s, x: x.pow(2), UNKNOWN.format("pow")),
    "exp": (4, lambda s, x: x.exp(), UNKNOWN.format("exp")),
    "sign in place": (4, lambda s, x: x.sign_(), UNKNOWN.format("sign")),
    "round": (4, lambda s, x: x.round(), UNKNOWN.format("round")),
    "norm": (4, lambda s, x: F.normalize(x), UNKNOWN.format("normalize")),
    "integers": (4, lambda s, x: x.int().double(), UNKNOWN.format("int")),
    "bit pattern": (4, lambda s, x: x.view(torch.int64).view(torch.float64),
        UNKNOWN.format("view")),
    "alpha dropout": (4, lambda s, x: F.alpha_dropout(x, 0.5, s.training),
        UNKNOWN.format("alpha_dropout")),
    "einsum with an ellipsis": (4,
        lambda s, x: torch.einsum("nc...,cd->nd...", x, torch.eye(4).double()),
        UNKNOWN.format("einsum")),
    "a repeated index": (4,
        lambda s, x: torch.einsum("ncii->nci", x)[..., None], UNKNOWN.format("einsum")),
    "a product with a vector": (4,
        lambda s, x: x * (x.mean((2, 3)) @ torch.ones(4).double()).view(3, 1, 1, 1),
        UNKNOWN.format("matmul")),
    "places to sample": (4,
        lambda s, x: F.grid_sample(x, x.reshape(3, 6, 12, 2), align_corners=False),
        "gives places to sample in the network (grid_sample)"),
    "written through a view": (4, lambda s, x: _written_view(x), UNKNOWN.format("setitem")),
    "a view of what is written": (4, lambda s, x: _view_of_written(x), UNKNOWN.format("setitem")),
    "written by a mask of numbers": (4,
        lambda s, x: _write(x, x < 0, 0), UNKNOWN.format("setitem")),
    "added into zeros": (4, lambda s, x: torch.zeros_like(x).add_(x), UNKNOWN.format("add")),
    "compared in place": (4, lambda s, x: _compared_view(x), UNKNOWN.format("gt")),
    "compared with itself": (4, lambda s, x: x * (x == x), UNKNOWN.format("eq")),
    "compared with a neighbour": (4, lambda s, x: x * (x > x.flip(1)), UNKNOWN.format("gt")),
    "number of elements": (4, lambda s, x: x * x.norm(0, 1, True), UNKNOWN.format("norm")),
    "std over std": (4, lambda s, x: x / x.std((2, 3), keepdim=True),
        "multiplies a rescaled tensor in the network (div)"),
    "clamp at an activation": (4, lambda s, x: x.clamp(min=x.flip(1)), UNKNOWN.format("clamp")),
    "a constant filter with a bias": (4,
        lambda s, x: F.conv2d(x, torch.ones(4, 1, 3, 3).to(x), torch.ones(4).to(x), groups=4),
        UNKNOWN.format("conv2d")),
    "attention to itself": (4,
        lambda s, x: F.scaled_dot_product_attention(*(x.flatten(2).mT,) * 3, is_causal=True)
            .mT.view(3, 4, 6, 6),
        "is the query in the network (scaled_dot_product_attention)"),
    "masked_fill, with one": (
        4,
        lambda s, x: x.masked_fill(torch.eye(6, dtype=torch.bool), 1.0),
        UNKNOWN.format("masked_fill"),
    ),
    "condition on numbers": (4, lambda s, x: torch.where(x > 0.3, x, -x), UNKNOWN.format("gt")),
    "an index that depends on numbers": (
        4,
        lambda s, x: x[:, torch.argsort(x.mean((0, 2, 3)))],
        UNKNOWN.format("argsort"),
    ),
    "an output as a slope": (4, lambda s, x: F.prelu(x, x.mean((0, 2, 3))),
        "is a slope in the network (prelu)"),
    "layer norm": (4, lambda s, x: F.layer_norm(x, (6, 6)), NORM.format("layer")),
    "group norm": (4, lambda s, x: F.group_norm(x, 2), NORM.format("group")),
    "instance norm": (
        4, lambda s, x: F.instance_norm(x), NORM.format("instance"),
    ),
}  # fmt: skip


def _write(x: Tensor, index: Any, value: float) -> Tensor:
    x[index] = value
    return x


def _written_view(x: Tensor) -> Tensor:
    view = x.flatten(2)
    view[:, :2] = view[:, 2:].clone()
    return x


def _view_of_written(x: Tensor) -> Tensor:
    view = x[:, 1:3]
    x[:, :2] = 0
    return torch.cat([view, x[:, 2:]], 1)


def _compared_view(x: Tensor) -> Tensor:
    view = x[:, :]
    x.gt_(0)
    return view


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
        lambda s, x: x.cumsum(1),
        lambda s, x: x.sort(dim=1, descending=True).values,
        lambda s, x: x.topk(4, 1)[0],
        lambda s, x: x - torch.std(x, 1, True, True),
        lambda s, x: x - x.norm(float("inf"), 1, True),
        lambda s, x: F.conv2d(x, torch.ones(4, 4, 1, 1).to(x)),
        lambda s, x: torch.einsum("nchw,cd->ndhw", x, torch.eye(4).to(x)),
        lambda s, x: F.scaled_dot_product_attention(
            *(torch.ones(3, 4, 36).to(x),) * 2, x.flatten(2)
        ).view(3, 4, 6, 6),
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


def test_a_filter_of_two_groups_ties_the_channels_of_each() -> None:
    middle = lambda s, x: F.conv2d(x, torch.ones(4, 2, 1, 1).to(x), groups=2)  # noqa: E731
    units, _ = factors_keep(two_convolutions(middle), images())
    assert free(units) == {"a": 2}


def test_a_filter_that_an_activation_is_written_into_has_taps_anywhere() -> None:
    def middle(_: Net, x: Tensor) -> Tensor:
        weight = torch.eye(4, dtype=x.dtype).view(4, 4, 1, 1)
        weight[0, 1] = x[:, :1].mean()
        return F.conv2d(x, weight)

    factors_keep(two_convolutions(middle), images())


def test_views_of_a_mask_that_is_made_in_place_are_pinned() -> None:
    """A comparison in place would leave their ids to views of it."""

    def middle(_: Net, x: Tensor) -> Tensor:
        mask = x.clone()
        half = mask[:, :2]
        half.gt_(0)
        return x + mask

    factors_keep(two_convolutions(middle), images())


def test_running_statistics_that_are_read_elsewhere_keep_factor_1() -> None:
    for middle in (
        lambda s, x: s.n(x) + s.n.running_mean.view(4, 1, 1),
        lambda s, x: s.n(x + s.n.running_mean.view(4, 1, 1)),
        lambda s, x: s.n(x) * s.n.running_var.view(4, 1, 1),
    ):
        factors_keep(two_convolutions(middle, n=nn.BatchNorm2d(4)), images(), training=False)


def test_computed_statistics_and_affine_maps_keep_factor_1() -> None:
    for middle in (
        lambda s, x: F.batch_norm(x, s.c(x).mean((0, 2, 3)), torch.ones(4).to(x)),
        lambda s, x: F.batch_norm(x, None, None, s.c(x).mean((0, 2, 3)), training=True),
        lambda s, x: F.instance_norm(x, None, None, s.c(x).mean((0, 2, 3))),
        lambda s, x: F.layer_norm(x, (6, 6), s.c(x)[0, 0]),
    ):
        units, _ = factors_keep(two_convolutions(middle, c=nn.Conv2d(4, 4, 1)), images())
        assert "c" in pinned(units)
        assert "c" not in free(units)


def test_a_buffer_that_is_0_is_no_constant() -> None:
    def middle(s: Net, x: Tensor) -> Tensor:
        y = x * (x > s.level)
        s.level.add_(1)
        return y

    net = two_convolutions(middle, level=torch.zeros(1))
    net.register_buffer("level", torch.zeros(1), persistent=False)
    units, _ = factors_keep(net, images())
    assert pinned(units)["a"] == UNKNOWN.format("gt")
