"""torchvision's data sets as labelled images, from small files and from the real Fashion-MNIST."""

import gzip
import os
import pickle
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from labelled_images import class_folders, picture
from PIL import Image

from pathconvert.training.data.labelled import open_data

DATA = os.environ.get("PATHCONVERT_DATA")
real = pytest.mark.skipif(
    DATA is None, reason="PATHCONVERT_DATA does not name the folder with Fashion-MNIST"
)


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
    assert (len(data.train), len(data.val), len(data.classes), data.image_size) == (
        15,
        10,
        10,
        (28, 28),
    )
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
    (folder / "batches.meta").write_bytes(
        pickle.dumps({"label_names": [f"class {i}" for i in range(10)]})
    )
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
            f"{name}_{part}_{i} {label} 1 1"
            for i in range(2)
            for label, name in ((2, "pug"), (1, "Egyptian_Mau"))
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
    assert (len(data.classes), data.train.labels.tolist(), data.val.labels.tolist()) == (
        102,
        [4, 6],
        [5, 7],
    )
    assert data.train.names[1] == "flowers-102/jpg/image_00003.jpg"


def test_imagenet(tmp_path):
    for part in ("train", "val"):
        class_folders(tmp_path / part, {"n01": 2, "n02": 1})
    torch.save(({"n01": ("tench", "Tinca"), "n02": ("goldfish",)}, []), tmp_path / "meta.bin")
    data = open_data(f"imagenet:{tmp_path}")
    assert (data.classes, data.train.labels.tolist()) == (("tench", "goldfish"), [0, 0, 1])


# ---- Fashion-MNIST -------------------------------------------------------------------------------


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
