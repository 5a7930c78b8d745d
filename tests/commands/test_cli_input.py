"""What the commands refuse, by the words on stderr: names, files, outputs."""

# ruff: noqa: ARG001 - fixtures are asked for what they do: `here` is the current folder

import json
import os
import pickle
import struct
import urllib.error
import zipfile
from pathlib import Path

import pytest
import torch
import torchvision
from checkpoint_files import Evil
from command_line import SMALL, tensors
from PIL import Image
from sample_networks import network
from torch import nn

from pathconvert.cli import run
from pathconvert.conversion.equivalence import EquivalenceReport
from pathconvert.files import writing
from pathconvert.networks import checked

EXPECTED = "expected a PyTorch checkpoint (.pt, .pth) or a .safetensors file."
BUILDER = """
from torch import nn

def grey(num_classes=10):
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
"""


# ---- naming the network --------------------------------------------------------------------------


def test_a_builder_in_the_current_folder(refused, here, capsys):
    Path("cli_test_nets.py").write_text(BUILDER)
    namespace: dict = {}
    exec(BUILDER, namespace)
    torch.manual_seed(0)
    torch.save(namespace["grey"](4).state_dict(), "grey.pt")
    named = ("--arch", "cli_test_nets:grey", "--num-classes", "4")
    assert refused("reparam", "grey.pt", *named) == [
        "error: the input size of cli_test_nets:grey is not known",
        "tip: Give it, for example --input-size 3x224x224",
    ]
    assert run(["reparam", "grey.pt", *named, "--input-size", "1x20x20"]) == 0
    assert run(["restore", "grey.path.safetensors"]) == 0
    assert run(["inspect", "grey.path.safetensors"]) == 0
    Path("photos").mkdir()
    Image.new("RGB", (30, 40), (200, 10, 10)).save("photos/red.jpg")
    capsys.readouterr()
    assert (
        run(["verify", "grey.path.safetensors", "grey.path.safetensors", "--images", "photos"]) == 0
    )
    # the converted file tells what the other is
    assert run(["verify", "grey.pt", "grey.path.safetensors"]) == 0
    assert run(["verify", "grey.path.safetensors", "grey.pt"]) == 0
    assert "same top-1 on 1 of 1" in capsys.readouterr().out


def test_wrong_names(refused):
    assert refused("reparam", "sq.pt", "--arch", "resnet5O") == [
        "error: 'resnet5O' is not a network that pathconvert knows",
        "tip: Did you mean resnet50, resnet152, resnet34?",
    ]
    assert refused("reparam", "resnet5O") == [
        "error: resnet5O is neither a file here nor a torchvision network that pathconvert knows.",
        "tip: Did you mean resnet50, resnet152, resnet34?",
    ]
    assert (
        "the tensors are not those of resnet18"
        in refused("reparam", "sq.pt", "--arch", "resnet18")[0]
    )
    assert (
        "classifier.1.weight has shape [5, 512, 1, 1], expected [7, 512, 1, 1]"
        in (refused("reparam", "sq.pt", "--num-classes", 7)[0])
    )


def test_offline_name(refused, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", "cache")
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    lines = refused("reparam", "squeezenet1_1")
    assert lines[0].startswith("error: the weights of squeezenet1_1 could not be downloaded")
    assert lines[1] == "tip: When offline, give a file with the weights instead of the name."


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("224", "squeezenet1_1 does not take inputs of size 224"),
        ("1x64x64", "squeezenet1_1 does not take inputs of size 1x64x64"),
        ("3x0x0", "'3x0x0' is not an input size"),
        ("big", "'big' is not an input size"),
        (
            "3x1x1",
            "cannot be followed on shapes alone: Calculated padded input size per channel: (1 x 1)",
        ),
    ],
)
def test_wrong_input_sizes(refused, size, message):
    assert message in refused("reparam", "sq.pt", "--input-size", size)[0]


# ---- the bad-input table of the issue ------------------------------------------------------------


def bad_file(name: str) -> Path:
    """A file for a row of the table."""
    state = tensors("sq.pt")
    first = "features.0.weight"
    path = Path(f"{name}.pt")
    if name == "quantized" or name == "integer":
        torch.save(state | {first: state[first].to(torch.int8)}, path)
    elif name == "nan":
        state[first].view(-1)[:2] = torch.tensor([float("nan"), float("inf")])
        torch.save(state, path)
    elif name == "missing_tensor":
        torch.save({k: v for k, v in state.items() if k != first}, path)
    elif name == "extra_tensor":
        torch.save(state | {"extra": torch.ones(2)}, path)
    elif name == "misshapen":
        torch.save(state | {"features.3.squeeze.weight": torch.ones(16, 60, 1, 1)}, path)
    elif name == "code":
        torch.save({"w": torch.ones(2), "evil": Evil(Path("canary"))}, path)
    elif name == "plain_code":
        path.write_bytes(pickle.dumps(Evil(Path("canary"))))
    elif name == "module":
        torch.save(nn.Linear(2, 2), path)
    elif name == "torchscript":
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), path)
    elif name == "onnx":
        path.write_bytes(bytes([8, 8, 18, 1, 120, 58, 2, 18, 0]))
    elif name == "optimizer":
        torch.save({"optimizer": torch.optim.SGD([torch.ones(1)], lr=0.1).state_dict()}, path)
    elif name == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "no checkpoint")
    elif name == "directory":
        path.mkdir()
    elif name in HEADERS:
        path = Path(f"{name}.safetensors")
        path.write_bytes(HEADERS[name])
    elif name != "absent":
        path.write_bytes(
            {
                "empty": b"",
                "text": b"hello, world\n",
                "random": bytes(range(250, 100, -1)),
                "truncated": Path("sq.pt").read_bytes()[:-1000],
            }[name]
        )
    return path


