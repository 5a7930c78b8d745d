"""A network whose BatchNorms pin channels, and that has a deploy form, is told so."""

import pytest
import torch
from torch import nn

from pathconvert.conversion.deploy_forms import METHODS, deploy_hint

PINNED = "enters the BatchNorm 0.identity, which normalises any factor away"


class Block(nn.Module):
    """A convolution beside a BatchNorm of the activation itself."""

    def __init__(self):
        super().__init__()
        self.conv, self.identity = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.conv(x) + self.identity(x)


@pytest.mark.parametrize("method", METHODS)
def test_the_method_is_named(method):
    kind = type("Rep", (Block,), {method: lambda _: None})
    hint = deploy_hint(nn.Sequential(kind(), kind()), [None, PINNED])
    assert hint == (
        "BatchNorms that read an activation pin channels; the network has a deploy form without"
        f" them (Rep.{method}(), as in 0): bring every such module into it and convert the result,"
        " if it will not be trained further in this form."
    )


def test_nothing_is_said_without_such_a_method_or_such_a_pin():
    assert deploy_hint(nn.Sequential(Block()), [PINNED]) is None
    kind = type("Rep", (Block,), {"fuse": lambda _: None})
    assert deploy_hint(nn.Sequential(kind()), [None, "is a network output"]) is None


def test_timms_repvgg_has_a_deploy_form():
    timm = pytest.importorskip("timm")
    import pathconvert

    model = timm.create_model("repvgg_a0").eval()
    conversion = pathconvert.reparameterize(model, torch.zeros(1, 3, 32, 32))
    hint = deploy_hint(model, [group.pinned_by for group in conversion.groups])
    assert hint is not None
    assert "RepVggBlock.reparameterize(), as in stem" in hint
