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
from pathlib import Path
from typing import Any, TypeGuard

from pathconvert.errors import CheckpointError
from pathconvert.files.refusals import AGAIN, quote, reading

_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library itself
_ITEM_BYTES = {  # bytes per element, by safetensors dtype
    **dict.fromkeys(
        ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1
    ),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_FLOAT_TIP = "Give the checkpoint in float32, float16, bfloat16 or float64."


def safetensors_header(path: Path) -> tuple[list[str], dict[str, Any]]:
    """Read the header and check all that it claims.

    Returns:
        The names of the tensors in file order, and the header's ``__metadata__``.

    Raises:
        CheckpointError: the file cannot be read, or its header is malformed or does not fit the
            file.
    """
    size = path.stat().st_size
    with reading(path), path.open("rb") as file:
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
    spans = sorted((*_span(path, name, entry), name) for name, entry in header.items())
    _check_tiling(path, spans, size - 8 - length)
    return [name for _, _, name in spans], metadata if isinstance(metadata, dict) else {}


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


def _span(path: Path, name: str, entry: object) -> tuple[int, int]:
    """The checked byte range [begin, end) of one tensor."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if (
        not _naturals(shape)
        or not _naturals(offsets)
        or len(offsets) != 2
        or not isinstance(dtype, str)
    ):
        raise _broken(path, f"the entry of tensor {quote(name)} is malformed")
    if dtype not in _ITEM_BYTES:
        raise CheckpointError(
            f"{path} contains tensor {quote(name)} of unsupported type {quote(dtype)}.", _FLOAT_TIP
        )
    begin, end = offsets
    needed = math.prod(shape) * _ITEM_BYTES[dtype]
    if end - begin != needed:
        raise _broken(
            path, f"tensor {quote(name)} needs {needed} bytes, but its offsets claim {end - begin}"
        )
    return begin, end


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_tiling(path: Path, spans: list[tuple[int, int, str]], available: int) -> None:
    """Refuse sorted spans ``(begin, end, name)`` that do not tile ``available`` bytes."""
    last = max((end for _, end, _ in spans), default=0)
    if last > available:
        raise _broken(
            path, f"it is truncated: its tensors need {last} bytes, but only {available} are there"
        )
    previous, before = 0, ""
    for begin, end, name in spans:
        if begin < previous:
            raise _broken(path, f"tensors {quote(before)} and {quote(name)} overlap")
        if begin > previous:
            raise _broken(
                path, f"{begin - previous} bytes before tensor {quote(name)} belong to no tensor"
            )
        previous, before = end, name
    if last < available:
        raise _broken(path, f"{available - last} bytes after the last tensor belong to no tensor")
