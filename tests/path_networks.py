"""Small networks on chains, converted, with what ``reference/gsgd.py`` has to know of them."""

from __future__ import annotations

import itertools

import torch
from reference.gsgd import Layer
from torch import Tensor, nn

import pathconvert


class Bottleneck(nn.Module):
    """A residual block of three convolutions between a stem and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv1, self.bn1 = nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.conv3, self.bn3 = nn.Conv2d(5, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_bn(self.stem(x)).relu()
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        x = (x + self.bn3(self.conv3(y))).relu()
        return self.fc(x.mean([2, 3]))


def mlp(*widths: int, bias: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for into, out in itertools.pairwise(widths):
        layers += [nn.Linear(into, out, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 9, 5), nn.ReLU(), nn.Linear(5, 3),
    )  # fmt: skip


def cnn_with_bn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU(),
        nn.Flatten(), nn.Linear(5 * 36, 3),
    )  # fmt: skip


NETWORKS = {
    "equal widths": (
        lambda: mlp(5, 5, 5, 5, bias=False),
        (5,),
        [Layer("0.weight", None, "0"), Layer("2.weight", "0", "2"), Layer("4.weight", "2", None)],
    ),
    "unequal widths": (
        lambda: mlp(4, 6, 3, 7, 2, bias=True),
        (4,),
        [
            Layer("0.weight", None, "0"), Layer("2.weight", "0", "2"), Layer("4.weight", "2", "4"),
            Layer("6.weight", "4", None),
        ],
    ),
    "cnn": (
        cnn,
        (3, 6, 6),
        [
            Layer("0.weight", None, "0"), Layer("2.weight", "0", "2"), Layer("5.weight", "2", "5"),
            Layer("7.weight", "5", None),
        ],
    ),
    "cnn with BatchNorm": (
        cnn_with_bn,
        (3, 6, 6),
        [
            Layer("0.weight", None, "1", "1.weight"), Layer("3.weight", "1", "4", "4.weight"),
            Layer("6.weight", "4", "7", "7.weight"), Layer("10.weight", "7", None),
        ],
    ),
    "residual block": (
        Bottleneck,
        (3, 6, 6),
        [
            Layer("stem.weight", None, None), Layer("conv1.weight", None, "bn1", "bn1.weight"),
            Layer("conv2.weight", "bn1", "bn2", "bn2.weight"), Layer("conv3.weight", "bn2", None),
        ],
    ),
}  # fmt: skip


def in_path_bn(layers: list[Layer], model: nn.Module) -> list[Layer]:
    """The description after to_path_bn."""
    names = {
        name for name, module in model.named_modules() if isinstance(module, pathconvert.PathBN)
    }
    return [
        (
            layer._replace(gamma=layer.weight.replace(".weight", ".bn.weight"), path_bn=True)
            if layer.weight.removesuffix(".weight") in names
            else layer
        )
        for layer in layers
    ]


def converted(
    name: str,
    pivot: str = "matching",
    gauge: str = "unit",
    skip_scale: float | None = None,
    seed: int = 0,
):
    """The conversion, the network to train (in Path-BN form with a skip scale), its description,
    and inputs.
    """
    torch.manual_seed(seed)
    build, size, layers = NETWORKS[name]
    model = build().double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    batches = [torch.randn(4, *size, dtype=torch.float64) for _ in range(3)]
    model.train()
    for x in batches:
        model(x)
    conversion = pathconvert.reparameterize(model.eval(), batches[0], pivot=pivot, gauge=gauge)
    trained = conversion.model
    if skip_scale is not None:
        trained = pathconvert.to_path_bn(conversion, batches[0], torch.cat(batches), skip_scale)
        layers = in_path_bn(layers, trained)
    return conversion, trained.train(), layers, batches


def loss(y: Tensor) -> Tensor:
    return (y.sin() * torch.arange(1, y.shape[1] + 1)).square().sum()
