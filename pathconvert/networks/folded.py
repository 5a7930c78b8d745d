"""Networks whose BatchNorms were folded into the convolutions before them.

In evaluation mode, a BatchNorm behind a convolution is the same convolution with other weights and
a bias. So a folded network has no tensors of the BatchNorm, and a bias in the convolution, also
where the stock network has none. A BatchNorm without a convolution right before it stays: in a
DenseNet every second one does. No stock class loads such a file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from pathconvert.networks.resizing import replace, set_bias


def pairs(model: nn.Module) -> dict[str, str]:
    """BatchNorm → the convolution right before it, whose result goes nowhere else.

    They are neighbours in the module that holds both. In torchvision's networks and in
    ``networks/cifar.py`` that is so exactly where one reads the other.
    """
    found = {}
    for path, parent in model.named_modules():
        prefix = f"{path}." if path else ""
        before: tuple[str, nn.Module] | None = None
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm) and before is not None:
                convolution = _last_convolution(*before)
                if convolution is not None:
                    found[prefix + name] = prefix + convolution
            before = (name, child)
    return found


def _last_convolution(name: str, module: nn.Module) -> str | None:
    """The convolution that a module ends in; itself, or the last one of an ``nn.Sequential``."""
    if isinstance(module, _ConvNd):
        return name
    if isinstance(module, nn.Sequential) and len(module):
        last, child = list(module.named_children())[-1]
        inner = _last_convolution(last, child)
        return None if inner is None else f"{name}.{inner}"
    return None


def fold_structure(model: nn.Module, kept: Collection[str] = ()) -> None:
    """Give a stock network the structure of its folded form; its values stay undefined.

    Args:
        model: changed in place.
        kept: the BatchNorms that stay, although a convolution stands before them.
    """
    for norm, convolution in pairs(model).items():
        if norm in kept:
            continue
        layer = model.get_submodule(convolution)
        assert isinstance(layer, _ConvNd)
        set_bias(layer, True)
        replace(model, norm, nn.Identity())


def kept_norms(model: nn.Module, names: Mapping[str, object]) -> list[str] | None:
    """Which BatchNorms were not folded, although they could be.

    Args:
        model: the stock network.
        names: the tensors of a file by name.

    Returns:
        None if no BatchNorm was folded.
    """
    candidates = pairs(model)
    folded = [
        norm
        for norm, convolution in candidates.items()
        if not any(f"{norm}.{leaf}" in names for leaf in ("weight", "bias", "running_var"))
        and f"{convolution}.bias" in names
    ]
    return [norm for norm in candidates if norm not in folded] if folded else None
