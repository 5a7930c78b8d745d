"""G-SGD: SGD on the path-values of a ReLU network (Meng et al., ICLR 2019; PBN-A appendix C), as a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.optim.sgd import sgd

from pathconvert.convert import Conversion
from pathconvert.errors import PathconvertError
from pathconvert.training.chains import Chains, find_chains
from pathconvert.training.settings import Start, WeightDecay
from pathconvert.training.update import PathWeight, chain_values, flow, step_chains, step_weights, with_one

Anchor = Literal["initial"] | None


@dataclass(frozen=True)
class PathGroup:
    """What a parameter group knows of its chains.

    Attributes:
        names: of the group's parameters, in their order.
        chains: for either choice of start.
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
    """Parameter groups for :class:`GSGD`: what lives on chains, and the ordinary rest.

    Args:
        model: a network in path or Path-BN form, which carries its record; or the conversion itself. Wrap it (DDP,
            ``torch.compile``) afterwards.
        ordinary_lr, ordinary_momentum, ordinary_weight_decay: for the rest (BatchNorm, biases, shortcuts, a
            classifier that reads no chain); None for those of the optimizer.

    Returns:
        Two groups, the path group first; it is missing where the network has no chain.

    Raises:
        RecordError: ``model`` carries no record, or one of an older pathconvert.
    """
    if isinstance(model, Conversion):
        model = model.model
    starts: tuple[Start, ...] = get_args(Start)
    chains = {start: find_chains(model, start) for start in starts}
    touched = set().union(*(found.parameters() for found in chains.values()))
    named = dict(model.named_parameters())
    names = tuple(name for name in named if name in touched)
    given = {"lr": ordinary_lr, "momentum": ordinary_momentum, "weight_decay": ordinary_weight_decay}
    path = {"params": [named[name] for name in names], "path": PathGroup(names, chains)}
    ordinary: dict[str, Any] = {"params": [p for name, p in named.items() if name not in touched]}
    return [group for group in (path, ordinary | {k: v for k, v in given.items() if v is not None}) if group["params"]]


