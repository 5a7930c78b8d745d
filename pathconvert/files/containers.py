"""From a file to what is in it, through the containers that it may be wrapped in."""

import json
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate
from pathlib import Path
from typing import Any

from pathconvert.errors import CheckpointError
from pathconvert.files.content import Content, bounded_read, decompress
from pathconvert.files.filetypes import Kind, checkpoints_among, kind_of, recognise
from pathconvert.files.refusals import AGAIN, quote, reading, reason
from pathconvert.files.safetensors_header import safetensors_header
from pathconvert.files.tensors import typed_storage, view
from pathconvert.files.torch_files import read_torch

_DEEPEST = 3  # containers within one another: a zip file in a gz file is the deepest in use
_LARGEST_CONFIG = 10_000_000  # bytes
#: Names that Hugging Face and timm give to the file beside ``config.json``.
_BESIDE_CONFIG = ("model.safetensors", "pytorch_model.bin")


class Container(StrEnum):
    """How a checkpoint stores its tensors."""

    ZIP = "zip"
    LEGACY = "legacy"
    TAR = "tar"
    PICKLE = "pickle"
    SAFETENSORS = "safetensors"
    SHARDED_SAFETENSORS = "sharded-safetensors"
    SHARDED_TORCH = "sharded-torch"
    DISTRIBUTED = "distributed"


@dataclass(frozen=True, eq=False)
class Loaded:
    """What is in a file.

    Attributes:
        path: the file.
        value: dictionaries, lists, tensors, numbers and objects.
        container: how the tensors are stored.
        size: the bytes in memory that the tensors are views of.
        digest: gives the SHA-256 of the file in hexadecimal.
        metadata: the text under ``pathconvert`` in a safetensors header.
        config: ``config.json`` beside the file.
    """

    path: Path
    value: object = field(repr=False)
    container: Container
    size: int
    digest: Callable[[], str]
    metadata: object = None
    config: dict[str, Any] | None = None


def load_file(path: Path) -> Loaded:
    """Read one file, recognised by its content.

    Raises:
        CheckpointError: it is not a checkpoint, is damaged, or is the index of several files.
    """
    kind = recognise(path)
    if kind is Kind.INDEX:
        raise CheckpointError(
            f"{path} is the index of a checkpoint in several files, not one of them.", AGAIN
        )
    if kind is Kind.SAFETENSORS:  # a header that lies is refused before the rest is read
        with reading(path), path.open("rb") as file:
            safetensors_header(path, file, path.stat().st_size)
    content = Content.read(path)
    digest = content.digest
    value, kind, metadata = _unwrapped(content, kind)
    return Loaded(
        path=path,
        value=value,
        container=Container[kind.name],
        size=content.size,
        digest=digest.hexdigest if digest else str,
        metadata=metadata,
        config=read_config(path.parent) if path.name in _BESIDE_CONFIG else None,
    )


def _unwrapped(content: Content, kind: Kind) -> tuple[object, Kind, object]:
    """What is in a file: the value, the kind of its innermost container, and its metadata."""
    for _ in range(_DEEPEST):
        if kind is Kind.SAFETENSORS:
            value, metadata = _load_safetensors(content)
            return value, kind, metadata
        if kind is Kind.COMPRESSED:
            content = decompress(content)
        elif kind is Kind.ARCHIVE:
            content = _only_member(content)
        else:
            return read_torch(content, kind), kind, None
        kind = kind_of(content.path, content.file(), content.size)
    raise CheckpointError(
        f"{content.path} has too many containers within one another.",
        "Unpack it and give the checkpoint inside.",
    )


def _only_member(content: Content) -> Content:
    """The one checkpoint in a zip archive."""
    try:
        with zipfile.ZipFile(content.file()) as archive:
            (name,) = checkpoints_among(archive.namelist())
            with archive.open(name) as file:
                return Content.of(content.path, bounded_read(content, file))
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, RuntimeError, EOFError,
            NotImplementedError) as error:  # fmt: skip
        raise CheckpointError(
            f"{content.path} is a damaged zip archive: {reason(error)}.", AGAIN
        ) from error


def _load_safetensors(content: Content) -> tuple[dict[str, object], object]:
    """The tensors in a safetensors file.

    Returns:
        The tensors by name, and the text under ``pathconvert`` in the header (None without one).

    Raises:
        CheckpointError: it is damaged.
    """
    entries, metadata = safetensors_header(content.path, content.file(), content.size)
    tensors: dict[str, object] = {}
    for entry in entries:
        storage = content.storage(entry.begin, entry.end, entry.dtype.itemsize)
        sizes = accumulate((1, *entry.shape[:0:-1]), lambda step, side: step * side)
        stride = list(sizes)[: len(entry.shape)][::-1]
        tensors[entry.name] = view(typed_storage(storage, entry.dtype), 0, entry.shape, stride)
    return tensors, metadata.get("pathconvert")


def read_config(folder: Path) -> dict[str, Any] | None:
    """``config.json`` in a folder, if it describes a network; else None.

    Many programs keep a file of this name, so that one which does not is not an error.
    """
    path = folder / "config.json"
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            return None
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    known = ("architecture", "architectures", "model_type", "arch")
    return config if isinstance(config, dict) and any(name in config for name in known) else None


def check_name(path: Path, name: object) -> str:
    """The name of a file that another one refers to, which has to lie beside it.

    Raises:
        CheckpointError: it does not.
    """
    if not isinstance(name, str) or not name or name in (".", "..") or {*"/\\\0"} & {*name}:
        raise CheckpointError(
            f"{path} refers to {quote(name)}, which is not a file beside it.", AGAIN
        )
    return name
