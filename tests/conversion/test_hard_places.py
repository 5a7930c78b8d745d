# ruff: noqa: ARG001, ARG005 - every forward takes (network, x), used or not
"""One small network for every case that is easy to get wrong; each must keep its function and say what it pinned.

``factors_keep`` scales every free unit by a random factor and compares outputs, in evaluation and in training mode: the
sharpest test of a trace, since no two channels have the same factor by accident.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import pathconvert
from pathconvert.conversion import pivots as pivots_module
from pathconvert.conversion.groups import Units, find_units
from pathconvert.conversion.parts import Traced, trace_network
from pathconvert.conversion.rescale import rescale
from pathconvert.errors import EquivalenceError, RecordError, RefusedNetwork, TraceError

RESIDUAL = "is tied by a residual add, which scope block does not rescale (scope network does)"
OUTPUT = "is a network output"


class Net(nn.Module):
    """A network made of named layers and a forward that uses them."""

    def __init__(self, forward: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            if isinstance(layer, nn.Module | nn.Parameter):
                setattr(self, name, layer)
            else:
                self.register_buffer(name, layer)
        self._forward = forward

    def forward(self, *args: Any) -> Any:
        return self._forward(self, *args)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """float64, normal weights, running statistics other than 0 and 1, evaluation mode."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = normal(*parameter.shape) * 0.6
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_var is not None:
            layer.running_mean = normal(layer.num_features)
            layer.running_var = normal(layer.num_features).abs() + 0.3
    return model.double().eval()


def images(channels: int = 3, seed: int = 1, dims: int = 2, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *(6,) * dims, generator=generator, dtype=torch.float64)


def leaves(output: Any) -> list[Tensor]:
    """All tensors of an output, found without the code that is tested."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        return [t for value in output.values() for t in leaves(value)]
    if isinstance(output, list | tuple | set | frozenset):
        return [t for value in output for t in leaves(value)]
    return leaves(vars(output)) if hasattr(output, "__dict__") else []


def run(model: nn.Module, x: Any, training: bool = False) -> list[Tensor]:
    model = copy.deepcopy(model).train(training)
    torch.manual_seed(0)
    with torch.no_grad():
        return leaves(model(*(x if isinstance(x, tuple) else (x,))))


def assert_same(model: nn.Module, other: nn.Module, x: Any, training: bool = False, tolerance: float = 1e-10) -> None:
    a, b = run(model, x, training), run(other, x, training)
    assert a
    assert len(a) == len(b)
    for i, (p, q) in enumerate(zip(a, b, strict=True)):
        error = float((p.double() - q.double()).abs().max() / p.double().abs().max().clamp(min=1e-200))
        assert error < tolerance, f"output {i}, training={training}: off by {error:.1e}"


def factors_keep(model: nn.Module, x: Any, training: bool = True) -> tuple[Units, Traced]:
    """Check that random factors on all free units change no output; returns the units."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    traced = trace_network(model, x)
    units = find_units(traced.trace)
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cpu", name
        assert torch.equal(tensor, before[name]), name
    scales = np.ones(units.count)
    rng = np.random.default_rng(0)
    for group in units.groups:
        if group.pinned_by is None:
            scales[group.start : group.start + group.size] = np.exp(rng.uniform(0.5, 2, group.size))
    scaled = rescale(model, units.slots, scales)
    assert_same(model, scaled, x)
    if training:
        assert_same(model, scaled, x, training=True, tolerance=1e-8)
    return units, traced


def free(units: Units) -> dict[str, int]:
    """The number of free channels of each group."""
    return {group.name: group.size for group in units.groups if group.pinned_by is None}


def pinned(units: Units) -> dict[str, str]:
    """The reason of each pinned group."""
    return {group.name: group.pinned_by for group in units.groups if group.pinned_by is not None}


def unit_vector(units: Units, parameter: str, side: str) -> list[int]:
    return getattr(next(slot for slot in units.slots if slot.parameter == parameter), side).tolist()


def two_convolutions(middle: Callable[[Net, Tensor], Tensor], into: int = 4, **layers: Any) -> Net:
    """conv a (3 → 4) → ``middle`` → conv b (``into`` → 5)."""
    b = layers.pop("b", None) or nn.Conv2d(into, 5, 3, padding=1)
    net = Net(lambda s, x: s.b(middle(s, s.a(x))), a=nn.Conv2d(3, 4, 3, padding=1), b=b, **layers)
    return randomise(net)


# ---- what carries: all four channels of ``a`` stay free ----------------------------------------------------------

