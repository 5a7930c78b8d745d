"""Whether images are prepared as those that a network was trained on, by its first BatchNorm.

Measured on ResNet-56 for CIFAR-10, whose inputs are in [0, 1]; on the same network for normalised
inputs; and on the first convolution of SqueezeNet 1.1, whose inputs are normalised, with the
statistics of ImageNet's images in place of running ones. The images were 1 to 64 of CIFAR-10,
ImageNet and Fashion-MNIST, some of them enlarged to eight times their size:

===============================================  =============  ============
images                                           spread         shift
===============================================  =============  ============
prepared as in training                          0.88 … 2.1     0.0 … 0.3
[0, 1] in place of normalised                    0.05 … 0.09    0.0 … 0.4
normalised in place of [0, 1]                    17 … 38        0.3 … 3.5
[0, 255] in place of either                      3300 … 110000  5 … 400
[-1, 1] in place of [0, 1]                       3.5 … 6.2      0.7 … 2.0
[-1, 1] in place of normalised                   0.18 … 0.32    0.0 … 0.2
divided by std only, in place of [0, 1]          20 … 32        2.1 … 5.4
divided by std only, in place of normalised      1.0 … 1.7      0.1 … 1.5
BGR in place of RGB, or inverted                 0.92 … 1.9     0.1 … 0.9
===============================================  =============  ============

So a scale that is wrong by more than a factor of two shows; the order of the channels does not, and
a wrong mean only if it is far off.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pathconvert.networks.image_options import ImageOptions
from pathconvert.networks.images import folder_images
from pathconvert.networks.inputs import IMAGENET_MEAN, IMAGENET_STD, assumed, load_images
from pathconvert.networks.loading import LoadedNetwork
from pathconvert.networks.preprocessing import Preprocessing
from pathconvert.path_bn.statistics import CHUNK, FirstBatchNorm, compare_first

#: Outside of these, images look wrongly prepared. The limits lie between what was measured with the
#: right and with another scale, and are generous to images of other contrast.
LEAST_SPREAD, MOST_SPREAD = 0.2, 7.0
MOST_SHIFT = 2.0
#: The limits of a preparation that is worth proposing.
GOOD_SPREAD, GOOD_SHIFT = 3.0, 1.0
#: Number of images that are enough to tell.
ENOUGH = 64
#: What networks are usually trained with, for pixel values in [0, 1]: these values, values in
#: [-1, 1], ImageNet's normalisation, pixel values up to 255, and those less ImageNet's mean.
USUAL = (
    ImageOptions((0.0,), (1.0,)),
    ImageOptions((0.5,), (0.5,)),
    ImageOptions(IMAGENET_MEAN, IMAGENET_STD),
    ImageOptions((0.0,), (0.00392157,)),
    ImageOptions(IMAGENET_MEAN, (0.00392157,)),
)


def check_folder(network: LoadedNetwork, folder: Path) -> str | None:
    """What looks wrong about the images in a folder, as :func:`check_images` says it.

    Raises:
        CheckpointError: it is not a folder with images, or one of them cannot be read.
        PathconvertError: the network does not take images.
    """
    if network.architecture.task == "detection":
        return None  # detectors normalise by themselves
    recipe = network.preprocessing or assumed(network.architecture)
    paths = folder_images(folder)[:ENOUGH]
    plain = unnormalised(recipe)
    pixels = load_images(paths, network.architecture, plain)
    return check_images(network.model, pixels, recipe)


def unnormalised(recipe: Preprocessing) -> Preprocessing:
    """A preprocessing that leaves pixel values in [0, 1]."""
    channels = len(recipe.mean)
    return dataclasses.replace(recipe, mean=(0.0,) * channels, std=(1.0,) * channels)


def check_images(model: nn.Module, pixels: Tensor, recipe: Preprocessing) -> str | None:
    """Say how far images are from those that a network was trained on, if they are far off.

    Args:
        model: a network in any form.
        pixels: images of its input's size in [0, 1], [N, C, height, width].
        recipe: its mean and standard deviation are those in use.

    Returns:
        A sentence, with the usual mean and standard deviation that would fit if there are some;
        None if nothing looks wrong, or the network has no BatchNorm that could tell.

    Raises:
        PathconvertError: the network cannot run on the images.
    """
    found = _compared(model, pixels, recipe)
    if found is None or _within(found, LEAST_SPREAD, MOST_SPREAD, MOST_SHIFT):
        return None
    text = (
        f"the images look wrongly prepared: what {found.name} reads has {_short(found.spread)}"
        f" times its running variance, and lies {_short(found.shift)} standard deviations off its"
        " running mean"
    )
    better = {
        options: other
        for options in USUAL
        if len(options.mean or ()) in (1, len(recipe.mean))
        and (other := _compared(model, pixels, options.over(recipe))) is not None
        and _within(other, 1 / GOOD_SPREAD, GOOD_SPREAD, GOOD_SHIFT)
    }
    if not better:
        return text
    best = min(better, key=lambda options: _distance(better[options]))
    flags = f"--mean {_text(best.mean)} --std {_text(best.std)}"
    fit = better[best]
    return f"{text}; with {flags} it would be {_short(fit.spread)} times and {_short(fit.shift)}"


def _compared(model: nn.Module, pixels: Tensor, recipe: Preprocessing) -> FirstBatchNorm | None:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (recipe.mean, recipe.std))
    return compare_first(model, ((part - mean) / std for part in pixels.split(CHUNK)))


def _within(found: FirstBatchNorm, least: float, most: float, shift: float) -> bool:
    return least <= found.spread <= most and found.shift <= shift


def _distance(found: FirstBatchNorm) -> float:
    return abs(math.log(found.spread)) + found.shift


def _short(value: float) -> str:
    """Two significant digits."""
    return f"{float(f'{value:.2g}'):g}" if value < 1e6 else f"{value:.2g}"


def _text(values: Sequence[float] | None) -> str:
    return ",".join(f"{value:g}" for value in values or ())
