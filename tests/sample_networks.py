"""Torchvision networks with seeded random numbers, built without torchvision's own (slow)
initialisation.

Weights are He-like, so that activations neither die nor explode. BatchNorms have random statistics
and γ of either sign; in every BatchNorm the first γ is tiny and the second is 0, so that which
channels are *dead* follows from the architecture alone.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from pathconvert.networks.architectures import Architecture, build

TINY, CLASSES = 1e-6, 7
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, FrozenBatchNorm2d)

# A stretch of random numbers, twice in a row, is copied over and over: drawing 140 million takes
# longer than all the rest. Its prime length keeps the rows of a matrix apart.
PERIOD = 1_000_003
_POOL = (
    torch.rand(PERIOD, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
).repeat(2)


def network(name: str, dtype: torch.dtype = torch.float32, **arguments: Any) -> nn.Module:
    """A torchvision network with :data:`CLASSES` classes and random numbers, in evaluation mode.

    Args:
        name: torchvision's name for it.
        dtype: of parameters and statistics.
        **arguments: of its builder; ``frozen_batch_norm`` as in ``architectures.py``.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # parameters are made in it, not copied to it
    try:
        model = build(Architecture(name, {"num_classes": CLASSES, **arguments}))
    finally:
        torch.set_default_dtype(before)
    return randomise(model)


def narrow_classifier(model: nn.Module) -> nn.Module:
    """AlexNet and VGG with 64 hidden units in the classifier, not 4096: conversions would take
    minutes.
    """
    linear = [module for module in model.classifier if isinstance(module, nn.Linear)]
    widths = [(linear[0].in_features, 64), (64, 64), (64, CLASSES)]
    layers = iter(nn.Linear(*width, dtype=torch.float64) for width in widths)
    for i, module in enumerate(model.classifier):
        if isinstance(module, nn.Linear):
            model.classifier[i] = next(layers)
    return model


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Random numbers for every parameter and statistic of ``model``, the same for the same names
    and shapes.
    """
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS):
            _randomise_batch_norm(module, name)
            continue
        for kind, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                # He, uniform
                _fill(parameter, f"{name}.{kind}", math.sqrt(6 / parameter[0].numel()))
            elif kind == "weight":  # γ of a LayerNorm
                _fill(parameter, f"{name}.{kind}", 0.5, 1.0)
            else:
                _fill(parameter, f"{name}.{kind}", 0.1)
    return model


def _randomise_batch_norm(module: Any, name: str) -> None:
    if module.running_var is not None:
        _fill(module.running_mean, f"{name}.mean", 0.2)
        _fill(module.running_var, f"{name}.var", 0.6, 1.0)
    if module.weight is not None:
        sign = torch.empty_like(module.weight)
        _fill(sign, f"{name}.sign", 1.0)
        _fill(module.weight, f"{name}.weight", 0.4, 0.9)
        module.weight *= sign.sign()
        module.weight[:1] = TINY
        module.weight[1:2] = 0
        _fill(module.bias, f"{name}.bias", 0.3)


def _fill(target: Tensor, key: str, spread: float, centre: float = 0.0) -> None:
    """Numbers in ``centre`` ± ``spread``, from a place in the pool that ``key`` names."""
    start = zlib.crc32(key.encode()) % PERIOD
    flat = target.view(-1)
    whole = len(flat) // PERIOD
    stretch = _POOL[start : start + PERIOD]
    flat[: whole * PERIOD].view(whole, PERIOD).copy_(stretch)
    flat[whole * PERIOD :].copy_(stretch[: len(flat) - whole * PERIOD])
    target.mul_(spread).add_(centre)
