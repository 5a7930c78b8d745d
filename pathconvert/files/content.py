"""The bytes of a file, read once: tensors are views of them, and their SHA-256 is on the way."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import queue
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO, Self, cast

import torch

from pathconvert.errors import CheckpointError
from pathconvert.files.filetypes import BZIP2, GZIP, XZ, unpacked_limit
from pathconvert.files.refusals import AGAIN, reading

_CHUNK = 2**20  # bytes; what is unpacked at a time
_PART = 2**22  # bytes; what is read and hashed at a time


class Content:
    """The bytes of a file, or of a member that was unpacked from one, in memory of torch's.

    Attributes:
        path: the file, for messages.
        size: the number of bytes.
        view: the bytes, without a copy.
        digest: the SHA-256 of a file that was read; None for bytes that were unpacked.
    """

    def __init__(self, path: Path, data: torch.Tensor, digest: Digest | None = None) -> None:
        self.path = path
        self.size = data.numel()
        self.view: memoryview = data.numpy().data
        self._data = data.numpy()
        self.digest = digest
        self._storage = data.untyped_storage()

    @classmethod
    def read(cls, path: Path) -> Content:
        """Read a file. A thread computes the digest of each part while the next one is read.

        Raises:
            CheckpointError: the file cannot be read.
        """
        with reading(path), path.open("rb", buffering=0) as file:
            data = _empty(path, path.stat().st_size)
            view: memoryview = data.numpy().data
            with Digest() as digest:
                position = 0
                while position < len(view):
                    count = file.readinto(view[position : position + _PART])
                    if not count:
                        raise CheckpointError(f"{path} became shorter while it was read.", AGAIN)
                    digest.update(view[position : position + count])
                    position += count
        return cls(path, data, digest)

    @classmethod
    def of(cls, path: Path, data: bytes | bytearray) -> Content:
        """Bytes that were unpacked from the file ``path``."""
        made = _empty(path, len(data))
        if data:
            made.numpy().data[:] = data
        return cls(path, made)

    def part(self, begin: int, end: int) -> Content:
        """The bytes [begin, end) as content of their own, without a copy.

        Raises:
            CheckpointError: they are not all there.
        """
        if not 0 <= begin <= end <= self.size:
            raise CheckpointError(f"{self.path} is truncated: it has {self.size} bytes.", AGAIN)
        return Content(self.path, torch.from_numpy(self._data[begin:end]))

    def storage(self, begin: int, end: int, alignment: int) -> torch.UntypedStorage:
        """The bytes [begin, end) as a storage.

        It is a copy only if its place in memory is not a multiple of ``alignment`` bytes.
        """
        part = cast(torch.UntypedStorage, self._storage[begin:end])
        return part.clone() if part.data_ptr() % alignment else part

    def file(self) -> BinaryIO:
        """The bytes as a file that is open for reading, without a copy of them."""
        return io.BufferedReader(_ViewFile(self.view), _CHUNK)


class Digest:
    """SHA-256, computed in a thread while the next part is read. It is open in a ``with`` block."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._parts: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._parts.put(None)

    def update(self, part: memoryview) -> None:
        """Add a part, which must not change until :meth:`hexdigest` has returned."""
        self._parts.put(part)

    def hexdigest(self) -> str:
        """The digest in hexadecimal, once it is there."""
        self._thread.join()
        return self._hash.hexdigest()

    def _run(self) -> None:
        while (part := self._parts.get()) is not None:
            self._hash.update(part)


class _ViewFile(io.RawIOBase):
    """A file whose content is a memoryview."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._view)}[whence]
        if base + offset < 0:
            raise ValueError("a position before the beginning of the file")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        part = self._view[self._position : self._position + len(buffer)]
        memoryview(buffer)[: len(part)] = part
        self._position += len(part)
        return len(part)


def _empty(path: Path, size: int) -> torch.Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8)
    except RuntimeError as error:  # torch's own error if memory runs out
        raise CheckpointError(
            f"{path} needs {size / 1e9:.1f} GB of memory, more than is there.",
            "Take the weights out of it on a larger machine: torch.save(model.state_dict(),"
            " 'weights.pt').",
        ) from error


# ---- compressed files ----------------------------------------------------------------------------

_COMPRESSED: dict[bytes, Callable[[BinaryIO], Any]] = {
    GZIP: gzip.open,
    BZIP2: bz2.open,
    XZ: lzma.open,
}


def decompress(content: Content) -> Content:
    """What a file by gzip, bzip2 or xz contains.

    Raises:
        CheckpointError: it is damaged, or contains far more than its size suggests.
    """
    head = bytes(content.view[:6])
    opener = next(open_ for magic, open_ in _COMPRESSED.items() if head.startswith(magic))
    try:
        with opener(content.file()) as file:
            data = bounded_read(content, file)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise CheckpointError(
            f"{content.path} is a damaged compressed file: {error}.", AGAIN
        ) from error
    return Content.of(content.path, data)


def bounded_read(content: Content, file: IO[bytes]) -> bytearray:
    """Everything that is unpacked from ``content``, unless it is more than it may be.

    Raises:
        CheckpointError: it is more.
    """
    limit, data = unpacked_limit(content.size), bytearray()
    while part := file.read(_CHUNK):
        data += part
        if len(data) > limit:
            raise CheckpointError(
                f"{content.path} contains more than {limit} bytes in {content.size}, which no"
                " checkpoint does.",
                "Unpack it and give the checkpoint inside.",
            )
    return data
