"""Where labelled images come from: folders with one folder per class, and torchvision's data sets.

A *part* is a list of images with their labels. A source has a training part and a held-out part, or
a single part that is still to be split. Classes are numbered in the order of their folders' names,
or as torchvision numbers them.
"""

from __future__ import annotations

import difflib
import gzip
import os
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from pathconvert.errors import DataError
from pathconvert.networks.images import IMAGE_SUFFIXES
from pathconvert.training.data.images import Array, Files, Images

#: Names that the folder of held-out images may have, the preferred name first.
HELD_OUT = ("val", "valid", "validation", "test")
_LAYOUT = (
    "Put the images of each class into a folder of its own: flowers/train/rose/1.jpg,"
    " flowers/val/rose/2.jpg"
)


@dataclass(frozen=True)
class DataSource:
    """Labelled images as they were found.

    Attributes:
        classes: names of the classes, in the order of the labels.
        train: the training part.
        val: the held-out part; None where ``train`` holds all images and is still to be split.
    """

    classes: tuple[str, ...]
    train: Images
    val: Images | None


# ---- folders -------------------------------------------------------------------------------------


def from_folder(folder: Path, channels: int) -> DataSource:
    """Images in class folders: below ``train/`` and one of ``HELD_OUT``, or in the folder itself.

    Args:
        folder: an existing folder.
        channels: 1 for grey, 3 for RGB.

    Raises:
        DataError: there are fewer than two class folders, one holds no images, or the two parts
            have different classes.
        CheckpointError: the first image cannot be read.
    """
    train = folder / "train"
    parted = train.is_dir() and bool(_folders(train))  # a class may be called "train"
    val = (
        next((folder / name for name in HELD_OUT if (folder / name).is_dir()), None)
        if parted
        else None
    )
    parts = {"train", *HELD_OUT}
    if train.is_dir() and not parted and {path.name for path in _folders(folder)} <= parts:
        raise DataError(f"{train} does not hold one folder of images per class", _LAYOUT)
    first = _class_files(train if parted else folder)
    if len(first) == 1:
        where = train if parted else folder
        raise DataError(
            f"{where} holds only one class: {next(iter(first))}", f"Two are needed. {_LAYOUT}"
        )
    classes, images = tuple(first), _images(folder, first, channels)
    if val is None:
        return DataSource(classes, images, None)
    second = _class_files(val)
    _require_same(train, first, val, second)
    return DataSource(classes, images, _images(folder, second, channels))


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, without hidden ones, by name."""
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def _class_files(folder: Path) -> dict[str, list[Path]]:
    """The image files of every class folder in a folder, all in the order of their names.

    Raises:
        DataError: there is no class folder, or one holds no images.
    """
    files = {path.name: _image_files(path) for path in _folders(folder)}
    if not files:
        loose = any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())
        but = "holds images, but not" if loose else "does not hold"
        raise DataError(f"{folder} {but} one folder of images per class", _LAYOUT)
    empty = [name for name, paths in files.items() if not paths]
    if empty:
        raise DataError(
            f"{folder / empty[0]} holds no images{_and_more(empty)}",
            "Add some, or remove the folder. Image files end in"
            f" {', '.join(sorted(IMAGE_SUFFIXES))}.",
        )
    return files


def _image_files(folder: Path) -> list[Path]:
    """The image files in a folder and below it.

    Every folder is visited once, as links may lead back to one.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for place, below, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        images = (
            name
            for name in names
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")
        )
        found += (Path(place) / name for name in images)
    return sorted(found)


def _require_same(train: Path, first: Iterable[str], val: Path, second: Iterable[str]) -> None:
    """Refuse parts with different classes.

    Raises:
        DataError: a class of one part is missing in the other.
    """
    for there, here, names in (
        (train, val, sorted(set(first) - set(second))),
        (val, train, sorted(set(second) - set(first))),
    ):
        if names:
            raise DataError(
                f"the class {names[0]!r} of {there} is missing in {here}{_and_more(names)}",
                f"Both need the same class folders: add {here / names[0]}, or remove"
                f" {there / names[0]}.",
            )


def _and_more(names: list[str]) -> str:
    """How many more there are than the first of ``names``, which a message tells."""
    return f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""


def _images(root: Path, files: dict[str, list[Path]], channels: int) -> Images:
    pairs = [(path, label) for label, paths in enumerate(files.values()) for path in paths]
    return _from_files(root, [path for path, _ in pairs], [label for _, label in pairs], channels)


def _from_files(root: Path, paths: list[Path], labels: list[int], channels: int) -> Images:
    reader = Files(paths, channels)
    reader.keep()
    return Images.of([path.relative_to(root).as_posix() for path in paths], labels, reader)


