"""The index of the networks that can be recognised, and the names that old files use.

``architectures.json`` has for each network the CRC-32 of ``name:shape`` of every tensor (with
auxiliary heads, without counters), and of the names alone of its layers' weights: tensors of two
dimensions and more. The shapes find a network whose tensors are all there; the names find the one
that a changed network was made from. ``make_index.py`` writes the file from the torchvision that is
installed.
"""

from __future__ import annotations

import functools
import json
import re
import zlib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from torch import Tensor

INDEX_VERSION = 2
COUNTER = "num_batches_tracked"
#: Name of a tensor → its shape.
Shapes = Mapping[str, tuple[int, ...]]
_DIGITS = 8  # of a CRC-32 in hexadecimal


@dataclass(frozen=True)
class Match:
    """How much a set of tensors has in common with a network of the index.

    Attributes:
        name: the network.
        hits: the number of tensors that both have.
        share: ``hits`` over the number of tensors that either has (the Jaccard index).
    """

    name: str
    hits: int
    share: float


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """The shape of every tensor by name, without counters."""
    return {
        name: tuple(tensor.shape) for name, tensor in tensors.items() if not name.endswith(COUNTER)
    }


def codes_of(shapes: Shapes) -> set[str]:
    """The CRC-32 of every ``name:shape``, as eight hexadecimal digits: the index's codes."""
    return {_code(f"{name}:{shape}") for name, shape in shapes.items()}


def layer_codes_of(shapes: Shapes) -> set[str]:
    """The CRC-32 of the name of every tensor of two dimensions and more."""
    return {_code(name) for name, shape in shapes.items() if len(shape) > 1}


def _code(text: str) -> str:
    return f"{zlib.crc32(text.encode()):0{_DIGITS}x}"


@functools.cache
def index() -> dict[str, dict[str, Any]]:
    """The index in ``architectures.json``: network → its entry."""
    text = resources.files("pathconvert.networks").joinpath("architectures.json").read_text()
    networks: dict[str, dict[str, Any]] = json.loads(text)["networks"]
    return networks


@functools.cache
def _inverted(kind: str) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Code → the networks that have it, and network → the number of its codes."""
    networks: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for name, entry in index().items():
        text = entry[kind]
        sizes[name] = len(text) // _DIGITS
        for start in range(0, len(text), _DIGITS):
            networks.setdefault(text[start : start + _DIGITS], []).append(name)
    return networks, sizes


def _matches(codes: Collection[str], kind: str) -> list[Match]:
    networks, sizes = _inverted(kind)
    hits = Counter(name for code in codes for name in networks.get(code, ()))
    found = [Match(name, n, n / (len(codes) + sizes[name] - n)) for name, n in hits.items()]
    order = {name: place for place, name in enumerate(sizes)}
    return sorted(found, key=lambda match: (-match.share, order[match.name]))


def matches(shapes: Shapes) -> list[Match]:
    """The networks that have tensors of these names and shapes, the most alike first."""
    return _matches(codes_of(shapes), "codes")


def layer_matches(shapes: Shapes) -> list[Match]:
    """The networks that have layers of these names, whatever their shapes; most alike first."""
    return _matches(layer_codes_of(shapes), "layers")


# ---- names that old files use --------------------------------------------------------------------

_OLD_NAMES: list[tuple[str, Any]] = [
    # torchvision/models/densenet.py
    (r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)", r"\1\2"),
    # torchvision/ops/feature_pyramid_network.py
    (r"(.*fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)", r"\1.0.\2"),
    # torchvision/models/detection/rpn.py
    (r"(rpn\.head\.conv)\.(weight|bias)", r"\1.0.0.\2"),
    # torchvision/models/detection/mask_rcnn.py
    (
        r"(.*mask_head)\.mask_fcn(\d)\.(weight|bias)",
        lambda m: f"{m[1]}.{int(m[2]) - 1}.0.{m[3]}",
    ),
]
_OLD_RETINANET = (
    r"(head\.\w+_head\.conv)\.([0246])\.(weight|bias)",
    lambda m: f"{m[1]}.{int(m[2]) // 2}.0.{m[3]}",
)


def modern_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of old DenseNet and detection checkpoints.

    They get the names that torchvision uses now. torchvision's own files still have the old names,
    and it renames them while loading. The order is kept.
    """
    # the weight of FCOS's GroupNorm; in FCOS, ``conv.0.weight`` is a current name
    fcos = "head.classification_head.conv.1.weight" in tensors
    rules = _OLD_NAMES if fcos else [*_OLD_NAMES, _OLD_RETINANET]
    return {_modern(name, rules): tensor for name, tensor in tensors.items()}


def _modern(name: str, rules: list[tuple[str, Any]]) -> str:
    return next((re.sub(old, new, name) for old, new in rules if re.fullmatch(old, name)), name)
