"""What the tests of checkpoints share: a small network, a hostile object, and refusals of files."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from pathconvert.errors import CheckpointError
from pathconvert.files.checkpoint import read_checkpoint

EXPECTED = "expected a PyTorch checkpoint (.pt, .pth) or a .safetensors file."
AGAIN = "Download or copy the file again, and compare its size with the original's."


class Net(nn.Sequential):
    """A small network with every kind of state: weights, running statistics, a counter."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


class Evil:
    """An object that creates the file ``canary`` when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def assert_same(tensors: dict, expected: dict) -> None:
    assert set(tensors) == set(expected)
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name


def refusal(path: Path, **options) -> tuple[str, str]:
    """The message and the tip with which ``path`` is refused, both without its folder."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path, **options)
    message, tip = str(caught.value), caught.value.tip
    assert "\n" not in message + tip
    assert str(path) in message
    assert tip
    return message.replace(f"{path.parent}/", ""), tip.replace(f"{path.parent}/", "")