# ---- torchvision's data sets ---------------------------------------------------------------------


def from_torchvision(name: str, root: Path, channels: int) -> DataSource:
    """One of torchvision's data sets in ``NAMED``; nothing is ever downloaded.

    Args:
        name: its name, in lower case.
        root: the folder that torchvision's class takes as ``root``.
        channels: 1 for grey, 3 for RGB.

    Raises:
        DataError: the name is unknown, or files of the data set are missing or damaged.
    """
    if name not in NAMED:
        close = difflib.get_close_matches(name, NAMED, 2, 0.5)
        guess = f"Did you mean {' or '.join(close)}? " if close else ""
        raise DataError(
            f"there is no data set {name!r}", f"{guess}Choose one of {', '.join(NAMED)}."
        )
    dataset, opener = NAMED[name]
    try:
        return opener(dataset, root, channels)
    except (RuntimeError, OSError, ValueError, EOFError, LookupError, zlib.error) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{name} in {root} is incomplete: {said}",
            f"Let torchvision.datasets.{dataset.__name__} prepare it there, or give the folder that"
            " it is in.",
        ) from error


def _fashion_mnist(dataset: Any, root: Path, channels: int) -> DataSource:
    """Fashion-MNIST: its four files.

    They may be unpacked, as torchvision reads them, or packed, as they are distributed.
    """
    raw = root / "FashionMNIST" / "raw"
    train, val = (
        _from_array(
            _idx(raw / f"{part}-images-idx3-ubyte"),
            _idx(raw / f"{part}-labels-idx1-ubyte"),
            channels,
        )
        for part in ("train", "t10k")
    )
    return DataSource(tuple(dataset.classes), train, val)


def _idx(path: Path) -> Tensor:
    """An array in MNIST's format.

    It holds two zero bytes, 8 for uint8, the number of dimensions, 4 bytes for each of them, and
    the values.
    """
    packed = path.with_name(f"{path.name}.gz")
    content = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    shape = np.frombuffer(content, ">u4", content[3], offset=4)
    return torch.tensor(
        np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape.astype(int))
    )


def _cifar(dataset: Any, root: Path, channels: int) -> DataSource:
    parts = [dataset(root, train=train) for train in (True, False)]
    train, val = (
        _from_array(torch.from_numpy(part.data), part.targets, channels) for part in parts
    )
    return DataSource(tuple(parts[0].classes), train, val)


def _from_array(pixels: Tensor, labels: Tensor | list[int], channels: int) -> Images:
    return Images.of(
        [str(number) for number in range(len(pixels))], labels, Array(pixels, channels)
    )


def _flowers(dataset: Any, root: Path, channels: int) -> DataSource:
    """Flowers102: its train and val parts, with 1020 images each."""
    # gives the path instead of the image
    parts = [dataset(root, split=split, loader=Path) for split in ("train", "val")]
    train, val = (
        _from_files(root, [path for path, _ in pairs], [label for _, label in pairs], channels)
        for pairs in ([part[i] for i in range(len(part))] for part in parts)
    )
    return DataSource(tuple(parts[0].classes), train, val)


def _pets(dataset: Any, root: Path, channels: int) -> DataSource:
    """Oxford-IIIT Pet, with 37 classes: its trainval and test parts."""
    parts = [dataset(root, split=split) for split in ("trainval", "test")]
    # torchvision's class has no public list of its files, and would read them without the checks of
    # read_image
    train, val = (
        _from_files(root, list(part._images), list(part._labels), channels) for part in parts
    )
    return DataSource(tuple(parts[0].classes), train, val)


def _imagenet(dataset: Any, root: Path, channels: int) -> DataSource:
    missing = [name for name in ("meta.bin", "train", "val") if not (root / name).exists()]
    if missing:  # otherwise torchvision would begin to unpack archives of 150 GB
        raise FileNotFoundError(f"{missing[0]} is missing")
    parts = [dataset(root, split=split) for split in ("train", "val")]
    train, val = (
        _from_files(root, [Path(path) for path, _ in part.samples], list(part.targets), channels)
        for part in parts
    )
    return DataSource(tuple(names[0] for names in parts[0].classes), train, val)


#: Data sets by the name that ``NAME:ROOT`` gives.
NAMED: dict[str, tuple[Any, Callable[[Any, Path, int], DataSource]]] = {
    "fashion-mnist": (datasets.FashionMNIST, _fashion_mnist),
    "cifar10": (datasets.CIFAR10, _cifar),
    "cifar100": (datasets.CIFAR100, _cifar),
    "flowers102": (datasets.Flowers102, _flowers),
    "oxford-iiit-pet": (datasets.OxfordIIITPet, _pets),
    "imagenet": (datasets.ImageNet, _imagenet),
}