CARRIES: dict[str, tuple[int, Callable[[Net, Tensor], Tensor]]] = {
    "relu": (4, lambda s, x: F.relu(x)),
    "relu in place": (4, lambda s, x: F.relu(x, inplace=True)),
    "relu_": (4, lambda s, x: x.relu_()),
    "leaky relu": (4, lambda s, x: F.leaky_relu(x, 0.2)),
    "prelu": (4, lambda s, x: F.prelu(x, torch.full((4,), 0.3, dtype=x.dtype))),
    "crelu": (8, lambda s, x: torch.cat([F.relu(x), F.relu(-x)], 1)),
    "clamp at zero": (4, lambda s, x: x.clamp(min=0)),
    "clip at zero": (4, lambda s, x: x.clip(0)),
    "clamp_min": (4, lambda s, x: torch.clamp_min(x, 0)),
    "threshold at zero": (4, lambda s, x: F.threshold(x, 0, 0)),
    "negative scalar": (4, lambda s, x: F.relu(-2 * x) / -3),
    "zero minus x": (4, lambda s, x: F.relu(0 - x)),
    "max pool": (4, lambda s, x: F.max_pool2d(x, 3, 2, 1)),
    "average pool": (4, lambda s, x: F.avg_pool2d(x, 3, 2, 1)),
    "lp pool": (4, lambda s, x: F.lp_pool2d(x, 2, 2)),
    "adaptive max pool": (4, lambda s, x: F.adaptive_max_pool2d(x, 2)),
    "nearest": (4, lambda s, x: F.interpolate(x, scale_factor=2)),
    "bilinear": (4, lambda s, x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)),
    "dropout": (4, lambda s, x: F.dropout(x, 0.5, s.training)),
    "dropout of channels": (4, lambda s, x: F.dropout2d(x, 0.5, s.training)),
    "nested concat": (14, lambda s, x: torch.cat([torch.cat([x[:, 2:], x], 1), torch.cat([x, x], 1)], 1)),
    "concat of itself": (8, lambda s, x: torch.cat([x, x], 1)),
    "concat with a constant": (6, lambda s, x: torch.concat([x, torch.ones(3, 2, 6, 6, dtype=x.dtype)], dim=1)),
    "channel shuffle": (4, lambda s, x: x.view(-1, 2, 2, 6, 6).transpose(1, 2).reshape(-1, 4, 6, 6)),
    "native channel shuffle": (4, lambda s, x: F.channel_shuffle(x, 2)),
    "chunk": (4, lambda s, x: torch.cat(x.chunk(2, 1)[::-1], 1)),
    "split": (3, lambda s, x: x.split([1, 3], 1)[1]),
    "strided slice": (2, lambda s, x: x[:, 1::2]),
    "unbind and stack": (4, lambda s, x: torch.stack(list(reversed(x.unbind(1))), 1)),
    "index with a list": (4, lambda s, x: x[:, [3, 1, 0, 2]]),
    "repeat_interleave": (8, lambda s, x: x.repeat_interleave(2, 1)),
    "flip": (4, lambda s, x: x.flip(1)),
    "x.data": (4, lambda s, x: x.data),
    "detach, clone": (4, lambda s, x: x.detach().clone().contiguous()),
    "reflecting padding": (4, lambda s, x: F.pad(x, (1, 1, 1, 1), mode="reflect")),
    "zero padding": (4, lambda s, x: F.pad(x, (1, 2, 0, 1))),
    "zero padding of channels": (7, lambda s, x: F.pad(x, (0, 0, 0, 0, 1, 2))),
    "concat with zeros_like": (8, lambda s, x: torch.cat([x, torch.zeros_like(x)], 1)),
    "noise like x": (4, lambda s, x: x * torch.rand_like(x)),
    "drop path": (4, lambda s, x: x * x.new_empty(3, 1, 1, 1).bernoulli_(0.5)),
    "where, condition on the input": (4, lambda s, x: torch.where(torch.zeros(1, dtype=torch.bool), x, F.relu(x))),
    "where, zero elsewhere": (4, lambda s, x: torch.where(torch.eye(6, dtype=torch.bool), x, 0)),
    "masked_fill, with zero": (4, lambda s, x: x.masked_fill(torch.eye(6, dtype=torch.bool), 0.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", CARRIES)
def test_carries(name: str) -> None:
    into, middle = CARRIES[name]
    units, _ = factors_keep(two_convolutions(middle, into), images())
    kept = {"split": 3, "strided slice": 2}.get(name, 4)
    assert sum(size for group, size in free(units).items() if group.startswith("a")) in (kept, 4)
    read = {unit for unit in unit_vector(units, "b.weight", "columns") if unit >= 0}
    assert len(read) == kept
    assert pinned(units)["b"] == OUTPUT


# ---- what pins, and why ------------------------------------------------------------------------------------------

UNKNOWN = "enters the network ({}), which is not known to be homogeneous"
NORM = "enters the normalization {}_norm, which is not homogeneous"
PINS: dict[str, tuple[int, Callable[[Net, Tensor], Tensor], str]] = {
    "square": (4, lambda s, x: x * x, "multiplies a rescaled tensor in the network (mul)"),
    "add of a number": (4, lambda s, x: x + 1, UNKNOWN.format("add")),
    "add in place": (4, lambda s, x: x.add_(1), UNKNOWN.format("add")),
    "number minus x": (4, lambda s, x: 3 - x, UNKNOWN.format("sub")),
    "number over x": (4, lambda s, x: 1 / x, UNKNOWN.format("__rdiv__")),
    "constant over x": (4, lambda s, x: torch.ones(1) / x, "multiplies a rescaled tensor in the network (div)"),
    "floor division": (4, lambda s, x: torch.div(x, 2, rounding_mode="floor"), UNKNOWN.format("div")),
    "softmax": (4, lambda s, x: x.softmax(1), "enters the network (softmax), which is not homogeneous"),
    "padding with ones": (4, lambda s, x: F.pad(x, (1, 1, 1, 1), value=1.0), UNKNOWN.format("pad")),
    "pow": (4, lambda s, x: x.pow(2), UNKNOWN.format("pow")),
    "exp": (4, lambda s, x: x.exp(), UNKNOWN.format("exp")),
    "sign": (4, lambda s, x: x.sign(), UNKNOWN.format("sign")),
    "round": (4, lambda s, x: x.round(), UNKNOWN.format("round")),
    "norm": (4, lambda s, x: F.normalize(x), UNKNOWN.format("normalize")),
    "integers": (4, lambda s, x: x.int().double(), UNKNOWN.format("int")),
    "bit pattern": (4, lambda s, x: x.view(torch.int64).view(torch.float64), UNKNOWN.format("view")),
    "alpha dropout": (4, lambda s, x: F.alpha_dropout(x, 0.5, s.training), UNKNOWN.format("alpha_dropout")),
    "einsum": (4, lambda s, x: torch.einsum("nchw,cd->ndhw", x, torch.eye(4).double()), UNKNOWN.format("einsum")),
    "grid_sample": (
        4,
        lambda s, x: F.grid_sample(x, torch.zeros(3, 6, 6, 2).double(), align_corners=False),
        UNKNOWN.format("grid_sample"),
    ),
    "written by index": (4, lambda s, x: _write(x, 0.5), UNKNOWN.format("__setitem__")),
    "masked_fill, with one": (
        4,
        lambda s, x: x.masked_fill(torch.eye(6, dtype=torch.bool), 1.0),
        UNKNOWN.format("masked_fill"),
    ),
    "condition on numbers": (4, lambda s, x: torch.where(x > 0.3, x, -x), UNKNOWN.format("gt")),
    "an index that depends on numbers": (
        4,
        lambda s, x: x[:, torch.argsort(images(4).mean((0, 2, 3)).to(x.device))],
        UNKNOWN.format("getitem"),
    ),
    "an output as a slope": (4, lambda s, x: F.prelu(x, x.mean((0, 2, 3))), "is a slope in the network (prelu)"),
    "layer norm": (4, lambda s, x: F.layer_norm(x, (6, 6)), NORM.format("layer")),
    "group norm": (4, lambda s, x: F.group_norm(x, 2), NORM.format("group")),
    "instance norm": (
        4, lambda s, x: F.instance_norm(x), NORM.format("instance"),
    ),
}  # fmt: skip


def _write(x: Tensor, value: float) -> Tensor:
    x[:, :2] = value
    return x


@pytest.mark.parametrize("name", PINS)
def test_pins_with_a_reason(name: str) -> None:
    into, middle, reason = PINS[name]
    units, _ = factors_keep(two_convolutions(middle, into), images())
    assert pinned(units) == {"a": reason, "b": OUTPUT}


def test_what_ties_channels_leaves_one_factor() -> None:
    for middle in (
        lambda s, x: x + x.sum(1, keepdim=True),
        lambda s, x: x - x.amax(1, keepdim=True),
        lambda s, x: x.max(1, keepdim=True).values.expand(-1, 4, -1, -1),
        lambda s, x: F.pixel_shuffle(x, 2).repeat(1, 4, 1, 1),
    ):
        units, _ = factors_keep(two_convolutions(middle), images())
        assert free(units) == {"a": 1}


def test_maximum_by_keyword() -> None:
    net = two_convolutions(lambda s, x: torch.max(x, other=s.c(x)), c=nn.Conv2d(4, 4, 1))
    units, _ = factors_keep(net, images())
    assert free(units) == {"a": 4}


def test_mean_with_axis_as_numpy_calls_it() -> None:
    net = randomise(Net(lambda s, x: s.l(s.a(x).mean(axis=(2, 3))), a=nn.Conv2d(3, 4, 1), l=nn.Linear(4, 2)))
    units, _ = factors_keep(net, images())
    assert free(units) == {"a": 4}


# ---- zeros, views and changes in place ---------------------------------------------------------------------------


def _zeros_overwritten_through(change: Callable[[Tensor, Tensor], Any]) -> Net:
    def forward(s: Net, x: Tensor) -> Tensor:
        zeros = torch.zeros_like(s.a(x))
        view = zeros[:, :]
        change(zeros, x)
        return s.b(F.relu(s.a(x)) + view)

    return randomise(Net(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1)))


@pytest.mark.parametrize(
    "change",
    [
        lambda zeros, x: zeros.copy_(x[:, :1].expand(-1, 4, -1, -1)),
        lambda zeros, x: zeros.add_(1.0),
        lambda zeros, x: zeros.view(-1).add_(1.0),
        lambda zeros, x: zeros.__setitem__((slice(None), 0), x[:, 0]),
        lambda zeros, x: F.hardsigmoid(zeros, inplace=True),
        lambda zeros, x: zeros.data.fill_(2.0),
    ],
    ids=["copy_", "add_", "view", "setitem", "hardsigmoid", "data"],
)  # fmt: skip
def test_a_view_of_zeros_that_were_overwritten_is_no_zero(change: Callable[[Tensor, Tensor], Any]) -> None:
    units, _ = factors_keep(_zeros_overwritten_through(change), images())
    assert pinned(units)["a"] == "meets a tensor that is not rescaled in the network (add)"


def test_in_place_add_to_a_view() -> None:
    def middle(s: Net, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, :2].add_(y[:, 2:].clone())
        return y

    units, _ = factors_keep(two_convolutions(middle), images())
    assert free(units) == {"a": 2}


def test_in_place_product_with_a_view() -> None:
    def middle(s: Net, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, :2].mul_(y[:, 2:].clone())
        return y

    units, _ = factors_keep(two_convolutions(middle), images())
    assert free(units) == {"a": 2}
    assert pinned(units)["a#2"] == "multiplies a rescaled tensor in the network (mul)"


def test_in_place_residual() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        x = s.a(x)
        y = s.b(F.relu(x))
        y += x
        return s.c(y.relu_())

    net = randomise(Net(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 1), c=nn.Conv2d(4, 2, 1)))
    units, _ = factors_keep(net, images())
    assert [(g.size, g.residual, g.producers) for g in units.groups if g.pinned_by is None] == [(4, True, ("a", "b"))]


