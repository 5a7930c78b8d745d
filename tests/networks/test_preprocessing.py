"""A file records how images are prepared and what classes are called.

Export, calibration and prediction use it.
"""

# ruff: noqa: ARG001 - some fixtures are requested for their effect: `here` changes the current
# folder

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sample_networks import network, randomise
from torchvision.models import ResNet18_Weights

import pathconvert
from pathconvert.cli import run
from pathconvert.errors import CheckpointError
from pathconvert.export.graph.loaded import card_of
from pathconvert.networks import checked
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.images import read_image
from pathconvert.networks.inputs import load_images
from pathconvert.networks.loading import LoadedNetwork, open_network
from pathconvert.networks.preprocessing import Preprocessing, labels_for, whole_levels
from pathconvert.networks.saving import save_converted

OWN = Preprocessing((9, 12), (8, 8), (0.2, 0.3, 0.4), (0.5, 0.25, 0.125), "bicubic")
LABELS = ("boot", "coat", "hat", "[shirt]")
BUILDER = """
from torch import nn

def small():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )
"""
ARCHITECTURE = Architecture("preprocessing_test_nets:small", {}, (3, 8, 8), "other")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A current folder with ``photos/``, three images of several shapes, and a network class of its
    own.
    """
    (tmp_path / "photos").mkdir()
    (tmp_path / "preprocessing_test_nets.py").write_text(BUILDER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "preprocessing_test_nets", raising=False)
    for i, shape in enumerate(((20, 30, 3), (16, 16, 3), (40, 11, 3))):
        pixels = np.random.default_rng(i).integers(0, 256, shape).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path


@pytest.fixture
def plain(here) -> LoadedNetwork:
    model = randomise(__import__("preprocessing_test_nets").small()).eval()
    return LoadedNetwork(model, ARCHITECTURE, None, tuple(model.state_dict()))


@pytest.fixture
def tuned(plain, here) -> Path:
    """A converted file that records preprocessing and classes."""
    conversion = checked.convert_network(plain, "block", "max", "pow2", partial=False)
    path = here / "tuned.path.safetensors"
    save_converted(
        conversion, plain, path, force=False, check=lambda _: None, preprocessing=OWN, labels=LABELS
    )
    return path


def metadata(path: Path) -> dict:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["pathconvert"])


def photos(here: Path) -> list[Path]:
    return sorted((here / "photos").iterdir())


# ---- the recipe ----------------------------------------------------------------------------------


def test_json_and_back():
    for recipe in (OWN, Preprocessing(256, None, (0.5,), (1.0,))):
        assert Preprocessing.from_json(json.loads(json.dumps(dataclasses.asdict(recipe)))) == recipe


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("resize", 0),
        ("resize", [8]),
        ("resize", float("inf")),
        ("crop", [8]),
        ("crop", 8),
        ("mean", [0.0]),
        ("mean", [float("nan"), 0, 0]),
        ("std", [0, 1, 1]),
        ("std", None),
        ("interpolation", "magic"),
    ],
)
def test_no_recipe_is_made_of_damage(field, value):
    with pytest.raises((ValueError, TypeError, IndexError)):
        Preprocessing.from_json(dataclasses.asdict(OWN) | {field: value})


def test_another_size_keeps_the_proportion():
    recipe = Preprocessing(256, (224, 224), (0.0,) * 3, (1.0,) * 3)
    assert recipe.at((224, 224)) is recipe
    assert (recipe.at((112, 112)).resize, recipe.at((112, 112)).crop) == (128, (112, 112))
    assert dataclasses.replace(recipe, crop=None).at((8, 8)).crop is None
    assert OWN.at((16, 16)).resize == (18, 24)


def test_torchvisions_own_pixels(here):
    """The input is the one that torchvision's transforms for its weights produce."""
    recipe = Preprocessing.for_architecture(
        Architecture("resnet18", {}, (3, 224, 224), "classification")
    )
    transforms = ResNet18_Weights.DEFAULT.transforms()
    pixels = whole_levels(read_image(photos(here)[0]).pixels)
    # version 1 of its resizing may round to the next level: 1 / (255 · 0.224)
    assert torch.allclose(recipe.normalise(recipe.place(pixels)), transforms(pixels), atol=0.018)


def test_plain_pixels_are_not_normalised():
    recipe = Preprocessing.plain((1, 4, 6))
    pixels = torch.arange(24, dtype=torch.uint8).view(1, 4, 6)
    assert recipe.place(pixels).shape == (1, 4, 6)
    assert torch.equal(recipe.normalise(pixels), pixels / 255)


# ---- in files ------------------------------------------------------------------------------------


def test_a_file_records_them_and_old_ones_do_not(tuned, plain, here):
    network_ = open_network(tuned)
    assert (network_.preprocessing, network_.labels, network_.was_trained_here) == (
        OWN,
        LABELS,
        True,
    )
    conversion = checked.convert_network(plain, "block", "max", "unit", partial=False)
    old = save_converted(
        conversion, plain, here / "old.safetensors", force=False, check=lambda _: None
    )
    assert not {"preprocessing", "labels"} & metadata(old).keys()
    network_ = open_network(old)
    assert (network_.preprocessing, network_.labels, network_.was_trained_here) == (
        None,
        None,
        False,
    )


def test_stock_networks_have_torchvisions():
    architecture = Architecture("resnet18", {"num_classes": 1000}, (3, 64, 64), "classification")
    stock = LoadedNetwork(network("resnet18", num_classes=1000), architecture, None, ())
    assert stock.preprocessing == Preprocessing.for_architecture(architecture)
    assert stock.labels == labels_for(architecture)
    assert stock.labels[:2] == ("tench", "goldfish")


