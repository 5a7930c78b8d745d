"""Which networks are supported, and which of them has the tensors of a checkpoint.

The index (``names_index.py``) only suggests candidates; each is then built, without initialising
it, and compared with the checkpoint tensor by tensor.
"""

from __future__ import annotations

import ast
import copy
import difflib
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pathconvert.conversion.tracing.ties import first_names
from pathconvert.errors import ArchitectureError
from pathconvert.files.refusals import one_line
from pathconvert.networks.builders import (
    build_by_path,
    build_timm,
    build_torchvision,
    find_builder,
    timm_input_size,
)
from pathconvert.networks.names_index import COUNTER, matches
from pathconvert.networks.names_index import Shapes as Shapes
from pathconvert.networks.names_index import index as index
from pathconvert.networks.names_index import modern_names as modern_names
from pathconvert.networks.names_index import shapes_of as shapes_of
from pathconvert.networks.probing import probed_on_meta

#: The name of the architecture of a module that only its own pickle can build.
PICKLED_MODULE = "pickled module"


@dataclass(frozen=True)
class Architecture:
    """How to build a network.

    Attributes:
        name: a torchvision name, ``package.module:builder``, ``timm/NAME``, or ``PICKLED_MODULE``.
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


def is_known(name: str) -> bool:
    """Whether ``name`` is the name of a network of the index: torchvision's, and a few of ours."""
    return name in index()


def catalogue() -> list[Entry]:
    """Every network of the index, with the reason where it is not supported."""
    return [
        Entry(name, entry["task"], not entry["reason"], entry["reason"])
        for name, entry in index().items()
    ]


# ---- recognising ---------------------------------------------------------------------------------


def recognise(tensors: Mapping[str, Tensor], *, num_classes: int | None = None) -> Architecture:
    """Find the torchvision network that has exactly these tensors.

    Args:
        tensors: a state dict, with names as :func:`modern_names` returns them.
        num_classes: the number of classes; overrides the number that the tensors show.

    Raises:
        ArchitectureError: no network has these tensors, or several have.
    """
    candidates = candidates_for(tensors, num_classes=num_classes)
    if not candidates:
        raise ArchitectureError(
            f"nothing in these {len(tensors)} tensors resembles a torchvision network that"
            " pathconvert knows",
            "Name the network: --arch package.module:builder, a function or class that builds it.",
        )
    exact = [candidate.architecture for candidate in candidates if not candidate.differences]
    if len(exact) == 1:
        return exact[0]
    if exact:
        names = ", ".join(architecture.name for architecture in exact)
        raise ArchitectureError(
            f"these tensors fit several networks: {names}",
            f"Choose one, for example --arch {exact[0].name}",
        )
    closest = min(candidates, key=lambda candidate: len(candidate.differences))
    others = [c.architecture.name for c in candidates if c is not closest]
    raise ArchitectureError(
        f"no torchvision network has these tensors; the closest is {closest.described}",
        f"Other close networks: {', '.join(others) or 'none'}. For a network of your own: --arch"
        " package.module:builder",
    )


@dataclass(frozen=True)
class Candidate:
    """A network of the index that resembles some tensors.

    Attributes:
        architecture: the network, with its arguments read from the tensors.
        differences: how its own tensors differ from them, one text each; none if it has exactly
            these tensors.
    """

    architecture: Architecture
    differences: tuple[str, ...]

    @property
    def described(self) -> str:
        """``resnet18 (2 differences): fc.weight is missing; fc.bias is missing``, for messages."""
        return described(self.architecture.name, self.differences)


def described(name: str, differences: Sequence[str]) -> str:
    """A network, how many differences it has to some tensors, and the first three."""
    count = "1 difference" if len(differences) == 1 else f"{len(differences)} differences"
    return one_line(f"{name} ({count}): " + "; ".join(differences[:3]), 1000)


def candidates_for(
    tensors: Mapping[str, Tensor],
    *,
    num_classes: int | None = None,
    names: Sequence[str] | None = None,
) -> list[Candidate]:
    """The networks of the index that resemble some tensors, compared with them; best first.

    Args:
        tensors: a state dict, with names as :func:`modern_names` returns them.
        num_classes: the number of classes; overrides the number that the tensors show.
        names: the networks to compare; None for those that have most tensors in common, at most
            three.

    Raises:
        ArchitectureError: ``num_classes`` is less than 1.
    """
    shapes = shapes_of(tensors)
    if names is None:
        found = matches(shapes)
        best = found[0].share if found else 0.0
        names = [m.name for m in found if m.share >= 0.8 * best and m.share > 0.2][:3]
    fitted = [fit_arguments(name, tensors, shapes, num_classes) for name in names]
    return [Candidate(one, tuple(differences_to(shape_model(one), tensors))) for one in fitted]


