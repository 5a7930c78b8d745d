"""How a stock network has to be changed so that it has exactly the tensors of a file.

People change a network before they train it: they replace its classifier, its first convolution,
some of its widths, or fold its BatchNorms. The tensors show most of that. What they cannot show,
such as a stride or the activation in a new classifier, is asked for, with the command that says it.
What was changed goes into ``Architecture.arguments``, from which ``builders.build_torchvision``
builds the network again, and is told in notes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pathconvert.errors import ArchitectureError
from pathconvert.networks import architectures, cifar, folded, resizing
from pathconvert.networks.adjusting_heads import find_head, has_classes
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.builders import CHANGES, build_torchvision, classifier_of
from pathconvert.networks.search import Question, Search, counted


@dataclass(frozen=True)
class Adjusted:
    """A stock network with the changes that a file shows.

    Attributes:
        architecture: how to build it; its ``arguments`` hold the changes.
        notes: one sentence for every change.
    """

    architecture: Architecture
    notes: tuple[str, ...]


def adjust(
    name: str,
    tensors: Mapping[str, Tensor],
    num_classes: int | None = None,
    given: Mapping[str, Any] | None = None,
) -> Adjusted | None:
    """Change a torchvision network so that it has exactly these tensors.

    Args:
        name: of the network whose tensors are named like these.
        tensors: a state dict under torchvision's names.
        num_classes: the number of classes; overrides the number that the tensors show.
        given: arguments that the user named with ``--arch``; they may be some of
            ``builders.CHANGES``. A head may be given without sizes.

    Returns:
        The network and its changes; None if no change that this module knows makes it fit.

    Raises:
        ArchitectureError: the network fits once the user says what its tensors do not show; or an
            argument in ``given`` cannot be read, or is not what the tensors show.
    """
    given = dict(given or {})
    shapes = architectures.shapes_of(tensors)
    stock = architectures.fit_arguments(name, tensors, shapes, num_classes)
    arguments = stock.arguments | {k: value for k, value in given.items() if k not in CHANGES}
    keypoints = shapes.get("roi_heads.keypoint_predictor.kps_score_lowres.weight")
    if keypoints:
        arguments["num_keypoints"] = keypoints[1]
    search = Search(stock, shapes, given, arguments, _on_meta(name, arguments))
    if keypoints:
        search.notes.append(f"it finds {counted(keypoints[1], 'keypoint')}")
    if name in cifar.BUILDERS:
        cifar.refuse_padded_shortcuts(shapes)
    if not _find_all(search) or not has_classes(search, num_classes):
        return None
    architecture = Architecture(name, search.arguments, search.input_size(), stock.task)
    model = _on_meta(name, search.arguments)
    if architectures.differences_to(model, tensors):
        return None
    if search.has_other_sizes() and not search.computes(model):
        return None
    if search.questions:
        raise search.refusal()
    search.check_given()
    return Adjusted(architecture, tuple(search.notes))


def _on_meta(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The network on the meta device; RegNet's constructor needs real tensors."""
    try:
        with torch.device("meta"):
            return build_torchvision(name, arguments)
    except RuntimeError:
        return build_torchvision(name, arguments).to("meta")


def title(architecture: Architecture) -> str:
    """The network's name for a reader: ``resnet50 (BatchNorm folded)``."""
    folded_too = architecture.arguments.get("batch_norm") == "folded"
    return f"{architecture.name} (BatchNorm folded)" if folded_too else architecture.name


def network_text(name: str, arguments: Mapping[str, Any]) -> str:
    """A network with its arguments, of which those that list layers are counted.

    For example ``resnet18 (num_classes=5, BatchNorm folded, widths of 12 layers)``.
    """
    parts = []
    for key, value in arguments.items():
        if key == "batch_norm":
            parts.append("BatchNorm folded")
        elif key in ("widths", "biases", "batch_norm_kept"):
            parts.append(f"{key} of {counted(len(value), 'layer')}")
        else:
            parts.append(f"{key}={value}")
    return f"{name} ({', '.join(parts)})" if parts else name


# ---- the steps: each says whether a network may still fit ----------------------------------------


def _find_all(search: Search) -> bool:
    _find_folding(search)
    return _find_inputs(search) and find_head(search) and _find_layers(search)


def _find_layers(search: Search) -> bool:
    _find_biases(search)
    return _find_widths(search)


def _find_folding(search: Search) -> None:
    kept = folded.kept_norms(search.model, search.shapes)
    if kept is None:
        return
    search.arguments["batch_norm"] = "folded"
    note = "its BatchNorms are folded into its convolutions"
    if kept:
        search.arguments["batch_norm_kept"] = kept
        note = f"some of its BatchNorms are folded into its convolutions, and {len(kept)} are"
        note += f" not, for example {kept[0]}; nothing is assumed in the place of the others"
    folded.fold_structure(search.model, kept)
    search.notes.append(note)


def _find_inputs(search: Search) -> bool:
    """The first convolution: its number of input channels, its kernel size."""
    name = resizing.first_convolution(search.model)
    own = resizing.shape_of(search.model.get_submodule(name))
    shape = search.shapes.get(f"{name}.weight", ())
    if len(shape) != len(own):
        return False
    if shape[1] != own[1]:
        if search.stock.task == "detection":  # its transform normalises three channels
            return False
        search.arguments["in_channels"] = shape[1]
        resizing.set_in_channels(search.model, shape[1])
        search.notes.append(f"its input has {counted(shape[1], 'channel')} instead of {own[1]}")
    if shape[2:] == own[2:] and "stem" not in search.given:
        return True
    stem = search.given.get("stem") or _asked_stem(search, name, shape, own)
    if stem is None:
        return False
    kernel, stride, pool = resizing.parse_stem(stem)
    if (kernel, kernel) != shape[2:]:
        raise ArchitectureError(
            f"{search.name}: the stem {stem!r} has a {kernel}×{kernel} kernel, but that of {name}"
            f" in the file is {'×'.join(map(str, shape[2:]))}",
            "Name the file's kernel size, for example --arch"
            f" '{search.call({'stem': f'conv{shape[2]}-stride2-maxpool'})}'",
        )
    resizing.set_stem(search.model, stem)
    search.arguments["stem"] = stem
    search.notes.append(
        f"its first convolution is {kernel}×{kernel} with stride {stride}, and"
        f" {'a' if pool else 'no'} max-pool follows"
    )
    return True


