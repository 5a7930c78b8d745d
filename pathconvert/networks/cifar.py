"""ResNets for 32×32 images, which torchvision does not have, named as two collections name them.

=======================================  =========================================================
``cifar_resnet20``, ``32``, …, ``110``   16, 32 and 64 channels in three stages (He et al. 2016,
                                         section 4.2), with a 1×1 convolution where the size
                                         changes; tensors named as in chenyaofo's
                                         pytorch-cifar-models: ``layer1.0.conv1``, ``fc``
``cifar_resnet18``, ``34``, ``50``, …    64 to 512 channels in four stages, without a max-pool;
                                         tensors named as in kuangliu's pytorch-cifar:
                                         ``layer1.0.shortcut.0``, ``linear``
=======================================  =========================================================
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from pathconvert.errors import ArchitectureError
from pathconvert.networks.names_index import Shapes

#: The number of residual blocks in every stage of the small networks: depth = 6 n + 2.
_SMALL = {20: 3, 32: 5, 44: 7, 56: 9, 110: 18}
#: The residual blocks in the four stages of the wide ones, and whether they are bottlenecks.
_WIDE = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}


class SmallResNet(nn.Module):
    """A ResNet with 16, 32 and 64 channels: inputs [N, 3, 32, 32].

    Args:
        blocks: the number of residual blocks in every stage.
        num_classes: the number of outputs.
    """

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _small_stage(16, 16, blocks, stride=1)
        self.layer2 = _small_stage(16, 32, blocks, stride=2)
        self.layer3 = _small_stage(32, 64, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """The class scores [N, num_classes] of images."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def _small_stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    shortcut = None
    if inputs != outputs:
        shortcut = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )
    first = BasicBlock(inputs, outputs, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))


class ResidualBlock(nn.Module):
    """relu(F(x) + shortcut(x)), with two 3×3 convolutions in F, or a bottleneck of three.

    Args:
        inputs: channels that come in.
        channels: of the 3×3 convolutions.
        stride: of the first 3×3 convolution, and of the shortcut.
        bottleneck: whether 1×1 convolutions stand around a 3×3 one; the last has 4 × ``channels``.
    """

    def __init__(self, inputs: int, channels: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = 4 * channels if bottleneck else channels
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        widths = (inputs, *[channels] * (len(kernels) - 1), outputs)
        strided = kernels.index(3)
        for i, kernel in enumerate(kernels):
            step = stride if i == strided else 1
            convolution = nn.Conv2d(
                widths[i], widths[i + 1], kernel, step, padding=kernel // 2, bias=False
            )
            self.add_module(f"conv{i + 1}", convolution)
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(widths[i + 1]))
        self.relu = nn.ReLU()
        self.depth = len(kernels)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """The block's outputs [N, outputs, H / stride, W / stride]."""
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            if i < self.depth:
                y = self.relu(y)
        out: Tensor = self.relu(y + self.shortcut(x))
        return out


class WideStageResNet(nn.Module):
    """A ResNet with 64, 128, 256 and 512 channels and no max-pool: inputs [N, 3, 32, 32].

    Args:
        blocks: the number of residual blocks in every stage.
        bottleneck: whether they are bottlenecks.
        num_classes: the number of outputs.
    """

    def __init__(self, blocks: tuple[int, ...], bottleneck: bool, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        growth = 4 if bottleneck else 1
        self.layer1 = _wide_stage(64, 64, blocks[0], 1, bottleneck)
        self.layer2 = _wide_stage(64 * growth, 128, blocks[1], 2, bottleneck)
        self.layer3 = _wide_stage(128 * growth, 256, blocks[2], 2, bottleneck)
        self.layer4 = _wide_stage(256 * growth, 512, blocks[3], 2, bottleneck)
        self.avgpool = nn.AvgPool2d(4)
        self.linear = nn.Linear(512 * growth, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """The class scores [N, num_classes] of images."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.linear(torch.flatten(self.avgpool(x), 1))
        return logits


def _wide_stage(
    inputs: int, channels: int, blocks: int, stride: int, bottleneck: bool
) -> nn.Sequential:
    outputs = 4 * channels if bottleneck else channels
    first = ResidualBlock(inputs, channels, stride, bottleneck)
    rest = (ResidualBlock(outputs, channels, 1, bottleneck) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


def refuse_padded_shortcuts(shapes: Shapes) -> None:
    """Refuse the CIFAR ResNets of akamaster and others, whose shortcuts have no weights.

    Their channels are padded with zeros where the size changes (He et al. 2016, option A), so the
    network computes something else.

    Args:
        shapes: of the tensors of a file.

    Raises:
        ArchitectureError: the tensors are those of such a network.
    """
    first = shapes.get("layer2.0.conv1.weight", ())
    if first[:2] != (32, 16) or any(
        name.startswith(("layer2.0.downsample", "layer2.0.shortcut")) for name in shapes
    ):
        return
    raise ArchitectureError(
        "these tensors are named like those of a CIFAR ResNet whose shortcuts have no weights"
        " (option A, as in akamaster's pytorch_resnet_cifar10): layer2.0 has none, and those of"
        " cifar_resnet20 to cifar_resnet110 are convolutions",
        "Name the class that the network was trained with: --arch package.module:builder",
    )


#: Name → a function that builds the network; each takes ``num_classes``.
BUILDERS: dict[str, Callable[..., nn.Module]] = {
    **{
        f"cifar_resnet{depth}": functools.partial(SmallResNet, blocks)
        for depth, blocks in _SMALL.items()
    },
    **{
        f"cifar_resnet{depth}": functools.partial(WideStageResNet, blocks, bottleneck)
        for depth, (blocks, bottleneck) in _WIDE.items()
    },
}
