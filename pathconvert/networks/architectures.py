"""The supported networks; recognise one from tensor names and shapes.

``architectures.json`` is an index of torchvision's networks: for each the CRC-32 of ``name:shape`` of all its tensors
(auxiliary heads on, counters left out), how the number of classes shows, and which argument has auxiliary heads.
``make_index.py`` writes it anew from the torchvision that is installed. The index only nominates: what decides is the
network itself, built without initialising it and compared tensor by tensor.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import inspect
import json
import re
import urllib.request
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from pathconvert.errors import ArchitectureError
from pathconvert.networks.builders import build_by_path, build_timm, find_builder, one_line, timm_input_size

INDEX_VERSION = 1
COUNTER = "num_batches_tracked"
#: Networks whose pretrained weights go with an input that they normalise anew, which no tensor shows.
TRANSFORMING = ("googlenet", "inception_v3")
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """How to build a network.

    Attributes:
        name: a torchvision name, ``package.module:builder``, or ``timm/NAME``.
        arguments: what the builder gets, JSON-serialisable.
        input_size: without the batch dimension; None where nothing tells.
        task: classification, video, segmentation, detection or other.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    input_size: tuple[int, ...] | None = None
    task: str = "other"


@dataclass(frozen=True)
class Entry:
    """A line of ``pathconvert archs``."""

    name: str
    task: str
    supported: bool
    reason: str


# ---- torchvision's networks ------------------------------------------------------------------------------------


