"""Classification of images: unusual kinds of images, recorded preprocessing, other tools' files, and refusals."""

# ruff: noqa: ARG001 - fixtures are asked for what they do: `here` is the current folder

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx_files import CLASSES, save_linear
from PIL import Image
from sample_networks import network
from torchvision.models import SqueezeNet1_1_Weights

from pathconvert.cli import run
from pathconvert.errors import CheckpointError, PathconvertError, RuntimeUnavailable
from pathconvert.export.card import ModelCard
from pathconvert.export.runtime.predict import predict
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.images import read_image
from pathconvert.networks.loading import LoadedNetwork
from pathconvert.networks.preprocessing import Preprocessing

GPU = torch.cuda.is_available()
LABELS = ("ant", "bee", "[cat]", "dog", "eel")
RESNET = Architecture("resnet18", {"num_classes": CLASSES}, (3, 4, 4), "classification")
RECIPE = Preprocessing(8, (4, 4), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with ``a.png`` of 30 × 20 pixels and ``a.onnx`` of another tool, which takes inputs of 3x4x4."""
    monkeypatch.chdir(tmp_path)
    save_linear(tmp_path / "a.onnx")
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    return tmp_path


def pixels(*shape: int, top: int = 256, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(3).integers(0, top, shape).astype(dtype)


COLOUR = pixels(20, 30, 3)
GREY16 = pixels(20, 30, top=65536, dtype=np.uint16)


# --- images ---------------------------------------------------------------------------------------------------------


def levels(path: str, channels: int = 3) -> np.ndarray:
    """The pixels that are read from an 8-bit file, [H, W, C] in 0…255."""
    pixels = read_image(Path(path), channels).pixels.numpy().transpose(1, 2, 0) * 255
    np.testing.assert_allclose(pixels, pixels.round(), atol=1e-4)
    return pixels.round().astype(int)


def test_plain_colour(here):
    assert (levels("a.png") == COLOUR).all()
    assert (levels("a.png", 1)[..., 0] == np.asarray(Image.fromarray(COLOUR).convert("L"))).all()


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_grey_keeps_its_range(here, suffix):
    Image.fromarray(GREY16).save(f"g.{suffix}")
    values = torch.from_numpy(GREY16.astype(np.float32) / 65535)
    for channels in (1, 3):
        picture = read_image(Path(f"g.{suffix}"), channels)
        assert picture.notes == ()
        # one rounding to float32
        assert torch.allclose(picture.pixels, values.expand(channels, -1, -1), atol=2e-7)


@pytest.mark.parametrize("suffix", ["tif", "jpg"])
def test_cmyk(here, suffix):
    smooth = np.linspace(0, 255, 20 * 30 * 3).reshape(20, 30, 3).astype(np.uint8)
    Image.fromarray(smooth).convert("CMYK").save(f"c.{suffix}", **({"quality": 100} if suffix == "jpg" else {}))
    assert read_image(Path(f"c.{suffix}")).notes == ("CMYK was converted to RGB without a colour profile",)
    # JPEG loses a few levels
    assert abs(levels(f"c.{suffix}") - smooth).max() <= (8 if suffix == "jpg" else 0)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_animations_give_their_first_frame(here, suffix):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    picture = read_image(Path(f"a.{suffix}"))
    assert "3 frames: only the first one is used" in picture.notes
    assert picture.pixels.mean((1, 2)).tolist() == [1, 0, 0]


def test_palette_transparency_bits_and_orientation(here):
    image = Image.fromarray(COLOUR)
    image.quantize(8).save("palette.png")
    assert (levels("palette.png") == np.asarray(image.quantize(8).convert("RGB"))).all()
    image.convert("RGBA").save("alpha.png")
    assert read_image(Path("alpha.png")).notes == ("transparency was dropped",)
    image.convert("1").save("bits.png")
    assert set(read_image(Path("bits.png"), 1).pixels.unique().tolist()) == {0, 1}
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    image.save("turned.png", exif=exif)
    assert (levels("turned.png") == np.rot90(COLOUR, -1)).all()


def test_images_that_are_refused(here):
    content = (here / "a.png").read_bytes()
    (here / "cut.png").write_bytes(content[: len(content) // 2])
    (here / "flipped.png").write_bytes(content[:60] + bytes(30) + content[90:])
    (here / "empty.png").write_bytes(b"")
    (here / "text.png").write_text("no image")
    Image.new("RGB", (2000, 10)).save("long.png")
    Image.fromarray(GREY16.astype(np.int32)).save("deep.tif")
    Image.fromarray(GREY16.astype(np.float32)).save("floats.tif")
    (here / "folder").mkdir()
    for name, message in {
        "cut.png": "is not an intact image: image file is truncated",
        "flipped.png": "is not an intact image: ",
        "empty.png": "is not an intact image: ",
        "text.png": "is not an intact image: ",
        "none.png": "does not exist",
        "folder": "is a folder, not an image",
        "long.png": "is 2000 × 10 pixels: one side is more than 50 times the other",
        "deep.tif": "contains 32-bit values, whose range is not known",
        "floats.tif": "contains floating-point values, whose range is not known",
    }.items():
        with pytest.raises(CheckpointError) as refused:
            read_image(Path(name))
        assert str(refused.value).startswith(f"{name} {message}")


# --- what is recorded -----------------------------------------------------------------------------------------------


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def input_of(recipe: Preprocessing | None) -> torch.Tensor:
    """``a.png`` prepared in the most direct way: Pillow resizes it as floats, channel by channel."""
    planes = [Image.fromarray(plane) for plane in (COLOUR / np.float32(255)).transpose(2, 0, 1)]
    height = recipe.resize if recipe else 4
    width = int(height * 30 / 20)
    resized = np.stack([np.asarray(p.resize((width, height), Image.Resampling.BILINEAR)) for p in planes])
    top, left = round((height - 4) / 2), round((width - 4) / 2)
    cropped = torch.from_numpy(resized[:, top : top + 4, left : left + 4].copy())
    if recipe:
        mean, std = (torch.tensor(values)[:, None, None] for values in (recipe.mean, recipe.std))
        cropped = (cropped - mean) / std
    return cropped


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (ModelCard(RESNET, preprocessing=Preprocessing(8, (4, 4), (0.0, 0.0), (1.0, 1.0))), "it takes 3 channels"),
        (ModelCard(RESNET, preprocessing=RECIPE, labels="abcdefghij"), "labels is not a list"),
        (ModelCard(dataclasses.replace(RESNET, input_size=("a",)), preprocessing=RECIPE), "invalid literal"),
    ],
)  # fmt: skip
def test_a_card_that_says_what_cannot_be_is_refused(here, capsys, card, message):
    save_linear(here / "card.onnx", card=card)
    assert run(["predict", "card.onnx", "a.png", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "damaged pathconvert metadata" in error
    assert message in error


def test_the_card_is_followed(here, capsys):
    weight = save_linear(here / "card.onnx", card=ModelCard(RESNET, preprocessing=RECIPE, labels=LABELS))
    assert run(["predict", "card.onnx", "a.png", "--top", "2", "--device", "cpu", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    result = json.loads(printed.out)
    (prediction,) = result["predictions"]
    probabilities = softmax(input_of(RECIPE).mean((1, 2)).numpy() @ weight)
    order = np.argsort(-probabilities)[:2]
    assert [guess["index"] for guess in prediction["classes"]] == order.tolist()
    assert [guess["label"] for guess in prediction["classes"]] == [LABELS[i] for i in order]
    # resizing rounds to whole pixel values, 1/255
    assert [guess["probability"] for guess in prediction["classes"]] == pytest.approx(probabilities[order], abs=2e-3)
    assert result["preprocessing"]["mean"] == [0.5, 0.4, 0.3]
    assert (result["engine"], result["device"], result["notes"]) == ("onnxruntime", "cpu", [])


def test_a_long_name_is_shown_whole(here, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    name = f"{'long_' * 12}name.png"
    (here / "a.png").rename(name)
    assert run(["predict", "a.onnx", name, "--device", "cpu", "--top", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert name in "".join(line.split()[0] for line in lines if line.strip())
    assert max(map(len, lines)) <= 60


def test_the_table_shows_labels_as_they_are(here, capsys):
    save_linear(here / "card.onnx", card=ModelCard(RESNET, preprocessing=RECIPE, labels=LABELS))
    assert run(["predict", "card.onnx", "a.png", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("card.onnx, onnxruntime on cpu")
    assert all(label in printed.out for label in LABELS)


def test_pixels_go_in_where_the_graph_normalises(here):
    card = ModelCard(RESNET, preprocessing=RECIPE, labels=LABELS, preprocessing_in_graph=True, softmax=True)
    weight = save_linear(here / "bytes.onnx", kind=TensorProto.UINT8, card=card, softmax=True)
    report = predict("bytes.onnx", ["a.png"], device="cpu")
    plain = Preprocessing(8, (4, 4), (0.0,) * 3, (1.0,) * 3)
    values = (input_of(plain) * 255).round()
    probabilities = softmax(values.mean((1, 2)).numpy() @ weight)
    assert report.predictions[0].classes[0].index == probabilities.argmax()
    # a pixel on the edge of two levels may fall either way
    assert report.predictions[0].classes[0].probability == pytest.approx(probabilities.max(), abs=0.1)


def test_another_size_where_the_graph_leaves_it_free(here):
    card = ModelCard(RESNET, preprocessing=RECIPE)
    save_linear(here / "free.onnx", ("batch", 3, "height", "width"), card=card)
    assert predict("free.onnx", ["a.png"], device="cpu").preprocessing == RECIPE
    larger = predict("free.onnx", ["a.png"], device="cpu", input_size=(3, 8, 8)).preprocessing
    assert (larger.resize, larger.crop) == (16, (8, 8))


def test_labels_of_another_number_are_not_used(here):
    save_linear(here / "card.onnx", card=ModelCard(RESNET, preprocessing=RECIPE, labels=LABELS[:3]))
    report = predict("card.onnx", ["a.png"], device="cpu")
    assert report.notes == ("3 labels are recorded, but there are 5 outputs, so labels are not shown",)
    assert {guess.label for guess in report.predictions[0].classes} == {None}


def squeezenet(task: str = "classification") -> LoadedNetwork:
    architecture = Architecture("squeezenet1_1", {"num_classes": 1000}, (3, 64, 64), task)
    return LoadedNetwork(network("squeezenet1_1", num_classes=1000), architecture, None, ())


def test_a_checkpoint_with_torchvisions_recipe(here):
    report = predict("sq", ["a.png"], 3, "cpu", load=lambda _: squeezenet())
    transforms = SqueezeNet1_1_Weights.DEFAULT.transforms(resize_size=73, crop_size=64)
    with torch.inference_mode():
        pixels = (read_image(Path("a.png")).pixels * 255).round().to(torch.uint8)
        logits = squeezenet().model(transforms(pixels)[None])[0]
    best = logits.softmax(0).topk(3)
    assert [guess.index for guess in report.predictions[0].classes] == best.indices.tolist()
    assert [guess.probability for guess in report.predictions[0].classes] == pytest.approx(
        best.values.tolist(),
        rel=1e-2,  # two resizers that round to whole pixel values
    )
    assert report.predictions[0].classes[0].label == SqueezeNet1_1_Weights.DEFAULT.meta["categories"][best.indices[0]]
    assert (report.engine, report.notes) == ("torch", ())


def test_batches_folders_and_a_fixed_batch(here):
    (here / "photos").mkdir()
    for number in range(10):
        Image.fromarray(np.roll(COLOUR, number, 2) // (number + 1)).save(f"photos/{number}.png")
    save_linear(here / "three.onnx", (3, 3, 4, 4))
    free, fixed = (predict(model, ["photos", "a.png"], device="cpu") for model in ("a.onnx", "three.onnx"))
    assert [p.image for p in free.predictions] == [*(f"photos/{n}.png" for n in range(10)), "a.png"]
    for a, b in zip(free.predictions, fixed.predictions, strict=True):
        assert a.image == b.image
        assert [g.probability for g in a.classes] == pytest.approx([g.probability for g in b.classes])


# --- other tools' files ---------------------------------------------------------------------------------------------


def test_a_plain_foreign_file_works_and_says_what_was_assumed(here, capsys):
    weight = save_linear(here / "a.onnx")
    assert run(["predict", "a.onnx", "a.png", "--device", "cpu", "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    probabilities = softmax(input_of(None).mean((1, 2)).numpy() @ weight)
    assert result["predictions"][0]["classes"][0]["probability"] == pytest.approx(probabilities.max(), abs=2e-3)
    assert result["predictions"][0]["classes"][0]["label"] is None
    assert printed.err.splitlines() == [
        "note: no preprocessing is recorded: pixels were resized to 4x4 and scaled to [0, 1], not normalised",
        "note: the file does not record what its outputs are; they were taken for logits",
    ]


def test_foreign_probabilities_are_not_normalised_again(here):
    save_linear(here / "soft.onnx", softmax=True)
    logits, given = (predict(model, ["a.png"], device="cpu") for model in ("a.onnx", "soft.onnx"))
    assert given.notes[-1] == "the file does not record what its outputs are; they were taken for probabilities"
    expected = [guess.probability for guess in logits.predictions[0].classes]
    assert [guess.probability for guess in given.predictions[0].classes] == pytest.approx(expected, abs=1e-6)


def test_foreign_files_say_what_is_missing(here):
    save_linear(here / "free.onnx", ("batch", 3, "height", "width"))
    save_linear(here / "heads.onnx", outputs=2)
    save_linear(here / "bytes.onnx", kind=TensorProto.UINT8)
    save_linear(here / "last.onnx", ("batch", 4, 4, 3))
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, 4, 4]) for name in ("image", "mask")]
    graph = helper.make_graph([helper.make_node("Relu", ["image"], ["mask"])], "g", ports[:1], ports[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), "mask.onnx")
    for name, message in {
        "free.onnx": "takes images of any size (batchx3xheightxwidth) and does not record one",
        "heads.onnx": "has the outputs logits batchx5, logits1 batchx5, but one output of class scores "
        "[batch, classes] is needed",
        "bytes.onnx": "takes uint8 values, but does not record how it normalises them",
        "last.onnx": "takes inputs of size batchx4x4x3, but images have the size [batch, 1 or 3, height, width]",
        "mask.onnx": "has the outputs mask nx3x4x4, but one output of class scores [batch, classes] is needed",
    }.items():
        with pytest.raises(PathconvertError) as refused:
            predict(name, ["a.png"], device="cpu")
        assert str(refused.value) == f"{name} {message}"
    assert predict("free.onnx", ["a.png"], device="cpu", input_size=(3, 4, 4)).predictions


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_wrong_size(here):
    with pytest.raises(PathconvertError, match=r"^a.onnx takes images of size 3x4x4, not 3x8x8$"):
        predict("a.onnx", ["a.png"], device="cpu", input_size=(3, 8, 8))


def test_networks_that_classify_no_images(here):
    with pytest.raises(
        CheckpointError,
        match="sq is not an image classifier: squeezenet1_1 is for segmentation and takes inputs of size 3x64x64",
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
    with pytest.raises(RuntimeUnavailable, match=r"tensorrt only runs \.onnx files, and sq is not one"):
        predict("sq", ["a.png"], device="tensorrt", load=lambda _: squeezenet())


def test_refusals_end_with_code_two(here, capsys):
    (here / "cut.png").write_bytes((here / "a.png").read_bytes()[:300])
    (here / "cut.onnx").write_bytes((here / "a.onnx").read_bytes()[:100])
    (here / "empty").mkdir()
    for arguments, line in (
        (["a.onnx", "cut.png"], "error: cut.png is not an intact image: "),
        (["a.onnx", "a.png", "--arch", "resnet18"], "error: --arch is for checkpoints, but a.onnx is an ONNX file"),
        (["a.onnx", "empty"], "error: empty contains no images"),
        (["a.onnx", "none.png"], "error: none.png does not exist"),
        (["cut.onnx", "a.png"], "error: cut.onnx is a truncated or damaged ONNX file."),
        (["nosuchnet", "a.png"], "error: nosuchnet is neither a file here nor a torchvision network"),
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
    assert json.loads(printed.out)["predictions"][0]["notes"] == ["2 frames: only the first one is used"]


def test_help_has_an_example(capsys):
    assert run(["predict", "--help"]) == 0
    assert "Example: pathconvert predict" in " ".join(capsys.readouterr().out.split())


def test_an_input_that_leaves_nothing_of_a_feature_map(here):
    """ONNX Runtime's pooling would divide by zero, which ends the process."""
    torch.onnx.export(
        torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.MaxPool2d(4), torch.nn.Flatten(2)).eval(),
        (torch.zeros(2, 3, 32, 32),), "pool.onnx", dynamo=True, verbose=False, external_data=False, opset_version=20,
        dynamic_shapes=({2: "height", 3: "width"},),
    )  # fmt: skip
    with pytest.raises(PathconvertError, match=r"pool\.onnx does not take inputs as small as 3×4×4"):
        predict("pool.onnx", ["a.png"], device="cpu", input_size=(3, 4, 4))


def test_stderr_may_be_closed(here):
    save_linear(here / "a.onnx")
    code = "import sys; from pathconvert.cli import run; sys.exit(run(sys.argv[1:]))"
    shell = '"$0" -c "$1" predict a.onnx a.png --json 2>&-'
    done = subprocess.run(["sh", "-c", shell, sys.executable, code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert json.loads(done.stdout)["engine"] == "onnxruntime"
