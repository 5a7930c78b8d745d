"""G-SGD, SGD on the path-values of a ReLU network, as a torch optimizer.

It is from Meng et al., ICLR 2019, and PBN-A, appendix C. PBN-A is the ICLR 2020 submission of the
Path-BN paper; docs/design.md, "G-SGD", derives the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from pathconvert.choices import Anchor, Start, WeightDecay
from pathconvert.training.optimizer.chains import Chains
from pathconvert.training.optimizer.layout import Layout
from pathconvert.training.optimizer.path_groups import (
    GroupChains,
    PathGroup,
    refuse_complex,
    refuse_special,
    refuse_transposed,
)
from pathconvert.training.optimizer.plain import loss_of, require_in_range, step_plain
from pathconvert.training.optimizer.starts import Starts, row_norm
from pathconvert.training.optimizer.update import (
    PathWeight,
    chain_values,
    flow,
    step_chains,
    step_weights,
    with_one,
)


class GSGD(Optimizer):
    """SGD in path space.

    A step is a step of SGD with momentum and weight decay on the path coordinates, written as an
    update of the weights (``update.py``). Pivots do not move. Parameters that lie on no chain take
    steps of plain SGD, and so do all parameters of groups that ``path_parameter_groups`` did not
    make. A step that would shrink a chain's value to less than a tenth, or carry it through zero,
    is shortened so that a tenth is left; :meth:`shortened` counts these steps.

    Parameters whose gradient is None do not move, and count as constants.

    Two networks that differ by a rescaling and have the same pivots compute the same function after
    every step. Which pivots a conversion chooses depends on the scale, except with the rule
    ``diagonal``.

    Args:
        params: groups from ``path_parameter_groups``; or whatever torch's optimizers take.
        lr: learning rate; a float, or a tensor of one element.
        momentum: momentum of the coordinates, without dampening.
        weight_decay: weight decay of the coordinates.
        decay: ``l2`` pulls all coordinates to 0. ``basis_path_norm`` pulls those of the chains to
            ±1, since they stand in denominators, and all others to 0 (Zheng et al. 2018, "Capacity
            Control of ReLU Neural Networks by Basis-path Norm").
        anchor: constants that coordinates are divided by. ``initial`` divides the coordinate of
            every chain by its |value| at the first step, so that chains start at ±1. ``balanced``
            does so too, and measures every other coordinate in the sizes σ that the units it
            connects have when the optimizer is made (``Chains.balance``): a weight from unit c to
            unit r is multiplied by σ_c / σ_r, and a bias, γ or β of unit r by 1 / σ_r, so that no
            rescaling makes a coordinate's step small or large. None takes path-values as they are
            (the papers).
        start: which parameter holds a chain's coordinate, ``bn`` or ``weight`` (``chains.py``).
        weight_norm: multiply the gradient of every weight's coordinate by the L2 norm of the
            weights that point to the same unit; this is the baseline G-SGD+BN(wnorm) of PBN-A
            5.1.1.
        foreach: update lists of tensors with one call; None does so where it is faster.
        maximize: maximize the objective instead of minimizing it.

    Raises:
        ValueError: a setting is out of its range.
        PathconvertError: ``weight_norm`` is set and a transposed convolution lies on a chain.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        decay: WeightDecay = "l2",
        anchor: Anchor | None = "initial",
        start: Start = "bn",
        weight_norm: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        require_in_range(lr, momentum, weight_decay)
        for name, choice, offered in (
            ("decay", decay, get_args(WeightDecay)),
            ("anchor", anchor, (*get_args(Anchor), None)),
            ("start", start, get_args(Start)),
        ):
            if choice not in offered:
                raise ValueError(
                    f"Invalid {name}: {choice!r} is not one of {', '.join(map(repr, offered))}"
                )
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
        self._paths: list[GroupChains | None] = []
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in torch; a group from ``path_parameter_groups`` brings its chains along.

        Raises:
            PathconvertError: a parameter on a chain is sharded or not real, or ``weight_norm`` is
                set and a transposed convolution lies on a chain.
        """
        param_group = dict(param_group)
        path: PathGroup | None = param_group.pop("path", None)
        if path is not None:
            named = dict(zip(path.names, param_group["params"], strict=True))
            refuse_special(named)
            refuse_complex(named)
            if param_group.get("weight_norm", self.defaults["weight_norm"]):
                refuse_transposed(path.chains[param_group.get("start", self.defaults["start"])])
        super().add_param_group(param_group)
        self._paths.append(
            None if path is None else GroupChains(path, self.param_groups[-1]["params"])
        )
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
                # torch adds this default itself; a step has no use for it
                if name != "differentiable":
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
        """How many steps of chains have been shortened so far."""
        return sum(
            int(state["shortened"].sum()) for state in self.state.values() if "shortened" in state
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: computes the loss and its gradients again; None uses the gradients that are
                there.

        Returns:
            The loss that ``closure`` computed; None without it.

        Raises:
            RuntimeError: a gradient is sparse.
            PathconvertError: the parameters of a path group are on several devices, or their shapes
                have changed.
        """
        loss = loss_of(closure)
        for group, path in zip(self.param_groups, self._paths, strict=True):
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                self.state[
                    p
                    # makes an empty state: torch.distributed.checkpoint wants one for every
                    # parameter
                ]
            if any(p.grad.is_sparse for p in params):
                raise RuntimeError("GSGD does not support sparse gradients")
            gradients = [
                -cast(Tensor, p.grad) if group["maximize"] else cast(Tensor, p.grad) for p in params
            ]
            if path is None:
                step_plain(params, gradients, group, self.state)
            else:
                self._step_path(params, gradients, group, path)
        return loss

    def _step_path(
        self,
        trained: list[Tensor],
        gradients: list[Tensor],
        group: dict[str, Any],
        path: GroupChains,
    ) -> None:
        """A step on path coordinates, for the parameters of one path group.

        Args:
            trained: the parameters that have gradients.
            gradients: theirs, negated with ``maximize``.
            group: the parameter group.
            path: its chains.
        """
        layout = path.layout(group)
        params = dict(zip(path.names, group["params"], strict=True))
        foreach = group["foreach"]
        if foreach is None:
            foreach = all(p.is_cuda for p in trained)
        names = [name for name, p in params.items() if p.grad is not None]
        grads = dict(zip(names, gradients, strict=True))
        step_grads = self._step_gradients(
            params, grads, layout, weight_norm=group["weight_norm"], foreach=foreach
        )
        weights = [
            PathWeight(
                place,
                p := params[place.name],
                grads[place.name],
                step_grads.pop(place.name),
                self._buffer(p, group),
            )
            for place in layout.weights
        ]
        starts = Starts(layout, [params[place.name] for place in layout.starts], self.state)
        d = self._chain_values(starts, group)
        gradient = self._chain_gradient(
            starts, d, flow(weights, layout.chain, layout.count, foreach=foreach), group
        )
        lr = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
        ratio, shortened = step_chains(d, gradient, lr)
        others = [params[name] for name in step_grads]
        step_plain(others, list(step_grads.values()), group, self.state)
        new_starts, ratio = starts.moved_by(ratio)
        column_d, column_ratio = with_one(d)[layout.chain], with_one(ratio)[layout.chain]
        if layout.column_gauge is not None:
            column_d = column_d / layout.column_gauge
        step_weights(
            weights,
            column_d,
            column_ratio,
            lr,
            group["momentum"],
            group["weight_decay"],
            foreach=foreach,
        )
        starts.write(new_starts, shortened, gradient if group["momentum"] else None)

    @staticmethod
    def _step_gradients(
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        layout: Layout,
        *,
        weight_norm: bool,
        foreach: bool,
    ) -> dict[str, Tensor]:
        """``grads`` / S_r² by name.

        With ``weight_norm``, those of weights times the norms of their rows.
        """
        found = dict(grads)
        factors = [layout.metric]
        if weight_norm:
            factors.append(
                {name: row_norm(params[name]) for name in grads if params[name].dim() > 1}
            )
        for factor in factors:
            scaled = [name for name in grads if name in factor]
            pairs = [found[name] for name in scaled], [factor[name] for name in scaled]
            products = torch._foreach_mul(*pairs) if foreach and scaled else map(torch.mul, *pairs)
            found.update(zip(scaled, products, strict=True))
        return found

    def _buffer(self, p: Tensor, group: dict[str, Any]) -> Tensor | None:
        """The momentum buffer of a parameter; None where the group has no momentum."""
        if not group["momentum"]:
            return None
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer: Tensor = state["momentum_buffer"]
        return buffer

    def _chain_values(self, starts: Starts, group: dict[str, Any]) -> Tensor:
        """d of every chain, divided by its anchor; float64 [chains], never 0.

        Takes the anchors at the first step.
        """
        wanted = {"shortened"} if group["anchor"] is None else {"shortened", "anchor"}
        if not all(wanted <= state.keys() for state in starts.states):
            for p, value in zip(starts.params, starts.layout.scatter(starts.value), strict=True):
                self.state[p].setdefault("shortened", torch.zeros_like(value, dtype=p.dtype))
                if group["anchor"] is not None:
                    self.state[p].setdefault("anchor", value.abs().to(p.dtype))
        # d_k is a product of start weights, and ρ_k the product of their first |values|. To divide
        # start by start, before the products are taken, lets S cancel and keeps them from
        # overflowing
        unit = (
            starts.gather_state("anchor")
            if group["anchor"] is not None
            else 1 / starts.layout.scale
        )
        return chain_values(starts.value / unit, starts.layout.ancestors)

    def _chain_gradient(
        self, starts: Starts, d: Tensor, flow: Tensor, group: dict[str, Any]
    ) -> Tensor:
        """The direction of every chain's step, with momentum and weight decay.

        It is float64 [chains], and 0 for constants.
        """
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
        return (
            gradient
            if starts.layout.trained is None
            else torch.where(starts.layout.trained, gradient, 0.0)
        )
