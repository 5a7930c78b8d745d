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

    def __init__(
        self, layout: Layout, params: list[Tensor], state: Mapping[Tensor, dict[str, Tensor]]
    ) -> None:
        self.layout, self.params, self.states = layout, params, [state[p] for p in params]
        self.value = self._gather_elements(params)

    @property
    def grad(self) -> Tensor:
        """∂loss/∂value, float64 [chains]; 0 for starts that have no gradient."""
        return self._gather_elements(
            [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        )

    def _gather_elements(self, tensors: list[Tensor]) -> Tensor:
        """The starts' elements of tensors that have the shapes of ``params``, float64 [chains]."""
        return self.layout.gather(
            [place.read(t) for place, t in zip(self.layout.starts, tensors, strict=True)]
        )

    def gather_state(self, key: str) -> Tensor:
        """What the parameters' states hold under ``key``, float64 [chains].

        It is 0 where a state does not have it.
        """
        held = [
            state[key] if key in state else torch.zeros_like(state["shortened"])
            for state in self.states
        ]
        return self.layout.gather(held)

    def row_norms(self) -> Tensor:
        """L2 norm of the row of every start weight, float64 [chains]; 1 where the start is a γ."""
        ones = [
            place.chain.new_ones(len(place.chain), dtype=torch.float64)
            for place in self.layout.starts
        ]
        return self.layout.gather(
            [
                (
                    row_norm(p).flatten()[place.index[0]]
                    if place.index is not None and p.dim() > 1
                    else one
                )
                for p, place, one in zip(self.params, self.layout.starts, ones, strict=True)
            ]
        )

    def moved_by(self, ratio: Tensor) -> tuple[list[Tensor], Tensor]:
        """The starts with which the value of every chain is multiplied by ``ratio``.

        Nothing is written.

        Args:
            ratio: the wanted value of every chain after the step, divided by its value before,
                float64 [chains].

        Returns:
            The new starts of every parameter of ``params``, rounded to its dtype; and the ratio
            that the chains' values really have after this rounding, float64 [chains].
        """
        layout = self.layout
        # the parent's start brings its share of the ratio
        own = ratio / with_one(ratio)[layout.home_of_parent]
        if layout.trained is not None:
            own = torch.where(layout.trained, own, 1.0)
        new = self._rounded(self.value * own)
        return new, chain_values(layout.gather(new) / self.value, layout.ancestors)

    def write(self, new: Sequence[Tensor], shortened: Tensor, momentum: Tensor | None) -> None:
        """Write new starts into their parameters, and update the parameters' states.

        The states get the counts and the momentum. All that is there is changed in place, since a
        CUDA graph reads the tensors that it was captured with.

        Args:
            new: the starts of every parameter, from :meth:`moved_by`.
            shortened: whether the step of each chain was shortened, bool [chains]; these chains
                lose their momentum.
            momentum: of every chain, float64 [chains]; None where the group has no momentum.
        """
        moved = [i for i, place in enumerate(self.layout.starts) if place.trained]
        if not moved:
            return
        states = [self.states[i] for i in moved]
        counts = self._rounded(shortened)
        torch._foreach_add_([state["shortened"] for state in states], [counts[i] for i in moved])
        if momentum is not None:
            momenta = self._rounded(momentum.masked_fill(shortened, 0.0))
            for state in states:
                if "chain_momentum" not in state:
                    state["chain_momentum"] = torch.zeros_like(state["shortened"])
            torch._foreach_copy_(
                [state["chain_momentum"] for state in states], [momenta[i] for i in moved]
            )
        whole = [i for i in moved if self.layout.starts[i].index is None]
        if whole:
            torch._foreach_copy_([self.params[i] for i in whole], [new[i] for i in whole])
        for i in moved:
            index = self.layout.starts[i].index
            if index is not None:
                self.params[i][index] = new[i]

    def _rounded(self, per_chain: Tensor) -> list[Tensor]:
        """Values of all chains [chains] → those of every parameter, in its dtype.

        One conversion where all agree.
        """
        dtypes = {p.dtype for p in self.params}
        if len(dtypes) == 1:
            per_chain = per_chain.to(dtypes.pop())
        return [
            part.to(p.dtype)
            for p, part in zip(self.params, self.layout.scatter(per_chain), strict=True)
        ]