def _asked_stem(
    search: Search, name: str, shape: tuple[int, ...], own: tuple[int, ...]
) -> str | None:
    """Ask for the stem; None if this network's cannot be changed in that way."""
    if resizing.pool_of(search.model, name) is None or len(set(shape[2:])) != 1:
        return None
    kernel = shape[2]
    stem = "cifar" if kernel == 3 else f"conv{kernel}-stride2-maxpool"
    meaning = "stem=cifar is a 3×3 convolution with stride 1 and no max-pool; other stems: "
    text = (
        f"the kernel of {name} is {kernel}×{kernel} instead of {own[2]}×{own[3]}, and neither"
        " its stride nor whether a max-pool follows is in the file"
    )
    hint = (meaning if kernel == 3 else "Other stems: ") + f"stem=conv{kernel}-stride1-maxpool"
    search.questions.append(Question(text, {"stem": stem}, hint))
    return stem


def _find_biases(search: Search) -> None:
    """Layers with a bias that the stock network's do not have, and the other way round."""
    biases = {
        name: f"{name}.bias" in search.shapes
        for name, layer in search.model.named_modules()
        if isinstance(layer, _ConvNd | nn.Linear)
        and f"{name}.weight" in search.shapes
        and (f"{name}.bias" in search.shapes) != (layer.bias is not None)
    }
    if not biases:
        return
    resizing.set_biases(search.model, biases)
    search.arguments["biases"] = biases
    for has, words in ((True, "a bias"), (False, "no bias")):
        names = [name for name, value in biases.items() if value is has]
        if names:
            search.notes.append(
                f"{_layers_with(names)} {words}, unlike the stock network's, for example {names[0]}"
            )


def _find_widths(search: Search) -> bool:
    """Layers with other numbers of channels."""
    widths: dict[str, list[int]] = {}
    for name, layer in search.model.named_modules():
        shape = search.shapes.get(f"{name}.weight")
        if not resizing.is_layer(layer) or shape is None or shape == resizing.shape_of(layer):
            continue
        own = resizing.shape_of(layer)
        if len(shape) != len(own) or shape[2:] != own[2:]:
            return False
        if shape[0] == 1 and not isinstance(layer, nn.Linear):
            return False  # an addition would repeat a single channel, whatever it is added to
        classes = isinstance(layer, nn.Linear) and shape[0] == own[0]
        widths[name] = [0 if classes else shape[0], *shape[1:2]]
    if not widths:
        return True
    if search.stock.task == "detection":
        return False
    resizing.set_widths(search.model, widths)
    _find_groups(search, widths)
    if not all(map(_is_certain, search.model.modules())):
        return False
    search.arguments["widths"] = widths
    _note_widths(search, widths)
    return True


def _find_groups(search: Search, widths: dict[str, list[int]]) -> None:
    """Add the number of groups of convolutions that read another number of channels."""
    grouped = {
        name: layer
        for name, layer in search.model.named_modules()
        if name in widths and isinstance(layer, _ConvNd) and layer.groups > 1
    }
    before = {name: layer.groups for name, layer in grouped.items()}

    def regroup(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(layer, _ConvNd)
        groups = inputs[0].shape[1] // layer.weight.shape[1]
        resizing.resize(layer, tuple(layer.weight.shape), groups)

    hooks = [layer.register_forward_pre_hook(regroup) for layer in grouped.values()]
    search.computes(search.model)
    for hook in hooks:
        hook.remove()
    for name, layer in grouped.items():
        if layer.groups != before[name]:
            widths[name].append(layer.groups)


def _note_widths(search: Search, widths: Mapping[str, list[int]]) -> None:
    entry = architectures.index()[search.name]
    auxiliary = tuple(entry.get("auxiliary", ["", []])[1])
    side_heads = [name for name in widths if auxiliary and name.startswith(auxiliary)]
    search.notes += [
        f"its auxiliary classifier {name} has {counted(widths[name][0], 'output')}"
        for name in side_heads
    ]
    rest = [name for name in widths if name not in side_heads]
    if rest:
        note = (
            f"{_layers_with(rest)} other widths than the stock network's, for example {rest[0]}:"
            f" {'×'.join(map(str, search.shapes[f'{rest[0]}.weight'][:2]))}"
        )
        if sum(name.startswith(f"{classifier_of(search.model)}.") for name in rest) > 1:
            note += "; the activations of its classifier are assumed to be the stock network's"
        search.notes.append(note)


def _layers_with(names: Sequence[str]) -> str:
    return f"{counted(len(names), 'layer')} of it {'has' if len(names) == 1 else 'have'}"


def _is_certain(module: nn.Module) -> bool:
    """Whether a module of other widths computes what its class would.

    The blocks of MNASNet, MobileNet and EfficientNet add their input if it has as many channels as
    the result. Where other widths change that, the tensors do not show whether the network was
    built so, or pruned.
    """
    adds = getattr(module, "apply_residual", getattr(module, "use_res_connect", None))
    if adds is None:
        return True
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    same = layers[0].in_channels == layers[-1].out_channels
    return bool(adds) == (same and all(layer.stride == (1, 1) for layer in layers))
