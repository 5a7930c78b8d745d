"""What a file says about its network beside the tensors: its class, ``config.json``, ``arch``.

Tensors do not show everything that a network computes: timm's ``resnetblur50`` has a ResNet-50's
names and shapes, and blurs where a ResNet-50 strides. What the file says is therefore compared with
the network that was recognised, and a file that says something else is refused without ``--arch``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from pathconvert.errors import ArchitectureError
from pathconvert.files.refusals import one_line, quote
from pathconvert.networks import architectures
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.names_index import index
from pathconvert.networks.names_modules import Settings, class_of, other_settings

_ARCHITECTURE_KEYS = ("architecture", "arch", "model", "model_name")
#: timm's former names for other weights of the same network: ``tv_resnet50``, ``ssl_resnet18``.
_LEGACY = re.compile(r"(?:tv|gluon|ssl|swsl|ig|tf)_(\w+?)(?:_v1b)?")

_FAMILIES = re.compile(
    r"resne|vgg|dense|alex|squeeze|incept|googl|shuffle|mnas|regnet|mobile|efficient|convnext|vit"
    r"|swin|caffe",
    re.IGNORECASE,
)
#: What Hugging Face's ResNets must have to compute what torchvision's do.
_HUGGING_FACE = {
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
    "hidden_act": "relu",
}


def check_config(config: Mapping[str, Any] | None, found: Architecture, where: str) -> list[str]:
    """Compare what a file says beside its tensors with the network that was recognised.

    Args:
        config: ``config.json``, or what a training script stored beside the weights; None for
            nothing.
        found: the network whose tensors the file has.
        where: the file, for messages.

    Returns:
        Notes on names that are not known.

    Raises:
        ArchitectureError: the file says that its network is another one.
    """
    if not config:
        return []
    if config.get("model_type") == "resnet":
        _check_hugging_face(config, where)
    named = _named(config)
    if named is None:
        return []
    base = _base(named)
    if _plain(base) == found.name or _is_variant(base, found):
        return []
    timm_name = _timm_name(base)
    if base in index() or timm_name or _FAMILIES.search(base):
        suggestion = base if base in index() else timm_name
        ready = f"--arch {suggestion}" if suggestion else "--arch package.module:builder"
        raise ArchitectureError(
            f"{where} says that its network is {quote(named)}, and its tensors are those of"
            f" {found.name}; networks with the same tensors can compute something else",
            f"If it is {one_line(named)}: {ready} -- if it is the stock network: --arch"
            f" {found.name}",
        )
    return [
        f"the file calls its network {quote(named)}, which is not a name that pathconvert knows"
    ]


def with_suggestion(
    error: ArchitectureError, config: Mapping[str, Any] | None
) -> ArchitectureError:
    """A refusal of tensors that are no known network's, with the network that the file names."""
    named = _named(config or {})
    timm_name = _timm_name(_base(named)) if named else None
    if timm_name is None:
        return error
    return ArchitectureError(
        f"{error}; the file calls its network {quote(named)}", f"Name it: --arch {timm_name}"
    )


def _named(config: Mapping[str, Any]) -> str | None:
    """The name that a file gives to its network."""
    values = (config.get(key) for key in _ARCHITECTURE_KEYS)
    return next((value for value in values if isinstance(value, str)), None)


def _base(named: str) -> str:
    """A name without timm's owner and tag: ``timm/resnet50.a1_in1k`` → ``resnet50``."""
    return named.rpartition("/")[2].partition(".")[0]


def _plain(name: str) -> str:
    """A name without what timm put before other weights of the same network."""
    legacy = _LEGACY.fullmatch(name)
    return legacy[1] if legacy and legacy[1] in index() else name


def _is_variant(base: str, found: Architecture) -> bool:
    """Whether a name is that of the stock network in another spelling (``ResNet-50``)."""
    return re.sub(r"[\W_]", "", base).lower() == re.sub(r"[\W_]", "", found.name).lower()


def _timm_name(name: str) -> str | None:
    """``timm/NAME`` if timm is installed and can build that network; else None."""
    try:
        import timm
    except ImportError:
        return None
    return f"timm/{name}" if timm.is_model(name) else None


def _check_hugging_face(config: Mapping[str, Any], where: str) -> None:
    for key, expected in _HUGGING_FACE.items():
        value = config.get(key, expected)
        if value != expected:
            raise ArchitectureError(
                f"{where}: its config.json has {key} = {quote(value)}, which torchvision's ResNets"
                f" do not have ({expected!r})",
                "Name a function or class that builds the network: --arch package.module:builder",
            )


def check_module(
    module: str | None, found: Architecture, settings: Settings | None, where: str
) -> list[str]:
    """Refuse a pickled module that is not the network whose tensors it has.

    Args:
        module: the class, ``torchvision.models.resnet.ResNet``; None if the file is a state dict.
        found: the network whose tensors it has.
        settings: what the pickle says of the modules in it; None if that is not known.
        where: the file, for messages.

    Returns:
        Notes on what was assumed.

    Raises:
        ArchitectureError: its forward is not known, or it has other settings than the network.
    """
    if module is None:
        return []
    stock = architectures.shape_model(found)
    trust = "pass --trust-pickle to convert the module itself, which runs its code"
    if module != class_of(stock):
        raise ArchitectureError(
            f"{where} is a pickled module of the class {module}; it has the tensors of"
            f" {found.name}, but what its forward computes is not known",
            f"If you trust the file, {trust}; or name the network: --arch {found.name}",
        )
    if settings is None:
        return [
            f"the pickled module was built anew as torchvision's {found.name}; settings that its"
            " tensors do not show, such as a dilation, are not taken over (--trust-pickle takes the"
            " module itself)"
        ]
    different = list(other_settings(stock, settings))
    if different:
        raise ArchitectureError(
            f"{where} is a pickled {found.name} with settings that the stock network does not"
            f" have: {'; '.join(different[:3])}",
            f"If you trust the file, {trust}.",
        )
    return [f"the pickled module was built anew as torchvision's {found.name}"]


def differences_to_module(model: nn.Module, settings: Settings | None) -> list[str]:
    """A note on how a pickled module differs from the network that the user named; or none.

    Args:
        model: the network that was built.
        settings: what the pickle says of the modules in it; None if that is not known.
    """
    different = list(other_settings(model, settings)) if settings else []
    if not different:
        return []
    return [
        f"the pickled module differs from the network that --arch names: {'; '.join(different[:3])}"
    ]


def own_architecture(model: nn.Module) -> Architecture | None:
    """The torchvision architecture that builds exactly this network; None if there is none."""
    try:
        architecture = architectures.recognise(model.state_dict())
    except ArchitectureError:
        return None
    if getattr(model, "transform_input", False):
        arguments = architecture.arguments | {"transform_input": True}
        architecture = Architecture(
            architecture.name, arguments, architecture.input_size, architecture.task
        )
    built = architectures.build(architecture)
    # settings that the weights do not reveal (dilation, stride, eps) show in the repr
    return architecture if type(built) is type(model) and repr(built) == repr(model) else None
