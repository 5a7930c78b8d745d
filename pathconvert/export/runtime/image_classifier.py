"""Engines that classify images: what such a network has to fulfil, and how it is run on images."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pathconvert.errors import CheckpointError, PathconvertError
from pathconvert.export.runtime.engines import Array, Engine
from pathconvert.export.runtime.providers import require_size
from pathconvert.export.runtime.session import Session, shape_text
from pathconvert.networks.image_options import ImageOptions
from pathconvert.networks.preprocessing import Preprocessing


@dataclass(frozen=True)
class ImageClassifier:
    """An engine that takes images of one size and gives class scores; see :func:`as_classifier`.

    Attributes:
        engine: what runs.
        input_size: C, H, W of every image.
        preprocessing: as recorded or given, for images of that size; None if neither.
    """

    engine: Engine
    input_size: tuple[int, int, int]
    preprocessing: Preprocessing | None

    def scores(self, images: Array) -> Array:
        """Run the network on images; if its batch size is fixed, the last one is repeated.

        Args:
            images: [N, C, H, W] with N ≥ 1, and no more than the fixed batch size. They are uint8
                if the engine takes pixels, else float32.

        Returns:
            The class scores, [N, classes], or with further sides of 1.
        """
        missing = self.engine.fixed_batch - len(images) if self.engine.fixed_batch else 0
        padded = np.concatenate([images, images[-1:].repeat(missing, 0)]) if missing else images
        return self.engine.run(padded)[: len(images)]


def as_classifier(engine: Engine, input_size: tuple[int, ...] | None = None) -> ImageClassifier:
    """Check that an engine classifies images, and settle the size of its images.

    Args:
        engine: any.
        input_size: channels, height and width; needed if a graph leaves sides free and the file
            records none. A network in torch takes the size that it was loaded with.

    Raises:
        CheckpointError: the network does not take images or does not give class scores; for an
            ``.onnx`` file, the message names its input or outputs.
        PathconvertError: the input size is missing, or does not fit.
    """
    if isinstance(engine.model, Session):
        size = _graph_size(engine, engine.model, input_size)
        require_size(engine.model, size)
        _require_images_and_scores(engine.name, engine.model, size[0])
    else:
        size = _network_size(engine)
    recorded = engine.preprocessing
    return ImageClassifier(engine, size, recorded.at(size[1:]) if recorded else None)


def classifier_with(
    engine: Engine, input_size: tuple[int, ...] | None, given: ImageOptions
) -> ImageClassifier:
    """Make a classifier as :func:`as_classifier` does, with the user's options for its images.

    Args:
        engine: any.
        input_size: as in :func:`as_classifier`; ``given.size`` takes its place.
        given: override what is recorded. What is neither given nor recorded is that of
            :meth:`Preprocessing.plain`.

    Raises:
        PathconvertError: as in :func:`as_classifier`; or the graph normalises its input itself, but
            a mean or a standard deviation was given.
        DataError: the options do not fit the network.
    """
    if given.normalises and engine.takes_pixels:
        raise PathconvertError(
            f"{engine.name} normalises its input itself", "Leave --mean and --std out."
        )
    channels = (engine.input_size[0] if engine.input_size else None) or 3
    classifier = as_classifier(engine, (channels, *given.size) if given.size else input_size)
    recipe = classifier.preprocessing
    if given.preparing:
        recipe = given.over(recipe or Preprocessing.plain(classifier.input_size))
    labels = engine.labels if given.labels is None else given.labels
    return replace(classifier, engine=replace(engine, labels=labels), preprocessing=recipe)


def _graph_size(
    engine: Engine, session: Session, wanted: tuple[int, ...] | None
) -> tuple[int, int, int]:
    """Channels, height and width: the graph's; for sides that it leaves free, wanted or recorded.

    Raises:
        CheckpointError: the input does not have the shape of images.
        PathconvertError: the size is not known, or ``wanted`` is not one that the graph takes.
    """
    shape, own = session.input_shape, engine.input_size
    if len(shape) != 4 or own[0] not in (1, 3):
        raise CheckpointError(
            f"{engine.name} takes inputs of size {shape_text(shape)}, but images have the size "
            "[batch, 1 or 3, height, width]",
            "Export the network for images in that layout.",
        )
    size = wanted or (engine.recorded_size if None in own else own)
    if size is None:
        raise PathconvertError(
            f"{engine.name} takes images of any size ({shape_text(shape)}) and does not record one",
            f"Give one, such as --input-size {own[0]}x224x224.",
        )
    if len(size) != 3 or any(a not in (None, b) for a, b in zip(own, size, strict=True)):
        raise PathconvertError(
            f"{engine.name} takes images of size {shape_text(own)}, not {shape_text(size)}",
            "Leave --input-size out, or export the network for that size.",
        )
    return int(size[0] or 0), int(size[1] or 0), int(size[2] or 0)


def _require_images_and_scores(name: str, session: Session, channels: int) -> None:
    """Refuse a graph whose images could not be prepared, or whose outputs are not class scores.

    Raises:
        CheckpointError: the normalisation of a uint8 input is not recorded, or not for as many
            channels; or a file without a card has more than one output, or one of another shape.
    """
    card = session.card
    if session.input_dtype == np.uint8 and not (card and card.preprocessing_in_graph):
        raise CheckpointError(
            f"{name} takes uint8 values, but does not record how it normalises them",
            "Export the network with a floating-point input.",
        )
    if card is None and (len(session.outputs) != 1 or not is_scores(session.outputs[0].shape)):
        shapes = ", ".join(f"{port.name} {shape_text(port.shape)}" for port in session.outputs)
        raise CheckpointError(
            f"{name} has the outputs {shapes}, but one output of class scores [batch, classes] is "
            "needed",
            "Export the network with its class scores as the only output.",
        )
    if card and card.preprocessing and len(card.preprocessing.mean) != channels:
        raise CheckpointError(
            f"{name} has damaged pathconvert metadata: it takes {channels} channels, but mean and "
            f"std have {len(card.preprocessing.mean)} values",
            "Export the network again.",
        )


def is_scores(shape: tuple[int | str | None, ...]) -> bool:
    """Whether outputs of this shape can be class scores: [N, classes], or more sides of 1."""
    return len(shape) >= 2 and all(side == 1 for side in shape[2:])


def _network_size(engine: Engine) -> tuple[int, int, int]:
    """Channels, height and width of the images of a network in torch.

    Raises:
        CheckpointError: the network is not an image classifier.
    """
    architecture, size = engine.architecture, engine.input_size
    assert architecture is not None
    other_task = architecture.task in ("detection", "segmentation", "video")
    if other_task or len(size) != 3 or size[0] not in (1, 3):
        raise CheckpointError(
            f"{engine.name} is not an image classifier: {architecture.name} is for "
            f"{architecture.task} and takes inputs of size {shape_text(size)}",
            "Choose a network that gives class scores for an image.",
        )
    return int(size[0] or 0), int(size[1] or 0), int(size[2] or 0)
