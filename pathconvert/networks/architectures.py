"""Which networks are supported, and which of them has the tensors of a checkpoint.

``architectures.json`` is an index of torchvision's networks. For each network it has the CRC-32 of
``name:shape`` of every tensor (with auxiliary heads, without counters), where the number of classes
shows, and which argument switches auxiliary heads on. ``make_index.py`` writes the index from the
torchvision that is installed. The index only suggests candidates; each is then built, without
initialising it, and compared with the checkpoint tensor by tensor.
"""

from __future__ import annotations

import ast
import difflib
import functools
import json
import re
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn

from pathconvert.conversion.tracing.ties import first_names
from pathconvert.errors import ArchitectureError
from pathconvert.networks.builders import (
    build_by_path,
    build_timm,
    build_torchvision,
    find_builder,
    timm_input_size,
)

INDEX_VERSION = 1
COUNTER = "num_batches_tracked"
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """How to build a network.

    Attributes:
        name: a torchvision name, ``package.module:builder``, or ``timm/NAME``.
        arguments: the keyword arguments of the builder, JSON-serialisable.
        input_size: the size of an input without the batch dimension; None if it is not known.
        task: classification, video, segmentation, detection or other.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    input_size: tuple[int, ...] | None = None
    task: str = "other"


@dataclass(frozen=True)
class Entry:
    """A line of ``pathconvert archs``.

    ``reason`` says why the network is not supported, and is empty if it is.
    """

    name: str
    task: str
    supported: bool
    reason: str


# ---- the index -----------------------------------------------------------------------------------


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """The shape of every tensor by name, without counters."""
    return {
        name: tuple(tensor.shape) for name, tensor in tensors.items() if not name.endswith(COUNTER)
    }


def codes_of(shapes: Shapes) -> set[str]:
    """The CRC-32 of every ``name:shape``, as eight hexadecimal digits: the index's codes."""
    return {f"{zlib.crc32(f'{name}:{shape}'.encode()):08x}" for name, shape in shapes.items()}


@functools.cache
def index() -> dict[str, dict[str, Any]]:
    """The index in ``architectures.json``: network → its entry."""
    text = resources.files("pathconvert.networks").joinpath("architectures.json").read_text()
    networks: dict[str, dict[str, Any]] = json.loads(text)["networks"]
    return networks


def is_known(name: str) -> bool:
    """Whether ``name`` is the name of a torchvision network."""
    return name in index()


def catalogue() -> list[Entry]:
    """Every torchvision network, with the reason where it is not supported."""
    return [
        Entry(name, entry["task"], not entry["reason"], entry["reason"])
        for name, entry in index().items()
    ]


# ---- recognising ---------------------------------------------------------------------------------

_OLD_NAMES: list[tuple[str, Any]] = [
    (
        r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)",
        r"\1\2",
    ),  # torchvision/models/densenet.py
    (
        r"(.*fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)",
        r"\1.0.\2",
    ),  # ops/feature_pyramid_network.py
    (r"(rpn\.head\.conv)\.(weight|bias)", r"\1.0.0.\2"),  # models/detection/rpn.py
    (
        r"(.*mask_head)\.mask_fcn(\d)\.(weight|bias)",
        lambda m: f"{m[1]}.{int(m[2]) - 1}.0.{m[3]}",
    ),  # mask_rcnn.py
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
    fcos = (
        "head.classification_head.conv.1.weight" in tensors
    )  # FCOS's GroupNorm; in FCOS ``conv.0.weight`` is a current name
    rules = _OLD_NAMES if fcos else [*_OLD_NAMES, _OLD_RETINANET]
    return {_modern(name, rules): tensor for name, tensor in tensors.items()}


def _modern(name: str, rules: list[tuple[str, Any]]) -> str:
    return next((re.sub(old, new, name) for old, new in rules if re.fullmatch(old, name)), name)


