"""One interface for everything that ``predict`` runs: loaded ONNX files, and networks in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathconvert.errors import CheckpointError, PathconvertError, RuntimeUnavailable
from pathconvert.export.runtime.providers import DEVICES, require_size
from pathconvert.export.runtime.session import Session, shape_text
from pathconvert.networks import architectures
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.inputs import size_of
from pathconvert.networks.loading import LoadedNetwork
from pathconvert.networks.preprocessing import Preprocessing

#: Images per call if the file does not fix their number.
BATCH = 8

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Classifier:
    """A network that gives class scores for images.

    Attributes:
        name: the file or network.
        engine, device: onnxruntime or torch, and where it runs.
        fallback: why ``auto`` chose the CPU; None if it did not.
        run: images [N, C, H, W] → class scores [N, classes].
        input_size: C, H, W.
        batch: images per call: at most so many, or exactly so many with ``fixed_batch``.
        preprocessing, labels: as recorded for the network; None if nothing is recorded.
        gives_probabilities: whether the scores are probabilities; None if it is not known.
        takes_pixels: whether it takes uint8 values, which the graph normalises.
    """

    name: str
    engine: str
    device: str
    fallback: str | None
    run: Callable[[Array], Array]
    input_size: tuple[int, int, int]
    batch: int
    fixed_batch: bool
    preprocessing: Preprocessing | None
    labels: tuple[str, ...] | None
    gives_probabilities: bool | None
    takes_pixels: bool


def session_classifier(session: Session, input_size: tuple[int, ...] | None = None) -> Classifier:
    """Make a classifier of a loaded ``.onnx`` file.

    Args:
        session: the file.
        input_size: channels, height and width; needed if the graph leaves them free and the file records none.

    Raises:
        CheckpointError: the graph does not take images or does not give class scores; the message names its inputs or
            outputs.
        PathconvertError: the input size is missing, or does not fit.
    """
    card = session.card
    size = _session_size(session, input_size)
    require_size(session, size)
    takes_pixels = session.input_dtype == np.uint8
    if takes_pixels and not (card and card.preprocessing_in_graph):
        raise CheckpointError(
            f"{session.path} takes uint8 values, but does not record how it normalises them",
            "Export the network with a floating-point input.",
        )
    if card is None and (len(session.outputs) != 1 or not _is_scores(session.outputs[0].shape)):
        shapes = ", ".join(f"{port.name} {shape_text(port.shape)}" for port in session.outputs)
        raise CheckpointError(
            f"{session.path} has the outputs {shapes}, but one output of class scores [batch, classes] is needed",
            "Export the network with its class scores as the only output.",
        )
    if card and card.preprocessing and len(card.preprocessing.mean) != size[0]:
        raise CheckpointError(
            f"{session.path} has damaged pathconvert metadata: it takes {size[0]} channels, but mean and std have "
            f"{len(card.preprocessing.mean)} values",
            "Export the network again.",
        )
    batch = session.input_shape[0]
    return Classifier(
        name=str(session.path),
        engine="onnxruntime",
        device=session.device,
        fallback=session.fallback,
        run=lambda array: session.run(array)[0],
        input_size=size,
        batch=batch if isinstance(batch, int) else BATCH,
        fixed_batch=isinstance(batch, int),
        preprocessing=card.preprocessing.at(size[1:]) if card and card.preprocessing else None,
        labels=card.labels if card else None,
        gives_probabilities=_gives_probabilities(card.architecture, softmax=card.softmax) if card else None,
        takes_pixels=takes_pixels,
    )


def _gives_probabilities(architecture: Architecture | None, *, softmax: bool) -> bool | None:
    """Whether a softmax comes last; None if it is not known: a network that is not torchvision's may end in one."""
    if softmax:
        return True
    return False if architecture and architectures.is_known(architecture.name) else None


def _is_scores(shape: tuple[int | str | None, ...]) -> bool:
    """Whether an output of this shape can be class scores: [batch, classes], or with further sides of 1."""
    return len(shape) >= 2 and all(side == 1 for side in shape[2:])


