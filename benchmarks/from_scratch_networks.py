"""The networks that ``from_scratch.py`` trains, at the papers' initialisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from pathconvert import PathBN, reparameterize, to_path_bn


def _unit(into: int, out: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(into, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]


def _head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]


def build(name: str, width: int) -> nn.Module:
    """PlainNet-18 or ResNet-18 for small images: a 3×3 stem and four stages of width, 2, 4 and 8
    times it.
    """
    layers, into = _unit(3, width), width
    for stage in range(4):
        for block in range(2):
            out, stride = width << stage, 2 if stage and not block else 1
            if name == "plainnet18":
                layers += [*_unit(into, out, stride), *_unit(out, out)]
            else:
                skip = None
                if stride > 1 or into != out:
                    skip = nn.Sequential(
                        nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out)
                    )
                layers.append(BasicBlock(into, out, stride, skip))
            into = out
    return nn.Sequential(*layers, *_head(into))


def stack(depth: int, width: int) -> nn.Sequential:
    """The stacked CNN of PBN 5.2: kernel 3, stride 1, padding 1, no bias."""
    return nn.Sequential(
        *(m for i in range(depth) for m in _unit(width if i else 3, width)), *_head(width)
    )


@torch.no_grad()
def initialise(model: nn.Module, small: float) -> None:
    """The papers' start for every layer on a chain, He's for the others.

    γ = 1, β = 0, statistics as new.

    Chains are those of scope ``block``: in a network with residual blocks, they lie inside these.
    """
    has_blocks = any(isinstance(module, BasicBlock) for module in model.modules())
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, nn.Conv2d | nn.Linear | PathBN):
            if has_blocks and not name.endswith(("conv1", "conv2")):
                randomise(module)
                continue
            weight = module.weight
            nn.init.normal_(weight, std=small / math.sqrt(3 * weight[0].numel()))
            k = torch.arange(max(weight.shape[:2]))
            weight[_centre(weight, k % weight.shape[0], k % weight.shape[1])] = 1.0
            if isinstance(module, PathBN):  # holds zeros where its pivots are, which are apart
                weight[_centre(weight, module.pivot_row, module.pivot_column)] = 0.0
            elif module.bias is not None:
                nn.init.zeros_(module.bias)


def randomise(module: nn.Module) -> None:
    """As torchvision's ResNets begin."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        module.reset_parameters()


def _centre(weight: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
    return (rows, columns, *(torch.full_like(rows, size // 2) for size in weight.shape[2:]))


def begin(
    model: nn.Module, norm: str, small: float, skip_scale: float, size: tuple[int, int, int]
) -> nn.Module:
    """``model`` in path or Path-BN form, at the papers' initialisation."""
    example = torch.rand(1, *size)
    initialise(model, small)
    conversion = reparameterize(model, example, pivot="diagonal")
    converted = (
        to_path_bn(conversion, example, skip_scale=skip_scale)
        if norm == "path-bn"
        else conversion.model
    )
    initialise(converted, small)  # the function is to be new; form and record stay
    return converted
