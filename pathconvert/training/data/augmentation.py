"""From stored pixels to inputs: the recorded preprocessing, and what chance does to training images before it.

Both give uint8 pixels of the input's size first, then whole batches are normalised: one call in place of N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import get_args

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from pathconvert.errors import DataError
from pathconvert.networks.inputs import size_of
from pathconvert.networks.loading import LoadedNetwork
from pathconvert.networks.preprocessing import Preprocessing
from pathconvert.training.data.labelled import Data
from pathconvert.training.settings import Augmentation

AUGMENTATIONS: tuple[str, ...] = get_args(Augmentation)
SMALL = 64
#: What CIFAR's recipe pads on every side of 32 pixels.
PADDING = 4 / 32


@dataclass(frozen=True)
class Transform:
    """uint8 [C, H, W] → float32 [C, height, width].

    Attributes:
        preprocessing: with a crop, which is the input's size.
        augmentation: ``none`` is the evaluation's transform. ``crop-flip``: padded by 4 pixels in 32 after the
            preprocessing, cropped at random, flipped. ``resized-crop``: a random part of 8 % to 100 %, flipped.
    """

    preprocessing: Preprocessing
    augmentation: Augmentation = "none"

    def __post_init__(self) -> None:
        if self.augmentation not in AUGMENTATIONS:
            raise DataError(f"there is no augmentation {self.augmentation!r}", f"There are {', '.join(AUGMENTATIONS)}.")
        if self.preprocessing.crop is None:
            raise DataError("preprocessing without a crop gives inputs of many sizes", "Give a size: --size 224")

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.many([pixels])[0]

    def many(self, pixels: Sequence[Tensor], seeds: Sequence[int] | None = None) -> Tensor:
        """Many images of any sizes → float32 [N, C, height, width].

        Args:
            pixels: uint8 [C, H, W] each.
            seeds: from which chance for each image follows alone; None goes on with torch's own generator, which
                seeds change.
        """
        placed = self._placed(pixels) if self._chosen != "resized-crop" else pixels
        varied = [self._varied(image, None if seeds is None else seeds[i]) for i, image in enumerate(placed)]
        return self.preprocessing.normalise(torch.stack(varied))

    def _placed(self, pixels: Sequence[Tensor]) -> Sequence[Tensor]:
        """uint8 [C, height, width] each."""
        if len({image.shape for image in pixels}) == 1:  # one call in place of N, the same values
            return self.preprocessing.place(torch.stack(list(pixels))).unbind()
        return [self.preprocessing.place(image) for image in pixels]

    def _varied(self, image: Tensor, seed: int | None) -> Tensor:
        if seed is not None and self.is_random:
            torch.default_generator.manual_seed(seed)
        varied: Tensor = self._variation(image)
        return varied

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of an input."""
        assert self.preprocessing.crop is not None
        return self.preprocessing.crop

    @property
    def is_random(self) -> bool:
        """Whether two calls may differ."""
        return self._chosen != "none"

    @property
    def _chosen(self) -> str:
        if self.augmentation != "auto":
            return self.augmentation
        return "crop-flip" if max(self.size) <= SMALL else "resized-crop"

    @cached_property
    def _variation(self) -> v2.Transform:
        height, width = self.size
        if self._chosen == "resized-crop":
            interpolation = InterpolationMode(self.preprocessing.interpolation)
            return v2.Compose([v2.RandomResizedCrop(self.size, interpolation=interpolation), v2.RandomHorizontalFlip()])
        if self._chosen == "crop-flip":
            padding = [round(PADDING * width), round(PADDING * height)]
            return v2.Compose([v2.RandomCrop(self.size, padding), v2.RandomHorizontalFlip()])
        return v2.Identity()


@dataclass(frozen=True)
class Chosen:
    """A preprocessing, and what is to be said of how it was found; empty where it is simply the network's own."""

    preprocessing: Preprocessing
    note: str = ""


def preprocessing_of(
    network: LoadedNetwork,
    data: Data | None = None,
    *,
    size: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Chosen:
    """How a network's images are to be prepared: see :func:`choose_preprocessing`.

    Raises:
        DataError: an option has no sense.
        PathconvertError: the network takes no images, or does not tell its input's size.
    """
    input_size = size_of(network.architecture) if size is None else (_channels(network, data), *size)
    if len(input_size) != 3 or input_size[0] not in (1, 3):
        shown = "x".join(map(str, input_size))
        raise DataError(f"{network.architecture.name} takes inputs of size {shown}, no images", "Give another network.")
    channels, height, width = input_size
    whole = None if data is None or network.was_trained_here else data.image_size
    return choose_preprocessing(network.preprocessing, (channels, height, width), image_size=whole, mean=mean, std=std)


def _channels(network: LoadedNetwork, data: Data | None) -> int:
    size = network.architecture.input_size
    return size[0] if size else data.channels if data else 3


def choose_preprocessing(
    recorded: Preprocessing | None,
    input_size: tuple[int, int, int],
    *,
    image_size: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Chosen:
    """What is recorded, at the input's size; where nothing is, values in [0, 1]; ``mean`` and ``std`` over both.

    Args:
        recorded: for the network; None where nothing is.
        input_size: channels, height and width.
        image_size: (height, width) of the images: those that are no larger than the input are resized to it whole, in
            place of a recipe that resizes further and cuts the edges off. None keeps the recipe.
        mean, std: one value, or one a channel, for values in [0, 1].

    Raises:
        DataError: ``mean`` or ``std`` are no normalisation.
    """
    size = input_size[1:]
    chosen, notes = (recorded or Preprocessing.plain(input_size)).at(size), []
    if chosen.crop is None:
        chosen = replace(chosen, resize=max(size), crop=size)
    if recorded and image_size and image_size[0] <= size[0] and image_size[1] <= size[1] and chosen.resize != max(size):
        chosen = replace(chosen, resize=max(size))
        notes.append(f"images of {_shown(image_size)} are resized to {_shown(size)}, no edges cut off")
    if mean is not None or std is not None:
        chosen = replace(
            chosen,
            mean=_values(mean, "--mean", input_size[0]) or chosen.mean,
            std=_values(std, "--std", input_size[0]) or chosen.std,
        )
        if min(chosen.std) <= 0:
            raise DataError(f"a standard deviation of {min(chosen.std):g} is none", "Give positive numbers: --std 0.25")
    elif recorded is None:
        notes.append(
            f"no preprocessing is recorded: images are resized to {_shown(size)} and scaled to [0, 1], not normalised"
        )
    return Chosen(chosen, "; ".join(notes))


def _values(given: Sequence[float] | None, option: str, channels: int) -> tuple[float, ...] | None:
    """One value a channel."""
    if given is None:
        return None
    values = tuple(map(float, given)) * (channels if len(given) == 1 else 1)
    if len(values) != channels or not all(abs(value) < 1e6 for value in values):
        raise DataError(f"{option} has {len(given)} values for {channels} channels", f"Give one, or {channels}.")
    return values


def _shown(size: tuple[int, ...]) -> str:
    return "×".join(map(str, size))
