"""Which state dict in a file is taken, and which names the others have.

Terms:
    key: the dotted path of a state dict in the file (``ema.state_dict``); the file itself has none.
    module: a pickled ``nn.Module``, which is an :class:`Object` here. Its tensors are found as
        ``state_dict()`` finds them, without its code.

The only state dict in a file is taken, under any key, up to three levels deep. Where there are
several, the order is:

1. what stands under a key of ``WRAPPER_KEYS``, in that order: the trained weights before their
   moving average, a student before its teacher;
2. what stands under any other key, or the file itself if it has tensors: the largest first.

The state of optimizers, schedulers, gradient scalers, metrics and losses is never taken, unless
its key is asked for.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pathconvert.errors import CheckpointError
from pathconvert.files.refusals import listing, one_line, quote
from pathconvert.files.tensors import Array
from pathconvert.files.unpickling import Object
from pathconvert.files.weights import STATE_DICT_TIP

#: Keys of state dicts in order of preference.
WRAPPER_KEYS = (
    "state_dict", "model", "model_state", "model_state_dict", "net", "network", "module", "student",
    "weights", "params", "blobs", "model_ema", "ema", "state_dict_ema", "ema_state_dict",
    "ema_model", "model_ema_state_dict", "params_ema", "teacher",
)  # fmt: skip

#: Keys under which training scripts save what they were called with.
_SETTINGS = ("args", "hyper_parameters", "hparams", "config", "cfg", "opt", "options")

#: The name of a network, as other texts under the same keys are not.
_NETWORK = re.compile(r"[\w.:/-]{1,200}")

_DATA_MODULES = {
    *("argparse", "collections", "copyreg", "datetime", "decimal", "enum", "fractions"),
    *("functools", "pathlib", "types", "typing", "uuid", "_codecs"),
}
_NEVER = re.compile(
    r"optim|sched|scaler|(^|_)amp$|rng|callback|loops|message_hub|metric|history|criterion|loss"
    r"|_extra_state|_metadata|exp_avg"
)
_DEPTH = 3
_MOST_ENTRIES = 500_000
_MOST_STATES = 1000
_DEEPEST_MODULE = 100
_MOST_MODULES = 100_000

#: Classes of modules that hold another, and the name that they hold it under.
WRAPPED_IN = {"DataParallel": "module", "DistributedDataParallel": "module",
             "AveragedModel": "module", "OptimizedModule": "_orig_mod",
             "FullyShardedDataParallel": "_fsdp_wrapped_module"}  # fmt: skip


@dataclass(frozen=True, eq=False)
class State:
    """A state dict in a file.

    Attributes:
        path: the keys that lead to it; empty if it is the file itself.
        entries: what it has under its names.
        module: the dotted name of the class, if it is a module's; else None.
    """

    path: tuple[str, ...]
    entries: Mapping[Any, object] = field(repr=False)
    module: str | None = None

    @property
    def key(self) -> str | None:
        """The dotted path; None if the state dict is the file itself."""
        return ".".join(self.path) or None


def choose_state(path: Path, loaded: object, key: str | None) -> tuple[State, tuple[str, ...]]:
    """Find the state dict to take.

    Args:
        path: the file, for messages.
        loaded: what the file contains.
        key: the dotted key to take, or of what contains it; None for the order above.

    Returns:
        The state dict, and the keys of the others.

    Raises:
        CheckpointError: the file has no state dict, or not under ``key``.
    """
    found = [state for state in _states(loaded) if not _is_beside(state)]
    if key is not None:
        wanted = _under(loaded, key)
        if not wanted:
            raise _no_such_key(path, key, found)
        chosen = min(wanted, key=_rank)
    elif found:
        chosen = min(found, key=_rank)
    else:
        raise _no_state(path, loaded)
    others = [state.key for state in sorted(found, key=_rank) if state.path != chosen.path]
    return chosen, tuple(other for other in others if other)


def _is_beside(state: State) -> bool:
    """Whether a state dict belongs to something beside the network: an optimizer, a loss, …"""
    kind = state.module or ""
    losses = kind.startswith("torch.nn.modules.loss.") or kind.endswith("Loss")
    return losses or any(map(_NEVER.search, state.path))


def _rank(state: State) -> tuple[Any, ...]:
    """The place of a state dict in the order; the least is taken."""
    last = len(WRAPPER_KEYS)
    places = [WRAPPER_KEYS.index(s) if s in WRAPPER_KEYS else last for s in state.path or ("",)]
    size = _size(state.entries)
    return places[0], -size if places[0] == last else 0, places[1:], -size


def _size(entries: Mapping[Any, object]) -> int:
    return sum(value.numel() for value in entries.values() if isinstance(value, Tensor))


def _states(loaded: object, path: tuple[str, ...] = ()) -> list[State]:
    """Every state dict in a value, in the order of the file."""
    found: list[State] = []
    known: dict[int, State | None] = {}  # a hostile file refers to one value without limit
    left = _MOST_ENTRIES
    level = [(path, loaded)]
    for _ in range(_DEPTH + 1):
        deeper = []
        for place, value in level:
            left -= 1 + len(_inside(value))
            if left < 0 or len(found) == _MOST_STATES:
                return found
            if id(value) not in known:
                known[id(value)] = _as_state(place, value)
            state = known[id(value)]
            if state:
                found.append(replace(state, path=place))
            if not state or not state.module:  # what is in a module belongs to it
                deeper += [((*place, name), child) for name, child in _children(value).items()]
        level = deeper
    return found


def _under(loaded: object, key: str) -> list[State]:
    """The state dicts under a dotted key, in which a name may have dots itself."""
    value, rest = loaded, key
    path: tuple[str, ...] = ()
    while rest:
        children = _children(value)
        names = [name for name in children if rest == name or rest.startswith(f"{name}.")]
        if not names:
            return []
        name = max(names, key=len)
        value, path, rest = children[name], (*path, name), rest[len(name) + 1 :]
    return _states(value, path)


def _inside(value: object) -> Mapping[Any, object] | Sequence[object]:
    """What a value contains."""
    if isinstance(value, Object):
        return value.entries or value.state
    return value if isinstance(value, (dict, list, tuple)) else ()


def _children(value: object) -> dict[str, object]:
    """The containers in a value, by name."""
    inside = _inside(value)
    if not isinstance(inside, Mapping):
        inside = {str(i): item for i, item in enumerate(inside[:100])}
    return {
        name: child
        for name, child in inside.items()
        if isinstance(name, str) and isinstance(child, (dict, list, tuple, Object))
    }


def _as_state(path: tuple[str, ...], value: object) -> State | None:
    """The value as a state dict; None for any other value."""
    if isinstance(value, Object) and is_module(value):
        entries: Mapping[Any, object] = _module_entries(value)
        if not any(map(is_weight, entries.values())):
            return None
        return State(path, entries, one_line(innermost(value).name))
    entries = value.entries if isinstance(value, Object) else value  # type: ignore[assignment]
    if not isinstance(entries, dict) or {"state", "param_groups"} <= entries.keys():
        return None
    found = any(
        is_weight(entry) or "_packed_params" in name  # of quantized layers, which are refused later
        for name, entry in entries.items()
        if isinstance(name, str)
    )
    return State(path, entries) if found else None


def is_weight(value: object) -> bool:
    """Whether a value is a tensor with dimensions, or was meant to be one."""
    if isinstance(value, Tensor):
        return value.ndim > 0
    if isinstance(value, Array):
        return value.value is not None and value.value.ndim > 0
    return is_tensor_like(value)


def is_tensor_like(value: object) -> bool:
    """Whether a value is a tensor of a kind that is not made here (sparse, quantized, …)."""
    return isinstance(value, Object) and bool(
        re.match(r"torch\.(_utils\._rebuild|_tensor\._rebuild|distributed\.\S*Tensor$)", value.name)
    )


# ---- modules -------------------------------------------------------------------------------------


def is_module(value: Object) -> bool:
    """Whether an object has what every ``nn.Module`` has."""
    return all(
        isinstance(value.state.get(name), dict) for name in ("_parameters", "_buffers", "_modules")
    )


def innermost(module: Object) -> Object:
    """The module inside of wrappers, whose class says more than theirs.

    A wrapper that contains itself ends at a limit.
    """
    for _ in range(_DEEPEST_MODULE):
        held = WRAPPED_IN.get(module.name.rpartition(".")[2])
        inner = dict(_items(module, "_modules")).get(held or "")
        if not isinstance(inner, Object) or not is_module(inner):
            break
        module = inner
    return module


def _module_entries(module: Object) -> dict[str, object]:
    """Names and values of a module's ``state_dict()``, in its order.

    A module that contains itself, or one module without limit, ends at a limit.
    """
    entries: dict[str, object] = {}
    waiting = [("", 0, module)]
    for _ in range(_MOST_MODULES):
        if not waiting:
            break
        prefix, depth, current = waiting.pop()
        hidden = current.state.get("_non_persistent_buffers_set", ())
        hidden = hidden if isinstance(hidden, (set, list, tuple)) else ()
        for name, value in (*_items(current, "_parameters"), *_items(current, "_buffers")):
            if value is not None and name not in hidden:
                entries[f"{prefix}{name}"] = value
        children = [
            (f"{prefix}{name}.", depth + 1, child)
            for name, child in _items(current, "_modules")
            if isinstance(child, Object) and is_module(child) and depth < _DEEPEST_MODULE
        ]
        waiting += reversed(children)  # the last is taken first
    return entries


def _items(module: Object, kind: str) -> list[tuple[str, object]]:
    values = module.state[kind]
    return [(k, v) for k, v in values.items() if type(k) is str] if isinstance(values, dict) else []


def object_at(value: Any, path: tuple[str, ...]) -> Any:
    """What lies at the path of a :class:`State`; None if nothing does.

    Args:
        value: what a file contains, as inert values or really loaded.
        path: keys of dictionaries, names of attributes and positions in lists.
    """
    for name in path:
        if isinstance(value, Object):
            value = {**value.state, **value.entries}.get(name)
        elif isinstance(value, Mapping):
            value = value.get(name)
        elif isinstance(value, (list, tuple)):
            value = value[int(name)]
        else:
            value = getattr(value, name, None)
    return value


def architecture_beside(loaded: object) -> dict[str, Any] | None:
    """``{"arch": ...}`` if a training script saved the network's name beside its weights.

    timm, the ImageNet example of PyTorch and others save ``arch``; torchvision's scripts and
    many others save their arguments, with the name among them.
    """
    if not isinstance(loaded, dict):
        return None
    for holder in (loaded, *(loaded.get(name) for name in _SETTINGS)):
        settings = holder.state or holder.entries if isinstance(holder, Object) else holder
        if not isinstance(settings, dict):
            continue
        for name in ("arch", "architecture", "model_name", "model"):
            value = settings.get(name)
            if isinstance(value, str) and _NETWORK.fullmatch(value):
                return {"arch": value}
    return None


# ---- refusals ------------------------------------------------------------------------------------


def _no_such_key(path: Path, key: str, found: list[State]) -> CheckpointError:
    keys = [state.key for state in found if state.key]
    if not keys:
        return CheckpointError(
            f"{path} has no key {quote(key)}: it is a state dict itself.", "Leave out the key."
        )
    return CheckpointError(
        f"{path} has no weights under {quote(key)}.", f"The keys with weights: {listing(keys)}."
    )


def _no_state(path: Path, loaded: object) -> CheckpointError:
    """The refusal of a file in which no state dict was found."""
    called = _calls(loaded)
    if called:
        return CheckpointError(
            f"{path} is a pickle with code in it and without weights (it calls"
            f" {listing(called)}); nothing of it was executed.",
            "Do not load it. Ask for the weights as .safetensors, or as a state dict from a source"
            " you trust.",
        )
    if isinstance(loaded, Mapping):
        keys = f"its keys: {listing(loaded)}"
        if _is_optimizer(loaded) or any(_is_optimizer(value) for value in loaded.values()):
            return CheckpointError(
                f"{path} is a checkpoint of an optimizer only, without the network's weights"
                f" ({keys}).",
                STATE_DICT_TIP,
            )
        return CheckpointError(
            f"{path} contains a dictionary without tensors ({keys}).", STATE_DICT_TIP
        )
    return CheckpointError(
        f"{path} contains {_described(loaded)}; expected a state dict.", STATE_DICT_TIP
    )


def _calls(loaded: object) -> list[str]:
    """The functions of the standard library that a pickle would call, as far as it shows them."""
    found: dict[str, None] = {}
    level = [loaded]
    for _ in range(_DEPTH):
        objects = [value for value in level if isinstance(value, Object)]
        found |= dict.fromkeys(value.name for value in objects if _acts(value.name))
        level = [child for value in level[:1000] for child in _children(value).values()]
    return list(found)


def _acts(name: str) -> bool:
    """Whether ``name`` is of a module of the standard library that does not only hold data."""
    root = name.partition(".")[0]
    return root in (sys.stdlib_module_names | {"nt", "__builtin__"}) - _DATA_MODULES


def _is_optimizer(value: object) -> bool:
    return isinstance(value, Mapping) and "state" in value and "param_groups" in value


def _described(value: object) -> str:
    """What a value is, in words."""
    if isinstance(value, Array) and value.value is not None:
        return f"a single array of shape {list(value.value.shape)}"
    if isinstance(value, Object):
        return f"an object of the class {one_line(value.name)}, which was not made"
    if isinstance(value, Tensor):
        return f"a single tensor of shape {list(value.shape)}"
    if isinstance(value, (list, tuple)):
        kinds = dict.fromkeys(type(item).__name__ for item in value)
        return f"a {type(value).__name__} of {len(value)} ({listing(kinds)})"
    return f"an object of type {type(value).__name__}"
