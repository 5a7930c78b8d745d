"""Pivots and factors: each rule's choice, dead channels, signs."""

# ruff: noqa: ARG005 - every forward takes (network, x), used or not

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from layer_networks import Net, assert_same, images, randomise, two_convolutions
from torch import nn

import pathconvert
from pathconvert.conversion import pivots as pivots_module


def test_matching_takes_no_row_twice_while_rows_are_free() -> None:
    for width in (3, 5, 9):
        net = randomise(
            Net(
                lambda s, x: s.b(F.relu(s.a(x))), a=nn.Conv2d(3, width, 1), b=nn.Conv2d(width, 5, 1)
            )
        )
        rows = [
            p.row
            for p in pathconvert.reparameterize(net, images(), pivot="matching").groups[0].pivots
        ]
        counts = np.bincount(rows, minlength=5)
        assert counts.max() <= -(-width // 5), f"width {width}: rows {rows}"


def test_matching_maximises_the_product() -> None:
    net = randomise(Net(lambda s, x: s.b(F.relu(s.a(x))), a=nn.Linear(2, 2), b=nn.Linear(2, 2)))
    net.b.weight.data = torch.tensor([[10.0, 9.0], [8.0, 1.0]], dtype=torch.float64)
    rows = [
        p.row for p in pathconvert.reparameterize(net, torch.zeros(1, 2).double()).groups[0].pivots
    ]
    assert rows == [1, 0], "8 · 9 > 10 · 1"


def test_wide_layers_fall_back_to_max_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    net = two_convolutions(lambda s, x: F.relu(x))
    assert pathconvert.reparameterize(net, images()).pivot_fallbacks == ()
    monkeypatch.setattr(pivots_module, "WIDEST_MATCHING", 19)
    c = pathconvert.reparameterize(net, images())
    assert c.pivot_fallbacks == ("b.weight",)
    assert (
        c.groups[0].pivots
        == pathconvert.reparameterize(net, images(), pivot="max").groups[0].pivots
    )


def test_dead_channels_are_left_alone() -> None:
    net = two_convolutions(lambda s, x: F.relu(x))
    net.b.weight.data[:, 1] = 0  # nothing leaves channel 1
    net.a.weight.data[2] = 0  # nothing enters channel 2
    net.a.bias.data[2] = 0
    for pivot in ("matching", "max", "diagonal"):
        c = pathconvert.reparameterize(net, images(), pivot=pivot)
        assert c.groups[0].pivots[1] is None
        assert c.groups[0].scales[1] == 1
        assert c.groups[0].pivots[2] is not None
        assert c.counts()["channels_dead"] == 1
        assert_same(net, c.model, images())


def test_an_exactly_zero_diagonal_pivot_is_left_alone() -> None:
    net = two_convolutions(lambda s, x: F.relu(x))
    net.b.weight.data[2, 2, 1, 1] = 0
    group = pathconvert.reparameterize(net, images(), pivot="diagonal").groups[0]
    assert [pivot is None for pivot in group.pivots] == [False, False, True, False]
    assert group.scales[2] == 1


def test_pivot_signs_are_kept() -> None:
    net = two_convolutions(lambda s, x: F.relu(x))
    c = pathconvert.reparameterize(net, images(), pivot="diagonal")
    diagonal = [float(net.b.weight.detach()[k, k, 1, 1]) for k in range(4)]
    assert [p.sign for p in c.groups[0].pivots] == np.sign(diagonal).tolist()
    assert [float(c.model.b.weight.detach()[k, k, 1, 1]) for k in range(4)] == pytest.approx(
        np.sign(diagonal).tolist(), rel=1e-12
    )
    assert (c.groups[0].scales > 0).all()
