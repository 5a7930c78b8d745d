"""Find image files in folders, and read them as pixels."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2

from pathconvert.errors import CheckpointError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
#: The largest ratio of an image's sides. Resizing the shorter side to a network's size enlarges the
#: longer one too.
LONGEST = 50


def folder_images(folder: Path) -> list[Path]:
    """The images in a folder, sorted by name.

    Raises:
        CheckpointError: ``folder`` is not a folder, or contains no images.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder", "Give a folder that contains images.")
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir()
    )
    if not paths:
        raise CheckpointError(
            f"{folder} contains no images",
            f"Image files end in {', '.join(sorted(IMAGE_SUFFIXES))}.",
        )
    return paths


@dataclass(frozen=True)
class Picture:
    """The content of an image file.

    Attributes:
        pixels: float32 [C, H, W], values in [0, 1].
        notes: what was done to the image that its owner may not expect (a frame was chosen,
            transparency was dropped).
    """

    pixels: Tensor
    notes: tuple[str, ...] = ()


def read_image(path: Path, channels: int = 3) -> Picture:
    """Read an image of any kind.

    It may be grey or colour, of 8 or 16 bits, CMYK, with a palette, transparent or animated.

    Grey of 16 bits keeps its precision here; preprocessing rounds it to 8 bits. The first frame of
    an animation is used, the orientation that a camera recorded is applied, and transparency is
    dropped as torchvision's loaders do.

    Args:
        path: the file.
        channels: 1 for grey, 3 for RGB.

    Raises:
        CheckpointError: the file does not exist, is not an intact image, is too large or too long
            to be resized, or has values whose range is not known.
    """
    damage = (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        IndexError,
        struct.error,
        zlib.error,
    )  # which one Pillow raises depends on the format
    try:
        with Image.open(path) as image:
            _check_shape(path, image)
            notes = _notes(image)
            pixels = _pixels(path, ImageOps.exif_transpose(image), image.format, channels)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist", "Check the path for misspellings."
        ) from None
    except IsADirectoryError:
        raise CheckpointError(
            f"{path} is a folder, not an image", "Give the images inside it."
        ) from None
    except Image.DecompressionBombError as error:
        raise CheckpointError(f"{path} is too large: {error}", "Reduce its size first.") from error
    except (UnidentifiedImageError, *damage) as error:
        raise CheckpointError(
            f"{path} is not an intact image: {error}", "Remove it from the folder, or replace it."
        ) from error
    return Picture(pixels, notes)


def _check_shape(path: Path, image: Image.Image) -> None:
    width, height = image.size
    if max(width, height) > LONGEST * min(width, height):
        raise CheckpointError(
            f"{path} is {width} × {height} pixels: one side is more than {LONGEST} times the other",
            "Crop it first.",
        )


def _notes(image: Image.Image) -> tuple[str, ...]:
    frames = getattr(image, "n_frames", 1)
    notes = [f"{frames} frames: only the first one is used"] if frames > 1 else []
    image.seek(0)
    if image.has_transparency_data:
        notes.append("transparency was dropped")
    if image.mode == "CMYK":
        notes.append("CMYK was converted to RGB without a colour profile")
    return tuple(notes)


def _pixels(path: Path, image: Image.Image, kind: str | None, channels: int) -> Tensor:
    """An image as float32 [channels, H, W] in [0, 1]; ``kind`` is the format of its file."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = torch.from_numpy(_wide_grey(path, image, kind))
        return grey.expand(channels, -1, -1).contiguous()
    narrow = image.convert("L" if channels == 1 else "RGB")
    pixels: Tensor = v2.functional.to_dtype(
        v2.functional.pil_to_tensor(narrow), torch.float32, scale=True
    )
    return pixels


def _wide_grey(
    path: Path, image: Image.Image, kind: str | None
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Grey of more than 8 bits as float32 [H, W] in [0, 1].

    Pillow's own conversion would clip it at 255.
    """
    values = np.asarray(image)
    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM"))
    if not sixteen_bits or values.min() < 0 or values.max() > 0xFFFF:
        what = "floating-point" if image.mode == "F" else "32-bit"
        raise CheckpointError(
            f"{path} contains {what} values, whose range is not known", "Save it with 8 or 16 bits."
        )
    return (values.astype(np.float64) / 0xFFFF).astype(np.float32)
