"""Other libraries' names for torchvision's networks.

A naming says how a library that has the same network names its tensors: from the names in the file
to the names that torchvision uses. It only renames; whether the result is a network is decided
tensor by tensor, as for any other file. ``NAMINGS`` lists all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from pathconvert.errors import ArchitectureError


@dataclass(frozen=True)
class Naming:
    """How a library names the tensors of a network that torchvision has too.

    Attributes:
        what: what the names are, for notes.
        fits: whether a set of names is the library's.
        rename: a name → torchvision's; None for a name that the library's network does not have,
            which then stays as it is.
        assumed: what such names do not show and is assumed where no configuration says it, for a
            note; empty for nothing.
    """

    what: str
    fits: Callable[[Collection[str]], bool]
    rename: Callable[[str], str | None]
    assumed: str = ""


#: Patterns of whole names, and the names that take their place.
Rules = tuple[tuple[str, str], ...]


def _by_rules(rules: Rules) -> Callable[[str], str | None]:
    compiled = [(re.compile(pattern), new) for pattern, new in rules]

    def rename(name: str) -> str | None:
        for pattern, new in compiled:
            if found := pattern.fullmatch(name):
                return found.expand(new)
        return None

    return rename


def _numbered(what: str, children: dict[int, str], *some: str) -> Naming:
    """``nn.Sequential(*network.children())``: numbers instead of the children's names.

    Args:
        what: as in :class:`Naming`.
        children: number → name of the child in torchvision's network.
        some: names that only such a network has.
    """

    def rename(name: str) -> str | None:
        number, _, rest = name.partition(".")
        child = children.get(int(number)) if number.isdecimal() else None
        return f"{child}.{rest}" if child else None

    return Naming(what, lambda names: all(name in names for name in some), rename)


_HUGGING_FACE: Rules = (
    (r"(?:resnet\.)?embedder\.embedder\.convolution\.(\w+)", r"conv1.\1"),
    (r"(?:resnet\.)?embedder\.embedder\.normalization\.(\w+)", r"bn1.\1"),
    (
        r"(?:resnet\.)?encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut\.convolution\.(\w+)",
        r"layer<\1>.\2.downsample.0.\3",
    ),
    (
        r"(?:resnet\.)?encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut\.normalization\.(\w+)",
        r"layer<\1>.\2.downsample.1.\3",
    ),
    (
        r"(?:resnet\.)?encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.convolution\.(\w+)",
        r"layer<\1>.\2.conv<\3>.\4",
    ),
    (
        r"(?:resnet\.)?encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.normalization\.(\w+)",
        r"layer<\1>.\2.bn<\3>.\4",
    ),
    (r"classifier\.1\.(\w+)", r"fc.\1"),
)
_OPEN_MMLAB: Rules = (
    (r"backbone\.((?:conv1|bn1|layer[1-4])\..+)", r"\1"),
    (r"head\.fc\.(weight|bias)", r"fc.\1"),
)


def _hugging_face(name: str) -> str | None:
    """Hugging Face counts stages and layers from 0, torchvision from 1."""
    new = _rename_hugging_face(name)
    return re.sub(r"<(\d)>", lambda m: str(int(m[1]) + 1), new) if new else None


_rename_hugging_face = _by_rules(_HUGGING_FACE)


def _is_hugging_face(names: Collection[str]) -> bool:
    stem = "embedder.embedder.convolution.weight"
    return stem in names or f"resnet.{stem}" in names


def _is_open_mmlab(names: Collection[str]) -> bool:
    return "backbone.conv1.weight" in names and "head.fc.weight" in names


def _is_fastai(names: Collection[str]) -> bool:
    return "0.4.0.conv1.weight" in names and any(name.startswith("1.") for name in names)


def _fastai(name: str) -> str | None:
    """fastai's networks are ``nn.Sequential(body, head)``."""
    part, _, rest = name.partition(".")
    if part == "1":
        return f"fc.{rest}"
    number, _, rest = rest.partition(".")
    child = _RESNET.get(int(number)) if part == "0" and number.isdecimal() else None
    return f"{child}.{rest}" if child else None


# A DenseNet is not among them: its last ReLU is no child, so that nn.Sequential leaves it out.
_RESNET = {0: "conv1", 1: "bn1", 4: "layer1", 5: "layer2", 6: "layer3", 7: "layer4"}
NAMINGS = (
    Naming("fastai's names for a ResNet", _is_fastai, _fastai),
    Naming(
        "Hugging Face's names for a ResNet",
        _is_hugging_face,
        _hugging_face,
        "there is no config.json, so that ReLU and strides as in Hugging Face's own ResNets are"
        " assumed",
    ),
    Naming(
        "OpenMMLab's names for a ResNet",
        _is_open_mmlab,
        _by_rules(_OPEN_MMLAB),
        "the names do not show whether its strides are Caffe's; style='pytorch' is assumed",
    ),
    _numbered(
        "numbered as nn.Sequential numbers a ResNet's children",
        _RESNET,
        "0.weight",
        "1.running_mean",
        "4.0.conv1.weight",
        "7.0.conv1.weight",
    ),
    _numbered(
        "numbered as nn.Sequential numbers the children of a SqueezeNet",
        {0: "features", 1: "classifier"},
        "0.0.weight",
        "0.3.squeeze.weight",
    ),
)

_REFUSED = (
    (
        re.compile(r"(?:.*\.)?backbone\.stem\.0\.weight|(?:.*\.)?stem\.3\.running_mean"),
        "layer1.0.conv1.weight",
        "a ResNet with a deep stem of three convolutions (OpenMMLab's ResNetV1c or V1d),"
        " which torchvision does not have",
    ),
    (
        re.compile(r"(?:.*\.)?stem\.conv1\.norm\.weight"),
        "res2.0.conv1.norm.weight",
        "Detectron2's ResNet, whose names do not say in which convolution its stride is",
    ),
)


def refuse_other_functions(names: Collection[str], where: str) -> None:
    """Refuse networks that resemble torchvision's in their names, and compute something else.

    Args:
        names: of a state dict.
        where: the file, for the message.

    Raises:
        ArchitectureError: the names are such a network's.
    """
    for pattern, beside, what in _REFUSED:
        found = next((name for name in names if pattern.fullmatch(name)), None)
        if found and any(name.endswith(beside) for name in names):
            raise ArchitectureError(
                f"{where} holds {what} ({found})",
                "Name a function or class that builds it: --arch package.module:builder",
            )
