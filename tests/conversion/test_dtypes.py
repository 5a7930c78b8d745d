"""What a conversion keeps: dtypes, their range, modes, ``requires_grad`` and buffers."""

# ruff: noqa: ARG005 - every forward takes (network, x), used or not

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_networks import images, residual_network, two_convolutions
from torch import nn

import pathconvert


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("gauge", ["unit", "pow2"])
def test_dtypes_are_kept(dtype: torch.dtype, gauge: Any) -> None:
    net, x = residual_network().to(dtype), images().to(dtype)
    c = pathconvert.reparameterize(net, x, scope="network", gauge=gauge)
    assert {p.dtype for p in c.model.parameters()} == {dtype}
    report = pathconvert.verify(net, c.model, x)
    assert report.passed
    restored = pathconvert.restore(c.model, c.record).state_dict()
    if gauge == "pow2":
        assert report.bit_identical
        assert all(torch.equal(tensor, restored[name]) for name, tensor in net.state_dict().items())
    for name, tensor in net.named_parameters():
        rounding = 2 * torch.finfo(dtype).eps * tensor.double().abs()
        assert bool(((restored[name].double() - tensor.double()).abs() <= rounding).all()), name


@pytest.mark.parametrize("weight", [2e-5, 3e4], ids=["small", "huge"])
@pytest.mark.parametrize("gauge", ["unit", "pow2"])
def test_a_factor_that_would_leave_float16_is_held_back(weight: float, gauge: Any) -> None:
    net = two_convolutions(lambda s, x: F.relu(x)).half()
    net.b.weight.data[:, 1] = weight
    # no factor but 1 suits both the smallest normal number and one of the largest
    net.a.weight.data[1, 0], net.a.weight.data[1, 1] = 6.2e-5, 6e4
    c = pathconvert.reparameterize(net, images().half(), gauge=gauge)
    group = c.groups[0]
    assert group.held_back.tolist() == [False, True, False, False]
    assert group.scales[1] == 1
    assert group.pivots[1] is None
    assert c.counts()["channels_held_back"] == 1
    assert c.counts()["channels_rescaled"] == 3
    assert all(bool(torch.isfinite(p).all()) for p in c.model.parameters())
    restored = pathconvert.restore(c.model, c.record)
    if gauge == "pow2":
        assert all(
            torch.equal(a, b) for a, b in zip(net.parameters(), restored.parameters(), strict=True)
        )


def test_training_mode_requires_grad_and_buffers_are_kept() -> None:
    net = two_convolutions(
        lambda s, x: F.relu(s.n(x)) + s.shift, n=nn.BatchNorm2d(4), shift=torch.zeros(1).double()
    )
    net.train()
    net.n.eval()
    net.a.weight.requires_grad_(False)
    c = pathconvert.reparameterize(net, images())
    for name, module in net.named_modules():
        assert c.model.get_submodule(name).training == module.training == (name != "n")
    grads = {name: p.requires_grad for name, p in c.model.named_parameters()}
    assert grads == {name: p.requires_grad for name, p in net.named_parameters()}
    assert [name for name, wanted in grads.items() if not wanted] == ["a.weight"]
    assert not {p.data_ptr() for p in net.parameters()} & {
        p.data_ptr() for p in c.model.parameters()
    }
    assert list(dict(c.model.named_buffers())) == list(dict(net.named_buffers()))
