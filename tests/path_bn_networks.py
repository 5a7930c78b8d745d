"""Small networks for the tests of Path-BN, and how their outputs are compared."""

from __future__ import annotations

import copy
from typing import Any

import torch
from sample_networks import network
from torch import Tensor, nn

from pathconvert.conversion.equivalence import forward_outputs
from pathconvert.path_bn.layer import PathBN


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def output(model: nn.Module, x: Any, training: bool = False) -> Tensor:
    return forward_outputs(model, x, training=training)[0]


def layers(model: nn.Module) -> dict[str, PathBN]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PathBN)}


class Chain(nn.Sequential):
    """conv, BatchNorm, ReLU, then ``middle`` (with its BatchNorm unless ``bn`` is False), ReLU,
    mean, classifier.
    """

    def __init__(
        self, middle: nn.Module, channels: int = 6, kind: int = 2, bn: bool = True
    ) -> None:
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[kind]
        norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[kind]
        out = middle.out_channels
        after = [norm(out)] if bn else []
        super().__init__(
            conv(3, channels, 3), norm(channels), nn.ReLU(), middle, *after, nn.ReLU(),
            nn.Flatten(2), Mean(),
            nn.Linear(out, 4),
        )  # fmt: skip


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(2)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """float64; every γ, β and statistic away from 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.5, generator=generator)
                module.running_var.uniform_(0.3, 2.0, generator=generator)
    return model


@torch.no_grad()
def with_statistics_of(model: nn.Module, x: Tensor) -> nn.Module:
    """Running statistics are those of ``x`` to the last bit: training mode and evaluation mode
    agree.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def note(module: Any, args: tuple[Tensor, ...]) -> None:
        dims = [d for d in range(args[0].dim()) if d != 1]
        var, mean = torch.var_mean(args[0], dims, correction=0)
        module.running_mean.copy_(mean)
        module.running_var.copy_(var)

    handles = [norm.register_forward_pre_hook(note) for norm in norms]
    model.eval()(x)
    for handle in handles:
        handle.remove()
    return model


GEOMETRIES = {
    "3x3": nn.Conv2d(6, 6, 3, padding=1),
    "1x1": nn.Conv2d(6, 6, 1),
    "no padding": nn.Conv2d(6, 6, 3),
    "too much padding": nn.Conv2d(6, 6, 1, padding=2),
    "stride": nn.Conv2d(6, 6, 3, stride=2, padding=1),
    "stride, 1x1": nn.Conv2d(6, 8, 1, stride=2),
    "dilation": nn.Conv2d(6, 6, 3, dilation=2, padding=2),
    "dilation, stride and odd padding": nn.Conv2d(6, 6, 3, dilation=2, stride=3, padding=1),
    "even kernel": nn.Conv2d(6, 6, 4, padding=1),
    "oblong": nn.Conv2d(6, 6, (1, 5), padding=(0, 2), stride=(2, 1)),
    "reflecting": nn.Conv2d(6, 6, 1, padding=2, padding_mode="reflect"),
    "circular": nn.Conv2d(6, 6, 5, padding=2, padding_mode="circular"),
    "same": nn.Conv2d(6, 6, 4, padding="same"),
    "wider": nn.Conv2d(6, 9, 3, padding=1),
    "narrower": nn.Conv2d(6, 2, 3, padding=1),
    "groups": nn.Conv2d(6, 9, 3, groups=3, padding=1),
    "depthwise": nn.Conv2d(6, 6, 3, groups=6, padding=1),
    "depthwise, two each": nn.Conv2d(6, 12, 3, groups=6, padding=1),
    "no bias": nn.Conv2d(6, 6, 3, padding=1, bias=False),
    "1d": nn.Conv1d(6, 6, 3, padding=1),
    "3d": nn.Conv3d(6, 6, 3, padding=1, stride=2),
}


def geometry(name: str, bn: bool = True) -> tuple[nn.Module, Tensor]:
    middle = copy.deepcopy(GEOMETRIES[name])
    dims = middle.weight.dim() - 2
    return randomised(Chain(middle, kind=dims, bn=bn)), draw(4, 3, *(8,) * dims)


def resnet_and_images() -> tuple[nn.Module, Tensor]:
    """A trained ResNet-18 in miniature: statistics of the images."""
    x = draw(8, 3, 32, 32)
    return with_statistics_of(randomised_resnet(), x), x


def randomised_resnet() -> nn.Module:
    model = network("resnet18", torch.float64)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.abs_().clamp_(min=0.5)
    return model
