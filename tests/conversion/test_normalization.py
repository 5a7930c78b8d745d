"""BatchNorm and the other normalizations: which units they make, and what they pin."""

from __future__ import annotations

import copy
from typing import Any

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
from torch import Tensor, nn

import pathconvert


def test_batch_norm_produces_the_units_and_the_convolution_keeps_its_weights() -> None:
    net = two_convolutions(lambda s, x: F.relu(s.n(x)), n=nn.BatchNorm2d(4))
    units, _ = factors_keep(net, images())
    assert free(units) == {"n": 4}
    assert unit_vector(units, "a.weight", "rows") == [-1] * 4
    c = pathconvert.reparameterize(net, images())
    assert torch.equal(c.model.a.weight, net.a.weight)
    assert torch.equal(c.model.n.running_var, net.n.running_var)


def test_batch_norm_on_a_concatenation_pins_what_comes_in_and_makes_new_units() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        first = s.a(x)
        second = s.b(F.relu(s.m(first)))
        return s.c(F.relu(s.n(torch.cat([first, second], 1))))

    net = Net(
        forward,
        a=nn.Conv2d(3, 4, 1),
        b=nn.Conv2d(4, 2, 1),
        c=nn.Conv2d(6, 2, 1),
        m=nn.BatchNorm2d(4),
        n=nn.BatchNorm2d(6),
    )
    units, _ = factors_keep(randomise(net), images())
    assert free(units) == {"m": 4, "n": 6}
    # only BatchNorms read a and b, so a factor would have no effect
    assert unit_vector(units, "a.weight", "rows") == [-1] * 4


def test_shared_batch_norm_on_two_convolutions() -> None:
    net = two_convolutions(lambda s, x: torch.cat([F.relu(s.n(s.c(x))), F.relu(s.n(s.d(x)))], 1), 8,
                           n=nn.BatchNorm2d(4), c=nn.Conv2d(4, 4, 1),
                           d=nn.Conv2d(4, 4, 1))  # fmt: skip
    units, _ = factors_keep(net, images())
    assert free(units) == {"a": 4, "n": 4}


def test_batch_norm_without_affine_is_pinned() -> None:
    net = two_convolutions(
        lambda s, x: s.c(F.relu(s.n(x))), c=nn.Conv2d(4, 4, 1), n=nn.BatchNorm2d(4, affine=False)
    )
    units, _ = factors_keep(net, images())
    assert free(units) == {"c": 4}
    assert unit_vector(units, "c.weight", "columns") == [-1] * 4


def test_gamma_tiny_negative_zero() -> None:
    net = two_convolutions(
        lambda s, x: s.m(s.c(F.relu(s.n(x)))),
        n=nn.BatchNorm2d(4),
        c=nn.Conv2d(4, 4, 1),
        m=nn.BatchNorm2d(4),
    )
    net.n.weight.data = torch.tensor([1e-6, -1e-6, 0.0, -2.0], dtype=torch.float64)
    net.m.weight.data = torch.tensor([0.0, 0.0, -1e-7, 3.0], dtype=torch.float64)
    for scope in ("block", "network"):
        for pivot in ("matching", "max", "diagonal"):
            for gauge in ("unit", "pow2"):
                c = pathconvert.reparameterize(net, images(), scope=scope, pivot=pivot, gauge=gauge)
                assert_same(net, c.model, images())
                assert_same(net, c.model, images(), training=True)
    diagonal = pathconvert.reparameterize(net, images(), pivot="diagonal", min_pivot=0)
    n = next(group for group in diagonal.groups if group.name == "n")
    assert n.pivots[:2] == (None, None), "the pivot's effective weight has γ = 0"
    assert n.scales[:2].tolist() == [1, 1]
    assert [p.parameter for p in n.pivots[2:]] == ["c.weight", "c.weight"]


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.LayerNorm([4, 6, 6])]
)
def test_other_normalizations_produce_units(norm: nn.Module) -> None:
    units, _ = factors_keep(
        two_convolutions(lambda s, x: F.relu(s.n(x)), n=copy.deepcopy(norm)), images()
    )
    assert pinned(units)["a"] == "enters the normalization n, which is not homogeneous"
    assert free(units) == {"n": 4}


def test_several_batch_norms_of_one_forward_have_names_of_their_own() -> None:
    def norm(s: Any, x: Tensor, k: int) -> Tensor:
        mean, var = getattr(s, f"mean{k}"), getattr(s, f"var{k}")
        return F.batch_norm(x, mean, var, getattr(s, f"gamma{k}"), getattr(s, f"beta{k}"))

    layers: dict[str, Any] = {"c": nn.Conv2d(4, 4, 1)}
    for k in (1, 2):
        layers |= {f"mean{k}": torch.randn(4), f"var{k}": torch.rand(4) + 0.5}
        layers |= {
            f"gamma{k}": nn.Parameter(torch.ones(4)),
            f"beta{k}": nn.Parameter(torch.ones(4)),
        }
    net = two_convolutions(lambda s, x: F.relu(norm(s, s.c(F.relu(norm(s, x, 1))), 2)), **layers)
    units, _ = factors_keep(net, images(), training=False)
    assert [call.name for call in units.batch_norms] == ["", "mean2"]
    assert [call.weight for call in units.batch_norms] == ["gamma1", "gamma2"]
