"""The ResNets for 32×32 images: their names and function against other descriptions of them."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from changed_networks import EQUAL, adjusted, answers_of, difference, images, kept, lively
from torch import Tensor, nn

from pathconvert.errors import ArchitectureError
from pathconvert.export import fold
from pathconvert.networks import architectures
from pathconvert.networks.adjusting import adjust
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.builders import build_torchvision
from pathconvert.networks.cifar import BUILDERS

from cifar_resnet import CifarResNet

DATA = os.environ.get("PATHCONVERT_DATA")


def built(name: str, **arguments: object) -> nn.Module:
    torch.manual_seed(0)
    return lively(BUILDERS[name](**arguments))


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


# ---- cifar_resnet20 to 110, as chenyaofo names them ----------------------------------------------

DEPTHS = {20: 3, 32: 5, 44: 7, 56: 9, 110: 18}


@pytest.mark.parametrize("depth", DEPTHS)
def test_small_network_is_torchvisions_blocks_in_three_stages(depth):
    model, other = built(f"cifar_resnet{depth}"), lively(CifarResNet(DEPTHS[depth]))
    assert list(model.state_dict()) == list(other.state_dict())
    other.load_state_dict(model.state_dict())
    x = images(2, 3, 32, 32)
    assert torch.equal(output(model, x), output(other, x))
    weights = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())
    assert weights == depth + 2  # two convolutions in shortcuts, which the depth does not count


@pytest.mark.skipif(DATA is None, reason="PATHCONVERT_DATA names no folder with weights/")
def test_real_weights():
    tensors = torch.load(Path(str(DATA), "weights", "resnet56_cifar10.pth"), weights_only=True)
    model = build_torchvision("cifar_resnet56", {"num_classes": 10})
    other = CifarResNet()
    for network in (model, other):
        network.load_state_dict(tensors)
        network.double().eval()
    x = images(4, 3, 32, 32)
    assert (output(model, x) - output(other, x)).abs().max() < 1e-12


# ---- cifar_resnet18 to 152, as kuangliu names them -----------------------------------------------

WIDE = {
    18: ((2, 2, 2, 2), 2),
    34: ((3, 4, 6, 3), 2),
    50: ((3, 4, 6, 3), 3),
    101: ((3, 4, 23, 3), 3),
    152: ((3, 8, 36, 3), 3),
}


def normalised(t: Mapping[str, Tensor], conv: str, norm: str, x: Tensor, stride: int) -> Tensor:
    """A convolution that keeps the size up to its stride, then BatchNorm."""
    weight = t[f"{conv}.weight"]
    y = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
    statistics = t[f"{norm}.running_mean"], t[f"{norm}.running_var"]
    return F.batch_norm(y, *statistics, t[f"{norm}.weight"], t[f"{norm}.bias"])


def literal(t: Mapping[str, Tensor], x: Tensor, blocks: tuple[int, ...], depth: int) -> Tensor:
    """The network step by step: ``depth`` convolutions per block, the 3×3 one has the stride."""
    x = F.relu(normalised(t, "conv1", "bn1", x, 1))
    for stage, number in enumerate(blocks, 1):
        for i in range(number):
            block = f"layer{stage}.{i}"
            stride = 2 if stage > 1 and i == 0 else 1
            y = x
            for j in range(1, depth + 1):
                step = stride if j == (1 if depth == 2 else 2) else 1
                y = normalised(t, f"{block}.conv{j}", f"{block}.bn{j}", y, step)
                y = F.relu(y) if j < depth else y
            if f"{block}.shortcut.0.weight" in t:
                x = normalised(t, f"{block}.shortcut.0", f"{block}.shortcut.1", x, stride)
            x = F.relu(y + x)
    x = F.avg_pool2d(x, 4).flatten(1)
    return F.linear(x, t["linear.weight"], t["linear.bias"])


@pytest.mark.parametrize("depth", WIDE)
def test_wide_network_is_what_it_says(depth):
    model = built(f"cifar_resnet{depth}", num_classes=7)
    x = images(1, 3, 32, 32)
    expected = literal(model.state_dict(), x, *WIDE[depth])
    assert expected.shape == (1, 7)
    assert (output(model, x) - expected).abs().max() < EQUAL


def test_wide_network_has_the_known_names():
    names = list(BUILDERS["cifar_resnet18"]().state_dict())
    assert len([name for name in names if not name.endswith("num_batches_tracked")]) == 102
    assert names[0] == "conv1.weight"
    assert "layer2.0.shortcut.0.weight" in names
    assert "layer2.0.shortcut.1.running_var" in names
    assert "layer1.0.shortcut.0.weight" not in names
    assert "layer1.0.shortcut.0.weight" in BUILDERS["cifar_resnet50"]().state_dict()
    assert names[-2:] == ["linear.weight", "linear.bias"]


# ---- building, recognising, adjusting ------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
def test_every_network_loads_from_its_tensors(name):
    model = built(name, num_classes=100)
    architecture = Architecture(name, {"num_classes": 100}, (3, 32, 32), "classification")
    loaded = architectures.load_tensors(kept(architecture), model.state_dict())
    x = images(1, 3, 32, 32)
    assert torch.equal(output(loaded, x), output(model, x))


def another_head(name: str, place: str) -> nn.Module:
    model = BUILDERS[name]()
    features = getattr(model, place).in_features
    setattr(model, place, nn.Sequential(nn.Dropout(), nn.Linear(features, 5)))
    return lively(model)


def grey() -> nn.Module:
    model = BUILDERS["cifar_resnet18"]()
    model.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    return lively(model)


CHANGED = {
    "head": (
        "cifar_resnet20",
        lambda: another_head("cifar_resnet20", "fc"),
        ["head", "num_classes"],
    ),
    "linear": (
        "cifar_resnet18",
        lambda: another_head("cifar_resnet18", "linear"),
        ["head", "num_classes"],
    ),
    "input": ("cifar_resnet18", grey, ["num_classes", "in_channels"]),
    "folded": (
        "cifar_resnet18",
        lambda: fold(built("cifar_resnet18"), images(1, 3, 32, 32)),
        ["num_classes", "batch_norm"],
    ),
    "folded, small": (
        "cifar_resnet20",
        lambda: fold(built("cifar_resnet20"), images(1, 3, 32, 32)),
        ["num_classes", "batch_norm"],
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_changed_network(case):
    name, build, arguments = CHANGED[case]
    model = build()
    result = adjusted(name, model)
    assert list(result.architecture.arguments) == arguments
    channels = result.architecture.input_size[0]
    assert difference(result, model, images(2, channels, 32, 32)) < EQUAL


def test_small_stem_in_a_torchvision_network_is_not_kuanglius():
    """The same layers under torchvision's names: asked about, as nothing says how they are used."""
    model = architectures.build(Architecture("resnet18", {"stem": "cifar", "num_classes": 10}))
    with pytest.raises(ArchitectureError) as caught:
        adjust("resnet18", model.state_dict())
    assert answers_of(caught.value) == ("resnet18", {"stem": "cifar"})


