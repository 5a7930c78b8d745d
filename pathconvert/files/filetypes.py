"""What a file is, told from its content.

It is a checkpoint, or one of the many things that are saved under its name. :func:`recognise`
returns a :class:`Kind`, or refuses the file and says what it is. Nothing in a file is executed or
unpickled here, and no length that a file claims is used before it has been compared with the file's
size.
"""

import codecs
import io
import stat
import struct
import zipfile
from enum import Enum
from pathlib import Path
from typing import BinaryIO

from pathconvert.errors import CheckpointError
from pathconvert.files.pickles import describe_code, scan_pickles
from pathconvert.files.refusals import AGAIN, EXPECTED, listing, quote, reading

_HEAD = 4096  # bytes at the beginning of a file that are looked at
_TORCH_MAGIC = (  # the number that opens a file by torch.save before 1.6
    b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
)

_EXPORT_AGAIN = "Give the PyTorch checkpoint that it was exported from."
_STATE_DICT = (
    "Save the network's weights with torch.save(model.state_dict(), 'weights.pt') and give that"
    " file."
)
_UNPACK = "Unpack it and give the checkpoint inside."
_SIGNATURES: tuple[
    tuple[int, bytes, str, str], ...
] = (  # offset, bytes, what the file is, what to do
    (0, b"GGUF", "a GGUF file (llama.cpp)", _EXPORT_AGAIN),
    (
        0,
        b"\x89HDF\r\n\x1a\n",
        "an HDF5 file (Keras, TensorFlow)",
        "Give the network's PyTorch weights.",
    ),
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


def recognise(path: Path) -> Kind:
    """Tell the kind of the checkpoint at ``path``.

    Raises:
        CheckpointError: the file does not exist, cannot be read, is damaged, or is not a
            checkpoint.
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
        found = (
            _signature(head)
            or _text_file(file, text)
            or _pickle_file(file)
            or _protobuf_file(file, size)
        )
    if found is None and path.suffix.lower() == ".safetensors":
        return Kind.SAFETENSORS  # the check of its header will say what is wrong
    what, tip = found or (f"unknown binary data (it begins with {head[:8].hex(' ')})", AGAIN)
    raise CheckpointError(f"{path} is {what}; {EXPECTED}.", tip)


def _file_size(path: Path) -> int:
    """The size in bytes of a regular file that is not empty; anything else is refused."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{path} does not exist; {EXPECTED}.", "Check the path for misspellings."
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}.", "Check the file's permissions."
        ) from error
    if stat.S_ISDIR(status.st_mode):
        raise CheckpointError(
            f"{path} is a directory; {EXPECTED}.", "Give one of the files inside."
        )
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(
            f"{path} is not a regular file; {EXPECTED}.",
            "Copy its content to a file and give that file.",
        )
    if status.st_size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes); {EXPECTED}.", AGAIN)
    return status.st_size


# ---- zip archives --------------------------------------------------------------------------------


def _zip_kind(path: Path, size: int) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        message = (
            f"{path} is a truncated or damaged torch.save file (a zip archive without an intact end"
            " record)."
        )
        raise CheckpointError(message, AGAIN) from error  # --debug shows zipfile's own error
    what, tip = _zip_contents([member.filename for member in members])
    if what:
        raise CheckpointError(f"{path} is {what}; {EXPECTED}.", tip)
    # torch.save does not compress, so the sizes that the members claim can be compared with the
    # file's size.
    if (
        any(member.compress_type != zipfile.ZIP_STORED for member in members)
        or _claimed_bytes(members) > size
    ):
        message = (
            f"{path} is a torch.save file that was compressed again, or whose members claim more"
            " bytes than it has."
        )
        raise CheckpointError(message, "Load and save it once with torch.load and torch.save.")
    return Kind.ZIP


def _claimed_bytes(members: list[zipfile.ZipInfo]) -> int:
    return sum(member.file_size for member in members)


