"""What a classifier's outputs mean: how many classes, and logits or probabilities; and which preprocessing it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pathconvert.errors import PathconvertError
from pathconvert.export.runtime.classifiers import Array, Classifier
from pathconvert.export.runtime.session import shape_text
from pathconvert.networks.preprocessing import Preprocessing

#: How far the sum of a row of probabilities may be from 1. Rounding to float16 changes it by at most 2⁻¹¹, about 5e-4,
#: and 2⁻²⁵ for every subnormal value.
SUM_TOLERANCE = 1e-3


def look_like_probabilities(scores: Array) -> bool:
    """Whether no score [N, classes] is negative and every row adds up to 1."""
    return bool((scores >= 0).all() and (abs(scores.sum(1) - 1) < SUM_TOLERANCE).all())


def number_of_classes(classifier: Classifier) -> int:
    """The number of scores per image, found by running the classifier on zeros.

    Raises:
        PathconvertError: the outputs are not class scores.
    """
    batch = classifier.batch if classifier.fixed_batch else 1
    dtype = np.uint8 if classifier.takes_pixels else np.float32
    shape = classifier.run(np.zeros((batch, *classifier.input_size), dtype)).shape
    if len(shape) < 2 or any(side != 1 for side in shape[2:]):
        raise PathconvertError(f"{classifier.name} gives outputs of size {shape_text(shape)}, not class scores")
    return int(shape[1])


def remaining_preprocessing(classifier: Classifier, recipe: Preprocessing, *, given: bool) -> Preprocessing:
    """``recipe`` without the normalisation, if the graph contains it.

    Args:
        classifier: what takes the images.
        recipe: the preprocessing of the network.
        given: whether the user gave a mean or a standard deviation.

    Raises:
        PathconvertError: the graph normalises its input, but ``given`` is True.
    """
    if not classifier.takes_pixels:
        return recipe
    if given:
        raise PathconvertError(f"{classifier.name} normalises its input itself", "Leave --mean and --std out.")
    return replace(recipe, mean=(0.0,) * len(recipe.mean), std=(1.0,) * len(recipe.std))


def logits_of(classifier: Classifier) -> Callable[[Tensor], Tensor]:
    """A function from images [N, C, H, W] to float32 logits [N, classes].

    If the classifier gives probabilities, their logarithms are returned, which have the same softmax.
    """

    def classify(images: Tensor) -> Tensor:
        missing = classifier.batch - len(images) if classifier.fixed_batch else 0
        inputs = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)]) if missing else images
        if classifier.takes_pixels:
            inputs = (inputs * 255).round().to(torch.uint8)
        scores = torch.from_numpy(classifier.run(inputs.numpy()))[: len(images)].float()
        are_probabilities = classifier.gives_probabilities
        if are_probabilities is None:
            are_probabilities = look_like_probabilities(scores.numpy())
        return scores.clamp_min(torch.finfo(torch.float32).tiny).log() if are_probabilities else scores

    return classify
