"""Small networks as explicit lists of nodes, and what a literal reading of docs/design.md says of
their channels.

Nothing here traces anything: :class:`Oracle` walks the nodes, keeps for every value a Python list
with one entry a channel, and joins channels one by one in a dictionary.

==============  ==============================================================
``ZERO``        a channel of constant zeros
``PINNED``      a channel whose factor is 1
``(node, j)``   channel j of what layer node ``node`` produces in this call
==============  ==============================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ZERO, PINNED = "zero", "pinned"
LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass
class Node:
    """One operation: its kind, the nodes it reads, its layer's name, other arguments, and the
    result's shape.
    """

    kind: str
    reads: tuple[int, ...] = ()
    layer: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = ()


class NodeNetwork(nn.Module):
    """Executes a list of nodes; node 0 is the input, ``outputs`` are returned."""

    def __init__(self, nodes: list[Node], layers: dict[str, nn.Module], outputs: list[int]) -> None:
        super().__init__()
        self.nodes, self.outputs = nodes, outputs
        self.layers = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        values = [x]
        for node in self.nodes[1:]:
            values.append(execute(node, [values[i] for i in node.reads], self.layers))
        return [values[i] for i in self.outputs]


def execute(node: Node, reads: list[Tensor], layers: Any) -> Tensor:
    """What a node computes."""
    x, arguments = reads[0], node.arguments
    if node.layer:
        return layers[node.layer](x)
    spatial = x.dim() - 2
    match node.kind:
        case "relu":
            return F.relu(x)
        case "leaky":
            return F.leaky_relu(x, 0.1)
        case "crelu":
            return torch.cat([F.relu(x), F.relu(-x)], 1)
        case "add":
            return reads[0] + reads[1]
        case "cat":
            return torch.cat(reads, 1)
        case "slice":
            return x[:, arguments["start"] : arguments["stop"]]
        case "chunk":
            return x.chunk(arguments["count"], 1)[arguments["index"]]
        case "shuffle":
            groups = arguments["groups"]
            shape = x.shape
            return x.view(shape[0], groups, -1, *shape[2:]).transpose(1, 2).reshape(shape)
        case "pad_channels":
            return F.pad(x, (0, 0) * spatial + (arguments["before"], arguments["after"]))
        case "max_pool":
            return (F.max_pool1d, F.max_pool2d, F.max_pool3d)[spatial - 1](x, 2, 1)
        case "avg_pool":
            return (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[spatial - 1](x, 2, 1, padding=1)
        case "adaptive_pool":
            pools = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
            return pools[spatial - 1](x, 2)
        case "resize":
            mode = (
                arguments["mode"]
                if arguments["mode"] == "nearest"
                else ("linear", "bilinear", "trilinear")[spatial - 1]
            )
            return F.interpolate(x, scale_factor=2, mode=mode)
        case "global_mean":
            return x.mean(list(range(2, x.dim())), keepdim=True)
        case "mean":
            return x.mean(list(range(2, x.dim())))
        case "flatten":
            return x.flatten(1)
        case "sigmoid":
            return torch.sigmoid(x)
        case "softmax":
            return torch.softmax(x, 1)
        case "mul":
            return reads[0] * reads[1]
        case "square":
            return x * x
    raise AssertionError(node.kind)


class Oracle:
    """Who shares a factor, who is pinned, who is residual: one channel at a time.

    Attributes:
        rows, columns: parameter → channels (resolved with :meth:`root`), as the first call indexes
            it.
        readers: channel → the (BatchNorm, channel) pairs that read it.
    """

    def __init__(self, model: NodeNetwork) -> None:
        self.model = model
        self.parent: dict[Any, Any] = {}
        self.pinned: set[Any] = set()
        self.residual_marks: list[Any] = []
        self.rows: dict[str, list[Any]] = {}
        self.columns: dict[str, list[Any]] = {}
        self.norm_reads: list[tuple[Any, tuple[str, int]]] = []
        self.norm_rows: dict[str, list[Any]] = {}
        self.norm_calls: dict[str, list[list[Any]]] = {}
        self._walk()
        self._settle()

    # ---- joining ---------------------------------------------------------------------------------

    def find(self, channel: Any) -> Any:
        while self.parent.get(channel, channel) != channel:
            channel = self.parent[channel]
        return channel

    def join(self, a: Any, b: Any) -> None:
        """a and b have one factor."""
        if ZERO in (a, b):
            return
        if a == PINNED:
            self.pin(b)
        elif b == PINNED:
            self.pin(a)
        else:
            self.parent[self.find(a)] = self.find(b)

    def pin(self, channel: Any) -> None:
        if channel not in (ZERO, PINNED):
            self.pinned.add(channel)

    # ---- walking ---------------------------------------------------------------------------------

    def _walk(self) -> None:
        nodes = self.model.nodes
        channels: list[list[Any]] = [[PINNED] * nodes[0].shape[1]]
        for number, node in enumerate(nodes[1:], 1):
            reads, shapes = [channels[i] for i in node.reads], [nodes[i].shape for i in node.reads]
            channels.append(self._channels(number, node, reads, shapes))
            assert len(channels[-1]) == node.shape[1], node
        for output in self.model.outputs:
            for channel in channels[output]:
                self.pin(channel)

    def _channels(
        self, number: int, node: Node, reads: list[list[Any]], shapes: list[tuple[int, ...]]
    ) -> list[Any]:
        x = reads[0]
        if node.layer and node.kind not in ("slope", "dropout"):
            return self._layer(number, f"layers.{node.layer}", self.model.layers[node.layer], x)
        match node.kind:
            case "crelu":
                return x + x
            case "cat":
                return [channel for read in reads for channel in read]
            case "add":
                return [self._add(a, b) for a, b in zip(*reads, strict=True)]
            case "slice":
                return x[node.arguments["start"] : node.arguments["stop"]]
            case "chunk":
                size = math.ceil(len(x) / node.arguments["count"])
                return x[node.arguments["index"] * size :][:size]
            case "shuffle":
                groups = node.arguments["groups"]
                each = len(x) // groups
                return [x[g * each + i] for i in range(each) for g in range(groups)]
            case "pad_channels":
                return [ZERO] * node.arguments["before"] + x + [ZERO] * node.arguments["after"]
            case "flatten":
                each = math.prod(shapes[0][2:])
                return [channel for channel in x for _ in range(each)]
            case "sigmoid" | "softmax":
                for channel in x:
                    self.pin(channel)
                return [PINNED] * len(x)
            case "mul":
                return self._product(reads, shapes)
            case "square":
                for channel in x:
                    self.pin(channel)
                return x
        return x  # homogeneous, channel by channel

    def _add(self, a: Any, b: Any) -> Any:
        self.join(a, b)
        if a != b and not {a, b} & {ZERO, PINNED}:
            self.residual_marks.append(a)
        return b if a == ZERO else a

    def _product(self, reads: list[list[Any]], shapes: list[tuple[int, ...]]) -> list[Any]:
        """One factor carries: that of the operand that is rescaled at all, of two of them the
        larger one's.
        """
        free = [any(channel not in (ZERO, PINNED) for channel in read) for read in reads]
        size = [math.prod(shape) for shape in shapes]
        carrier = 1 if (free[1], size[1]) > (free[0], size[0]) else 0
        for channel in reads[1 - carrier]:
            self.pin(channel)
        return reads[carrier]

    def _layer(self, number: int, name: str, layer: nn.Module, x: list[Any]) -> list[Any]:
        width = (
            layer.num_features
            if isinstance(layer, nn.modules.batchnorm._BatchNorm)
            else _width(layer)
        )
        rows: list[Any] = [(number, j) for j in range(width)]
        for parameter, _ in layer.named_parameters():
            for old, new in zip(
                self.rows.setdefault(f"{name}.{parameter}", rows), rows, strict=True
            ):
                self.join(old, new)
        if isinstance(layer, LAYERS):
            for old, new in zip(self.columns.setdefault(f"{name}.weight", x), x, strict=True):
                self.join(old, new)
        else:
            self.norm_rows.setdefault(name, rows)
            for old, new in zip(self.norm_rows[name], rows, strict=True):
                self.join(old, new)
            self.norm_calls.setdefault(name, []).append(x)
            for j, channel in enumerate(x):
                if channel not in (ZERO, PINNED):
                    self.norm_reads.append((channel, (name, j)))
            if layer.weight is None:
                for channel in rows:
                    self.pin(channel)
        return rows

    def _settle(self) -> None:
        """Close pins and residual marks under joining, and say which channels BatchNorms absorb,
        and of which their statistics carry the factors.
        """
        pinned = {self.find(channel) for channel in self.pinned}
        read = {self.find(c) for cs in self.columns.values() for c in cs if c not in (ZERO, PINNED)}
        made = {self.find(c) for cs in self.norm_rows.values() for c in cs}
        self.readers: dict[Any, set[tuple[str, int]]] = {}
        for channel, reader in self.norm_reads:
            self.readers.setdefault(self.find(channel), set()).add(reader)
        self.absorbed = {root for root in self.readers if root not in pinned | read | made}
        carrying = {name for name, calls in self.norm_calls.items() if self._read_alike(calls)}
        self.carried = {
            root
            for root, readers in self.readers.items()
            if root in read - pinned and {name for name, _ in readers} <= carrying
        }
        self.pinned_roots = pinned | (set(self.readers) - self.absorbed - self.carried)
        self.residual_roots = {self.find(channel) for channel in self.residual_marks}
        self.produced = {self.find(channel) for rows in self.rows.values() for channel in rows}

    def _read_alike(self, calls: list[list[Any]]) -> bool:
        """Whether all calls of a BatchNorm read the same channels."""
        resolved = [[c if c in (ZERO, PINNED) else self.find(c) for c in call] for call in calls]
        return all(call == resolved[0] for call in resolved)

    def statistics(self) -> dict[str, list[Any]]:
        """The BatchNorms that carry a free factor → the channels that they read."""
        free = self.carried & self.produced
        return {
            name: calls[0]
            for name, calls in self.norm_calls.items()
            if self._read_alike(calls) and any(self.root(channel) in free for channel in calls[0])
        }

    def root(self, channel: Any) -> Any:
        """The unit that a channel belongs to.

        None where its factor is 1 by construction or no parameter makes it.
        """
        if channel in (ZERO, PINNED):
            return None
        root = self.find(channel)
        return root if root in self.produced - self.absorbed else None

    # ---- pivots and scales (PBN Theorem 1; pivots.py's host rule) --------------------------------

    def scales(
        self, rule: str, free: set[Any], host_of: dict[Any, str] | None = None
    ) -> dict[Any, float]:
        """s_i = |a_i| · s_next(i) for every free unit; 1 without pivot and where the pivots run in
        a circle.

        Args:
            rule: ``diagonal`` or ``max``.
            free: units that may be rescaled.
            host_of: unit → the weight that hosts its pivot; None for the documented rule.
        """
        steps = {unit: self._pivot(unit, rule, host_of) for unit in free}
        scales = {}
        for unit in free:
            path, value = [], 1.0
            at: Any = unit
            while at in free and steps[at] is not None and at not in path:
                path.append(at)
                magnitude, following = steps[at]
                value *= magnitude
                at = following
            scales[unit] = 1.0 if at in path else value
        return scales

    def _pivot(
        self, unit: Any, rule: str, host_of: dict[Any, str] | None
    ) -> tuple[float, Any] | None:
        """|a| and the next unit; None where there is no pivot."""
        hosts = [name for name, cs in self.columns.items() if any(self.root(c) == unit for c in cs)]
        if not hosts or (host_of is not None and unit not in host_of):
            return None
        host = (
            host_of[unit]
            if host_of is not None
            else max(hosts, key=lambda name: self._rows_per_group(name))
        )
        layer = self.model.get_submodule(host.rpartition(".")[0])
        columns = [self.root(c) for c in self.columns[host]]
        mine = [k for k, root in enumerate(columns) if root == unit]
        column = mine[len(mine) // 2]
        rows, groups = self._rows_per_group(host), getattr(layer, "groups", 1)
        block = column // (len(columns) // groups)
        effective = [self._effective(host, block * rows + r, column) for r in range(rows)]
        if rule == "diagonal":
            firsts = [
                k for k, root in enumerate(columns) if root is None or columns.index(root) == k
            ]
            row = firsts.index(columns.index(unit)) % (len(columns) // groups) % rows
        else:
            row = max(range(rows), key=lambda r: abs(effective[r]))
        if effective[row] == 0:
            return None
        return abs(effective[row]), self._next(host, block * rows + row)[0]

    def _rows_per_group(self, weight: str) -> int:
        layer = self.model.get_submodule(weight.rpartition(".")[0])
        return _width(layer) // getattr(layer, "groups", 1)

    def _next(self, weight: str, row: int) -> tuple[Any, float]:
        """The unit in which a row ends, and γ / √(var + eps) on the way."""
        channel = self.rows[weight][row]
        readers = self.readers.get(self.find(channel), set())
        if self.find(channel) not in self.absorbed or len(readers) != 1:
            return self.root(channel), 1.0
        name, j = next(iter(readers))
        norm = self.model.get_submodule(name)
        gamma = 1.0 if norm.weight is None else float(norm.weight[j].detach())
        return self.root(self.norm_rows[name][j]), gamma / math.sqrt(
            float(norm.running_var[j]) + norm.eps
        )

    def _effective(self, weight: str, row: int, column: int) -> float:
        """a = γ / √(var + eps) · w at the kernel's centre."""
        layer = self.model.get_submodule(weight.rpartition(".")[0])
        w = layer.weight.detach()
        groups = getattr(layer, "groups", 1)
        into, out = len(self.columns[weight]) // groups, _width(layer) // groups
        index = [column, row % out] if getattr(layer, "transposed", False) else [row, column % into]
        index += [size // 2 for size in w.shape[2:]]
        return self._next(weight, row)[1] * float(w[tuple(index)])


def _width(layer: nn.Module) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def random_weights(model: nn.Module, seed: int) -> None:
    """Normal weights; γ small, negative or zero now and then.

    Running statistics that are no identity.
    """
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        parameter.data = (
            torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.7
        )
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.num_batches_tracked.zero_()
            layer.running_mean = torch.randn(
                layer.num_features, generator=generator, dtype=torch.float64
            )
            layer.running_var = (
                torch.rand(layer.num_features, generator=generator, dtype=torch.float64) + 0.2
            )
            if layer.weight is not None:
                kinds = torch.from_numpy(
                    rng.choice([1.0, -1.0, 1e-3, 0.0], layer.num_features, p=[0.6, 0.2, 0.1, 0.1])
                )
                layer.weight.data *= kinds
        if isinstance(layer, nn.PReLU):
            layer.weight.data = layer.weight.data.abs()
