"""G-SGD: SGD on the path-values of a ReLU network (Meng et al., ICLR 2019; PBN-A appendix C), as a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.optim.sgd import sgd

from pathconvert.conversion.reparameterize import Conversion
from pathconvert.errors import PathconvertError
from pathconvert.training.optimizer.chains import Chains, find_chains
from pathconvert.training.optimizer.layout import Layout
from pathconvert.training.optimizer.update import PathWeight, chain_values, flow, step_chains, step_weights, with_one
from pathconvert.training.settings import Start, WeightDecay

Anchor = Literal["balanced", "initial"] | None


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
        PathconvertError: a parameter is sharded.
    """
    if isinstance(model, Conversion):
        model = model.model
    _refuse_special(dict(model.named_parameters()))
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

    Two rescalings of one network with the same pivots follow the same function trajectory. Which pivots a conversion
    chooses depends on the scale, except by rule ``diagonal``.

    Args:
        params: from :func:`path_parameter_groups`; or any that torch's optimizers take.
        lr: learning rate; a float, or a tensor of one element.
        momentum: of the coordinates, without dampening.
        weight_decay: of the coordinates.
        decay: ``l2`` draws all coordinates to 0; ``basis_path_norm`` draws those of the chains to ±1, as they stand in
            denominators, and all others to 0 (Zheng et al. 2018, "Capacity Control of ReLU Neural Networks by
            Basis-path Norm").
        anchor: ``initial`` divides the coordinates of every chain by its |value| at the first step, so that chains
            begin at ±1. ``balanced`` does so too, and measures every other coordinate in the sizes σ of the units that
            it connects when the optimizer is made (``Chains.balance``): a weight from unit c to unit r by σ_c / σ_r, a
            bias, γ or β of unit r by 1 / σ_r, so that no rescaling makes a coordinate's step small or large. None takes
            path-values as they are (the papers).
        start: where chains begin: ``bn`` or ``weight`` (``chains.py``).
        weight_norm: multiply the gradient of every weight's coordinate by the L2 norm of the weights that point to the
            same unit, the baseline G-SGD+BN(wnorm) of PBN-A 5.1.1.
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
            ("anchor", anchor, ("balanced", "initial", None)),
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
        if path is not None:
            named = dict(zip(path.names, param_group["params"], strict=True))
            _refuse_special(named)
            _refuse_complex(named)
            if param_group.get("weight_norm", self.defaults["weight_norm"]):
                _refuse_transposed(path.chains[param_group.get("start", self.defaults["start"])])
        super().add_param_group(param_group)
        self._paths.append(None if path is None else _Path(path, self.param_groups[-1]["params"]))
        if path is not None:
            group = self.param_groups[-1]
            chains = path.chains[group["start"]]
            group["unit_gauge"] = chains.balance if group["anchor"] == "balanced" else chains.gauge
            group["chain_starts"] = chains.element

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_paths": self._paths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":  # torch's own, which a step does not know
                    group.setdefault(name, value)
        for group, path in zip(self.param_groups, self._paths, strict=True):
            if path is not None:
                path.begin_at(group["start"], group["chain_starts"])

    @property
    def chains(self) -> list[Chains]:
        """The chains of every path group."""
        paired = zip(self.param_groups, self._paths, strict=True)
        return [path.chains[group["start"]] for group, path in paired if path]

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
            for p in params:
                self.state[p]  # an empty one is there too: torch.distributed.checkpoint asks for all
            if any(p.grad.is_sparse for p in params):
                raise RuntimeError("GSGD does not support sparse gradients")
            gradients = [-cast(Tensor, p.grad) if group["maximize"] else cast(Tensor, p.grad) for p in params]
            if path is None:
                self._step_plain(params, gradients, group)
            else:
                self._step_path(params, gradients, group, path)
        return loss

    def _step_plain(self, params: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        """torch's own SGD, and the same where the rate is a tensor beside the parameters.

        torch would read such a rate back to the CPU, which no CUDA graph can hold.
        """
        lr, momentum = group["lr"], group["momentum"]
        buffers = [self.state[p].get("momentum_buffer") if momentum else None for p in params]
        if params and isinstance(lr, Tensor) and all(p.device == lr.device for p in params):
            buffers = [
                torch.zeros_like(p) if b is None and momentum else b for p, b in zip(params, buffers, strict=True)
            ]
            _plain_sgd(params, gradients, buffers, lr.reshape(()), momentum, group["weight_decay"])
        else:
            sgd(
                params, gradients, buffers,
                has_sparse_grad=False, foreach=group["foreach"] is not False, fused=False, lr=lr,
                weight_decay=group["weight_decay"], momentum=momentum, dampening=0.0, nesterov=False, maximize=False,
            )  # fmt: skip
        for p, buffer in zip(params, buffers, strict=True):
            if buffer is not None:
                self.state[p]["momentum_buffer"] = buffer

    def _step_path(self, trained: list[Tensor], gradients: list[Tensor], group: dict[str, Any], path: _Path) -> None:
        layout = path.layout(group)
        params = dict(zip(path.names, group["params"], strict=True))
        foreach = group["foreach"]
        if foreach is None:
            foreach = all(p.is_cuda for p in trained)
        names = [name for name, p in params.items() if p.grad is not None]
        grads = dict(zip(names, gradients, strict=True))
        step_grads = self._step_gradients(params, grads, layout, group["weight_norm"], foreach)
        weights = [
            PathWeight(
                place, p := params[place.name], grads[place.name], step_grads.pop(place.name), self._buffer(p, group)
            )
            for place in layout.weights
        ]
        starts = _Starts(layout, [params[place.name] for place in layout.starts], self.state)
        d = self._chain_values(starts, group)
        gradient = self._chain_gradient(starts, d, flow(weights, layout.chain, layout.count, foreach), group)
        lr = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
        ratio, shortened = step_chains(d, gradient, lr)
        self._step_plain([params[name] for name in step_grads], list(step_grads.values()), group)
        ratio = starts.moved_by(ratio)
        column_d, column_ratio = with_one(d)[layout.chain], with_one(ratio)[layout.chain]
        if layout.column_gauge is not None:
            column_d = column_d / layout.column_gauge
        step_weights(weights, column_d, column_ratio, lr, group["momentum"], group["weight_decay"], foreach)
        starts.write(shortened, gradient if group["momentum"] else None)

    @staticmethod
    def _step_gradients(
        params: Mapping[str, Tensor], grads: Mapping[str, Tensor], layout: Layout, weight_norm: bool, foreach: bool
    ) -> dict[str, Tensor]:
        """``grads`` / S_r²; with ``weight_norm`` those of weights times the L2 norm of their row."""
        found = dict(grads)
        factors = [layout.metric]
        if weight_norm:
            factors.append({name: _row_norm(params[name]) for name in grads if params[name].dim() > 1})
        for factor in factors:
            scaled = [name for name in grads if name in factor]
            pairs = [found[name] for name in scaled], [factor[name] for name in scaled]
            products = torch._foreach_mul(*pairs) if foreach and scaled else map(torch.mul, *pairs)
            found.update(zip(scaled, products, strict=True))
        return found

    def _buffer(self, p: Tensor, group: dict[str, Any]) -> Tensor | None:
        """The parameter's momentum; None without."""
        if not group["momentum"]:
            return None
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer: Tensor = state["momentum_buffer"]
        return buffer

    def _chain_values(self, starts: _Starts, group: dict[str, Any]) -> Tensor:
        """d of every chain, divided by its anchor; ≠ 0, float64 [chains]."""
        for p, value in zip(starts.params, starts.layout.scatter(starts.value), strict=True):
            state = self.state[p]
            if "shortened" not in state:
                state["shortened"] = torch.zeros_like(value, dtype=p.dtype)
            if group["anchor"] is not None and "anchor" not in state:
                state["anchor"] = value.abs().to(p.dtype)
        # ρ_k is a product of |start weights| as d_k is one of start weights, so that S cancels and nothing overflows
        unit = starts.gather_state("anchor") if group["anchor"] is not None else 1 / starts.layout.scale
        return chain_values(starts.value / unit, starts.layout.ancestors)

    def _chain_gradient(self, starts: _Starts, d: Tensor, flow: Tensor, group: dict[str, Any]) -> Tensor:
        """The direction of a step for every chain, momentum and weight decay included, float64 [chains]."""
        upward = starts.value * starts.grad
        if group["maximize"]:
            upward = -upward
        gradient = (upward - starts.layout.of_those_that_move(flow)) / d
        if group["weight_norm"]:
            gradient = gradient * starts.row_norms()
        if group["weight_decay"]:
            target = d.sign() if group["decay"] == "basis_path_norm" else 0.0
            gradient = gradient + group["weight_decay"] * (d - target)
        if group["momentum"]:
            gradient = gradient + group["momentum"] * starts.gather_state("chain_momentum")
        return gradient if starts.layout.trained is None else torch.where(starts.layout.trained, gradient, 0.0)


def _plain_sgd(
    params: list[Tensor],
    gradients: list[Tensor],
    buffers: Sequence[Tensor | None],
    lr: Tensor,
    momentum: float,
    weight_decay: float,
) -> None:
    """buffer ← μ · buffer + g + λ p and p ← p − lr · buffer (torch.optim.SGD), without reading ``lr`` on the CPU.

    Args:
        params: changed in place.
        gradients: not changed.
        buffers: of momentum, changed in place; all None without.
        lr: of no dimension, on the parameters' device.
        momentum, weight_decay: of the group.
    """
    steps = torch._foreach_add(gradients, params, alpha=weight_decay) if weight_decay else gradients
    if momentum:
        held = [buffer for buffer in buffers if buffer is not None]
        torch._foreach_mul_(held, momentum)
        torch._foreach_add_(held, steps)
        steps = held
    torch._foreach_sub_(params, torch._foreach_mul(steps, lr))


def _row_norm(weight: Tensor) -> Tensor:
    """L2 norm of every row of [out, in, *kernel], broadcastable to it."""
    norm: Tensor = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.dim())), keepdim=True)
    return norm