# ---- layers ------------------------------------------------------------------------------------------------------


def test_flatten_gives_a_channel_all_its_columns() -> None:
    net = randomise(Net(lambda s, x: s.l(torch.flatten(F.relu(s.a(x)), 1)), a=nn.Conv2d(3, 4, 1), l=nn.Linear(144, 2)))
    units, _ = factors_keep(net, images())
    assert unit_vector(units, "l.weight", "columns") == [k for k in range(4) for _ in range(36)]
    c = pathconvert.reparameterize(net, images(), pivot="diagonal")
    assert [(p.row, p.column) for p in c.groups[0].pivots] == [(0, 18), (1, 54), (0, 90), (1, 126)]


@pytest.mark.parametrize("groups", [1, 2, 4], ids=["dense", "grouped", "depthwise"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_consumers(groups: int, dims: int, transposed: bool) -> None:
    names = ("ConvTranspose" if transposed else "Conv") + f"{dims}d"
    layer = getattr(nn, names)
    net = Net(
        lambda s, x: s.c(F.relu(s.b(F.relu(s.a(x))))), a=layer(2, 4, 3), b=layer(4, 8, 3, groups=groups, padding=1),
        c=layer(8, 2, 1),
    )  # fmt: skip
    x = images(2, dims=dims)
    units, _ = factors_keep(randomise(net), x)
    assert free(units) == {"a": 4, "b": 8}
    for pivot in ("matching", "max", "diagonal"):
        c = pathconvert.reparameterize(net, x, pivot=pivot)
        assert_same(net, c.model, x)
        for channel, chosen in enumerate(c.groups[0].pivots):
            assert chosen.row // (8 // groups) == channel // (4 // groups), "the pivot lies in the channel's own block"


def test_one_channel_convolution_is_dense_although_groups_equals_channels() -> None:
    net = randomise(
        Net(lambda s, x: s.c(s.b(s.a(x))), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 1, 1), c=nn.Conv2d(1, 1, 1))
    )
    assert net.c.groups == net.c.out_channels == 1
    units, _ = factors_keep(net, images())
    assert free(units) == {"a": 4, "b": 1}


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_modes_and_dilation(mode: str) -> None:
    net = two_convolutions(lambda s, x: F.relu(x), b=nn.Conv2d(4, 5, 3, padding=2, dilation=2, padding_mode=mode))
    units, _ = factors_keep(net, images())
    assert free(units) == {"a": 4}


def test_module_called_on_siblings() -> None:
    net = two_convolutions(lambda s, x: torch.cat([s.c(F.relu(x)), s.c(F.leaky_relu(x))], 1), 6, c=nn.Conv2d(4, 3, 1))
    units, _ = factors_keep(net, images())
    assert free(units) == {"a": 4, "c": 3}
    assert unit_vector(units, "b.weight", "columns") == [4, 5, 6, 4, 5, 6]


def test_module_called_on_its_own_output() -> None:
    net = two_convolutions(lambda s, x: F.relu(s.c(F.relu(s.c(x)))), c=nn.Conv2d(4, 4, 1))
    units, _ = factors_keep(net, images())
    assert free(units) == {"a": 4}


def test_shared_weight_under_two_names() -> None:
    net = two_convolutions(lambda s, x: F.relu(s.d(F.relu(s.c(x)))), c=nn.Conv2d(4, 4, 1), d=nn.Conv2d(4, 4, 1))
    net.d.weight = net.c.weight
    units, _ = factors_keep(net, images())
    assert free(units) == {"a": 4}


def test_tied_autoencoder_is_pinned() -> None:
    w = nn.Parameter(torch.zeros(4, 6))
    net = randomise(Net(lambda s, x: F.linear(F.relu(F.linear(s.a(x), s.w)), s.w.t()), a=nn.Linear(3, 6), w=w))
    units, _ = factors_keep(net, torch.randn(3, 3, dtype=torch.float64))
    assert free(units) == {}
    assert pinned(units)["a"] == "meets a second use of w in another role"


def test_a_parameter_in_two_roles_is_pinned() -> None:
    p = nn.Parameter(torch.zeros(4))
    net = two_convolutions(
        lambda s, x: F.relu(F.conv2d(x, s.w, s.p)) * s.p.view(-1, 1, 1), p=p, w=nn.Parameter(torch.zeros(4, 4, 1, 1))
    )
    units, _ = factors_keep(net, images())
    assert "p" not in free(units)
    assert free(units)["a"] == 4


def test_a_slope_that_is_another_layers_parameter_is_pinned() -> None:
    net = two_convolutions(lambda s, x: F.prelu(s.n(x), s.n.weight), n=nn.BatchNorm2d(4))
    units, _ = factors_keep(net, images())
    assert pinned(units)["n"] == "meets a tensor that is not rescaled in a second use of n.weight"


def test_prelu_module_is_free() -> None:
    for width in (1, 4):
        units, traced = factors_keep(two_convolutions(lambda s, x: s.p(x), p=nn.PReLU(width)), images())
        assert free(units) == {"a": 4}
        assert traced.left_alone == {}


def test_weight_and_spectral_norm_are_pinned_and_stay_right() -> None:
    for wrap in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        net = two_convolutions(lambda s, x: F.relu(s.c(F.relu(x))), c=wrap(nn.Conv2d(4, 4, 1)).double())
        units, _ = factors_keep(net, images(), training=wrap is nn.utils.parametrizations.weight_norm)
        assert pinned(units)["a"] == "enters c (conv2d), which is not known to be homogeneous"
        assert free(units) == {}


def test_weights_that_hooks_compute_are_pinned_and_copied() -> None:
    def pruned(layer: nn.Module) -> nn.Module:
        return prune.l1_unstructured(layer, "weight", 0.5)

    for wrap in (pruned, torch.nn.utils.weight_norm):  # both keep a computed tensor, which deepcopy cannot copy
        net = two_convolutions(lambda s, x: F.relu(s.c(F.relu(x))), c=wrap(nn.Conv2d(4, 4, 1)).double())
        before = net.c.weight
        c = pathconvert.reparameterize(net, images())
        assert net.c.weight is before
        assert c.groups[0].pinned_by == "enters c (conv2d), which is not known to be homogeneous"
        with torch.no_grad():
            assert torch.equal(net(images()), c.model(images()))
        assert pathconvert.verify(net, c.model, images()).passed


def test_convolution_bias_and_none() -> None:
    for bias in (True, False):
        units, _ = factors_keep(two_convolutions(lambda s, x: F.relu(x), b=nn.Conv2d(4, 5, 1, bias=bias)), images())
        assert free(units) == {"a": 4}


def test_a_bias_that_is_broadcast_and_a_weight_vector() -> None:
    net = randomise(
        Net(lambda s, x: F.linear(F.linear(s.a(x), s.w, s.b), s.v), a=nn.Linear(3, 4),
            w=nn.Parameter(torch.zeros(4, 4)), b=nn.Parameter(torch.zeros(1)), v=nn.Parameter(torch.zeros(4)))
    )  # fmt: skip
    units, _ = factors_keep(net, torch.randn(3, 3, dtype=torch.float64))
    assert free(units) == {}


# ---- normalization -----------------------------------------------------------------------------------------------


def test_batch_norm_produces_the_units_and_the_convolution_keeps_its_weights() -> None:
    net = two_convolutions(lambda s, x: F.relu(s.n(x)), n=nn.BatchNorm2d(4))
    units, _ = factors_keep(net, images())
    assert free(units) == {"n": 4}
    assert unit_vector(units, "a.weight", "rows") == [-1] * 4
    c = pathconvert.reparameterize(net, images())
    assert torch.equal(c.model.a.weight, net.a.weight)
    assert torch.equal(c.model.n.running_var, net.n.running_var)


def test_batch_norm_on_a_concatenation_pins_what_comes_in_and_makes_new_units() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        first = s.a(x)
        second = s.b(F.relu(s.m(first)))
        return s.c(F.relu(s.n(torch.cat([first, second], 1))))

    net = Net(
        forward,
        a=nn.Conv2d(3, 4, 1),
        b=nn.Conv2d(4, 2, 1),
        c=nn.Conv2d(6, 2, 1),
        m=nn.BatchNorm2d(4),
        n=nn.BatchNorm2d(6),
    )
    units, _ = factors_keep(randomise(net), images())
    assert free(units) == {"m": 4, "n": 6}
    # only BatchNorms read a and b, so a factor would have no effect
    assert unit_vector(units, "a.weight", "rows") == [-1] * 4


def test_a_convolution_read_by_batch_norm_and_another_is_pinned() -> None:
    net = two_convolutions(lambda s, x: torch.cat([s.n(x), F.relu(x)], 1), 8, n=nn.BatchNorm2d(4))
    units, _ = factors_keep(net, images())
    assert free(units) == {"n": 4}
    assert pinned(units)["a"] == "enters the BatchNorm n, which normalises any factor away"


def test_shared_batch_norm_on_two_convolutions() -> None:
    net = two_convolutions(lambda s, x: torch.cat([F.relu(s.n(s.c(x))), F.relu(s.n(s.d(x)))], 1), 8,
                           n=nn.BatchNorm2d(4), c=nn.Conv2d(4, 4, 1), d=nn.Conv2d(4, 4, 1))  # fmt: skip
    units, _ = factors_keep(net, images())
    assert free(units) == {"a": 4, "n": 4}


def test_batch_norm_without_affine_is_pinned() -> None:
    net = two_convolutions(lambda s, x: s.c(F.relu(s.n(x))), c=nn.Conv2d(4, 4, 1), n=nn.BatchNorm2d(4, affine=False))
    units, _ = factors_keep(net, images())
    assert free(units) == {"c": 4}
    assert unit_vector(units, "c.weight", "columns") == [-1] * 4


def test_gamma_tiny_negative_zero() -> None:
    net = two_convolutions(
        lambda s, x: s.m(s.c(F.relu(s.n(x)))), n=nn.BatchNorm2d(4), c=nn.Conv2d(4, 4, 1), m=nn.BatchNorm2d(4)
    )
    net.n.weight.data = torch.tensor([1e-6, -1e-6, 0.0, -2.0], dtype=torch.float64)
    net.m.weight.data = torch.tensor([0.0, 0.0, -1e-7, 3.0], dtype=torch.float64)
    for scope in ("block", "network"):
        for pivot in ("matching", "max", "diagonal"):
            for gauge in ("unit", "pow2"):
                c = pathconvert.reparameterize(net, images(), scope=scope, pivot=pivot, gauge=gauge)
                assert_same(net, c.model, images())
                assert_same(net, c.model, images(), training=True)
    diagonal = pathconvert.reparameterize(net, images(), pivot="diagonal")
    n = next(group for group in diagonal.groups if group.name == "n")
    assert n.pivots[:2] == (None, None), "the pivot's effective weight has γ = 0"
    assert n.scales[:2].tolist() == [1, 1]
    assert [p.parameter for p in n.pivots[2:]] == ["c.weight", "c.weight"]


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.LayerNorm([4, 6, 6])])
def test_other_normalizations_produce_units(norm: nn.Module) -> None:
    units, _ = factors_keep(two_convolutions(lambda s, x: F.relu(s.n(x)), n=copy.deepcopy(norm)), images())
    assert pinned(units)["a"] == "enters the normalization n, which is not homogeneous"
    assert free(units) == {"n": 4}


