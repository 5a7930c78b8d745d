"""Image files: found in folders, read as pixels."""

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
#: One side of an image over the other, at most: the longer side grows when the shorter one is resized.
LONGEST = 50


def folder_images(folder: Path) -> list[Path]:
    """The images in a folder, sorted by name.

    Raises:
        CheckpointError: no folder, or no image in it.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder", "Give a folder that holds images.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir())
    if not paths:
        raise CheckpointError(f"{folder} holds no image", f"Images end in {', '.join(sorted(IMAGE_SUFFIXES))}.")
    return paths


@dataclass(frozen=True)
class Picture:
    """An image file's content.

    Attributes:
        pixels: float32 [C, H, W], values in [0, 1].
        notes: what was done to get there that its owner may not expect (a frame chosen, transparency dropped).
    """

    pixels: Tensor
    notes: tuple[str, ...] = ()


def read_image(path: Path, channels: int = 3) -> Picture:
    """Read an image of any kind: grey or colour, 8 or 16 bits, CMYK, with a palette, transparent, animated.

    Sixteen-bit grey is read whole (preparing it rounds to 8 bits); of an animation the first frame is taken; the
    orientation that a camera recorded is applied; transparency is dropped, as torchvision's loaders do.

    Args:
        path: the file.
        channels: 1 for grey, 3 for RGB.

    Raises:
        CheckpointError: no file, no intact image, one of a shape that no resizing serves, or values of unknown range.
    """
    damage = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, zlib.error)  # Pillow's, by format
    try:
        with Image.open(path) as image:
            _check_shape(path, image)
            notes = _notes(image)
            pixels = _pixels(path, ImageOps.exif_transpose(image), image.format, channels)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist", "Check the path for misspellings.") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder, no image", "Give the images in it.") from None
    except Image.DecompressionBombError as error:
        raise CheckpointError(f"{path} is too large: {error}", "Make it smaller first.") from error
    except (UnidentifiedImageError, *damage) as error:
        raise CheckpointError(
            f"{path} is no intact image: {error}", "Remove it from the folder, or mend it."
        ) from error
    return Picture(pixels, notes)


def _check_shape(path: Path, image: Image.Image) -> None:
    width, height = image.size
    if max(width, height) > LONGEST * min(width, height):
        raise CheckpointError(
            f"{path} is {width} × {height} pixels, more than {LONGEST} times as long as wide", "Crop it first."
        )


def _notes(image: Image.Image) -> tuple[str, ...]:
    frames = getattr(image, "n_frames", 1)
    notes = [f"{frames} frames: the first one taken"] if frames > 1 else []
    image.seek(0)
    if image.has_transparency_data:
        notes.append("transparency dropped")
    if image.mode == "CMYK":
        notes.append("CMYK turned into RGB without a colour profile")
    return tuple(notes)


def _pixels(path: Path, image: Image.Image, kind: str | None, channels: int) -> Tensor:
    """An image from a file of the given kind, as float32 [channels, H, W] in [0, 1]."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = torch.from_numpy(_wide_grey(path, image, kind))
        return grey.expand(channels, -1, -1).contiguous()
    narrow = image.convert("L" if channels == 1 else "RGB")
    pixels: Tensor = v2.functional.to_dtype(v2.functional.pil_to_tensor(narrow), torch.float32, scale=True)
    return pixels


def _wide_grey(path: Path, image: Image.Image, kind: str | None) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Grey of more than 8 bits, which Pillow's own conversion clips at 255."""
    values = np.asarray(image)
    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM"))
    if not sixteen_bits or values.min() < 0 or values.max() > 0xFFFF:
        what = "floating-point" if image.mode == "F" else "32-bit"
        raise CheckpointError(f"{path} holds {what} values, whose range nothing tells", "Save it with 8 or 16 bits.")
    return (values.astype(np.float64) / 0xFFFF).astype(np.float32)
