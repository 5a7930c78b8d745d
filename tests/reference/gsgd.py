"""SGD on path coordinates, literally: weights are computed from coordinates, and autograd does the
rest.

A network is described layer by layer. Every coordinate is an element of a tensor of its parameter's
shape; a chain's d is the coordinate at the place of its start. torch's own SGD steps on the
coordinates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

import pathconvert

Unit = tuple[str, int]


class Layer(NamedTuple):
    """One layer: its weight, the scale group that it reads and the one that its rows end in (None
    for no group), the γ of the BatchNorm between, and whether it is in Path-BN form.
    """

    weight: str
    reads: str | None
    makes: str | None
    gamma: str | None = None
    path_bn: bool = False


class Chain(NamedTuple):
    """Units that share a value; the place of its start; the chain that the start weight leaves."""

    units: list[Unit]
    parameter: str
    place: tuple[int, ...]
    parent: int | None


def centre(weight: Tensor, row: int, column: int) -> tuple[int, ...]:
    return (row, column, *(size // 2 for size in weight.shape[2:]))


def column_units(layer: Layer, weight: Tensor, sizes: dict[str, int]) -> list[Unit | None]:
    """The unit of every column; after a flatten a channel has several."""
    if layer.reads is None:
        return [None] * weight.shape[1]
    repeat = weight.shape[1] // sizes[layer.reads]
    return [(layer.reads, column // repeat) for column in range(weight.shape[1])]


class PathCoordinates:
    """The coordinates of a network with weights of its own, and SGD on them."""

    def __init__(
        self,
        model: nn.Module,
        conversion: pathconvert.Conversion,
        layers: list[Layer],
        start: str,
        anchor: str | None,
    ) -> None:
        self.model, self.layers, self.start = model, layers, start
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.sizes = {group.name: group.size for group in conversion.groups}
        self.pivots = {
            (group.name, channel): pivot
            for group in conversion.groups
            for channel, pivot in enumerate(group.pivots)
            if pivot is not None
        }
        self.chains = self._find_chains(conversion.pivot)
        self.chain_of = {unit: k for k, chain in enumerate(self.chains) for unit in chain.units}
        value = []
        for chain in self.chains:
            above = 1.0 if chain.parent is None else value[chain.parent]
            value.append(above * float(self.weights[chain.parameter][chain.place]))
        self.values = [abs(v) for v in value]
        self.rho = [abs(v) if anchor else 1.0 for v in value]
        self.factors = self._factors() if anchor == "balanced" else {}
        self.coordinates = {
            name: w * self.factors.get(name, 1.0) for name, w in self.weights.items()
        }
        for layer in layers:
            for column, unit in enumerate(
                column_units(layer, self.weights[layer.weight], self.sizes)
            ):
                if unit in self.chain_of:
                    k = self.chain_of[unit]
                    self.coordinates[layer.weight][:, column] *= value[k] / self.rho[k]
        for k, chain in enumerate(self.chains):
            self.coordinates[chain.parameter][chain.place] = value[k] / self.rho[k]
        for tensor in self.coordinates.values():
            tensor.requires_grad_(True)

    def _find_chains(self, rule: str) -> list[Chain]:
        layer_of = {layer.weight: layer for layer in self.layers}
        following: dict[Unit, Unit] = {}
        for unit, pivot in self.pivots.items():
            layer = layer_of[pivot.parameter]
            after = (layer.makes, pivot.row)
            through = self.start == "weight" or layer.gamma is None or layer.path_bn
            if after in self.pivots and through and after not in following.values():
                following[unit] = after
        chains: list[Chain] = []
        for layer in self.layers:  # forward order: parents first
            for row in range(self.sizes.get(layer.makes or "", 0)):
                head = (layer.makes, row)
                if head not in self.pivots or head in following.values():
                    continue
                units = [head]
                while units[-1] in following:
                    units.append(following[units[-1]])
                if self.start == "bn" and layer.gamma:
                    chains.append(Chain(units, layer.gamma, (row,), None))
                    continue
                w = self.weights[layer.weight]
                taps = [float(w[centre(w, row, column)]) for column in range(w.shape[1])]
                column = (
                    row % len(taps)
                    if rule == "diagonal"
                    else max(range(len(taps)), key=lambda c: abs(taps[c]))
                )
                leaves = column_units(layer, w, self.sizes)[column]
                parent = next((k for k, chain in enumerate(chains) if leaves in chain.units), None)
                chains.append(Chain(units, layer.weight, centre(w, row, column), parent))
        return chains

    def _factors(self) -> dict[str, Tensor]:
        """What a coordinate is beside d · w: σ_c / σ_r for a weight, 1 / σ_r for a bias, γ or β."""
        sigma: dict[Unit | None, float] = {None: 1.0}
        factors = {}
        for layer in self.layers:
            w = self.weights[layer.weight]
            columns = [sigma.get(unit, 1.0) for unit in column_units(layer, w, self.sizes)]
            rows = [1.0] * len(w)
            for row in range(len(w)):
                unit = (layer.makes, row)
                if unit not in self.pivots:
                    continue
                entering = [float(w[row, c].abs().max()) * size for c, size in enumerate(columns)]
                sigma[unit] = (
                    abs(float(self.weights[layer.gamma][row])) if layer.gamma else max(entering)
                )
                rows[row] = sigma[unit]
            vectors = [layer.gamma, layer.gamma.replace("weight", "bias")] if layer.gamma else []
            vectors += [] if layer.gamma else [layer.weight.replace("weight", "bias")]
            factors |= {
                name: 1 / torch.tensor(rows, dtype=torch.float64)
                for name in vectors
                if name in self.weights
            }
            # BatchNorm normalises a row's size away
            by_row = torch.tensor([1.0] * len(w) if layer.gamma else rows, dtype=torch.float64)
            ones = [1] * (w.dim() - 2)
            by_column = torch.tensor(columns, dtype=torch.float64)
            factors[layer.weight] = by_column.view(1, -1, *ones) / by_row.view(-1, 1, *ones)
        return factors

    def to_weights(self) -> dict[str, Tensor]:
        """Every parameter, as a differentiable function of the coordinates."""
        d = [self.coordinates[chain.parameter][chain.place] for chain in self.chains]
        weights = {name: v / self.factors.get(name, 1.0) for name, v in self.coordinates.items()}
        for layer in self.layers:
            units = column_units(layer, self.weights[layer.weight], self.sizes)
            divisor = torch.stack(
                [d[self.chain_of[u]] if u in self.chain_of else d[0] * 0 + 1 for u in units]
            )
            v = weights[layer.weight]
            weights[layer.weight] = v / divisor.view(1, -1, *[1] * (v.dim() - 2))
        for k, chain in enumerate(self.chains):
            value = d[k] * self.rho[k]
            if chain.parent is not None:
                value = value / (d[chain.parent] * self.rho[chain.parent])
            index = tuple(torch.tensor(i) for i in chain.place)
            weights[chain.parameter] = weights[chain.parameter].index_put(index, value)
        for layer in self.layers:
            mine = [pivot for pivot in self.pivots.values() if pivot.parameter == layer.weight]
            for pivot in mine:
                w = self.weights[layer.weight]
                place = centre(w, pivot.row, pivot.column)
                weights[layer.weight] = weights[layer.weight].index_put(
                    tuple(torch.tensor(i) for i in place), w[place]
                )
        return weights

    def train(
        self,
        loss: Callable[[Tensor], Tensor],
        batches: list[Tensor],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decay: str = "l2",
        weight_norm: bool = False,
    ) -> dict[str, Tensor]:
        """One step of SGD a batch; the weights after the last."""
        leaves = list(self.coordinates.values())
        optimizer = torch.optim.SGD(leaves, lr, momentum, weight_decay=weight_decay)
        for x in batches:
            optimizer.zero_grad()
            total = loss(functional_call(self.model, self.to_weights(), (x,)))
            if decay == "basis_path_norm":  # λ/2 (|d| − 1)² in place of λ/2 d²
                for chain in self.chains:
                    d = self.coordinates[chain.parameter][chain.place]
                    total = total + weight_decay / 2 * ((d.abs() - 1) ** 2 - d**2)
            total.backward()
            if weight_norm:  # the coordinates of a unit's weights take its row's norm
                weights = self.to_weights()
                for layer in self.layers:
                    if layer.reads or layer.makes:
                        for gradient, row in zip(
                            self.coordinates[layer.weight].grad, weights[layer.weight], strict=True
                        ):
                            gradient *= row.detach().norm()
            optimizer.step()
        return {name: weight.detach() for name, weight in self.to_weights().items()}