def test_shortcuts_without_weights_are_refused_by_name():
    """akamaster's networks have the same convolutions and pad the shortcuts with zeros."""
    tensors = {
        name.replace("fc.", "linear."): tensor
        for name, tensor in BUILDERS["cifar_resnet20"]().state_dict().items()
        if ".downsample." not in name
    }
    with pytest.raises(ArchitectureError) as caught:
        adjust("cifar_resnet20", tensors)
    assert str(caught.value) == (
        "these tensors are named like those of a CIFAR ResNet whose shortcuts have no weights"
        " (option A, as in akamaster's pytorch_resnet_cifar10): layer2.0 has none, and those of"
        " cifar_resnet20 to cifar_resnet110 are convolutions"
    )
    assert "--arch package.module:builder" in caught.value.tip


def test_blocks_that_normalise_first_do_not_fit():
    """kuangliu's PreActResNet has the same convolutions, and BatchNorms of what comes in."""
    tensors = BUILDERS["cifar_resnet18"]().state_dict()
    for stage, channels in ((2, 64), (3, 128), (4, 256)):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"layer{stage}.0.bn1.{leaf}"] = torch.ones(channels)
        for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            del tensors[f"layer{stage}.0.shortcut.1.{leaf}"]
    assert adjust("cifar_resnet18", tensors) is None
