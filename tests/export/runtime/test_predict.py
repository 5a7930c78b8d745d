"""Classification of images: recorded preprocessing and labels, and other tools' files."""

# ruff: noqa: ARG001 - fixtures are asked for what they do: `here` is the current folder

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx_files import CLASSES, save_linear
from pictures import COLOUR, squeezenet
from PIL import Image
from torchvision.models import SqueezeNet1_1_Weights

from pathconvert.cli import run
from pathconvert.errors import PathconvertError
from pathconvert.export.card import ModelCard
from pathconvert.export.runtime.predict import predict
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.images import read_image
from pathconvert.networks.preprocessing import Preprocessing

LABELS = ("ant", "bee", "[cat]", "dog", "eel")
RESNET = Architecture("resnet18", {"num_classes": CLASSES}, (3, 4, 4), "classification")
RECIPE = Preprocessing(8, (4, 4), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))

# ---- what is recorded ----------------------------------------------------------------------------


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def input_of(recipe: Preprocessing | None) -> torch.Tensor:
    """``a.png`` prepared in the most direct way: Pillow resizes it as floats, channel by
    channel.
    """
    planes = [Image.fromarray(plane) for plane in (COLOUR / np.float32(255)).transpose(2, 0, 1)]
    height = recipe.resize if recipe else 4
    width = int(height * 30 / 20)
    resized = np.stack(
        [np.asarray(p.resize((width, height), Image.Resampling.BILINEAR)) for p in planes]
    )
    top, left = round((height - 4) / 2), round((width - 4) / 2)
    cropped = torch.from_numpy(resized[:, top : top + 4, left : left + 4].copy())
    if recipe:
        mean, std = (torch.tensor(values)[:, None, None] for values in (recipe.mean, recipe.std))
        cropped = (cropped - mean) / std
    return cropped


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (ModelCard(RESNET, preprocessing=Preprocessing(8, (4, 4), (0.0, 0.0), (1.0, 1.0))),
            "it takes 3 channels"),
        (ModelCard(RESNET, preprocessing=RECIPE, labels="abcdefghij"), "labels is not a list"),
        (ModelCard(dataclasses.replace(RESNET, input_size=("a",)), preprocessing=RECIPE),
            "invalid literal"),
    ],
)  # fmt: skip
def test_a_card_that_says_what_cannot_be_is_refused(here, capsys, card, message):
    save_linear(here / "card.onnx", card=card)
    assert run(["predict", "card.onnx", "a.png", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "damaged pathconvert metadata" in error
    assert message in error


def test_the_card_is_followed(here, capsys):
    weight = save_linear(
        here / "card.onnx", card=ModelCard(RESNET, preprocessing=RECIPE, labels=LABELS)
    )
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
    assert [guess["probability"] for guess in prediction["classes"]] == pytest.approx(
        probabilities[order], abs=2e-3
    )
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
    card = ModelCard(
        RESNET, preprocessing=RECIPE, labels=LABELS, preprocessing_in_graph=True, softmax=True
    )
    weight = save_linear(here / "bytes.onnx", kind=TensorProto.UINT8, card=card, softmax=True)
    report = predict("bytes.onnx", ["a.png"], device="cpu")
    plain = Preprocessing(8, (4, 4), (0.0,) * 3, (1.0,) * 3)
    values = (input_of(plain) * 255).round()
    probabilities = softmax(values.mean((1, 2)).numpy() @ weight)
    assert report.predictions[0].classes[0].index == probabilities.argmax()
    # a pixel on the edge of two levels may fall either way
    assert report.predictions[0].classes[0].probability == pytest.approx(
        probabilities.max(), abs=0.1
    )


def test_another_size_where_the_graph_leaves_it_free(here):
    card = ModelCard(RESNET, preprocessing=RECIPE)
    save_linear(here / "free.onnx", ("batch", 3, "height", "width"), card=card)
    assert predict("free.onnx", ["a.png"], device="cpu").preprocessing == RECIPE
    larger = predict("free.onnx", ["a.png"], device="cpu", input_size=(3, 8, 8)).preprocessing
    assert (larger.resize, larger.crop) == (16, (8, 8))


def test_labels_of_another_number_are_not_used(here):
    save_linear(here / "card.onnx", card=ModelCard(RESNET, preprocessing=RECIPE, labels=LABELS[:3]))
    report = predict("card.onnx", ["a.png"], device="cpu")
    assert report.notes == (
        "3 labels are recorded, but there are 5 outputs, so labels are not shown",
    )
    assert {guess.label for guess in report.predictions[0].classes} == {None}


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
    assert (
        report.predictions[0].classes[0].label
        == SqueezeNet1_1_Weights.DEFAULT.meta["categories"][best.indices[0]]
    )
    assert (report.engine, report.notes) == ("torch", ())


def test_batches_folders_and_a_fixed_batch(here):
    (here / "photos").mkdir()
    for number in range(10):
        Image.fromarray(np.roll(COLOUR, number, 2) // (number + 1)).save(f"photos/{number}.png")
    save_linear(here / "three.onnx", (3, 3, 4, 4))
    free, fixed = (
        predict(model, ["photos", "a.png"], device="cpu") for model in ("a.onnx", "three.onnx")
    )
    assert [p.image for p in free.predictions] == [*(f"photos/{n}.png" for n in range(10)), "a.png"]
    for a, b in zip(free.predictions, fixed.predictions, strict=True):
        assert a.image == b.image
        assert [g.probability for g in a.classes] == pytest.approx(
            [g.probability for g in b.classes]
        )


# ---- other tools' files --------------------------------------------------------------------------


def test_a_plain_foreign_file_works_and_says_what_was_assumed(here, capsys):
    weight = save_linear(here / "a.onnx")
    assert run(["predict", "a.onnx", "a.png", "--device", "cpu", "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    probabilities = softmax(input_of(None).mean((1, 2)).numpy() @ weight)
    assert result["predictions"][0]["classes"][0]["probability"] == pytest.approx(
        probabilities.max(), abs=2e-3
    )
    assert result["predictions"][0]["classes"][0]["label"] is None
    assert printed.err.splitlines() == [
        (
            "note: no preprocessing is recorded: pixels were resized to 4x4 and scaled to [0, 1],"
            " not normalised"
        ),
        "note: the file does not record what its outputs are; they were taken for logits",
    ]


def test_foreign_probabilities_are_not_normalised_again(here):
    save_linear(here / "soft.onnx", softmax=True)
    logits, given = (predict(model, ["a.png"], device="cpu") for model in ("a.onnx", "soft.onnx"))
    assert (
        given.notes[-1]
        == "the file does not record what its outputs are; they were taken for probabilities"
    )
    expected = [guess.probability for guess in logits.predictions[0].classes]
    assert [guess.probability for guess in given.predictions[0].classes] == pytest.approx(
        expected, abs=1e-6
    )


def test_foreign_files_say_what_is_missing(here):
    save_linear(here / "free.onnx", ("batch", 3, "height", "width"))
    save_linear(here / "heads.onnx", outputs=2)
    save_linear(here / "bytes.onnx", kind=TensorProto.UINT8)
    save_linear(here / "last.onnx", ("batch", 4, 4, 3))
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, 4, 4])
        for name in ("image", "mask")
    ]
    graph = helper.make_graph(
        [helper.make_node("Relu", ["image"], ["mask"])], "g", ports[:1], ports[1:]
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
        "mask.onnx",
    )
    for name, message in {
        "free.onnx": "takes images of any size (batchx3xheightxwidth) and does not record one",
        "heads.onnx": (
            "has the outputs logits batchx5, logits1 batchx5, but one output of class scores "
            "[batch, classes] is needed"
        ),
        "bytes.onnx": "takes uint8 values, but does not record how it normalises them",
        "last.onnx": (
            "takes inputs of size batchx4x4x3, but images have the size [batch, 1 or 3, height,"
            " width]"
        ),
        "mask.onnx": (
            "has the outputs mask nx3x4x4, but one output of class scores [batch, classes] is"
            " needed"
        ),
    }.items():
        with pytest.raises(PathconvertError) as refused:
            predict(name, ["a.png"], device="cpu")
        assert str(refused.value) == f"{name} {message}"
    assert predict("free.onnx", ["a.png"], device="cpu", input_size=(3, 4, 4)).predictions