# ---- residual streams, gates, products ---------------------------------------------------------------------------


def _residual() -> Net:
    def forward(s: Net, x: Tensor) -> Tensor:
        x = F.relu(s.n0(s.stem(x)))
        for conv, norm, other, last in ((s.c1, s.n1, s.c2, s.n2), (s.c3, s.n3, s.c4, s.n4)):
            x = F.relu(last(other(F.relu(norm(conv(x))))) + x)
        return s.head(x.mean((2, 3)))

    layers: dict[str, nn.Module] = {f"n{i}": nn.BatchNorm2d(4 + 2 * (i % 2)) for i in range(5)}
    for i in (1, 3):
        layers |= {f"c{i}": nn.Conv2d(4, 6, 3, padding=1), f"c{i + 1}": nn.Conv2d(6, 4, 3, padding=1)}
    return randomise(Net(forward, stem=nn.Conv2d(3, 4, 3), head=nn.Linear(4, 2), **layers))


def test_residual_stream_in_both_scopes() -> None:
    net = _residual()
    units, _ = factors_keep(net, images())
    assert free(units) == {"n0": 4, "n1": 6, "n3": 6}
    block = pathconvert.reparameterize(net, images())
    assert {g.name: g.pinned_by for g in block.groups} == {"n0": RESIDUAL, "n1": None, "n3": None, "head": OUTPUT}
    network = pathconvert.reparameterize(net, images(), scope="network")
    stream = network.groups[0]
    assert stream.producers == ("n0", "n2", "n4")
    assert stream.pinned_by is None
    assert {p.parameter for p in stream.pivots} == {"head.weight"}, "the pivot lies outside of the stream"
    assert_same(net, network.model, images())
    assert_same(net, network.model, images(), training=True)


