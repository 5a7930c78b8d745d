"""Inputs for a network: random ones of its size from a seed, or images from files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pathconvert.errors import PathconvertError
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.images import read_image
from pathconvert.networks.preprocessing import Preprocessing, whole_levels

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def size_of(architecture: Architecture) -> tuple[int, ...]:
    """The size of an input without the batch dimension.

    Raises:
        PathconvertError: the architecture does not say.
    """
    if architecture.input_size is None:
        raise PathconvertError(
            f"the input size of {architecture.name} is not known",
            "Give it, for example --input-size 3x224x224",
        )
    return architecture.input_size


def random_input(architecture: Architecture, batch: int = 2, seed: int = 0) -> Any:
    """Standard normal noise [batch, *size].

    For a detector a list with one image of uniform noise [C, H, W].
    """
    generator = torch.Generator().manual_seed(seed)
    size = size_of(architecture)
    if architecture.task == "detection":
        return [torch.rand(size, generator=generator)]
    return torch.randn(batch, *size, generator=generator)


def load_images(
    paths: list[Path], architecture: Architecture, preprocessing: Preprocessing | None
) -> Tensor:
    """Images as a batch [N, C, H, W], prepared as the network expects.

    Args:
        paths: the files.
        architecture: of the network; gives the input's size.
        preprocessing: the one recorded for the network. None stands for values in [0, 1],
            normalised with ImageNet's mean and standard deviation if the network is torchvision's
            or timm's.

    Raises:
        CheckpointError: a file is not an intact image.
        PathconvertError: the network does not take images, or its input size is not known.
    """
    size = _image_size_of(architecture)
    recipe = preprocessing or assumed(architecture)
    if recipe.crop is None:  # segmentation: all images of a batch need one size
        recipe = replace(recipe, resize=max(size[1:]), crop=(size[1], size[2]))
    placed = [recipe.place(whole_levels(read_image(path, size[0]).pixels)) for path in paths]
    return recipe.normalise(torch.stack(placed))


def _image_size_of(architecture: Architecture) -> tuple[int, int, int]:
    """Channels, height and width of an input.

    Raises:
        PathconvertError: the network does not take images, or its input size is not known.
    """
    size = size_of(architecture)
    if len(size) != 3 or size[0] not in (1, 3):
        shown = "x".join(map(str, size))
        raise PathconvertError(
            f"{architecture.name} takes inputs of size {shown}, not images", "Leave out the images."
        )
    return size[0], size[1], size[2]


def assumed(architecture: Architecture) -> Preprocessing:
    """How :func:`load_images` prepares images for a network of which nothing is known.

    Raises:
        PathconvertError: the network does not take images, or its input size is not known.
    """
    size = _image_size_of(architecture)
    plain = Preprocessing.plain(size)
    if size[0] == 3 and architecture.task not in ("other", "detection"):
        # detectors normalise by themselves
        return replace(plain, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return plain
