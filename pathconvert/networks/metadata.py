"""The metadata that this package stores beside the tensors of a file.

It is a JSON object with a format version of its own::

    format_version, tool, torch, torchvision
    architecture     name, arguments, input_size, task; null if the network cannot be built by name
    source           file name and SHA-256 of the checkpoint that was converted, the digest of its
                     tensors, and the layout that it had (files/layout.py)
    record           the conversion record (conversion/record.py); null for a network that was
                     trained without a conversion

There may be more. A network that was fine-tuned has all of these, any other one the last two if its
user, or the configuration beside its file, says so::

    training         the settings of the run and what was measured
    preprocessing    how its images are prepared (preprocessing.py)
    labels           its classes in the order of the logits
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torchvision

from pathconvert.conversion.record import Record
from pathconvert.errors import CheckpointError, class_and_text
from pathconvert.files.checkpoint import Checkpoint
from pathconvert.files.refusals import AGAIN
from pathconvert.formats import require_format
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.configured import configured_labels, configured_preprocessing
from pathconvert.networks.preprocessing import Preprocessing, for_weights, labels_of
from pathconvert.version import __version__

FORMAT_VERSION = 1


def make_metadata(
    record: Record | None,
    architecture: Architecture | None,
    source: Mapping[str, str],
    *,
    preprocessing: Preprocessing | None = None,
    labels: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The metadata of a file that is to be written, as the module's docstring describes it."""
    own: dict[str, Any] = (
        {} if preprocessing is None else {"preprocessing": dataclasses.asdict(preprocessing)}
    )
    own |= {} if labels is None else {"labels": list(labels)}
    return {
        "format_version": FORMAT_VERSION,
        "tool": f"pathconvert {__version__}",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "architecture": dataclasses.asdict(architecture) if architecture else None,
        "source": dict(source),
        "record": None if record is None else record.to_json(),
    } | own


def check_version(checkpoint: Checkpoint) -> None:
    """Refuse metadata of another format version.

    Raises:
        CheckpointError: the version is not ``FORMAT_VERSION``.
    """
    what = f"{checkpoint.path} has metadata of"
    require_format(checkpoint.metadata or {}, FORMAT_VERSION, what, CheckpointError)


def own_preprocessing(checkpoint: Checkpoint | None) -> Preprocessing | None:
    """The preprocessing that a file records; None if it records none.

    Raises:
        CheckpointError: the record is damaged.
    """
    stored = _recorded(checkpoint, "preprocessing")
    if stored is None:
        return None
    try:
        return Preprocessing.from_json(stored)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise _damaged(checkpoint, f"preprocessing: {class_and_text(error)}") from error


def own_labels(checkpoint: Checkpoint | None) -> tuple[str, ...] | None:
    """The class names that a file records; None if it records none.

    Raises:
        CheckpointError: they are not a list of names.
    """
    stored = _recorded(checkpoint, "labels")
    if stored is None:
        return None
    if not isinstance(stored, list) or not all(isinstance(label, str) for label in stored):
        raise _damaged(checkpoint, "labels are not a list of names")
    return tuple(stored)


def said_preprocessing(
    checkpoint: Checkpoint | None, architecture: Architecture
) -> Preprocessing | None:
    """What a file records, else what the configuration beside it says; None without either.

    It is for images of the architecture's size.

    Raises:
        CheckpointError: the file's own preprocessing or configuration is damaged.
    """
    own, size = own_preprocessing(checkpoint), architecture.input_size
    if own is None:
        return configured_preprocessing(checkpoint, architecture)
    return own.at((size[1], size[2])) if size and len(size) == 3 else own


def said_labels(
    checkpoint: Checkpoint | None, architecture: Architecture
) -> tuple[str, ...] | None:
    """The class names that a file records, or the configuration beside it; None without either.

    Raises:
        CheckpointError: the file's own labels or configuration are damaged.
    """
    return own_labels(checkpoint) or configured_labels(checkpoint, architecture)


def known_preprocessing(
    checkpoint: Checkpoint | None, architecture: Architecture
) -> Preprocessing | None:
    """As :func:`said_preprocessing`, else what the weights expect; None if nothing is known."""
    said = said_preprocessing(checkpoint, architecture)
    return for_weights(architecture, weights_sha256(checkpoint)) if said is None else said


def known_labels(
    checkpoint: Checkpoint | None, architecture: Architecture
) -> tuple[str, ...] | None:
    """As :func:`said_labels`, else those of the weights; None if nothing is known."""
    said = said_labels(checkpoint, architecture)
    return labels_of(architecture, weights_sha256(checkpoint)) if said is None else said


def weights_sha256(checkpoint: Checkpoint | None) -> str | None:
    """The SHA-256 of the file that a network's weights were in before any conversion.

    Returns:
        None if torchvision provided the weights by name; "" if nothing says where they come from.
    """
    if checkpoint is None:
        return None
    if checkpoint.metadata is None:
        return checkpoint.sha256
    source = checkpoint.metadata.get("source") or {}
    # a network that was named has no file; one that was saved from Python has no source at all
    return source.get("sha256", None if "tensors_sha256" in source else "")


def _recorded(checkpoint: Checkpoint | None, what: str) -> Any:
    return (checkpoint.metadata or {}).get(what) if checkpoint else None


def _damaged(checkpoint: Checkpoint | None, what: str) -> CheckpointError:
    path = checkpoint.path if checkpoint else "the network"
    return CheckpointError(f"{path} has damaged pathconvert metadata: {what}", AGAIN)
