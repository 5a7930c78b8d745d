"""What ``torch.save`` has written, in any of its three formats, and plain pickles.

zip
    since torch 1.6: ``NAME/data.pkl``, a pickle, ``NAME/data/0`` and so on, the storages that it
    refers to by persistent id, and ``NAME/byteorder``.
legacy
    before: four pickles (a magic number, the protocol, the system, the object), a pickle of the
    storages' keys, and for each of them its number of elements and its bytes.
tar
    before torch 0.1.10: the members ``storages``, ``tensors`` and ``pickle``; the pickle refers to
    tensors by persistent id.
"""

import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import torch

from pathconvert.errors import CheckpointError
from pathconvert.files.content import Content, bounded_read
from pathconvert.files.filetypes import TORCH_MAGIC, Kind, unpacked_limit
from pathconvert.files.refusals import AGAIN, reason
from pathconvert.files.tensors import ALLOWED, Storage, storage_dtype, typed_storage, view
from pathconvert.files.unpickling import (
    STANDARD,
    Constructor,
    Memory,
    Object,
    Unpickler,
    UnpicklingRefused,
)

_PROTOCOL = 1001  # of the legacy format
_STORED = zipfile.ZIP_STORED


def read_torch(content: Content, kind: Kind) -> object:
    """Read what is in a torch file or a pickle, without executing anything.

    Returns:
        Dictionaries, lists, tensors and numbers; anything else is an ``Object``.

    Raises:
        CheckpointError: it is damaged, or asks for more than it may.
    """
    readers: dict[Kind, Callable[[Content], object]] = {
        Kind.ZIP: _read_zip,
        Kind.LEGACY: _read_legacy,
        Kind.TAR: _read_tar,
        Kind.PICKLE: _read_pickle,
    }
    try:
        return readers[kind](content)
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes lead to any error: KeyError, struct.error, …
        what = "pickle" if kind is Kind.PICKLE else "torch.save file"
        raise CheckpointError(
            f"{content.path} is a damaged {what}: {reason(error)}.", AGAIN
        ) from error


def _unpickle(
    content: Content, memory: Memory, persistent: Callable[[Any], object] | None = None
) -> object:
    """One pickle, with tensors made."""
    return Unpickler(memory, {**ALLOWED, **_nested(content)}, persistent).load()


def _nested(content: Content) -> dict[str, Constructor]:
    """The constructor of a storage that was pickled without ``torch.save``.

    Such a storage is a whole legacy file within the pickle. Each is read once, whatever the number
    of references to it.
    """
    known: dict[int, tuple[object, object]] = {}

    def load(data: object) -> object:
        if id(data) not in known:
            if not isinstance(data, bytes) or TORCH_MAGIC not in data[:32]:
                raise UnpicklingRefused("a storage is not in torch's format")
            inner = _read_legacy(Content.of(content.path, data), nested=True)
            if not isinstance(inner, Storage):
                raise UnpicklingRefused("a storage contains something else")
            known[id(data)] = data, inner
        return known[id(data)][1]

    return {"torch.storage._load_from_bytes": load}


def _read_pickle(content: Content) -> object:
    return _unpickle(content, Memory(content.view))


# ---- zip -----------------------------------------------------------------------------------------


