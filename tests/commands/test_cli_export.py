"""The export command."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from sample_networks import network, randomise
from torch import nn

from pathconvert.cli import run
from pathconvert.errors import PathconvertError
from pathconvert.export.card import read_card
from pathconvert.export.graph import export as onnx_export
from pathconvert.export.graph import loaded
from pathconvert.networks.architectures import Architecture

BUILDER = """
from torch import nn

def tiny(num_classes=5):
    convolutions = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, num_classes, 3)
    layers = *convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers)
"""
TINY = ("--arch", "export_test_net:tiny", "--input-size", "3x16x16")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder but for a network in ``tiny.pt``, the module that builds it, and two
    images.
    """
    (tmp_path / "export_test_net.py").write_text(BUILDER)
    tiny = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3))
    torch.save(randomise(tiny).state_dict(), tmp_path / "tiny.pt")
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 70, 90, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / "photos" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("export_test_net", None)
    return tmp_path


FILES = ["export_test_net.py", "photos", "tiny.pt"]


def files() -> list[str]:
    return sorted(name for name in os.listdir() if name != "__pycache__")


@pytest.mark.usefixtures("here")
def test_the_command_prints_a_table(capsys):
    assert run(["export", "tiny.pt", *TINY]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for text in (
        "tiny.pt → tiny.onnx",
        "opset 20, fp32, 5 nodes, no BatchNorm",
        "× the weights",
        "float32's own noise",
    ):
        assert text in printed.out, text
    assert files() == sorted([*FILES, "tiny.onnx"])


@pytest.mark.usefixtures("here")
def test_the_command_with_every_option(capsys):
    torch.save(network("squeezenet1_1", num_classes=5).state_dict(), "sq.pt")
    options = [
        "--batch",
        "2",
        "--images",
        "photos",
        "--with-softmax",
        "--with-preprocessing",
        "--gauge",
        "balanced",
    ]
    assert (
        run(
            [
                "export",
                "sq.pt",
                "--json",
                "--input-size",
                "3x64x64",
                "--precision",
                "fp16",
                *options,
            ]
        )
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    card = read_card(onnx.load("sq.onnx"))
    assert result["card"] == json.loads(json.dumps(card.to_json()))
    assert card.architecture.name == "squeezenet1_1"
    assert (card.form, card.source_name, card.labels, card.precision) == (
        "plain",
        "sq.pt",
        None,
        "fp16",
    )
    assert len(card.source_sha256) == 64
    assert result["checked_shapes"] == [[2, 3, 64, 64]]


@pytest.mark.usefixtures("here")
def test_half_inputs_and_outputs(capsys):
    torch.save(network("squeezenet1_1", num_classes=5).state_dict(), "sq.pt")
    options = ["--input-size", "3x64x64", "--precision", "fp16", "--gauge", "balanced"]
    assert run(["export", "sq.pt", *options, "--io-dtype", "fp16"]) == 0
    graph = onnx.load("sq.onnx").graph
    assert {port.type.tensor_type.elem_type for port in (*graph.input, *graph.output)} == {
        onnx.TensorProto.FLOAT16
    }
    assert run(["predict", "sq.onnx", "photos"]) == 0
    assert run(["export", "sq.pt", "-o", "x.onnx", "--io-dtype", "fp16"]) == 2
    assert (
        "inputs and outputs in 'fp16' are not offered with precision fp32"
        in capsys.readouterr().err
    )


@pytest.mark.usefixtures("here")
def test_a_converted_network_exports_as_it_is(capsys):
    assert run(["reparam", "tiny.pt", "-o", "t.path.safetensors", *TINY]) == 0
    assert run(["export", "t.path.safetensors", "-o", "p.onnx"]) == 0
    assert "form       path" in capsys.readouterr().out
    assert read_card(onnx.load("p.onnx")).form == "path"
    assert run(["export", "tiny.pt", "-o", "q.onnx", *TINY]) == 0
    weights = [
        {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(f).graph.initializer}
        for f in ("p.onnx", "q.onnx")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert not np.array_equal(weights[0]["0.weight"], weights[1]["0.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--opset", "13"], "error: opset 13 is not offered: pathconvert writes 18 to 24"),
        (
            ["--precision", "bf16"],
            "error: precision bf16 is not offered: the exporter writes invalid files for it",
        ),
        (["--batch", "many"], "error: 'many' is not a batch size"),
        (["-o", "t.bin"], "error: t.bin has the suffix '.bin'; expected .onnx."),
        (["-o", "gone/t.onnx"], "error: The folder gone of the output gone/t.onnx does not exist."),
    ],
)
@pytest.mark.usefixtures("here")
def test_the_command_refuses(capsys, options, message):
    assert run(["export", "tiny.pt", *TINY, *options]) == 2
    assert capsys.readouterr().err.splitlines()[0] == message
    assert files() == FILES


@pytest.mark.usefixtures("here")
def test_the_command_fails_with_1_where_the_graph_is_another(capsys, monkeypatch):
    monkeypatch.setattr(onnx_export.verification, "FILE_NOISE_RATIO", 1e-3)
    assert run(["export", "tiny.pt", *TINY]) == 1
    message = (
        "error: the exported graph does not compute what the network computes: the largest"
        " error is "
    )
    assert capsys.readouterr().err.startswith(message)
    assert files() == FILES


@pytest.mark.usefixtures("here")
def test_preprocessing_that_is_not_known_is_refused(capsys):
    assert run(["export", "tiny.pt", *TINY, "--with-preprocessing"]) == 2
    assert "the preprocessing of export_test_net:tiny is not known" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_detectors_are_refused():
    opened = loaded.LoadedNetwork(
        nn.Identity(), Architecture("ssd300_vgg16", {}, (3, 300, 300), "detection"), None, ()
    )
    with pytest.raises(
        PathconvertError, match=r"^ssd300_vgg16 is a detector and is not exported: "
    ):
        loaded.export_network(opened, Path("x.onnx"))
