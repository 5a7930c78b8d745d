"""The model card: what an ``.onnx`` file records about itself.

It is a JSON object in a metadata property of the file named ``pathconvert``.

The format is versioned. The object holds the fields of :class:`ModelCard`::

    format_version, tool
    architecture            name, arguments, input_size, task; null if unknown
    form                    plain, path or path-bn: the form of the network that was exported
    source_name, source_sha256
    preprocessing           resize, crop, mean, std, interpolation; null if unknown
    labels                  class names in the order of the logits; null if unknown
    precision, softmax, preprocessing_in_graph

If ``preprocessing_in_graph`` is true, the graph takes uint8 pixels and normalises them itself, so
that only ``resize`` and ``crop`` are left to do.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pathconvert.errors import CheckpointError
from pathconvert.formats import require_format
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.preprocessing import Preprocessing
from pathconvert.version import __version__

if TYPE_CHECKING:
    import onnx

FORMAT_VERSION = 1
#: The key of the metadata property.
PROPERTY = "pathconvert"


@dataclass(frozen=True)
class ModelCard:
    """What an exported file records about itself (see the module's docstring)."""

    architecture: Architecture | None = None
    form: str = "plain"
    source_name: str | None = None
    source_sha256: str | None = None
    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] | None = None
    precision: str = "fp32"
    softmax: bool = False
    preprocessing_in_graph: bool = False
    tool: str = f"pathconvert {__version__}"
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """The card as a JSON object."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> ModelCard:
        """Make a card of a JSON object; unknown fields are ignored.

        Raises:
            CheckpointError: the card has a newer format, or is damaged.
        """
        require_format(
            stored, FORMAT_VERSION, "the file has pathconvert metadata of", CheckpointError
        )
        try:
            return _card(stored)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            message = f"the file has damaged pathconvert metadata: {type(error).__name__}: {error}"
            raise CheckpointError(message, "Export the network again.") from error


def _card(stored: Mapping[str, Any]) -> ModelCard:
    architecture, preprocessing, labels = (
        stored.get(k) for k in ("architecture", "preprocessing", "labels")
    )
    if architecture is not None:
        size = architecture["input_size"]
        architecture = Architecture(
            architecture["name"],
            architecture["arguments"],
            tuple(map(int, size)) if size else None,
            architecture["task"],
        )
    if labels is not None and not isinstance(labels, list):
        raise TypeError("labels is not a list")
    return ModelCard(
        architecture=architecture,
        form=str(stored.get("form", "plain")),
        source_name=stored.get("source_name"),
        source_sha256=stored.get("source_sha256"),
        preprocessing=Preprocessing.from_json(preprocessing) if preprocessing is not None else None,
        labels=tuple(map(str, labels)) if labels is not None else None,
        precision=str(stored.get("precision", "fp32")),
        softmax=bool(stored.get("softmax", False)),
        preprocessing_in_graph=bool(stored.get("preprocessing_in_graph", False)),
        tool=str(stored.get("tool", "unknown")),
        format_version=int(stored["format_version"]),
    )


def write_card(model: onnx.ModelProto, card: ModelCard) -> None:
    """Store ``card`` in ``model``; a card that it already has is replaced."""
    kept = [(entry.key, entry.value) for entry in model.metadata_props if entry.key != PROPERTY]
    del model.metadata_props[:]
    for key, value in [*kept, (PROPERTY, json.dumps(card.to_json()))]:
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value


def read_card(source: onnx.ModelProto | Mapping[str, str]) -> ModelCard | None:
    """Read the card of an ONNX model, or of a session's ``get_modelmeta().custom_metadata_map``.

    None if it has none.

    Raises:
        CheckpointError: the card has a newer format, or is damaged.
    """
    properties = (
        source if isinstance(source, Mapping) else {e.key: e.value for e in source.metadata_props}
    )
    text = properties.get(PROPERTY)
    if text is None:
        return None
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError):
        stored = None
    if not isinstance(stored, dict):
        message = "the file has damaged pathconvert metadata: it is not a JSON object"
        raise CheckpointError(message, "Export the network again.")
    return ModelCard.from_json(stored)