def recognise(tensors: Mapping[str, Tensor], *, num_classes: int | None = None) -> Architecture:
    """Find the torchvision network that has exactly these tensors.

    Args:
        tensors: a state dict, with names as :func:`modern_names` returns them.
        num_classes: the number of classes; overrides the number that the tensors show.

    Raises:
        ArchitectureError: no network has these tensors, or several have.
    """
    shapes = shapes_of(tensors)
    codes = codes_of(shapes)
    scores = {name: _overlap(codes, entry["codes"]) for name, entry in index().items()}
    ranked = sorted(scores, key=lambda name: -scores[name])
    near = [
        name for name in ranked if scores[name] >= 0.8 * scores[ranked[0]] and scores[name] > 0.2
    ][:3]
    if not near:
        raise ArchitectureError(
            f"these {len(tensors)} tensors are not those of a torchvision network that pathconvert"
            f" knows (the closest: {', '.join(ranked[:3])})",
            "Name the network: --arch package.module:builder, a function or class that builds it.",
        )
    candidates = [_candidate(name, tensors, shapes, num_classes) for name in near]
    exact = [candidate for candidate, differences in candidates if not differences]
    if len(exact) == 1:
        return exact[0]
    if exact:
        names = ", ".join(candidate.name for candidate in exact)
        raise ArchitectureError(
            f"these tensors fit several networks: {names}",
            f"Choose one, for example --arch {exact[0].name}",
        )
    closest, differences = min(candidates, key=lambda pair: len(pair[1]))
    raise ArchitectureError(
        f"no torchvision network has these tensors; the closest is {closest.name}"
        f" ({_count(differences)}): " + "; ".join(differences[:3]),
        "Other close networks:"
        f" {', '.join(name for name in near if name != closest.name) or 'none'}. For a network of"
        " your own: --arch package.module:builder",
    )


def _overlap(codes: set[str], entry_codes: str) -> float:
    """Jaccard index of two sets of codes."""
    theirs = {entry_codes[i : i + 8] for i in range(0, len(entry_codes), 8)}
    return len(codes & theirs) / len(codes | theirs)


def _candidate(
    name: str, tensors: Mapping[str, Tensor], shapes: Shapes, num_classes: int | None
) -> tuple[Architecture, list[str]]:
    """Compare a candidate with the tensors.

    Returns:
        The network with its arguments read from the tensors, and how its own tensors differ from
        them.
    """
    architecture = fit_arguments(name, tensors, shapes, num_classes)
    return architecture, differences_to(_shape_model(architecture), tensors)


def _shape_model(architecture: Architecture) -> nn.Module:
    """Build on the meta device where the constructor allows it.

    SSD's constructor runs the network, and RegNet's needs real tensors.
    """
    try:
        with torch.device("meta"):
            return build_torchvision(architecture.name, architecture.arguments)
    except (RuntimeError, ArchitectureError):
        return build(architecture)


