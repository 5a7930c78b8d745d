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
