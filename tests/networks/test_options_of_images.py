"""What users say of images and classes: the texts of options, and files with labels."""

import json
from pathlib import Path

import pytest
from torchvision.models import ResNet50_Weights

from pathconvert.errors import DataError
from pathconvert.networks.image_options import NOTHING_GIVEN, ImageOptions, read_labels
from pathconvert.networks.preprocessing import Preprocessing

OWN = Preprocessing(9, (8, 8), (0.2, 0.3, 0.4), (0.5, 0.25, 0.125), "bicubic")


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(DataError) as refused:
        call(*arguments, **options)
    assert refused.value.tip
    return str(refused.value)


# ---- options -------------------------------------------------------------------------------------


def test_texts_become_values():
    assert ImageOptions.parse() == NOTHING_GIVEN
    parsed = ImageOptions.parse(
        mean="0.5", std="0.1,0.2,3e-1", size="10x12", resize="16", interpolation="lanczos"
    )
    assert parsed == ImageOptions((0.5,), (0.1, 0.2, 0.3), (10, 12), 16, "lanczos")
    assert ImageOptions.parse(size="8", resize="16X20") == ImageOptions(
        size=(8, 8), resize=(16, 20)
    )
    # a square that is given as such is one: images are not only resized at their shorter side
    assert ImageOptions.parse(resize="16x16").resize == (16, 16)


@pytest.mark.parametrize("text", ["", "x", "8x", "8x8x8", "-8", "8.5", "65536", "0x8"])
def test_texts_that_are_no_sizes(text):
    assert refusal(ImageOptions.parse, size=text) == f"--size {text!r} is not a size"
    assert refusal(ImageOptions.parse, resize=text) == f"--resize {text!r} is not a size"


def test_what_is_given_overrides_and_the_rest_stays():
    assert NOTHING_GIVEN.over(OWN) == OWN
    assert ImageOptions(mean=(0.5,)).over(OWN).mean == (0.5,) * 3
    given = ImageOptions((0.0,), (1.0, 2.0, 3.0), None, (7, 6), "nearest").over(OWN)
    assert given == Preprocessing((7, 6), (8, 8), (0.0,) * 3, (1.0, 2.0, 3.0), "nearest")
    message = refusal(ImageOptions(std=(1.0, 2.0)).over, OWN)
    assert message == "--std has 2 values for 3 channels"


def test_which_options_change_a_preprocessing():
    assert NOTHING_GIVEN.preparing is None
    assert ImageOptions(size=(8, 8), labels=("a",)).preparing is None
    assert ImageOptions(std=(1.0,), interpolation="bicubic").preparing == "--std"
    assert not ImageOptions(resize=8).normalises
    assert ImageOptions(std=(1.0,)).normalises


# ---- labels --------------------------------------------------------------------------------------

NAMES = ("cat", "[dog]", "great grey owl")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lines.txt", "cat\n[dog]\ngreat grey owl\n"),
        ("windows.txt", "\ufeffcat\r\n[dog]\r\ngreat grey owl\r\n\r\n"),
        ("list.json", json.dumps(NAMES)),
        ("index.json", json.dumps({str(i): name for i, name in enumerate(NAMES)})),
        ("unsorted.json", '{"2": "great grey owl", "0": "cat", "1": "[dog]"}'),
        ("class_to_idx.json", json.dumps({name: i for i, name in enumerate(NAMES)})),
        ("imagenet.json", json.dumps({str(i): [f"n0{i}", n] for i, n in enumerate(NAMES)})),
        ("python.txt", "{0: 'cat',\n 1: '[dog]',\n 2: 'great grey owl'}"),
        ("config.json", json.dumps({"id2label": {str(i): n for i, n in enumerate(NAMES)}})),
        ("meta.json", json.dumps({"min_size": [1, 1], "categories": NAMES})),
    ],
)
def test_files_with_labels(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_labels(tmp_path / name) == NAMES


def test_torchvisions_own_categories(tmp_path):
    categories = ResNet50_Weights.DEFAULT.meta["categories"]
    (tmp_path / "imagenet.json").write_text(json.dumps(categories))
    assert read_labels(tmp_path / "imagenet.json") == tuple(categories)
    (tmp_path / "imagenet.txt").write_text("\n".join(categories))
    assert read_labels(tmp_path / "imagenet.txt") == tuple(categories)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("l.txt", "\n", "it is empty"),
        ("l.txt", "a\n\nb\n", "line 2 is empty"),
        ("l.json", '["a"', "it is not a JSON list or object"),
        ("l.json", '["a", 1]', "a name is missing or is not text"),
        ("l.json", "[]", "a name is missing or is not text"),
        ("l.json", '{"0": "a", "2": "b"}', "its indices are not 0 to 1"),
        ("l.json", '{"a": 1, "b": 2}', "its indices are not 0 to 1"),
        ("l.json", '{"0": "a", "1": ""}', "a name is missing or is not text"),
    ],
)
def test_files_without_labels(tmp_path, name, text, reason):
    path = tmp_path / name
    path.write_text(text)
    assert refusal(read_labels, path) == f"{path} does not give labels: {reason}"


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "l.bin").write_bytes(b"\xff\xfe\x00\xd8")
    for path, reason in (
        (tmp_path / "none", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "l.bin", "it is not text"),
    ):
        assert refusal(read_labels, Path(path)) == f"{path} cannot be read as labels: {reason}"
