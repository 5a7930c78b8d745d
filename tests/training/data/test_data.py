"""Labelled images: which are found or refused, how they are prepared, and that batches depend on no worker."""

import gzip
import os
import pickle
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pathconvert.errors import CheckpointError, DataError, PathconvertError
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.images import read_image
from pathconvert.networks.loading import LoadedNetwork
from pathconvert.networks.preprocessing import Preprocessing
from pathconvert.training.data.augmentation import Transform, choose_preprocessing, preprocessing_of
from pathconvert.training.data.batches import batches
from pathconvert.training.data.images import Array, Files, Images
from pathconvert.training.data.labelled import Data, open_data

DATA = os.environ.get("PATHCONVERT_DATA")
real = pytest.mark.skipif(DATA is None, reason="PATHCONVERT_DATA does not name the folder with Fashion-MNIST")
RECIPE = Preprocessing(9, (8, 8), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def picture(number: int, shape: tuple[int, ...] = (10, 12, 3)) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, shape).astype(np.uint8)


def class_folders(folder: Path, counts: dict[str, int], shape: tuple[int, ...] = (10, 12, 3)) -> Path:
    """Class folders with the given number of images each, all different."""
    for place, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(picture(1000 * place + i, shape)).save(folder / name / f"{i:02}.png")
    return folder


@pytest.fixture
def flowers(tmp_path) -> Path:
    """A data set with two parts and three classes."""
    class_folders(tmp_path / "flowers" / "train", {"rose": 6, "aster": 4, "lily": 8})
    class_folders(tmp_path / "flowers" / "val", {"rose": 2, "aster": 3, "lily": 2})
    return tmp_path / "flowers"


def refusal(call, *arguments, **options) -> PathconvertError:
    with pytest.raises(PathconvertError) as refused:
        call(*arguments, **options)
    assert len(str(refused.value).splitlines()) == 1
    assert refused.value.tip
    return refused.value


# --- what is found --------------------------------------------------------------------------------------------------


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
    assert data.val.names[:4] == ("val/aster/00.png", "val/aster/01.png", "val/aster/02.png", "val/lily/00.png")
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
    assert all(np.array_equal(data.val[i][0], open_data(folder, seed=1).val[i][0]) for i in range(len(data.val)))


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
    (tmp_path / "moved" / "train" / "rose" / "00.png").rename(tmp_path / "moved" / "train" / "rose" / "99.png")
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
        everything = [data.train[i][0] for i in range(len(data.train))] + [data.val[i][0] for i in range(len(data.val))]
        assert {(image.dtype, tuple(image.shape)) for image in everything} == {(torch.uint8, (channels, 10, 12))}
        whole = torch.from_numpy((deep / 257).round().astype(np.uint8))  # 65535 / 255
        assert any(torch.equal(image[0], whole) for image in everything)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_folders_that_are_refused(flowers, tmp_path):
    (tmp_path / "empty").mkdir()
    assert (
        str(refusal(open_data, tmp_path / "empty"))
        == f"{tmp_path / 'empty'} does not hold one folder of images per class"
    )
    Image.fromarray(picture(1)).save(tmp_path / "empty" / "1.png")
    error = refusal(open_data, tmp_path / "empty")
    assert str(error) == f"{tmp_path / 'empty'} holds images, but not one folder of images per class"
    loose = class_folders(tmp_path / "loose", {"train": 3, "val": 3})
    assert str(refusal(open_data, loose)) == f"{loose / 'train'} does not hold one folder of images per class"
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
    assert str(error) == f"the class 'tulip' of {tmp_path / 'train'} is missing in {tmp_path / 'val'}"


def test_classes_of_one_part_alone(flowers):
    for part, other in (("train", "val"), ("val", "train")):
        extra = flowers / part / "tulip"
        class_folders(flowers / part, {"tulip": 1})
        error = refusal(open_data, flowers)
        assert str(error) == f"the class 'tulip' of {flowers / part} is missing in {flowers / other}"
        assert error.tip == f"Both need the same class folders: add {flowers / other / 'tulip'}, or remove {extra}."
        class_folders(flowers / part, {"violet": 1})
        assert str(refusal(open_data, flowers)).endswith("(and 1 more like it)")
        for name in ("tulip", "violet"):
            (flowers / part / name / "00.png").unlink()
            (flowers / part / name).rmdir()


