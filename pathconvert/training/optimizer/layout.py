"""Chains in the form that steps use: few long vectors on the parameters' device.

Only the parameters with gradients are covered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pathconvert.training.optimizer.chains import Chains, PathTensor
from pathconvert.training.optimizer.update import WeightPlace


@dataclass(frozen=True)
class StartPlace:
    """The starts that one parameter holds.

    Attributes:
        name: the parameter's name.
        chain: the chains that start here, int64 [starts].
        index: where the starts are in the parameter; None where they are all of its elements, in
            order.
        trained: whether the parameter has a gradient.
    """

    name: str
    chain: Tensor
    index: tuple[Tensor, ...] | None
    trained: bool

    def read(self, tensor: Tensor) -> Tensor:
        """The starts' elements of a tensor of the parameter's shape, [starts]."""
        return tensor if self.index is None else tensor[self.index]


class Layout:
    """The chains of one parameter group.

    Args:
        chains: the network's chains.
        gauge: S of every unit, float64 [units + 1], or other factors in its place: coordinates are
            multiplied by the factor of their row and divided by that of their column. None where
            all are 1.
        params: the group's parameters by name, all on one device; not kept.
        trained: names of the parameters that have gradients; all others are constants.

    Attributes:
        count: number of chains.
        weights: the trained weights that leave chains or hold pivots.
        metric: 1 / S_r² of the trained parameters where it is not 1, by name, broadcastable, in the
            parameter's dtype.
        chain: the chain that every column of ``weights`` leaves, int64 [columns of all weights].
        column_gauge: S_c of every column, float64 [columns of all weights]; None where it is 1.
        starts: the starts, grouped by the parameter that holds them.
        order: chains in the order of ``starts``, [chains]; ``place`` is its inverse.
        scale, ancestors: as in :class:`~pathconvert.training.optimizer.chains.Chains`.
        home: the chain that each chain moves with, [chains + 1]: itself, or its parent's home if
            its start is constant.
        home_of_parent: ``home`` of every chain's parent, [chains].
        trained: whether each chain's start is trained, bool [chains]; None where all are.
    """

    def __init__(
        self,
        chains: Chains,
        gauge: Tensor | None,
        params: Mapping[str, Tensor],
        trained: frozenset[str],
    ) -> None:
        self.count = chains.count
        device = next(iter(params.values())).device
        gauge = None if gauge is None else gauge.cpu()
        on_chains = {name: tensor for name, tensor in chains.tensors.items() if name in trained}
        self.metric = _metric(on_chains, gauge, params)
        self._place_columns(on_chains, gauge, params, device)
        self._place_starts(chains, params, trained, device)
        self.scale = chains.scale.to(device)
        self.ancestors = tuple(above.to(device) for above in chains.ancestors())
        self._find_homes(chains, trained, device)

    def _place_columns(
        self,
        on_chains: Mapping[str, PathTensor],
        gauge: Tensor | None,
        params: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        """Set ``weights``, ``chain`` and ``column_gauge``."""
        tensors = {
            name: tensor for name, tensor in on_chains.items() if self._has_columns(tensor, gauge)
        }
        self.weights = [
            _weight_place(name, tensor, params[name]) for name, tensor in tensors.items()
        ]
        columns = [w.columns for w in self.weights]
        self.chain = _joined([t.chain for t in tensors.values()], columns, torch.int64).to(device)
        self.column_gauge = None
        if gauge is not None:
            units = _joined([t.column_unit for t in tensors.values()], columns, torch.int64)
            self.column_gauge = gauge[units].to(device)

    def _place_starts(
        self,
        chains: Chains,
        params: Mapping[str, Tensor],
        trained: frozenset[str],
        device: torch.device,
    ) -> None:
        """Set ``starts``, ``order`` and ``place``."""
        held: dict[str, list[int]] = {}
        for chain, name in enumerate(chains.parameter):
            held.setdefault(name, []).append(chain)
        self.starts = [
            _start_place(
                name,
                torch.tensor(mine),
                chains.element[mine],
                params[name],
                trained=name in trained,
            )
            for name, mine in held.items()
        ]
        self.order = torch.cat(
            [torch.zeros(0, dtype=torch.int64, device=device), *(s.chain for s in self.starts)]
        )
        self.place = torch.argsort(self.order)

    def _find_homes(self, chains: Chains, trained: frozenset[str], device: torch.device) -> None:
        """Set ``home``, ``home_of_parent`` and ``trained``; needs ``ancestors``."""
        moves = torch.tensor([name in trained for name in chains.parameter] + [True])
        parent = torch.cat([chains.parent, torch.tensor([self.count])])
        home = torch.where(moves, torch.arange(self.count + 1), parent)
        # each round doubles how far up a chain has looked, as each of the ancestors does
        for _ in self.ancestors:
            home = home[home]
        self.home, self.home_of_parent = home.to(device), home[chains.parent].to(device)
        self.trained = None if bool(moves.all()) else moves[:-1].to(device)

    def _has_columns(self, tensor: PathTensor, gauge: Tensor | None) -> bool:
        """Whether a tensor needs more than plain steps along the step gradient."""
        scaled = gauge is not None and bool((gauge[tensor.column_unit] != 1).any())
        return scaled or bool((tensor.chain < self.count).any()) or tensor.skeleton.numel() > 0

    def gather(self, parts: list[Tensor]) -> Tensor:
        """Values per parameter of ``starts`` → values per chain, float64 [chains].

        The first are given as [its starts] for each parameter.
        """
        return torch.cat(parts)[self.place].double() if parts else self.scale

    def scatter(self, per_chain: Tensor) -> tuple[Tensor, ...]:
        """Values per chain → values per parameter of ``starts``: the inverse of :meth:`gather`.

        Keeps the dtype.
        """
        parts: tuple[Tensor, ...] = per_chain[self.order].split([len(s.chain) for s in self.starts])
        return parts

    def of_those_that_move(self, flow: Tensor) -> Tensor:
        """Sums over the weights that move with each chain, [chains].

        They are made of ``flow``, [chains + 1]: sums over the weights that leave each chain.
        """
        if self.trained is not None:
            flow = torch.zeros_like(flow).index_add_(0, self.home, flow)
        return flow[:-1]


def _metric(
    on_chains: Mapping[str, PathTensor], gauge: Tensor | None, params: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """1 / S_r² of the trained parameters where it is not 1 (see :class:`Layout`)."""
    if gauge is None:
        return {}
    rows = {name: gauge[tensor.row_unit] for name, tensor in on_chains.items()}
    return {
        name: (row**-2).to(params[name]) for name, row in rows.items() if bool((row != 1).any())
    }


def _weight_place(name: str, tensor: PathTensor, weight: Tensor) -> WeightPlace:
    """Where a weight's columns and pivots are."""
    columns = _columns(tensor.chain.shape, weight.shape)
    skeleton = tensor.skeleton.to(weight.device)
    return WeightPlace(
        name,
        columns,
        tuple(d for d, size in enumerate(columns) if size != weight.shape[d]),
        tuple(torch.unravel_index(skeleton, weight.shape)) if skeleton.numel() else None,
    )


