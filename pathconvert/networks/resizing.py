"""Change the inputs, the stem and the widths of a stock network, in place.

A stem is written as its convolution's kernel size and stride, and whether a max-pool follows it:
``conv3-stride2-maxpool``. Padding is half the kernel size, rounded down. ``cifar`` is
``conv3-stride1``: the stem that is usual for 32×32 images.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from pathconvert.errors import ArchitectureError

_CIFAR = "conv3-stride1"
_STEM = re.compile(r"conv([1-9]\d?)-stride([1-9])(-maxpool)?")
#: First convolution → the max-pool behind it, in the networks whose stem can be changed. A name
#: ends in one of these.
_POOLS = {
    "features.conv0": "features.pool0",  # DenseNet
    "conv1.conv": "maxpool1",  # GoogLeNet
    "conv1.0": "maxpool",  # ShuffleNet
    "conv1": "maxpool",  # ResNet, also below ``backbone.`` and ``backbone.body.``
}


def is_layer(module: nn.Module) -> bool:
    """Whether the widths of a module can be changed: a convolution, Linear or BatchNorm."""
    return isinstance(module, _ConvNd | nn.Linear | _BatchNorm)


def shape_of(layer: nn.Module) -> tuple[int, ...]:
    """The shape of a layer's weight."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return tuple(weight.shape)


def first_convolution(model: nn.Module) -> str:
    """The name of the convolution that reads the network's input."""
    names: Iterator[str] = (
        name for name, module in model.named_modules() if isinstance(module, _ConvNd)
    )
    return next(names)


def set_in_channels(model: nn.Module, channels: int) -> None:
    """Let the first convolution read inputs with another number of channels."""
    convolution = model.get_submodule(first_convolution(model))
    outputs, _, *kernel = shape_of(convolution)
    resize(convolution, (outputs, channels, *kernel))


def pool_of(model: nn.Module, convolution: str) -> str | None:
    """The max-pool of the stem with this convolution; None if the network has no such stem."""
    there = {name for name, _ in model.named_modules()}
    for ending, pool in _POOLS.items():
        if convolution == ending or convolution.endswith(f".{ending}"):
            name = convolution.removesuffix(ending) + pool
            return name if name in there else None
    return None


def parse_stem(text: object) -> tuple[int, int, bool]:
    """The kernel size, the stride, and whether a max-pool follows.

    Raises:
        ArchitectureError: it is not written as this module's docstring says.
    """
    found = _STEM.fullmatch(_CIFAR if text == "cifar" else str(text))
    if not found:
        raise ArchitectureError(
            f"the stem {str(text)!r} cannot be read",
            "Write stem=cifar for a 3×3 convolution with stride 1 and no max-pool, or the kernel"
            " size, the stride and the max-pool: stem=conv3-stride2-maxpool",
        )
    return int(found[1]), int(found[2]), bool(found[3])


