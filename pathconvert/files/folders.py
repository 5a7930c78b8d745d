"""Checkpoints in several files, and folders with a checkpoint in them.

index
    ``model.safetensors.index.json`` or ``pytorch_model.bin.index.json``: a JSON object that says
    under ``weight_map`` in which file each tensor is.
distributed
    ``torch.distributed.checkpoint``: ``.metadata``, a pickle that says which part of which tensor
    lies where in the files ``*.distcp``. Each part is a file by ``torch.save``.
DeepSpeed
    ``latest`` names a folder with ``mp_rank_00_model_states.pt``, which Lightning calls
    ``checkpoint``.
"""

import hashlib
import json
import math
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pathconvert.errors import CheckpointError
from pathconvert.files.containers import Container, Loaded, check_name, load_file, read_config
from pathconvert.files.content import Content
from pathconvert.files.filetypes import Kind, checkpoints_among
from pathconvert.files.refusals import (
    AGAIN,
    EXPECTED,
    EXPORT_AGAIN,
    listing,
    quote,
    reading,
    reason,
)
from pathconvert.files.torch_files import read_torch
from pathconvert.files.unpickling import Object

_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
#: Files that a folder is read for, in this order.
_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "mp_rank_00_model_states.pt",
    "last.ckpt",
    "checkpoint/mp_rank_00_model_states.pt",
    "checkpoints/last.ckpt",
)

_LARGEST_INDEX = 100_000_000  # bytes
_ONE_FILE = "Give the file: {}"


def read_folder(folder: Path) -> Loaded:
    """Read the checkpoint in a folder.

    Raises:
        CheckpointError: the folder has no checkpoint, several of them, or a damaged one.
    """
    with reading(folder):
        names = sorted(entry.name for entry in folder.iterdir())
    if ".metadata" in names:
        return _read_distributed(folder)
    for name in _INDICES:
        if name in names:
            return read_index(folder / name)
    _refuse_partitioned(folder, names)
    for place in (*_FILES, *_deepspeed_file(folder)):
        if (folder / place).is_file():
            return _with_config(load_file(folder / place), folder)
    found = [name for name in checkpoints_among(names) if (folder / name).is_file()]
    if len(found) == 1 and found != ["data.pkl"]:
        return _with_config(load_file(folder / found[0]), folder)
    raise _no_checkpoint(folder, names, found)


def _with_config(loaded: Loaded, folder: Path) -> Loaded:
    return Loaded(**(vars(loaded) | {"config": loaded.config or read_config(folder)}))


def _deepspeed_file(folder: Path) -> list[str]:
    """The file that DeepSpeed's ``latest`` leads to; none without it."""
    try:
        tag = (folder / "latest").read_text()[:200].strip()
    except (OSError, UnicodeDecodeError):
        return []
    return [f"{check_name(folder / 'latest', tag)}/mp_rank_00_model_states.pt"]


def _refuse_partitioned(folder: Path, names: list[str]) -> None:
    """Refuse what DeepSpeed has distributed over several machines, in parts without names."""
    inside = folder / "checkpoint"
    names = [*names, *(entry.name for entry in inside.glob("*.pt"))]
    parts = [
        name
        for name in names
        if name.startswith(("zero_pp_rank_", "mp_rank_01")) and name.endswith("model_states.pt")
    ]
    if parts:
        raise CheckpointError(
            f"{folder} is a DeepSpeed checkpoint whose weights are distributed over several files"
            f" ({listing(parts)}).",
            "Join them with DeepSpeed's own script: python"
            f" {_quoted(folder / 'zero_to_fp32.py')} {_quoted(folder)} weights.pt",
        )


def _quoted(path: Path) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))


def _no_checkpoint(folder: Path, names: list[str], found: list[str]) -> CheckpointError:
    if len(found) > 1:
        return CheckpointError(
            f"{folder} is a folder with several checkpoints: {listing(found)}.",
            _ONE_FILE.format(folder / found[0]),
        )
    if "saved_model.pb" in names:
        return CheckpointError(
            f"{folder} is a TensorFlow SavedModel; {EXPECTED}.",
            EXPORT_AGAIN,
        )
    if "data.pkl" in names:
        return CheckpointError(
            f"{folder} is the unpacked content of a torch.save file; {EXPECTED}.",
            f"Pack it again: python -m zipfile -c {_quoted(Path(f'{folder.name}.pt'))}"
            f" {_quoted(folder)}",
        )
    below = [str(path.relative_to(folder)) for path in folder.glob("*/*") if path.is_file()]
    deeper = checkpoints_among(below)
    tip = _ONE_FILE.format(folder / deeper[0]) if deeper else "Check the path for misspellings."
    return CheckpointError(f"{folder} is a folder without a checkpoint in it; {EXPECTED}.", tip)


# ---- sharded -------------------------------------------------------------------------------------


