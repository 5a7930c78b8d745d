"""What a file is, told from its content: a checkpoint, or one of the many things that are saved under its name.

:func:`recognise` answers with a :class:`Kind` or refuses with what the file is. Nothing in a file is executed or
unpickled here, and no length that a file claims is believed before it is compared with the file's size.

A safetensors file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes:
``{"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, "__metadata__": {...}}``. The tensors
must tile the bytes after the header: no overlap, no hole, nothing left over.

A file by ``torch.save`` is a zip with a ``data.pkl`` inside or, before torch 1.6, four pickles followed by raw bytes.
"""

import codecs
import contextlib
import io
import json
import math
import pickletools
import stat
import struct
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from pathconvert.errors import CheckpointError

EXPECTED = "expected a PyTorch checkpoint (.pt, .pth) or a .safetensors file"
AGAIN = "Download or copy the file again, and compare its size with the original's."

_HEAD = 4096  # bytes looked at
_TORCH_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that opens a file by torch.save before 1.6
_HEADER_LIMIT = 100_000_000  # the safetensors library's own
_ITEM_BYTES = {  # of the safetensors dtypes
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}

_EXPORT_AGAIN = "Give the PyTorch checkpoint that it was exported from."
_STATE_DICT = "Save the network's weights with torch.save(model.state_dict(), 'weights.pt') and give that file."
_UNPACK = "Unpack it and give the checkpoint inside."
_SIGNATURES: tuple[tuple[int, bytes, str, str], ...] = (  # offset, bytes, what the file is, what to do
    (0, b"GGUF", "a GGUF file (llama.cpp)", _EXPORT_AGAIN),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras, TensorFlow)", "Give the network's PyTorch weights."),
    (4, b"TFL3", "a TensorFlow Lite file", _EXPORT_AGAIN),
    (0, b"\x93NUMPY", "a NumPy array (.npy)", _STATE_DICT),
    (0, b"\x1f\x8b", "a gzip-compressed file", _UNPACK),
    (0, b"\xfd7zXZ", "an xz-compressed file", _UNPACK),
    (0, b"BZh", "a bzip2-compressed file", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstd-compressed file", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"\x89PNG", "a PNG image", "Give the network's checkpoint."),
    (0, b"\xff\xd8\xff", "a JPEG image", "Give the network's checkpoint."),
    (0, b"%PDF", "a PDF document", "Give the network's checkpoint."),
)


class Kind(Enum):
    """A form in which tensors are stored."""

    ZIP = "torch.save"
    LEGACY = "torch.save before 1.6"
    SAFETENSORS = "safetensors"


@dataclass(frozen=True)
class PickleContents:
    """What a pickle would import, found without running it: ``module.name`` in order of appearance."""

    protocol: int
    globals: tuple[str, ...]
    holds_module: bool

    @property
    def foreign(self) -> tuple[str, ...]:
        """The globals that a state dict has no need of."""
        return tuple(name for name in self.globals if not _belongs_in_state_dict(name))

    @property
    def code(self) -> tuple[str, ...]:
        """The foreign globals that name functions of the standard library: a pickle that acts when loaded."""
        return tuple(name for name in self.foreign if _acts(name))


def recognise(path: Path) -> Kind:
    """Tell the kind of the checkpoint at ``path``.

    Raises:
        CheckpointError: there is no file, or it is something else, or it is damaged; the message says which.
    """
    size = _file_size(path)
    with reading(path), path.open("rb") as file:
        head = file.read(_HEAD)
        if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            return _zip_kind(path, size)
        if head.startswith(b"\x80") and _TORCH_MAGIC in head[:32]:
            return Kind.LEGACY
        text = _as_text(head)
        if head[8:9] == b"{" and text is None:
            return Kind.SAFETENSORS
        found = _signature(head) or _text_file(file, text) or _pickle_file(file) or _protobuf_file(file, size)
    if found is None and path.suffix.lower() == ".safetensors":
        return Kind.SAFETENSORS  # its header check will name the lie
    what, tip = found or (f"unknown binary data (it begins with {head[:8].hex(' ')})", AGAIN)
    raise CheckpointError(f"{path} is {what}; {EXPECTED}.", tip)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an operating system's error into one that names the file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CheckpointError(f"{path} cannot be read: {reason}.", "Check the file's permissions.") from error


