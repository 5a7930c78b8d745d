"""What the ``config.json`` beside a file says of images and classes is used and recorded."""

import json
from pathlib import Path

import pytest
import torch
from command_line import header
from safetensors.torch import save_file
from sample_networks import network

from pathconvert.cli import run
from pathconvert.errors import CheckpointError
from pathconvert.networks.loading import LoadedNetwork, open_network
from pathconvert.networks.prepared import assumption_of
from pathconvert.networks.preprocessing import Preprocessing

TIMM = {
    "architecture": "resnet18",
    "num_classes": 4,
    "pretrained_cfg": {
        "input_size": [3, 224, 224], "interpolation": "bicubic", "crop_pct": 0.95,
        "crop_mode": "center", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.25, 0.125],
    },
}  # fmt: skip
NAMES = ("cat", "dog", "owl", "fox")
HUGGING_FACE = {"id2label": {str(i): name for i, name in enumerate(NAMES)}}


@pytest.fixture(scope="module")
def tensors() -> dict:
    return network("resnet18", num_classes=4).state_dict()


def opened(folder: Path, tensors: dict, config: dict) -> LoadedNetwork:
    """A ResNet-18 with such a ``config.json`` beside it, at 64 × 64 pixels."""
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return open_network(folder / "model.safetensors", input_size=(3, 64, 64))


def test_timms_preprocessing(tmp_path, tensors):
    found = opened(tmp_path, tensors, TIMM)
    # 64 / 0.95 = 67.4, as timm rounds it down
    expected = Preprocessing(67, (64, 64), (0.5,) * 3, (0.5, 0.25, 0.125), "bicubic")
    assert found.preprocessing == expected
    assert assumption_of(found, lambda recipe: recipe) is None


def test_hugging_faces_labels(tmp_path, tensors):
    assert opened(tmp_path, tensors, TIMM | HUGGING_FACE).labels == NAMES


def test_they_are_recorded(tmp_path, tensors, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened(tmp_path, tensors, TIMM | HUGGING_FACE)
    size = ("--input-size", "3x64x64")
    assert run(["reparam", "model.safetensors", *size, "-o", "x.safetensors"]) == 0
    stored = header(Path("x.safetensors"))
    assert stored["labels"] == list(NAMES)
    assert stored["preprocessing"]["mean"] == [0.5] * 3
    assert stored["preprocessing"]["resize"] == 67


@pytest.mark.parametrize(
    "change",
    [
        {"crop_mode": "squash"},
        {"interpolation": "random"},
        {"mean": [0.5]},
        {"std": None},
    ],
)
def test_what_cannot_be_followed_is_not_used(tmp_path, tensors, change):
    stored = TIMM | {"pretrained_cfg": TIMM["pretrained_cfg"] | change}
    found = opened(tmp_path, tensors, stored).preprocessing
    assert found.mean == (0.485, 0.456, 0.406)  # torchvision's


@pytest.mark.parametrize(
    "names",
    [{"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2", "3": "LABEL_3"}, {"0": "a", "1": "b"}],
)
def test_labels_of_another_network_are_not_used(tmp_path, tensors, names):
    assert opened(tmp_path, tensors, TIMM | {"id2label": names}).labels is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pretrained_cfg": TIMM["pretrained_cfg"] | {"std": [0, 1, 1]}},
            "pretrained_cfg: ValueError: mean and std must be finite and of equal length, and std"
            " positive",
        ),
        (
            {"pretrained_cfg": TIMM["pretrained_cfg"] | {"crop_pct": "all"}},
            "pretrained_cfg: ValueError: could not convert string to float: 'all'",
        ),
        ({"id2label": {"1": "a", "2": "b"}}, "id2label: KeyError: 0"),
    ],
)
def test_damage_is_refused(tmp_path, tensors, change, message):
    found = opened(tmp_path, tensors, TIMM | change)
    with pytest.raises(CheckpointError) as refused:
        _ = found.preprocessing, found.labels
    path = tmp_path / "model.safetensors"
    assert str(refused.value) == f"the config.json beside {path} is damaged: {message}"
    assert refused.value.tip


def test_a_file_without_one(tmp_path, tensors):
    torch.save(tensors, tmp_path / "r.pt")
    found = open_network(tmp_path / "r.pt", input_size=(3, 64, 64))
    assert found.preprocessing.mean == (0.485, 0.456, 0.406)
    assert found.labels is None
