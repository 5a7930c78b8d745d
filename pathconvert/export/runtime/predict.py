"""Classify images with the preprocessing and labels that are recorded for a network.

For an ``.onnx`` file that pathconvert wrote, they are in its model card; for a checkpoint, they are
what torchvision's weights of that network expect. If nothing is recorded, the pixels are resized to
the input's size and scaled to [0, 1], and the report says so: normalisation is never guessed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pathconvert.errors import CheckpointError, PathconvertError
from pathconvert.export.runtime.engines import Array, Engine, open_engine
from pathconvert.export.runtime.image_classifier import ImageClassifier, classifier_with, is_scores
from pathconvert.export.runtime.scoring import look_like_probabilities, number_of_classes
from pathconvert.export.runtime.session import shape_text
from pathconvert.networks.image_options import NOTHING_GIVEN, ImageOptions
from pathconvert.networks.images import Picture, folder_images, read_image
from pathconvert.networks.loading import LoadedNetwork, open_network
from pathconvert.networks.preprocessing import Preprocessing, whole_levels

#: Images per call if the file does not fix their number.
BATCH_SIZE = 8
NOTHING_RECORDED = (
    "no preprocessing is recorded: pixels were resized to {size} and scaled to [0, 1], "
    "not normalised"
)


@dataclass(frozen=True)
class Guess:
    """A class that an image may belong to.

    Attributes:
        index: of the class in the output.
        label: its name; None if no labels are recorded.
        probability: in [0, 1].
    """

    index: int
    label: str | None
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, best first, and remarks on how the image was read."""

    image: str
    classes: tuple[Guess, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Unread:
    """An image that could not be read, and why."""

    image: str
    reason: str


@dataclass(frozen=True)
class PredictReport:
    """What :func:`predict` found.

    Attributes:
        model: the file or network.
        engine, device: onnxruntime or torch, and where it ran.
        fallback: why ``auto`` chose the CPU; None if it did not.
        preprocessing: as recorded or given; None if neither.
        notes: remarks that hold for all images.
        predictions: one per image that could be read, in the order given.
        unread: the images that could not be read.
    """

    model: str
    engine: str
    device: str
    fallback: str | None
    preprocessing: Preprocessing | None
    notes: tuple[str, ...]
    predictions: tuple[Prediction, ...]
    unread: tuple[Unread, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return asdict(self)


def predict(
    model: str | Path,
    images: Sequence[str | Path],
    top: int = 5,
    device: str = "auto",
    *,
    input_size: tuple[int, ...] | None = None,
    load: Callable[[str], LoadedNetwork] | None = None,
    given: ImageOptions = NOTHING_GIVEN,
) -> PredictReport:
    """Classify images. One that cannot be read is reported and does not stop the others.

    Args:
        model: an ``.onnx`` file, a checkpoint of any form, or a torchvision name.
        images: files, or folders of them.
        top: number of classes per image; fewer if the network has fewer.
        device: auto, cuda, tensorrt (``.onnx`` files only) or cpu.
        input_size: size of one input, without the batch dimension; needed if the file does not
            record it.
        load: opens a checkpoint; default: :func:`pathconvert.networks.loading.open_network`.
        given: overrides what is recorded of images and classes.

    Raises:
        CheckpointError: the file cannot be read, none of the images can be read, or the network is
            not an image classifier.
        RuntimeUnavailable: the device that was asked for cannot be used.
        PathconvertError: an input size is missing or does not fit, the network's outputs are not
            finite, or there are no images.
    """
    if top < 1:
        raise PathconvertError(
            f"the number of classes to show is {top}, but must be 1 or more",
            "Give --top 1 or more.",
        )
    paths = [path for image in images for path in _paths(Path(image))]
    if not paths:
        raise PathconvertError(
            "there are no images to classify", "Give image files, or folders of images."
        )
    load = load or (lambda source: open_network(source, input_size=input_size))
    engine = open_engine(model, device, load=load)
    classifier = classifier_with(engine, input_size, given)
    if given.labels is not None:
        given.require_labels_for(number_of_classes(classifier), engine.name)
    notes: dict[str, None] = {}  # an ordered set
    if engine.preprocessing is None and not given.normalises:
        notes[NOTHING_RECORDED.format(size=shape_text(classifier.input_size[1:]))] = None
    unread: list[Unread] = []
    pictures = _pictures(paths, classifier.input_size[0], unread)
    predictions = tuple(_predictions(classifier, pictures, top, notes))
    return PredictReport(
        model=str(model),
        engine=engine.library,
        device=engine.device,
        fallback=engine.fallback,
        preprocessing=classifier.preprocessing,
        notes=tuple(notes),
        predictions=predictions,
        unread=tuple(unread),
    )


def _paths(image: Path) -> list[Path]:
    return folder_images(image) if image.is_dir() else [image]


def _pictures(
    paths: list[Path], channels: int, unread: list[Unread]
) -> Iterator[tuple[Path, Picture]]:
    """Read images one after the other; those that cannot be read are added to ``unread``.

    Raises:
        CheckpointError: none of the images could be read; the error is that of the first one.
    """
    first: CheckpointError | None = None
    for path in paths:
        try:
            picture = read_image(path, channels)
        except CheckpointError as error:
            first = first or error
            unread.append(Unread(str(path), str(error)))
        else:
            yield path, picture
    if first and len(unread) == len(paths):
        raise first


def _predictions(
    classifier: ImageClassifier,
    pictures: Iterator[tuple[Path, Picture]],
    top: int,
    notes: dict[str, None],
) -> Iterator[Prediction]:
    """Classify images batch by batch; remarks are added to ``notes``."""
    while part := list(itertools.islice(pictures, classifier.engine.fixed_batch or BATCH_SIZE)):
        inputs = np.stack([prepare(picture.pixels, classifier) for _, picture in part])
        probabilities = _probabilities(classifier.engine, classifier.scores(inputs), notes)
        for (path, picture), row in zip(part, probabilities, strict=True):
            order = np.argsort(-row, kind="stable")[:top]
            labels = _labels(classifier.engine.labels, len(row), notes)
            classes = tuple(
                Guess(int(i), labels[i] if labels else None, float(row[i])) for i in order
            )
            yield Prediction(str(path), classes, picture.notes)


def _labels(
    labels: tuple[str, ...] | None, count: int, notes: dict[str, None]
) -> tuple[str, ...] | None:
    """The labels of ``count`` outputs; None, and a remark in ``notes``, if it is another number."""
    if labels and len(labels) != count:
        remark = (
            f"{len(labels)} labels are recorded, but there are {count} outputs, so labels are not "
            "shown"
        )
        notes[remark] = None
        return None
    return labels


def _probabilities(engine: Engine, scores: Array, notes: dict[str, None]) -> Array:
    """Turn scores [N, classes] into probabilities in float64; remarks are added to ``notes``.

    Raises:
        CheckpointError: the outputs are not class scores.
        PathconvertError: the scores are not finite.
    """
    if not is_scores(scores.shape):
        raise CheckpointError(
            f"{engine.name} gives outputs of size {shape_text(scores.shape)}, not class scores"
        )
    values = scores.reshape(scores.shape[:2]).astype(np.float64)
    if not np.isfinite(values).all():
        raise PathconvertError(
            f"{engine.name} gives outputs that are not finite",
            "fp16 may overflow; try a network in fp32.",
        )
    are_probabilities = engine.gives_probabilities
    if are_probabilities is None:
        are_probabilities = look_like_probabilities(values)
        kind = "probabilities" if are_probabilities else "logits"
        notes[f"the file does not record what its outputs are; they were taken for {kind}"] = None
    if are_probabilities:
        return values
    powers = np.exp(values - values.max(1, keepdims=True))
    normalised: Array = powers / powers.sum(1, keepdims=True)
    return normalised


def prepare(pixels: Tensor, classifier: ImageClassifier) -> Array:
    """Turn the pixels of an image into an input of a classifier.

    Args:
        pixels: [C, H, W] in [0, 1].
        classifier: its preprocessing is used, or plain resizing if it has none.

    Returns:
        [C, height, width]: uint8 if the graph normalises, else normalised float32.
    """
    recipe = classifier.preprocessing or Preprocessing.plain(classifier.input_size)
    placed = recipe.place(whole_levels(pixels))
    array: Array = (placed if classifier.engine.takes_pixels else recipe.normalise(placed)).numpy()
    return array
