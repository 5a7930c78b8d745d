"""Labelled images to train and to measure on.

They are a folder of class folders, or one of torchvision's data sets. All random choices (the
held-out part, a limited number of images) follow from a seed and the order of the names, so a
resumed run finds the same images in the same order; ``Data.digest`` tells whether it did.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from pathconvert.errors import DataError
from pathconvert.training.data.images import Images
from pathconvert.training.data.sources import (
    HELD_OUT,
    NAMED,
    DataSource,
    from_folder,
    from_torchvision,
)


@dataclass(frozen=True, eq=False)
class Data:
    """Labelled images in two parts.

    Attributes:
        name: the specification that they were found by.
        classes: names of the classes, in the order of the labels.
        train, val: the images to train on, and the held-out images.
        channels: channels of every image, 1 or 3.
        image_size: height and width of the first training image; others may differ.
        digest: SHA-256 of the classes and of the names and labels of all images, in their order.
        split: whether the held-out images were chosen at random, because the source has only one
            part.
    """

    name: str
    classes: tuple[str, ...]
    train: Images
    val: Images
    channels: int
    image_size: tuple[int, int]
    digest: str
    split: bool


def open_data(
    spec: str | Path,
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    limit_train: int | None = None,
    limit_val: int | None = None,
    channels: int = 3,
) -> Data:
    """Find labelled images.

    Args:
        spec: a folder with ``train/`` and ``val/`` (or ``valid``, ``validation``, ``test``), each
            with one folder per class; one folder with a folder per class; or ``NAME:ROOT``, a
            torchvision data set in the folder ROOT, which is never downloaded.
        val_fraction: share of every class that is held out, at least one image, where the source
            has only one part.
        seed: of that choice and of the limits.
        limit_train, limit_val: take at most this many images, as evenly as possible from all
            classes; None takes all.
        channels: 1 for grey, 3 for RGB.

    Raises:
        DataError: the images are missing, a class has none, the two parts have different classes,
            or an option is out of range.
        CheckpointError: the first image of a part cannot be read.
    """
    for limit, option in ((limit_train, "--limit-train"), (limit_val, "--limit-val")):
        if limit is not None and limit < 1:
            raise DataError(
                f"{option} must be at least 1, not {limit}", f"Give {option} 1 or more."
            )
    source = _source(spec, channels)
    train, val = (source.train, source.val) if source.val else _split(source, val_fraction, seed)
    train, val = (
        _limited(part, limit, seed) for part, limit in ((train, limit_train), (val, limit_val))
    )
    height, width = train[0][0].shape[1:]
    digest = _digest(source.classes, train, val)
    return Data(
        str(spec),
        source.classes,
        train,
        val,
        channels,
        (height, width),
        digest,
        split=source.val is None,
    )


def _source(spec: str | Path, channels: int) -> DataSource:
    """Find the images that ``spec`` names.

    Raises:
        DataError: there are none, or they cannot be used.
    """
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return from_folder(folder, channels)
    named = re.fullmatch(r"([\w-]+):(.+)", str(spec))
    if named and not folder.exists():
        return from_torchvision(named[1].lower(), Path(named[2]).expanduser(), channels)
    if str(spec).lower() in NAMED:
        raise DataError(
            f"{spec} needs the folder that its files are in", f"Add the folder: {spec}:ROOT"
        )
    raise DataError(
        f"{spec} {'is a file' if folder.exists() else 'does not exist'}; a folder of class folders"
        " is needed",
        f"Give a folder with train/ and one of {', '.join(f'{name}/' for name in HELD_OUT)}, or"
        f" with class folders; or a data set, NAME:ROOT, where NAME is one of {', '.join(NAMED)}.",
    )


def _split(source: DataSource, fraction: float, seed: int) -> tuple[Images, Images]:
    """Hold out a random share of every class.

    Returns:
        The images to train on and the held-out images, both in the order of the source.

    Raises:
        DataError: ``fraction`` is not between 0 and 1, or a class has only one image.
    """
    if not 0 < fraction < 1:
        raise DataError(
            f"--val-fraction must be between 0 and 1, not {fraction:g}", "Give a share such as 0.1."
        )
    held_out = torch.zeros(len(source.train), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for label, name in enumerate(source.classes):
        members = (source.train.labels == label).nonzero().flatten()
        if len(members) < 2:
            raise DataError(
                f"the class {name!r} has only one image, so it cannot be split into training and"
                " validation",
                "Add images, or make train/ and val/ folders yourself.",
            )
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return source.train.only((~held_out).nonzero().flatten()), source.train.only(
        held_out.nonzero().flatten()
    )


def _limited(part: Images, limit: int | None, seed: int) -> Images:
    """``limit`` images, drawn from the classes in turn, which are in random order.

    The images keep their order.
    """
    if limit is None or limit >= len(part):
        return part
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(part), generator=generator)
    classes = int(part.labels.max()) + 1
    # the turn of each image's class within a round
    turn = torch.randperm(classes, generator=generator)[part.labels]
    rounds = torch.empty_like(part.labels)
    for label in range(classes):
        members = drawn[part.labels[drawn] == label]
        rounds[members] = torch.arange(len(members))
    return part.only((rounds * classes + turn).argsort()[:limit].sort().values)


def _digest(classes: tuple[str, ...], *parts: Images) -> str:
    """SHA-256 of the classes and of the names and labels of ``parts``."""
    content: list[object] = [
        list(classes),
        *([list(part.names), part.labels.tolist()] for part in parts),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
