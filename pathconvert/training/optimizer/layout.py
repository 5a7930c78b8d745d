"""Chains as steps use them: on the parameters' device, for the parameters that have gradients, as few long vectors."""

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
        name: of the parameter.
        chain: their chains, int64 [starts].
        index: where they are in it; None where they are all of it, in order.
        trained: whether the parameter has a gradient.
    """

    name: str
    chain: Tensor
    index: tuple[Tensor, ...] | None
    trained: bool

    def read(self, tensor: Tensor) -> Tensor:
        """The starts' elements of a tensor of the parameter's shape, [starts]."""
        return tensor if self.index is None else tensor[self.index]

    def write(self, tensor: Tensor, values: Tensor) -> None:
        """Put ``values`` [starts] at the starts."""
        if self.index is None:
            tensor.copy_(values)
        else:
            tensor[self.index] = values


class Layout:
    """The chains of one group of parameters.

    Args:
        chains: of the network.
        gauge: S of every unit, or what coordinates of rows are multiplied by and of columns divided by in its place,
            float64 [units + 1]; None where all are 1.
        params: of the group, by name, all on one device; not kept.
        trained: names of those that have gradients; all others are constants.

    Attributes:
        count: number of chains.
        weights: the trained weights that leave chains or hold pivots.
        metric: 1 / S_r² of every trained parameter where it is not 1, by name, broadcastable, in the parameter's dtype.
        chain: the chain that every column of ``weights`` leaves, int64 [columns of all weights].
        column_gauge: S_c of every column, likewise; None where it is 1.
        starts: by the parameter that holds them.
        order: chains in the order of ``starts``, [chains]; ``place`` is its inverse.
        scale, ancestors: as in :class:`~pathconvert.training.optimizer.chains.Chains`.
        home: [chains + 1], the chain that each moves with: itself, or, where its start is constant, that of its parent.
        home_of_parent: ``home`` of every chain's parent, [chains].
        trained: whether each chain's start is trained, [chains]; None where all are.
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
        named = {name: tensor for name, tensor in chains.tensors.items() if name in trained}
        tensors = {name: tensor for name, tensor in named.items() if self._has_columns(tensor, gauge)}
        self.weights = [_weight_place(name, tensor, params[name]) for name, tensor in tensors.items()]
        self.metric: dict[str, Tensor] = {}
        if gauge is not None:
            rows = {name: gauge[tensor.row_unit] for name, tensor in named.items()}
            self.metric = {name: (row**-2).to(params[name]) for name, row in rows.items() if bool((row != 1).any())}
        columns = [w.columns for w in self.weights]
        self.chain = _joined([t.chain for t in tensors.values()], columns, torch.int64).to(device)
        self.column_gauge = None
        if gauge is not None:
            units = _joined([t.column_unit for t in tensors.values()], columns, torch.int64)
            self.column_gauge = gauge[units].to(device)
        held: dict[str, list[int]] = {}
        for chain, name in enumerate(chains.parameter):
            held.setdefault(name, []).append(chain)
        self.starts = [
            _start_place(name, torch.tensor(mine), chains.element[mine], params[name], name in trained)
            for name, mine in held.items()
        ]
        self.order = torch.cat([torch.zeros(0, dtype=torch.int64, device=device), *(s.chain for s in self.starts)])
        self.place = torch.argsort(self.order)
        self.scale = chains.scale.to(device)
        self.ancestors = tuple(above.to(device) for above in chains.ancestors())
        moves = torch.tensor([name in trained for name in chains.parameter] + [True])
        parent = torch.cat([chains.parent, torch.tensor([self.count])])
        home = torch.where(moves, torch.arange(self.count + 1), parent)
        for _ in self.ancestors:
            home = home[home]
        self.home, self.home_of_parent = home.to(device), home[chains.parent].to(device)
        self.trained = None if bool(moves.all()) else moves[:-1].to(device)

    def _has_columns(self, tensor: PathTensor, gauge: Tensor | None) -> bool:
        """Whether its steps are others than plain ones along the step gradient."""
        scaled = gauge is not None and bool((gauge[tensor.column_unit] != 1).any())
        return scaled or bool((tensor.chain < self.count).any()) or tensor.skeleton.numel() > 0

    def gather(self, parts: list[Tensor]) -> Tensor:
        """What every parameter of ``starts`` says of its starts → of every chain, float64 [chains]."""
        return torch.cat(parts)[self.place].double() if parts else self.scale

    def scatter(self, per_chain: Tensor) -> tuple[Tensor, ...]:
        """The inverse of :meth:`gather`."""
        parts: tuple[Tensor, ...] = per_chain[self.order].split([len(s.chain) for s in self.starts])
        return parts

    def of_those_that_move(self, flow: Tensor) -> Tensor:
        """Sums over what leaves each chain, [chains + 1] → over all that moves with it, [chains]."""
        if self.trained is not None:
            flow = torch.zeros_like(flow).index_add_(0, self.home, flow)
        return flow[:-1]


def _weight_place(name: str, tensor: PathTensor, weight: Tensor) -> WeightPlace:
    columns = _columns(tensor.chain.shape, weight.shape)
    skeleton = tensor.skeleton.to(weight.device)
    return WeightPlace(
        name,
        columns,
        tuple(d for d, size in enumerate(columns) if size != weight.shape[d]),
        tuple(torch.unravel_index(skeleton, weight.shape)) if skeleton.numel() else None,
    )


def _columns(chain: torch.Size, weight: torch.Size) -> tuple[int, ...]:
    """The shape of a weight's columns: that of its chains, which are written out along the kernel where this is cheap.

    Element by element, a vector as long as the rows is several times as fast as one value for every nine elements.
    """
    return (1, *weight[1:]) if chain[0] == 1 and len(weight) > 1 else tuple(chain)


def _joined(parts: list[Tensor], columns: list[tuple[int, ...]], dtype: torch.dtype) -> Tensor:
    """``parts``, each broadcast to its weight's columns, one after another; [columns of all weights]."""
    flat = [part.to(dtype).broadcast_to(shape).reshape(-1) for part, shape in zip(parts, columns, strict=True)]
    return torch.cat([torch.zeros(0, dtype=dtype), *flat])


def _start_place(name: str, chain: Tensor, element: Tensor, param: Tensor, trained: bool) -> StartPlace:
    whole = param.dim() == 1 and torch.equal(element, torch.arange(len(param)))
    index = None if whole else tuple(torch.unravel_index(element.to(param.device), param.shape))
    return StartPlace(name, chain.to(param.device), index, trained)
