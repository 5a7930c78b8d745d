"""The settings of a pickled module, read without running its code.

A pickle has the class and the attributes of every module: strides, dilations, which layer a
ReLU is. :func:`settings_of` reads them as inert values, so that a pickled ResNet with dilations is
told from the stock network that has the same tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from pathconvert.files.checkpoint import Checkpoint
from pathconvert.files.containers import load_file
from pathconvert.files.states import choose_state, innermost, is_module, object_at
from pathconvert.files.unpickling import Object

#: Dotted path of a module in a pickled one → its class under ``class``, and its attributes.
Settings = Mapping[str, Mapping[str, Any]]

_DEEPEST = 100
#: Attributes that do not change what torchvision's networks compute in evaluation mode.
_WITHOUT_EFFECT = {"inplace", "training", "momentum", "p", "aux_logits", "dropout"}


def settings_of(checkpoint: Checkpoint) -> Settings | None:
    """What the pickle of a module says of the modules in it.

    The file is read again for that, as only whole pickled modules need it.

    Returns:
        The classes and the plain attributes; None if the weights are not a pickled module's, or
        come from several files.

    Raises:
        CheckpointError: the file cannot be read again.
    """
    if checkpoint.module is None or checkpoint.path.is_dir():
        return None
    loaded = load_file(checkpoint.path)
    state, _ = choose_state(checkpoint.path, loaded.value, checkpoint.key)
    found = object_at(loaded.value, state.path)
    if not isinstance(found, Object) or not is_module(found):
        return None
    return dict(_modules(innermost(found)))


def _children(module: Object) -> dict[str, Object]:
    inner = module.state["_modules"]
    assert isinstance(inner, dict)  # is_module has looked
    return {
        name: child
        for name, child in inner.items()
        if isinstance(name, str) and isinstance(child, Object) and is_module(child)
    }


def _modules(
    module: Object, path: str = "", depth: int = 0
) -> Iterator[tuple[str, dict[str, Any]]]:
    attributes = {
        name: value
        for name, value in module.state.items()
        if isinstance(name, str) and not name.startswith("_") and _is_plain(value)
    }
    yield path, attributes | {"class": module.name, "added": list(_added(module))}
    if depth < _DEEPEST:
        for name, child in _children(module).items():
            yield from _modules(child, f"{path}.{name}" if path else name, depth + 1)


def _added(module: Object) -> Iterator[str]:
    """What a module computes beside its class's forward: a forward of its own, and hooks.

    The hooks of pruning and of weight and spectral norm only compute weights.
    """
    if "forward" in module.state:
        yield "a forward of its own"
    for kind in ("_forward_pre_hooks", "_forward_hooks"):
        hooks = module.state.get(kind)
        for hook in hooks.values() if isinstance(hooks, dict) else ():
            if not str(getattr(hook, "name", "")).startswith("torch.nn.utils."):
                yield "a forward hook"


def _is_plain(value: object) -> bool:
    """Whether a value is a number, a text, None, or a sequence of these."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def other_settings(stock: nn.Module, settings: Settings) -> Iterator[str]:
    """How the modules in a pickled network differ from the stock network's, one text each."""
    modules = dict(stock.named_modules(remove_duplicate=False))
    for path, expected in modules.items():
        saved = settings.get(path)
        if saved is None:
            yield f"{path} is missing"
        elif saved["class"] != class_of(expected):
            yield f"{path or 'it'} is a {saved['class']}, expected {class_of(expected)}"
        else:
            yield from (f"{path or 'it'} has {what}" for what in saved.get("added", ()))
            for name, value in saved.items():
                own = vars(expected).get(name, value)
                if (
                    name not in {"class", "added", *_WITHOUT_EFFECT}
                    and _is_plain(own)
                    and own != value
                ):
                    at = f"{path}.{name}" if path else name
                    yield f"{at} = {value!r}, expected {own!r}"
    for path in settings.keys() - modules.keys():
        yield f"{path} is extra"


def class_of(module: nn.Module) -> str:
    """The qualified name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"
