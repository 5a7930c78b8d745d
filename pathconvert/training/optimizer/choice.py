"""The optimizers that a run can take, and their learning rate over time."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR

from pathconvert.training.optimizer.gsgd import GSGD, path_parameter_groups
from pathconvert.training.optimizer.path_sgd import PathSGD
from pathconvert.training.settings import Settings


def make_optimizer(model: nn.Module, settings: Settings, input_size: tuple[int, ...]) -> torch.optim.Optimizer:
    """The optimizer that ``settings`` name, for ``model``, which is not yet wrapped by DDP or ``torch.compile``.

    Raises:
        RecordError: G-SGD, and ``model`` carries no record of its conversion.
        PathconvertError: Path-SGD, and the network is none that it can do.
    """
    common: dict[str, Any] = {"lr": settings.lr, "momentum": settings.momentum, "weight_decay": settings.weight_decay}
    if settings.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), **common)
    if settings.optimizer == "path-sgd":
        return PathSGD(model, input_size, **common)
    return GSGD(
        path_parameter_groups(model, ordinary_lr=settings.ordinary_lr),
        **common,
        decay=settings.decay,
        anchor=None if settings.anchor == "none" else settings.anchor,
        start=settings.start,
        weight_norm=settings.weight_norm,
    )


def make_schedule(optimizer: torch.optim.Optimizer, settings: Settings, steps: int) -> LRScheduler:
    """The rate of ``steps`` steps: a linear rise, then constant, × 0.1 at 1/2 and 3/4 (PBN-A F.1), or a cosine to 0."""
    warmup = min(settings.warmup_steps, steps - 1)
    after = steps - warmup
    main: LRScheduler
    if settings.schedule == "cosine":
        main = CosineAnnealingLR(optimizer, T_max=after)
    elif settings.schedule == "step":  # from the second step on, one × 0.1 at a time
        main = MultiStepLR(optimizer, sorted({max(1, after // 2), max(2, after * 3 // 4)}))
    else:
        main = ConstantLR(optimizer, factor=1.0, total_iters=0)
    if not warmup:
        return main
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR itself calls its parts in the way that torch warns of
        rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
        return SequentialLR(optimizer, [rise, main], milestones=[warmup])