class _Archive:
    """The members of a zip archive by ``torch.save``, under their names in its folder."""

    def __init__(self, content: Content) -> None:
        self.content = content
        self.archive = zipfile.ZipFile(content.file())
        members = self.archive.infolist()
        if sum(member.file_size for member in members) > unpacked_limit(content.size):
            raise UnpicklingRefused("its members claim more bytes than it can contain")
        pickles = [m.filename for m in members if m.filename.rpartition("/")[2] == "data.pkl"]
        folder = min(pickles, key=len).removesuffix("data.pkl")
        self.members = {
            m.filename.removeprefix(folder): m for m in members if m.filename.startswith(folder)
        }

    def span(self, name: str) -> tuple[int, int]:
        """Where a member that is not compressed lies in the file: its begin and its end.

        Raises:
            UnpicklingRefused: it ends behind the end of the file.
        """
        member = self.members[name]
        begin = member.header_offset
        lengths = struct.unpack("<HH", self.content.view[begin + 26 : begin + 30])
        begin += 30 + sum(lengths)
        if begin + member.file_size > self.content.size:
            raise UnpicklingRefused(f"{name} ends behind the end of the file")
        return begin, begin + member.file_size

    def read(self, name: str) -> memoryview:
        """The bytes of a member. Its checksum is not looked at: torch does not do that either."""
        if self.members[name].compress_type == _STORED:
            begin, end = self.span(name)
            return self.content.view[begin:end]
        with self.archive.open(self.members[name]) as file:
            return memoryview(bounded_read(self.content, file))

    def storage(self, name: str, alignment: int) -> torch.UntypedStorage:
        """The bytes of a member as a storage."""
        if self.members[name].compress_type == _STORED:
            return self.content.storage(*self.span(name), alignment)
        data = Content.of(self.content.path, bytearray(self.read(name)))
        return data.storage(0, data.size, alignment)


def _read_zip(content: Content) -> object:
    archive = _Archive(content)
    order = bytes(archive.read("byteorder")) if "byteorder" in archive.members else b"little"
    loaded: dict[str, torch.UntypedStorage] = {}

    def persistent(pid: Any) -> object:
        try:
            what, kind, key, _, count = _fields(pid, 5)
            dtype, name = storage_dtype(kind), f"data/{key}"
            if what != "storage" or type(key) is not str or type(count) is not int:
                raise UnpicklingRefused("it is a tensor with an unknown storage")
            if name not in archive.members:
                raise UnpicklingRefused(f"its storage {name} is missing")
            size = archive.members[name].file_size
            if size != count * dtype.itemsize:
                raise UnpicklingRefused(
                    f"its storage {name} has {size} bytes, expected {count * dtype.itemsize}"
                )
            if key not in loaded:
                loaded[key] = archive.storage(name, dtype.itemsize)
                if order == b"big":
                    loaded[key] = loaded[key].clone()
                    loaded[key].byteswap(dtype)
        except (UnpicklingRefused, TypeError, ValueError, zlib.error) as error:
            return Object("storage", flaw=str(error))
        return typed_storage(loaded[key], dtype)

    return _unpickle(content, Memory(archive.read("data.pkl")), persistent)


# ---- legacy --------------------------------------------------------------------------------------


def _read_legacy(content: Content, *, nested: bool = False) -> object:
    """The object in a legacy file.

    Its tensors come before the storages, so its pickle runs twice: once to learn which storages
    there are, and once more with them.
    """
    memory = Memory(content.view)
    Unpickler(memory).load()  # the magic number, by which the file was recognised
    if Unpickler(memory).load() != _PROTOCOL:
        raise UnpicklingRefused("it has an unknown protocol number")
    Unpickler(memory).load()  # the system that it was written on
    start = memory.position
    dtypes: dict[str, torch.dtype] = {}

    def learn(pid: Any) -> object:
        what, kind, key, *_ = pid if isinstance(pid, tuple) else (None, None, None)
        if what == "storage":
            dtypes.setdefault(str(key), storage_dtype(kind))
        return None

    Unpickler(memory, {}, learn).load()
    storages = {}
    for key in _listed(Unpickler(memory).load()):
        (count,) = struct.unpack("<q", memory.read(8))
        storages[str(key)] = _raw_storage(content, memory, count, dtypes[str(key)])

    def persistent(pid: Any) -> object:
        if isinstance(pid, tuple) and pid[:1] == ("module",):  # a class and its source text
            return pid[1]
        _, kind, key, _, count, part = _fields(pid, 6)
        return _part_of(storages[str(key)], storage_dtype(kind), count, part)

    memory = Memory(content.view, start)
    if nested:  # no deeper: what is nested is one storage
        return Unpickler(memory, STANDARD, persistent).load()
    return _unpickle(content, memory, persistent)


