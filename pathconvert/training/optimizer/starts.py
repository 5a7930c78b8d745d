"""The starts of all chains during one step: read from their parameters, moved, and written back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pathconvert.training.optimizer.layout import Layout
from pathconvert.training.optimizer.update import chain_values, with_one


def row_norm(weight: Tensor) -> Tensor:
    """L2 norm of every row of a weight [out, in, *kernel], broadcastable to the weight."""
    norm: Tensor = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.dim())), keepdim=True)
    return norm


class Starts:
    """The starts of all chains of one parameter group, in the order of the chains, during one step.

    Args:
        layout: the group's layout.
        params: the parameters that hold the starts, in the order of ``layout.starts``.
        state: the optimizer's state of every parameter.

    Attributes:
        layout, params: as given.
        value: the starts before the step, float64 [chains].
    """

    def __init__(self, layout: Layout, params: list[Tensor], state: Mapping[Tensor, dict[str, Tensor]]) -> None:
        self.layout, self.params, self.states = layout, params, [state[p] for p in params]
        self.value = self._gather_elements(params)

    @property
    def grad(self) -> Tensor:
        """∂loss/∂value, float64 [chains]; 0 for starts that have no gradient."""
        return self._gather_elements([torch.zeros_like(p) if p.grad is None else p.grad for p in self.params])

    def _gather_elements(self, tensors: list[Tensor]) -> Tensor:
        """The starts' elements of tensors that have the shapes of ``params``, float64 [chains]."""
        return self.layout.gather([place.read(t) for place, t in zip(self.layout.starts, tensors, strict=True)])

    def gather_state(self, key: str) -> Tensor:
        """What the parameters' states hold under ``key``, float64 [chains]; 0 where a state does not have it."""
        return self.layout.gather([state.get(key, torch.zeros_like(state["shortened"])) for state in self.states])

    def row_norms(self) -> Tensor:
        """L2 norm of the row of every start weight, float64 [chains]; 1 where the start is a γ."""
        ones = [place.chain.new_ones(len(place.chain), dtype=torch.float64) for place in self.layout.starts]
        return self.layout.gather(
            [
                row_norm(p).flatten()[place.index[0]] if place.index is not None and p.dim() > 1 else one
                for p, place, one in zip(self.params, self.layout.starts, ones, strict=True)
            ]
        )

    def moved_by(self, ratio: Tensor) -> tuple[list[Tensor], Tensor]:
        """The starts with which the value of every chain is multiplied by ``ratio``. Nothing is written.

        Args:
            ratio: the wanted value of every chain after the step, divided by its value before, float64 [chains].

        Returns:
            The new starts of every parameter of ``params``, rounded to its dtype; and the ratio that the chains' values
            really have after this rounding, float64 [chains].
        """
        layout = self.layout
        own = ratio / with_one(ratio)[layout.home_of_parent]  # the parent's start brings its share of the ratio
        if layout.trained is not None:
            own = torch.where(layout.trained, own, 1.0)
        new = [part.to(p.dtype) for p, part in zip(self.params, layout.scatter(self.value * own), strict=True)]
        return new, chain_values(layout.gather(new) / self.value, layout.ancestors)

    def write(self, new: Sequence[Tensor], shortened: Tensor, momentum: Tensor | None) -> None:
        """Write new starts into their parameters, and the counts and the momentum into the parameters' states.

        Args:
            new: the starts of every parameter, from :meth:`moved_by`.
            shortened: whether the step of each chain was shortened, bool [chains]; these chains lose their momentum.
            momentum: of every chain, float64 [chains]; None where the group has no momentum.
        """
        counts = self.layout.scatter(shortened)
        momenta = None if momentum is None else self.layout.scatter(momentum.masked_fill(shortened, 0.0))
        for i, (place, p, state) in enumerate(zip(self.layout.starts, self.params, self.states, strict=True)):
            if not place.trained:
                continue
            place.write(p, new[i])
            state["shortened"] += counts[i]
            if momenta is not None:
                state["chain_momentum"] = momenta[i].to(p.dtype)