def fit_arguments(
    name: str, tensors: Mapping[str, Tensor], shapes: Shapes, num_classes: int | None
) -> Architecture:
    """A torchvision network of the kind that the tensors show.

    They show the number of classes, the auxiliary heads and the BatchNorm.

    Raises:
        ArchitectureError: ``num_classes`` is less than 1.
    """
    if num_classes is not None and num_classes < 1:
        raise ArchitectureError(
            f"{num_classes} is not a number of classes", "Give a positive number: --num-classes 10"
        )
    entry = index()[name]
    arguments = dict(entry["arguments"])
    key, dim, slope, intercept = entry["head"]
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    elif key in shapes and len(shapes[key]) > dim:
        arguments["num_classes"] = max(1, (shapes[key][dim] - intercept) // slope)
    if "auxiliary" in entry:
        argument, prefixes = entry["auxiliary"]
        arguments[argument] = any(tensor.startswith(tuple(prefixes)) for tensor in shapes)
    if entry["task"] == "detection" and "backbone.body.bn1.running_var" in tensors:
        arguments["frozen_batch_norm"] = f"backbone.body.bn1.{COUNTER}" not in tensors
        arguments = {
            k: v for k, v in arguments.items() if v is not False or k != "frozen_batch_norm"
        }
    return Architecture(name, arguments, tuple(entry["input_size"]), entry["task"])


def _count(differences: list[str]) -> str:
    return "1 difference" if len(differences) == 1 else f"{len(differences)} differences"


def differences_to(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """How tensors differ from those of a network, one text per difference.

    A missing counter does not count.
    """
    expected, found = model.state_dict(), dict(tensors)
    texts = []
    for name, tensor in expected.items():
        if name not in found:
            if not name.endswith(COUNTER):
                texts.append(f"{name} is missing")
        elif found[name].shape != tensor.shape:
            texts.append(
                f"{name} has shape {list(found[name].shape)}, expected {list(tensor.shape)}"
            )
    return texts + [f"{name} is extra" for name in found if name not in expected]


# ---- naming and building -------------------------------------------------------------------------


def resolve(
    name: str,
    tensors: Mapping[str, Tensor] | None,
    *,
    num_classes: int | None = None,
    input_size: tuple[int, ...] | None = None,
) -> Architecture:
    """The network that ``--arch`` names.

    Args:
        name: a torchvision name, ``package.module:builder`` or ``timm/NAME``. A torchvision name
            may be followed by arguments that the weights do not reveal:
            ``googlenet(transform_input=True)``.
        tensors: the weights, from which the number of classes and the auxiliary heads of a
            torchvision network are read; None for the defaults.
        num_classes: passed to the builder unless it is None.
        input_size: the size of an input without the batch dimension; None for the usual one.

    Raises:
        ArchitectureError: there is no such network, or its arguments cannot be read.
    """
    given = {} if num_classes is None else {"num_classes": num_classes}
    name, arguments = _called(name)
    if name.startswith("timm/"):
        return Architecture(name, given, input_size or timm_input_size(name), "classification")
    if ":" in name:
        find_builder(name)
        return Architecture(name, given, input_size, "other")
    if name not in index():
        close = difflib.get_close_matches(name, index(), 3)
        raise ArchitectureError(
            f"{name!r} is not a network that pathconvert knows",
            (
                f"Did you mean {', '.join(close)}?"
                if close
                else (
                    "pathconvert archs lists the known ones. For a network of your own: --arch"
                    " package.module:builder"
                )
            ),
        )
    architecture = fit_arguments(name, tensors or {}, shapes_of(tensors or {}), num_classes)
    arguments = architecture.arguments | arguments
    return Architecture(name, arguments, input_size or architecture.input_size, architecture.task)


def _called(name: str) -> tuple[str, dict[str, Any]]:
    """Split ``googlenet(transform_input=True)``; any other text is a name without arguments.

    Returns:
        The name and the arguments.

    Raises:
        ArchitectureError: the arguments are not keyword arguments with literal values.
    """
    found = re.fullmatch(r"(\w+)\((.*)\)", name)
    if not found:
        return name, {}
    try:
        call = ast.parse(f"f({found[2]})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args:
            raise ValueError
        return found[1], {str(k.arg): ast.literal_eval(k.value) for k in call.keywords if k.arg}
    except (SyntaxError, ValueError, AssertionError):
        raise ArchitectureError(
            f"--arch {name}: the arguments cannot be read",
            "Write them as in --arch 'googlenet(transform_input=True)'",
        ) from None


def build(architecture: Architecture) -> nn.Module:
    """Build the network in evaluation mode.

    The parameters of torchvision's networks are not initialised.

    Raises:
        ArchitectureError: the network is not known, or cannot be built with these arguments.
    """
    if architecture.name.startswith("timm/"):
        return build_timm(architecture.name, architecture.arguments)
    if ":" in architecture.name:
        return build_by_path(architecture.name, architecture.arguments)
    if not is_known(architecture.name):
        raise ArchitectureError(
            f"{architecture.name!r} is not a network that pathconvert knows", "Name it with --arch."
        )
    return build_torchvision(architecture.name, architecture.arguments)


def load_tensors(
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    change: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> nn.Module:
    """Build the network with these tensors, in their dtypes and in evaluation mode.

    Counters that old checkpoints lack become 0.

    Args:
        architecture: the network.
        tensors: its state dict.
        change: turns the stock network into the form whose state dict ``tensors`` is; by default it
            stays as it is.

    Raises:
        ArchitectureError: the tensors are not the network's.
    """
    model = change(build(architecture))
    differences = differences_to(model, tensors)
    if differences:
        raise ArchitectureError(
            f"the tensors are not those of {architecture.name} ({_count(differences)}): "
            + "; ".join(differences[:3]),
            "Check --arch and --num-classes.",
        )
    counters = {
        name: torch.zeros_like(tensor)
        for name, tensor in model.state_dict().items()
        if name.endswith(COUNTER) and name not in tensors
    }
    complete = OrderedDict(counters | dict(tensors))
    # Without the modules' versions MNASNet refuses a state dict, and other networks treat it as an
    # old one.
    complete._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    first = first_names(model)
    model.load_state_dict(complete, strict=True, assign=True)
    _tie(model, first, architecture)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def _tie(model: nn.Module, first: Mapping[str, str], architecture: Architecture) -> None:
    """Make one tensor again of those that were one before a state dict was assigned.

    Args:
        model: changed in place.
        first: tensor → the first one with the same memory (``conversion/tracing/ties.py``).
        architecture: for the message.

    Raises:
        ArchitectureError: they are different tensors in the state dict.
    """
    tensors: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
    tensors |= model.named_parameters(remove_duplicate=False)
    for name, kept in first.items():
        if name == kept:
            continue
        if not torch.equal(tensors[name], tensors[kept]):
            raise ArchitectureError(
                f"{kept} and {name} are one tensor in {architecture.name}, but differ in the file",
                "Save the checkpoint again from the network's own class.",
            )
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, tensors[kept])


def parse_input_size(text: str) -> tuple[int, ...]:
    """``3x32x32`` → ``(3, 32, 32)``.

    Raises:
        ArchitectureError: the text is not a sequence of positive numbers joined by ``x``.
    """
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise ArchitectureError(
            f"{text!r} is not an input size",
            "Give the channels and the side lengths: --input-size 3x32x32",
        )
    return tuple(int(number) for number in text.split("x"))
