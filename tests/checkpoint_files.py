"""What the tests of checkpoints share: a small network, a hostile object, and refusals of files."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import pytest
import torch
from torch import nn

from pathconvert.errors import CheckpointError
from pathconvert.files.checkpoint import read_checkpoint
from pathconvert.files.weights import check_weights

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


def refused_weights(path: Path) -> tuple[str, str]:
    """The message and the tip with which the tensors in ``path`` are refused as weights."""
    tensors = read_checkpoint(path).tensors
    with pytest.raises(CheckpointError) as caught:
        check_weights(path, tensors)
    return str(caught.value).replace(f"{path.parent}/", ""), caught.value.tip


def tar_of(state: dict) -> bytes:
    """A file as torch 0.1.6 wrote it: storages, tensors, and a pickle that refers to tensors."""
    storages, tensors, main = io.BytesIO(), io.BytesIO(), io.BytesIO()
    pickle.dump(len(state), storages, 2)
    pickle.dump(len(state), tensors, 2)
    keys = {id(tensor): 100 + i for i, tensor in enumerate(state.values())}
    for tensor in state.values():
        key = keys[id(tensor)]
        kind = torch.LongStorage if tensor.dtype == torch.int64 else torch.FloatStorage
        pickle.dump((key, "cpu", kind), storages, 2)
        storages.write(tensor.numel().to_bytes(8, "little") + tensor.numpy().tobytes())
        pickle.dump((key, key, type(tensor)), tensors, 2)
        numbers = [*tensor.shape, *tensor.stride(), 0]
        tensors.write(tensor.ndim.to_bytes(4, "little") + bytes(4))
        tensors.write(b"".join(number.to_bytes(8, "little") for number in numbers))
    pickle.dump([], storages, 2)
    pickler = pickle.Pickler(main, 2)
    pickler.persistent_id = lambda value: (
        str(keys[id(value)]) if isinstance(value, torch.Tensor) else None
    )
    pickler.dump(dict(state))
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:") as tar:
        for name, part in (("storages", storages), ("tensors", tensors), ("pickle", main)):
            member = tarfile.TarInfo(name)
            member.size = part.tell()
            part.seek(0)
            tar.addfile(member, part)
    return file.getvalue()