def safetensors_bytes(entries: dict, size: int) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def entry(begin: int, end: int, count: int) -> dict:
    return {"dtype": "F32", "shape": [count], "data_offsets": [begin, end]}


HEADERS = {
    "liar": safetensors_bytes({"a": entry(0, 8, 2000)}, 8),
    "overlap": safetensors_bytes({"a": entry(0, 8, 2), "b": entry(4, 12, 2)}, 12),
    "huge": struct.pack("<Q", 2_000_000_000) + b"{" + bytes(50),
}


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "absent": f"absent.pt does not exist; {EXPECTED}",
        "empty": f"empty.pt is empty (0 bytes); {EXPECTED}",
        "truncated": "truncated.pt is a truncated or damaged torch.save file",
        "random": (
            f"random.pt is unknown binary data (it begins with fa f9 f8 f7 f6 f5 f4 f3); {EXPECTED}"
        ),
        "text": f"text.pt is a text file (it begins with 'hello, world'); {EXPECTED}",
        "zip": (
            "zip.pt is a zip archive without a checkpoint in it (it contains 'readme.txt');"
            f" {EXPECTED}"
        ),
        "directory": "directory.pt is a folder without a checkpoint in it",
        "liar": (
            "is not an intact safetensors file: tensor 'a' needs 8000 bytes, but its offsets"
            " claim 8."
        ),
        "overlap": (
            "overlap.safetensors is not an intact safetensors file: tensors 'a' and 'b' overlap."
        ),
        "huge": (
            "is not an intact safetensors file: its header claims 2000000000 bytes, but only 51"
            " follow."
        ),
        "code": "code.pt: nothing in its 1 tensors resembles a torchvision network",
        "plain_code": (
            "plain_code.pt is a pickle with code in it and without weights (it calls"
            " 'posix.system'); nothing of it was executed."
        ),
        "module": "module.pt: nothing in its 2 tensors resembles a torchvision network",
        "nan": (
            "nan.pt has NaN or infinite weights: 2 of 1728 values in 'features.0.weight'; 1 of 52"
            " tensors affected."
        ),
        "missing_tensor": (
            "the closest is squeezenet1_1 (1 difference): features.0.weight is missing"
        ),
        "extra_tensor": "the closest is squeezenet1_1 (1 difference): extra is extra",
        "misshapen": (
            "features.3.squeeze.weight has shape [16, 60, 1, 1], expected [16, 64, 1, 1]"
        ),
        "integer": (
            "is a quantized or integer checkpoint ('features.0.weight' is int8); expected"
            " floating-point"
        ),
        "torchscript": f"torchscript.pt is a TorchScript archive (torch.jit.save); {EXPECTED}",
        "onnx": f"onnx.pt is an ONNX file; {EXPECTED}",
        "optimizer": (
            "is a checkpoint of an optimizer only, without the network's weights (its keys:"
            " 'optimizer')."
        ),
    }.items(),
)
def test_bad_input(refused, here, name, message):
    path = bad_file(name)
    lines = refused("reparam", path, "-o", "out.safetensors")
    assert message in lines[0]
    assert len(lines) == 2
    assert not Path("canary").exists()
    for command in ("restore", "inspect"):
        assert message in refused(command, path)[0]


def test_a_pickled_module_loads_when_trusted(here):
    torch.save(torchvision.models.squeezenet1_1(num_classes=5), "module.pt")
    assert run(["reparam", "module.pt", "--trust-pickle", *SMALL]) == 0


def test_outputs_that_cannot_be(refused, here, monkeypatch):
    for output, message in (
        ("no/x.pt", "The folder no of the output no/x.pt does not exist."),
        (
            "x.onnx",
            "x.onnx has the suffix '.onnx'; expected .safetensors, .pt, .pth, .ckpt, .bin,"
            " .pth.tar.",
        ),
    ):
        assert refused("reparam", "sq.pt", "-o", output)[0] == f"error: {message}"
    monkeypatch.setattr(writing.os, "access", lambda *_: False)  # root may write everywhere
    assert "is not writable." in refused("reparam", "sq.pt", "-o", "x.pt")[0]


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_full_disk(refused, here, monkeypatch, suffix):
    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(writing, "save_file", full)
    monkeypatch.setattr(torch, "save", full)
    lines = refused("reparam", "sq.pt", "-o", f"x.{suffix}", *SMALL)
    assert lines[0].startswith(f"error: x.{suffix} was not written: disk full: ")


def test_a_check_that_fails_leaves_no_file(refused, here, monkeypatch):
    assert run(["reparam", "sq.pt", "-o", "x.pt", *SMALL]) == 0
    wrong = EquivalenceReport(0.5, 0.5, 9.0, False, 1)
    monkeypatch.setattr(checked, "verify_conversion", lambda *_: wrong)
    for command, what in ((["reparam", "sq.pt"], "converted"), (["restore", "x.pt"], "restored")):
        lines = refused(*command, "-o", "y.pt", *SMALL, code=1)
        assert (
            lines[0]
            == f"error: the {what} network differs from the original: its error is 9 times the"
            " noise of the dtype (limit: 4), largest difference 0.5; no file was written"
        )


def test_unsupported_activation(refused, here):
    torch.save(network("mobilenet_v2").state_dict(), "m.pt")
    lines = refused("reparam", "m.pt", *SMALL)
    assert "features.0.2 is ReLU6, which is not positively homogeneous" in lines[0]
    assert "--partial" in lines[1]
    assert run(["reparam", "m.pt", "--partial", *SMALL]) == 0
