"""torchvision's networks with its default weights.

Also what those weights imply that their tensors do not show.
"""

from __future__ import annotations

import urllib.request
from pathlib import Path

import torch
import torchvision
from torch import nn
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
    architecture = fit_arguments(name, state, shapes_of(state), None)
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


def is_pretrained_file(name: str, sha256: str) -> bool:
    """Whether a file has torchvision's own weights for a network.

    The names of those weights end in the beginning of the file's SHA-256.
    """
    urls = (weights.url for weights in torchvision.models.get_model_weights(name))
    return any(Path(url).stem.rpartition("-")[2] == sha256[:8] for url in urls)