def test_option_a_shortcut() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        x = F.relu(s.a(x))
        return s.c(F.relu(s.b(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2))))

    net = Net(forward, a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 6, 3, 2, 1), c=nn.Conv2d(6, 2, 1))
    units, _ = factors_keep(randomise(net), images())
    assert [(g.producers, g.size, g.residual) for g in units.groups if g.pinned_by is None] == [
        (("a", "b"), 3, True), (("b",), 3, False),
    ]  # fmt: skip


def test_option_a_shortcut_of_the_input_pins_its_own_channels_alone() -> None:
    net = two_convolutions(lambda s, x: s.c(x), c=nn.Conv2d(4, 4, 1))
    net._forward = lambda s, x: s.b(s.a(x) + F.pad(x, (0, 0, 0, 0, 0, 1)))
    units, _ = factors_keep(net, images())
    assert free(units) == {"a#2": 1}
    assert pinned(units)["a"] == "meets a tensor that is not rescaled in the network (add)"


@pytest.mark.parametrize("gate", [torch.sigmoid, F.hardsigmoid])
def test_squeeze_excitation(gate: Any) -> None:
    def middle(s: Net, x: Tensor) -> Tensor:
        return x * gate(s.e(F.relu(s.s(x.mean((2, 3), keepdim=True)))))

    units, traced = factors_keep(two_convolutions(middle, s=nn.Conv2d(4, 2, 1), e=nn.Conv2d(2, 4, 1)), images())
    assert free(units) == {"a": 4, "s": 2}
    assert pinned(units)["e"] == f"enters the network ({gate.__name__}), which is not homogeneous"
    assert traced.trace.offenders == []


