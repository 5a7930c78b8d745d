"""Labelled images to train and to measure on: a folder of class folders, or one of torchvision's data sets.

Everything that is chosen by chance (the held-out part, a limit) follows from a seed and the order of the names, so that
a run that is taken up again finds the same images in the same order; ``Data.digest`` tells whether it did.
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
from pathconvert.training.data.sources import HELD_OUT, NAMED, Source, from_folder, from_torchvision


@dataclass(frozen=True, eq=False)
class Data:
    """Labelled images in two parts.

    Attributes:
        name: what was asked for.
        classes: their names, in the order of the labels.
        train, val: what to train on, and what is held out.
        channels: of every image, 1 or 3.
        image_size: (height, width) of the first training image; others may differ.
        digest: SHA-256 of the classes and, of both parts, all names and labels in their order.
        split: whether chance chose what is held out, from one folder.
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
        spec: a folder with ``train/`` and ``val/`` (or ``valid``, ``validation``, ``test``), each of class folders; one
            folder of class folders; or ``NAME:ROOT`` of a torchvision data set, which is never downloaded.
        val_fraction: of one folder of class folders, the share of every class that is held out, at least one image.
        seed: of that choice and of the limits.
        limit_train, limit_val: take so many images, as evenly from the classes as can be; None for all.
        channels: 1 for grey, 3 for RGB.

    Raises:
        DataError: it is not there, empty, its parts do not go together, or an option has no sense.
        CheckpointError: the first image of a part cannot be read.
    """
    for limit, option in ((limit_train, "--limit-train"), (limit_val, "--limit-val")):
        if limit is not None and limit < 1:
            raise DataError(f"{limit} images are none", f"Give {option} 1 or more.")
    source = _source(spec, channels)
    train, val = (source.train, source.val) if source.val else _split(source, val_fraction, seed)
    train, val = (_limited(part, limit, seed) for part, limit in ((train, limit_train), (val, limit_val)))
    height, width = train[0][0].shape[1:]
    digest = _digest(source.classes, train, val)
    return Data(str(spec), source.classes, train, val, channels, (height, width), digest, split=source.val is None)


def _source(spec: str | Path, channels: int) -> Source:
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return from_folder(folder, channels)
    named = re.fullmatch(r"([\w-]+):(.+)", str(spec))
    if named and not folder.exists():
        return from_torchvision(named[1].lower(), Path(named[2]).expanduser(), channels)
    if str(spec).lower() in NAMED:
        raise DataError(f"where the files of {spec} are is missing", f"Add the folder: {spec}:ROOT")
    raise DataError(
        f"{spec} is {'a file' if folder.exists() else 'not there'}; a folder of class folders is needed",
        f"It has train/ and one of {', '.join(f'{name}/' for name in HELD_OUT)}, or class folders alone; "
        f"else name a data set: NAME:ROOT, NAME one of {', '.join(NAMED)}.",
    )


def _split(source: Source, fraction: float, seed: int) -> tuple[Images, Images]:
    """Hold out a share of every class; both parts keep the order."""
    if not 0 < fraction < 1:
        raise DataError(f"{fraction:g} of the images cannot be held out", "Give --val-fraction between 0 and 1.")
    held_out = torch.zeros(len(source.train), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for label, name in enumerate(source.classes):
        members = (source.train.labels == label).nonzero().flatten()
        if len(members) < 2:
            raise DataError(
                f"the class {name!r} has one image, which cannot be split into training and validation",
                "Add images, or make train/ and val/ folders yourself.",
            )
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return source.train.only((~held_out).nonzero().flatten()), source.train.only(held_out.nonzero().flatten())


def _limited(part: Images, limit: int | None, seed: int) -> Images:
    """So many images, drawn in turn from the classes, whose order is drawn too; they keep their order."""
    if limit is None or limit >= len(part):
        return part
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(part), generator=generator)
    classes = int(part.labels.max()) + 1
    turn = torch.randperm(classes, generator=generator)[part.labels]  # of each image's class, in every round
    rounds = torch.empty_like(part.labels)
    for label in range(classes):
        members = drawn[part.labels[drawn] == label]
        rounds[members] = torch.arange(len(members))
    return part.only((rounds * classes + turn).argsort()[:limit].sort().values)


def _digest(classes: tuple[str, ...], *parts: Images) -> str:
    content: list[object] = [list(classes), *([list(part.names), part.labels.tolist()] for part in parts)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
