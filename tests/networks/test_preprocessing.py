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
import torchvision
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sample_networks import network, randomise
from torchvision.models import ResNet18_Weights, ResNet50_Weights
from torchvision.transforms._presets import ImageClassification

import pathconvert
from pathconvert.cli import run
from pathconvert.errors import CheckpointError
from pathconvert.export.graph.loaded import card_of
from pathconvert.files.checkpoint import read_checkpoint
from pathconvert.networks import checked
from pathconvert.networks.architectures import Architecture, is_known
from pathconvert.networks.image_options import ImageOptions
from pathconvert.networks.images import read_image
from pathconvert.networks.inputs import load_images
from pathconvert.networks.loading import LoadedNetwork, open_network
from pathconvert.networks.metadata import weights_sha256
from pathconvert.networks.preprocessing import (
    Preprocessing,
    assumption,
    for_weights,
    labels_of,
    whole_levels,
)
from pathconvert.networks.pretrained import as_pretrained, identified
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
    recipe = for_weights(Architecture("resnet18", {}, (3, 224, 224), "classification"), None)
    transforms = ResNet18_Weights.DEFAULT.transforms()
    pixels = whole_levels(read_image(photos(here)[0]).pixels)
    # version 1 of its resizing may round to the next level: 1 / (255 · 0.224)
    assert torch.allclose(recipe.normalise(recipe.place(pixels)), transforms(pixels), atol=0.018)


def test_plain_pixels_are_not_normalised():
    recipe = Preprocessing.plain((1, 4, 6))
    pixels = torch.arange(24, dtype=torch.uint8).view(1, 4, 6)
    assert recipe.place(pixels).shape == (1, 4, 6)
    assert torch.equal(recipe.normalise(pixels), pixels / 255)


# ---- which of torchvision's weights --------------------------------------------------------------

RESNET50 = Architecture("resnet50", {}, (3, 224, 224), "classification")
V1, V2 = ResNet50_Weights.IMAGENET1K_V1, ResNet50_Weights.IMAGENET1K_V2


def sha_of(weights) -> str:
    """A SHA-256 that begins as that of torchvision's file does."""
    return Path(weights.url).stem.rpartition("-")[2].ljust(64, "0")


def test_every_file_of_torchvision_has_its_own_preprocessing():
    """All weights of all image networks, against torchvision's own transforms."""
    checked_, crops = 0, set()
    for name in torchvision.models.list_models():
        for weights in torchvision.models.get_model_weights(name):
            transforms = weights.transforms()
            if not is_known(name) or type(transforms) is not ImageClassification:
                continue
            sha = sha_of(weights)
            assert identified(name, sha) is weights
            stock = Architecture(name, {}, (3, 224, 224), "classification")
            architecture = as_pretrained(stock, sha)
            recipe, crop = for_weights(architecture, sha), transforms.crop_size[0]
            expected = (transforms.resize_size[0], crop, transforms.interpolation.value)
            assert (recipe.resize, recipe.crop[0], recipe.interpolation) == expected, weights
            assert architecture.input_size == (3, crop, crop)
            assert list(recipe.mean) == list(transforms.mean)
            assert list(recipe.std) == list(transforms.std)
            assert labels_of(architecture, sha) == (tuple(weights.meta["categories"] or ()) or None)
            assert assumption(architecture, sha) is None
            crops.add(crop)
            checked_ += 1
    assert checked_ > 100
    assert crops > {224, 384}


def test_what_is_assumed_of_other_files_is_said():
    assert for_weights(RESNET50, sha_of(V1)).resize == 256
    for other in ("00" * 32, "", sha_of(torchvision.models.ResNet18_Weights.DEFAULT)):
        assert for_weights(RESNET50, other) == for_weights(RESNET50, sha_of(V2))
        assert assumption(RESNET50, other) == (
            "is none of torchvision's files for resnet50, so images are prepared as for"
            " IMAGENET1K_V2 (--resize 232); IMAGENET1K_V1 expects --resize 256"
        )
    # where nothing differs, nothing was assumed
    given = ImageOptions(resize=240)
    assert assumption(RESNET50, "", given.over) is None
    for name in ("resnet18", "vgg16", "a:b", "fasterrcnn_resnet50_fpn"):
        assert assumption(dataclasses.replace(RESNET50, name=name), "") is None


def test_a_network_by_name_has_the_default_weights():
    assert for_weights(RESNET50, None) == for_weights(RESNET50, sha_of(V2))
    assert assumption(RESNET50, None) is None


def test_networks_that_are_not_torchvisions_own():
    """A new head has other classes; another stem takes other images."""
    sha = sha_of(V1)
    tuned = dataclasses.replace(RESNET50, arguments={"num_classes": 7})
    assert for_weights(tuned, "") is not None
    assert labels_of(tuned, "") is None
    assert labels_of(dataclasses.replace(RESNET50, arguments={"head": "identity"}), "") is None
    for changed in (
        {"arguments": {"stem": "cifar"}, "input_size": (3, 32, 32)},
        {"arguments": {"in_channels": 1}, "input_size": (1, 224, 224)},
        {"name": "cifar_resnet20"},
        {"name": "timm/resnet50"},
    ):
        architecture = dataclasses.replace(RESNET50, **changed)
        assert for_weights(architecture, sha) is None, changed
    assert for_weights(None, sha) is None
    assert labels_of(None, sha) is None


def test_the_source_of_a_file_names_the_weights(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "x.pt")
    plain = read_checkpoint(tmp_path / "x.pt")

    def converted(**source) -> str | None:
        return weights_sha256(dataclasses.replace(plain, metadata={"source": source}))

    assert weights_sha256(None) is None
    assert weights_sha256(plain) == plain.sha256
    assert converted(sha256="12", tensors_sha256="34") == "12"
    assert converted(tensors_sha256="34") is None  # converted by name: torchvision's default
    assert converted() == ""  # saved from Python: not known


def test_the_size_that_weights_were_trained_with():
    swag = torchvision.models.RegNet_Y_16GF_Weights.IMAGENET1K_SWAG_E2E_V1
    stock = Architecture("regnet_y_16gf", {"num_classes": 1000}, (3, 224, 224), "classification")
    large = as_pretrained(stock, sha_of(swag))
    assert large == dataclasses.replace(stock, input_size=(3, 384, 384))
    assert as_pretrained(stock, "00" * 32) == stock
    google = Architecture("googlenet", {}, (3, 224, 224), "classification")
    sha = sha_of(torchvision.models.GoogLeNet_Weights.DEFAULT)
    assert as_pretrained(google, sha).arguments == {"transform_input": True}
    said = dataclasses.replace(google, arguments={"transform_input": False})
    assert as_pretrained(said, sha) == said
    fcn = Architecture("fcn_resnet50", {}, (3, 520, 520), "segmentation")
    assert (
        as_pretrained(fcn, sha_of(torchvision.models.segmentation.FCN_ResNet50_Weights.DEFAULT))
        == fcn
    )


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
    assert stock.preprocessing == for_weights(architecture, None)
    assert stock.labels == labels_of(architecture, None)
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
    recipe = for_weights(architecture, None)
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
