"""What a file is, told from its content.

It is a checkpoint, or one of the many things that are saved under its name. :func:`recognise`
returns a :class:`Kind`, or refuses the file and says what it is. Nothing in a file is executed or
unpickled here, and no length that a file claims is used before it has been compared with the file's
size.
"""

import codecs
import io
import pickletools
import re
import shlex
import stat
import struct
import tarfile
import zipfile
from enum import Enum
from pathlib import Path
from typing import BinaryIO

from pathconvert.errors import CheckpointError
from pathconvert.files.refusals import AGAIN, EXPECTED, EXPORT_AGAIN, listing, quote, reading

_HEAD = 4096  # bytes at the beginning of a file that are looked at
_MOST_INSTRUCTIONS = 100_000  # of a pickle in text form that are looked at
#: The number that opens a file by torch.save before 1.6.
TORCH_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

_STATE_DICT = (
    "Save the network's weights with torch.save(model.state_dict(), 'weights.pt') and give that"
    " file."
)
_COPY = (
    "Copy its arrays into a PyTorch network (the package {} reads them), and give the file that"
    " torch.save(model.state_dict(), 'weights.pt') writes."
)
_UNPACK = "Unpack it and give the checkpoint inside."
_SIGNATURES: tuple[tuple[int, bytes, str, str], ...] = (
    # offset, bytes, what the file is, what to do
    (0, b"GGUF", "a GGUF file (llama.cpp)", EXPORT_AGAIN),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras, TensorFlow)", _COPY.format("h5py")),
    (4, b"TFL3", "a TensorFlow Lite file", EXPORT_AGAIN),
    (0, b"\x93NUMPY", "a NumPy array (.npy)", _STATE_DICT),
    (0, b"\x28\xb5\x2f\xfd", "a zstd-compressed file", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"\x89PNG", "a PNG image", "Give the network's checkpoint."),
    (0, b"\xff\xd8\xff", "a JPEG image", "Give the network's checkpoint."),
    (0, b"%PDF", "a PDF document", "Give the network's checkpoint."),
)
#: What compressed files begin with.
GZIP, BZIP2, XZ = b"\x1f\x8b", b"BZh", b"\xfd7zXZ"
#: Suffixes of the one file in an archive or a folder that is taken for a checkpoint.
CHECKPOINT_SUFFIXES = (".pt", ".pth", ".safetensors", ".bin", ".ckpt", ".pkl", ".tar")

_INDEX_MARK = '"weight_map"'


class Kind(Enum):
    """A form in which tensors are stored."""

    ZIP = "torch.save"
    LEGACY = "torch.save before 1.6"
    TAR = "torch.save before 0.1.10"
    PICKLE = "pickle"
    SAFETENSORS = "safetensors"
    INDEX = "the index of a checkpoint in several files"
    COMPRESSED = "a compressed file"
    ARCHIVE = "a zip archive with a checkpoint in it"


def recognise(path: Path) -> Kind:
    """Tell the kind of the checkpoint at ``path``.

    Raises:
        CheckpointError: the file does not exist, cannot be read, is damaged, or is not a
            checkpoint.
    """
    size = _file_size(path)
    with reading(path), path.open("rb") as file:
        return kind_of(path, file, size)