def test_product_of_two_free_streams_pins_exactly_one() -> None:
    units, _ = factors_keep(two_convolutions(lambda s, x: x * s.c(x), c=nn.Conv2d(4, 4, 1)), images())
    assert free(units) == {"a": 4}
    assert pinned(units)["c"] == "multiplies a rescaled tensor in the network (mul)"


def test_transform_input() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        x = torch.cat([x[:, i : i + 1] * (0.3 + i) + 0.1 * i for i in range(3)], 1)
        return s.b(F.relu(s.a(x)))

    net = randomise(Net(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1)))
    assert free(factors_keep(net, images())[0]) == {"a": 4}


# ---- inputs, outputs, calls --------------------------------------------------------------------------------------


@dataclass
class Both:
    features: Tensor
    logits: Tensor


class OwnDict(dict):
    """A dict class as libraries define it; torch's pytree does not look inside."""


@pytest.mark.parametrize("pack", [
    lambda f, y: (f, [y, None]), lambda f, y: {"f": f, "y": (y, 3)}, Both, lambda f, y: OwnDict(f=f, y=y),
    lambda f, y: {f, y},
], ids=["tuple", "dict", "dataclass", "dict subclass", "set"])  # fmt: skip
def test_every_output_is_pinned(pack: Any) -> None:
    def forward(s: Net, x: Tensor) -> Any:
        features = F.relu(s.a(x))
        return pack(features, s.b(features))

    net = randomise(Net(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1)))
    units = find_units(trace_network(net, images()).trace)
    assert pinned(units) == {"a": OUTPUT, "b": OUTPUT}


def test_auxiliary_head_in_training_mode_alone() -> None:
    def forward(s: Net, x: Tensor) -> Any:
        x = F.relu(s.a(x))
        return (s.b(x), s.aux(x), x[:, :1]) if s.training else s.b(x)

    net = randomise(Net(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1), aux=nn.Conv2d(4, 2, 1)))
    units, traced = factors_keep(net, images())
    assert free(units) == {"a#2": 3}, "channel 0 is an output in training mode"
    assert pinned(units)["aux"] == OUTPUT
    assert traced.left_alone == {}


def test_several_inputs_and_keyword_calls() -> None:
    net = randomise(
        Net(lambda s, x, y: s.b(input=F.relu(input=s.a(input=x))) + y, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 3, 1))
    )
    assert free(factors_keep(net, (images(), images()))[0]) == {"a": 4}


def test_parameters_that_are_never_used_are_reported() -> None:
    net = two_convolutions(lambda s, x: F.relu(x), unused=nn.Conv2d(1, 1, 1, bias=False))
    assert pathconvert.reparameterize(net, images()).left_alone == {"unused.weight": "never used by the forward"}


def test_cached_tensors_survive_the_trace() -> None:
    def middle(s: Net, x: Tensor) -> Tensor:
        s.cache = torch.arange(6, device=x.device, dtype=x.dtype)
        s.seen.append(x)
        s.ema = 0.9 * s.ema + 0.1 * x.mean()
        return x * s.cache

    net = two_convolutions(middle, ema=torch.zeros(1).double())
    net.cache, net.seen = None, []
    pathconvert.reparameterize(net, images())
    assert net.cache is None
    assert net.seen == []
    assert net.ema.device.type == "cpu"
    assert float(net.ema) == 0


