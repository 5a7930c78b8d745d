"""torchvision's networks with its weights: the default ones by name, all of them by their files.

The names of torchvision's files end in the beginning of the file's SHA-256, such as
``resnet50-0676ba61.pth``. A file that is one of them is therefore recognised however it is named,
and with it what those weights imply that their tensors do not show.
"""

from __future__ import annotations

import dataclasses
import re
import urllib.request
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum
from torchvision.ops.misc import FrozenBatchNorm2d

from pathconvert.errors import ArchitectureError, first_line
from pathconvert.networks.architectures import Architecture, fit_arguments, shapes_of

#: Networks that transform their input when they have pretrained weights, which the tensors do not
#: reveal.
TRANSFORMING = ("googlenet", "inception_v3")


def pretrained(name: str) -> tuple[Architecture, nn.Module]:
    """Load a torchvision network with its default weights.

    Returns:
        The architecture, from which the network can be built again, and the network in evaluation
        mode.

    Raises:
        ArchitectureError: the weights cannot be downloaded.
    """
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        _check_reachable(weights.url)
        model: nn.Module = torchvision.models.get_model(name, weights=weights)
    except (OSError, RuntimeError) as error:  # RuntimeError: the download has the wrong hash
        raise ArchitectureError(
            f"the weights of {name} could not be downloaded ({first_line(error)})",
            "When offline, give a file with the weights instead of the name.",
        ) from error
    state = model.state_dict()
    architecture = _at_size_of(fit_arguments(name, state, shapes_of(state), None), weights)
    arguments = dict(architecture.arguments)
    if hasattr(model, "transform_input"):
        arguments["transform_input"] = model.transform_input
    eps = {module.eps for module in model.modules() if isinstance(module, FrozenBatchNorm2d)}
    if eps and eps != {1e-5}:  # 0 for the detectors whose weights come from Caffe2
        arguments["frozen_batch_norm_eps"] = eps.pop()
    return Architecture(name, arguments, architecture.input_size, architecture.task), model.eval()


def _check_reachable(url: str) -> None:
    """Fail early if the host does not answer.

    torch.hub would print first, and would wait forever.
    """
    if not Path(torch.hub.get_dir(), "checkpoints", Path(url).name).exists():
        urllib.request.urlopen(url, timeout=10).close()


# ---- which weights a file has --------------------------------------------------------------------


def weights_of(name: str) -> tuple[WeightsEnum, ...]:
    """torchvision's weights for a network, its default ones first; () for any other network."""
    if name not in torchvision.models.list_models():
        return ()
    weights = torchvision.models.get_model_weights(name)
    default = getattr(weights, "DEFAULT", None)
    return tuple(sorted(weights, key=lambda one: one is not default))


def identified(name: str, sha256: str) -> WeightsEnum | None:
    """The weights for a network whose file has this SHA-256; None if there are none."""
    for weights in weights_of(name):
        digits = re.search(r"-([0-9a-f]{8,})$", Path(weights.url).stem)
        if digits and sha256.startswith(digits[1]):
            return weights
    return None


def as_pretrained(architecture: Architecture, sha256: str) -> Architecture:
    """The architecture of a file, with what its SHA-256 says if it is one of torchvision's.

    These are ``transform_input=True``, if the weights need it and the architecture does not say,
    and the size of the images that the weights were trained on (384 pixels for some).
    """
    weights = identified(architecture.name, sha256)
    if weights is None:
        return architecture
    arguments = architecture.arguments
    if architecture.name in TRANSFORMING:
        arguments = {"transform_input": True} | arguments
    return _at_size_of(dataclasses.replace(architecture, arguments=arguments), weights)


def _at_size_of(architecture: Architecture, weights: WeightsEnum) -> Architecture:
    """A classifier at the size that its weights' images are cropped to; others as they are."""
    crop: Any = getattr(weights.transforms(), "crop_size", None)
    size = architecture.input_size
    if architecture.task != "classification" or not crop or size is None or len(size) != 3:
        return architecture
    return dataclasses.replace(architecture, input_size=(size[0], int(crop[0]), int(crop[-1])))