def kind_of(path: Path, file: BinaryIO, size: int) -> Kind:
    """Tell the kind of a checkpoint of ``size`` bytes that is open for reading.

    Args:
        path: the file, or the one that it was unpacked from, for messages.
        file: the content.
        size: in bytes.

    Raises:
        CheckpointError: it is damaged, or is not a checkpoint.
    """
    head = file.read(_HEAD)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip_kind(path, file, size)
    if head.startswith(b"\x80") and TORCH_MAGIC in head[:32]:
        return Kind.LEGACY
    if head.startswith((GZIP, BZIP2, XZ)):
        return Kind.COMPRESSED
    if head[257:262] == b"ustar" and _is_torch_tar(file):
        return Kind.TAR
    text = _as_text(head)
    if head[8:9] == b"{" and text is None:
        return Kind.SAFETENSORS
    if _is_pickle(file, head):
        return Kind.PICKLE
    if text is not None and text.lstrip().startswith("{") and _INDEX_MARK in text:
        return Kind.INDEX
    found = _signature(head) or _text_file(text) or _torch7_file(head) or _protobuf_file(file, size)
    if found is None and path.suffix.lower() == ".safetensors":
        return Kind.SAFETENSORS  # the check of its header will say what is wrong
    if found is None and path.with_suffix(".xml").is_file():
        found = "the weights of an OpenVINO network (.xml beside it)", EXPORT_AGAIN
    what, tip = found or (f"unknown binary data (it begins with {head[:8].hex(' ')})", AGAIN)
    raise CheckpointError(f"{path} is {what}; {EXPECTED}.", tip)


def _file_size(path: Path) -> int:
    """The size in bytes of a regular file that is not empty; anything else is refused."""
    address = re.match(r"(https?|ftp|s3|gs):/", str(path))
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if address:
            raise _no_file_but_address(str(path)) from None
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


def _no_file_but_address(address: str) -> CheckpointError:
    """The refusal of an address, of which pathlib has joined the two slashes."""
    scheme, _, rest = address.partition(":")
    whole = f"{scheme}://{rest.lstrip('/')}"
    name = rest.partition("?")[0].rstrip("/").rpartition("/")[2] or "weights.pt"
    command = {
        "s3": f"aws s3 cp {whole} {name}",
        "gs": f"gcloud storage cp {whole} {name}",
    }.get(scheme, f"curl -L -o {shlex.quote(name)} {shlex.quote(whole)}")
    return CheckpointError(f"{whole} is an address; {EXPECTED}.", f"Download it first: {command}")


# ---- zip archives --------------------------------------------------------------------------------


def _zip_kind(path: Path, file: BinaryIO, size: int) -> Kind:
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        message = (
            f"{path} is a truncated or damaged torch.save file (a zip archive without an intact end"
            " record)."
        )
        raise CheckpointError(message, AGAIN) from error  # --debug shows zipfile's own error
    names = [member.filename for member in members]
    what, tip = _zip_contents(path, names)
    if what:
        raise CheckpointError(f"{path} is {what}; {EXPECTED}.", tip)
    if "data.pkl" not in _inside(names):
        return Kind.ARCHIVE
    claimed = sum(member.file_size for member in members)
    if claimed > unpacked_limit(size):
        message = (
            f"{path} is a compressed torch.save file whose members claim {claimed} bytes, far more"
            f" than its {size} can contain."
        )
        raise CheckpointError(message, "Load and save it once with torch.load and torch.save.")
    return Kind.ZIP


def unpacked_limit(packed: int) -> int:
    """How many bytes may come out of a compressed file of ``packed`` bytes.

    Weights shrink to a half at best, and those of a new network, which are zeros and ones in part,
    to a tenth; a hostile file can claim a thousand times its size.
    """
    return 20 * packed + 2**18


def checkpoints_among(names: list[str]) -> list[str]:
    """The names that end as a checkpoint's do, without the hidden files that macOS adds."""
    return [
        name
        for name in names
        if name.lower().endswith(CHECKPOINT_SUFFIXES)
        and not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
    ]


def _inside(names: list[str]) -> set[str]:
    """The names, and what they are called in a folder at the top."""
    return {name.partition("/")[2] for name in names} | set(names)


def _take_out(path: Path, loaded: str) -> str:
    """The command that writes the weights of an archive, which ``loaded`` reads, to a file."""
    target = str(path.with_suffix(".weights.pt"))
    code = f"import torch; torch.save(dict({loaded}), {target!r})"
    return f"Take its weights out and give that file: python -c {shlex.quote(code)}"


