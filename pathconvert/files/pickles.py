"""What a pickle would import, found by disassembling it: nothing in it is run.

A file by ``torch.save`` is a zip archive with a ``data.pkl`` inside or, before torch 1.6, four
pickles followed by raw bytes.
"""

import io
import pickletools
import struct
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pathconvert.files.refusals import listing, reading

_PLAIN_BUILTINS = {
    bool,
    bytearray,
    bytes,
    complex,
    dict,
    float,
    frozenset,
    int,
    list,
    object,
    range,
    set,
    slice,
    str,
}
_PLAIN_BUILTIN_NAMES = {kind.__name__ for kind in (*_PLAIN_BUILTINS, tuple)}
_PLAIN_MODULES = {
    "argparse",
    "collections",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "functools",
    "pathlib",
    "uuid",
}
_PLAIN_MODULES |= {"_codecs", "copyreg", "typing"}
_STATE_DICT_GLOBALS = {
    "collections.OrderedDict",
    "collections.defaultdict",
    "collections.Counter",
    "argparse.Namespace",
}


@dataclass(frozen=True)
class PickleContents:
    """What a pickle would import, found without running it.

    Attributes:
        protocol: the highest pickle protocol in use.
        globals: what it imports, as ``module.name``, in order of appearance.
        holds_module: whether it contains a whole ``nn.Module`` rather than its tensors alone.
    """

    protocol: int
    globals: tuple[str, ...]
    holds_module: bool

    @property
    def foreign(self) -> tuple[str, ...]:
        """The globals that a state dict does not need."""
        return tuple(name for name in self.globals if not _belongs_in_state_dict(name))

    @property
    def code(self) -> tuple[str, ...]:
        """The foreign globals that name functions of the standard library.

        Loading the pickle would run them.
        """
        return tuple(name for name in self.foreign if _acts(name))


NOTHING = PickleContents(0, (), False)


def zipped_contents(path: Path) -> PickleContents:
    """What the pickle in a file by ``torch.save`` would import, without running it."""
    with reading(path):
        return scan_pickles(io.BytesIO(_zipped_pickle(path)), count=1) or NOTHING


def legacy_contents(path: Path) -> PickleContents:
    """What the four pickles in a file by ``torch.save`` before 1.6 would import.

    They are not run.
    """
    with reading(path), path.open("rb") as file:
        return scan_pickles(file, count=4) or NOTHING


def _zipped_pickle(path: Path) -> bytes:
    """``data.pkl`` as it is stored.

    Its checksum is ignored: torch writes one only on request and never checks it.
    """
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith("data.pkl")]
    with path.open("rb") as file:
        file.seek(members[0].header_offset + 26)
        # the lengths of name and extra field
        file.seek(sum(struct.unpack("<HH", file.read(4))), io.SEEK_CUR)
        return file.read(members[0].file_size)


def scan_pickles(file: BinaryIO, count: int) -> PickleContents | None:
    """Disassemble the first ``count`` pickles in a file.

    Returns:
        What they would import; None if the file does not contain the first of them entirely.
    """
    file.seek(0)
    scan = _PickleScan()
    for index in range(count):
        try:
            for opcode, argument, _ in pickletools.genops(file):
                scan.step(opcode.name, argument)
        except Exception:  # hostile bytes can make the readers of genops raise anything
            if index == 0:
                return None
            break
    return PickleContents(
        scan.protocol, tuple(scan.found), scan.marks >= {"_parameters", "_modules"}
    )


class _PickleScan:
    """Follow the strings that a pickle pushes.

    STACK_GLOBAL imports what the last two of them name.
    """

    def __init__(self) -> None:
        self.protocol = 0
        self.found: dict[str, None] = {}  # an ordered set
        self.marks: set[str] = set()
        self.strings: list[str] = []  # the last two that were pushed
        self.last: str | None = None
        self.memo: dict[int, str | None] = {}

    def step(self, opcode: str, argument: Any) -> None:
        """Follow one opcode and its argument."""
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


def _belongs_in_state_dict(name: str) -> bool:
    """Whether the pickle of a state dict may import ``name``."""
    module, _, attribute = name.rpartition(".")
    if module == "torch":
        return (
            attribute.endswith("Storage")
            or attribute in ("Size", "device", "Tensor")
            or attribute[-1:].isdigit()
        )
    builtin = module in ("builtins", "__builtin__") and attribute in _PLAIN_BUILTIN_NAMES
    rebuild = module in ("torch._utils", "torch._tensor") and attribute.startswith("_rebuild")
    held = module in ("torch.storage", "torch.nn.parameter", "torch.serialization")
    return builtin or rebuild or held or name in _STATE_DICT_GLOBALS


def _acts(name: str) -> bool:
    """Whether ``name`` is a standard-library function that may do something when called."""
    module, _, attribute = name.rpartition(".")
    root = module.partition(".")[0]
    if root in ("builtins", "__builtin__"):
        return attribute not in _PLAIN_BUILTIN_NAMES
    return root in sys.stdlib_module_names | {"nt"} and root not in _PLAIN_MODULES


def describe_code(contents: PickleContents) -> tuple[str, str]:
    """Describe a pickle that runs code when it is loaded.

    Returns:
        What the file is, and what to do about it.
    """
    what = (
        f"a pickle with code in it (it calls {listing(contents.code)}); nothing of it was executed"
    )
    return (
        what,
        (
            "Do not load it. Ask for the weights as .safetensors, or as a state dict from a source"
            " you trust."
        ),
    )
