"""Which labelled images are found in folders, and which folders and options are refused."""

import numpy as np
import pytest
import torch
from labelled_images import class_folders, picture, refusal
from PIL import Image

from pathconvert.errors import DataError
from pathconvert.networks.images import read_image
from pathconvert.training.data.labelled import open_data

# ---- what is found -------------------------------------------------------------------------------


def test_two_parts_of_class_folders(flowers):
    data = open_data(flowers)
    assert (data.name, data.classes, data.channels, data.image_size) == (
        str(flowers),
        ("aster", "lily", "rose"),
        3,
        (10, 12),
    )
    assert (len(data.train), len(data.val)) == (18, 7)
    assert data.train.labels.tolist() == [0] * 4 + [1] * 8 + [2] * 6
    assert data.val.names[:4] == (
        "val/aster/00.png",
        "val/aster/01.png",
        "val/aster/02.png",
        "val/lily/00.png",
    )
    pixels, label = data.train[5]
    assert (pixels.dtype, pixels.shape, label) == (torch.uint8, (3, 10, 12), 1)
    expected = read_image(flowers / data.train.names[5]).pixels
    assert torch.allclose(pixels / 255, expected, atol=1e-7)  # one rounding to float32


@pytest.mark.parametrize("name", ["valid", "validation", "test"])
def test_other_names_of_the_held_out_part(flowers, name):
    (flowers / "val").rename(flowers / name)
    assert open_data(flowers).val.names[0] == f"{name}/aster/00.png"


def test_a_class_may_be_called_train(tmp_path):
    data = open_data(class_folders(tmp_path / "d", {"plane": 3, "train": 3, "val": 3}))
    assert data.classes == ("plane", "train", "val")
    assert (len(data.train), len(data.val)) == (6, 3)


def test_train_alone_is_split(flowers):
    (flowers / "val").rename(flowers / "other")
    data = open_data(flowers, val_fraction=0.25)
    assert (len(data.train), len(data.val)) == (13, 5)


def test_what_is_no_image_is_left_out_and_folders_within_are_searched(flowers):
    (flowers / "train" / "rose" / "notes.txt").write_text("no image")
    (flowers / "train" / "rose" / "._00.png").write_text("what a Mac leaves")
    (flowers / "train" / ".cache").mkdir()
    (flowers / "train" / "rose" / "red").mkdir()
    Image.fromarray(picture(1)).save(flowers / "train" / "rose" / "red" / "x.JPG")
    names = open_data(flowers).train.names
    assert len(names) == 19
    assert names[-1] == "train/rose/red/x.JPG"


def test_links_that_lead_back_are_followed_once(flowers):
    before = open_data(flowers)
    rose = flowers / "train" / "rose"
    (rose / "again").symlink_to(rose)
    assert open_data(flowers).digest == before.digest


def test_every_class_is_split_alike_and_the_same_again(tmp_path):
    folder = class_folders(tmp_path / "d", {"a": 40, "b": 20, "c": 2})
    data = open_data(folder, val_fraction=0.1, seed=1)
    assert torch.bincount(data.val.labels).tolist() == [4, 2, 1]
    assert torch.bincount(data.train.labels).tolist() == [36, 18, 1]
    assert not set(data.train.names) & set(data.val.names)
    assert list(data.train.names) == sorted(data.train.names)
    assert open_data(folder, val_fraction=0.1, seed=1).val.names == data.val.names
    assert open_data(folder, val_fraction=0.1, seed=2).val.names != data.val.names
    assert all(
        np.array_equal(data.val[i][0], open_data(folder, seed=1).val[i][0])
        for i in range(len(data.val))
    )


def test_limits_are_balanced_and_nested(flowers):
    few, more = (open_data(flowers, limit_train=n, limit_val=2) for n in (3, 10))
    assert torch.bincount(few.train.labels).tolist() == [1, 1, 1]
    assert sorted(torch.bincount(more.train.labels).tolist()) == [3, 3, 4]
    assert set(few.train.names) < set(more.train.names)
    assert list(more.train.names) == sorted(more.train.names)
    assert len(more.val) == 2
    assert more.train.names != open_data(flowers, limit_train=10, seed=1).train.names
    assert len(open_data(flowers, limit_train=99).train) == 18


def test_the_digest_tells_when_the_data_changed(flowers, tmp_path):
    digest = open_data(flowers).digest
    assert digest == open_data(flowers, channels=1).digest
    flowers.rename(tmp_path / "moved")
    assert digest == open_data(tmp_path / "moved").digest
    (tmp_path / "moved" / "train" / "rose" / "00.png").rename(
        tmp_path / "moved" / "train" / "rose" / "99.png"
    )
    changed = open_data(tmp_path / "moved").digest
    assert changed != digest
    (tmp_path / "moved" / "train" / "rose" / "99.png").unlink()
    assert open_data(tmp_path / "moved").digest not in (digest, changed)
    assert open_data(tmp_path / "moved", limit_val=2).digest != open_data(tmp_path / "moved").digest


