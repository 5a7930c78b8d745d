"""Read ``.pt``, ``.pth`` and ``.safetensors`` files safely.

Terms:
    state dict: tensor name → tensor, as ``model.state_dict()`` gives it.
    wrapper key: the entry of a training script's dictionary under which the state dict lies
        (``model_ema``).
    prefix: the text that data-parallel and compiled modules put before every name (``module.``,
        ``_orig_mod.``).
    metadata: this package's own JSON object. A safetensors file carries it in its header under
        ``pathconvert``. A ``.pt`` file carries it in the state dict's ``_metadata``, where torch
        keeps its version numbers and where ``load_state_dict(strict=True)`` ignores additional
        entries.

Reading executes nothing: ``torch.load(weights_only=True)`` unless the caller trusts the file.
"""

import argparse
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
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pathconvert.errors import CheckpointError, first_line
from pathconvert.files.filetypes import Kind, recognise
from pathconvert.files.pickles import describe_code, legacy_contents, zipped_contents
from pathconvert.files.refusals import AGAIN, EXPECTED, listing, quote, reading
from pathconvert.files.safetensors_header import safetensors_header
from pathconvert.files.weights import (
    FLOAT_TIP,
    STATE_DICT_TIP,
    integer_weights,
    is_quantized,
)

WRAPPER_KEYS = ("state_dict", "model", "model_state", "model_state_dict", "model_ema", "ema")
"""Wrapper keys in order of preference."""

PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The weights in a file.

    Attributes:
        path: the file.
        tensors: the weights, on the CPU, in file order; their names lack ``prefix``.
        key: the wrapper key that was taken (``"model_ema"``, ``"ema.state_dict"``); None if the
            file is a state dict.
        prefix: what was stripped from every name (``"module._orig_mod."``); empty if nothing was.
        metadata: this package's own metadata; None if the file carries none.
    """

    path: Path
    tensors: dict[str, Tensor] = field(repr=False)
    key: str | None
    prefix: str
    metadata: dict[str, Any] | None

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file, in hexadecimal; computed when it is first used."""
        with reading(self.path), self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def read_checkpoint(
    path: str | Path, *, key: str | None = None, trust_pickle: bool = False
) -> Checkpoint:
    """Read the weights in a ``.pt``, ``.pth`` or ``.safetensors`` file, recognised by its content.

    Args:
        path: the file.
        key: the wrapper key to take; None takes the first of ``WRAPPER_KEYS`` that contains
            tensors.
        trust_pickle: also load pickled modules, which executes whatever code the file contains.

    Raises:
        CheckpointError: the file is not a checkpoint, is damaged or is unsafe, or its tensors are
            not usable weights.
    """
    path = Path(path)
    kind = recognise(path)
    loaded: object
    if kind is Kind.SAFETENSORS:
        loaded, text = _load_safetensors(path)
    else:
        loaded, text = _load_torch(path, kind, trust_pickle=trust_pickle), None
    state, chosen = _choose_state(path, _unwrap_module(loaded), key)
    tensors, prefix = _strip_prefix(_only_tensors(path, state))
    if kind is not Kind.SAFETENSORS:
        text = _metadata_text(state)
    return Checkpoint(path, tensors, chosen, prefix, _parse_metadata(path, text))


# ---- loading -------------------------------------------------------------------------------------


def _load_safetensors(path: Path) -> tuple[dict[str, Tensor], object]:
    """Load a safetensors file.

    Returns:
        The tensors, and the text under ``pathconvert`` in the header (None without one).
    """
    names, metadata = safetensors_header(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in names}, metadata.get("pathconvert")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not an intact safetensors file: {_reason(error)}", AGAIN
        ) from error