class _Starts:
    """The starts of all chains, in the order of the chains, during one step.

    Attributes:
        layout: of their group.
        params: that hold them.
        value: before the step, float64 [chains].
    """

    def __init__(self, layout: Layout, params: list[Tensor], state: Mapping[Tensor, dict[str, Tensor]]) -> None:
        self.layout, self.params, self.states = layout, params, [state[p] for p in params]
        self.value = self._gather_elements(params)

    @property
    def grad(self) -> Tensor:
        """∂loss/∂value; 0 for constants."""
        return self._gather_elements([torch.zeros_like(p) if p.grad is None else p.grad for p in self.params])

    def _gather_elements(self, tensors: list[Tensor]) -> Tensor:
        return self.layout.gather([place.read(t) for place, t in zip(self.layout.starts, tensors, strict=True)])

    def gather_state(self, key: str) -> Tensor:
        """What the parameters' states hold under ``key``; 0 where they have none."""
        return self.layout.gather([state.get(key, torch.zeros_like(state["shortened"])) for state in self.states])

    def row_norms(self) -> Tensor:
        """L2 norm of every start weight's row; 1 for γ."""
        ones = [place.chain.new_ones(len(place.chain), dtype=torch.float64) for place in self.layout.starts]
        return self.layout.gather(
            [
                _row_norm(p).flatten()[place.index[0]] if place.index is not None and p.dim() > 1 else one
                for p, place, one in zip(self.params, self.layout.starts, ones, strict=True)
            ]
        )

    def moved_by(self, ratio: Tensor) -> Tensor:
        """Let every chain's value be multiplied by ``ratio``, as far as the starts' dtypes can say; what it is then."""
        layout = self.layout
        own = ratio / with_one(ratio)[layout.home_of_parent]
        if layout.trained is not None:
            own = torch.where(layout.trained, own, 1.0)
        self.new = [part.to(p.dtype) for p, part in zip(self.params, layout.scatter(self.value * own), strict=True)]
        return chain_values(layout.gather(self.new) / self.value, layout.ancestors)

    def write(self, shortened: Tensor, momentum: Tensor | None) -> None:
        """The new starts into their parameters; counts and momentum, which is lost where a step was shortened."""
        counts = self.layout.scatter(shortened)
        momenta = None if momentum is None else self.layout.scatter(momentum.masked_fill(shortened, 0.0))
        for i, (place, p, state) in enumerate(zip(self.layout.starts, self.params, self.states, strict=True)):
            if not place.trained:
                continue
            place.write(p, self.new[i])
            state["shortened"] += counts[i]
            if momenta is not None:
                state["chain_momentum"] = momenta[i].to(p.dtype)


