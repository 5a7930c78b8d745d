"""The optimizers that a run can use, and the schedule of their learning rate."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
)

from pathconvert.training.optimizer.gsgd import GSGD
from pathconvert.training.optimizer.path_groups import path_parameter_groups
from pathconvert.training.optimizer.path_sgd import PathSGD
from pathconvert.training.settings import Settings


def make_optimizer(
    model: nn.Module, settings: Settings, input_size: tuple[int, ...]
) -> torch.optim.Optimizer:
    """The optimizer that ``settings`` name.

    Args:
        model: the network, before DDP or ``torch.compile`` wraps it.
        settings: of the run.
        input_size: size of one input, such as (3, 32, 32).

    Raises:
        RecordError: G-SGD is asked for, and ``model`` carries no record of its conversion.
        PathconvertError: G-SGD's ``weight_norm`` is asked for, and a transposed convolution lies on
            a chain.
    """
    common: dict[str, Any] = {
        "lr": settings.lr,
        "momentum": settings.momentum,
        "weight_decay": settings.weight_decay,
    }
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
    """The learning rate of each of ``steps`` steps.

    It rises linearly during the warm-up; then it stays constant, is multiplied by 0.1 at 1/2 and
    3/4 of the remaining steps (PBN-A F.1), or follows a cosine to 0.
    """
    warmup = min(settings.warmup_steps, steps - 1)
    after = steps - warmup
    main: LRScheduler
    if settings.schedule == "cosine":
        main = CosineAnnealingLR(optimizer, T_max=after)
    # with few steps, still two different steps, neither the first
    elif settings.schedule == "step":
        main = MultiStepLR(optimizer, sorted({max(1, after // 2), max(2, after * 3 // 4)}))
    else:
        main = ConstantLR(optimizer, factor=1.0, total_iters=0)
    if not warmup:
        return main
    with warnings.catch_warnings():
        # SequentialLR calls its parts in a way that torch warns about
        warnings.simplefilter("ignore")
        rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
        return SequentialLR(optimizer, [rise, main], milestones=[warmup])
