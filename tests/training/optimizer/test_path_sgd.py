"""Path-SGD against paths that are enumerated one by one."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import pathconvert
from pathconvert.conversion.rescale import rescale
from pathconvert.errors import PathconvertError
from pathconvert.training import PathSGD


def mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        m
        for into, out in itertools.pairwise(widths)
        for m in (nn.Linear(into, out, bias=False), nn.ReLU())
    ]
    return nn.Sequential(*layers[:-1]).double()


def enumerated(weights: list[Tensor]) -> list[Tensor]:
    """κ of every weight: over all paths through it, the product of the other weights squared."""
    sums = [torch.zeros_like(w) for w in weights]
    sizes = [weights[0].shape[1], *(len(w) for w in weights)]
    for path in itertools.product(*map(range, sizes)):
        edges = [(row, column) for column, row in itertools.pairwise(path)]
        values = [float(w.detach()[edge]) ** 2 for w, edge in zip(weights, edges, strict=True)]
        for layer, edge in enumerate(edges):
            others = values[:layer] + values[layer + 1 :]
            sums[layer][edge] += torch.tensor(others, dtype=torch.float64).prod()
    return sums


def test_kappa_is_the_sum_over_all_paths() -> None:
    model = mlp(3, 4, 2, 5)
    found = PathSGD(model, (3,)).path_sums()
    for (name, p), expected in zip(
        model.named_parameters(), enumerated([*model.parameters()]), strict=True
    ):
        assert torch.allclose(found[name], expected, rtol=1e-12, atol=0), (name, p.shape)


def test_a_convolution_counts_every_place() -> None:
    """With one output channel: κ of a kernel's element is the sum over all places of its input
    times weights².
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3, bias=False)
    ).double()
    conv, linear = model[0].weight, model[3].weight
    found = PathSGD(model, (1, 3, 3)).path_sums()
    after = linear.square().sum(0).view(2, 2, 2).sum((1, 2))  # per channel, over places and outputs
    assert torch.allclose(found["0.weight"], after.view(2, 1, 1, 1).expand_as(conv), rtol=1e-12)


def test_a_copy_goes_on_as_the_original() -> None:
    model = mlp(4, 5, 3)
    optimizer = PathSGD(model, (4,), lr=0.1, momentum=0.9)
    x = torch.randn(6, 4, dtype=torch.float64)
    model(x).square().sum().backward()
    optimizer.step()
    other, twin = copy.deepcopy((model, optimizer))
    for one, its in ((model, optimizer), (other, twin)):
        its.zero_grad()
        one(x).square().sum().backward()
        its.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rescaled_networks_train_alike(momentum: float) -> None:
    first = mlp(4, 5, 3, 2)
    x = torch.randn(6, 4, dtype=torch.float64)
    units = pathconvert.reparameterize(first, x).units
    factors = (
        torch.rand(units.count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        * 10
        + 0.1
    )
    factors[-2:] = 1  # the outputs
    second = rescale(first, units.slots, factors.numpy())
    for model in (first, second):
        optimizer = PathSGD(model, (4,), lr=1e-3, momentum=momentum)
        for _ in range(20):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert ((first(x) - second(x)).abs().max() / first(x).abs().max()).item() < 1e-10


def test_batch_norm_is_left_out_and_trained_plainly() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    without = nn.Sequential(model[0], nn.ReLU(), model[3])
    found, expected = PathSGD(model, (3,)).path_sums(), PathSGD(without, (3,)).path_sums()
    assert set(found) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert torch.allclose(found["0.weight"], expected["0.weight"])
    assert model.training
    before = copy.deepcopy(model)
    optimizer = PathSGD(model, (3,), lr=0.1)
    model(torch.randn(5, 3, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    expected_gamma = before[1].weight - 0.1 * model[1].weight.grad
    assert torch.allclose(model[1].weight, expected_gamma, rtol=1e-15, atol=0)


def test_a_network_too_deep_is_refused() -> None:
    model = mlp(2, *[3] * 4)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1e60)
    model(torch.randn(1, 2, dtype=torch.float64)).sum().backward()
    with pytest.raises(
        PathconvertError, match="the path norm of this Sequential leaves the range of float64"
    ):
        PathSGD(model, (2,)).step()