def _zip_contents(path: Path, names: list[str]) -> tuple[str, str]:
    """Describe a zip archive by the names of its members.

    Returns:
        What it is, and what to do about it; two empty strings for a checkpoint.
    """
    inside = _inside(names)
    if "constants.pkl" in inside:
        loaded = f"torch.jit.load({str(path)!r}, map_location='cpu').state_dict()"
        return "a TorchScript archive (torch.jit.save)", _take_out(path, loaded)
    if inside & {"archive_format", "serialized_exported_program.json", "models/model.json"}:
        loaded = f"torch.export.load({str(path)!r}).state_dict"
        return "a torch.export archive (.pt2)", _take_out(path, loaded)
    if ".data/extern_modules" in inside:
        return "a torch.package archive", _STATE_DICT
    if "data.pkl" in inside:
        return "", ""
    if "model.weights.h5" in inside:
        return "a Keras archive (.keras)", _COPY.format("h5py")
    if any(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays (.npz)", _STATE_DICT
    checkpoints = checkpoints_among(names)
    if len(checkpoints) == 1:
        return "", ""
    if checkpoints:
        return f"a zip archive of several checkpoints ({listing(checkpoints)})", _UNPACK
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


def _text_file(text: str | None) -> tuple[str, str] | None:
    """What a text file is, and what to do about it; None if the file is binary."""
    if text is None:
        return None
    start = text.lstrip()[:1000].lower()
    if start.startswith("version https://git-lfs"):
        return "a git-lfs pointer, not the file itself", "Run `git lfs pull` in its repository."
    if start.startswith(("<!doctype html", "<html")):
        return (
            "a web page (HTML), perhaps the error page of a download",
            "Download the file itself.",
        )
    if start.startswith("<?xml") and "<net " in start:
        return "an OpenVINO network (.xml)", EXPORT_AGAIN
    return (
        f"a text file (it begins with {quote(text.strip()[:30])})",
        "Give the network's checkpoint.",
    )


def _torch7_file(head: bytes) -> tuple[str, str] | None:
    """What a file by Lua's Torch is: its objects begin with a version and the name of a class."""
    if re.search(rb"V \d....(nn|torch|cudnn|cunn)\.", head, re.DOTALL):
        return "a Torch7 file (.t7)", _COPY.format("torchfile")
    return None


def _is_torch_tar(file: BinaryIO) -> bool:
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            return {"storages", "tensors", "pickle"} <= set(tar.getnames())
    except (tarfile.TarError, OSError, ValueError):
        return False


def _is_pickle(file: BinaryIO, head: bytes) -> bool:
    """Whether a file is a pickle: of protocol 2 or later, or one in text form with an import."""
    if len(head) > 2 and head[0] == 0x80 and head[1] <= 5:
        return True
    if head[:1] not in (b"(", b"c", b"}", b"]"):
        return False
    file.seek(0)
    imports = 0
    try:
        for count, (opcode, _, _) in enumerate(pickletools.genops(file)):
            imports += opcode.name in ("GLOBAL", "INST")
            if count > _MOST_INSTRUCTIONS:
                break
    except Exception:  # the bytes of any other file can make the readers of genops raise anything
        return False
    return imports > 0


def _protobuf_file(file: BinaryIO, size: int) -> tuple[str, str] | None:
    """What a protobuf message is, told by the fields that it has, and what to do about it.

    None for any other file.
    """
    fields = _protobuf_fields(file, size)
    # ONNX's ModelProto: 1 ir_version, 7 graph
    if 7 in fields and fields <= {*range(1, 9), 14, 20, 25, 26}:
        return (
            "an ONNX file",
            f"{EXPORT_AGAIN[:-1]}; predict, bench and evaluate take files that end in .onnx.",
        )
    if fields == {1, 2}:  # SavedModel: 1 schema version, 2 meta graphs
        return "a TensorFlow SavedModel", EXPORT_AGAIN
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
