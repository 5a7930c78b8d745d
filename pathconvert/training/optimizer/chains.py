"""Chains: which parameters the path coordinates of a network in path space live in.

The pivots of a conversion link units: the pivot of unit i ends in another unit, the *next* one. Units linked this way
share one path-value d, that of the chain's *start weight*, and a weight w' that leaves a unit of chain k has the
path-value d_k · w' (PBN-A D.1; docs/design.md, "G-SGD"). Where several pivots end in one unit, the first of these units
hands its chain on; a unit that no pivot enters begins a chain.

====================  =============================================================================================
start ``weight``      the papers: the weight of the row that makes the first unit, at the kernel's centre; column
                      k mod width for row k with pivot rule ``diagonal``, else the row's largest. BatchNorms are
                      looked through: chains run on where one lies between
start ``bn``          γ of the BatchNorm that makes the first unit, where there is one. An ordinary BatchNorm ends a
                      chain, as it normalises the scale away; Path-BN's skip carries it on
====================  =============================================================================================

In the gauge ``unit`` all pivots are ±1. With ``pow2`` they are not, and S_i, the product of the pivots' magnitudes
from unit i on, says what is missing: a weight from unit c to unit r is w · S_r / S_c in the gauge ``unit``, and
path-values are those of that gauge, so that no rescaling of the network changes a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pathconvert.conversion.groups import FIXED
from pathconvert.conversion.record import decode_runs, record_of
from pathconvert.conversion.trace import IdVector
from pathconvert.errors import RecordError
from pathconvert.path_bn.layer import PathBN
from pathconvert.training.settings import Start


@dataclass(frozen=True)
class PathTensor:
    """A parameter whose elements are path coordinates times factors of their rows and columns.

    Index tensors have the parameter's rank and size 1 along dimensions where they are constant.

    Attributes:
        chain: the chain that the element's column leaves, int64; the number of chains where it is on none.
        row_unit: the unit of the element's row; the number of units for none, or where a BatchNorm normalises the row.
        column_unit: the unit that the element's column leaves, in the shape of ``chain``; likewise.
        skeleton: places of the pivots, which do not move, in row-major order, int64 [pivots].
        transposed: whether it is a transposed convolution's, [in, out / groups, *kernel].
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
        tensors: by the parameter's name, for every parameter with rows or columns that are units with a pivot.
        parameter: name of the parameter that holds each chain's start, [chains]; in the order of their first units.
        element: the start's place in it, counted in row-major order, int64 [chains].
        parent: the chain that the start weight leaves, int64 [chains]; the number of chains where it is on none.
        scale: S_r / S_c of the start weight, float64 [chains].
        gauge: S of every unit, float64 [units + 1], the last 1; None where all are 1 (gauge ``unit``).
        balance: 1 / σ of every unit, likewise: σ is the |γ| that makes it, or else the largest |path-value| that does.
        units: number of units on chains.
        left: unit's layer → why units that hold a pivot are on no chain.
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
        return len(self.parameter)

    def beginning_at(self, element: Tensor, shapes: Mapping[str, torch.Size]) -> Chains:
        """The same chains with other start weights in the same parameters.

        Args:
            element: their places, as in :attr:`element`.
            shapes: of the parameters, by name.

        Raises:
            RecordError: they are not those of this network's chains.
        """
        if element.shape != self.element.shape:
            raise RecordError(f"{len(element)} chains were saved, and this network has {self.count}")
        parent, scale = self.parent.clone(), self.scale.clone()
        for name in dict.fromkeys(self.parameter):
            mine = torch.tensor([i for i, other in enumerate(self.parameter) if other == name])
            mine = mine[element[mine] != self.element[mine]]
            if not len(mine):
                continue
            if name not in self.tensors or int(element[mine].max()) >= shapes[name].numel():
                raise RecordError(f"the saved starts of chains in {name} are not this network's")
            tensor, shape = self.tensors[name], shapes[name]
            parent[mine] = _read(tensor.chain, shape, element[mine])
            if self.gauge is not None:
                before, after = (self.gauge[_read(tensor.column_unit, shape, e[mine])] for e in (self.element, element))
                scale[mine] *= before / after
        found = dataclasses.replace(self, element=element.clone(), parent=parent, scale=scale)
        if found.has_circle():
            raise RecordError("a saved start weight leaves its own chain")
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
        """All parameters that the chains touch."""
        return {*self.tensors, *self.parameter}


def _read(per_element: Tensor, shape: torch.Size, element: Tensor) -> Tensor:
    """What a :class:`PathTensor`'s index tensor says of elements counted in row-major order."""
    places = torch.unravel_index(element, shape)
    return per_element[tuple(i if size > 1 else i * 0 for i, size in zip(places, per_element.shape, strict=True))]


