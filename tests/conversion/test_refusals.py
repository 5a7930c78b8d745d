"""What cannot be followed, and what is refused: in parts, or by its message."""

# ruff: noqa: ARG005 - every forward takes (network, x), used or not

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from layer_networks import OUTPUT, Net, assert_same, images, randomise, two_convolutions
from torch import Tensor, nn

import pathconvert
from pathconvert.errors import RefusedNetwork, TraceError

# ---- what cannot be followed ---------------------------------------------------------------------


def test_control_flow_on_numbers_takes_the_network_apart() -> None:
    part = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    net = randomise(Net(lambda s, x: s.part(x) if x.sum() > 0 else s.part(-x), part=part))
    c = pathconvert.reparameterize(net, images())
    assert c.parts == ("part",)
    assert {g.name: g.pinned_by for g in c.groups} == {
        "part.0": None, "part.2": "is an output of part, which is converted by itself",
    }  # fmt: skip
    assert_same(net, c.model, images())
    bare = Net(
        lambda s, x: F.conv2d(x, s.w) * float(x.max()), w=nn.Parameter(torch.zeros(2, 3, 1, 1))
    )
    with pytest.raises(
        TraceError, match=r"^the forward of the network cannot be followed on shapes alone: "
    ) as error:
        pathconvert.reparameterize(bare, images())
    assert "item() cannot be called on meta tensors" in str(error.value)


def test_a_network_taken_apart_keeps_its_buffers() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        s.calls += 1
        return s.part(x) * float(x.max())

    part = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    net = randomise(Net(forward, part=part, calls=torch.zeros(1)))
    assert pathconvert.reparameterize(net, images()).parts == ("part",)
    assert float(net.calls) == 0


def test_scripted_child_is_never_silently_wrong() -> None:
    class Squash(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x)

    net = two_convolutions(lambda s, x: s.t(F.relu(x)), t=torch.jit.script(Squash()))
    c = pathconvert.reparameterize(net, images())
    assert c.groups[0].pinned_by == "enters t (tanh.default), which is not known to be homogeneous"
    assert all(group.pinned_by for group in c.groups)
    assert_same(net, c.model, images())


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ReLU6", "Hardswish", "SiLU", "GELU", "Tanh", "ELU"])
def test_refused_activations(kind: str) -> None:
    body = nn.Sequential(
        nn.Conv2d(3, 4, 1), getattr(nn, kind)(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )
    net = randomise(Net(lambda s, x: s.body(x), body=body))
    with pytest.raises(RefusedNetwork) as error:
        pathconvert.reparameterize(net, images())
    assert (
        str(error.value)
        == f"body.1 is {kind}, which is not positively homogeneous: Net cannot be moved to path"
        " space as a whole"
    )
    assert (
        error.value.tip
        == "--partial (partial=True) pins what enters such an activation and converts the rest"
    )
    c = pathconvert.reparameterize(net, images(), partial=True)
    assert {g.name: g.pinned_by for g in c.groups} == {
        "body.0": f"enters body.1 ({kind}), which is not homogeneous", "body.2": None,
        "body.4": OUTPUT,
    }  # fmt: skip
    assert not np.allclose(c.groups[1].scales, 1)
    assert_same(net, c.model, images())


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("relu6", lambda x: F.relu6(x)),
        ("clamp", lambda x: x.clamp(0, 6)),
        ("clip", lambda x: x.clip(0, 6)),
        ("tanh", torch.tanh),
    ],
)
def test_refused_functions(name: str, call: Any) -> None:
    with pytest.raises(RefusedNetwork) as error:
        pathconvert.reparameterize(two_convolutions(lambda s, x: call(x)), images())
    assert (
        str(error.value)
        == f"the network calls {name}, which is not positively homogeneous: Net cannot be moved to"
        " path space as a whole"
    )
