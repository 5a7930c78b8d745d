"""Random networks of supported operations, compared with a literal oracle, and the properties of a
conversion.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from layer_networks import carries
from random_examples import examples
from reference.oracle import Node, NodeNetwork, Oracle, execute, random_weights
from torch import Tensor, nn

import pathconvert
from pathconvert.conversion.groups import FIXED, Units, find_units
from pathconvert.conversion.pivots import Pivots, choose_pivots
from pathconvert.conversion.reparameterize import convert_traced
from pathconvert.conversion.rescale import rescale
from pathconvert.conversion.scales import choose_scales
from pathconvert.conversion.tracing.parts import trace_network

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)
COMBINATIONS = [
    (s, p, g)
    for s in ("block", "network")
    for p in ("matching", "max", "diagonal")
    for g in ("unit", "pow2")
]


class Builder:
    """Draws nodes one after another; it keeps every value, so that shapes fit."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.dims = draw(st.sampled_from([2, 2, 2, 1, 3]))
        shape = (2, draw(st.integers(1, 4)), *(4,) * self.dims)
        # drawing only needs shapes
        self.example = torch.zeros(shape, dtype=torch.float64, device="meta")
        self.nodes, self.values, self.layers = [Node("input", shape=shape)], [self.example], {}

    def pick(self, values: Any) -> Any:
        return self.draw(st.sampled_from(list(values)))

    def append(self, node: Node) -> int:
        with torch.no_grad():
            self.values.append(execute(node, [self.values[i] for i in node.reads], self.layers))
        node.shape = tuple(self.values[-1].shape)
        self.nodes.append(node)
        return len(self.nodes) - 1

    def op(self, kind: str, *reads: int, **arguments: Any) -> int:
        return self.append(Node(kind, reads, "", arguments))

    def layer(self, kind: str, read: int, layer: nn.Module) -> int:
        name = f"{kind}{len(self.layers)}"
        self.layers[name] = layer.double().eval().to("meta")
        return self.append(Node(kind, (read,), name))

    def channels(self, value: int) -> int:
        return self.values[value].shape[1]

    def maps(self) -> list[int]:
        """The latest feature maps."""
        return [
            i
            for i, v in enumerate(self.values)
            if v.dim() == self.dims + 2 and max(v.shape[2:]) <= 12
        ][-5:]

    def conv(self, x: int, out: int | None = None, plain: bool = False) -> int:
        into = self.channels(x)
        groups = self.pick([g for g in (1, 1, 2, 3, into) if into % g == 0]) if not plain else 1
        out = out or groups * self.draw(st.integers(1, 3))
        size = self.pick([1, 3])
        arguments: dict[str, Any] = {"bias": self.pick([True, False]), "groups": groups}
        if not plain:
            small = min(self.values[x].shape[2:]) < 2
            mode = (
                "zeros"
                if small
                else self.pick(["zeros", "zeros", "reflect", "replicate", "circular"])
            )
            stride, dilation = self.pick([(1, 1), (1, 1), (2, 1), (1, 2)])
            padding = dilation * (size // 2)
            if padding >= min(self.values[x].shape[2:]):
                mode = "zeros"
            arguments |= {
                "padding_mode": mode,
                "stride": stride,
                "dilation": dilation,
                "padding": padding,
            }
        else:
            arguments |= {"padding": size // 2}
        return self.layer("conv", x, CONVOLUTIONS[self.dims - 1](into, out, size, **arguments))

    def norm(self, x: int) -> int:
        affine = self.draw(st.integers(0, 9)) > 0
        return self.layer("norm", x, NORMS[self.dims - 1](self.channels(x), affine=affine))

    def chain(self, x: int, out: int | None = None) -> int:
        """conv (→ bn) (→ relu)."""
        x = self.conv(x, out, plain=out is not None)
        if self.pick([True, True, False]):
            x = self.norm(x)
        return self.op("relu", x) if self.pick([True, True, False]) else x


def _step(b: Builder) -> None:
    """Draw one more operation, or a few that belong together."""
    x = b.pick(b.maps())
    width = b.channels(x)
    kind = b.pick([
        "chain", "chain", "chain", "chain", "residual", "residual", "add", "cat", "cat_self",
        "carry", "pool", "split",
        "shuffle", "gate", "pad", "deconv", "norm", "again", "on_itself", "mul", "unknown",
        "shared_norm", "option_a",
    ])  # fmt: skip
    if kind == "chain":
        b.chain(x)
    elif kind == "residual":
        inner = b.chain(x, b.draw(st.integers(1, 4)))
        b.op("relu", b.op("add", b.chain(inner, width), x))
    elif kind == "add":
        twins = [i for i in b.maps() if b.values[i].shape == b.values[x].shape]
        b.op("add", x, b.pick(twins))
    elif kind == "cat":
        fitting = [i for i in b.maps() if b.values[i].shape[2:] == b.values[x].shape[2:]]
        b.op("cat", x, b.pick(fitting), *([b.pick(fitting)] if b.pick([True, False]) else []))
    elif kind == "cat_self":
        b.op("cat", x, x)
    elif kind == "carry":
        kind = b.pick(["relu", "leaky", "crelu", "slope", "dropout"])
        if kind == "slope":
            b.layer("slope", x, nn.PReLU(b.pick([1, width])))
        elif kind == "dropout":
            b.layer("dropout", x, DROPOUTS[b.pick([0, b.dims - 1])](0.5))
        else:
            b.op(kind, x)
    elif kind == "pool":
        fits = min(b.values[x].shape[2:]) >= 2
        b.op(b.pick(["max_pool", "avg_pool", "adaptive_pool"] if fits else ["adaptive_pool"]), x)
        if max(b.values[-1].shape[2:]) <= 4:
            b.op("resize", len(b.nodes) - 1, mode=b.pick(["nearest", "linear"]))
    elif kind == "split":
        if width > 1 and b.pick([True, False]):
            count = b.pick([2, 3])
            index = b.draw(st.integers(0, len(b.values[x].chunk(count, 1)) - 1))
            b.op("chunk", x, count=count, index=index)
        else:
            start = b.draw(st.integers(0, width - 1))
            b.op("slice", x, start=start, stop=b.draw(st.integers(start + 1, width)))
    elif kind == "shuffle":
        b.op("shuffle", x, groups=b.pick([g for g in (1, 2, 3) if width % g == 0]))
    elif kind == "gate":
        inner = b.op("relu", b.conv(b.op("global_mean", x), 2, plain=True))
        gate = b.op("sigmoid", b.conv(inner, width, plain=True))
        b.op("mul", *b.pick([(x, gate), (gate, x)]))
    elif kind == "pad":
        b.op("pad_channels", x, before=b.draw(st.integers(0, 2)), after=b.draw(st.integers(0, 2)))
    elif kind == "deconv":
        groups = b.pick([g for g in (1, 2, width) if width % g == 0])
        layer = TRANSPOSED[b.dims - 1](width, groups * b.pick([1, 2]), 3, padding=1, groups=groups)
        b.layer("deconv", x, layer)
    elif kind == "norm":
        b.norm(x)
    elif kind == "again":  # call a module a second time, on another value with as many channels
        _call_again(b, [n for n in b.nodes if n.kind in ("conv", "norm")])
    elif kind == "on_itself":
        y = b.conv(x, width, plain=True)
        b.append(Node("conv", (b.op("relu", y),), b.nodes[y].layer))
    elif kind == "mul":
        twins = [i for i in b.maps() if b.values[i].shape == b.values[x].shape]
        b.op("mul", x, b.pick(twins))
    elif kind == "unknown":
        b.op(b.pick(["square", "softmax"]), x)
    elif kind == "shared_norm":
        first = b.norm(b.conv(x))
        other = b.conv(x, b.channels(first), plain=True)
        b.op("relu", b.append(Node("norm", (other,), b.nodes[first].layer)))
    elif kind == "option_a":
        wide = b.chain(x, width + 2)
        b.op("relu", b.op("add", wide, b.op("pad_channels", x, before=1, after=1)))


def _call_again(b: Builder, nodes: list[Node]) -> None:
    for node in nodes:
        old = b.values[node.reads[0]]
        for i in reversed(b.maps()):
            if (
                b.values[i].shape[1] == old.shape[1]
                and i != node.reads[0]
                and min(b.values[i].shape[2:]) >= 3
            ):
                b.append(Node(node.kind, (i,), node.layer))
                return


@st.composite
def networks(draw: Any) -> tuple[NodeNetwork, Tensor]:
    """A network in float64 and an input."""
    b = Builder(draw)
    for _ in range(draw(st.integers(2, 8))):
        _step(b)
    x = b.maps()[-1]
    ends = [x]
    if draw(st.integers(0, 4)):
        vector = b.op(draw(st.sampled_from(["mean", "flatten"])), x)
        hidden = b.layer("linear", vector, nn.Linear(b.channels(vector), draw(st.integers(1, 4))))
        ends = [b.layer("linear", b.op("relu", hidden), nn.Linear(b.channels(hidden), 2))]
    if not draw(st.integers(0, 5)):
        ends.append(draw(st.sampled_from(b.maps())))
    model = NodeNetwork(b.nodes, b.layers, ends).to_empty(device="cpu")
    seed = draw(st.integers(0, 10**6))
    random_weights(model, seed)
    return model.eval(), torch.randn(
        b.example.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def describe(model: NodeNetwork) -> str:
    lines = [
        f"{i}: {n.kind} {n.reads} {n.layer and model.layers[n.layer]} {n.arguments}"
        for i, n in enumerate(model.nodes)
    ]
    return "\n".join([*lines, f"outputs {model.outputs}"])


def outputs(model: nn.Module, x: Tensor, training: bool = False) -> list[Tensor]:
    model = copy.deepcopy(model).train(training)
    torch.manual_seed(0)
    with torch.no_grad():
        return list(model(x))


def deviation(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference relative to the largest value of an output."""
    pairs = zip(a, b, strict=True)
    return max(float((p - q).abs().max() / p.abs().max().clamp(min=1e-200)) for p, q in pairs)


def match_units(oracle: Oracle, units: Units) -> dict[int, Any]:
    """Unit → the oracle's unit, after checking that both index every parameter in the same way."""
    unit_to_root: dict[int, Any] = {}
    root_to_unit: dict[Any, int] = {}
    slots = {slot.parameter: slot for slot in units.slots}
    statistics = {
        f"{name}.{kind}": reads
        for name, reads in oracle.statistics().items()
        for kind in ("running_mean", "running_var")
    }
    assert {slot.parameter for slot in units.slots if slot.statistic} == statistics.keys()
    rows = oracle.rows | statistics
    assert slots.keys() == rows.keys()
    for name, slot in slots.items():
        sides = [("row", slot.rows, rows[name])]
        assert (slot.columns is None) == (name not in oracle.columns), name
        if slot.columns is not None:
            sides.append(("column", slot.columns, oracle.columns[name]))
        for side, found, expected in sides:
            assert len(found) == len(expected), f"{name} {side}s"
            for i, (unit, channel) in enumerate(zip(found.tolist(), expected, strict=True)):
                root = oracle.root(channel)
                assert (unit == FIXED) == (root is None), (
                    f"{name} {side} {i}: unit {unit}, oracle {root}"
                )
                if root is not None:
                    assert unit_to_root.setdefault(unit, root) == root, (
                        f"{name} {side} {i}: joined with {root}"
                    )
                    assert root_to_unit.setdefault(root, unit) == unit, (
                        f"{name} {side} {i}: torn from {root}"
                    )
    return unit_to_root


@examples(100)
@hypothesis.given(networks())
def test_groups_are_the_oracles(drawn: tuple[NodeNetwork, Tensor]) -> None:
    model, x = drawn
    hypothesis.note(describe(model))
    oracle = Oracle(model)
    units = find_units(trace_network(model, x).trace)
    roots = match_units(oracle, units)
    assert len(roots) == units.count
    for group in units.groups:
        for unit in range(group.start, group.start + group.size):
            assert (group.pinned_by is not None) == (roots[unit] in oracle.pinned_roots), (
                group,
                unit,
            )
            assert group.residual == (roots[unit] in oracle.residual_roots), (group, unit)


@examples(60)
@hypothesis.given(
    networks(), st.sampled_from(["diagonal", "max"]), st.sampled_from(["block", "network"])
)
def test_scales_are_the_oracles(drawn: tuple[NodeNetwork, Tensor], rule: Any, scope: str) -> None:
    model, x = drawn
    hypothesis.note(describe(model))
    oracle = Oracle(model)
    units = find_units(trace_network(model, x).trace)
    roots = match_units(oracle, units)
    is_free = np.concatenate([
        np.zeros(0, dtype=bool),
        *([g.pinned_by is None and not (g.residual and scope == "block")] * g.size
            for g in units.groups),
    ]).astype(bool)  # fmt: skip
    tensors = {
        name: tensor.detach()
        for name, tensor in (*model.named_buffers(), *model.named_parameters())
    }
    pivots = choose_pivots(units, tensors, is_free, rule)
    scales, held, _ = choose_scales(units, pivots, tensors, "unit")
    hypothesis.assume(not held.any())
    free = {roots[i] for i in np.flatnonzero(is_free)}
    # Scope network: the oracle does not know which consumers lie outside a stream, but it knows
    # their pivots.
    hosts = None
    if scope == "network":
        hosts = {
            roots[i]: units.layers[pivots.layer[i]].parameter
            for i in np.flatnonzero(pivots.layer >= 0)
        }
    expected = oracle.scales(rule, free, hosts)
    carried = _groups_of_carried_units(units)
    for unit in np.flatnonzero(is_free):
        off = scales[unit] / expected[roots[unit]]
        if units.group_of()[unit] in carried:  # it may be recentred
            off /= 2 ** (40 * np.round(np.log2(off) / 40))
        assert off == pytest.approx(1, rel=1e-12), f"unit {unit}, {roots[unit]}"


def _groups_of_carried_units(units: Units) -> set[int]:
    """The groups with a unit whose factor the statistics of a BatchNorm carry."""
    rows = [slot.rows[slot.rows >= 0] for slot in units.slots if slot.statistic]
    return set(units.group_of()[np.concatenate([np.zeros(0, dtype=np.int64), *rows])].tolist())


@examples(15)
@hypothesis.given(networks())
def test_every_conversion_keeps_the_function_and_comes_back(
    drawn: tuple[NodeNetwork, Tensor],
) -> None:
    model, x = drawn
    hypothesis.note(describe(model))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reference, traced = outputs(model, x), trace_network(model, x)
    for scope, pivot, gauge in COMBINATIONS:
        c = convert_traced(model, traced, scope, pivot, gauge)
        assert deviation(reference, outputs(c.model, x)) < 1e-10, (scope, pivot, gauge)
        restored = pathconvert.restore(c.model, json.loads(json.dumps(c.record)))
        for name, tensor in restored.state_dict().items():
            off = (tensor - before[name]).abs() > 2 * np.finfo(np.float64).eps * before[name].abs()
            assert not off.any(), (scope, pivot, gauge, name)
            assert gauge == "unit" or torch.equal(tensor, before[name]), (scope, pivot, gauge, name)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@examples(40)
@hypothesis.given(
    networks(),
    st.sampled_from(["block", "network"]),
    st.sampled_from(["matching", "max", "diagonal"]),
)
def test_pivots_are_one_after_the_unit_gauge(
    drawn: tuple[NodeNetwork, Tensor], scope: Any, rule: Any
) -> None:
    model, x = drawn
    hypothesis.note(describe(model))
    c = pathconvert.reparameterize(model, x, scope=scope, pivot=rule)
    oracle = Oracle(c.model)  # of the converted network: the effective weights are read off it
    assert not c.exponents().any() or carries(c.units)  # only such factors leave their range here
    exponents = iter(c.exponents().tolist())
    for group in c.groups:
        for channel, pivot in enumerate(group.pivots):
            size = 2.0 ** next(exponents)
            if pivot is None:
                assert group.scales[channel] == 1, (group.name, channel)
                continue
            after = oracle._effective(pivot.parameter, pivot.row, pivot.column)
            expected = pivot.sign * size
            assert after == pytest.approx(expected, rel=1e-12), (group.name, channel, pivot)


@examples(30)
@hypothesis.given(networks(), st.integers(0, 10**6))
def test_any_factors_keep_evaluation_and_training(
    drawn: tuple[NodeNetwork, Tensor], seed: int
) -> None:
    """Rescaling by s and then by t equals rescaling by s · t, and outputs of both modes stay."""
    model, x = drawn
    hypothesis.note(describe(model))
    units = find_units(trace_network(model, x).trace)
    rng = np.random.default_rng(seed)
    s, t = np.ones(units.count), np.ones(units.count)
    for group in units.groups:
        if group.pinned_by is None:
            for scales in (s, t):
                scales[group.start : group.start + group.size] = np.exp(
                    rng.uniform(-2, 2, group.size)
                )
    once, product = rescale(model, units.slots, s), rescale(model, units.slots, s * t)
    twice = rescale(once, units.slots, t)
    for name, tensor in twice.state_dict().items():
        torch.testing.assert_close(tensor, product.state_dict()[name], rtol=1e-14, atol=0, msg=name)
    assert deviation(outputs(model, x), outputs(twice, x)) < 1e-10
    if not carries(units):  # tests/conversion/test_carrying.py
        # BatchNorm over two values has a derivative of up to 1 / √eps = 316 per layer
        assert deviation(outputs(model, x, training=True), outputs(once, x, training=True)) < 1e-7


@examples(30)
@hypothesis.given(
    networks(),
    st.sampled_from(["block", "network"]),
    st.sampled_from(["matching", "max", "diagonal"]),
)
def test_float32_is_bit_identical_or_two_ulp(
    drawn: tuple[NodeNetwork, Tensor], scope: Any, rule: Any
) -> None:
    model, x = drawn[0].float(), drawn[1].float()
    hypothesis.note(describe(model))
    before = model.state_dict()
    exact = pathconvert.reparameterize(model, x, scope=scope, pivot=rule, gauge="pow2")
    for a, b in zip(outputs(model, x), outputs(exact.model, x), strict=True):
        assert torch.equal(a, b)
    for name, tensor in pathconvert.restore(exact.model, exact.record).state_dict().items():
        assert torch.equal(tensor, before[name]), name
    unit = pathconvert.reparameterize(model, x, scope=scope, pivot=rule, gauge="unit")
    for name, tensor in pathconvert.restore(unit.model, unit.record).state_dict().items():
        if tensor.is_floating_point():
            spacing = torch.from_numpy(np.spacing(before[name].abs().numpy()))
            assert bool(((tensor - before[name]).abs() <= 2 * spacing).all()), name
    assert isinstance(unit.pivots, Pivots)
