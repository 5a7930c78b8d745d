"""Parameter groups in path space.

What lives on chains, the ordinary rest, and a group's chains during training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from pathconvert.choices import Start
from pathconvert.conversion.reparameterize import Conversion
from pathconvert.errors import PathconvertError
from pathconvert.training.optimizer.chains import Chains
from pathconvert.training.optimizer.finder import find_chains
from pathconvert.training.optimizer.layout import Layout


@dataclass(frozen=True)
class PathGroup:
    """What a parameter group brings along about its chains.

    Attributes:
        names: names of the group's parameters, in the order of the group.
        chains: the chains for either choice of start.
    """

    names: tuple[str, ...]
    chains: Mapping[Start, Chains]


def path_parameter_groups(
    model: nn.Module | Conversion,
    *,
    ordinary_lr: float | None = None,
    ordinary_momentum: float | None = None,
    ordinary_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Make parameter groups for :class:`~pathconvert.training.GSGD`.

    One has what lives on chains, the other the ordinary rest.

    Args:
        model: a network in path or Path-BN form, which carries its record; or the conversion
            itself. Wrap it (DDP, ``torch.compile``) afterwards.
        ordinary_lr, ordinary_momentum, ordinary_weight_decay: settings of the ordinary parameters
            (BatchNorm, biases, shortcuts, a classifier that reads no chain); None takes the
            optimizer's own.

    Returns:
        Two groups, the path group first. A group without parameters is left out.

    Raises:
        RecordError: ``model`` carries no record, or a record from before chains were recorded.
        PathconvertError: a parameter is sharded.
    """
    if isinstance(model, Conversion):
        model = model.model
    refuse_special(dict(model.named_parameters()))
    starts: tuple[Start, ...] = get_args(Start)
    chains = {start: find_chains(model, start) for start in starts}
    touched = set().union(*(found.parameters() for found in chains.values()))
    named = dict(model.named_parameters())
    names = tuple(name for name in named if name in touched)
    given = {
        "lr": ordinary_lr,
        "momentum": ordinary_momentum,
        "weight_decay": ordinary_weight_decay,
    }
    path = {"params": [named[name] for name in names], "path": PathGroup(names, chains)}
    ordinary: dict[str, Any] = {"params": [p for name, p in named.items() if name not in touched]}
    return [
        group
        for group in (path, ordinary | {k: v for k, v in given.items() if v is not None})
        if group["params"]
    ]


class GroupChains:
    """The chains of a path group, and their layout for the gradients that its parameters have.

    Args:
        group: what the group brought along.
        params: the group's parameters, in the order of ``group.names``; only their shapes are kept.

    Attributes:
        names: names of the group's parameters.
        chains: the chains for either choice of start.
    """

    def __init__(self, group: PathGroup, params: Sequence[Tensor]) -> None:
        self.names, self.chains = group.names, group.chains
        self._shapes = {name: p.shape for name, p in zip(group.names, params, strict=True)}
        self._layout: tuple[Tensor | None, Any, Layout] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_layout": None}

    def begin_at(self, start: Start, element: Tensor) -> None:
        """Take the start weights that a checkpoint saved.

        The largest weights were chosen as starts, and other weights may have become the largest
        since.

        Args:
            start: the choice of start that the saved group has.
            element: places of the start weights, as in :attr:`Chains.element`.

        Raises:
            RecordError: the saved start weights do not belong to these chains.
        """
        chains = self.chains[start]
        if not torch.equal(element.cpu(), chains.element):
            self.chains = {**self.chains, start: chains.beginning_at(element.cpu(), self._shapes)}
            self._layout = None

    def layout(self, group: Mapping[str, Any]) -> Layout:
        """The layout for the gradients that the group's parameters have now.

        Made anew only when something changed.

        Raises:
            PathconvertError: the parameters are on several devices, or have other shapes than at
                first.
        """
        params = dict(zip(self.names, group["params"], strict=True))
        trained = frozenset(name for name, p in params.items() if p.grad is not None)
        gauge = group["unit_gauge"]
        key = group["start"], trained, [(p.device, p.dtype) for p in params.values()]
        if self._layout is None or self._layout[0] is not gauge or self._layout[1] != key:
            self._layout = gauge, key, self._make_layout(params, gauge, group["start"], trained)
        return self._layout[2]

    def _make_layout(
        self,
        params: Mapping[str, Tensor],
        gauge: Tensor | None,
        start: Start,
        trained: frozenset[str],
    ) -> Layout:
        devices = {p.device for p in params.values()}
        if len(devices) > 1:
            where = ", ".join(sorted(map(str, devices)))
            raise PathconvertError(
                f"GSGD's chains run over parameters on several devices: {where}",
                "Move the whole model to one device; for several GPUs use DistributedDataParallel.",
            )
        for name, p in params.items():
            if p.shape != self._shapes[name]:
                raise PathconvertError(
                    f"{name} had the shape {list(self._shapes[name])} and has {list(p.shape)} now:"
                    " GSGD needs whole parameters, not sharded or flattened ones",
                    "Train it with DistributedDataParallel.",
                )
        return Layout(self.chains[start], gauge, params, trained)


def refuse_transposed(chains: Chains) -> None:
    """Refuse transposed convolutions on chains, which ``weight_norm`` cannot handle.

    It needs the norm of every row, and the rows of a transposed convolution are not the weight's
    first dimension.

    Raises:
        PathconvertError: a transposed convolution lies on a chain.
    """
    for name, tensor in chains.tensors.items():
        if tensor.transposed:
            raise PathconvertError(
                f"weight_norm does not support the transposed convolution {name}",
                "Leave weight_norm (--weight-norm) out.",
            )


def refuse_special(params: Mapping[str, Tensor]) -> None:
    """Refuse tensor subclasses such as FSDP's DTensor.

    Path coordinates are read from whole parameters.

    Raises:
        PathconvertError: a parameter is neither a Tensor nor a Parameter.
    """
    for name, p in params.items():
        if type(p) not in (Tensor, nn.Parameter):
            raise PathconvertError(
                f"{name} is a {type(p).__name__}: GSGD needs whole parameters, not sharded or other"
                " special ones",
                "Train it with DistributedDataParallel.",
            )


def refuse_complex(params: Mapping[str, Tensor]) -> None:
    """Refuse parameters that are not floating-point numbers.

    Raises:
        PathconvertError: a parameter is complex, or holds integers.
    """
    for name, p in params.items():
        if not p.is_floating_point():
            raise PathconvertError(f"{name} is {p.dtype}: path coordinates are real numbers")
