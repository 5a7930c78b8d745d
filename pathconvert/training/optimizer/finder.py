"""Finding the chains of a network (``chains.py``) from the record of its conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pathconvert.choices import Start
from pathconvert.conversion.groups import FIXED
from pathconvert.conversion.record import Record, record_of
from pathconvert.conversion.tracing.trace import FloatVector, IdVector
from pathconvert.errors import RecordError
from pathconvert.path_bn.layer import PathBN
from pathconvert.training.optimizer.chains import Chains, PathTensor


def find_chains(model: nn.Module, start: Start) -> Chains:
    """The chains of a network in path or Path-BN form.

    Args:
        model: a network that carries its record, as those from ``reparameterize``, ``to_path_bn``
            and ``load`` do; not changed.
        start: which parameters hold the chains' coordinates.

    Raises:
        RecordError: ``model`` has no record, its record was written before chains were recorded, or
            a tensor that the record names is missing.
    """
    return _Finder(model, record_of(model), start).find()


@dataclass(frozen=True)
class _RecordedWeight:
    """A weight as the record describes it.

    Attributes:
        name: the parameter's name.
        rows, columns: the unit of every row, and of every column.
        ends: the unit that each row ends in; not that of ``rows`` where a BatchNorm comes between.
        groups: groups of the convolution.
        transposed: whether it is a transposed convolution.
    """

    name: str
    rows: IdVector
    columns: IdVector
    ends: IdVector
    groups: int
    transposed: bool

    def places(self, rows: IdVector, columns: IdVector) -> tuple[IdVector, IdVector]:
        """Where given rows and columns are in the tensor.

        Returns:
            The first and the second index into the tensor, [places] each.
        """
        if self.transposed:
            return columns, rows % (len(self.rows) // self.groups)
        return rows, columns % (len(self.columns) // self.groups)


@dataclass(frozen=True)
class _Start:
    """A chain's start: an element of a parameter, and the unit that it leaves.

    If it leaves none, ``leaves`` is the number of units.
    """

    parameter: str
    element: int
    leaves: int


class _Finder:
    """The work of :func:`find_chains`, for one network and one choice of start."""

    def __init__(self, model: nn.Module, record: Record, start: Start) -> None:
        pivots, path_bn = record.pivots, record.path_bn
        if pivots.next_unit is None:
            raise RecordError(
                "this file was written before chains were recorded, so it cannot be fine-tuned with"
                " G-SGD",
                "Restore it (pathconvert restore FILE) and convert it again.",
            )
        self.start, self.rule = start, record.pivot
        self.parameters = dict(model.named_parameters())
        self.count = len(record.scales)
        self.host, self.row, self.column = pivots.layer, pivots.row, pivots.column
        self.next = pivots.next_unit
        self.hosts = pivots.parameters
        self.usable = self.host >= 0
        self.usable[record.held_back] = False
        self.path_bn = {layer.name: layer.bn for layer in path_bn.layers} if path_bn else {}
        self.layers = {
            slot.parameter: _RecordedWeight(
                name=slot.parameter,
                rows=slot.rows,
                columns=slot.columns,
                ends=record.row_ends.get(slot.parameter, slot.rows),
                groups=slot.groups,
                transposed=slot.transposed,
            )
            for slot in record.slots
            if slot.columns is not None
        }
        self._require_tensors(model)
        self.vectors = {
            self._name_in(model, slot.parameter): slot.rows
            for slot in record.slots
            if slot.columns is None and slot.statistic is None
        }
        self.gammas = {
            name
            for owner, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            and (name := f"{owner}.weight") in self.parameters
        }
        for layer, bn in self.path_bn.items():
            if bn is None:  # Path-BN added this BatchNorm, whose γ makes the layer's units
                self.vectors[f"{layer}.bn.weight"] = self.layers[f"{layer}.weight"].rows
        self.magnitude = self._suffix_products(
            pivots.magnitude, path_bn.skip_scale if path_bn else 1.0
        )

    def _require_tensors(self, model: nn.Module) -> None:
        """Refuse a model that lacks a tensor of the record.

        Raises:
            RecordError: a tensor is missing.
        """
        tensors = *model.named_parameters(remove_duplicate=False), *model.named_buffers()
        known = {name for name, _ in tensors}
        if unknown := [name for name in self.layers if name not in known]:
            raise RecordError(
                f"this {type(model).__name__} has no tensor {unknown[0]}, which its record names",
                "Pass the module that reparameterize, to_path_bn or load returned, before it is"
                " wrapped, as in torch.compile or FullyShardedDataParallel.",
            )

    def _name_in(self, model: nn.Module, name: str) -> str:
        """The name that a parameter of the record has in ``model``.

        Path-BN layers take BatchNorms in, as ``bn``.
        """
        if name in self.parameters or not self.path_bn:
            return name
        owner, _, leaf = name.rpartition(".")
        layer = next((layer for layer, bn in self.path_bn.items() if bn == owner), None)
        if layer is not None:
            return f"{layer}.bn.{leaf}"
        return f"{owner}.bn.bias" if isinstance(model.get_submodule(owner), PathBN) else name

    def _suffix_products(
        self, magnitude: FloatVector | None, skip_scale: float
    ) -> FloatVector | None:
        """S of every unit, [units + 1], the last 1; None in the gauge ``unit``.

        Args:
            magnitude: |a| of the pivots, [units]; None in the gauge ``unit``.
            skip_scale: λ, which is a part of ``magnitude``.
        """
        if magnitude is None:
            return None
        own = np.append(np.where(self.usable, magnitude / skip_scale, 1.0), 1.0)
        after = np.append(np.where(self.usable, self.next, self.count), self.count)
        after[after == FIXED] = self.count
        product = own.copy()
        while (
            after != self.count
        ).any():  # pointer doubling: each round covers twice as many pivots
            product *= own[after]
            after = after[after]
        return product

    # ---- units → chains --------------------------------------------------------------------------

    def find(self) -> Chains:
        """Find the chains."""
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
            start=self.start,
            tensors=self._tensors(chain),
            parameter=parameter,
            element=torch.tensor(element, dtype=torch.int64),
            parent=torch.from_numpy(chain[leaves]),
            scale=torch.from_numpy(scale),
            gauge=None if self.magnitude is None else torch.from_numpy(self.magnitude),
            balance=1 / self._sizes(),
            units=int((chain[:-1] < len(ordered)).sum()),
            left=left,
        )

    def _link(self) -> tuple[IdVector, list[int]]:
        """Link units to chains.

        Returns:
            The head of the chain of every unit, [units + 1], the number of units where there is
            none; and all heads.
        """
        before = np.full(self.count, -1)
        # in reverse, so that the first unit that ends in another wins
        for unit in np.flatnonzero(self.usable)[::-1]:
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
        """The start of the chain of a head, or the reason why there is none."""
        if self.start == "bn":
            for name, rows in self.vectors.items():
                places = np.flatnonzero(rows == head) if name in self.gammas else rows[:0]
                if places.size:
                    value = self.parameters[name].detach().flatten()[places[0]]
                    return (
                        _Start(name, int(places[0]), self.count) if value else f"γ of {name} is 0"
                    )
        for layer in self.layers.values():
            rows = np.flatnonzero(layer.ends == head)
            if rows.size and layer.name in self.parameters:
                return self._start_weight(layer, int(rows[0]))
        return "no weight makes it"

    def _start_weight(self, layer: _RecordedWeight, row: int) -> _Start | str:
        """The start weight in a row.

        With the rule ``diagonal`` it is that of the papers, with the others the row's largest.
        """
        weight = self.parameters[layer.name].detach()
        per_group, rows_per_group = (
            len(layer.columns) // layer.groups,
            len(layer.rows) // layer.groups,
        )
        first = row // rows_per_group * per_group
        units = layer.columns[first : first + per_group]
        units = np.where((units >= 0) & self.usable[units], units, self.count)
        places = np.arange(first, first + per_group)
        index, into = layer.places(np.full(per_group, row), places)
        centre = tuple(np.full(per_group, size // 2) for size in weight.shape[2:])
        values = (
            weight[tuple(torch.from_numpy(i) for i in (index, into, *centre))]
            .abs()
            .double()
            .numpy(force=True)
        )
        if self.magnitude is not None:
            values = values / self.magnitude[units]
        column = row % per_group if self.rule == "diagonal" else int(values.argmax())
        if values[column] == 0:
            return f"the start weight {layer.name}[{row}, {first + column}] is 0"
        element = np.ravel_multi_index(
            [i[column] for i in (index, into, *centre)], tuple(weight.shape)
        )
        return _Start(layer.name, int(element), int(units[column]))

    def _without_circles(
        self, starts: Mapping[int, _Start], chain_of: IdVector, left: dict[str, str]
    ) -> list[int]:
        """All heads in order, but those whose start weights leave chains in a circle.

        They are added to ``left``.
        """
        waiting = {head: int(chain_of[start.leaves]) for head, start in starts.items()}
        ordered: list[int] = []
        while ready := [head for head, parent in waiting.items() if parent not in waiting]:
            ordered += ready
            waiting = {head: parent for head, parent in waiting.items() if head not in ready}
        left |= {
            self.hosts[self.host[head]]: "its start weight leaves its own chain" for head in waiting
        }
        return sorted(ordered)

    # ---- parameters ------------------------------------------------------------------------------

    def _tensors(self, chain: IdVector) -> dict[str, PathTensor]:
        """All weights, biases, γ and β that belong to units with a pivot, by name."""
        found = {}
        for name, layer in self.layers.items():
            if name in self.parameters and (
                self._holds_pivots(layer.rows) or self._holds_pivots(layer.columns)
            ):
                found[name] = self._layer_tensor(layer, chain)
        for name, rows in self.vectors.items():
            if name in self.parameters and self._holds_pivots(rows):
                none, units = (
                    torch.tensor([int(chain[-1])]),
                    torch.from_numpy(self._with_pivot(rows)),
                )
                nowhere = torch.tensor([self.count])
                found[name] = PathTensor(none, units, nowhere, torch.zeros(0, dtype=torch.int64))
        return found

    def _with_pivot(self, units: IdVector) -> IdVector:
        """``units``, with the number of units in place of those that have no pivot."""
        return np.where((units >= 0) & self.usable[units], units, self.count)

    def _holds_pivots(self, units: IdVector) -> bool:
        return bool((self._with_pivot(units) < self.count).any())

    def _layer_tensor(self, layer: _RecordedWeight, chain: IdVector) -> PathTensor:
        shape = self.parameters[layer.name].shape
        rows, columns = (
            torch.from_numpy(self._with_pivot(units)) for units in (layer.rows, layer.columns)
        )
        # the BatchNorm in a Path-BN layer normalises its rows
        if layer.name.removesuffix(".weight") in self.path_bn:
            rows = torch.full_like(rows, self.count)
        return PathTensor(
            _along(layer, torch.from_numpy(chain[layer.columns]), shape, first=layer.transposed),
            _along(layer, rows, shape, first=not layer.transposed),
            _along(layer, columns, shape, first=layer.transposed),
            self._skeleton(layer, shape),
            layer.transposed,
        )

    def _sizes(self) -> Tensor:
        """σ of every unit (see :attr:`Chains.balance`), float64 [units + 1].

        It is 1 where it would be 0.
        """
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
            values = weight * _along(layer, columns, weight.shape, first=layer.transposed)
            if layer.transposed:
                values = values.view(layer.groups, -1, values.shape[1]).amax(1).flatten()
            else:
                values = values.amax(1)
            self._set_sizes(sizes, known, layer.rows, values)
        return torch.from_numpy(sizes)

    @staticmethod
    def _set_sizes(
        sizes: NDArray[np.float64], known: NDArray[np.bool_], units: IdVector, values: Tensor
    ) -> None:
        """Write ``values`` to ``sizes`` for the units whose size is not known yet.

        Changes ``sizes`` and ``known``.
        """
        found = values.double().numpy(force=True)
        new = ~known[units] & (found > 0) & np.isfinite(found)
        sizes[units[new]] = found[new]
        known[units[new]] = True

    def _skeleton(self, layer: _RecordedWeight, shape: torch.Size) -> Tensor:
        """Places of a layer's pivots, in row-major order.

        None for Path-BN layers, whose weights are 0 there.
        """
        if layer.name not in self.hosts or layer.name.removesuffix(".weight") in self.path_bn:
            return torch.zeros(0, dtype=torch.int64)
        mine = np.flatnonzero(self.usable & (self.host == self.hosts.index(layer.name)))
        centre = [np.full(len(mine), size // 2) for size in shape[2:]]
        places = (*layer.places(self.row[mine], self.column[mine]), *centre)
        return torch.from_numpy(np.ravel_multi_index(places, tuple(shape)))


def _along(layer: _RecordedWeight, values: Tensor, shape: torch.Size, *, first: bool) -> Tensor:
    """Values per row or column of a weight, broadcastable to it.

    The weight counts them along its first or second dimension.
    """
    ones = (1,) * (len(shape) - 2)
    if first:
        return values.view(-1, 1, *ones)
    per_group = values.view(layer.groups, -1)  # the second dimension counts only those of one group
    each = (
        per_group
        if layer.groups == 1
        else per_group.repeat_interleave(shape[0] // layer.groups, dim=0)
    )
    return each.reshape(*each.shape, *ones)
