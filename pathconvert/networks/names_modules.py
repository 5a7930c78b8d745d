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
from pathconvert.files.states import WRAPPED_IN, choose, is_module
from pathconvert.files.unpickling import Object

Settings = Mapping[str, Mapping[str, Any]]
"""Dotted path of a module in a pickled one → its class under ``class``, and its attributes."""

_DEEPEST = 100
_WITHOUT_EFFECT = {"inplace", "training", "momentum", "p", "aux_logits", "dropout"}
"""Attributes that do not change what torchvision's networks compute in evaluation mode."""


def settings_of(checkpoint: Checkpoint) -> Settings | None:
    """What the pickle of a module says of the modules in it.

    The file is read again for that, as only whole pickled modules need it.

    Returns:
        The classes and the plain attributes; None if the weights are not a pickled module's.
    """
    if checkpoint.module is None or checkpoint.path.is_dir():
        return None
    loaded = load_file(checkpoint.path)
    state, _ = choose(checkpoint.path, loaded.value, checkpoint.key)
    found = _unwrapped(_at(loaded.value, state.path))
    return None if found is None else dict(_modules(found))


def _at(value: object, path: tuple[str, ...]) -> object:
    for name in path:
        if isinstance(value, Object):
            value = {**value.state, **value.entries}.get(name)
        elif isinstance(value, dict):
            value = value.get(name)
        elif isinstance(value, list | tuple):
            value = value[int(name)]
    return value


def _unwrapped(value: object) -> Object | None:
    """The network inside the wrappers of data parallel training and the like."""
    for _ in range(_DEEPEST):
        if not isinstance(value, Object) or not is_module(value):
            return None
        held = WRAPPED_IN.get(value.name.rpartition(".")[2])
        if held is None:
            return value
        value = _children(value).get(held)
    return None


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
        if isinstance(name, str) and not name.startswith("_") and is_plain(value)
    }
    yield path, attributes | {"class": module.name}
    if depth < _DEEPEST:
        for name, child in _children(module).items():
            yield from _modules(child, f"{path}.{name}" if path else name, depth + 1)


def is_plain(value: object) -> bool:
    """Whether a value is a number, a text, None, or a sequence of these."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def other_settings(stock: nn.Module, settings: Settings) -> Iterator[str]:
    """How the modules in a pickled network differ from the stock network's, one text each."""
    modules = dict(stock.named_modules(remove_duplicate=False))
    for path, expected in modules.items():
        saved = settings.get(path)
        if saved is None:
            yield f"{path} is missing"
        elif saved["class"] != class_of(expected):
            yield f"{path} is a {saved['class']}, expected {class_of(expected)}"
        else:
            for name, value in saved.items():
                own = vars(expected).get(name, value)
                if name not in {"class", *_WITHOUT_EFFECT} and is_plain(own) and own != value:
                    at = f"{path}.{name}" if path else name
                    yield f"{at} = {value!r}, expected {own!r}"
    for path in settings.keys() - modules.keys():
        yield f"{path} is extra"


def class_of(module: nn.Module) -> str:
    """The qualified name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"