def find_chains(model: nn.Module, start: Start) -> Chains:
    """The chains of a network in path or Path-BN form.

    Args:
        model: carries its record (``reparameterize``, ``to_path_bn`` and ``load`` see to that); not changed.
        start: where the chains' coordinates live.

    Raises:
        RecordError: ``model`` has no record, or one that an older pathconvert wrote.
    """
    return _Finder(model, record_of(model), start).find()


@dataclass(frozen=True)
class _Layer:
    """A weight as the record describes it, its rows ending in ``ends``."""

    name: str
    rows: IdVector
    columns: IdVector
    ends: IdVector
    groups: int
    transposed: bool

    def places(self, rows: IdVector, columns: IdVector) -> tuple[IdVector, IdVector]:
        """The first two indices of weight[row, column], [places] each."""
        if self.transposed:
            return columns, rows % (len(self.rows) // self.groups)
        return rows, columns % (len(self.columns) // self.groups)


@dataclass(frozen=True)
class _Start:
    """Where a chain's start is: an element of a parameter, and the unit that it leaves (``units`` for none)."""

    parameter: str
    element: int
    leaves: int


class _Finder:
    """What :func:`find_chains` needs at hand."""

    def __init__(self, model: nn.Module, record: Mapping[str, Any], start: Start) -> None:
        stored = record["pivots"]
        if "next_unit" not in stored:
            raise RecordError(
                "this file was written before chains were recorded, so that it cannot be fine-tuned by G-SGD",
                "Restore it (pathconvert restore FILE) and convert it again.",
            )
        self.start, self.rule, self.record = start, record["pivot"], record
        self.parameters = dict(model.named_parameters())
        self.count = len(record["scales"])
        self.host, self.row, self.column, self.next = (
            np.asarray(stored[key], dtype=np.int64) for key in ("layer", "row", "column", "next_unit")
        )
        self.hosts = stored["parameters"]
        self.usable = self.host >= 0
        self.usable[record["held_back"]] = False
        self.path_bn = {entry["name"]: entry["bn"] for entry in record.get("path_bn", {}).get("layers", [])}
        self.layers = {
            name: _Layer(
                name,
                rows := decode_runs(slot["rows"]),
                decode_runs(slot["columns"]),
                decode_runs(record["row_ends"][name]) if name in record["row_ends"] else rows,
                slot["groups"],
                slot["transposed"],
            )
            for name, slot in record["tensors"].items()
            if "columns" in slot
        }
        tensors = *model.named_parameters(remove_duplicate=False), *model.named_buffers()
        known = {name for name, _ in tensors}
        if unknown := [name for name in self.layers if name not in known]:
            raise RecordError(
                f"this {type(model).__name__} has no tensor {unknown[0]}, which its record names",
                "Give the module that reparameterize, to_path_bn or load made, before a wrapper such as torch.compile "
                "or FullyShardedDataParallel is around it.",
            )
        self.vectors = {
            self._name_in(model, name): decode_runs(slot["rows"])
            for name, slot in record["tensors"].items()
            if "columns" not in slot
        }
        self.gammas = {
            name
            for owner, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and (name := f"{owner}.weight") in self.parameters
        }
        for layer, bn in self.path_bn.items():
            if bn is None:  # a BatchNorm that Path-BN put in: its γ makes the layer's units
                self.vectors[f"{layer}.bn.weight"] = self.layers[f"{layer}.weight"].rows
        self.magnitude = self._suffix_products(stored)

    def _name_in(self, model: nn.Module, name: str) -> str:
        """A parameter's name in Path-BN form."""
        if name in self.parameters or not self.path_bn:
            return name
        owner, _, leaf = name.rpartition(".")
        layer = next((layer for layer, bn in self.path_bn.items() if bn == owner), None)
        if layer is not None:
            return f"{layer}.bn.{leaf}"
        return f"{owner}.bn.bias" if isinstance(model.get_submodule(owner), PathBN) else name

    def _suffix_products(self, stored: Mapping[str, Any]) -> NDArray[np.float64] | None:
        """S, [units + 1], the last for ``FIXED``; None with gauge ``unit``."""
        if "magnitude" not in stored:
            return None
        skip_scale = self.record.get("path_bn", {}).get("skip_scale", 1.0)
        own = np.append(np.where(self.usable, np.asarray(stored["magnitude"]) / skip_scale, 1.0), 1.0)
        after = np.append(np.where(self.usable, self.next, self.count), self.count)
        after[after == FIXED] = self.count
        product = own.copy()
        while (after != self.count).any():  # as often as the longest way to the output is long
            product *= own[after]
            after = after[after]
        return product

    # ---- units → chains --------------------------------------------------------------------------------------------

    def find(self) -> Chains:
        chain_of, heads = self._link()
        starts: dict[int, _Start] = {}
        left: dict[str, str] = {}
        for head in heads:
            found = self._start_of(head)
            if isinstance(found, str):
                left[self.hosts[self.host[head]]] = found
            else:
                starts[head] = found
        ordered = self._without_circles(starts, chain_of, left)
        number = np.full(self.count + 1, len(ordered))  # head unit → chain
        number[ordered] = np.arange(len(ordered))
        chain = number[chain_of]  # unit → chain; the number of chains for none
        leaves = np.array([starts[head].leaves for head in ordered], dtype=np.int64)
        scale = np.ones(len(ordered))
        if self.magnitude is not None:
            scale = self.magnitude[ordered] / self.magnitude[leaves]
        parameter = tuple(starts[head].parameter for head in ordered)
        element = [starts[head].element for head in ordered]
        return Chains(
            self.start,
            self._tensors(chain),
            parameter,
            torch.tensor(element, dtype=torch.int64),
            torch.from_numpy(chain[leaves]),
            torch.from_numpy(scale),
            None if self.magnitude is None else torch.from_numpy(self.magnitude),
            1 / self._sizes(),
            int((chain[:-1] < len(ordered)).sum()),
            left,
        )

    def _link(self) -> tuple[IdVector, list[int]]:
        """The head of every unit's chain, [units + 1] (``units`` itself for none), and all heads."""
        before = np.full(self.count, -1)
        for unit in np.flatnonzero(self.usable)[::-1]:  # the first unit that ends in another hands its chain on
            after = self.next[unit]
            if after >= 0 and self.usable[after] and self._carries_on(unit):
                before[after] = unit
        head = np.append(np.where(self.usable, np.arange(self.count), self.count), self.count)
        head[:-1] = np.where(before >= 0, before, head[:-1])
        while not np.array_equal(head, head[head]):
            head = head[head]
        return head, np.flatnonzero(self.usable & (before < 0)).tolist()

    def _carries_on(self, unit: int) -> bool:
        """Whether the unit's pivot hands its scale to the next unit."""
        if self.start == "weight":
            return True
        layer = self.layers[self.hosts[self.host[unit]]]
        normalised = layer.rows[self.row[unit]] == FIXED
        return not normalised or layer.name.removesuffix(".weight") in self.path_bn

    def _start_of(self, head: int) -> _Start | str:
        """A head's start, or why it has none."""
        if self.start == "bn":
            for name, rows in self.vectors.items():
                places = np.flatnonzero(rows == head) if name in self.gammas else rows[:0]
                if places.size:
                    value = self.parameters[name].detach().flatten()[places[0]]
                    return _Start(name, int(places[0]), self.count) if value else f"γ of {name} is 0"
        for layer in self.layers.values():
            rows = np.flatnonzero(layer.ends == head)
            if rows.size and layer.name in self.parameters:
                return self._start_weight(layer, int(rows[0]))
        return "no weight makes it"

    def _start_weight(self, layer: _Layer, row: int) -> _Start | str:
        """The start weight in a row: the papers' for rule ``diagonal``, the row's largest for the others."""
        weight = self.parameters[layer.name].detach()
        per_group, rows_per_group = len(layer.columns) // layer.groups, len(layer.rows) // layer.groups
        first = row // rows_per_group * per_group
        units = layer.columns[first : first + per_group]
        units = np.where((units >= 0) & self.usable[units], units, self.count)
        places = np.arange(first, first + per_group)
        index, into = layer.places(np.full(per_group, row), places)
        centre = tuple(np.full(per_group, size // 2) for size in weight.shape[2:])
        values = weight[tuple(torch.from_numpy(i) for i in (index, into, *centre))].abs().double().numpy(force=True)
        if self.magnitude is not None:
            values = values / self.magnitude[units]
        column = row % per_group if self.rule == "diagonal" else int(values.argmax())
        if values[column] == 0:
            return f"the start weight {layer.name}[{row}, {first + column}] is 0"
        element = np.ravel_multi_index([i[column] for i in (index, into, *centre)], tuple(weight.shape))
        return _Start(layer.name, int(element), int(units[column]))

    def _without_circles(self, starts: Mapping[int, _Start], chain_of: IdVector, left: dict[str, str]) -> list[int]:
        """The heads in their order, without those whose start weights leave chains in a circle: ``left`` has these."""
        waiting = {head: int(chain_of[start.leaves]) for head, start in starts.items()}
        ordered: list[int] = []
        while ready := [head for head, parent in waiting.items() if parent not in waiting]:
            ordered += ready
            waiting = {head: parent for head, parent in waiting.items() if head not in ready}
        left |= {self.hosts[self.host[head]]: "its start weight leaves its own chain" for head in waiting}
        return sorted(ordered)

    # ---- parameters ------------------------------------------------------------------------------------------------

    def _tensors(self, chain: IdVector) -> dict[str, PathTensor]:
        """All weights, biases, γ and β of units that hold a pivot."""
        found = {}
        for name, layer in self.layers.items():
            if name in self.parameters and (self._holds_pivots(layer.rows) or self._holds_pivots(layer.columns)):
                found[name] = self._layer_tensor(layer, chain)
        for name, rows in self.vectors.items():
            if name in self.parameters and self._holds_pivots(rows):
                none, units = torch.tensor([int(chain[-1])]), torch.from_numpy(self._with_pivot(rows))
                nowhere = torch.tensor([self.count])
                found[name] = PathTensor(none, units, nowhere, torch.zeros(0, dtype=torch.int64))
        return found

    def _with_pivot(self, units: IdVector) -> IdVector:
        """``units``, or the number of units where one holds no pivot."""
        return np.where((units >= 0) & self.usable[units], units, self.count)

    def _holds_pivots(self, units: IdVector) -> bool:
        return bool((self._with_pivot(units) < self.count).any())

    def _layer_tensor(self, layer: _Layer, chain: IdVector) -> PathTensor:
        shape = self.parameters[layer.name].shape
        rows, columns = (torch.from_numpy(self._with_pivot(units)) for units in (layer.rows, layer.columns))
        if layer.name.removesuffix(".weight") in self.path_bn:  # the BatchNorm in it normalises its rows
            rows = torch.full_like(rows, self.count)
        return PathTensor(
            _along(layer, torch.from_numpy(chain[layer.columns]), shape, layer.transposed),
            _along(layer, rows, shape, not layer.transposed),
            _along(layer, columns, shape, layer.transposed),
            self._skeleton(layer, shape),
            layer.transposed,
        )

    def _sizes(self) -> Tensor:
        """σ of every unit, float64 [units + 1]; 1 where it would be 0."""
        sizes = np.ones(self.count + 1)
        known = np.append(~self.usable, True)
        for name in self.gammas & set(self.vectors):
            self._set_sizes(sizes, known, self.vectors[name], self.parameters[name].detach().abs())
        for name, layer in self.layers.items():
            if name not in self.parameters or known[layer.rows].all():
                continue
            weight = self.parameters[name].detach().abs().double()
            weight = weight.flatten(2).amax(2) if weight.dim() > 2 else weight
            columns = torch.from_numpy(sizes[self._with_pivot(layer.columns)]).to(weight.device)
            values = weight * _along(layer, columns, weight.shape, layer.transposed)
            if layer.transposed:
                values = values.view(layer.groups, -1, values.shape[1]).amax(1).flatten()
            else:
                values = values.amax(1)
            self._set_sizes(sizes, known, layer.rows, values)
        return torch.from_numpy(sizes)

    @staticmethod
    def _set_sizes(sizes: NDArray[np.float64], known: NDArray[np.bool_], units: IdVector, values: Tensor) -> None:
        """Write ``values`` for the units that none is known of; changes both vectors."""
        found = values.double().numpy(force=True)
        new = ~known[units] & (found > 0) & np.isfinite(found)
        sizes[units[new]] = found[new]
        known[units[new]] = True

    def _skeleton(self, layer: _Layer, shape: torch.Size) -> Tensor:
        """The pivots' places; none in Path-BN form, whose weights hold zeros there."""
        if layer.name not in self.hosts or layer.name.removesuffix(".weight") in self.path_bn:
            return torch.zeros(0, dtype=torch.int64)
        mine = np.flatnonzero(self.usable & (self.host == self.hosts.index(layer.name)))
        centre = [np.full(len(mine), size // 2) for size in shape[2:]]
        places = (*layer.places(self.row[mine], self.column[mine]), *centre)
        return torch.from_numpy(np.ravel_multi_index(places, tuple(shape)))


def _along(layer: _Layer, values: Tensor, shape: torch.Size, first: bool) -> Tensor:
    """A value for every row or column, broadcastable to the weight, whose first or second dimension counts them."""
    ones = (1,) * (len(shape) - 2)
    if first:
        return values.view(-1, 1, *ones)
    per_group = values.view(layer.groups, -1)  # the second dimension counts those of the group alone
    each = per_group if layer.groups == 1 else per_group.repeat_interleave(shape[0] // layer.groups, dim=0)
    return each.reshape(*each.shape, *ones)