def _columns(chain: torch.Size, weight: torch.Size) -> tuple[int, ...]:
    """The shape of a weight's columns.

    It is that of its chains, repeated along the kernel where that takes little memory. To multiply
    a weight by a vector as long as its rows is several times as fast as by one value per kernel.
    """
    return (1, *weight[1:]) if chain[0] == 1 and len(weight) > 1 else tuple(chain)


def _joined(parts: list[Tensor], columns: list[tuple[int, ...]], dtype: torch.dtype) -> Tensor:
    """``parts`` joined into one vector [columns of all weights].

    Each is first broadcast to the columns of its weight.
    """
    flat = [
        part.to(dtype).broadcast_to(shape).reshape(-1)
        for part, shape in zip(parts, columns, strict=True)
    ]
    return torch.cat([torch.zeros(0, dtype=dtype), *flat])


def _start_place(
    name: str, chain: Tensor, element: Tensor, param: Tensor, *, trained: bool
) -> StartPlace:
    """Where a parameter holds the starts of ``chain``, given their places in row-major order."""
    whole = param.dim() == 1 and torch.equal(element, torch.arange(len(param)))
    index = None if whole else tuple(torch.unravel_index(element.to(param.device), param.shape))
    return StartPlace(name, chain.to(param.device), index, trained)