def _listed(keys: object) -> list[object]:
    if not isinstance(keys, list):
        raise UnpicklingRefused("it has no list of storages")
    return keys


def _raw_storage(
    content: Content, memory: Memory, count: int, dtype: torch.dtype
) -> torch.UntypedStorage:
    """The storage of ``count`` elements at a position in the file."""
    begin, end = memory.position, memory.position + count * dtype.itemsize
    if not begin <= end <= content.size:
        raise UnpicklingRefused("it ends within its tensors")
    memory.position = end
    return content.storage(begin, end, dtype.itemsize)


def _part_of(
    data: torch.UntypedStorage, dtype: torch.dtype, count: object, part: Any
) -> Storage | Object:
    """A storage, or the part of it that ``(key, offset, size)`` names."""
    if type(count) is not int or data.nbytes() != count * dtype.itemsize:
        return Object("storage", flaw="its storage has another size than it claims")
    if part is not None:
        _, offset, size = _fields(part, 3)
        if not 0 <= offset <= offset + size <= count:
            return Object("storage", flaw="its storage is a part that does not exist")
        data = data[offset * dtype.itemsize : (offset + size) * dtype.itemsize]
    return typed_storage(data, dtype)


# ---- tar -----------------------------------------------------------------------------------------


def _read_tar(content: Content) -> object:
    with tarfile.open(fileobj=content.file(), mode="r:") as tar:
        members = {}
        for name in ("storages", "tensors", "pickle"):
            member = tar.getmember(name)
            end = member.offset_data + member.size
            if not member.isreg() or member.issparse() or end > content.size:
                raise UnpicklingRefused(f"its member {name} is damaged")
            members[name] = member.offset_data, end
    storages = _tar_storages(content, *members["storages"])
    tensors = _tar_tensors(content, *members["tensors"], storages)

    def persistent(pid: Any) -> object:
        return pid[0] if isinstance(pid, tuple) else tensors[int(pid)]

    begin, end = members["pickle"]
    return _unpickle(content, Memory(content.view[:end], begin), persistent)


def _tar_storages(content: Content, begin: int, end: int) -> dict[int, Storage]:
    memory, storages = Memory(content.view[:end], begin), dict[int, Storage]()
    for _ in range(_count(Unpickler(memory).load())):
        key, _, kind = _fields(Unpickler(memory).load(), 3)
        dtype = storage_dtype(kind)
        (count,) = struct.unpack("<q", memory.read(8))
        storages[key] = typed_storage(_raw_storage(content, memory, count, dtype), dtype)
    for part in _listed(Unpickler(memory).load()):
        key, root, offset, size = _fields(part, 4)
        whole, dtype = storages[root]._untyped_storage, storages[root].dtype
        count = whole.nbytes() // dtype.itemsize
        made = _part_of(whole, dtype, count, (key, offset, size))
        if isinstance(made, Object):
            raise UnpicklingRefused(made.flaw)
        storages[key] = made
    return storages


def _tar_tensors(
    content: Content, begin: int, end: int, storages: dict[int, Storage]
) -> dict[int, torch.Tensor]:
    memory, tensors = Memory(content.view[:end], begin), dict[int, torch.Tensor]()
    for _ in range(_count(Unpickler(memory).load())):
        key, storage, _ = _fields(Unpickler(memory).load(), 3)
        dimensions, _ = struct.unpack("<ii", memory.read(8))
        numbers = struct.unpack(f"<{2 * dimensions}q", memory.read(16 * dimensions))
        (offset,) = struct.unpack("<q", memory.read(8))
        size, stride = numbers[:dimensions], numbers[dimensions:]
        tensors[key] = view(storages[storage], offset, size, stride)
    return tensors


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise UnpicklingRefused("it does not say how many tensors it has")
    return value


def _fields(value: object, count: int) -> tuple[Any, ...]:
    if not isinstance(value, tuple) or len(value) != count:
        raise UnpicklingRefused("the entry of a tensor is malformed")
    return value
