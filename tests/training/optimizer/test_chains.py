"""Chains on torchvision networks: every parameter once, structure by rescaling, and the step
through autograd.

No description of a network is needed. *Structure*: with a random factor for all units of every
chain the function must stay, the pivots inside chains must stay, and every chain's value must
change by its factor: so the units, the weights that leave them, the starts and their parents are
what PSI says. *Step*: weights are computed from coordinates as ``update.py`` defines them, autograd
and plain SGD do the rest.
"""

from __future__ import annotations

import copy

import pytest
import torch
from sample_networks import network
from torch import Tensor, nn
from torch.func import functional_call

import pathconvert
from pathconvert.choices import Start
from pathconvert.conversion.rescale import rescale
from pathconvert.training import GSGD, path_parameter_groups
from pathconvert.training.optimizer.chains import Chains
from pathconvert.training.optimizer.finder import find_chains

SIZES = {"alexnet": 63, "googlenet": 32, "squeezenet1_1": 32}

#: In the suite: concatenated; grouped, gated and residual; shuffled and depthwise; others take
#: minutes.
NETWORKS = ("squeezenet1_1", "regnet_y_400mf", "shufflenet_v2_x1_0")


def converted(name: str, scope: str, gauge: str, path_bn: bool):
    model = network(name, torch.float64)
    for module in model.modules():
        # living channels: dead ones hold no pivot
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.weight.data[:2] = torch.tensor([0.7, -0.9])
    x = torch.randn(
        2,
        3,
        *2 * [SIZES.get(name, 32)],
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(0),
    )
    conversion = pathconvert.reparameterize(model, x, pivot="max", scope=scope, gauge=gauge)
    trained = conversion.model
    if path_bn:
        trained = pathconvert.to_path_bn(conversion, x, x, 0.5)
    return conversion, trained.eval(), x


def chain_of_units(chains: Chains, units: int) -> Tensor:
    """The chain of every unit, [units + 1]; asserts that all consumers of a unit agree."""
    found = torch.full((units + 1,), -1)
    for tensor in chains.tensors.values():
        chain, unit = (
            t.flatten() for t in torch.broadcast_tensors(tensor.chain, tensor.column_unit)
        )
        assert ((found[unit] == -1) | (found[unit] == chain)).all()
        found[unit] = chain
    return found.where(found >= 0, chains.count)


def values(chains: Chains, params: dict[str, Tensor]) -> Tensor:
    """The value d of every chain."""
    own = zip(chains.parameter, chains.element, chains.scale, strict=True)
    starts = [params[name].detach().flatten()[element] * scale for name, element, scale in own]

    def value(chain: int) -> Tensor:
        parent = int(chains.parent[chain])
        return starts[chain] * (value(parent) if parent < chains.count else 1.0)

    return torch.stack([value(chain) for chain in range(chains.count)])


@pytest.mark.parametrize("start", ["bn", "weight"])
@pytest.mark.parametrize(("scope", "gauge"), [("block", "unit"), ("network", "pow2")])
@pytest.mark.parametrize("name", NETWORKS)
def test_rescaled_chains_keep_the_function_and_the_pivots(
    name: str, scope: str, gauge: str, start: Start
) -> None:
    conversion, model, x = converted(name, scope, gauge, path_bn=False)
    if start == "weight" and any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        pytest.skip("a weight before a BatchNorm, the papers' start, is not what PSI scales")
    chains = find_chains(model, start)
    units = len(conversion.scales)
    chain = chain_of_units(chains, units)
    assert int((chain[:-1] < chains.count).sum()) == chains.units
    generator = torch.Generator().manual_seed(1)
    factor = torch.rand(chains.count, generator=generator, dtype=torch.float64) + 0.5
    per_unit = torch.cat([factor, torch.ones(1, dtype=torch.float64)])[chain]
    other = rescale(model, conversion.units.slots, per_unit[:-1].numpy())
    difference = (other(x) - model(x)).abs().max() / model(x).abs().max()
    assert difference < 1e-9, f"{difference:.1e}"  # float64 through up to a hundred layers
    before, after = (dict(m.named_parameters()) for m in (model, other))
    ratio = values(chains, after) / values(chains, before)
    torch.testing.assert_close(ratio, factor, rtol=1e-12, atol=0)
    for tensor_name, tensor in chains.tensors.items():
        shape = before[tensor_name].shape
        row, column = (
            chain[t].broadcast_to(shape).flatten()[tensor.skeleton]
            for t in (tensor.row_unit, tensor.column_unit)
        )
        same = (row == column) & (row < chains.count)
        old, new = (
            p[tensor_name].detach().flatten()[tensor.skeleton][same] for p in (before, after)
        )
        torch.testing.assert_close(new, old, rtol=1e-12, atol=0)