class GSGD(Optimizer):
    """SGD in path space.

    A step is one of SGD with momentum and weight decay on path coordinates, written as an update of the weights
    (``update.py``). Pivots do not move. Parameters without a chain take steps of plain SGD, and so do all parameters
    of groups that :func:`path_parameter_groups` did not make. A step that would carry a chain's value to less than a
    tenth of it, or through zero, is shortened to that tenth and counted (:meth:`shortened`).

    Parameters whose gradient is None stay as they are, and count as constants.

    Args:
        params: from :func:`path_parameter_groups`; or any that torch's optimizers take.
        lr: learning rate; a float, or a tensor of one element.
        momentum: of the coordinates, without dampening.
        weight_decay: of the coordinates.
        decay: ``l2`` draws all coordinates to 0; ``basis_path_norm`` draws those of the chains to ±1, as they stand in
            denominators, and all others to 0 (Zheng et al. 2018, "Capacity Control of ReLU Neural Networks by
            Basis-path Norm").
        anchor: ``initial`` divides the coordinates of every chain by its |value| at the first step, so that chains
            begin at ±1; None takes path-values as they are (the papers).
        start: where chains begin: ``bn`` or ``weight`` (``chains.py``).
        weight_norm: multiply the gradient of every coordinate by the L2 norm of the weights that point to the same
            unit, the baseline G-SGD+BN(wnorm) of PBN-A 5.1.1.
        foreach: update lists of tensors at once; None where that is faster.
        maximize: ascend.

    Raises:
        ValueError: a setting out of its range.
        PathconvertError: ``weight_norm`` with a transposed convolution on a chain.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        decay: WeightDecay = "l2",
        anchor: Anchor = "initial",
        start: Start = "bn",
        weight_norm: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        for name, value in (("learning rate", lr), ("momentum value", momentum), ("weight_decay value", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"Invalid {name}: {value}")
        for name, choice, offered in (
            ("decay", decay, get_args(WeightDecay)),
            ("anchor", anchor, ("initial", None)),
            ("start", start, get_args(Start)),
        ):
            if choice not in offered:
                raise ValueError(f"Invalid {name}: {choice!r} is none of {', '.join(map(repr, offered))}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "decay": decay,
            "anchor": anchor,
            "start": start,
            "weight_norm": weight_norm,
            "foreach": foreach,
            "maximize": maximize,
        }
        self._paths: list[_Path | None] = []
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; a group of :func:`path_parameter_groups` brings its chains."""
        param_group = dict(param_group)
        path: PathGroup | None = param_group.pop("path", None)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        shapes = [p.shape for p in group["params"]]
        self._paths.append(None if path is None else _Path(path.names, shapes, path.chains[group["start"]]))
        if path is not None and group["weight_norm"]:
            transposed = [n for n, t in path.chains[group["start"]].tensors.items() if t.transposed]
            if transposed:
                raise PathconvertError(f"weight_norm does not know the transposed convolution {transposed[0]}")

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_paths": self._paths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    @property
    def chains(self) -> list[Chains]:
        """The chains of every path group."""
        return [path.chains for path in self._paths if path]

    def shortened(self) -> int:
        """How many steps of chains were shortened so far."""
        return sum(int(state["shortened"].sum()) for state in self.state.values() if "shortened" in state)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; ``closure`` computes the loss again, if given.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, path in zip(self.param_groups, self._paths, strict=True):
            params = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in params):
                raise RuntimeError("GSGD does not support sparse gradients")
            foreach = group["foreach"]
            if foreach is None:
                foreach = all(p.is_cuda for p in params)
            if path is None:
                self._step_plain(params, group, foreach)
            else:
                self._step_path(group, path, foreach)
        return loss

    def _step_plain(self, params: list[Tensor], group: dict[str, Any], foreach: bool) -> None:
        """torch's own SGD."""
        gradients = [cast(Tensor, p.grad) for p in params]
        buffers = [self.state[p].get("momentum_buffer") if group["momentum"] else None for p in params]
        sgd(
            params, gradients, buffers,
            has_sparse_grad=False, foreach=foreach, fused=False, weight_decay=group["weight_decay"],
            momentum=group["momentum"], lr=group["lr"], dampening=0.0, nesterov=False, maximize=group["maximize"],
        )  # fmt: skip
        for p, buffer in zip(params, buffers, strict=True):
            if buffer is not None:
                self.state[p]["momentum_buffer"] = buffer

    def _step_path(self, group: dict[str, Any], path: _Path, foreach: bool) -> None:
        params = dict(zip(path.names, group["params"], strict=True))
        path.to(group["params"][0].device)
        weights = [
            self._path_weight(p, *tensor, group)
            for name, tensor in path.tensors.items()
            if (p := params[name]).grad is not None
        ]
        starts = [_Values(params[s.name], s) for s in path.starts]
        d, gradient = self._chains(starts, weights, group, path)
        d_new, shortened = step_chains(d, gradient, group["lr"])
        plain = [p for name, p in params.items() if p.grad is not None and name not in path.tensors]
        ratio = d_new / d / with_one(d_new / d)[path.parent]
        step_weights(weights, d, d_new, group["lr"], group["momentum"], group["weight_decay"], foreach)
        self._step_plain(plain, group, foreach)
        for s in starts:
            if s.grad is None:
                continue
            s.param[s.place.index] = (s.value * ratio[s.place.chain]).to(s.param.dtype)
            state = self.state[s.param]
            state["shortened"] += shortened[s.place.chain]
            if group["momentum"]:
                state["chain_momentum"].masked_fill_(shortened[s.place.chain], 0)

    def _path_weight(
        self, p: Tensor, chain: Tensor, gauge: Tensor | None, skeleton: tuple[Tensor, ...], group: dict[str, Any]
    ) -> PathWeight:
        grad = cast(Tensor, p.grad)
        buffer = None
        if group["momentum"]:
            buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        rescale = _row_norm(p) if group["weight_norm"] and p.dim() > 1 else None
        return PathWeight(p, -grad if group["maximize"] else grad, chain, gauge, skeleton, rescale, buffer)

    def _chains(
        self, starts: list[_Values], weights: list[PathWeight], group: dict[str, Any], path: _Path
    ) -> tuple[Tensor, Tensor]:
        """d of every chain, divided by its anchor, and the step's direction for it, float64 [chains]."""
        values, upward, norms = (torch.ones_like(path.scale) for _ in range(3))
        trained = torch.zeros_like(path.parent, dtype=torch.bool)
        for s in starts:
            values[s.place.chain] = s.value
            if s.grad is not None:
                upward[s.place.chain] = s.value * (-s.grad if group["maximize"] else s.grad)
                trained[s.place.chain] = True
            if group["weight_norm"] and s.param.dim() > 1:
                norms[s.place.chain] = _row_norm(s.param).flatten()[s.place.index[0]].double()
        d = chain_values(values, path.scale, path.ancestors)
        for s in starts:
            state = self.state[s.param]
            if "shortened" not in state:
                state["shortened"] = torch.zeros_like(s.value, dtype=s.param.dtype)
            if group["anchor"] == "initial":
                if "anchor" not in state:
                    state["anchor"] = d[s.place.chain].abs().to(s.param.dtype)
                values[s.place.chain] = state["anchor"].double()
        if group["anchor"] == "initial":
            d = d / values
        gradient = (upward - flow(weights, d)) / d * norms
        target = d.sign() if group["decay"] == "basis_path_norm" else torch.zeros_like(d)
        gradient = gradient + group["weight_decay"] * (d - target)
        if group["momentum"]:
            for s in (s for s in starts if s.grad is not None):
                state = self.state[s.param]
                mine = gradient[s.place.chain].to(s.param.dtype)
                if "chain_momentum" in state:
                    mine = state["chain_momentum"].mul_(group["momentum"]).add_(mine)
                state["chain_momentum"] = mine
                gradient[s.place.chain] = mine.double()
        return d, torch.where(trained, gradient, 0.0)