def test_images_of_other_kinds(tmp_path):
    """CMYK, sixteen bits, a palette and grey are all converted to what the network needs."""
    folder = class_folders(tmp_path / "d", {"a": 2, "b": 2})
    Image.fromarray(picture(1)).convert("CMYK").save(folder / "a" / "00.jpg")
    deep = np.arange(120, dtype=np.uint16).reshape(10, 12) * 512
    Image.fromarray(deep).save(folder / "a" / "10.png")
    Image.fromarray(picture(2)).quantize(8).save(folder / "a" / "11.png")
    Image.fromarray(picture(3, (10, 12))).save(folder / "b" / "10.png")
    for channels in (1, 3):
        data = open_data(folder, channels=channels)
        everything = [data.train[i][0] for i in range(len(data.train))] + [
            data.val[i][0] for i in range(len(data.val))
        ]
        assert {(image.dtype, tuple(image.shape)) for image in everything} == {
            (torch.uint8, (channels, 10, 12))
        }
        whole = torch.from_numpy((deep / 257).round().astype(np.uint8))  # 65535 / 255
        assert any(torch.equal(image[0], whole) for image in everything)


# ---- what is refused -----------------------------------------------------------------------------


def test_folders_that_are_refused(flowers, tmp_path):
    (tmp_path / "empty").mkdir()
    assert (
        str(refusal(open_data, tmp_path / "empty"))
        == f"{tmp_path / 'empty'} does not hold one folder of images per class"
    )
    Image.fromarray(picture(1)).save(tmp_path / "empty" / "1.png")
    error = refusal(open_data, tmp_path / "empty")
    assert (
        str(error) == f"{tmp_path / 'empty'} holds images, but not one folder of images per class"
    )
    loose = class_folders(tmp_path / "loose", {"train": 3, "val": 3})
    assert (
        str(refusal(open_data, loose))
        == f"{loose / 'train'} does not hold one folder of images per class"
    )
    one = class_folders(tmp_path / "one", {"rose": 3})
    assert str(refusal(open_data, one)) == f"{one} holds only one class: rose"
    (flowers / "train" / "tulip").mkdir()
    error = refusal(open_data, flowers)
    assert str(error) == f"{flowers / 'train' / 'tulip'} holds no images"
    assert error.tip.startswith("Add some, or remove the folder.")


def test_a_class_missing_from_two_is_named(tmp_path):
    """The error names the missing classes, not that the held-out part has only one class."""
    class_folders(tmp_path / "train", {"rose": 2, "tulip": 2})
    class_folders(tmp_path / "val", {"rose": 2})
    error = refusal(open_data, tmp_path)
    assert (
        str(error) == f"the class 'tulip' of {tmp_path / 'train'} is missing in {tmp_path / 'val'}"
    )


def test_classes_of_one_part_alone(flowers):
    for part, other in (("train", "val"), ("val", "train")):
        extra = flowers / part / "tulip"
        class_folders(flowers / part, {"tulip": 1})
        error = refusal(open_data, flowers)
        assert (
            str(error) == f"the class 'tulip' of {flowers / part} is missing in {flowers / other}"
        )
        assert (
            error.tip
            == f"Both need the same class folders: add {flowers / other / 'tulip'}, or remove"
            f" {extra}."
        )
        class_folders(flowers / part, {"violet": 1})
        assert str(refusal(open_data, flowers)).endswith("(and 1 more like it)")
        for name in ("tulip", "violet"):
            (flowers / part / name / "00.png").unlink()
            (flowers / part / name).rmdir()


def test_a_class_that_is_too_small_to_split(tmp_path):
    folder = class_folders(tmp_path / "d", {"a": 4, "b": 1})
    error = refusal(open_data, folder)
    assert (
        str(error)
        == "the class 'b' has only one image, so it cannot be split into training and validation"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 0}, "--val-fraction must be between 0 and 1, not 0"),
        ({"val_fraction": 1.5}, "--val-fraction must be between 0 and 1, not 1.5"),
        ({"limit_train": 0}, "--limit-train must be at least 1, not 0"),
        ({"limit_val": -1}, "--limit-val must be at least 1, not -1"),
    ],
)
def test_options_without_sense(tmp_path, options, message):
    assert (
        str(refusal(open_data, class_folders(tmp_path / "d", {"a": 4, "b": 4}), **options))
        == message
    )


def test_specifications_that_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.zip").write_bytes(b"")
    assert (
        str(refusal(open_data, "flowers/"))
        == "flowers/ does not exist; a folder of class folders is needed"
    )
    assert (
        str(refusal(open_data, "a.zip")) == "a.zip is a file; a folder of class folders is needed"
    )
    error = refusal(open_data, "fashionmnist:x")
    assert str(error) == "there is no data set 'fashionmnist'"
    assert error.tip.startswith("Did you mean fashion-mnist? Choose one of fashion-mnist, cifar10,")
    assert refusal(open_data, "cifar10").tip == "Add the folder: cifar10:ROOT"


@pytest.mark.parametrize(
    "name", ["fashion-mnist", "cifar10", "cifar100", "flowers102", "oxford-iiit-pet", "imagenet"]
)
def test_data_sets_are_never_downloaded(tmp_path, name):
    error = refusal(open_data, f"{name}:{tmp_path}")
    assert isinstance(error, DataError)
    assert str(error).startswith(f"{name} in {tmp_path} is incomplete: ")
    assert "Let torchvision.datasets." in error.tip
    assert not list(tmp_path.iterdir())