def set_stem(model: nn.Module, text: object) -> None:
    """Give a network another stem.

    Raises:
        ArchitectureError: the network has no stem that can be changed, or the text is not a stem.
    """
    kernel, stride, with_pool = parse_stem(text)
    name = first_convolution(model)
    pool, convolution = pool_of(model, name), model.get_submodule(name)
    if pool is None or not isinstance(convolution, nn.Conv2d):
        raise ArchitectureError(
            f"the stem of a {type(model).__name__} cannot be changed",
            "Leave out stem=, or name a builder of your own: --arch package.module:builder",
        )
    outputs, inputs, *_ = convolution.weight.shape
    resize(convolution, (outputs, inputs, kernel, kernel))
    convolution.stride = (stride, stride)
    convolution.padding = (kernel // 2, kernel // 2)
    if not with_pool:
        replace(model, pool, nn.Identity())


def pooled_side(model: nn.Module) -> int | None:
    """The side of the feature map that a VGG's or AlexNet's classifier reads; None in others."""
    pool = getattr(model, "avgpool", None)
    side = pool.output_size if isinstance(pool, nn.AdaptiveAvgPool2d) else 1
    side = side[0] if isinstance(side, tuple) else side
    return None if side in (None, 1) else int(side)


class ConcatenatedPool(nn.Module):
    """The maximum of every channel, then the mean of every channel: [N, C, H, W] → [N, 2 C, 1, 1].

    fastai puts it in the place of average pooling.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The pooled features."""
        return torch.cat([F.adaptive_max_pool2d(x, 1), F.adaptive_avg_pool2d(x, 1)], 1)


def pools_to_one(model: nn.Module) -> bool:
    """Whether a network averages every channel in a module that can be replaced."""
    pool = getattr(model, "avgpool", None)
    return isinstance(pool, nn.AdaptiveAvgPool2d) and pooled_side(model) is None


def set_avgpool(model: nn.Module, pooling: object) -> None:
    """Give a network another pooling before its classifier.

    Args:
        model: changed in place.
        pooling: the side of the feature map that a VGG's or AlexNet's classifier reads; or
            ``concat`` for :class:`ConcatenatedPool` in other networks.

    Raises:
        ArchitectureError: the network has no such pooling.
    """
    if pooling == "concat" and pools_to_one(model):
        replace(model, "avgpool", ConcatenatedPool())
    elif pooled_side(model) is not None and isinstance(pooling, int) and pooling > 0:
        replace(model, "avgpool", nn.AdaptiveAvgPool2d(pooling))
    else:
        raise ArchitectureError(
            f"avgpool={pooling} is not possible in a {type(model).__name__}",
            "Leave it out; in a VGG or an AlexNet, give the side of the pooled feature map:"
            " avgpool=1",
        )


def set_widths(model: nn.Module, widths: Mapping[str, Sequence[int]]) -> None:
    """Give layers other numbers of channels.

    Args:
        model: changed in place.
        widths: layer → the first two sizes of its weight, and the number of groups of a convolution
            if that changes; of a BatchNorm the number of channels. 0 keeps the layer's own number
            of outputs, which is that of the classes in the last one.

    Raises:
        ArchitectureError: the network has no such layer.
    """
    layers = dict(model.named_modules())
    for name, sizes in widths.items():
        layer = layers.get(name)
        if layer is None or not is_layer(layer):
            raise ArchitectureError(
                f"the network has no layer {name!r} whose width could be changed",
                "Name the network with --arch.",
            )
        if isinstance(layer, _BatchNorm):
            resize(layer, tuple(sizes))
            continue
        outputs, _, *kernel = shape_of(layer)
        groups = sizes[2] if len(sizes) > 2 else None
        resize(layer, (sizes[0] or outputs, sizes[1], *kernel), groups)


def set_biases(model: nn.Module, biases: Mapping[str, bool]) -> None:
    """Give layers a bias, or take it away.

    Args:
        model: changed in place.
        biases: convolution or linear layer → whether it has a bias.

    Raises:
        ArchitectureError: the network has no such layer.
    """
    layers = dict(model.named_modules())
    for name, has in biases.items():
        layer = layers.get(name)
        if not isinstance(layer, _ConvNd | nn.Linear):
            raise ArchitectureError(
                f"the network has no layer {name!r} that could have a bias",
                "Name the network with --arch.",
            )
        set_bias(layer, bool(has))


def set_bias(layer: _ConvNd | nn.Linear, has: bool) -> None:
    """Give one layer a bias, whose values stay undefined, or take it away."""
    if has and layer.bias is None:
        weight = layer.weight
        empty = torch.empty(len(weight), dtype=weight.dtype, device=weight.device)
        layer.bias = nn.Parameter(empty)
    elif not has:
        layer.bias = None


def resize(layer: nn.Module, shape: Sequence[int], groups: int | None = None) -> None:
    """Give a layer a weight of another shape, and everything that goes with it.

    Args:
        layer: a convolution, Linear or BatchNorm; changed in place.
        shape: of its weight.
        groups: of a convolution; None to keep them.

    Raises:
        ValueError: a size is not positive.
    """
    if min(shape) < 1:
        raise ValueError(f"a layer cannot have a weight of shape {list(shape)}")
    sizes = {"weight": tuple(shape)}
    for name in ("bias", "running_mean", "running_var"):
        sizes[name] = (shape[0],)
    for name, size in sizes.items():
        old = getattr(layer, name, None)
        if old is not None and old.shape != size:
            new = torch.empty(size, dtype=old.dtype, device=old.device)
            setattr(layer, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
    for name, value in _attributes(layer, shape, groups).items():
        setattr(layer, name, value)


def _attributes(layer: nn.Module, shape: Sequence[int], groups: int | None) -> dict[str, Any]:
    if isinstance(layer, _BatchNorm):
        return {"num_features": shape[0]}
    if isinstance(layer, nn.Linear):
        return {"out_features": shape[0], "in_features": shape[1]}
    assert isinstance(layer, _ConvNd)
    groups = groups or layer.groups
    return {
        "out_channels": shape[0],
        "in_channels": shape[1] * groups,
        "kernel_size": tuple(shape[2:]),
        "groups": groups,
    }


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put another module in the place of the one with this name.

    Raises:
        AttributeError: ``model`` has no module of this name.
    """
    path, _, leaf = name.rpartition(".")
    parent = model.get_submodule(path)
    getattr(parent, leaf)  # a name that is not there is an error
    setattr(parent, leaf, module)
