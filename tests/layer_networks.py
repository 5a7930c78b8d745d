"""Small networks made of layers and a forward, and what the tests of a conversion ask of them.

``factors_keep`` scales every free unit by a random factor and compares outputs, in evaluation and
in training mode: the sharpest test of a trace, since no two channels have the same factor by
accident.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathconvert.conversion.groups import Units, find_units
from pathconvert.conversion.rescale import rescale
from pathconvert.conversion.tracing.parts import Traced, trace_network

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


def assert_same(
    model: nn.Module, other: nn.Module, x: Any, training: bool = False, tolerance: float = 1e-10
) -> None:
    a, b = run(model, x, training), run(other, x, training)
    assert a
    assert len(a) == len(b)
    for i, (p, q) in enumerate(zip(a, b, strict=True)):
        error = float(
            (p.double() - q.double()).abs().max() / p.double().abs().max().clamp(min=1e-200)
        )
        assert error < tolerance, f"output {i}, training={training}: off by {error:.1e}"


def factors_keep(model: nn.Module, x: Any, training: bool = True) -> tuple[Units, Traced]:
    """Check that random factors on all free units change no output; returns the units.

    A BatchNorm that carries factors in its statistics is exact in evaluation mode only
    (``tests/conversion/test_carrying.py`` says how close training mode is).
    """
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
    if training and not carries(units):
        assert_same(model, scaled, x, training=True, tolerance=1e-8)
    return units, traced


def carries(units: Units) -> bool:
    """Whether a BatchNorm carries factors in its running statistics."""
    return any(slot.statistic for slot in units.slots)


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


def residual_network() -> Net:
    def forward(s: Net, x: Tensor) -> Tensor:
        x = F.relu(s.n0(s.stem(x)))
        for conv, norm, other, last in ((s.c1, s.n1, s.c2, s.n2), (s.c3, s.n3, s.c4, s.n4)):
            x = F.relu(last(other(F.relu(norm(conv(x))))) + x)
        return s.head(x.mean((2, 3)))

    layers: dict[str, nn.Module] = {f"n{i}": nn.BatchNorm2d(4 + 2 * (i % 2)) for i in range(5)}
    for i in (1, 3):
        layers |= {
            f"c{i}": nn.Conv2d(4, 6, 3, padding=1),
            f"c{i + 1}": nn.Conv2d(6, 4, 3, padding=1),
        }
    return randomise(Net(forward, stem=nn.Conv2d(3, 4, 3), head=nn.Linear(4, 2), **layers))
