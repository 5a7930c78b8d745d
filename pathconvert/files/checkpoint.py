"""Read checkpoints as people have them, safely.

Terms:
    state dict: tensor name → tensor, as ``model.state_dict()`` gives it.
    key: the dotted path of the state dict in the file (``model_ema``); see :mod:`.states`, which
        also says which one is taken where there are several.
    prefix: the text that data-parallel and compiled modules put before every name (``module.``,
        ``_orig_mod.``).
    metadata: this package's own JSON object. A safetensors file carries it in its header under
        ``pathconvert``. A ``.pt`` file carries it in the state dict's ``_metadata``, where torch
        keeps its version numbers and where ``load_state_dict(strict=True)`` ignores additional
        entries.

Reading executes nothing: pickles run in :mod:`.unpickling`, which only makes tensors, numbers and
plain containers. Only if the caller trusts the file is a pickled module also loaded as such.
"""

import hashlib
import json
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pathconvert.errors import CheckpointError
from pathconvert.files.containers import Container, Loaded, load_file
from pathconvert.files.filetypes import Kind, recognise
from pathconvert.files.folders import read_folder, read_index
from pathconvert.files.refusals import AGAIN, one_line, quote, reading, reason
from pathconvert.files.states import (
    WRAPPED_IN,
    State,
    architecture_beside,
    choose_state,
    is_tensor_like,
    object_at,
)
from pathconvert.files.tensors import Array, as_tensor
from pathconvert.files.unpickling import Object
from pathconvert.files.weights import FLOAT_TIP, STATE_DICT_TIP, integer_weights

#: What :func:`_strip_prefix` strips.
_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The weights in a file.

    Attributes:
        path: the file, or the folder.
        tensors: every plain tensor of the state dict, on the CPU, in file order; their names lack
            ``prefix``.
        key: the dotted key that was taken (``"model_ema"``, ``"ema.state_dict"``); None if the
            file is a state dict.
        key_path: the keys that ``key`` joins, which may have dots themselves.
        key_in_dicts: whether every key is one of a dictionary, and none a place in a list or an
            attribute.
        prefix: what was stripped from every name (``"module._orig_mod."``); empty if nothing was.
        metadata: this package's own metadata; None if the file carries none.
        others: the dotted keys of the other state dicts in the file, in the order of preference.
        skipped: names of entries that are not plain tensors and were left out.
        container: how the file stores tensors.
        module: the dotted name of the class, if the weights are those of a pickled module.
        config: what is known of the network beside its tensors: Hugging Face's and timm's
            ``config.json``, or ``{"arch": ...}`` as a training script saves it.
        trusted: the pickled module itself, if the caller trusts the file and it holds one.
        digest: the SHA-256 as it was computed while the file was read; empty if it was not. Read
            :attr:`sha256` instead.
    """

    path: Path
    tensors: dict[str, Tensor] = field(repr=False)
    key: str | None
    prefix: str
    metadata: dict[str, Any] | None
    others: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    container: Container = Container.ZIP
    module: str | None = None
    config: dict[str, Any] | None = None
    trusted: nn.Module | None = None
    digest: str = field(default="", repr=False)
    key_path: tuple[str, ...] = ()
    key_in_dicts: bool = True

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file, in hexadecimal; for a checkpoint in several files, of their digests.

        Raises:
            CheckpointError: the file has to be read again for that, and cannot be read.
        """
        if self.digest:
            return self.digest
        with reading(self.path), self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def read_checkpoint(
    path: str | Path, *, key: str | None = None, trust_pickle: bool = False
) -> Checkpoint:
    """Read the weights in a file or a folder, which is recognised by its content.

    Args:
        path: a file by torch.save of any age, a safetensors file, a pickle of NumPy arrays, one of
            these in a zip or gz file, the index of a checkpoint in several files, or a folder
            with a checkpoint in it.
        key: the dotted key to take, or of what contains it; None takes the state dict that
            :mod:`.states` prefers.
        trust_pickle: if the weights are those of a pickled module, also load the module itself,
            which executes whatever code the file contains.

    Raises:
        CheckpointError: the file is not a checkpoint, is damaged, or has no tensors, or a tensor
            claims more elements than are stored.
    """
    path = Path(path)
    loaded = _load(path)
    state, others = choose_state(path, loaded.value, key)
    found, skipped = _only_tensors(path, state)
    tensors, prefix, dropped = _strip_prefix(found)
    text = _metadata_text(state.entries) if loaded.metadata is None else loaded.metadata
    wanted = trust_pickle and state.module is not None
    return Checkpoint(
        path=loaded.path,
        tensors=_released(tensors, loaded.size),
        key=state.key,
        prefix=prefix,
        metadata=_parse_metadata(path, text),
        others=others,
        skipped=(*skipped, *dropped),
        container=loaded.container,
        module=state.module,
        config=loaded.config or architecture_beside(loaded.value),
        trusted=_trusted_module(loaded, state) if wanted else None,
        digest=loaded.digest(),
        key_path=state.path,
        key_in_dicts=all(
            isinstance(object_at(loaded.value, state.path[:depth]), dict)
            for depth in range(len(state.path))
        ),
    )


def _load(path: Path) -> Loaded:
    """What is in a file, in the files of an index, or in a folder."""
    if path.is_dir():
        return read_folder(path)
    if recognise(path) is Kind.INDEX:
        return read_index(path)
    return load_file(path)