def read_index(path: Path) -> Loaded:
    """Read a checkpoint in several files by its index.

    Raises:
        CheckpointError: the index is damaged; a file or a tensor that it names is missing.
    """
    with reading(path):
        text = path.read_bytes() if path.stat().st_size <= _LARGEST_INDEX else b""
    try:
        places = json.loads(text)["weight_map"]
        files = dict.fromkeys(check_name(path, place) for place in places.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not the index of a checkpoint in several files: it does not say which"
            " tensor is in which file.",
            AGAIN,
        ) from error
    parts = {name: _part(path, name) for name in files}
    tensors: dict[str, object] = {}
    for name, file in places.items():
        value = parts[file].value
        if not isinstance(value, Mapping) or name not in value:
            raise CheckpointError(
                f"{path} refers to {quote(name)} in {quote(file)}, which does not contain it.",
                AGAIN,
            )
        tensors[name] = value[name]
    safe = all(part.container is Container.SAFETENSORS for part in parts.values())
    return Loaded(
        path=path,
        value=tensors,
        container=Container.SHARDED_SAFETENSORS if safe else Container.SHARDED_TORCH,
        size=sum(part.size for part in parts.values()),
        digest=_joint_digest([part.digest for part in parts.values()]),
        config=read_config(path.parent),
    )


def _part(index: Path, name: str) -> Loaded:
    path = index.parent / name
    if not path.is_file():
        raise CheckpointError(
            f"{index} refers to tensors in {quote(name)}, which does not exist.",
            "Download the missing file into the same folder.",
        )
    return load_file(path)


def _joint_digest(digests: list[Callable[[], str]]) -> Callable[[], str]:
    return lambda: hashlib.sha256("".join(digest() for digest in digests).encode()).hexdigest()


# ---- torch.distributed.checkpoint ----------------------------------------------------------------


def _read_distributed(folder: Path) -> Loaded:
    path = folder / ".metadata"
    with reading(path):
        described = read_torch(Content.read(path), Kind.PICKLE)
    try:
        return _Distributed(folder, described).read()
    except CheckpointError:
        raise
    except Exception as error:  # the pickle of a damaged file may contain anything in any place
        raise CheckpointError(
            f"{path} is not the metadata of a distributed checkpoint: {reason(error)}.",
            AGAIN,
        ) from error


class _Distributed:
    """The tensors of a ``torch.distributed.checkpoint``, put together from their parts."""

    def __init__(self, folder: Path, described: Any) -> None:
        self.folder = folder
        self.tensors: dict[str, Any] = described.state["state_dict_metadata"]
        self.paths: dict[str, Any] = described.state.get("planner_data") or {}
        self.places = {
            (index.state["fqn"], _numbers(index.state.get("offset"))): info.state
            for index, info in described.state["storage_data"].items()
        }
        self.files: dict[str, Content] = {}

    def read(self) -> Loaded:
        value: dict[str, Any] = {}
        for name, described in self.tensors.items():
            is_tensor = described.name.endswith(".TensorStorageMetadata")
            entry = self._tensor(name, described) if is_tensor else Object("bytes")
            *outer, last = self.paths.get(name, (name,))
            target = value
            for part in outer:
                target = target.setdefault(str(part), {})
            target[str(last)] = entry
        digests = [file.digest.hexdigest for file in self.files.values() if file.digest]
        return Loaded(
            path=self.folder,
            value=value,
            container=Container.DISTRIBUTED,
            size=sum(file.size for file in self.files.values()),
            digest=_joint_digest(digests),
            config=read_config(self.folder),
        )

    def _tensor(self, name: str, described: Any) -> Tensor:
        size = _numbers(described.state["size"])
        chunks = [
            (_numbers(chunk.state["offsets"]), _numbers(chunk.state["sizes"]))
            for chunk in described.state["chunks"]
        ]
        if sum(math.prod(sizes) for _, sizes in chunks) != math.prod(size):
            raise self._incomplete(name)
        parts = [(offset, self._chunk(name, offset, sizes)) for offset, sizes in chunks]
        if len(parts) == 1:
            return parts[0][1]
        whole = torch.empty(size, dtype=parts[0][1].dtype)
        covered = torch.zeros(size, dtype=torch.bool)
        for offset, part in parts:
            where = tuple(
                slice(start, start + side) for start, side in zip(offset, part.shape, strict=True)
            )
            whole[where] = part
            covered[where] = True
        if not bool(covered.all()):
            raise self._incomplete(name)
        return whole

    def _chunk(self, name: str, offset: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        place = self.places[name, offset]
        if place.get("transform_descriptors"):
            raise CheckpointError(
                f"{self.folder} is a distributed checkpoint that is compressed, which is not"
                " supported.",
                "Save it without extensions: torch.save(model.state_dict(), 'weights.pt').",
            )
        file = self._file(check_name(self.folder, place["relative_path"]))
        begin, length = place["offset"], place["length"]
        value = read_torch(file.part(begin, begin + length), Kind.ZIP)
        if not isinstance(value, Tensor) or tuple(value.shape) != sizes:
            raise self._incomplete(name)
        return value

    def _file(self, name: str) -> Content:
        path = self.folder / name
        if name not in self.files:
            if not path.is_file():
                raise CheckpointError(
                    f"{self.folder} has tensors in {quote(name)}, which does not exist.",
                    "Copy the whole folder of the checkpoint.",
                )
            self.files[name] = Content.read(path)
        return self.files[name]

    def _incomplete(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder} does not contain all parts of {quote(name)}.",
            "Copy the whole folder of the checkpoint.",
        )


def _numbers(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values or ())
