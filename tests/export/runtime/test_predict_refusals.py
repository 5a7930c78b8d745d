"""What ``predict`` refuses, and what it says about images that it cannot use."""

# ruff: noqa: ARG001 - fixtures are asked for what they do: `here` is the current folder

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from onnx_files import save_linear
from pictures import squeezenet
from PIL import Image

from pathconvert.cli import run
from pathconvert.errors import CheckpointError, PathconvertError, RuntimeUnavailable
from pathconvert.export.runtime.predict import predict

GPU = torch.cuda.is_available()


def test_a_wrong_size(here):
    with pytest.raises(PathconvertError, match=r"^a.onnx takes images of size 3x4x4, not 3x8x8$"):
        predict("a.onnx", ["a.png"], device="cpu", input_size=(3, 8, 8))


def test_networks_that_classify_no_images(here):
    with pytest.raises(
        CheckpointError,
        match=(
            "sq is not an image classifier: squeezenet1_1 is for segmentation and takes inputs of"
            " size 3x64x64"
        ),
    ):
        predict("sq", ["a.png"], device="cpu", load=lambda _: squeezenet("segmentation"))


def test_numbers_that_are_none(here):
    broken = squeezenet()
    with torch.no_grad():
        broken.model.classifier[1].bias.fill_(torch.nan)
    with pytest.raises(PathconvertError, match="sq gives outputs that are not finite"):
        predict("sq", ["a.png"], device="cpu", load=lambda _: broken)


@pytest.mark.skipif(GPU, reason="asks for a GPU where there is none")
def test_devices_of_a_checkpoint(here):
    assert predict("sq", ["a.png"], load=lambda _: squeezenet()).fallback == "torch finds no GPU"
    with pytest.raises(RuntimeUnavailable, match="sq cannot run on cuda: torch finds no GPU here"):
        predict("sq", ["a.png"], device="cuda", load=lambda _: squeezenet())
    with pytest.raises(
        RuntimeUnavailable, match=r"tensorrt only runs \.onnx files, and sq is not one"
    ):
        predict("sq", ["a.png"], device="tensorrt", load=lambda _: squeezenet())


def test_refusals_end_with_code_two(here, capsys):
    (here / "cut.png").write_bytes((here / "a.png").read_bytes()[:300])
    (here / "cut.onnx").write_bytes((here / "a.onnx").read_bytes()[:100])
    (here / "empty").mkdir()
    for arguments, line in (
        (["a.onnx", "cut.png"], "error: cut.png is not an intact image: "),
        (
            ["a.onnx", "a.png", "--arch", "resnet18"],
            "error: --arch is for checkpoints, but a.onnx is an ONNX file",
        ),
        (["a.onnx", "empty"], "error: empty contains no images"),
        (["a.onnx", "none.png"], "error: none.png does not exist"),
        (["cut.onnx", "a.png"], "error: cut.onnx is a truncated or damaged ONNX file."),
        (
            ["nosuchnet", "a.png"],
            "error: nosuchnet is neither a file here nor a torchvision network",
        ),
    ):
        assert run(["predict", *arguments, "--device", "cpu", "--json"]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith(line)


def test_a_corrupt_image_does_not_stop_the_others(here, capsys):
    (here / "cut.png").write_bytes((here / "a.png").read_bytes()[:300])
    images = ["a.png", "cut.png", "none.png", "a.png"]
    assert run(["predict", "a.onnx", *images, "--device", "cpu", "--json"]) == 2
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert [p["image"] for p in result["predictions"]] == ["a.png", "a.png"]
    assert [u["image"] for u in result["unread"]] == ["cut.png", "none.png"]
    lines = printed.err.splitlines()
    assert lines[-4].startswith("note: cut.png is not an intact image: ")
    assert lines[-3:] == [
        "note: none.png does not exist",
        "error: 2 of 4 images could not be read: cut.png, none.png",
        "tip: Repair or remove them; the other images were classified.",
    ]
    assert run(["predict", "a.onnx", *images, "--device", "cpu"]) == 2
    assert capsys.readouterr().out.count("a.png") == 2


def test_notes_name_the_image(here, capsys):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime")]
    frames[0].save("a.gif", save_all=True, append_images=frames[1:])
    assert run(["predict", "a.onnx", "a.gif", "--device", "cpu", "--json"]) == 0
    printed = capsys.readouterr()
    assert "note: a.gif: 2 frames: only the first one is used\n" in printed.err
    assert json.loads(printed.out)["predictions"][0]["notes"] == [
        "2 frames: only the first one is used"
    ]


def test_help_has_an_example(capsys):
    assert run(["predict", "--help"]) == 0
    assert "Example: pathconvert predict" in " ".join(capsys.readouterr().out.split())


def test_an_input_that_leaves_nothing_of_a_feature_map(here):
    """ONNX Runtime's pooling would divide by zero, which ends the process."""
    torch.onnx.export(
        torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.MaxPool2d(4),
            torch.nn.Flatten(2)).eval(),
        (torch.zeros(2, 3, 32, 32),), "pool.onnx", dynamo=True, verbose=False, external_data=False,
        opset_version=20,
        dynamic_shapes=({2: "height", 3: "width"},),
    )  # fmt: skip
    with pytest.raises(
        PathconvertError, match=r"pool\.onnx does not take inputs as small as 3×4×4"
    ):
        predict("pool.onnx", ["a.png"], device="cpu", input_size=(3, 4, 4))


def test_stderr_may_be_closed(here):
    save_linear(here / "a.onnx")
    code = "import sys; from pathconvert.cli import run; sys.exit(run(sys.argv[1:]))"
    shell = '"$0" -c "$1" predict a.onnx a.png --json 2>&-'
    done = subprocess.run(
        ["sh", "-c", shell, sys.executable, code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert json.loads(done.stdout)["engine"] == "onnxruntime"
