"""What a classifier's outputs mean, and which preprocessing it still needs.

The outputs are logits or probabilities of a number of classes. A graph that takes uint8 pixels
normalises them itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pathconvert.errors import PathconvertError
from pathconvert.export.runtime.engines import Array, Engine
from pathconvert.export.runtime.image_classifier import ImageClassifier, is_scores
from pathconvert.export.runtime.session import shape_text
from pathconvert.networks.preprocessing import Preprocessing

#: How far the sum of a row of probabilities may be from 1. Rounding to float16 changes it by at
#: most 2⁻¹¹, about 5e-4, and 2⁻²⁵ for every subnormal value.
SUM_TOLERANCE = 1e-3


def look_like_probabilities(scores: Array) -> bool:
    """Whether no score [N, classes] is negative and every row adds up to 1."""
    return bool((scores >= 0).all() and (abs(scores.sum(1) - 1) < SUM_TOLERANCE).all())


def number_of_classes(classifier: ImageClassifier) -> int:
    """The number of scores per image, found by running the classifier on zeros.

    Raises:
        PathconvertError: the outputs are not class scores.
    """
    engine = classifier.engine
    dtype = np.uint8 if engine.takes_pixels else np.float32
    shape = engine.run(np.zeros((engine.fixed_batch or 1, *classifier.input_size), dtype)).shape
    if not is_scores(shape):
        raise PathconvertError(
            f"{engine.name} gives outputs of size {shape_text(shape)}, not class scores"
        )
    return int(shape[1])


def remaining_preprocessing(engine: Engine, recipe: Preprocessing) -> Preprocessing:
    """``recipe`` without the normalisation, if the graph of ``engine`` contains it."""
    if not engine.takes_pixels:
        return recipe
    return replace(recipe, mean=(0.0,) * len(recipe.mean), std=(1.0,) * len(recipe.std))


def logits_of(classifier: ImageClassifier) -> Callable[[Tensor], Tensor]:
    """A function from images [N, C, H, W] to float32 logits [N, classes].

    The images are prepared as :func:`remaining_preprocessing` says. If the classifier gives
    probabilities, their logarithms are returned, which have the same softmax.
    """

    engine = classifier.engine

    def classify(images: Tensor) -> Tensor:
        inputs = (images * 255).round().to(torch.uint8) if engine.takes_pixels else images
        scores = torch.from_numpy(classifier.scores(inputs.numpy())).float()
        are_probabilities = engine.gives_probabilities
        if are_probabilities is None:
            are_probabilities = look_like_probabilities(scores.numpy())
        if not are_probabilities:
            return scores
        return scores.clamp_min(torch.finfo(torch.float32).tiny).log()

    return classify
