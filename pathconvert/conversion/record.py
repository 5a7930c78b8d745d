"""The conversion record: a versioned, JSON-serialisable description from which a conversion is undone without a trace.

``scales`` holds one factor a unit. ``tensors`` says for every parameter which units its rows and columns belong to, as
*runs* ``[first unit, length, repeat]``: ``length`` consecutive units from ``first unit`` on, each ``repeat`` times
(a flatten repeats one channel H·W times); first unit -1 stands for factor 1. ``row_ends`` gives, as runs too, the units
that a layer's rows end in, where a BatchNorm comes between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import nn

from pathconvert.conversion.groups import FIXED
from pathconvert.conversion.pivots import FloatVector
from pathconvert.conversion.trace import IdVector, Slot
from pathconvert.errors import RecordError
from pathconvert.version import __version__

if TYPE_CHECKING:
    pass

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
    """The network itself, without the wrappers of ``torch.compile`` and of data parallel training around it."""
    while True:
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def attach_record(model: nn.Module, record: dict[str, Any]) -> None:
    """Let ``model`` carry the record of the conversion that it went through."""
    vars(model)["path_record"] = record


def form_of(model: nn.Module) -> Form:
    """``plain`` without a record, else what the record says: ``path`` or ``path-bn``."""
    record = getattr(unwrapped(model), "path_record", None)
    return "plain" if record is None else record["form"]


def record_of(model: nn.Module) -> dict[str, Any]:
    """The record that ``model`` carries; in Path-BN form with ``path_bn`` on top.

    Raises:
        RecordError: it has none.
    """
    record = getattr(model, "path_record", None)
    if not isinstance(record, dict):
        raise RecordError(
            f"this {type(model).__name__} holds no conversion record",
            "Give the module that reparameterize, to_path_bn or load made, without a wrapper such as "
            "DistributedDataParallel around it.",
        )
    return record


def encode_slot(slot: Slot) -> dict[str, Any]:
    encoded: dict[str, Any] = {"rows": encode_runs(slot.rows)}
    if slot.columns is not None:
        encoded |= {"columns": encode_runs(slot.columns), "groups": slot.groups, "transposed": slot.transposed}
    return encoded


def read_record(record: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[Slot], FloatVector]:
    """A record's slots and factors, checked against the tensors they are for.

    Args:
        record: as :func:`make_record` made it.
        shapes: shape of every parameter and buffer of the network, by name.

    Raises:
        RecordError: another format version, damaged, or not of this network.
    """
    version = record.get("format_version")
    if version != FORMAT_VERSION:
        raise RecordError(
            f"the conversion record has format version {version}; this is pathconvert {__version__}, which reads "
            f"version {FORMAT_VERSION}",
            "install the pathconvert that wrote it: " + str(record.get("tool", "unknown")),
        )
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
    columns = decode_runs(encoded["columns"]) if "columns" in encoded else None
    return Slot(name, decode_runs(encoded["rows"]), columns, encoded.get("groups", 1), encoded.get("transposed", False))


def _check_slot(slot: Slot, shapes: Mapping[str, tuple[int, ...]], unit_count: int) -> None:
    if slot.parameter not in shapes:
        raise RecordError(
            f"the conversion record is not of this network: it has no tensor {slot.parameter}",
            "give the converted file itself, not another network's",
        )
    shape = shapes[slot.parameter]
    if slot.columns is None:
        expected, found = math.prod(shape), len(slot.rows)
    else:
        expected, found = math.prod(shape[:2]) * slot.groups, len(slot.rows) * len(slot.columns)
    if expected != found:
        raise RecordError(
            f"the conversion record does not fit the tensor {slot.parameter} of shape {list(shape)}",
            "the tensors were changed after the conversion; only files that kept their shapes can be restored",
        )
    for vector in (slot.rows, slot.columns):
        if vector is not None and len(vector) and not (vector.min() >= FIXED and vector.max() < unit_count):
            raise RecordError(f"the conversion record is damaged: {slot.parameter} names a channel that it lacks")