def _load_torch(path: Path, kind: Kind, *, trust_pickle: bool) -> object:
    try:
        return _torch_load(path, weights_only=True)
    except pickle.UnpicklingError as error:
        refusal = _refuse_pickle(path, kind, error)
        if not trust_pickle:
            raise refusal from error
    except (
        Exception
    ) as error:  # damaged bytes lead to any error: KeyError, struct.error, MemoryError, …
        raise _damaged(path, error) from error
    try:
        return _torch_load(path, weights_only=False)
    except (ImportError, AttributeError) as error:
        message = f"{path} is a pickled module whose code is missing here: {_reason(error)}"
        raise CheckpointError(
            message, "Run where its class can be imported, or give a state dict."
        ) from error
    except Exception as error:  # as above; the trusted code can raise anything too
        raise _damaged(path, error) from error


def _torch_load(path: Path, *, weights_only: bool) -> object:
    # argparse.Namespace: torchvision's training script stores its arguments beside the weights.
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
        warnings.simplefilter("ignore")
        loaded: object = torch.load(path, map_location="cpu", weights_only=weights_only)
    return loaded


def _refuse_pickle(path: Path, kind: Kind, error: Exception) -> CheckpointError:
    """Say why ``weights_only=True`` did not load the file."""
    contents = legacy_contents(path) if kind is Kind.LEGACY else zipped_contents(path)
    if contents.code:
        what, tip = describe_code(contents)
        return CheckpointError(f"{path} is {what}.", tip)
    tip = _resave_tip(path, "model", "model.state_dict()")
    if contents.holds_module:
        name = listing(contents.foreign[:1])
        return CheckpointError(
            f"{path} is a pickled module ({name}), which runs code when loaded; {EXPECTED}.", tip
        )
    if contents.foreign:
        message = (
            f"{path} contains Python objects besides tensors: {listing(contents.foreign)};"
            f" {EXPECTED}."
        )
        return CheckpointError(message, _resave_tip(path, "saved", "saved['state_dict']"))
    if contents.protocol > 2:
        message = (
            f"{path} is pickled with protocol {contents.protocol}; expected torch.save's own, 2."
        )
        return CheckpointError(message, _resave_tip(path, "saved", "saved"))
    return _damaged(path, error)


def _resave_tip(path: Path, name: str, weights: str) -> str:
    load = f"{name} = torch.load({str(path)!r}, weights_only=False)"
    save = f"torch.save({weights}, {str(path.with_suffix('.weights.pt'))!r})"
    return f"If you trust it, save its weights: {load}; {save} -- or pass --trust-pickle."


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is a damaged torch.save file; torch says: {_reason(error)}", AGAIN
    )


def _reason(error: Exception) -> str:
    """The first line of an error of torch's, printable and of limited length.

    The error may quote the file.
    """
    line = "".join(
        c if c.isprintable() else "?" for c in first_line(error, after="WeightsUnpickler error: ")
    )
    return line if len(line) <= 160 else f"{line[:159]}…"


# ---- finding the state dict ----------------------------------------------------------------------


def _unwrap_module(value: object) -> object:
    return value.state_dict() if isinstance(value, nn.Module) else value


def _choose_state(
    path: Path, loaded: object, key: str | None
) -> tuple[Mapping[Any, object], str | None]:
    """Find the state dict in what a file contains.

    Returns:
        The state dict and its wrapper key; None as the key if the file is itself the state dict.
    """
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{path} contains {_describe(loaded)}; expected a state dict.", STATE_DICT_TIP
        )
    states = _wrapped_states(loaded)
    for wanted in WRAPPER_KEYS if key is None else (key,):
        for name, state in states.items():
            if name == wanted or (
                name.startswith(f"{wanted}.") and name.removeprefix(f"{wanted}.") in WRAPPER_KEYS
            ):
                return state, name
    if key is not None:
        raise _no_such_key(path, key, states)
    if not _has_tensors(loaded):
        raise _no_tensors(path, loaded, states)
    return loaded, None


