"""State dicts of torchvision's networks, and errors about them."""

import pytest
import torch
import torchvision
from torch import Tensor

from pathconvert.errors import ArchitectureError
from pathconvert.networks.architectures import (
    Architecture,
    build,
)


def tensors_of(name: str, **arguments: object) -> dict[str, Tensor]:
    """A state dict on the meta device, made by torchvision and not by the code under test."""
    builder = torchvision.models.get_model_builder(name)
    if builder.__module__.rpartition(".")[0] != "torchvision.models":
        arguments["weights_backbone"] = None
    if ".video." in builder.__module__:
        arguments.pop("weights_backbone")
    if name in ("googlenet", "inception_v3"):
        arguments["init_weights"] = False
    if name.startswith("regnet"):  # its constructor reads numbers from tensors
        return build(Architecture(name, arguments)).state_dict()
    with torch.device("meta"):
        return builder(weights=None, **arguments).state_dict()


def refusal(function, *arguments, **options) -> tuple[str, str]:
    with pytest.raises(ArchitectureError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value) + caught.value.tip
    assert caught.value.tip
    return str(caught.value), caught.value.tip