def through_coordinates(
    model: nn.Module, chains: Chains, x: Tensor
) -> tuple[dict[str, Tensor], float]:
    """The weights after a step of SGD on coordinates over |d|, and its rate: chains change by at
    most 1 %.
    """
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gauge = (
        torch.ones(len(chains.balance), dtype=torch.float64)
        if chains.gauge is None
        else chains.gauge
    )
    first = values(chains, before)
    rho = first.abs()
    d = (first / rho).requires_grad_()

    def per_weight(d: Tensor, name: str) -> Tensor:
        tensor = chains.tensors[name]
        d = torch.cat([d, d.new_ones(1)])
        return d[tensor.chain] * gauge[tensor.row_unit] / gauge[tensor.column_unit]

    coordinates = {
        name: (
            (
                w * per_weight(d.detach(), name) if name in chains.tensors else w.clone()
            ).requires_grad_()
        )
        for name, w in before.items()
    }

    def weights(d: Tensor, coordinates: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {
            n: v / per_weight(d, n) if n in chains.tensors else v for n, v in coordinates.items()
        }
        flat = {name: w.flatten().clone() for name, w in found.items()}
        for name, tensor in chains.tensors.items():
            flat[name] = flat[name].index_put(
                (tensor.skeleton,), before[name].flatten()[tensor.skeleton]
            )
        whole = torch.cat([d * rho, d.new_ones(1)])
        start = whole[:-1] / whole[chains.parent] / chains.scale
        for name in dict.fromkeys(chains.parameter):
            mine = torch.tensor([i for i, other in enumerate(chains.parameter) if other == name])
            flat[name] = flat[name].index_put((chains.element[mine],), start[mine])
        return {name: w.view_as(before[name]) for name, w in flat.items()}

    functional_call(model, weights(d, coordinates), (x,)).square().mean().backward()
    assert d.grad is not None
    lr = float(0.01 / (d.grad / d.detach()).abs().max())
    with torch.no_grad():
        moved = {n: v if v.grad is None else v - lr * v.grad for n, v in coordinates.items()}
        return weights(d - lr * d.grad, moved), lr


@pytest.mark.parametrize(
    ("scope", "gauge", "path_bn", "start"),
    [("block", "unit", True, "bn"), ("network", "pow2", False, "weight")],
)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_is_one_of_sgd_on_the_coordinates(
    name: str, scope: str, gauge: str, path_bn: bool, start: Start
) -> None:
    _, model, x = converted(name, scope, gauge, path_bn)
    groups = path_parameter_groups(model)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    chains = find_chains(model, start)
    expected, lr = through_coordinates(copy.deepcopy(model), chains, x)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = GSGD(groups, lr=lr, start=start, anchor="initial")
    model(x).square().mean().backward()
    optimizer.step()
    assert optimizer.shortened() == 0
    changed = 0
    for parameter, p in model.named_parameters():
        if p.grad is None:
            continue
        change, wanted = p.detach() - before[parameter], expected[parameter] - before[parameter]
        error = float((change - wanted).abs().max())
        # changes to 1e-6 of the largest, and what float64 keeps of the weights themselves
        assert error <= 1e-6 * float(wanted.abs().max()) + 1e-14 * float(p.detach().abs().max()), (
            parameter
        )
        changed += int((wanted != 0).sum())
    assert changed > sum(p.numel() for p in model.parameters()) // 10
