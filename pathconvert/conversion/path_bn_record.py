"""The part of a conversion record that describes Path-BN layers (the entry ``path_bn``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pathconvert.conversion.runs import decode_runs, encode_runs
from pathconvert.conversion.tracing.trace import IdVector
from pathconvert.errors import RecordError
from pathconvert.formats import require_format

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class RecordedReader:
    """A BatchNorm that reads rows of a layer without a BatchNorm of its own.

    Attributes:
        bn: the BatchNorm's path.
        rows: the layer's rows that it reads, [n].
        channels: the channels in which it reads them, [n].
    """

    bn: str
    rows: IdVector
    channels: IdVector


@dataclass(frozen=True, eq=False)
class RecordedLayer:
    """A layer in Path-BN form.

    Attributes:
        name: the layer's path.
        bn: path of the BatchNorm that the layer took in; None if it had none.
        pivots: the number of its pivots.
        readers: where a bias moves to when a layer without BatchNorm and bias leaves the form.
    """

    name: str
    bn: str | None
    pivots: int
    readers: tuple[RecordedReader, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The layer's entry in ``path_bn``."""
        readers = [
            {"bn": r.bn, "rows": encode_runs(r.rows), "channels": encode_runs(r.channels)}
            for r in self.readers
        ]
        return {"name": self.name, "bn": self.bn, "pivots": self.pivots, "readers": readers}

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> RecordedLayer:
        """The inverse of :meth:`to_json`."""
        readers = tuple(
            RecordedReader(r["bn"], decode_runs(r["rows"]), decode_runs(r["channels"]))
            for r in stored["readers"]
        )
        return RecordedLayer(stored["name"], stored["bn"], int(stored["pivots"]), readers)


@dataclass(frozen=True)
class PathBnRecord:
    """What a record says of a network's Path-BN layers.

    Attributes:
        skip_scale: λ.
        layers: the layers in Path-BN form.
        left: name of each other layer → why it did not take the form.
        calibration: where the statistics come from: ``{"source": "images", "images": 8}`` or
            ``{"source": "gaussian"}``.
    """

    skip_scale: float
    layers: tuple[RecordedLayer, ...]
    left: dict[str, str]
    calibration: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The entry ``path_bn``."""
        return {
            "format_version": FORMAT_VERSION,
            "skip_scale": self.skip_scale,
            "layers": [layer.to_json() for layer in self.layers],
            "left": self.left,
            "calibration": self.calibration,
        }

    @staticmethod
    def from_json(stored: Mapping[str, Any], tool: str) -> PathBnRecord:
        """The inverse of :meth:`to_json`; ``tool`` is the pathconvert that wrote it.

        Raises:
            RecordError: it has another format version, or is damaged.
        """
        require_format(
            {"tool": tool, **stored}, FORMAT_VERSION, "the Path-BN record has", RecordError
        )
        try:
            layers = tuple(RecordedLayer.from_json(layer) for layer in stored["layers"])
            skip_scale = float(stored["skip_scale"])
            return PathBnRecord(skip_scale, layers, stored["left"], stored["calibration"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise path_bn_misfit(error) from error


def path_bn_misfit(error: Exception) -> RecordError:
    """The refusal of a Path-BN record that is damaged, or that names what the network lacks."""
    return RecordError(f"the Path-BN record belongs to another network or is damaged: {error}")
