"""How an image becomes a network's input, and what the network's classes are called.

The file of a fine-tuned network records both (``metadata.py``). For torchvision's networks its
default weights give them. For any other network they are not known, and normalisation is never
guessed: see :meth:`Preprocessing.plain`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from pathconvert.errors import PathconvertError
from pathconvert.networks import architectures
from pathconvert.networks.architectures import Architecture

INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")


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
    def for_architecture(architecture: Architecture | None) -> Preprocessing | None:
        """What torchvision's default weights expect, at the architecture's input size.

        None for any other network, for video and detection, and for inputs that do not have three
        channels.
        """
        transforms = _default_transforms(architecture)
        if architecture is None or transforms is None:
            return None
        resize = int(transforms.resize_size[0])
        crop = getattr(transforms, "crop_size", None)
        size = architecture.input_size
        sides: tuple[int, int] | None = None
        if crop:
            sides = (int(crop[0]), int(crop[0])) if size is None else (size[1], size[2])
            resize = round(resize * max(sides) / int(crop[0]))
        mean, std = (
            tuple(float(value) for value in values) for values in (transforms.mean, transforms.std)
        )
        return Preprocessing(resize, sides, mean, std, transforms.interpolation.value)

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
    if not 1 <= float(value) < 2**16:
        raise ValueError(f"{value!r} is not a number of pixels")
    return int(value)


def parse_sides(text: str | None) -> tuple[int, int] | None:
    """``224`` or ``224x160`` → (height, width).

    Raises:
        PathconvertError: the text is neither.
    """
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise PathconvertError(
            f"{text!r} is not a size", "Give height and width, or one number for both: --size 224"
        )
    return int(parts[0]), int(parts[-1])


def parse_values(text: str | None, option: str) -> list[float] | None:
    """``0.5`` or ``0.485,0.456,0.406`` → one value, or one value per channel.

    Raises:
        PathconvertError: a part of the text is not a number.
    """
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise PathconvertError(
            f"{text!r} is not a list of numbers",
            f"Give one number, or one per channel: {option} 0.5",
        ) from None


def whole_levels(pixels: Tensor) -> Tensor:
    """Values in [0, 1] → uint8 levels, as an image file of 8 bits stores them."""
    return (pixels * 255).round().to(torch.uint8)


def labels_for(architecture: Architecture | None) -> tuple[str, ...] | None:
    """The class names of torchvision's default weights.

    None without any, or if the network has another number.
    """
    weights = _default_weights(architecture)
    categories = weights.meta.get("categories") if weights is not None else None
    if architecture is None or not categories:
        return None
    usual = len(categories)
    return tuple(categories) if architecture.arguments.get("num_classes", usual) == usual else None


def _default_transforms(architecture: Architecture | None) -> Any:
    """torchvision's transforms for its default weights of an image network.

    None if there are none, or if the network does not take three channels.
    """
    weights = _default_weights(architecture)
    if (
        weights is None
        or architecture is None
        or architecture.task not in ("classification", "segmentation")
    ):
        return None
    if architecture.input_size is not None and (
        len(architecture.input_size),
        architecture.input_size[0],
    ) != (3, 3):
        return None
    transforms = weights.transforms()
    return (
        transforms
        if hasattr(transforms, "mean") and getattr(transforms, "resize_size", None)
        else None
    )


def _default_weights(architecture: Architecture | None) -> Any:
    if architecture is None or not architectures.is_known(architecture.name):
        return None
    return torchvision.models.get_model_weights(architecture.name).DEFAULT
