"""How an image becomes a network's input, and what the network's classes are called.

A file that was fine-tuned, or whose user said how, records both (``metadata.py``). For
torchvision's networks their weights give them: those that the file is by its SHA-256, else the
default ones, and :func:`assumption` says where that matters. For any other network they are not
known, and normalisation is never guessed: see :meth:`Preprocessing.plain`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torchvision.models import WeightsEnum
from torchvision.transforms import InterpolationMode, v2

from pathconvert.choices import Interpolation
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.image_options import SIDE_LIMIT
from pathconvert.networks.pretrained import identified, weights_of

INTERPOLATIONS = get_args(Interpolation)


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes an input: resize, centre crop, [0, 255] → [0, 1], (x − mean) / std.

    Attributes:
        resize: the length of the shorter side, or (height, width).
        crop: (height, width) of the centre crop; None for no crop (segmentation).
        mean, std: one value per channel, for pixel values in [0, 1].
        interpolation: the interpolation of the resizing, one of ``INTERPOLATIONS`` (Pillow's
            names).
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"

    @staticmethod
    def plain(size: tuple[int, ...]) -> Preprocessing:
        """Values in [0, 1] at ``size`` (channels, height, width), not normalised.

        For networks that record nothing.
        """
        channels, height, width = size
        return Preprocessing(
            max(height, width), (height, width), (0.0,) * channels, (1.0,) * channels
        )

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> Preprocessing:
        """The inverse of :func:`dataclasses.asdict` through JSON.

        Raises:
            KeyError, TypeError, ValueError, IndexError: ``stored`` is not a valid preprocessing.
        """
        resize, crop = stored["resize"], stored["crop"]
        mean, std = tuple(map(float, stored["mean"])), tuple(map(float, stored["std"]))
        if (
            len(mean) != len(std)
            or not all(map(math.isfinite, (*mean, *std)))
            or min(std, default=1.0) <= 0
        ):
            raise ValueError("mean and std must be finite and of equal length, and std positive")
        if stored.get("interpolation", "bilinear") not in INTERPOLATIONS:
            raise ValueError(f"interpolation {stored['interpolation']!r} is not known")
        return Preprocessing(
            (
                (_side(resize[0]), _side(resize[1]))
                if isinstance(resize, list | tuple)
                else _side(resize)
            ),
            (_side(crop[0]), _side(crop[1])) if crop else None,
            mean,
            std,
            str(stored.get("interpolation", "bilinear")),
        )

    def at(self, size: tuple[int, int]) -> Preprocessing:
        """The preprocessing for inputs of another (height, width).

        ``resize`` changes in proportion to ``crop``.
        """
        if self.crop in (None, size):
            return self
        share = max(size) / max(self.crop or size)
        resize = (
            round(self.resize * share)
            if isinstance(self.resize, int)
            else (
                max(size[0], round(self.resize[0] * share)),
                max(size[1], round(self.resize[1] * share)),
            )
        )
        return dataclasses.replace(self, resize=resize, crop=size)

    def place(self, pixels: Tensor) -> Tensor:
        """Resize and crop: uint8 [C, H, W] → uint8 [C, height, width].

        The resizing works on 8-bit pixels, because torchvision measured the accuracy of its weights
        that way.
        """
        resize = [self.resize] if isinstance(self.resize, int) else list(self.resize)
        resized = v2.functional.resize(pixels, resize, InterpolationMode(self.interpolation))
        placed: Tensor = (
            v2.functional.center_crop(resized, list(self.crop)) if self.crop else resized
        )
        return placed

    def normalise(self, pixels: Tensor) -> Tensor:
        """Scale to [0, 1] and normalise: uint8 [..., C, H, W] → float32 of the same shape."""
        values = pixels.to(torch.float32) / 255
        normalised: Tensor = v2.functional.normalize(values, list(self.mean), list(self.std))
        return normalised


def _side(value: Any) -> int:
    """A length in pixels."""
    if not 1 <= float(value) < SIDE_LIMIT:
        raise ValueError(f"{value!r} is not a number of pixels")
    return int(value)


def whole_levels(pixels: Tensor) -> Tensor:
    """Values in [0, 1] → uint8 levels, as an image file of 8 bits stores them."""
    return (pixels * 255).round().to(torch.uint8)


# ---- what torchvision's weights expect -----------------------------------------------------------


def for_weights(architecture: Architecture | None, sha256: str | None) -> Preprocessing | None:
    """What the weights of a torchvision network expect, at the architecture's input size.

    Args:
        architecture: of the network; None if it is not known.
        sha256: of the file with the weights. If it is none of torchvision's files, its default
            weights are assumed (:func:`assumption`). None stands for the default weights.

    Returns:
        None for any other network, for video and detection, for a stem of another kind, and for
        inputs that do not have three channels.
    """
    if architecture is None:
        return None
    weights = _weights(architecture, sha256)
    return None if weights is None else _expected(weights, architecture)


def labels_of(architecture: Architecture | None, sha256: str | None) -> tuple[str, ...] | None:
    """The class names of the weights that :func:`for_weights` chooses.

    None without any, or if the network has another number of classes, or a head of another kind.
    """
    weights = _weights(architecture, sha256)
    categories = weights.meta.get("categories") if weights is not None else None
    if architecture is None or not categories or "head" in architecture.arguments:
        return None
    usual = len(categories)
    return tuple(categories) if architecture.arguments.get("num_classes", usual) == usual else None


def assumption(
    architecture: Architecture,
    sha256: str | None,
    applied: Callable[[Preprocessing], Preprocessing] = lambda expected: expected,
) -> str | None:
    """What :func:`for_weights` assumed, and what other weights of the network expect.

    Args:
        architecture, sha256: as in :func:`for_weights`.
        applied: what becomes of a preprocessing, such as the user's options; where it makes all of
            them alike, nothing was assumed.

    Returns:
        The end of a sentence about the file; None if nothing was assumed, because the file is one
        of torchvision's, or because all weights of the network expect the same.
    """
    if sha256 is None or identified(architecture.name, sha256) is not None:
        return None
    recipes = {
        weights.name: applied(expected)
        for weights in weights_of(architecture.name)
        if weights.meta.get("categories")
        and (expected := _expected(weights, architecture)) is not None
    }
    usual, assumed = next(iter(recipes.items()), ("", None))
    fields = [field.name for field in dataclasses.fields(Preprocessing)]
    differing = [
        name for name in fields if len({getattr(recipe, name) for recipe in recipes.values()}) > 1
    ]
    if assumed is None or not differing:
        return None
    others = " and ".join(
        f"{name} expects {_shown(recipe, differing)}"
        for name, recipe in recipes.items()
        if recipe != assumed
    )
    return (
        f"is none of torchvision's files for {architecture.name}, so images are prepared as for"
        f" {usual} ({_shown(assumed, differing)}); {others}"
    )


def _shown(recipe: Preprocessing, fields: Sequence[str]) -> str:
    """Some fields of a preprocessing as the options that give them: ``--resize 256``."""
    texts = []
    for name in fields:
        value = getattr(recipe, name)
        sign = "x" if name in ("resize", "crop") else ","
        text = sign.join(map(str, value)) if isinstance(value, tuple) else str(value)
        texts.append(f"--{name} {text}")
    return " ".join(texts)


def _weights(architecture: Architecture | None, sha256: str | None) -> WeightsEnum | None:
    """The weights with this SHA-256, else the default ones; None if there are none."""
    if architecture is None:
        return None
    known = identified(architecture.name, sha256) if sha256 else None
    return known or next(iter(weights_of(architecture.name)), None)


def _expected(weights: WeightsEnum, architecture: Architecture) -> Preprocessing | None:
    """torchvision's transforms for weights of an image network, at the architecture's input size.

    None if there are none that fit the network.
    """
    size = architecture.input_size
    transforms: Any = weights.transforms()
    if (
        architecture.task not in ("classification", "segmentation")
        or (size is not None and (len(size), size[0]) != (3, 3))
        or "stem" in architecture.arguments
        or not getattr(transforms, "resize_size", None)
    ):
        return None
    resize = int(transforms.resize_size[0])
    crop = getattr(transforms, "crop_size", None)
    mean, std = (
        tuple(float(value) for value in values) for values in (transforms.mean, transforms.std)
    )
    sides = (int(crop[0]), int(crop[-1])) if crop else None
    expected = Preprocessing(resize, sides, mean, std, transforms.interpolation.value)
    return expected.at((size[1], size[2])) if size else expected
