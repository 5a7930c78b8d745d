"""The header of a safetensors file, read without believing it.

A safetensors file is an 8-byte little-endian length, a JSON header of that length, and the tensors'
bytes::

    {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, "__metadata__": {...}}

The tensors must tile the bytes after the header: they do not overlap, they leave no gap, and
nothing follows them. No length that the header claims is used before it has been compared with the
file's size.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import torch

from pathconvert.errors import CheckpointError
from pathconvert.files.refusals import AGAIN, quote

_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library itself
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_FLOAT_TIP = "Give the checkpoint in float32, float16, bfloat16 or float64."


@dataclass(frozen=True)
class Entry:
    """A tensor in the file: its name, dtype and shape, and its bytes [begin, end) in the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def safetensors_header(path: Path, file: BinaryIO, size: int) -> tuple[list[Entry], dict[str, Any]]:
    """Read the header and check all that it claims.

    Args:
        path: the file, for messages.
        file: its content, open for reading at the beginning.
        size: the number of its bytes.

    Returns:
        The tensors in file order, and the header's ``__metadata__``.

    Raises:
        CheckpointError: the header is malformed or does not fit the file.
    """
    length = int.from_bytes(file.read(8), "little")
    if size < 8:
        raise _broken(path, "it ends within the header's length")
    if length > size - 8:
        raise _broken(path, f"its header claims {length} bytes, but only {size - 8} follow")
    if length > _HEADER_LIMIT:
        raise _broken(
            path,
            f"its header claims {length} bytes, more than the {_HEADER_LIMIT} that are allowed",
        )
    header = _parse_header(path, file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    entries = [_entry(path, name, fields, 8 + length) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end, entry.name))
    _check_tiling(path, entries, 8 + length, size)
    return entries, metadata if isinstance(metadata, dict) else {}


def _broken(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is not an intact safetensors file: {reason}.", AGAIN)


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    repeated: list[str] = []

    def note_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            repeated.extend(
                name for name, count in Counter(name for name, _ in pairs).items() if count > 1
            )
        return dict(pairs)

    try:
        header = json.loads(text.decode(), object_pairs_hook=note_repeated)
    except (ValueError, RecursionError):
        raise _broken(path, "its header is not JSON") from None
    if repeated:
        raise _broken(path, f"its header has the key {quote(repeated[0])} twice")
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a JSON object")
    return header


def _entry(path: Path, name: str, entry: object, start: int) -> Entry:
    """One tensor, checked; the offsets in the header count from ``start``."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if (
        not _naturals(shape)
        or not _naturals(offsets)
        or len(offsets) != 2
        or not isinstance(dtype, str)
    ):
        raise _broken(path, f"the entry of tensor {quote(name)} is malformed")
    if dtype not in _DTYPES:
        raise CheckpointError(
            f"{path} contains tensor {quote(name)} of unsupported type {quote(dtype)}.", _FLOAT_TIP
        )
    begin, end = offsets
    needed = math.prod(shape) * _DTYPES[dtype].itemsize
    if end - begin != needed:
        raise _broken(
            path, f"tensor {quote(name)} needs {needed} bytes, but its offsets claim {end - begin}"
        )
    return Entry(name, _DTYPES[dtype], tuple(shape), start + begin, start + end)


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_tiling(path: Path, entries: list[Entry], start: int, size: int) -> None:
    """Refuse sorted tensors that do not tile the bytes from ``start`` to the file's end."""
    last = max((entry.end for entry in entries), default=start)
    if last > size:
        raise _broken(
            path,
            f"it is truncated: its tensors need {last - start} bytes, but only {size - start} are"
            " there",
        )
    previous, before = start, ""
    for entry in entries:
        if entry.begin < previous:
            raise _broken(path, f"tensors {quote(before)} and {quote(entry.name)} overlap")
        if entry.begin > previous:
            raise _broken(
                path,
                f"{entry.begin - previous} bytes before tensor {quote(entry.name)} belong to no"
                " tensor",
            )
        previous, before = entry.end, entry.name
    if last < size:
        raise _broken(path, f"{size - last} bytes after the last tensor belong to no tensor")