# ---- tensors -------------------------------------------------------------------------------------


def _only_tensors(path: Path, state: State) -> tuple[dict[str, Tensor], list[str]]:
    """The plain tensors of a state dict, and the names of its other entries.

    Raises:
        CheckpointError: an entry is a tensor of another kind, or one that is not all there.
    """
    tensors: dict[str, Tensor] = {}
    skipped: list[str] = []
    arrays: dict[int, Tensor] = {}
    for name, value in state.entries.items():
        if _is_quantized(name, value):
            raise integer_weights(path, name, "quantized")
        if isinstance(name, str) and isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(name, str) and isinstance(value, Array) and value.value is not None:
            if id(value.value) not in arrays:
                arrays[id(value.value)] = as_tensor(value.value)
            tensors[name] = arrays[id(value.value)]
        elif is_tensor_like(value):
            raise _unusual_tensor(path, name, value)
        else:
            skipped.append(one_line(name if isinstance(name, str) else repr(name)))
    if not tensors:
        raise CheckpointError(f"{path} contains no tensors.", STATE_DICT_TIP)
    return tensors, skipped


def _is_quantized(name: object, value: object) -> bool:
    """Whether an entry is a quantized tensor, or the packed form of some."""
    packed = isinstance(name, str) and "_packed_params" in name
    return packed or (isinstance(value, Object) and value.name == "torch._utils._rebuild_qtensor")


def _unusual_tensor(path: Path, name: object, value: object) -> CheckpointError:
    """The refusal of a tensor that is not dense, or not all there."""
    if isinstance(value, Object) and value.flaw:
        return CheckpointError(
            f"{path} contains {quote(name)}, which cannot be read: {one_line(value.flaw)}.", AGAIN
        )
    kind = one_line(value.name.rpartition(".")[2]) if isinstance(value, Object) else ""
    return CheckpointError(
        f"{path} contains {quote(name)}, which is not a plain dense tensor ({kind}).", FLOAT_TIP
    )


def _strip_prefix(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str, list[str]]:
    """Strip the prefixes that all names carry.

    ``AveragedModel`` keeps its counter ``n_averaged`` beside the prefixed names; the counter is
    dropped.

    Returns:
        The tensors under their shorter names, what was stripped, and the names that were dropped.
    """
    stripped, dropped = "", list[str]()
    while True:
        counted = {name: tensor for name, tensor in tensors.items() if name != "n_averaged"}
        if counted and all(name.startswith("module.") for name in counted):
            dropped += [f"{stripped}n_averaged"] * (len(tensors) - len(counted))
            tensors = counted
        prefix = next(
            (p for p in _PREFIXES if tensors and all(name.startswith(p) for name in tensors)), ""
        )
        if not prefix:
            return tensors, stripped, dropped
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        stripped += prefix


def _released(tensors: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """The tensors, without the memory of the rest of the file if that is the larger part."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in tensors.values()}  # fmt: skip
    if sum(storages.values()) > size / 2:
        return tensors
    copies: dict[Any, Tensor] = {}
    for tensor in tensors.values():
        place = _place(tensor)
        if place not in copies and tensor.numel() <= _stored(tensor):
            copies[place] = tensor.clone()
    return {name: copies.get(_place(tensor), tensor) for name, tensor in tensors.items()}


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies; tied tensors have the same place."""
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _stored(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size()


# ---- pickled modules -----------------------------------------------------------------------------


def _trusted_module(file: Loaded, state: State) -> nn.Module:
    """The pickled module itself, which executes the code that its file contains."""
    path = file.path
    try:
        with warnings.catch_warnings(), path.open("rb") as opened:
            warnings.simplefilter("ignore")
            if file.container is Container.PICKLE:
                loaded = pickle.load(opened)
            else:
                loaded = torch.load(opened, map_location="cpu", weights_only=False)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is a pickled module whose code is missing here: {reason(error)}.",
            "Run where its class can be imported, or leave out --trust-pickle.",
        ) from error
    except Exception as error:  # the trusted code can raise anything
        raise CheckpointError(
            f"{path} is a pickled module that cannot be loaded; torch says: {reason(error)}.",
            "Leave out --trust-pickle.",
        ) from error
    module = object_at(loaded, state.path)
    while isinstance(module, nn.Module) and type(module).__name__ in WRAPPED_IN:
        module = getattr(module, WRAPPED_IN[type(module).__name__], None)
    if not isinstance(module, nn.Module):
        raise CheckpointError(
            f"{path} contains {state.module} as it is stored, but it is not a module once loaded.",
            "Leave out --trust-pickle.",
        )
    return module


# ---- metadata ------------------------------------------------------------------------------------


def _metadata_text(state: Mapping[Any, object]) -> object:
    """The JSON text in a state dict's ``_metadata``; None without one."""
    versions = getattr(state, "_metadata", None)
    entry = versions.get("pathconvert") if isinstance(versions, Mapping) else None
    return entry.get("json") if isinstance(entry, Mapping) else entry


def _parse_metadata(path: Path, text: object) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        metadata = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise CheckpointError(
            f"{path} has damaged pathconvert metadata: it is not a JSON object.", AGAIN
        )
    return metadata