def _zip_contents(names: list[str]) -> tuple[str, str]:
    """Describe a zip archive by the names of its members.

    Returns:
        What it is, and what to do about it; two empty strings for a checkpoint.
    """
    inside = {name.partition("/")[2] for name in names} | set(names)
    if "constants.pkl" in inside:
        resave = "torch.save(torch.jit.load('file.pt').state_dict(), 'weights.pt')"
        return (
            "a TorchScript archive (torch.jit.save)",
            f"Take its weights out with {resave} and give that file.",
        )
    if inside & {"archive_format", "serialized_exported_program.json", "models/model.json"}:
        resave = "torch.save(dict(torch.export.load('file.pt2').state_dict), 'weights.pt')"
        return (
            "a torch.export archive (.pt2)",
            f"Take its weights out with {resave} and give that file.",
        )
    if ".data/extern_modules" in inside:
        return "a torch.package archive", _STATE_DICT
    if "data.pkl" in inside:
        return "", ""
    if "model.weights.h5" in inside:
        return "a Keras archive (.keras)", "Give the network's PyTorch weights."
    if any(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays (.npz)", _STATE_DICT
    return f"a zip archive without a checkpoint in it (it contains {listing(names)})", _UNPACK


# ---- everything else -----------------------------------------------------------------------------


def _signature(head: bytes) -> tuple[str, str] | None:
    """What a file with this beginning is, and what to do about it; None if no signature fits."""
    for offset, magic, what, tip in _SIGNATURES:
        if head[offset:].startswith(magic):
            return what, tip
    return None


def _as_text(head: bytes) -> str | None:
    """The head as text, or None if it is binary. The last character may be incomplete."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except UnicodeDecodeError:
        return None
    return text if text and all(c.isprintable() or c in "\t\n\r\f" for c in text) else None


def _text_file(file: BinaryIO, text: str | None) -> tuple[str, str] | None:
    """What a text file is, and what to do about it; None if the file is binary, or a pickle."""
    if text is None or (text[0] in "c(" and _pickle_file(file)):  # pickles of protocol 0 are text
        return None
    start = text.lstrip()[:200].lower()
    if start.startswith("version https://git-lfs"):
        return "a git-lfs pointer, not the file itself", "Run `git lfs pull` in its repository."
    if start.startswith(("<!doctype html", "<html")):
        return (
            "a web page (HTML), perhaps the error page of a download",
            "Download the file itself.",
        )
    if '"weight_map"' in text:
        return (
            "the index of a checkpoint in several files",
            "Join its parts into one file and give that file.",
        )
    return (
        f"a text file (it begins with {quote(text.strip()[:30])})",
        "Give the network's checkpoint.",
    )


def _pickle_file(file: BinaryIO) -> tuple[str, str] | None:
    """What a pickle that torch.save did not write is, and what to do about it.

    None if the file is not a pickle.
    """
    file.seek(0)
    first = file.read(2)
    contents = scan_pickles(file, count=1)
    if contents is None or not (first[:1] == b"\x80" or contents.globals):
        return None
    if contents.code:
        return describe_code(contents)
    resave = "obj = pickle.load(open('file.pkl', 'rb')); torch.save(obj, 'weights.pt')"
    return "a plain pickle, not written by torch.save", f"If you trust it, save it again: {resave}"


def _protobuf_file(file: BinaryIO, size: int) -> tuple[str, str] | None:
    """What a protobuf message is, told by the fields that it has, and what to do about it.

    None for any other file.
    """
    fields = _protobuf_fields(file, size)
    if 7 in fields and fields <= {
        *range(1, 9),
        14,
        20,
        25,
        26,
    }:  # ModelProto: 1 ir_version, 7 graph
        return (
            "an ONNX file",
            f"{_EXPORT_AGAIN[:-1]}; predict, bench and evaluate take files that end in .onnx.",
        )
    if fields == {1, 2}:  # SavedModel: 1 schema version, 2 meta graphs
        return "a TensorFlow SavedModel", "Give the network's PyTorch weights."
    return None


def _protobuf_fields(file: BinaryIO, size: int, limit: int = 10_000) -> set[int]:
    """The numbers of a protobuf message's top-level fields.

    Empty if the file is not a protobuf message that begins with a number.
    """
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
    """The next protobuf integer; anything that is not an integer of 64 bits reads as 0."""
    value = 0
    for shift in range(0, 63, 7):
        byte = file.read(1)
        if not byte:
            return 0
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    return 0
