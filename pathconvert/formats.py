"""Versions of the formats that people keep: records, metadata, checkpoints of runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pathconvert.errors import PathconvertError
from pathconvert.version import __version__


def require_format(
    stored: Mapping[str, Any],
    known: int | tuple[int, ...],
    what: str,
    error: type[PathconvertError],
) -> None:
    """Refuse what has another format version than this pathconvert reads and writes.

    Args:
        stored: holds ``format_version``, and ``tool``, the pathconvert that wrote it.
        known: the version that this pathconvert reads, or all of them.
        what: what has the version, with its verb: ``the conversion record has``.
        error: what is raised.

    Raises:
        PathconvertError: of the type ``error``; the version is not among them.
    """
    version = stored.get("format_version")
    versions = known if isinstance(known, tuple) else (known,)
    if version not in versions:
        raise error(
            f"{what} format version {version}; this is pathconvert {__version__}, which reads"
            f" version {' or '.join(map(str, versions))}",
            f"Use the version of pathconvert that wrote it: {stored.get('tool', 'unknown')}.",
        )