def _row_norm(weight: Tensor) -> Tensor:
    """L2 norm of every row of [out, in, *kernel], broadcastable to it."""
    norm: Tensor = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.dim())), keepdim=True)
    return norm


@dataclass
class _Place:
    """The starts that one parameter holds: their chains [starts] and their indices."""

    name: str
    chain: Tensor
    index: tuple[Tensor, ...]


class _Values:
    """The starts in one parameter: their values and gradients, float64 [starts]."""

    def __init__(self, param: Tensor, place: _Place) -> None:
        self.param, self.place = param, place
        self.value = param[place.index].double()
        self.grad = None if param.grad is None else param.grad[place.index].double()


class _Path:
    """Chains as steps use them, on the parameters' device.

    Attributes:
        names: of the group's parameters.
        tensors: the weights that leave chains: chain, gauge, skeleton.
        starts: the chains' starts, by the parameter that holds them.
        parent, scale, ancestors: as in :class:`~pathconvert.training.chains.Chains`.
    """

    def __init__(self, names: tuple[str, ...], shapes: Sequence[torch.Size], chains: Chains) -> None:
        self.names, self.chains, self.shapes = names, chains, dict(zip(names, shapes, strict=True))
        self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> None:
        """Move what steps use, if it is elsewhere."""
        if getattr(self, "device", None) == device:
            return
        chains, self.device = self.chains, device
        self.tensors = {
            name: (
                tensor.chain.to(device),
                None if tensor.gauge is None else tensor.gauge.to(device),
                tuple(tensor.skeleton.to(device).unbind()),
            )
            for name, tensor in chains.tensors.items()
        }
        self.starts = []
        for name in dict.fromkeys(chains.parameter):
            mine = torch.tensor([i for i, other in enumerate(chains.parameter) if other == name])
            index = torch.unravel_index(chains.element[mine].to(device), self.shapes[name])
            self.starts.append(_Place(name, mine.to(device), index))
        self.parent, self.scale = chains.parent.to(device), chains.scale.to(device)
        self.ancestors = tuple(above.to(device) for above in chains.ancestors())
