"""What a forward keeps for the next one: the first call alone does not show who reads it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pathconvert


class Remembers(nn.Module):
    """Adds an inner activation of the call before."""

    def __init__(self, memory: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        self.memory = memory

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        z = self.b(y).relu()
        if self.memory:
            z = z + self.memory["last"]
        self.memory["last"] = y
        return self.c(z)


class RemembersAsAttribute(Remembers):
    """The same, in an attribute that is None at first."""

    def __init__(self) -> None:
        super().__init__(None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        z = self.b(y).relu()
        z = z if self.memory is None else z + self.memory
        self.memory = y
        return self.c(z)


@pytest.mark.parametrize("scope", ["block", "network"])
@pytest.mark.parametrize("made", [lambda: Remembers({}), RemembersAsAttribute])
def test_what_one_call_keeps_and_the_next_reads_shares_its_factor(made: Any, scope: Any) -> None:
    model = made().double().eval()
    images = torch.randn(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    conversion = pathconvert.reparameterize(model, images[0], scope)
    assert [group.producers for group in conversion.groups] == [("a", "b"), ("c",)]
    with torch.no_grad():
        expected = [model(image) for image in images]
        found = [conversion.model(image) for image in images]
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-12)
    assert (conversion.counts()["channels_rescaled"] > 0) == (scope == "network")


class Overwrites(nn.Module):
    """Reads a constant filter that keeps channels apart, and then writes other numbers into it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.register_buffer("filter", torch.eye(4)[..., None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        filter_ = self.get_buffer("filter")
        y = self.c(torch.conv2d(self.a(x).relu(), filter_))
        filter_[0].copy_(x.mean().expand(4, 1, 1))
        return y


def test_a_constant_that_one_call_overwrites_is_none_in_the_next() -> None:
    conversion = pathconvert.reparameterize(Overwrites().eval(), torch.zeros(1, 3, 4, 4))
    (group,) = (group for group in conversion.groups if "a" in group.producers)
    assert group.size == 1  # the four channels that the filter mixes from the second call on


def test_a_network_that_keeps_nothing_is_traced_once_in_each_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    calls = []
    model.register_forward_pre_hook(lambda module, _: calls.append(module.training))
    pathconvert.reparameterize(model.eval(), torch.zeros(1, 3, 4, 4))
    assert calls == [False, True]