def shape_model(architecture: Architecture) -> nn.Module:
    """Build a network for its names and shapes: on the meta device where that works.

    RegNet's constructor needs real tensors, as a user's may.

    Raises:
        ArchitectureError: as :func:`build`.
    """
    if is_known(architecture.name):
        try:
            with torch.device("meta"):
                return build(architecture)
        except (RuntimeError, ArchitectureError):
            pass
    return build(architecture)


def fit_arguments(
    name: str, tensors: Mapping[str, Tensor], shapes: Shapes, num_classes: int | None
) -> Architecture:
    """A torchvision network of the kind that the tensors show.

    They show the number of classes, the auxiliary heads and the BatchNorm.

    Args:
        name: the network, one of the index.
        tensors: a state dict.
        shapes: those of the tensors (:func:`shapes_of`).
        num_classes: the number of classes; overrides the number that the tensors show.

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
        name: a torchvision name, ``package.module:builder`` or ``timm/NAME``. It may be followed by
            arguments that the weights do not reveal: ``googlenet(transform_input=True)``.
        tensors: the weights, from which the number of classes and the auxiliary heads of a
            torchvision network are read; None for the defaults.
        num_classes: passed to the builder unless it is None.
        input_size: the size of an input without the batch dimension; None for the usual one.

    Raises:
        ArchitectureError: there is no such network, or its arguments cannot be read.
    """
    given = {} if num_classes is None else {"num_classes": num_classes}
    name, arguments = called(name)
    if name.startswith("timm/"):
        size = input_size or timm_input_size(name)
        return Architecture(name, arguments | given, size, "classification")
    if ":" in name:
        find_builder(name)
        return Architecture(name, arguments | given, input_size, "other")
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


def called(name: str) -> tuple[str, dict[str, Any]]:
    """Split ``googlenet(transform_input=True)``; any other text is a name without arguments.

    A value that is not a Python literal is a text: ``resnet18(stem=cifar)``.

    Returns:
        The name and the arguments.

    Raises:
        ArchitectureError: the arguments are not of the form ``name=value, name=value``.
    """
    found = re.fullmatch(r"([\w.:/-]+)\((.*)\)", name)
    if not found:
        return name, {}
    arguments: dict[str, Any] = {}
    # a comma separates arguments where another name= follows
    for part in re.split(r",\s*(?=\w+\s*=)", found[2]) if found[2].strip() else []:
        key, equals, value = part.partition("=")
        if not equals or not key.strip().isidentifier() or not value.strip(" ,"):
            raise ArchitectureError(
                f"--arch {name}: the arguments cannot be read",
                "Write them as in --arch 'googlenet(transform_input=True)'",
            )
        arguments[key.strip()] = _literal(value.strip(" ,"))
    return found[1], arguments


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


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
    with probed_on_meta():
        return build_torchvision(architecture.name, architecture.arguments)


def load_tensors(
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    change: Callable[[nn.Module], nn.Module] = lambda model: model,
    template: nn.Module | None = None,
) -> nn.Module:
    """Build the network with these tensors, in their dtypes and in evaluation mode.

    Counters that old checkpoints lack become 0.

    Args:
        architecture: the network.
        tensors: its state dict.
        change: turns the stock network into the form whose state dict ``tensors`` is; by default it
            stays as it is.
        template: the stock network, of which a copy is made if the architecture is that of a
            pickled module; None if there is none.

    Raises:
        ArchitectureError: the tensors are not the network's.
    """
    if architecture.name == PICKLED_MODULE and template is not None:
        model = change(copy.deepcopy(template))
    else:
        model = change(build(architecture))
    differences = differences_to(model, tensors)
    if differences:
        raise ArchitectureError(
            f"the tensors are not those of {described(architecture.name, differences)}",
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
    _cast_other_buffers(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def _cast_other_buffers(model: nn.Module) -> None:
    """Give buffers that no file holds the parameters' dtype, as ``model.half()`` would.

    timm's blurred pooling keeps its kernel in one.
    """
    dtypes = {parameter.dtype for parameter in model.parameters()}
    stored = model.state_dict().keys()
    for name, buffer in list(model.named_buffers()):
        if len(dtypes) == 1 and name not in stored and buffer.is_floating_point():
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, buffer.to(next(iter(dtypes))))


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
