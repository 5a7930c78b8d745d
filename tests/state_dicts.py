"""State dicts of torchvision's networks, files of them, and errors about them."""

import re
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from pathconvert.errors import ArchitectureError, CheckpointError
from pathconvert.networks import cifar
from pathconvert.networks.architectures import (
    Architecture,
    build,
)
from pathconvert.networks.loading import LoadedNetwork, open_network


def tensors_of(name: str, **arguments: object) -> dict[str, Tensor]:
    """A state dict on the meta device, made by torchvision and not by the code under test."""
    if name in cifar.BUILDERS:
        with torch.device("meta"):
            return cifar.BUILDERS[name](**arguments).state_dict()
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


def trained(name: str) -> nn.Module:
    """A network in float64 whose BatchNorms have seen something."""
    torch.manual_seed(0)
    builder = torchvision.models.get_model_builder(name)
    model = builder(weights=None, num_classes=7).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model


def loaded(tmp_path: Path, state: object, **options: object) -> LoadedNetwork:
    """The network in a file with this content."""
    torch.save(state, tmp_path / "x.pt")
    return open_network(tmp_path / "x.pt", **options)


def file_refusal(tmp_path: Path, state: object, **options: object) -> tuple[str, str]:
    """The message and the tip with which a file with this content is refused."""
    with pytest.raises((ArchitectureError, CheckpointError)) as caught:
        loaded(tmp_path, state, **options)
    message, tip = str(caught.value), caught.value.tip
    assert "\n" not in message + tip
    assert str(tmp_path / "x.pt") in message
    assert tip
    return message.replace(f"{tmp_path}/", ""), tip.replace(f"{tmp_path}/", "")


def assert_computes_the_same(model: nn.Module, source: nn.Module) -> None:
    """Compare the outputs of two networks for images of 64×64 in float64."""
    torch.manual_seed(1)
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = model(images), source(images)
    # float64 rounds at 1e-16, and weights that are computed from parts are rounded once more
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a network that is an attribute of another."""
    return {prefix + name: tensor for name, tensor in state.items()}


def hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet's names as transformers' ResNetForImageClassification has them."""

    def rename(name: str) -> str:
        name = re.sub(r"^conv1\.", "resnet.embedder.embedder.convolution.", name)
        name = re.sub(r"^bn1\.", "resnet.embedder.embedder.normalization.", name)
        name = re.sub(r"^fc\.", "classifier.1.", name)
        stage = re.match(r"layer(\d)\.(\d+)\.", name)
        if not stage:
            return name
        start = f"resnet.encoder.stages.{int(stage[1]) - 1}.layers.{stage[2]}."
        rest = name[stage.end() :]
        rest = rest.replace("downsample.0.", "shortcut.convolution.")
        rest = rest.replace("downsample.1.", "shortcut.normalization.")
        rest = re.sub(r"conv(\d)\.", lambda m: f"layer.{int(m[1]) - 1}.convolution.", rest)
        rest = re.sub(r"bn(\d)\.", lambda m: f"layer.{int(m[1]) - 1}.normalization.", rest)
        return start + rest

    return {rename(name): tensor for name, tensor in state.items()}
