"""Networks as people change them before they train, and loading them again from their tensors."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pathconvert.errors import ArchitectureError
from pathconvert.networks import architectures
from pathconvert.networks.adjusting import Adjusted, adjust
from pathconvert.networks.architectures import Architecture

#: Both networks multiply the same numbers in the same order; only a kernel may be chosen anew.
EQUAL = 1e-10


def stock(name: str, **arguments: Any) -> nn.Module:
    """A torchvision network with random weights, as torchvision builds it."""
    if name.startswith(("googlenet", "inception", "vgg")):
        arguments.setdefault("init_weights", False)
    if "resnet50" in name and name.startswith(("fcn", "deeplab")):
        arguments["weights_backbone"] = None
    builder: Callable[..., nn.Module] = torchvision.models.get_model_builder(name)
    return builder(weights=None, **arguments)


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """The network in float64 and evaluation mode, with statistics that are not 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.2, 0.2),
            ):
                tensor.uniform_(low, high, generator=generator)
    return model.double().eval()


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def kept(architecture: Architecture) -> Architecture:
    """The architecture as a file keeps it: its arguments go through JSON."""
    arguments = json.loads(json.dumps(architecture.arguments))
    assert arguments == architecture.arguments
    return Architecture(architecture.name, arguments, architecture.input_size, architecture.task)


def adjusted(name: str, model: nn.Module, given: Mapping[str, Any] | None = None) -> Adjusted:
    """What ``adjust`` makes of a network's tensors; there has to be something."""
    result = adjust(name, model.state_dict(), given=given)
    assert result is not None
    return result


def difference(result: Adjusted, model: nn.Module, x: Tensor) -> float:
    """The largest difference of outputs between the network that was found and the original."""
    found = architectures.load_tensors(kept(result.architecture), model.state_dict())
    with torch.no_grad():
        return (found(x) - model(x)).abs().max().item()


def answers_of(error: ArchitectureError) -> tuple[str, dict[str, Any]]:
    """The network and the arguments of the command that a tip proposes."""
    command = re.search(r"--arch '([^']+)'", error.tip)
    assert command, error.tip
    return architectures.called(command[1])


def put(name: str, place: str, module: nn.Module, **arguments: Any) -> nn.Module:
    """A torchvision network in which ``module`` stands at ``place``, as a training script does."""
    model = stock(name, **arguments)
    path, _, leaf = place.rpartition(".")
    setattr(model.get_submodule(path), leaf, module)
    return model
