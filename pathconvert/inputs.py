"""Inputs to run a network on: seeded random ones of its size, or images from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2

from pathconvert.architectures import Architecture
from pathconvert.errors import CheckpointError, PathconvertError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def size_of(architecture: Architecture) -> tuple[int, ...]:
    """The input's size without the batch dimension.

    Raises:
        PathconvertError: the architecture does not tell.
    """
    if architecture.input_size is None:
        raise PathconvertError(
            f"{architecture.name} does not tell the size of its input", "Give it: --input-size 3x224x224"
        )
    return architecture.input_size


def random_input(architecture: Architecture, batch: int = 2, seed: int = 0) -> Any:
    """Standard normal noise; for a detector, which takes a list of images, uniform noise in a list."""
    generator = torch.Generator().manual_seed(seed)
    size = size_of(architecture)
    if architecture.task == "detection":
        return [torch.rand(size, generator=generator)]
    return torch.randn(batch, *size, generator=generator)


def folder_images(folder: Path) -> list[Path]:
    """The images in a folder, sorted by name.

    Raises:
        CheckpointError: no folder, or no image in it.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder", "Give a folder that holds images.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise CheckpointError(f"{folder} holds no image", f"Images end in {', '.join(sorted(IMAGE_SUFFIXES))}.")
    return paths


def load_images(paths: list[Path], architecture: Architecture) -> Tensor:
    """Images as a batch [N, C, H, W]: shorter side resized, centre cropped, normalised as torchvision's weights expect.

    Raises:
        CheckpointError: a file is no intact image.
        PathconvertError: the network takes no images.
    """
    size = size_of(architecture)
    if len(size) != 3 or size[0] not in (1, 3):
        shown = "x".join(map(str, size))
        raise PathconvertError(f"{architecture.name} takes inputs of size {shown}, no images", "Leave --images out.")
    channels, height, width = size
    steps: list[Any] = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    steps += [v2.Resize(max(height, width), antialias=True), v2.CenterCrop((height, width))]
    if channels == 3 and architecture.task != "other":
        steps.append(v2.Normalize(IMAGENET_MEAN, IMAGENET_STD))
    transform = v2.Compose(steps)
    return torch.stack([transform(_open_image(path, channels)) for path in paths])


def _open_image(path: Path, channels: int) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("L" if channels == 1 else "RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise CheckpointError(
            f"{path} is no intact image: {error}", "Remove it from the folder, or mend it."
        ) from error