def build_torchvision(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A network without weights; parameters are not initialised."""
    options = dict(arguments)
    frozen, eps = options.pop("frozen_batch_norm", False), options.pop("frozen_batch_norm_eps", 1e-5)
    accepted = inspect.signature(torchvision.models.get_model_builder(name)).parameters
    if "weights_backbone" in accepted:
        options["weights_backbone"] = None
    try:
        with _uninitialised():
            model: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    except (TypeError, ValueError) as error:  # arguments come from files too
        raise ArchitectureError(
            f"torchvision cannot build {name} with {dict(arguments)}: {one_line(error)}",
            "Name the network with --arch.",
        ) from error
    if frozen:
        _freeze_batch_norm(model.get_submodule("backbone.body"), eps)
    return model.eval()


def _freeze_batch_norm(module: nn.Module, eps: float) -> None:
    """Replace BatchNorm2d by FrozenBatchNorm2d, as torchvision does for a detector's pretrained backbone."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm2d(child.num_features, eps=eps))
        else:
            _freeze_batch_norm(child, eps)


@contextlib.contextmanager
def _uninitialised() -> Iterator[None]:
    """Parameters keep the memory they were given: it is not even touched, so building takes milliseconds."""

    def keep(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor

    with contextlib.ExitStack() as stack:
        for name, function in vars(nn.init).items():
            if name.endswith("_") and not name.startswith("_") and callable(function):
                stack.enter_context(mock.patch.object(nn.init, name, keep))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        yield


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if not name.endswith(COUNTER)}


def codes_of(shapes: Shapes) -> set[str]:
    return {f"{zlib.crc32(f'{name}:{shape}'.encode()):08x}" for name, shape in shapes.items()}


# ---- the index -------------------------------------------------------------------------------------------------


@functools.cache
def index() -> dict[str, dict[str, Any]]:
    """The shipped index, by network."""
    text = resources.files("pathconvert.networks").joinpath("architectures.json").read_text()
    networks: dict[str, dict[str, Any]] = json.loads(text)["networks"]
    return networks


def is_known(name: str) -> bool:
    """Whether ``name`` is a torchvision network's."""
    return name in index()


def catalogue() -> list[Entry]:
    """Every torchvision network, and why it is not supported."""
    return [Entry(name, entry["task"], not entry["reason"], entry["reason"]) for name, entry in index().items()]


# ---- recognising -----------------------------------------------------------------------------------------------

_OLD_NAMES: list[tuple[str, Any]] = [
    (r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)", r"\1\2"),  # torchvision/models/densenet.py
    (r"(.*fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)", r"\1.0.\2"),  # ops/feature_pyramid_network.py
    (r"(rpn\.head\.conv)\.(weight|bias)", r"\1.0.0.\2"),  # models/detection/rpn.py
    (r"(.*mask_head)\.mask_fcn(\d)\.(weight|bias)", lambda m: f"{m[1]}.{int(m[2]) - 1}.0.{m[3]}"),  # mask_rcnn.py
]
_OLD_RETINANET = (r"(head\.\w+_head\.conv)\.([0246])\.(weight|bias)", lambda m: f"{m[1]}.{int(m[2]) // 2}.0.{m[3]}")


def modern_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with the names of old DenseNet and detection checkpoints as torchvision has them now.

    torchvision's own files have old names, which it renames while loading. The order is kept.
    """
    fcos = "head.classification_head.conv.1.weight" in tensors  # its GroupNorm: there ``conv.0.weight`` is today's name
    rules = _OLD_NAMES if fcos else [*_OLD_NAMES, _OLD_RETINANET]
    return {_modern(name, rules): tensor for name, tensor in tensors.items()}


def _modern(name: str, rules: list[tuple[str, Any]]) -> str:
    return next((re.sub(old, new, name) for old, new in rules if re.fullmatch(old, name)), name)


def recognise(tensors: Mapping[str, Tensor], *, num_classes: int | None = None) -> Architecture:
    """The torchvision network that has exactly these tensors.

    Args:
        tensors: a state dict, its names as :func:`modern_names` gives them.
        num_classes: overrides what the tensors say.

    Raises:
        ArchitectureError: none has, or several have.
    """
    shapes = shapes_of(tensors)
    codes = codes_of(shapes)
    scores = {name: _overlap(codes, entry["codes"]) for name, entry in index().items()}
    ranked = sorted(scores, key=lambda name: -scores[name])
    near = [name for name in ranked if scores[name] >= 0.8 * scores[ranked[0]] and scores[name] > 0.2][:3]
    if not near:
        raise ArchitectureError(
            f"these {len(tensors)} tensors are no torchvision network's that pathconvert knows "
            f"(the closest: {', '.join(ranked[:3])})",
            "Name the network: --arch package.module:builder, a function or class that builds it.",
        )
    candidates = [_candidate(name, tensors, shapes, num_classes) for name in near]
    exact = [candidate for candidate, differences in candidates if not differences]
    if len(exact) == 1:
        return exact[0]
    if exact:
        names = ", ".join(candidate.name for candidate in exact)
        raise ArchitectureError(f"these tensors fit several networks: {names}", f"Say which: --arch {exact[0].name}")
    closest, differences = min(candidates, key=lambda pair: len(pair[1]))
    raise ArchitectureError(
        f"no torchvision network has these tensors; the closest is {closest.name} ({_count(differences)}): "
        + "; ".join(differences[:3]),
        f"Close too: {', '.join(name for name in near if name != closest.name) or 'none'}. "
        "A network of your own: --arch package.module:builder",
    )


def _overlap(codes: set[str], entry_codes: str) -> float:
    """Jaccard index of two sets of codes."""
    theirs = {entry_codes[i : i + 8] for i in range(0, len(entry_codes), 8)}
    return len(codes & theirs) / len(codes | theirs)


def _candidate(
    name: str, tensors: Mapping[str, Tensor], shapes: Shapes, num_classes: int | None
) -> tuple[Architecture, list[str]]:
    """A nominated network with its arguments read from the tensors, and how its tensors differ from them."""
    architecture = _fit(name, tensors, shapes, num_classes)
    return architecture, differences_to(_shape_model(architecture), tensors)


def _shape_model(architecture: Architecture) -> nn.Module:
    """On the meta device where the constructor allows (RegNet's does not): SSD runs itself while it is built."""
    try:
        with torch.device("meta"):
            return build_torchvision(architecture.name, architecture.arguments)
    except (RuntimeError, ArchitectureError):
        return build(architecture)


def _fit(name: str, tensors: Mapping[str, Tensor], shapes: Shapes, num_classes: int | None) -> Architecture:
    """A torchvision network with the number of classes, auxiliary heads and BatchNorm that the tensors show."""
    if num_classes is not None and num_classes < 1:
        raise ArchitectureError(f"{num_classes} is no number of classes", "Give a positive number: --num-classes 10")
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
        arguments = {k: v for k, v in arguments.items() if v is not False or k != "frozen_batch_norm"}
    return Architecture(name, arguments, tuple(entry["input_size"]), entry["task"])


def _count(differences: list[str]) -> str:
    return "1 difference" if len(differences) == 1 else f"{len(differences)} differences"


def differences_to(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """How tensors differ from a network's, one text each; a missing counter is no difference."""
    expected, found = model.state_dict(), dict(tensors)
    texts = []
    for name, tensor in expected.items():
        if name not in found:
            if not name.endswith(COUNTER):
                texts.append(f"{name} is missing")
        elif found[name].shape != tensor.shape:
            texts.append(f"{name} has shape {list(found[name].shape)}, expected {list(tensor.shape)}")
    return texts + [f"{name} is extra" for name in found if name not in expected]


# ---- naming and building ---------------------------------------------------------------------------------------


def resolve(
    name: str,
    tensors: Mapping[str, Tensor] | None,
    *,
    num_classes: int | None = None,
    input_size: tuple[int, ...] | None = None,
) -> Architecture:
    """The network that ``--arch`` names.

    Args:
        name: a torchvision name, also with arguments that no tensor tells (``googlenet(transform_input=True)``),
            ``package.module:builder`` or ``timm/NAME``.
        tensors: tell the number of classes and auxiliary heads of a torchvision network.
        num_classes: passed to the builder where given.
        input_size: without the batch dimension.

    Raises:
        ArchitectureError: there is no such network.
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
            f"{name!r} is no network that pathconvert knows",
            f"Did you mean {', '.join(close)}?"
            if close
            else "pathconvert archs lists them; a network of your own: --arch package.module:builder",
        )
    architecture = _fit(name, tensors or {}, shapes_of(tensors or {}), num_classes)
    arguments = architecture.arguments | arguments
    return Architecture(name, arguments, input_size or architecture.input_size, architecture.task)


def _called(name: str) -> tuple[str, dict[str, Any]]:
    """``googlenet(transform_input=True)`` → the name and its arguments; any other text is a name.

    Raises:
        ArchitectureError: the arguments are no literals with names.
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
            f"--arch {name}: the arguments cannot be read", "Such as --arch 'googlenet(transform_input=True)'"
        ) from None


def is_pretrained_file(name: str, sha256: str) -> bool:
    """Whether a file is one of torchvision's own weights for the network, whose names end in the hash's beginning."""
    urls = (weights.url for weights in torchvision.models.get_model_weights(name))
    return any(Path(url).stem.rpartition("-")[2] == sha256[:8] for url in urls)


def build(architecture: Architecture) -> nn.Module:
    """The network in evaluation mode, torchvision's without initialising the parameters.

    Raises:
        ArchitectureError: it cannot be built.
    """
    if architecture.name.startswith("timm/"):
        return build_timm(architecture.name, architecture.arguments)
    if ":" in architecture.name:
        return build_by_path(architecture.name, architecture.arguments)
    if not is_known(architecture.name):
        raise ArchitectureError(f"{architecture.name!r} is no network that pathconvert knows", "Name it with --arch.")
    return build_torchvision(architecture.name, architecture.arguments)


def load_tensors(
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    change: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> nn.Module:
    """The network with these tensors, in their dtypes, in evaluation mode.

    Counters that old checkpoints lack are 0. ``change`` makes of the stock network the one that the tensors are of.

    Raises:
        ArchitectureError: the tensors are not the network's.
    """
    model = change(build(architecture))
    differences = differences_to(model, tensors)
    if differences:
        raise ArchitectureError(
            f"the tensors are not those of {architecture.name} ({_count(differences)}): " + "; ".join(differences[:3]),
            "Check --arch and --num-classes.",
        )
    counters = {
        name: torch.zeros_like(tensor)
        for name, tensor in model.state_dict().items()
        if name.endswith(COUNTER) and name not in tensors
    }
    complete = OrderedDict(counters | dict(tensors))
    # Without the modules' versions MNASNet refuses a state dict, and others take it for an old one.
    complete._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    shared = _shared(model)
    model.load_state_dict(complete, strict=True, assign=True)
    for first, *others in shared:  # assign makes two parameters of one
        for name in others:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, model.get_parameter(first))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def _shared(model: nn.Module) -> list[list[str]]:
    """The names of every parameter that has several."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def pretrained(name: str) -> tuple[Architecture, nn.Module]:
    """A torchvision network with its default weights.

    Raises:
        ArchitectureError: the weights cannot be had.
    """
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        _check_reachable(weights.url)
        model: nn.Module = torchvision.models.get_model(name, weights=weights)
    except (OSError, RuntimeError) as error:  # RuntimeError: the hash of what came is wrong
        raise ArchitectureError(
            f"the weights of {name} could not be downloaded ({error})",
            "Offline, give a file with them in place of the name.",
        ) from error
    state = model.state_dict()
    architecture = _fit(name, state, shapes_of(state), None)
    arguments = dict(architecture.arguments)
    if hasattr(model, "transform_input"):
        arguments["transform_input"] = model.transform_input
    eps = {module.eps for module in model.modules() if isinstance(module, FrozenBatchNorm2d)}
    if eps and eps != {1e-5}:  # 0 for the detectors whose weights come from Caffe2
        arguments["frozen_batch_norm_eps"] = eps.pop()
    return Architecture(name, arguments, architecture.input_size, architecture.task), model.eval()


def _check_reachable(url: str) -> None:
    """Fail at once, before torch.hub prints; it would also wait without end for a silent host."""
    if not Path(torch.hub.get_dir(), "checkpoints", Path(url).name).exists():
        urllib.request.urlopen(url, timeout=10).close()


def parse_input_size(text: str) -> tuple[int, ...]:
    """``3x32x32`` → ``(3, 32, 32)``.

    Raises:
        ArchitectureError: it is no such text.
    """
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise ArchitectureError(f"{text!r} is no input size", "Write channels and sides: --input-size 3x32x32")
    return tuple(int(number) for number in text.split("x"))
