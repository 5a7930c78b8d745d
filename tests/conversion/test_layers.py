"""Layers: convolutions of every kind, shared and computed weights, biases and slopes."""

# ruff: noqa: ARG005 - every forward takes (network, x), used or not

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from layer_networks import (
    Net,
    assert_same,
    factors_keep,
    free,
    images,
    pinned,
    randomise,
    two_convolutions,
    unit_vector,
)
from torch import nn
from torch.nn.utils import prune

import pathconvert


def test_flatten_gives_a_channel_all_its_columns() -> None:
    net = randomise(
        Net(
            lambda s, x: s.l(torch.flatten(F.relu(s.a(x)), 1)),
            a=nn.Conv2d(3, 4, 1),
            l=nn.Linear(144, 2),
        )
    )
    units, _ = factors_keep(net, images())
    assert unit_vector(units, "l.weight", "columns") == [k for k in range(4) for _ in range(36)]
    c = pathconvert.reparameterize(net, images(), pivot="diagonal")
    assert [(p.row, p.column) for p in c.groups[0].pivots] == [(0, 18), (1, 54), (0, 90), (1, 126)]


@pytest.mark.parametrize("groups", [1, 2, 4], ids=["dense", "grouped", "depthwise"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_consumers(groups: int, dims: int, transposed: bool) -> None:
    names = ("ConvTranspose" if transposed else "Conv") + f"{dims}d"
    layer = getattr(nn, names)
    net = Net(
        lambda s, x: s.c(F.relu(s.b(F.relu(s.a(x))))), a=layer(2, 4, 3),
        b=layer(4, 8, 3, groups=groups, padding=1),
        c=layer(8, 2, 1),
    )  # fmt: skip
    x = images(2, dims=dims)
    units, _ = factors_keep(randomise(net), x)
    assert free(units) == {"a": 4, "b": 8}
    for pivot in ("matching", "max", "diagonal"):
        c = pathconvert.reparameterize(net, x, pivot=pivot)
        assert_same(net, c.model, x)
        for channel, chosen in enumerate(c.groups[0].pivots):
            assert chosen.row // (8 // groups) == channel // (4 // groups), (
                "the pivot lies in the channel's own block"
            )


def test_one_channel_convolution_is_dense_although_groups_equals_channels() -> None:
    net = randomise(
        Net(
            lambda s, x: s.c(s.b(s.a(x))),
            a=nn.Conv2d(3, 4, 1),
            b=nn.Conv2d(4, 1, 1),
            c=nn.Conv2d(1, 1, 1),
        )
    )
    assert net.c.groups == net.c.out_channels == 1
    units, _ = factors_keep(net, images())
    assert free(units) == {"a": 4, "b": 1}


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_modes_and_dilation(mode: str) -> None:
    net = two_convolutions(
        lambda s, x: F.relu(x), b=nn.Conv2d(4, 5, 3, padding=2, dilation=2, padding_mode=mode)
    )
    units, _ = factors_keep(net, images())
    assert free(units) == {"a": 4}


def test_module_called_on_siblings() -> None:
    net = two_convolutions(
        lambda s, x: torch.cat([s.c(F.relu(x)), s.c(F.leaky_relu(x))], 1), 6, c=nn.Conv2d(4, 3, 1)
    )
    units, _ = factors_keep(net, images())
    assert free(units) == {"a": 4, "c": 3}
    assert unit_vector(units, "b.weight", "columns") == [4, 5, 6, 4, 5, 6]


def test_module_called_on_its_own_output() -> None:
    net = two_convolutions(lambda s, x: F.relu(s.c(F.relu(s.c(x)))), c=nn.Conv2d(4, 4, 1))
    units, _ = factors_keep(net, images())
    assert free(units) == {"a": 4}


def test_shared_weight_under_two_names() -> None:
    net = two_convolutions(
        lambda s, x: F.relu(s.d(F.relu(s.c(x)))), c=nn.Conv2d(4, 4, 1), d=nn.Conv2d(4, 4, 1)
    )
    net.d.weight = net.c.weight
    units, _ = factors_keep(net, images())
    assert free(units) == {"a": 4}


def test_tied_autoencoder_is_pinned() -> None:
    w = nn.Parameter(torch.zeros(4, 6))
    net = randomise(
        Net(lambda s, x: F.linear(F.relu(F.linear(s.a(x), s.w)), s.w.t()), a=nn.Linear(3, 6), w=w)
    )
    units, _ = factors_keep(net, torch.randn(3, 3, dtype=torch.float64))
    assert free(units) == {}
    assert pinned(units)["a"] == "meets a second use of w in another role"


def test_a_parameter_in_two_roles_is_pinned() -> None:
    p = nn.Parameter(torch.zeros(4))
    net = two_convolutions(
        lambda s, x: F.relu(F.conv2d(x, s.w, s.p)) * s.p.view(-1, 1, 1),
        p=p,
        w=nn.Parameter(torch.zeros(4, 4, 1, 1)),
    )
    units, _ = factors_keep(net, images())
    assert "p" not in free(units)
    assert free(units)["a"] == 4


def test_a_slope_that_is_another_layers_parameter_is_pinned() -> None:
    net = two_convolutions(lambda s, x: F.prelu(s.n(x), s.n.weight), n=nn.BatchNorm2d(4))
    units, _ = factors_keep(net, images())
    assert pinned(units)["n"] == "meets a tensor that is not rescaled in a second use of n.weight"


def test_prelu_module_is_free() -> None:
    for width in (1, 4):
        units, traced = factors_keep(
            two_convolutions(lambda s, x: s.p(x), p=nn.PReLU(width)), images()
        )
        assert free(units) == {"a": 4}
        assert traced.left_alone == {}


def test_weight_and_spectral_norm_are_pinned_and_stay_right() -> None:
    for wrap in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        net = two_convolutions(
            lambda s, x: F.relu(s.c(F.relu(x))), c=wrap(nn.Conv2d(4, 4, 1)).double()
        )
        units, _ = factors_keep(
            net, images(), training=wrap is nn.utils.parametrizations.weight_norm
        )
        assert pinned(units)["a"] == "enters c (conv2d), which is not known to be homogeneous"
        assert free(units) == {}


def test_weights_that_hooks_compute_are_pinned_and_copied() -> None:
    def pruned(layer: nn.Module) -> nn.Module:
        return prune.l1_unstructured(layer, "weight", 0.5)

    # both keep a computed tensor, which deepcopy cannot copy
    for wrap in (
        pruned,
        torch.nn.utils.weight_norm,
    ):
        net = two_convolutions(
            lambda s, x: F.relu(s.c(F.relu(x))), c=wrap(nn.Conv2d(4, 4, 1)).double()
        )
        before = net.c.weight
        c = pathconvert.reparameterize(net, images())
        assert net.c.weight is before
        assert c.groups[0].pinned_by == "enters c (conv2d), which is not known to be homogeneous"
        with torch.no_grad():
            assert torch.equal(net(images()), c.model(images()))
        assert pathconvert.verify(net, c.model, images()).passed


def test_convolution_bias_and_none() -> None:
    for bias in (True, False):
        units, _ = factors_keep(
            two_convolutions(lambda s, x: F.relu(x), b=nn.Conv2d(4, 5, 1, bias=bias)), images()
        )
        assert free(units) == {"a": 4}


def test_a_bias_that_is_broadcast_and_a_weight_vector() -> None:
    net = randomise(
        Net(lambda s, x: F.linear(F.linear(s.a(x), s.w, s.b), s.v), a=nn.Linear(3, 4),
            w=nn.Parameter(torch.zeros(4, 4)), b=nn.Parameter(torch.zeros(1)),
            v=nn.Parameter(torch.zeros(4)))
    )  # fmt: skip
    units, _ = factors_keep(net, torch.randn(3, 3, dtype=torch.float64))
    assert free(units) == {}
