"""What an ``.onnx`` file says about itself: one metadata property, ``pathconvert``, that holds a JSON object.

The object is a versioned format of its own, the fields of :class:`ModelCard`::

    format_version, tool
    architecture            name, arguments, input_size, task; null where nothing tells
    form                    plain, path or path-bn: what the file that was exported held
    source_name, source_sha256
    preprocessing           resize, crop, mean, std, interpolation; null where nothing tells
    labels                  class names in the order of the logits; null where nothing tells
    precision, softmax, preprocessing_in_graph

``preprocessing_in_graph`` says that the graph takes uint8 pixels and normalises them itself: then only ``resize`` and
``crop`` are left to do.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pathconvert.errors import CheckpointError
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
    """What an exported file says about itself (see the module's docstring)."""

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
        """The JSON object."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> ModelCard:
        """Read the JSON object; unknown fields are ignored.

        Raises:
            CheckpointError: it is of a newer format, or damaged.
        """
        version = stored.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise CheckpointError(
                f"the file has pathconvert metadata of format version {version}; this is pathconvert {__version__}, "
                f"which reads up to version {FORMAT_VERSION}",
                f"Read it with the version that wrote it: {stored.get('tool', 'unknown')}.",
            )
        try:
            return _card(stored)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            message = f"the file has damaged pathconvert metadata: {type(error).__name__}: {error}"
            raise CheckpointError(message, "Export it again.") from error


def _card(stored: Mapping[str, Any]) -> ModelCard:
    architecture, preprocessing, labels = (stored.get(k) for k in ("architecture", "preprocessing", "labels"))
    if architecture is not None:
        size = architecture["input_size"]
        architecture = Architecture(
            architecture["name"],
            architecture["arguments"],
            tuple(map(int, size)) if size else None,
            architecture["task"],
        )
    if labels is not None and not isinstance(labels, list):
        raise TypeError("labels are no list")
    return ModelCard(
        architecture,
        str(stored.get("form", "plain")),
        stored.get("source_name"),
        stored.get("source_sha256"),
        Preprocessing.from_json(preprocessing) if preprocessing is not None else None,
        tuple(map(str, labels)) if labels is not None else None,
        str(stored.get("precision", "fp32")),
        bool(stored.get("softmax", False)),
        bool(stored.get("preprocessing_in_graph", False)),
        str(stored.get("tool", "unknown")),
        int(stored["format_version"]),
    )


def write_card(model: onnx.ModelProto, card: ModelCard) -> None:
    """Store ``card`` in ``model``, in place of one that it has."""
    kept = [(entry.key, entry.value) for entry in model.metadata_props if entry.key != PROPERTY]
    del model.metadata_props[:]
    for key, value in [*kept, (PROPERTY, json.dumps(card.to_json()))]:
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value


def read_card(source: onnx.ModelProto | Mapping[str, str]) -> ModelCard | None:
    """The card of an ONNX model, or of a session's ``get_modelmeta().custom_metadata_map``; None without one.

    Raises:
        CheckpointError: it is of a newer format, or damaged.
    """
    properties = source if isinstance(source, Mapping) else {e.key: e.value for e in source.metadata_props}
    text = properties.get(PROPERTY)
    if text is None:
        return None
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError):
        stored = None
    if not isinstance(stored, dict):
        raise CheckpointError("the file has damaged pathconvert metadata: it is no JSON object", "Export it again.")
    return ModelCard.from_json(stored)