class _Path:
    """A path group's chains.

    Attributes:
        names: of the group's parameters.
        chains: for either choice of start.
    """

    def __init__(self, group: PathGroup, params: Sequence[Tensor]) -> None:
        self.names, self.chains = group.names, group.chains
        self._shapes = {name: p.shape for name, p in zip(group.names, params, strict=True)}
        self._layout: tuple[Tensor | None, Any, Layout] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_layout": None}

    def begin_at(self, start: Start, element: Tensor) -> None:
        """Take saved start weights: which are largest, and so were chosen, may have changed since.

        Raises:
            RecordError: they are not those of these chains.
        """
        chains = self.chains[start]
        if not torch.equal(element.cpu(), chains.element):
            self.chains = {**self.chains, start: chains.beginning_at(element.cpu(), self._shapes)}
            self._layout = None

    def layout(self, group: Mapping[str, Any]) -> Layout:
        """The chains for the gradients that the group's parameters have now.

        Raises:
            PathconvertError: the parameters are on several devices, or have other shapes than at first.
        """
        params = dict(zip(self.names, group["params"], strict=True))
        trained = frozenset(name for name, p in params.items() if p.grad is not None)
        gauge = group["unit_gauge"]
        key = group["start"], trained, [(p.device, p.dtype) for p in params.values()]
        if self._layout is None or self._layout[0] is not gauge or self._layout[1] != key:
            self._layout = gauge, key, self._make_layout(params, gauge, group["start"], trained)
        return self._layout[2]

    def _make_layout(
        self, params: Mapping[str, Tensor], gauge: Tensor | None, start: Start, trained: frozenset[str]
    ) -> Layout:
        devices = {p.device for p in params.values()}
        if len(devices) > 1:
            where = ", ".join(sorted(map(str, devices)))
            raise PathconvertError(f"GSGD's chains run over parameters on several devices: {where}")
        for name, p in params.items():
            if p.shape != self._shapes[name]:
                raise PathconvertError(
                    f"{name} had the shape {list(self._shapes[name])} and has {list(p.shape)} now: GSGD takes whole "
                    "parameters, not sharded or flattened ones",
                    "Train it with DistributedDataParallel.",
                )
        return Layout(self.chains[start], gauge, params, trained)


def _refuse_transposed(chains: Chains) -> None:
    """Rows of transposed convolutions, whose norms ``weight_norm`` needs, are not the weight's first dimension.

    Raises:
        PathconvertError: there is one.
    """
    for name, tensor in chains.tensors.items():
        if tensor.transposed:
            raise PathconvertError(f"weight_norm does not know the transposed convolution {name}")


def _refuse_special(params: Mapping[str, Tensor]) -> None:
    """Path coordinates are read from whole parameters: no DTensor, which FSDP makes, and no other subclass.

    Raises:
        PathconvertError: one is of another kind, named.
    """
    for name, p in params.items():
        if type(p) not in (Tensor, nn.Parameter):
            raise PathconvertError(
                f"{name} is a {type(p).__name__}: GSGD takes whole parameters, not sharded or other special ones",
                "Train it with DistributedDataParallel.",
            )


def _refuse_complex(params: Mapping[str, Tensor]) -> None:
    """Raises PathconvertError where a parameter is not real, as path coordinates are."""
    for name, p in params.items():
        if not p.is_floating_point():
            raise PathconvertError(f"{name} is {p.dtype}: path coordinates are real numbers")