def _session_size(session: Session, wanted: tuple[int, ...] | None) -> tuple[int, int, int]:
    """Channels, height and width of the input: the graph's or, if it leaves them free, wanted or recorded ones."""
    shape = session.input_shape
    own = tuple(side if isinstance(side, int) else None for side in shape[1:])
    if len(shape) != 4 or own[0] not in (1, 3):
        raise CheckpointError(
            f"{session.path} takes inputs of size {shape_text(shape)}, but images have the size "
            "[batch, 1 or 3, height, width]",
            "Export the network for images in that layout.",
        )
    size = wanted or (own if None not in own else recorded_size(session, own[0]))
    if size is None:
        raise PathconvertError(
            f"{session.path} takes images of any size ({shape_text(shape)}) and does not record one",
            f"Give one, such as --input-size {own[0]}x224x224.",
        )
    if len(size) != 3 or any(a not in (None, b) for a, b in zip(own, size, strict=True)):
        raise PathconvertError(
            f"{session.path} takes images of size {shape_text(own)}, not {shape_text(size)}",
            "Leave --input-size out, or export the network for that size.",
        )
    return int(size[0] or 0), int(size[1] or 0), int(size[2] or 0)


def recorded_size(session: Session, channels: int | None) -> tuple[int | None, ...] | None:
    """The input size in the file's card, without the batch dimension; None if it has none."""
    card = session.card
    if card and card.preprocessing and card.preprocessing.crop:
        return (channels, *card.preprocessing.crop)
    return card.architecture.input_size if card and card.architecture else None


def torch_classifier(name: str, network: LoadedNetwork, device: str) -> Classifier:
    """Make a classifier of a checkpoint, in float32.

    Raises:
        CheckpointError: the network is not an image classifier.
        RuntimeUnavailable: the device that was asked for cannot be used.
    """
    architecture = network.architecture
    size = size_of(architecture)
    if architecture.task in ("detection", "segmentation", "video") or len(size) != 3 or size[0] not in (1, 3):
        raise CheckpointError(
            f"{name} is not an image classifier: {architecture.name} is for {architecture.task} and takes inputs of "
            f"size {shape_text(size)}",
            "Choose a network that gives class scores for an image.",
        )
    if device == "tensorrt":
        raise RuntimeUnavailable(
            f"tensorrt only runs .onnx files, and {name} is not one", "Export it first, or use --device cuda."
        )
    where, fallback = torch_device(name, device)
    model = network.model.eval().to(where, torch.float32)

    def run(array: Array) -> Array:
        with torch.inference_mode():
            output = model(torch.from_numpy(array).to(where))
        if not isinstance(output, Tensor):
            raise CheckpointError(f"{name} gives a {type(output).__name__}, not class scores")
        scores: Array = output.cpu().numpy()
        return scores

    return Classifier(
        name=name,
        engine="torch",
        device=where,
        fallback=fallback,
        run=run,
        input_size=(size[0], size[1], size[2]),
        batch=BATCH,
        fixed_batch=False,
        preprocessing=network.preprocessing,
        labels=network.labels,
        gives_probabilities=_gives_probabilities(architecture, softmax=False),
        takes_pixels=False,
    )


def torch_device(name: str, device: str) -> tuple[str, str | None]:
    """Choose where torch runs a network.

    Args:
        name: the network, for the message.
        device: auto (a GPU if torch finds one, else the CPU), cuda or cpu.

    Returns:
        ``cuda`` or ``cpu``; and why ``auto`` chose the CPU, or None if it did not.

    Raises:
        RuntimeUnavailable: there is no such device, or torch finds no GPU.
    """
    if device in ("cuda", "auto") and torch.cuda.is_available():
        return "cuda", None
    if device == "cuda":
        raise RuntimeUnavailable(f"{name} cannot run on cuda: torch finds no GPU here", "Run on --device cpu.")
    if device not in ("auto", "cpu"):
        raise RuntimeUnavailable(f"there is no device {device!r}", f"Devices: {', '.join(DEVICES)}.")
    return "cpu", "torch finds no GPU" if device == "auto" else None