def _file_size(path: Path) -> int:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} does not exist; {EXPECTED}.", "Check the path for misspellings.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.", "Check the file's permissions.") from error
    if stat.S_ISDIR(status.st_mode):
        raise CheckpointError(f"{path} is a directory; {EXPECTED}.", "Give one of the files inside.")
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is no regular file; {EXPECTED}.", "Copy its content to a file and give that.")
    if status.st_size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes); {EXPECTED}.", AGAIN)
    return status.st_size


# --- zip archives ---------------------------------------------------------------------------------------------------


def _zip_kind(path: Path, size: int) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        message = f"{path} is a truncated or damaged torch.save file (a zip archive without an intact end record)."
        raise CheckpointError(message, AGAIN) from error  # --debug shows what zipfile met
    what, tip = _zip_contents([member.filename for member in members])
    if what:
        raise CheckpointError(f"{path} is {what}; {EXPECTED}.", tip)
    # torch.save stores uncompressed, so what the members claim can be compared with the file's size.
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or _claimed_bytes(members) > size:
        message = f"{path} is a torch.save file that was compressed again, or whose members claim more than it holds."
        raise CheckpointError(message, "Load and save it once with torch.load and torch.save.")
    return Kind.ZIP


def _claimed_bytes(members: list[zipfile.ZipInfo]) -> int:
    return sum(member.file_size for member in members)


