"""From stored pixels to inputs.

The recorded preprocessing, and the random augmentation of training images. Each image is first
brought to the input's size, as uint8 pixels; then whole batches are normalised with one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import get_args

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from pathconvert.choices import Augmentation
from pathconvert.errors import DataError
from pathconvert.networks.image_options import NOTHING_GIVEN, ImageOptions
from pathconvert.networks.inputs import size_of
from pathconvert.networks.loading import LoadedNetwork
from pathconvert.networks.prepared import assumption_of
from pathconvert.networks.preprocessing import Preprocessing
from pathconvert.training.data.labelled import Data

#: The largest input size, in pixels, for which ``auto`` is ``crop-flip``.
SMALL = 64
#: Padding on every side, as a share of the size: CIFAR's recipe pads images of 32 pixels by 4.
PADDING = 4 / 32


@dataclass(frozen=True)
class Transform:
    """Turns an image, uint8 [C, H, W], into an input, float32 [C, height, width].

    Attributes:
        preprocessing: the network's preprocessing; its crop is the input's size.
        augmentation: ``none`` is the transform of evaluation. ``crop-flip`` pads the preprocessed
            image by 4 pixels in 32, takes a random crop and flips it at random. ``resized-crop``
            resizes a random part of 8 % to 100 % of the image and flips it at random. ``auto`` is
            ``crop-flip`` up to ``SMALL`` pixels, else ``resized-crop``.

    Raises:
        DataError: the augmentation is unknown, or the preprocessing has no crop.
    """

    preprocessing: Preprocessing
    augmentation: Augmentation = "none"

    def __post_init__(self) -> None:
        if self.augmentation not in get_args(Augmentation):
            raise DataError(
                f"there is no augmentation {self.augmentation!r}",
                f"Choose one of {', '.join(get_args(Augmentation))}.",
            )
        if self.preprocessing.crop is None:
            raise DataError(
                "preprocessing without a crop gives inputs of different sizes",
                "Give a size, such as --size 224.",
            )

    def __call__(self, pixels: Tensor) -> Tensor:
        """One image, uint8 [C, H, W] → float32 [C, height, width]."""
        return self.many([pixels])[0]

    def many(self, pixels: Sequence[Tensor], seeds: Sequence[int] | None = None) -> Tensor:
        """Transform many images into one batch, float32 [N, C, height, width].

        The images may differ in size.

        Args:
            pixels: the images, uint8 [C, H, W] each.
            seeds: one seed per image, which alone determines its augmentation; they are set in
                torch's default generator. None draws from that generator as it is.
        """
        placed = self._placed(pixels) if self._chosen != "resized-crop" else pixels
        varied = [
            self._varied(image, None if seeds is None else seeds[i])
            for i, image in enumerate(placed)
        ]
        return self.preprocessing.normalise(torch.stack(varied))

    def _placed(self, pixels: Sequence[Tensor]) -> Sequence[Tensor]:
        """Images resized and cropped to the input's size, uint8 [C, height, width] each."""
        # one call instead of N, with the same values
        if len({image.shape for image in pixels}) == 1:
            return self.preprocessing.place(torch.stack(list(pixels))).unbind()
        return [self.preprocessing.place(image) for image in pixels]

    def _varied(self, image: Tensor, seed: int | None) -> Tensor:
        if seed is not None and self.is_random:
            torch.default_generator.manual_seed(seed)
        varied: Tensor = self._variation(image)
        return varied

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an input."""
        assert self.preprocessing.crop is not None
        return self.preprocessing.crop

    @property
    def is_random(self) -> bool:
        """Whether two calls with the same image may differ."""
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
            return v2.Compose(
                [
                    v2.RandomResizedCrop(self.size, interpolation=interpolation),
                    v2.RandomHorizontalFlip(),
                ]
            )
        if self._chosen == "crop-flip":
            padding = [round(PADDING * width), round(PADDING * height)]
            return v2.Compose([v2.RandomCrop(self.size, padding), v2.RandomHorizontalFlip()])
        return v2.Identity()


@dataclass(frozen=True)
class Chosen:
    """A preprocessing, and a note for the user on how it was chosen.

    The note is empty where the preprocessing is simply the network's own.
    """

    preprocessing: Preprocessing
    note: str = ""


def preprocessing_of(
    network: LoadedNetwork,
    data: Data | None = None,
    *,
    given: ImageOptions = NOTHING_GIVEN,
) -> Chosen:
    """Choose how images are prepared for a network, as :func:`choose_preprocessing` does.

    Args:
        network: tells the recorded preprocessing and, if none is given, the input size.
        data: the images; None where they are not known.
        given: the user's options, in place of what is recorded.

    Raises:
        DataError: the network does not take images, or the options do not fit it.
        PathconvertError: the network's input size is not known.
    """
    input_size = (
        size_of(network.architecture)
        if given.size is None
        else (_channels(network, data), *given.size)
    )
    if len(input_size) != 3 or input_size[0] not in (1, 3):
        shown = "x".join(map(str, input_size))
        raise DataError(
            f"{network.architecture.name} takes inputs of size {shown}, which are not images",
            "Give another network.",
        )
    channels, height, width = input_size
    whole = None if data is None or network.was_trained_here else data.image_size

    def choose(recorded: Preprocessing | None) -> Chosen:
        size = (channels, height, width)
        return choose_preprocessing(recorded, size, image_size=whole, given=given)

    chosen = choose(network.preprocessing)
    assumption = assumption_of(network, lambda recipe: choose(recipe).preprocessing)
    return replace(chosen, note="; ".join(note for note in (chosen.note, assumption) if note))


def _channels(network: LoadedNetwork, data: Data | None) -> int:
    size = network.architecture.input_size
    return size[0] if size else data.channels if data else 3


def choose_preprocessing(
    recorded: Preprocessing | None,
    input_size: tuple[int, int, int],
    *,
    image_size: tuple[int, int] | None = None,
    given: ImageOptions = NOTHING_GIVEN,
) -> Chosen:
    """Choose a preprocessing: the recorded one at the input's size, or a plain one.

    The plain one resizes, and scales to [0, 1].

    Args:
        recorded: the preprocessing that is recorded for the network; None where there is none.
        input_size: channels, height and width of the input.
        image_size: height and width of the images. Images that are no larger than the input are
            resized to it whole, where the recipe would resize them further and cut the edges off.
            None keeps the recipe, and so does a given ``resize``.
        given: the user's options, which override the preprocessing.

    Raises:
        DataError: a mean or a standard deviation was given for another number of channels.
    """
    size = input_size[1:]
    chosen, notes = (recorded or Preprocessing.plain(input_size)).at(size), []
    if chosen.crop is None:
        chosen = replace(chosen, resize=max(size), crop=size)
    if (
        recorded
        and given.resize is None
        and image_size
        and image_size[0] <= size[0]
        and image_size[1] <= size[1]
        and chosen.resize != max(size)
    ):
        chosen = replace(chosen, resize=max(size))
        notes.append(
            f"images of {_shown(image_size)} are resized to {_shown(size)}, and no edges are"
            " cut off"
        )
    if recorded is None and not given.normalises:
        notes.append(
            f"no preprocessing is recorded: images are resized to {_shown(size)} and scaled to [0,"
            " 1], not normalised"
        )
    return Chosen(given.over(chosen), "; ".join(notes))


def _shown(size: tuple[int, ...]) -> str:
    return "×".join(map(str, size))
