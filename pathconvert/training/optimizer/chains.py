"""Chains: which parameters hold the path coordinates of a network in path space.

The pivots of a conversion link units: the pivot of unit i ends in another unit, the *next* one.
Units linked this way form a *chain*. They share one path-value d, that of the chain's *start
weight*, and a weight w' that leaves a unit of chain k has the path-value d_k · w' (PBN-A D.1;
docs/design.md, "G-SGD"). Where several pivots end in one unit, only the first of their units hands
its chain on; a unit that no chain is handed on to begins a chain, as its *head*.

================  ==================================================================================
start ``weight``  the papers: the weight of the row that makes the first unit, at the kernel's
                  centre; column k mod width for row k with pivot rule ``diagonal``, else the row's
                  largest. A BatchNorm between two units does not end a chain
start ``bn``      γ of the BatchNorm that makes the first unit, where there is one. An ordinary
                  BatchNorm ends a chain, as it normalises the scale away; Path-BN's skip carries it
                  on
================  ==================================================================================

In the gauge ``unit`` all pivots are ±1. In the gauge ``pow2`` they are not; there S_i is the
product of the magnitudes of all pivots that follow one another from unit i on. A weight w from unit
c to unit r would be w · S_r / S_c in the gauge ``unit``. Path-values are always those of the gauge
``unit``, so that no rescaling of the network changes a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pathconvert.choices import Start
from pathconvert.errors import RecordError


@dataclass(frozen=True)
class PathTensor:
    """A parameter whose elements are path coordinates times factors of their rows and columns.

    Index tensors have the parameter's rank and size 1 along dimensions where they are constant.

    Attributes:
        chain: the chain that the element's column leaves, int64; the number of chains where it
            leaves none.
        row_unit: the unit of the element's row; the number of units where there is none, or where a
            BatchNorm normalises the row.
        column_unit: the unit that the element's column leaves, in the shape of ``chain``; the
            number of units where there is none.
        skeleton: places of the pivots, which do not move, counted in row-major order, int64
            [pivots].
        transposed: whether it is the weight of a transposed convolution, [in, out / groups,
            *kernel].
    """

    chain: Tensor
    row_unit: Tensor
    column_unit: Tensor
    skeleton: Tensor
    transposed: bool = False


@dataclass(frozen=True)
class Chains:
    """The path coordinates of a network, for one choice of start.

    Attributes:
        start: ``bn`` or ``weight``.
        tensors: every parameter with rows or columns that are units with a pivot, by name.
        parameter: name of the parameter that holds the start of each chain, [chains]; in the order
            of their heads.
        element: the place of the start in its parameter, counted in row-major order, int64
            [chains].
        parent: the chain that the start weight leaves, int64 [chains]; the number of chains where
            it leaves none.
        scale: S_r / S_c of the start weight, float64 [chains].
        gauge: S of every unit, float64 [units + 1], the last 1; None where all are 1 (gauge
            ``unit``).
        balance: 1 / σ of every unit, float64 [units + 1], the last 1. σ is the |γ| of the BatchNorm
            that makes the unit, or else the largest |path-value| of the weights that make it.
        units: number of units that are on chains.
        left: name of a layer → why units whose pivots it holds are on no chain.
    """

    start: Start
    tensors: Mapping[str, PathTensor]
    parameter: tuple[str, ...]
    element: Tensor
    parent: Tensor
    scale: Tensor
    gauge: Tensor | None
    balance: Tensor
    units: int
    left: Mapping[str, str]

    @property
    def count(self) -> int:
        """The number of chains."""
        return len(self.parameter)

    def beginning_at(self, element: Tensor, shapes: Mapping[str, torch.Size]) -> Chains:
        """The same chains with other start weights in the same parameters.

        Args:
            element: places of the start weights, as in :attr:`element`.
            shapes: shapes of the parameters, by name.

        Raises:
            RecordError: the start weights do not belong to this network's chains.
        """
        if element.shape != self.element.shape:
            raise RecordError(
                f"{len(element)} chains were saved, and this network has {self.count}",
                "Load the state of an optimizer of this network.",
            )
        parent, scale = self.parent.clone(), self.scale.clone()
        for name in dict.fromkeys(self.parameter):
            mine = torch.tensor([i for i, other in enumerate(self.parameter) if other == name])
            mine = mine[element[mine] != self.element[mine]]
            if not len(mine):
                continue
            if name not in self.tensors or int(element[mine].max()) >= shapes[name].numel():
                raise RecordError(
                    f"the saved starts of chains in {name} do not belong to this network",
                    "Load the state of an optimizer of this network.",
                )
            tensor, shape = self.tensors[name], shapes[name]
            parent[mine] = _read(tensor.chain, shape, element[mine])
            if self.gauge is not None:
                before, after = (
                    self.gauge[_read(tensor.column_unit, shape, e[mine])]
                    for e in (self.element, element)
                )
                scale[mine] *= before / after
        found = dataclasses.replace(self, element=element.clone(), parent=parent, scale=scale)
        if found.has_circle():
            raise RecordError(
                "a saved start weight leaves its own chain, so that the state is damaged",
                "Load another checkpoint.",
            )
        return found

    def has_circle(self) -> bool:
        """Whether a chain is its own ancestor."""
        above = torch.cat([self.parent, torch.tensor([self.count])])
        for _ in range(self.count.bit_length()):
            above = above[above]
        return bool((above != self.count).any())

    def ancestors(self) -> tuple[Tensor, ...]:
        """The 1st, 2nd, 4th, … ancestor of every chain, [chains + 1] each, until none has one."""
        above = torch.cat([self.parent, torch.tensor([self.count])])
        found = []
        while bool((above != self.count).any()):
            found.append(above)
            above = above[above]
        return tuple(found)

    def parameters(self) -> set[str]:
        """Names of all parameters that the chains touch."""
        return {*self.tensors, *self.parameter}


def _read(per_element: Tensor, shape: torch.Size, element: Tensor) -> Tensor:
    """Values of an index tensor of :class:`PathTensor` for some elements.

    The elements are counted in row-major order.
    """
    places = torch.unravel_index(element, shape)
    return per_element[
        tuple(i if size > 1 else i * 0 for i, size in zip(places, per_element.shape, strict=True))
    ]