# ---- what cannot be followed -------------------------------------------------------------------------------------


def test_control_flow_on_numbers_takes_the_network_apart() -> None:
    part = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    net = randomise(Net(lambda s, x: s.part(x) if x.sum() > 0 else s.part(-x), part=part))
    c = pathconvert.reparameterize(net, images())
    assert c.parts == ("part",)
    assert {g.name: g.pinned_by for g in c.groups} == {
        "part.0": None, "part.2": "is an output of part, which is converted by itself",
    }  # fmt: skip
    assert_same(net, c.model, images())
    bare = Net(lambda s, x: F.conv2d(x, s.w) * float(x.max()), w=nn.Parameter(torch.zeros(2, 3, 1, 1)))
    with pytest.raises(TraceError, match=r"^the forward of the network cannot be followed on shapes alone: ") as error:
        pathconvert.reparameterize(bare, images())
    assert "item() cannot be called on meta tensors" in str(error.value)


def test_a_network_taken_apart_keeps_its_buffers() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        s.calls += 1
        return s.part(x) * float(x.max())

    part = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    net = randomise(Net(forward, part=part, calls=torch.zeros(1)))
    assert pathconvert.reparameterize(net, images()).parts == ("part",)
    assert float(net.calls) == 0


def test_scripted_child_is_never_silently_wrong() -> None:
    class Squash(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x)

    net = two_convolutions(lambda s, x: s.t(F.relu(x)), t=torch.jit.script(Squash()))
    c = pathconvert.reparameterize(net, images())
    assert c.groups[0].pinned_by == "enters t (tanh.default), which is not known to be homogeneous"
    assert all(group.pinned_by for group in c.groups)
    assert_same(net, c.model, images())


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ReLU6", "Hardswish", "SiLU", "GELU", "Tanh", "ELU"])
def test_refused_activations(kind: str) -> None:
    body = nn.Sequential(nn.Conv2d(3, 4, 1), getattr(nn, kind)(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    net = randomise(Net(lambda s, x: s.body(x), body=body))
    with pytest.raises(RefusedNetwork) as error:
        pathconvert.reparameterize(net, images())
    assert str(error.value) == (
        f"body.1 is {kind}, which is not positively homogeneous: Net cannot be moved to path space as a whole"
    )
    assert error.value.tip == "--partial (partial=True) pins what enters such an activation and converts the rest"
    c = pathconvert.reparameterize(net, images(), partial=True)
    assert {g.name: g.pinned_by for g in c.groups} == {
        "body.0": f"enters body.1 ({kind}), which is not homogeneous", "body.2": None, "body.4": OUTPUT,
    }  # fmt: skip
    assert not np.allclose(c.groups[1].scales, 1)
    assert_same(net, c.model, images())


@pytest.mark.parametrize("call", [lambda x: F.relu6(x), lambda x: x.clamp(0, 6), lambda x: x.clip(0, 6), torch.tanh])
def test_refused_functions(call: Any) -> None:
    with pytest.raises(RefusedNetwork, match=r"^the network is .*, which is not positively homogeneous: Net cannot"):
        pathconvert.reparameterize(two_convolutions(lambda s, x: call(x)), images())


# ---- pivots and factors ------------------------------------------------------------------------------------------


def test_matching_takes_no_row_twice_while_rows_are_free() -> None:
    for width in (3, 5, 9):
        net = randomise(Net(lambda s, x: s.b(F.relu(s.a(x))), a=nn.Conv2d(3, width, 1), b=nn.Conv2d(width, 5, 1)))
        rows = [p.row for p in pathconvert.reparameterize(net, images(), pivot="matching").groups[0].pivots]
        counts = np.bincount(rows, minlength=5)
        assert counts.max() <= -(-width // 5), f"width {width}: rows {rows}"


def test_matching_maximises_the_product() -> None:
    net = randomise(Net(lambda s, x: s.b(F.relu(s.a(x))), a=nn.Linear(2, 2), b=nn.Linear(2, 2)))
    net.b.weight.data = torch.tensor([[10.0, 9.0], [8.0, 1.0]], dtype=torch.float64)
    rows = [p.row for p in pathconvert.reparameterize(net, torch.zeros(1, 2).double()).groups[0].pivots]
    assert rows == [1, 0], "8 · 9 > 10 · 1"


def test_wide_layers_fall_back_to_max_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    net = two_convolutions(lambda s, x: F.relu(x))
    assert pathconvert.reparameterize(net, images()).pivot_fallbacks == ()
    monkeypatch.setattr(pivots_module, "WIDEST_MATCHING", 19)
    c = pathconvert.reparameterize(net, images())
    assert c.pivot_fallbacks == ("b.weight",)
    assert c.groups[0].pivots == pathconvert.reparameterize(net, images(), pivot="max").groups[0].pivots


def test_dead_channels_are_left_alone() -> None:
    net = two_convolutions(lambda s, x: F.relu(x))
    net.b.weight.data[:, 1] = 0  # nothing leaves channel 1
    net.a.weight.data[2] = 0  # nothing enters channel 2
    net.a.bias.data[2] = 0
    for pivot in ("matching", "max", "diagonal"):
        c = pathconvert.reparameterize(net, images(), pivot=pivot)
        assert c.groups[0].pivots[1] is None
        assert c.groups[0].scales[1] == 1
        assert c.groups[0].pivots[2] is not None
        assert c.counts()["channels_dead"] == 1
        assert_same(net, c.model, images())


def test_an_exactly_zero_diagonal_pivot_is_left_alone() -> None:
    net = two_convolutions(lambda s, x: F.relu(x))
    net.b.weight.data[2, 2, 1, 1] = 0
    group = pathconvert.reparameterize(net, images(), pivot="diagonal").groups[0]
    assert [pivot is None for pivot in group.pivots] == [False, False, True, False]
    assert group.scales[2] == 1


def test_pivot_signs_are_kept() -> None:
    net = two_convolutions(lambda s, x: F.relu(x))
    c = pathconvert.reparameterize(net, images(), pivot="diagonal")
    diagonal = [float(net.b.weight.detach()[k, k, 1, 1]) for k in range(4)]
    assert [p.sign for p in c.groups[0].pivots] == np.sign(diagonal).tolist()
    assert [float(c.model.b.weight.detach()[k, k, 1, 1]) for k in range(4)] == pytest.approx(
        np.sign(diagonal).tolist(), rel=1e-12
    )
    assert (c.groups[0].scales > 0).all()


# ---- dtypes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gauge", ["unit", "pow2"])
def test_dtypes_are_kept(dtype: torch.dtype, gauge: Any) -> None:
    net, x = _residual().to(dtype), images().to(dtype)
    c = pathconvert.reparameterize(net, x, scope="network", gauge=gauge)
    assert {p.dtype for p in c.model.parameters()} == {dtype}
    report = pathconvert.verify(net, c.model, x)
    assert report.passed
    restored = pathconvert.restore(c.model, c.record).state_dict()
    if gauge == "pow2":
        assert report.bit_identical
        assert all(torch.equal(tensor, restored[name]) for name, tensor in net.state_dict().items())
    for name, tensor in net.named_parameters():
        rounding = 2 * torch.finfo(dtype).eps * tensor.double().abs()
        assert bool(((restored[name].double() - tensor.double()).abs() <= rounding).all()), name


@pytest.mark.parametrize("weight", [2e-7, 3e4], ids=["subnormal", "huge"])
@pytest.mark.parametrize("gauge", ["unit", "pow2"])
def test_a_factor_that_would_leave_float16_is_held_back(weight: float, gauge: Any) -> None:
    net = two_convolutions(lambda s, x: F.relu(x)).half()
    net.b.weight.data[:, 1] = weight
    net.b.weight.data[0, 1, 0, 0] = 1e-3  # no single factor suits both this weight and the others
    net.a.weight.data[1] = 1e-4
    c = pathconvert.reparameterize(net, images().half(), gauge=gauge)
    group = c.groups[0]
    assert group.held_back.tolist() == [False, True, False, False]
    assert group.scales[1] == 1
    assert group.pivots[1] is None
    assert c.counts()["channels_held_back"] == 1
    assert c.counts()["channels_rescaled"] == 3
    assert all(bool(torch.isfinite(p).all()) for p in c.model.parameters())
    restored = pathconvert.restore(c.model, c.record)
    if gauge == "pow2":
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), restored.parameters(), strict=True))


