"""GSGD's settings as torch's tests of optimizers want them, and problems to train on."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from path_networks import converted
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.testing._internal.common_optimizers import (
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

from pathconvert.training import GSGD, path_parameter_groups


def gsgd_inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:  # noqa: ARG001
    """The settings to test; torch's own tests choose the parameters."""
    described: dict[str, dict[str, Any]] = {
        "default": {},
        "lr": {"lr": 1e-2},
        "tensor lr": {"lr": torch.tensor(1e-2)},
        "tensor lr of one element": {"lr": torch.tensor([1e-2])},
        "momentum": {"momentum": 0.9, "lr": 1e-2},
        "weight decay": {"weight_decay": 0.1, "lr": 1e-2},
        "maximize": {"maximize": True, "lr": 1e-2},
        "all": {
            "momentum": 0.9,
            "weight_decay": 0.1,
            "decay": "basis_path_norm",
            "maximize": True,
            "lr": 1e-2,
        },
        "balanced": {"anchor": "balanced", "momentum": 0.9, "weight_decay": 0.1, "lr": 1e-2},
        "as the papers": {"anchor": None, "start": "weight", "weight_norm": True, "lr": 1e-4},
    }
    return [
        OptimizerInput(params=None, kwargs=kwargs, desc=name) for name, kwargs in described.items()
    ]


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[2],
    ),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=10),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}

GSGD_DB = [
    OptimizerInfo(
        GSGD,
        optim_inputs_func=gsgd_inputs,
        optim_error_inputs_func=get_error_inputs_for_all_optims,
        scheduler_inputs=([make] for make in SCHEDULERS.values()),
        supported_impls=("foreach",),
        not_og_supported_flags=("foreach", "maximize"),
    )
]


class Problem:
    """A network, the loss to minimise, and the groups of its parameters."""

    def __init__(
        self, on_chains: bool, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        if on_chains:
            _, self.model, _, _ = converted("cnn with BatchNorm", skip_scale=1.0)
        else:
            torch.manual_seed(0)
            self.model = nn.Sequential(
                nn.Flatten(), nn.Linear(108, 6), nn.Sigmoid(), nn.Linear(6, 3)
            )
        self.model.to(device, dtype).train()
        self.on_chains = on_chains
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(8, 3, 6, 6, generator=generator).to(device, dtype)
        self.y = torch.randn(8, 3, generator=generator).to(device, dtype)

    @property
    def params(self) -> list[Any]:
        return (
            path_parameter_groups(self.model) if self.on_chains else list(self.model.parameters())
        )

    def loss(self) -> Tensor:
        return (self.model(self.x) - self.y).square().mean()

    def backward(self) -> Tensor:
        self.model.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def train(self, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
        for _ in range(steps):
            self.backward()
            optimizer.step()

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def pairs(info: OptimizerInfo, device: str) -> Iterator[tuple[bool, dict[str, Any]]]:
    """All settings, both with plain parameters and with chains."""
    inputs = [one.kwargs for one in info.optim_inputs_func(device=device)]
    return itertools.product((False, True), copy.deepcopy(inputs))


def assert_same(found: Any, expected: Any, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(
        found, expected, rtol=tolerance, atol=tolerance, allow_subclasses=True
    )
