"""The conversion record: a versioned description from which a conversion is undone without a trace.

Files, and the ``path_record`` of a network, hold it as JSON; the code reads that once into a
:class:`Record`. The JSON object holds ``format_version`` and the fields of :class:`Record`; slots
are named ``tensors`` there, and vectors of units are runs (``runs.py``). ``path_bn`` is there in
Path-BN form only, and has a format version of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pathconvert.choices import ConvertedForm, Form
from pathconvert.conversion.groups import FIXED
from pathconvert.conversion.modules import unwrapped
from pathconvert.conversion.path_bn_record import PathBnRecord
from pathconvert.conversion.runs import decode_runs, encode_runs
from pathconvert.conversion.tracing.trace import FloatVector, IdVector, Slot, Statistic
from pathconvert.errors import RecordError
from pathconvert.formats import require_format
from pathconvert.version import __version__

#: Version 2 has statistics among its tensors, which a reader of version 1 would rescale wrongly. A
#: record without any is written as version 1, so that older versions of pathconvert read it.
FORMAT_VERSION = 2

# ---- the record ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecordedGroup:
    """A scale group: its name, size and producers, and why it is not scaled (None if it is)."""

    name: str
    size: int
    pinned_by: str | None
    producers: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class RecordedPivots:
    """The place of every unit's pivot; all vectors are [units].

    Attributes:
        parameters: names of the weights of all layers.
        layer: index of the pivot's weight in ``parameters``; -1 if the unit has no pivot.
        row, column: the pivot's place in that weight.
        negative: whether the pivot is negative.
        next_unit: the unit that the pivot's row ends in, ``FIXED`` if its factor is 1; None in
            files from before chains were recorded.
        magnitude: |a| of the pivot after the conversion; None if it is 1, or λ in Path-BN form,
            for all units with a pivot: in the gauge ``unit`` without recentring.
    """

    parameters: tuple[str, ...]
    layer: IdVector
    row: IdVector
    column: IdVector
    negative: NDArray[np.bool_]
    next_unit: IdVector | None
    magnitude: FloatVector | None

    def to_json(self) -> dict[str, Any]:
        """The entry ``pivots``."""
        stored: dict[str, Any] = {
            "parameters": list(self.parameters),
            "layer": self.layer.tolist(),
            "row": self.row.tolist(),
            "column": self.column.tolist(),
            "negative": self.negative.astype(int).tolist(),
        }
        for name in ("next_unit", "magnitude"):
            vector = getattr(self, name)
            stored |= {} if vector is None else {name: vector.tolist()}
        return stored

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> RecordedPivots:
        """The inverse of :meth:`to_json`."""
        magnitude = stored.get("magnitude")
        return RecordedPivots(
            parameters=tuple(stored["parameters"]),
            layer=_ids(stored["layer"]),
            row=_ids(stored["row"]),
            column=_ids(stored["column"]),
            negative=np.asarray(stored["negative"], dtype=bool),
            next_unit=_ids(stored["next_unit"]) if "next_unit" in stored else None,
            magnitude=None if magnitude is None else np.asarray(magnitude, dtype=np.float64),
        )


@dataclass(frozen=True, eq=False)
class Record:
    """Everything that is known of a conversion without its network (see the module's docstring).

    Attributes:
        form: ``path`` or ``path-bn``.
        scope, pivot, gauge: the choices of the conversion.
        parts: the modules that were converted; ``("",)`` for the whole network.
        groups: all scale groups.
        scales: one factor per unit, float64 [units].
        pivots: where every unit's pivot is.
        held_back: the units that are held back, [n].
        slots: how every parameter is indexed by units.
        row_ends: weight → the unit that each of its rows ends in, [rows], for layers with a
            BatchNorm in between.
        near_dead: the near-dead units, [n]; empty in files from before they were recorded.
        circular: the units that were left alone because their pivots run in a circle, [n]; empty in
            files from before they were recorded.
        path_bn: the Path-BN layers; None in path form.
        tool: the pathconvert that wrote it.
    """

    form: ConvertedForm
    scope: str
    pivot: str
    gauge: str
    parts: tuple[str, ...]
    groups: tuple[RecordedGroup, ...]
    scales: FloatVector
    pivots: RecordedPivots
    held_back: IdVector
    slots: tuple[Slot, ...]
    row_ends: dict[str, IdVector]
    near_dead: IdVector
    circular: IdVector
    path_bn: PathBnRecord | None = None
    tool: str = f"pathconvert {__version__}"

    @property
    def choices(self) -> dict[str, str]:
        """Scope, pivot rule and gauge, by the names of the arguments of ``reparameterize``."""
        return {"scope": self.scope, "pivot": self.pivot, "gauge": self.gauge}

    def chosen_scales(self) -> FloatVector:
        """The factors of the units that have a pivot and are not held back, [n]."""
        has_pivot = self.pivots.layer >= 0
        has_pivot[self.held_back] = False
        return self.scales[has_pivot]

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object."""
        stored: dict[str, Any] = {
            "format_version": FORMAT_VERSION if any(s.statistic for s in self.slots) else 1,
            "tool": self.tool,
            "form": self.form,
            **self.choices,
            "parts": list(self.parts),
            "groups": [
                {
                    "name": group.name,
                    "size": group.size,
                    "pinned_by": group.pinned_by,
                    "producers": list(group.producers),
                }
                for group in self.groups
            ],
            "scales": self.scales.tolist(),
            "pivots": self.pivots.to_json(),
            "held_back": self.held_back.tolist(),
            "near_dead": self.near_dead.tolist(),
            "circular": self.circular.tolist(),
            "tensors": {slot.parameter: _encode_slot(slot) for slot in self.slots},
            "row_ends": {name: encode_runs(ends) for name, ends in self.row_ends.items()},
        }
        return stored | ({} if self.path_bn is None else {"path_bn": self.path_bn.to_json()})

    @staticmethod
    def read(record: Record | Mapping[str, Any]) -> Record:
        """A record as it is, or read from JSON (:meth:`from_json`)."""
        return record if isinstance(record, Record) else Record.from_json(record)

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> Record:
        """Read a record from JSON.

        Raises:
            RecordError: it has another format version, or is damaged.
        """
        require_format(stored, (1, FORMAT_VERSION), "the conversion record has", RecordError)
        try:
            record = _read(stored)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise RecordError(
                f"the conversion record is damaged: {type(error).__name__}: {error}"
            ) from error
        scales = record.scales
        if scales.ndim != 1 or not (np.isfinite(scales).all() and (scales > 0).all()):
            raise RecordError("the conversion record is damaged: a factor is not a positive number")
        return record

    def require_fit(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that the record fits a network's tensors.

        Args:
            shapes: shape of every parameter and buffer of the network, by name.

        Raises:
            RecordError: the record is damaged, or belongs to another network.
        """
        for slot in self.slots:
            _check_slot(slot, shapes, len(self.scales))


def _read(stored: Mapping[str, Any]) -> Record:
    """The record in a JSON object; any of Python's own errors means that it is damaged."""
    scales = np.asarray(stored["scales"], dtype=np.float64)
    slots = tuple(_decode_slot(name, encoded) for name, encoded in stored["tensors"].items())
    if stored["form"] not in get_args(ConvertedForm):
        raise ValueError(f"there is no form {stored['form']!r}")
    tool = str(stored.get("tool", "unknown"))
    path_bn = stored.get("path_bn")
    return Record(
        form=stored["form"],
        scope=stored["scope"],
        pivot=stored["pivot"],
        gauge=stored["gauge"],
        parts=tuple(stored["parts"]),
        groups=tuple(
            RecordedGroup(g["name"], g["size"], g["pinned_by"], tuple(g["producers"]))
            for g in stored["groups"]
        ),
        scales=scales,
        pivots=RecordedPivots.from_json(stored["pivots"]),
        held_back=_ids(stored.get("held_back", [])),
        near_dead=_ids(stored.get("near_dead", [])),
        circular=_ids(stored.get("circular", [])),
        slots=slots,
        row_ends={name: decode_runs(runs) for name, runs in stored.get("row_ends", {}).items()},
        path_bn=None if path_bn is None else PathBnRecord.from_json(path_bn, tool),
        tool=tool,
    )


def _ids(values: Any) -> IdVector:
    return np.asarray(values, dtype=np.int64)


def _encode_slot(slot: Slot) -> dict[str, Any]:
    """The entry of a slot in the record's ``tensors``."""
    encoded: dict[str, Any] = {"rows": encode_runs(slot.rows)}
    if slot.statistic is not None:
        encoded |= {"statistic": slot.statistic}
    if slot.statistic == "variance":
        encoded |= {"eps": slot.eps}
    if slot.columns is not None:
        encoded |= {
            "columns": encode_runs(slot.columns),
            "groups": slot.groups,
            "transposed": slot.transposed,
        }
    return encoded


def _decode_slot(name: str, encoded: Mapping[str, Any]) -> Slot:
    """The inverse of :func:`_encode_slot`."""
    return Slot(
        name,
        decode_runs(encoded["rows"]),
        decode_runs(encoded["columns"]) if "columns" in encoded else None,
        encoded.get("groups", 1),
        encoded.get("transposed", False),
        _statistic(encoded.get("statistic")),
        float(encoded.get("eps", 0.0)),
    )


def _statistic(stored: Any) -> Statistic | None:
    """The stored name of a statistic; raises ValueError for one that does not exist."""
    if stored is not None and stored not in get_args(Statistic):
        raise ValueError(f"there is no statistic {stored!r}")
    return cast("Statistic | None", stored)


def _check_slot(slot: Slot, shapes: Mapping[str, tuple[int, ...]], unit_count: int) -> None:
    """Raise a RecordError if a slot does not fit the tensor that it names."""
    if slot.parameter not in shapes:
        raise RecordError(
            "the conversion record belongs to another network: "
            f"this one has no tensor {slot.parameter}",
            "Give the converted file that belongs to this record.",
        )
    shape = shapes[slot.parameter]
    if slot.columns is None:
        expected, found = math.prod(shape), len(slot.rows)
    else:
        expected = math.prod(shape[:2]) * slot.groups
        found = len(slot.rows) * len(slot.columns)
    if expected != found:
        raise RecordError(
            f"the conversion record does not fit the tensor {slot.parameter} of shape "
            f"{list(shape)}",
            "The tensor was changed after the conversion; only files whose tensors kept their "
            "shapes can be restored.",
        )
    for vector in (slot.rows, slot.columns):
        if vector is None or not len(vector):
            continue
        if vector.min() < FIXED or vector.max() >= unit_count:
            raise RecordError(
                f"the conversion record is damaged: the entry of {slot.parameter} names a channel "
                "that does not exist"
            )


# ---- networks and their records ------------------------------------------------------------------


def attach_record(model: nn.Module, record: Record) -> None:
    """Attach the record of its conversion to ``model``, as its attribute ``path_record``."""
    vars(model)["path_record"] = record.to_json()


def form_of(model: nn.Module) -> Form:
    """``plain`` if the model has no record, else the record's form: ``path`` or ``path-bn``."""
    stored = getattr(unwrapped(model), "path_record", None)
    return "plain" if stored is None else cast(Form, stored["form"])


def record_of(model: nn.Module) -> Record:
    """The record that is attached to ``model``.

    Raises:
        RecordError: no record is attached to the model, or it is damaged.
    """
    stored = getattr(model, "path_record", None)
    if not isinstance(stored, dict):
        raise RecordError(
            f"this {type(model).__name__} holds no conversion record",
            "Give the module that reparameterize, to_path_bn or load returned, without a wrapper "
            "such as DistributedDataParallel.",
        )
    return Record.from_json(stored)
