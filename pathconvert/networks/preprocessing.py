"""How an image becomes a network's input, and what its classes are called.

What is known: a fine-tuned network's file records both (``files.py``); else torchvision's default weights tell, for
its own networks. Elsewhere nothing does, and normalisation is never guessed: :meth:`Preprocessing.plain`.
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
        resize: the shorter side's length, or (height, width).
        crop: (height, width) of the centre crop; None for none (segmentation).
        mean, std: of every channel, for values in [0, 1].
        interpolation: of the resizing, as Pillow names it: ``bilinear``, ``bicubic``, ``nearest``.
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"

    @staticmethod
    def for_architecture(architecture: Architecture | None) -> Preprocessing | None:
        """What torchvision's default weights expect, at the architecture's input size.

        None for any other network, for video, detection, and inputs that are not three channels.
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
        mean, std = (tuple(float(value) for value in values) for values in (transforms.mean, transforms.std))
        return Preprocessing(resize, sides, mean, std, transforms.interpolation.value)

    @staticmethod
    def plain(size: tuple[int, ...]) -> Preprocessing:
        """Where nothing is recorded: values in [0, 1] at ``size`` (channels, height, width), not normalised."""
        channels, height, width = size
        return Preprocessing(max(height, width), (height, width), (0.0,) * channels, (1.0,) * channels)

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> Preprocessing:
        """The inverse of :func:`dataclasses.asdict` through JSON.

        Raises:
            KeyError, TypeError, ValueError, IndexError: it is no preprocessing.
        """
        resize, crop = stored["resize"], stored["crop"]
        mean, std = tuple(map(float, stored["mean"])), tuple(map(float, stored["std"]))
        if len(mean) != len(std) or not all(map(math.isfinite, (*mean, *std))) or min(std, default=1.0) <= 0:
            raise ValueError("mean and std are no normalisation")
        if stored.get("interpolation", "bilinear") not in INTERPOLATIONS:
            raise ValueError(f"interpolation {stored['interpolation']!r} is not known")
        return Preprocessing(
            (_side(resize[0]), _side(resize[1])) if isinstance(resize, list | tuple) else _side(resize),
            (_side(crop[0]), _side(crop[1])) if crop else None,
            mean,
            std,
            str(stored.get("interpolation", "bilinear")),
        )

    def at(self, size: tuple[int, int]) -> Preprocessing:
        """For inputs of another (height, width): resized in proportion, as torchvision's recipe is for its own."""
        if self.crop in (None, size):
            return self
        share = max(size) / max(self.crop or size)
        resize = (
            round(self.resize * share)
            if isinstance(self.resize, int)
            else (max(size[0], round(self.resize[0] * share)), max(size[1], round(self.resize[1] * share)))
        )
        return dataclasses.replace(self, resize=resize, crop=size)

    def place(self, pixels: Tensor) -> Tensor:
        """Resized and cropped: uint8 [C, H, W] → uint8 [C, height, width].

        torchvision's recipe resizes pixels, not numbers: its weights were measured so.
        """
        resize = [self.resize] if isinstance(self.resize, int) else list(self.resize)
        resized = v2.functional.resize(pixels, resize, InterpolationMode(self.interpolation))
        placed: Tensor = v2.functional.center_crop(resized, list(self.crop)) if self.crop else resized
        return placed

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [..., C, H, W] → float32, normalised."""
        values = pixels.to(torch.float32) / 255
        normalised: Tensor = v2.functional.normalize(values, list(self.mean), list(self.std))
        return normalised


def _side(value: Any) -> int:
    """A length in pixels."""
    if not 1 <= float(value) < 2**16:
        raise ValueError(f"{value!r} is no number of pixels")
    return int(value)


def parse_sides(text: str | None) -> tuple[int, int] | None:
    """``224`` or ``224x160`` → (height, width).

    Raises:
        PathconvertError: it is neither.
    """
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise PathconvertError(f"{text!r} is no size", "Height and width, or one number for both: --size 224")
    return int(parts[0]), int(parts[-1])


def parse_values(text: str | None, option: str) -> list[float] | None:
    """``0.5`` or ``0.485,0.456,0.406`` → a value, or one a channel.

    Raises:
        PathconvertError: it is neither.
    """
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise PathconvertError(f"{text!r} are no numbers", f"Such as {option} 0.5, or one a channel") from None


def whole_levels(pixels: Tensor) -> Tensor:
    """Values in [0, 1] → uint8 levels, as an image file of 8 bits has them."""
    return (pixels * 255).round().to(torch.uint8)


def labels_for(architecture: Architecture | None) -> tuple[str, ...] | None:
    """The class names of torchvision's default weights, where the network has as many classes; else None."""
    weights = _default_weights(architecture)
    categories = weights.meta.get("categories") if weights is not None else None
    if architecture is None or not categories:
        return None
    usual = len(categories)
    return tuple(categories) if architecture.arguments.get("num_classes", usual) == usual else None


def _default_transforms(architecture: Architecture | None) -> Any:
    """torchvision's transforms for its default weights of a three-channel image network, or None."""
    weights = _default_weights(architecture)
    if weights is None or architecture is None or architecture.task not in ("classification", "segmentation"):
        return None
    if architecture.input_size is not None and (len(architecture.input_size), architecture.input_size[0]) != (3, 3):
        return None
    transforms = weights.transforms()
    return transforms if hasattr(transforms, "mean") and getattr(transforms, "resize_size", None) else None


def _default_weights(architecture: Architecture | None) -> Any:
    if architecture is None or not architectures.is_known(architecture.name):
        return None
    return torchvision.models.get_model_weights(architecture.name).DEFAULT