def test_a_class_that_is_too_small_to_split(tmp_path):
    folder = class_folders(tmp_path / "d", {"a": 4, "b": 1})
    error = refusal(open_data, folder)
    assert str(error) == "the class 'b' has only one image, so it cannot be split into training and validation"


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
    assert str(refusal(open_data, class_folders(tmp_path / "d", {"a": 4, "b": 4}), **options)) == message


def test_specifications_that_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.zip").write_bytes(b"")
    assert str(refusal(open_data, "flowers/")) == "flowers/ does not exist; a folder of class folders is needed"
    assert str(refusal(open_data, "a.zip")) == "a.zip is a file; a folder of class folders is needed"
    error = refusal(open_data, "fashionmnist:x")
    assert str(error) == "there is no data set 'fashionmnist'"
    assert error.tip.startswith("Did you mean fashion-mnist? Choose one of fashion-mnist, cifar10,")
    assert refusal(open_data, "cifar10").tip == "Add the folder: cifar10:ROOT"


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100", "flowers102", "oxford-iiit-pet", "imagenet"])
def test_data_sets_are_never_downloaded(tmp_path, name):
    error = refusal(open_data, f"{name}:{tmp_path}")
    assert isinstance(error, DataError)
    assert str(error).startswith(f"{name} in {tmp_path} is incomplete: ")
    assert "Let torchvision.datasets." in error.tip
    assert not list(tmp_path.iterdir())


# --- torchvision's data sets ----------------------------------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray, packed: bool) -> None:
    content = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    if packed:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_packed_or_not(tmp_path, packed):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels, labels = picture(0, (20, 28, 28)), np.arange(20, dtype=np.uint8) % 10
    for part, count in (("train", 20), ("t10k", 10)):
        write_idx(raw / f"{part}-images-idx3-ubyte", pixels[:count], packed)
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels[:count], packed)
    data = open_data(f"fashion-mnist:{tmp_path}", limit_train=15)
    assert (len(data.train), len(data.val), len(data.classes), data.image_size) == (15, 10, 10, (28, 28))
    image, label = data.val[3]
    assert (image.shape, label) == ((3, 28, 28), 3)
    assert np.array_equal(image[2], pixels[3])
    assert open_data(f"fashion-mnist:{tmp_path}", channels=1).train[0][0].shape == (1, 28, 28)