def test_another_input_size_is_followed(tuned):
    recipe = open_network(tuned, input_size=(3, 16, 16)).preprocessing
    assert (recipe.resize, recipe.crop, recipe.mean) == ((18, 24), (16, 16), OWN.mean)


def test_they_stay_through_path_bn(tuned, here):
    assert (
        run(
            [
                "reparam",
                "tuned.path.safetensors",
                "--form",
                "path-bn",
                "--calibrate",
                "photos",
                "-o",
                "b.pt",
            ]
        )
        == 0
    )
    network_ = open_network(here / "b.pt")
    assert (network_.form, network_.preprocessing, network_.labels) == ("path-bn", OWN, LABELS)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("preprocessing", {"resize": 8}, "preprocessing: KeyError: 'crop'"),
        (
            "preprocessing",
            [],
            "preprocessing: TypeError: list indices must be integers or slices, not str",
        ),
        (
            "preprocessing",
            dataclasses.asdict(OWN) | {"interpolation": "magic"},
            "preprocessing: ValueError: interpolation 'magic' is not known",
        ),
        ("labels", "boot", "labels are not a list of names"),
        ("labels", [1, 2], "labels are not a list of names"),
    ],
)
def test_damage_is_refused(tuned, key, value, message):
    changed = metadata(tuned) | {key: value}
    save_file(load_file(tuned), tuned, {"pathconvert": json.dumps(changed)})
    with pytest.raises(CheckpointError) as refused:
        open_network(tuned)
    assert str(refused.value) == f"{tuned} has damaged pathconvert metadata: {message}"
    assert refused.value.tip


# ---- where they are used -------------------------------------------------------------------------


def test_images_are_prepared_as_recorded(tuned, here):
    network_ = open_network(tuned)
    images = load_images(photos(here), network_.architecture, network_.preprocessing)
    expected = [
        OWN.normalise(OWN.place(whole_levels(read_image(path).pixels))) for path in photos(here)
    ]
    assert torch.equal(images, torch.stack(expected))


def test_images_of_networks_that_record_nothing(here):
    """A network of one's own gets values in [0, 1].

    For any other they are normalised with ImageNet's statistics.
    """
    own = load_images(photos(here), ARCHITECTURE, None)
    assert own.shape == (3, 3, 8, 8)
    assert own.min() >= 0
    assert own.max() <= 1
    assert torch.equal(own * 255, (own * 255).round())
    other = load_images(
        photos(here), dataclasses.replace(ARCHITECTURE, task="classification"), None
    )
    mean, std = (
        torch.tensor(v).view(-1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    assert torch.allclose(other, (own - mean) / std, atol=1e-6)  # rounding in float32


def test_segmentation_gets_images_of_one_size(here):
    architecture = Architecture("fcn_resnet50", {}, (3, 8, 8), "segmentation")
    recipe = Preprocessing.for_architecture(architecture)
    assert recipe.crop is None
    assert load_images(photos(here), architecture, recipe).shape == (3, 3, 8, 8)


def test_calibration_sees_them(tuned, here, monkeypatch):
    seen = []
    whole = checked.to_path_bn

    def record(conversion, example, calibration, skip_scale):
        seen.extend(calibration)
        return whole(conversion, example, seen, skip_scale)

    monkeypatch.setattr(checked, "to_path_bn", record)
    network_ = open_network(tuned)
    checked.enter_path_bn(network_, checked.resume_conversion(network_), here / "photos", 1.0)
    assert torch.equal(torch.cat(seen), load_images(photos(here), ARCHITECTURE, OWN))


def test_export_and_prediction_use_them(tuned, here, capsys):
    card = card_of(open_network(tuned))
    assert (card.preprocessing, card.labels) == (OWN, LABELS)
    assert (
        run(
            [
                "export",
                "tuned.path.safetensors",
                "-o",
                "t.onnx",
                "--images",
                "photos",
                "--with-softmax",
            ]
        )
        == 0
    )
    capsys.readouterr()
    model, _ = pathconvert.load(tuned)
    with torch.no_grad():
        expected = model(load_images(photos(here), ARCHITECTURE, OWN)).softmax(1)
    for source in ("tuned.path.safetensors", "t.onnx"):
        assert run(["predict", source, "photos", "--device", "cpu", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["preprocessing"] == json.loads(json.dumps(dataclasses.asdict(OWN)))
        for prediction, row in zip(result["predictions"], expected, strict=True):
            for guess in prediction["classes"]:
                assert guess["label"] == LABELS[guess["index"]]
                # two engines round differently in float32
                assert guess["probability"] == pytest.approx(float(row[guess["index"]]), abs=1e-5)


def test_the_graph_normalises_as_recorded(tuned, here, capsys):
    """``--with-preprocessing`` needs a recorded preprocessing, which a network of one's own has
    after fine-tuning.
    """
    assert run(["export", "tuned.path.safetensors", "-o", "t.onnx", "--with-preprocessing"]) == 0
    capsys.readouterr()
    probabilities = []
    for source in ("tuned.path.safetensors", "t.onnx"):
        assert run(["predict", source, "photos", "--device", "cpu", "--json"]) == 0
        classes = [p["classes"] for p in json.loads(capsys.readouterr().out)["predictions"]]
        probabilities.append([[guess["probability"] for guess in row] for row in classes])
    assert np.allclose(*probabilities, atol=1e-5)  # two engines round differently in float32