def _wrapped_states(loaded: Mapping[Any, object]) -> dict[str, Mapping[Any, object]]:
    """Every state dict under a key of ``loaded``, or under a wrapper key one level deeper."""
    states: dict[str, Mapping[Any, object]] = {}
    for name, value in loaded.items():
        inner = _unwrap_module(value)
        if not isinstance(name, str) or not isinstance(inner, Mapping) or _is_optimizer(inner):
            continue
        nested = {
            deeper: _unwrap_module(inner[deeper]) for deeper in WRAPPER_KEYS if deeper in inner
        }
        for deeper, state in nested.items():
            if isinstance(state, Mapping) and _has_tensors(state):
                states[f"{name}.{deeper}"] = state
                break
        else:
            if _has_tensors(inner):
                states[name] = inner
    return states


def _has_tensors(state: Mapping[Any, object]) -> bool:
    return any(isinstance(value, Tensor) for value in state.values())


def _is_optimizer(value: object) -> bool:
    return isinstance(value, Mapping) and "state" in value and "param_groups" in value


def _no_such_key(path: Path, key: str, states: Mapping[str, object]) -> CheckpointError:
    if not states:
        return CheckpointError(
            f"{path} has no key {quote(key)}: it is a state dict itself.", "Leave out the key."
        )
    return CheckpointError(
        f"{path} has no weights under {quote(key)}.", f"The keys with weights: {listing(states)}."
    )


def _no_tensors(
    path: Path, loaded: Mapping[Any, object], states: Mapping[str, object]
) -> CheckpointError:
    keys = f"its keys: {listing(loaded)}"
    if states:
        tip = f"Choose one with --key: {listing(states)}."
        return CheckpointError(
            f"{path} has no weights under any of {', '.join(WRAPPER_KEYS)} ({keys}).", tip
        )
    if _is_optimizer(loaded) or any(_is_optimizer(value) for value in loaded.values()):
        message = (
            f"{path} is a checkpoint of an optimizer only, without the network's weights ({keys})."
        )
        return CheckpointError(message, STATE_DICT_TIP)
    return CheckpointError(
        f"{path} contains a dictionary without tensors ({keys}).", STATE_DICT_TIP
    )


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a single tensor of shape {list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return (
            f"a {type(value).__name__} of {len(value)}"
            f" ({listing(dict.fromkeys(type(v).__name__ for v in value))})"
        )
    return f"an object of type {type(value).__name__}"


def _only_tensors(path: Path, state: Mapping[Any, object]) -> dict[str, Tensor]:
    """The state dict as plain tensors.

    It is refused at the first entry that is not a plain tensor.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if is_quantized(name, value):
            raise integer_weights(path, name, "quantized")
        if not isinstance(name, str) or not isinstance(value, Tensor):
            what = f"{quote(name)}, {_describe(value)}"
            raise CheckpointError(
                f"{path} has an entry that is not a named tensor: {what}.", STATE_DICT_TIP
            )
        plain = type(value) in (Tensor, nn.Parameter, nn.Buffer)
        if not plain or value.layout is not torch.strided or value.device.type != "cpu":
            kind = f"{type(value).__name__}, {value.layout}, on {value.device.type}"
            raise CheckpointError(
                f"{path} contains {quote(name)}, which is not a plain dense tensor ({kind}).",
                FLOAT_TIP,
            )
        tensors[name] = value.detach()
    return tensors


def _strip_prefix(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Strip the prefixes that all names carry.

    ``AveragedModel`` keeps its counter ``n_averaged`` beside the prefixed names; the counter is
    dropped.

    Returns:
        The tensors under their shorter names, and what was stripped.
    """
    stripped = ""
    while True:
        counted = {name: tensor for name, tensor in tensors.items() if name != "n_averaged"}
        if counted and all(name.startswith("module.") for name in counted):
            tensors = counted
        prefix = next(
            (p for p in PREFIXES if tensors and all(name.startswith(p) for name in tensors)), ""
        )
        if not prefix:
            return tensors, stripped
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        stripped += prefix


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