def test_cifar(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda _: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = picture(0, (2, 3, 32, 32))
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps({"data": pixels.reshape(2, -1), "labels": [7, 3]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    data = open_data(f"cifar10:{tmp_path}")
    assert (len(data.train), len(data.val), data.classes[3]) == (10, 2, "class 3")
    assert np.array_equal(data.val[0][0], pixels[0])
    assert data.val[0][1] == 7


def test_pets(tmp_path):
    base = tmp_path / "oxford-iiit-pet"
    for folder in ("images", "annotations"):
        (base / folder).mkdir(parents=True)
    for part in ("trainval", "test"):
        lines = [
            f"{name}_{part}_{i} {label} 1 1" for i in range(2) for label, name in ((2, "pug"), (1, "Egyptian_Mau"))
        ]
        (base / "annotations" / f"{part}.txt").write_text("\n".join(lines) + "\n")
        for i, line in enumerate(lines):
            Image.fromarray(picture(i)).save(base / "images" / f"{line.split()[0]}.jpg")
    data = open_data(f"oxford-iiit-pet:{tmp_path}")
    assert (len(data.train), len(data.val), len(data.classes)) == (4, 4, 2)
    assert data.train.labels.tolist() == [1, 0, 1, 0]


def test_flowers102(tmp_path, monkeypatch):
    from scipy.io import savemat

    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda *_: True)
    base = tmp_path / "flowers-102"
    (base / "jpg").mkdir(parents=True)
    savemat(base / "setid.mat", {"trnid": [1, 3], "valid": [2, 4], "tstid": [5, 6]})
    savemat(base / "imagelabels.mat", {"labels": [5, 6, 7, 8, 9, 10]})
    for i in range(1, 5):
        Image.fromarray(picture(i)).save(base / "jpg" / f"image_{i:05}.jpg")
    data = open_data(f"flowers102:{tmp_path}")
    assert (len(data.classes), data.train.labels.tolist(), data.val.labels.tolist()) == (102, [4, 6], [5, 7])
    assert data.train.names[1] == "flowers-102/jpg/image_00003.jpg"


def test_imagenet(tmp_path):
    for part in ("train", "val"):
        class_folders(tmp_path / part, {"n01": 2, "n02": 1})
    torch.save(({"n01": ("tench", "Tinca"), "n02": ("goldfish",)}, []), tmp_path / "meta.bin")
    data = open_data(f"imagenet:{tmp_path}")
    assert (data.classes, data.train.labels.tolist()) == (("tench", "goldfish"), [0, 0, 1])


# --- reading --------------------------------------------------------------------------------------------------------


def test_small_files_are_decoded_once(flowers):
    paths = sorted((flowers / "train" / "rose").iterdir())
    Image.fromarray(picture(1, (5, 5, 3))).save(paths[3])  # of another size: never kept
    reader = Files(paths, 3)
    reader.keep()
    first = [reader(i).clone() for i in range(6)]
    copy = pickle.loads(pickle.dumps(reader))
    for path in paths[:3]:
        path.unlink()
    assert all(torch.equal(reader(i), first[i]) for i in range(6))
    assert isinstance(refusal(copy, 0), CheckpointError)
    Image.fromarray(picture(2, (5, 5, 3))).save(paths[3])
    assert not torch.equal(reader(3), first[3])


def test_too_much_is_not_kept(flowers):
    paths = sorted((flowers / "train" / "rose").iterdir())
    reader = Files(paths, 3)
    reader.keep(limit=6 * 10 * 12 * 3 - 1)
    paths[0].unlink()
    assert str(refusal(reader, 0)) == f"{paths[0]} does not exist"


def test_arrays_of_grey_and_colour():
    grey, colour = torch.from_numpy(picture(0, (2, 4, 5))), torch.from_numpy(picture(0, (2, 4, 5, 3)))
    assert torch.equal(Array(grey, 3)(1), grey[1].expand(3, 4, 5))
    assert torch.equal(Array(colour, 3)(1), colour[1].permute(2, 0, 1))
    assert Array(colour, 1)(1).shape == (1, 4, 5)


# --- preparing ------------------------------------------------------------------------------------------------------


def test_evaluation_is_the_recorded_preprocessing():
    pixels = torch.from_numpy(picture(0, (3, 20, 13)))
    assert torch.equal(Transform(RECIPE)(pixels), RECIPE.normalise(RECIPE.place(pixels)))


def test_images_of_several_sizes_and_of_one_are_prepared_alike():
    images = [torch.from_numpy(picture(i, (3, 20, 13))) for i in range(3)]
    other = torch.from_numpy(picture(9, (3, 7, 9)))
    for augmentation in ("none", "crop-flip", "resized-crop"):
        transform, seeds = Transform(RECIPE, augmentation), [4, 5, 6, 7]
        together, mixed = transform.many(images, seeds), transform.many([*images, other], seeds)
        assert torch.equal(together, mixed[:3])
        assert mixed.shape == (4, 3, 8, 8)


@pytest.mark.parametrize(("side", "chosen"), [(32, "crop-flip"), (64, "crop-flip"), (65, "resized-crop")])
def test_auto_goes_by_the_inputs_size(side, chosen):
    pixels = torch.from_numpy(picture(0, (3, side, side)))
    recipe = Preprocessing.plain((3, side, side))
    auto, named = (Transform(recipe, name).many([pixels], [3]) for name in ("auto", chosen))
    assert torch.equal(auto, named)
    assert auto.shape == (1, 3, side, side)


def test_crop_flip_shifts_by_four_pixels_in_thirty_two():
    """Every result is the image padded with black, shifted by up to 4 and perhaps mirrored."""
    pixels = torch.from_numpy(picture(0, (1, 32, 32)))
    transform = Transform(Preprocessing.plain((1, 32, 32)), "crop-flip")
    padded = nn.functional.pad(pixels, (4,) * 4)
    possible = {}
    for top in range(9):
        for left in range(9):
            part = padded[:, top : top + 32, left : left + 32]
            possible[part.numpy().tobytes()] = (top, left, False)
            possible[part.flip(2).contiguous().numpy().tobytes()] = (top, left, True)
    seen = {
        possible[(image * 255).round().to(torch.uint8).numpy().tobytes()]
        for image in transform.many([pixels] * 200, range(200))
    }
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(9))
    assert {mirrored for _, _, mirrored in seen} == {True, False}


def test_small_and_grey_images_fill_a_large_input():
    images = Array(torch.from_numpy(picture(0, (2, 28, 28))), 3)
    recipe = choose_preprocessing(None, (3, 32, 32), image_size=(28, 28)).preprocessing
    assert Transform(recipe)(images(0)).shape == (3, 32, 32)
    assert Transform(recipe, "resized-crop")(images(0)).shape == (3, 32, 32)


def test_transforms_that_are_refused():
    assert str(refusal(Transform, RECIPE, "mixup")) == "there is no augmentation 'mixup'"
    uncropped = Preprocessing(8, None, (0.0,) * 3, (1.0,) * 3)
    assert str(refusal(Transform, uncropped)) == "preprocessing without a crop gives inputs of different sizes"


def network_of(name: str = "resnet18", size: tuple[int, ...] | None = (3, 224, 224), task: str = "classification"):
    return LoadedNetwork(nn.Identity(), Architecture(name, {}, size, task), None, ())


def data_of(height: int, width: int) -> Data:
    images = Images.of(["0"], [0], Array(torch.zeros(1, height, width, 3, dtype=torch.uint8), 3))
    return Data("x", ("a", "b"), images, images, 3, (height, width), "", split=False)


def test_the_networks_own_preprocessing():
    chosen = preprocessing_of(network_of(), data_of(300, 400))
    assert chosen.preprocessing == Preprocessing(256, (224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert chosen.note == ""
    half = preprocessing_of(network_of(), data_of(300, 400), size=(112, 112)).preprocessing
    assert (half.resize, half.crop) == (128, (112, 112))


def test_small_images_keep_their_edges():
    chosen = preprocessing_of(network_of(size=(3, 64, 64)), data_of(28, 28))
    assert (chosen.preprocessing.resize, chosen.preprocessing.crop) == (64, (64, 64))
    assert chosen.note == "images of 28×28 are resized to 64×64, and no edges are cut off"


def test_what_nothing_is_known_of_gets_values_between_0_and_1():
    network = network_of("package:net", (3, 32, 32), "other")
    chosen = preprocessing_of(network, data_of(28, 28))
    assert chosen.preprocessing == Preprocessing(32, (32, 32), (0.0,) * 3, (1.0,) * 3)
    assert chosen.note == (
        "no preprocessing is recorded: images are resized to 32×32 and scaled to [0, 1], not normalised"
    )
    flagged = preprocessing_of(network, data_of(28, 28), mean=[0.5], std=[0.1, 0.2, 0.3])
    assert (flagged.preprocessing.mean, flagged.preprocessing.std) == ((0.5,) * 3, (0.1, 0.2, 0.3))
    assert flagged.note == ""
    grey = preprocessing_of(network_of("package:net", (1, 32, 32), "other")).preprocessing
    assert grey.mean == (0.0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": [0.1, 0.2]}, "--mean has 2 values for 3 channels"),
        ({"std": [0.0]}, "--std must be positive, not 0"),
        ({"mean": [float("nan")]}, "--mean nan is out of range"),
    ],
)
def test_flags_without_sense(options, message):
    assert str(refusal(preprocessing_of, network_of(), data_of(8, 8), **options)) == message


def test_networks_that_take_no_images():
    assert "takes inputs of size 3x16x112x112, which are not images" in str(
        refusal(preprocessing_of, network_of("r3d_18", (3, 16, 112, 112), "video"))
    )
    assert "the input size of a:b is not known" in str(refusal(preprocessing_of, network_of("a:b", None, "other")))


# --- batches --------------------------------------------------------------------------------------------------------


def numbered(count: int, shape: tuple[int, ...] = (10, 10)) -> Images:
    """Images of random pixels, whose labels are their indices."""
    return Images.of(
        [str(i) for i in range(count)], list(range(count)), Array(torch.from_numpy(picture(0, (count, *shape))), 3)
    )


def collect(images: Images, augmentation: str = "crop-flip", **options) -> list[tuple[Tensor, Tensor]]:
    options = {"batch_size": 4, "epoch": 1, "seed": 3, "shuffle": True, "drop_last": True} | options
    found = batches(images, Transform(RECIPE, augmentation), **options)
    made = [(x.clone(), y.clone()) for x, y in found]
    assert len(made) == len(found)
    return made


def assert_same(first, second) -> None:
    assert len(first) == len(second)
    for (x, y), (u, v) in zip(first, second, strict=True):
        assert torch.equal(y, v)
        assert torch.equal(x, u)


def test_a_batch():
    x, y = collect(numbered(10))[0]
    assert (x.dtype, x.shape, y.dtype, y.shape) == (torch.float32, (4, 3, 8, 8), torch.int64, (4,))


@pytest.mark.parametrize("augmentation", ["crop-flip", "resized-crop"])
def test_an_epoch_goes_on_with_the_same_bits(augmentation):
    """From any batch on, with any number of workers, and in any state of torch's generator."""
    images = numbered(30)
    whole = collect(images, augmentation)
    assert len(whole) == 7
    torch.manual_seed(99)
    for start in (0, 3, 7):
        assert_same(collect(images, augmentation, start_batch=start), whole[start:])
    assert_same(collect(images, augmentation, start_batch=2, workers=2), whole[2:])


def test_torchs_own_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for workers in (0, 1):
        collect(numbered(9), workers=workers)
    assert torch.equal(torch.rand(3), expected)


def test_processes_share_the_images_that_one_would_see():
    images = numbered(32)
    alone = collect(images, batch_size=8)
    shared = [collect(images, batch_size=4, rank=rank, world_size=2) for rank in (0, 1)]
    for (x, y), *parts in zip(alone, *shared, strict=True):
        together = dict(zip(torch.cat([p[1] for p in parts]).tolist(), torch.cat([p[0] for p in parts]), strict=True))
        assert sorted(together) == sorted(y.tolist())
        assert all(torch.equal(together[int(label)], image) for image, label in zip(x, y, strict=True))


def test_order_and_chance_differ_from_epoch_to_epoch():
    images = numbered(16)
    runs = [collect(images, epoch=epoch, batch_size=16)[0] for epoch in (0, 1)]
    assert sorted(runs[0][1].tolist()) == sorted(runs[1][1].tolist()) == list(range(16))
    assert runs[0][1].tolist() != runs[1][1].tolist()
    first, second = ({int(label): image for image, label in zip(*run, strict=True)} for run in runs)
    assert sum(torch.equal(first[i], second[i]) for i in range(16)) < 4
    other = collect(images, seed=4, epoch=0, batch_size=16)[0]
    assert other[1].tolist() != runs[0][1].tolist()


def test_incomplete_batches():
    sizes = [len(y) for _, y in collect(numbered(10), drop_last=False)]
    assert sizes == [4, 4, 2]
    assert [len(y) for _, y in collect(numbered(10))] == [4, 4]
    assert str(refusal(collect, numbered(3))) == "3 images are fewer than one batch, which has 4"
    assert str(refusal(collect, numbered(7), world_size=2)) == "7 images are fewer than one batch, which has 8"


@pytest.mark.parametrize("count", [1, 9, 10])
def test_without_shuffling_every_image_comes_once(count):
    options = {"shuffle": False, "drop_last": False, "world_size": 2}
    shares = [collect(numbered(count), "none", rank=rank, **options) for rank in (0, 1)]
    labels = [[int(label) for _, y in share for label in y] for share in shares]
    assert labels == [list(range(0, count, 2)), list(range(1, count, 2))]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_in_one_line(flowers, workers):
    path = flowers / "train" / "lily" / "03.png"
    path.write_bytes(path.read_bytes()[:100])
    error = refusal(collect, open_data(flowers).train, workers=workers)
    assert isinstance(error, CheckpointError)
    assert str(error).startswith(f"{path} is not an intact image: ")
    assert error.tip == "Remove it from the folder, or replace it."


def end_worker(_: int) -> Tensor:
    os._exit(1)


def test_a_worker_that_was_ended_is_told_in_one_line():
    error = refusal(collect, Images.of(["0"] * 8, [0] * 8, end_worker), workers=1)
    assert isinstance(error, DataError)
    assert str(error).startswith("a process that reads images was killed: DataLoader worker (pid")


def test_workers_use_one_thread():
    seen = collect(Images.of(["0"] * 4, [0] * 4, threads), "none", workers=1)
    image = RECIPE.normalise(torch.ones(3, 8, 8, dtype=torch.uint8))
    assert torch.equal(seen[0][0][0], image)


def threads(_: int) -> Tensor:
    """The number of threads that this process uses, as an image."""
    return torch.full((3, 9, 9), torch.get_num_threads(), dtype=torch.uint8)


# --- Fashion-MNIST --------------------------------------------------------------------------------------------------


@real
def test_the_whole_of_fashion_mnist():
    data = open_data(f"fashion-mnist:{DATA}")
    assert (len(data.train), len(data.val), data.image_size) == (60000, 10000, (28, 28))
    assert data.classes[0] == "T-shirt/top"
    assert torch.bincount(data.train.labels).tolist() == [6000] * 10
    image, label = data.train[0]
    assert (label, image.shape) == (9, (3, 28, 28))
    few = open_data(f"fashion-mnist:{DATA}", limit_train=random.Random(0).randrange(50, 60))
    assert set(torch.bincount(few.train.labels).tolist()) <= {5, 6}