def test_training_mode_requires_grad_and_buffers_are_kept() -> None:
    net = two_convolutions(lambda s, x: F.relu(s.n(x)) + s.shift, n=nn.BatchNorm2d(4), shift=torch.zeros(1).double())
    net.train()
    net.n.eval()
    net.a.weight.requires_grad_(False)
    c = pathconvert.reparameterize(net, images())
    for name, module in net.named_modules():
        assert c.model.get_submodule(name).training == module.training == (name != "n")
    grads = {name: p.requires_grad for name, p in c.model.named_parameters()}
    assert grads == {name: p.requires_grad for name, p in net.named_parameters()}
    assert [name for name, wanted in grads.items() if not wanted] == ["a.weight"]
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in c.model.parameters()}
    assert list(dict(c.model.named_buffers())) == list(dict(net.named_buffers()))


# ---- verify and record -------------------------------------------------------------------------------------------


def test_verify() -> None:
    net = two_convolutions(lambda s, x: F.relu(x)).float()
    x = images().float()
    same = pathconvert.verify(net, copy.deepcopy(net), x)
    assert (same.bit_identical, same.max_abs, same.passed) == (True, 0.0, True)
    changed = copy.deepcopy(net)
    changed.a.weight.data[0, 0] *= 1.001
    report = pathconvert.verify(net, changed, x)
    assert report.noise_ratio > 4
    assert not report.passed
    assert not report.bit_identical
    broken = copy.deepcopy(net)
    broken.b.bias.data[0] = float("nan")
    assert not pathconvert.verify(net, broken, x).passed
    other = Net(net._forward, a=net.a, b=nn.Conv2d(4, 3, 1))
    with pytest.raises(EquivalenceError) as error:
        pathconvert.verify(net, other, x)
    assert str(error.value) == "the outputs differ in shape: [(3, 5, 6, 6)] and [(3, 3, 6, 6)]"


def test_record_refusals() -> None:
    net = two_convolutions(lambda s, x: F.relu(x))
    c = pathconvert.reparameterize(net, images())

    def refusal(record: dict[str, Any], model: nn.Module | None = None) -> str:
        with pytest.raises(RecordError) as error:
            pathconvert.restore(model or c.model, record)
        return str(error.value)

    version = pathconvert.__version__
    assert refusal(c.record | {"format_version": 99}) == (
        f"the conversion record has format version 99; this is pathconvert {version}, which reads version 1"
    )
    assert refusal({k: v for k, v in c.record.items() if k != "scales"}) == (
        "the conversion record is damaged: KeyError: 'scales'"
    )
    assert (
        refusal(c.record | {"scales": [-1.0]}) == "the conversion record is damaged: a factor is not a positive number"
    )
    assert (
        refusal(c.record | {"scales": [1.0]})
        == "the conversion record is damaged: the entry of a.weight names a channel that does not exist"
    )
    wider = randomise(Net(net._forward, a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 5, 3)))
    assert refusal(c.record, wider) == "the conversion record does not fit the tensor a.weight of shape [6, 3, 3, 3]"
    renamed = Net(net._forward, b=net.b)
    message = "the conversion record belongs to another network: this one has no tensor a.weight"
    assert refusal(c.record, renamed) == message
