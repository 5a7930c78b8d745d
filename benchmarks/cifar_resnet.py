"""ResNets for 32×32 images, as in He et al. 2016, section 4.2: ``--arch cifar_resnet:CifarResNet``
from this folder.
"""

from __future__ import annotations

from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet


class CifarResNet(ResNet):
    """torchvision's BasicBlocks in three stages of 16, 32 and 64 channels.

    Args:
        n: blocks per stage; 9 make ResNet-56.
        num_classes: outputs.
    """

    def __init__(self, n: int = 9, num_classes: int = 10) -> None:
        super().__init__(BasicBlock, [1, 1, 1, 1], num_classes=num_classes)
        self.inplanes = 16
        self.conv1, self.bn1, self.maxpool = (
            nn.Conv2d(3, 16, 3, 1, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.Identity(),
        )
        self.layer1 = self._make_layer(BasicBlock, 16, n)
        self.layer2 = self._make_layer(BasicBlock, 32, n, stride=2)
        self.layer3 = self._make_layer(BasicBlock, 64, n, stride=2)
        self.layer4, self.fc = nn.Identity(), nn.Linear(64, num_classes)
