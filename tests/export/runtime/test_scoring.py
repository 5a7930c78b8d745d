"""What outputs mean: number of classes, probabilities and logits, remaining preprocessing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from pathconvert.errors import PathconvertError
from pathconvert.export.runtime.engines import Engine
from pathconvert.export.runtime.image_classifier import ImageClassifier, classifier_with
from pathconvert.export.runtime.scoring import (
    logits_of,
    look_like_probabilities,
    number_of_classes,
    remaining_preprocessing,
)
from pathconvert.networks.image_options import ImageOptions
from pathconvert.networks.preprocessing import Preprocessing

SIZE = (3, 2, 2)
RECIPE = Preprocessing(4, (2, 2), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic")
MATRIX = np.random.default_rng(0).standard_normal((12, 5)).astype(np.float32)


def scores_of(inputs: np.ndarray) -> np.ndarray:
    """A linear network: [N, 3, 2, 2] → [N, 5]."""
    return inputs.reshape(len(inputs), -1).astype(np.float32) @ MATRIX


def classifier(run: Callable[[np.ndarray], np.ndarray] = scores_of, **options) -> ImageClassifier:
    """A classifier that runs ``run`` and refuses batches of another size than the fixed one."""

    def checked(inputs: np.ndarray) -> np.ndarray:
        assert inputs.dtype == (np.uint8 if options.get("takes_pixels") else np.float32)
        assert len(inputs) == (options.get("fixed_batch") or len(inputs))
        return run(inputs)

    values = {"fixed_batch": None} | options
    engine = Engine(
        "net", "torch eager", "cpu", torch.nn.Identity(), SIZE, run=checked, runner=None, **values
    )
    return ImageClassifier(engine, SIZE, RECIPE)


def images(count: int) -> torch.Tensor:
    """Seeded images [count, 3, 2, 2] of whole 8-bit levels in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, *SIZE), generator=generator) / 255


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores)
    return powers / powers.sum(1, keepdims=True)


# ---- probabilities or logits ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_probabilities_are_recognised_in_every_precision(dtype):
    probabilities = softmax(np.random.default_rng(0).standard_normal((50, 1000)))
    assert look_like_probabilities(probabilities.astype(dtype).astype(np.float64))


@pytest.mark.parametrize(
    "scores",
    [
        [[0.2, 0.8], [0.5, 0.6]],  # the second row does not add up to 1
        [[1.2, -0.2]],  # it does, but a score is negative
        [[0.0, 0.0]],
    ],
)
def test_other_scores_are_not_taken_for_probabilities(scores):
    assert not look_like_probabilities(np.array(scores))


# ---- number of classes ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"fixed_batch": 3}, {"takes_pixels": True}])
def test_the_number_of_classes(options):
    assert number_of_classes(classifier(**options)) == 5


def test_further_sides_of_one_do_not_matter():
    assert number_of_classes(classifier(lambda x: scores_of(x)[:, :, None, None])) == 5


@pytest.mark.parametrize(("shape", "text"), [((1,), "1"), ((1, 5, 7, 7), "1x5x7x7")])
def test_outputs_that_are_not_class_scores(shape, text):
    with pytest.raises(PathconvertError) as refused:
        number_of_classes(classifier(lambda _: np.zeros(shape, np.float32)))
    assert str(refused.value) == f"net gives outputs of size {text}, not class scores"


# ---- remaining preprocessing ---------------------------------------------------------------------


def test_nothing_is_left_out_where_the_graph_does_not_normalise():
    assert remaining_preprocessing(classifier().engine, RECIPE) == RECIPE


def test_the_normalisation_is_left_out_where_the_graph_contains_it():
    engine = classifier(takes_pixels=True).engine
    assert remaining_preprocessing(engine, RECIPE) == Preprocessing(
        4, (2, 2), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic"
    )


def test_values_for_a_graph_that_normalises_are_refused():
    with pytest.raises(PathconvertError) as refused:
        classifier_with(classifier(takes_pixels=True).engine, None, ImageOptions(mean=(0.5,)))
    assert str(refused.value) == "net normalises its input itself"
    assert refused.value.tip == "Leave --mean and --std out."


# ---- logits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, None])
def test_logits_are_returned_as_they_are(known):
    found = logits_of(classifier(gives_probabilities=known))(images(4))
    assert np.array_equal(found.numpy(), scores_of(images(4).numpy()))


@pytest.mark.parametrize("known", [True, None])
def test_logarithms_of_probabilities_have_the_same_softmax(known):
    probabilities = softmax(scores_of(images(4).numpy()))
    found = logits_of(classifier(lambda _: probabilities, gives_probabilities=known))(images(4))
    # a logarithm and an exponential in float32, each with a relative error of about 1e-7
    np.testing.assert_allclose(found.softmax(1).numpy(), probabilities, rtol=2e-6)


def test_a_probability_of_zero_has_a_finite_logarithm():
    certain = np.eye(5, dtype=np.float32)[:1]
    found = logits_of(classifier(lambda _: certain, gives_probabilities=True))(images(1))
    assert torch.isfinite(found).all()
    # the smallest normal number takes the place of zero
    assert torch.allclose(found.softmax(1), torch.from_numpy(certain), rtol=0, atol=2e-38)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_fixed_batch_is_filled_up(count):
    found = logits_of(classifier(fixed_batch=4))(images(count))
    assert found.shape == (count, 5)
    # a product of a larger matrix may add up in another order; sums of 12 terms of size 1
    np.testing.assert_allclose(found.numpy(), scores_of(images(count).numpy()), atol=1e-5)


def test_pixels_reach_a_graph_that_normalises_as_whole_levels():
    seen = []
    run = classifier(lambda x: (seen.append(x), scores_of(x))[1], takes_pixels=True)
    logits_of(run)(images(3))
    assert np.array_equal(seen[0], (images(3) * 255).round().numpy().astype(np.uint8))


def test_half_precision_scores_become_float32():
    found = logits_of(classifier(lambda x: scores_of(x).astype(np.float16)))(images(2))
    assert found.dtype == torch.float32
