"""A network in which BatchNorms read activations, and that has a deploy form, is told so."""

import pytest
import torch
from torch import nn

import pathconvert
from pathconvert.conversion.deploy_forms import METHODS, deploy_hint


class Block(nn.Module):
    """A convolution beside a BatchNorm of the activation itself."""

    def __init__(self):
        super().__init__()
        self.conv, self.identity = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return torch.relu(self.conv(x) + self.identity(x))


def hint(model):
    return deploy_hint(pathconvert.reparameterize(model.eval(), torch.zeros(1, 3, 8, 8)))


@pytest.mark.parametrize("method", METHODS)
def test_the_method_is_named(method):
    kind = type("Rep", (Block,), {method: lambda _: None})
    assert hint(nn.Sequential(kind(), kind())) == (
        "BatchNorms beside convolutions read activations here; the network has a deploy form"
        f" without them (Rep.{method}(), as in 0): bring every such module into it and convert the"
        " result, if it will not be trained further in this form."
    )


def test_nothing_is_said_without_such_a_method_or_such_a_batch_norm():
    assert hint(nn.Sequential(Block(), Block())) is None
    kind = type("Fusing", (nn.Conv2d,), {"fuse": lambda _: None})
    assert hint(nn.Sequential(kind(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), kind(3, 2, 1))) is None


def test_timms_repvgg_has_a_deploy_form():
    timm = pytest.importorskip("timm")
    assert "RepVggBlock.reparameterize(), as in stem" in hint(timm.create_model("repvgg_a0"))
