"""The conversion record: a versioned, JSON-serialisable description from which a conversion is undone without a trace.

``scales`` holds one factor per unit. ``tensors`` says for every parameter which units its rows and columns belong to,
as *runs* ``[first unit, length, repeat]``: ``length`` consecutive units from ``first unit`` on, each ``repeat`` times
(a flatten repeats one channel H·W times); first unit -1 stands for factor 1. ``row_ends`` gives, also as runs, the
units that the rows of a layer end in, for layers with a BatchNorm in between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from torch import nn

from pathconvert.conversion.groups import FIXED
from pathconvert.conversion.pivots import FloatVector
from pathconvert.conversion.trace import IdVector, Slot
from pathconvert.errors import RecordError
from pathconvert.formats import require_format

FORMAT_VERSION = 1
Form = Literal["plain", "path", "path-bn"]

Run = list[int]


def encode_runs(units: IdVector) -> list[Run]:
    """``units`` [n] as runs (see the module's docstring)."""
    if not len(units):
        return []
    edges = np.flatnonzero(np.r_[True, units[1:] != units[:-1]])
    values, repeats = units[edges], np.diff(np.r_[edges, len(units)])
    follows = (values[1:] == values[:-1] + 1) & (repeats[1:] == repeats[:-1]) & (values[:-1] != FIXED)
    starts = np.flatnonzero(np.r_[True, ~follows])
    lengths = np.diff(np.r_[starts, len(values)])
    return [[int(values[s]), int(n), int(repeats[s])] for s, n in zip(starts, lengths, strict=True)]


def decode_runs(runs: list[Run]) -> IdVector:
    """The inverse of :func:`encode_runs`."""
    pieces = [np.repeat(np.arange(first, first + length), repeat) for first, length, repeat in runs]
    return np.concatenate([np.zeros(0, dtype=np.int64), *pieces])


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside the wrappers of ``torch.compile`` and of data parallel training, if it has any."""
    while True:
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def attach_record(model: nn.Module, record: dict[str, Any]) -> None:
    """Attach the record of its conversion to ``model``."""
    vars(model)["path_record"] = record


def form_of(model: nn.Module) -> Form:
    """``plain`` if the model has no record, else the form in its record: ``path`` or ``path-bn``."""
    record = getattr(unwrapped(model), "path_record", None)
    return "plain" if record is None else record["form"]


def record_of(model: nn.Module) -> dict[str, Any]:
    """The record that is attached to ``model``; in Path-BN form it has the additional entry ``path_bn``.

    Raises:
        RecordError: no record is attached to the model.
    """
    record = getattr(model, "path_record", None)
    if not isinstance(record, dict):
        raise RecordError(
            f"this {type(model).__name__} holds no conversion record",
            "Give the module that reparameterize, to_path_bn or load returned, without a wrapper such as "
            "DistributedDataParallel.",
        )
    return record


def encode_slot(slot: Slot) -> dict[str, Any]:
    """The entry of a slot in the record's ``tensors``."""
    encoded: dict[str, Any] = {"rows": encode_runs(slot.rows)}
    if slot.columns is not None:
        encoded |= {"columns": encode_runs(slot.columns), "groups": slot.groups, "transposed": slot.transposed}
    return encoded


def read_record(record: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[Slot], FloatVector]:
    """Read the slots and factors of a record, and check that they fit the network's tensors.

    Args:
        record: a record as made by :func:`~pathconvert.conversion.reparameterize.make_record`.
        shapes: shape of every parameter and buffer of the network, by name.

    Returns:
        The slots, with rows and columns as units; and the factors, float64 [units].

    Raises:
        RecordError: the record has another format version, is damaged, or belongs to another network.
    """
    require_format(record, FORMAT_VERSION, "the conversion record has", RecordError)
    try:
        scales = np.asarray(record["scales"], dtype=np.float64)
        slots = [_decode_slot(name, encoded) for name, encoded in record["tensors"].items()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordError(f"the conversion record is damaged: {type(error).__name__}: {error}") from error
    if scales.ndim != 1 or not (np.isfinite(scales).all() and (scales > 0).all()):
        raise RecordError("the conversion record is damaged: a factor is not a positive number")
    for slot in slots:
        _check_slot(slot, shapes, len(scales))
    return slots, scales


def _decode_slot(name: str, encoded: Mapping[str, Any]) -> Slot:
    """The inverse of :func:`encode_slot`."""
    columns = decode_runs(encoded["columns"]) if "columns" in encoded else None
    return Slot(name, decode_runs(encoded["rows"]), columns, encoded.get("groups", 1), encoded.get("transposed", False))


def _check_slot(slot: Slot, shapes: Mapping[str, tuple[int, ...]], unit_count: int) -> None:
    """Raise a RecordError if a slot does not fit the tensor that it names."""
    if slot.parameter not in shapes:
        raise RecordError(
            f"the conversion record belongs to another network: this one has no tensor {slot.parameter}",
            "Give the converted file that belongs to this record.",
        )
    shape = shapes[slot.parameter]
    if slot.columns is None:
        expected, found = math.prod(shape), len(slot.rows)
    else:
        expected, found = math.prod(shape[:2]) * slot.groups, len(slot.rows) * len(slot.columns)
    if expected != found:
        raise RecordError(
            f"the conversion record does not fit the tensor {slot.parameter} of shape {list(shape)}",
            "The tensor was changed after the conversion; only files whose tensors kept their shapes can be restored.",
        )
    for vector in (slot.rows, slot.columns):
        if vector is not None and len(vector) and not (vector.min() >= FIXED and vector.max() < unit_count):
            place = f"the entry of {slot.parameter}"
            raise RecordError(f"the conversion record is damaged: {place} names a channel that does not exist")