def _zip_contents(names: list[str]) -> tuple[str, str]:
    """What a zip archive is and what to do about it; ("", "") for a checkpoint."""
    inside = {name.partition("/")[2] for name in names} | set(names)
    if "constants.pkl" in inside:
        resave = "torch.save(torch.jit.load('file.pt').state_dict(), 'weights.pt')"
        return "a TorchScript archive (torch.jit.save)", f"Take its weights out with {resave} and give that file."
    if inside & {"archive_format", "serialized_exported_program.json", "models/model.json"}:
        resave = "torch.save(dict(torch.export.load('file.pt2').state_dict), 'weights.pt')"
        return "a torch.export archive (.pt2)", f"Take its weights out with {resave} and give that file."
    if ".data/extern_modules" in inside:
        return "a torch.package archive", _STATE_DICT
    if "data.pkl" in inside:
        return "", ""
    if "model.weights.h5" in inside:
        return "a Keras archive (.keras)", "Give the network's PyTorch weights."
    if any(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays (.npz)", _STATE_DICT
    return f"a zip archive without a checkpoint in it (it holds {listing(names)})", _UNPACK


# --- everything else ------------------------------------------------------------------------------------------------


def _signature(head: bytes) -> tuple[str, str] | None:
    for offset, magic, what, tip in _SIGNATURES:
        if head[offset:].startswith(magic):
            return what, tip
    return None


def _as_text(head: bytes) -> str | None:
    """The head as text, None if it is binary. The last character may be cut."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except UnicodeDecodeError:
        return None
    return text if text and all(c.isprintable() or c in "\t\n\r\f" for c in text) else None


def _text_file(file: BinaryIO, text: str | None) -> tuple[str, str] | None:
    if text is None or (text[0] in "c(" and _pickle_file(file)):  # protocol 0 pickles are text
        return None
    start = text.lstrip()[:200].lower()
    if start.startswith("version https://git-lfs"):
        return "a git-lfs pointer, not the file itself", "Run `git lfs pull` in its repository."
    if start.startswith(("<!doctype html", "<html")):
        return "a web page (HTML), perhaps the error page of a download", "Download the file itself."
    if '"weight_map"' in text:
        return "the index of a checkpoint in several files", "Join its parts into one file and give that."
    return f"a text file (it begins with {quote(text.strip()[:30])})", "Give the network's checkpoint."


def _pickle_file(file: BinaryIO) -> tuple[str, str] | None:
    """A pickle that torch.save did not write."""
    file.seek(0)
    first = file.read(2)
    contents = _scan(file, pickles=1)
    if contents is None or not (first[:1] == b"\x80" or contents.globals):
        return None
    if contents.code:
        return describe_code(contents)
    resave = "obj = pickle.load(open('file.pkl', 'rb')); torch.save(obj, 'weights.pt')"
    return "a plain pickle, not written by torch.save", f"If you trust it, save it again: {resave}"


def _protobuf_file(file: BinaryIO, size: int) -> tuple[str, str] | None:
    fields = _protobuf_fields(file, size)
    if 7 in fields and fields <= {*range(1, 9), 14, 20, 25, 26}:  # ModelProto: 1 ir_version, 7 graph
        return "an ONNX file", f"{_EXPORT_AGAIN[:-1]}; predict, bench and evaluate take files that end in .onnx."
    if fields == {1, 2}:  # SavedModel: 1 schema version, 2 meta graphs
        return "a TensorFlow SavedModel", "Give the network's PyTorch weights."
    return None


def _protobuf_fields(file: BinaryIO, size: int, limit: int = 10_000) -> set[int]:
    """Numbers of the top-level fields if the file is a protobuf message that opens with a number, else none."""
    fields: set[int] = set()
    file.seek(0)
    while file.tell() < size and len(fields) < 32 and (limit := limit - 1):
        tag = _varint(file)
        number, wire = tag >> 3, tag & 7
        value = _varint(file)
        if number == 0 or wire not in (0, 2) or (not fields and tag != 8):
            return set()
        fields.add(number)
        if wire == 2:
            file.seek(value, io.SEEK_CUR)
    return fields


def _varint(file: BinaryIO) -> int:
    """The next protobuf integer; what is no integer of 64 bits reads as 0."""
    value = 0
    for shift in range(0, 63, 7):
        byte = file.read(1)
        if not byte:
            return 0
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    return 0


# --- safetensors ----------------------------------------------------------------------------------------------------


def safetensors_header(path: Path) -> tuple[list[str], dict[str, Any]]:
    """The names of the tensors in file order, and the header's ``__metadata__``, after every claim was checked."""
    size = path.stat().st_size
    with reading(path), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            claim = f"claims {length} bytes, {max(size - 8, 0)} follow"
            raise _broken(path, f"its header {claim}" if size >= 8 else "it ends within the header's length")
        if length > _HEADER_LIMIT:
            raise _broken(path, f"its header claims {length} bytes, more than the {_HEADER_LIMIT} that are allowed")
        header = _parse_header(path, file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    spans = sorted((*_span(path, name, entry), name) for name, entry in header.items())
    _check_tiling(path, spans, size - 8 - length)
    return [name for _, _, name in spans], metadata if isinstance(metadata, dict) else {}


def _broken(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is no intact safetensors file: {reason}.", AGAIN)


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    repeated: list[str] = []

    def note_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            repeated.extend(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        return dict(pairs)

    try:
        header = json.loads(text.decode(), object_pairs_hook=note_repeated)
    except (ValueError, RecursionError):
        raise _broken(path, "its header is no JSON") from None
    if repeated:
        raise _broken(path, f"its header has the key {quote(repeated[0])} twice")
    if not isinstance(header, dict):
        raise _broken(path, "its header is no JSON object")
    return header


def _span(path: Path, name: str, entry: object) -> tuple[int, int]:
    """The checked byte range [begin, end) of one tensor."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or not isinstance(dtype, str):
        raise _broken(path, f"the entry of tensor {quote(name)} is malformed")
    if dtype not in _ITEM_BYTES:
        raise CheckpointError(f"{path} holds tensor {quote(name)} of unsupported type {quote(dtype)}.", _FLOAT_TIP)
    begin, end = offsets
    needed = math.prod(shape) * _ITEM_BYTES[dtype]
    if end - begin != needed:
        raise _broken(path, f"tensor {quote(name)} needs {needed} bytes, its offsets claim {end - begin}")
    return begin, end


_FLOAT_TIP = "Give the checkpoint in float32, float16, bfloat16 or float64."


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_tiling(path: Path, spans: list[tuple[int, int, str]], available: int) -> None:
    last = max((end for _, end, _ in spans), default=0)
    if last > available:
        raise _broken(path, f"it is truncated: its tensors need {last} bytes, {available} are there")
    previous, before = 0, ""
    for begin, end, name in spans:
        if begin < previous:
            raise _broken(path, f"tensors {quote(before)} and {quote(name)} overlap")
        if begin > previous:
            raise _broken(path, f"{begin - previous} bytes before tensor {quote(name)} belong to no tensor")
        previous, before = end, name
    if last < available:
        raise _broken(path, f"{available - last} bytes after the last tensor belong to no tensor")


# --- pickles --------------------------------------------------------------------------------------------------------


def pickle_contents(path: Path, kind: Kind) -> PickleContents:
    """What the pickle of a ``torch.save`` file would import, without running it."""
    empty = PickleContents(0, (), False)
    with reading(path):
        if kind is Kind.LEGACY:
            with path.open("rb") as file:
                return _scan(file, pickles=4) or empty
        return _scan(io.BytesIO(_zipped_pickle(path)), pickles=1) or empty


def _zipped_pickle(path: Path) -> bytes:
    """``data.pkl`` as it is stored, whatever its checksum: torch writes it only on request and never reads it."""
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith("data.pkl")]
    with path.open("rb") as file:
        file.seek(members[0].header_offset + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), io.SEEK_CUR)  # the lengths of name and extra field
        return file.read(members[0].file_size)


def _scan(file: BinaryIO, pickles: int) -> PickleContents | None:
    """Disassemble ``pickles`` pickles; None if the file does not hold the first of them entirely."""
    file.seek(0)
    scan = _PickleScan()
    for index in range(pickles):
        try:
            for opcode, argument, _ in pickletools.genops(file):
                scan.step(opcode.name, argument)
        except Exception:  # genops raises whatever hostile bytes make its readers raise
            if index == 0:
                return None
            break
    return PickleContents(scan.protocol, tuple(scan.found), scan.marks >= {"_parameters", "_modules"})


class _PickleScan:
    """Follows the strings of a pickle as far as it takes to read the two that a STACK_GLOBAL names."""

    def __init__(self) -> None:
        self.protocol = 0
        self.found: dict[str, None] = {}  # an ordered set
        self.marks: set[str] = set()
        self.strings: list[str] = []  # the last two that were pushed
        self.last: str | None = None
        self.memo: dict[int, str | None] = {}

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[len(self.memo) if opcode == "MEMOIZE" else argument] = self.last
            return
        value = self.memo.get(argument) if opcode in ("GET", "BINGET", "LONG_BINGET") else argument
        self.last = value if isinstance(value, str) else None
        if opcode == "PROTO":
            self.protocol = max(self.protocol, argument)
        elif opcode in ("GLOBAL", "INST"):
            self.found[argument.replace(" ", ".", 1)] = None
        elif opcode == "STACK_GLOBAL":
            self.found[".".join(self.strings)] = None
        elif self.last is not None:
            self.strings = [*self.strings[-1:], self.last]
            self.marks.add(self.last)


_PLAIN_BUILTINS = {bool, bytearray, bytes, complex, dict, float, frozenset, int, list, object, range, set, slice, str}
_PLAIN_BUILTIN_NAMES = {kind.__name__ for kind in (*_PLAIN_BUILTINS, tuple)}
_PLAIN_MODULES = {"argparse", "collections", "datetime", "decimal", "enum", "fractions", "functools", "pathlib", "uuid"}
_PLAIN_MODULES |= {"_codecs", "copyreg", "typing"}
_STATE_DICT_GLOBALS = {
    "collections.OrderedDict",
    "collections.defaultdict",
    "collections.Counter",
    "argparse.Namespace",
}


def _belongs_in_state_dict(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    if module == "torch":
        return attribute.endswith("Storage") or attribute in ("Size", "device", "Tensor") or attribute[-1:].isdigit()
    builtin = module in ("builtins", "__builtin__") and attribute in _PLAIN_BUILTIN_NAMES
    rebuild = module in ("torch._utils", "torch._tensor") and attribute.startswith("_rebuild")
    held = module in ("torch.storage", "torch.nn.parameter", "torch.serialization")
    return builtin or rebuild or held or name in _STATE_DICT_GLOBALS


def _acts(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    root = module.partition(".")[0]
    if root in ("builtins", "__builtin__"):
        return attribute not in _PLAIN_BUILTIN_NAMES
    return root in sys.stdlib_module_names | {"nt"} and root not in _PLAIN_MODULES


def describe_code(contents: PickleContents) -> tuple[str, str]:
    """What a pickle with code in it is, and what to do."""
    what = f"a pickle with code in it (it calls {listing(contents.code)}); nothing of it was executed"
    return what, "Do not load it. Ask for the weights as .safetensors, or as a state dict from a source you trust."


# --- words ----------------------------------------------------------------------------------------------------------


def quote(text: object, limit: int = 80) -> str:
    """A name from a file, safe to print on one line."""
    shown = repr(text)
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def listing(names: Iterable[object], limit: int = 5) -> str:
    """The first names, and how many there are in all if some are left out."""
    shown = list(names)
    text = ", ".join(quote(name) for name in shown[:limit]) or "nothing"
    return text if len(shown) <= limit else f"{text} and {len(shown) - limit} more"
