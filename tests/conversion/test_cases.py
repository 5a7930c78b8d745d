"""Networks that were converted wrongly, crashed or were given up, and others of the same kinds.

Each is converted in both scopes and is equal to the original in evaluation and in training mode, on
other inputs than the example's, in its first and in its second call, and so is a network of its
class that has loaded the converted weights.
"""

# ruff: noqa: ARG005 - every forward takes (network, x), used or not

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from case_networks import (
    Case,
    Escape,
    Remembers,
    TiedStorage,
    by_a_list,
    by_arrays,
    by_numbers_of_tensors,
    by_tensors,
    classifier,
    gated,
    in_a_row,
    keep,
    nothing,
    of_input,
    row_as_bias,
    same_bias,
    same_weight,
    transposed_weight,
    u_net,
    written,
)
from layer_networks import randomise
from torch import Tensor, nn

import pathconvert

#: Two layers round by 1e-16 each; BatchNorm over few values in training mode makes that larger.
RELATIVE = 1e-10


def write(y: Tensor, index: Any, x: Tensor) -> Tensor:
    y[index] = x
    return y


def write_twice(y: Tensor, first: Any, second: Any, x: Tensor) -> Tensor:
    y[first], y[second] = x[first], x[second]
    return y


def shifted(x: Tensor, y: Tensor) -> Tensor:
    y[:, :2, :-1], y[:, 2:] = x[:, :2, 1:], x[:, 2:]
    return y


def kernel() -> Tensor:
    return torch.rand(8, 1, 3, 3) + 0.1


def filtered(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1, groups=8)


def normed(s: Any, x: Tensor) -> Tensor:
    b = s.b
    statistics = (b.running_mean, b.running_var, s.training, 0.1, b.eps, False)
    return F.relu(torch.batch_norm(x, b.weight, b.bias, *statistics))


def nameless(count: int, norm: type[nn.Module] = nn.BatchNorm2d) -> list[Any]:
    return [lambda: norm(count, affine=False, track_running_stats=False), nn.ReLU]


def conv(i: int, o: int, size: int = 3, **arguments: Any) -> Any:
    return lambda: nn.Conv2d(i, o, size, **arguments)


END = (lambda: nn.AdaptiveAvgPool2d(1), nn.Flatten, lambda: nn.Linear(8, 3))
BN8 = {"b": lambda: nn.BatchNorm2d(8)}
LINEAR = {"w": lambda: torch.rand(8, 8)}
KERNEL = {"kernel": kernel}

CASES = {
    "AttributeEscape": Case(lambda: Escape(keep, lambda s, _: s.backbone.skip), 0,
        source="pytorch/pytorch#37151"),
    "ChangesItsInput": Case(of_input(lambda x: x.sub_(0.45)), 20, source="pytorch/vision#520"),
    "TorchBatchNorm": Case(classifier(normed, **BN8), 8, source="pytorch/pytorch#63218"),
    "FilterUsedTwice": Case(
        classifier(lambda s, x: torch.cat([filtered(F.relu(x), k) for k in
            (s.kernel, s.kernel.flip(2))], 1), 16, **KERNEL),
        0, source="Aaditya-Singh/SAFIN#8"),
    "TiedStorage": Case(lambda: TiedStorage(same_weight), 8, source="none"),
    "TwoLayersInARow": Case(
        in_a_row(lambda: nn.Linear(5, 8), nn.ReLU, lambda: nn.Linear(8, 8), lambda: nn.Linear(8, 8),
            nn.ReLU, lambda: nn.Linear(8, 3)),
        24, (5,), "proceduralia/pytorch-conv2_1d#2"),
    "DepthwiseThenPointwise": Case(
        in_a_row(conv(3, 8), lambda: nn.BatchNorm2d(8), nn.ReLU, conv(8, 8, groups=8, bias=False),
            conv(8, 12, 1, bias=False), lambda: nn.BatchNorm2d(12), nn.ReLU, *END[:2],
            lambda: nn.Linear(12, 3)),
        28, source="apple/coremltools#272"),
    "TwoNamelessBatchNorms": Case(
        in_a_row(conv(3, 16), *nameless(16), conv(16, 8, 1), *nameless(8), *END), 0,
        source="pytorch/pytorch#122183, NVIDIA-AI-IOT/torch2trt#625"),
    "AsksItsBatchNorm": Case(
        classifier(lambda s, x: F.relu(s.b(x)).reshape(-1, s.b.num_features, *x.shape[2:]), **BN8),
        8, source="none"),
    "PadsByTensors": Case(u_net(by_tensors), 40, source="milesial/Pytorch-UNet#166"),
    "WritesIntoZeros": Case(written(shifted), 16, source="microsoft/nni#5713"),
    "GatesBySign": Case(gated(lambda x: x * (x > 0)), 16, source="several repositories"),
}  # fmt: skip

VARIATIONS = {
    # a part's activation leaves it otherwise than as its result
    "escape by a hook": Case(
        lambda: Escape(nothing, lambda s, _: s.backbone.c1.skip, hook=True), 0),
    "escape into a dict": Case(
        lambda: Escape(lambda s, y, store: store.update(skip=y), lambda s, store: store["skip"]),
        0),
    "escape by a closure": Case(lambda: by_a_closure(), 0),
    "escape into the next call": Case(Remembers, 0),
    # inputs that change
    "input: a channel set": Case(of_input(lambda x: x[:, 0].fill_(1)), 20),
    "input: an index written": Case(of_input(lambda x: x.__setitem__((..., 0), 0)), 20),
    "input: rectified in place": Case(of_input(lambda x: F.relu(x, inplace=True)), 20),
    # other orders of arguments
    "torch.instance_norm": Case(
        classifier(lambda s, x: F.relu(torch.instance_norm(
            x, s.b.weight, s.b.bias, None, None, True, 0.1, 1e-5, False)), **BN8), 8),
    "torch.layer_norm": Case(
        classifier(lambda s, x: F.relu(s.c2(F.relu(torch.layer_norm(x, x.shape[2:])))),
            c2=conv(8, 8)), 8),
    "aten mul": Case(
        classifier(lambda s, x: F.relu(torch.ops.aten.mul.Scalar(s.c2(x), 2)),
            c2=conv(8, 8, padding=1)), 16),
    "x.where": Case(classifier(lambda s, x: x.where(x > 0, -x)), 8),
    # what is used twice
    "a buffer and its transpose": Case(
        classifier(lambda s, x: F.relu(F.linear(F.linear(x.mean((2, 3)), s.w), s.w.t()))
            [..., None, None], **LINEAR), 0),
    "a buffer as filter and factor": Case(
        classifier(lambda s, x: filtered(F.relu(x), s.kernel) * s.kernel.sum(), **KERNEL), 0),
    "a buffer as two filters": Case(
        classifier(lambda s, x: F.relu(filtered(F.relu(filtered(x, s.kernel)), s.kernel)),
            **KERNEL), 8),
    "a filter that is not in the state dict": Case(
        classifier(lambda s, x: filtered(F.relu(x), torch.ones(8, 1, 3, 3).to(x))), 8),
    # parameters that share memory
    "storage: transposed": Case(lambda: TiedStorage(transposed_weight), 0),
    "storage: a bias": Case(lambda: TiedStorage(same_bias), 16),
    "storage: a row as bias": Case(lambda: TiedStorage(row_as_bias), 0),
    # layers without an activation between them
    "three convolutions": Case(in_a_row(conv(3, 6), conv(6, 4, 1), conv(4, 8), nn.ReLU, *END), 18),
    "a pool between": Case(
        in_a_row(conv(3, 6), lambda: nn.AvgPool2d(2), conv(6, 8), nn.ReLU, *END), 14),
    "two norms": Case(
        in_a_row(conv(3, 8), lambda: nn.BatchNorm2d(8), lambda: nn.BatchNorm2d(8), nn.ReLU, *END),
        8),
    # filters of single channels
    "depthwise twice": Case(
        in_a_row(conv(3, 8), conv(8, 8, groups=8), conv(8, 8, groups=8), nn.ReLU, *END), 24),
    "depthwise with a multiplier": Case(
        in_a_row(conv(3, 4), nn.ReLU, conv(4, 8, groups=4, bias=False), conv(8, 8, 1), *END), 20),
    "transposed depthwise": Case(
        in_a_row(conv(3, 8), nn.ReLU, lambda: nn.ConvTranspose2d(8, 8, 2, groups=8), nn.ReLU,
            *END), 16),
    # normalizations without a name
    "nameless in one dimension": Case(
        in_a_row(lambda: nn.Linear(5, 6), *nameless(6, nn.BatchNorm1d), lambda: nn.Linear(6, 6),
            *nameless(6, nn.BatchNorm1d), lambda: nn.Linear(6, 3)), 0, (5,)),
    "three calls of a function": Case(
        classifier(lambda s, x: F.relu(s.c2(F.batch_norm(
            F.batch_norm(x, None, None, training=True), None, None, training=True))),
            c2=conv(8, 8)), 8),
    "nameless of two sizes in one forward": Case(
        classifier(lambda s, x: F.batch_norm(s.c2(F.relu(F.batch_norm(
            x, None, None, training=True))), None, None, training=True), 4, c2=conv(8, 4)), 0),
    # layers that are asked for their attributes
    "asks for eps": Case(classifier(lambda s, x: F.relu(s.b(x)) * (s.b.eps + 1), **BN8), 8),
    "asks for a shape": Case(
        classifier(lambda s, x: F.relu(s.b(x)).view(-1, len(s.b.weight), x[0, 0].numel(), 1),
            **BN8), 8),
    "asks for the number of batches": Case(
        classifier(lambda s, x: F.relu(s.b(x)).flatten(2)[..., None] *
            (1 if s.b.num_batches_tracked is not None else 2), **BN8), 8),
    # paddings that are computed
    "pads by numbers of tensors": Case(u_net(by_numbers_of_tensors), 40),
    "pads by a list": Case(u_net(by_a_list), 40),
    "pads by arrays": Case(u_net(by_arrays), 40),
    # writes
    "every second channel": Case(
        written(lambda x, y: write_twice(y, (slice(None), slice(0, None, 2)),
            (slice(None), slice(1, None, 2)), x)), 16),
    "a list of channels": Case(
        written(lambda x, y: write(y, (slice(None), [7, 6, 5, 4, 3, 2, 1, 0]), x)), 16),
    "into new_empty": Case(written(lambda x, y: write(x.new_empty(x.shape), ..., x)), 16),
    "over itself": Case(written(lambda x, y: write(x, (..., 0), x[..., 1].clone())), 16),
    "from another channel": Case(  # c1 is pinned, as the view x[:, 1] might be read again
        written(lambda x, y: write(x, (slice(None), 0), x[:, 1].clone())), 8),
    # masks
    "less or equal": Case(gated(lambda x: x.masked_fill(x <= 0, 0)), 16),
    "sign": Case(gated(lambda x: x * x.sign().clamp(min=0)), 16),
    "where, zeros_like": Case(gated(lambda x: torch.where(x > 0, x, torch.zeros_like(x))), 16),
    "maximum": Case(gated(lambda x: torch.maximum(x, torch.tensor(0.0).to(x))), 16),
}  # fmt: skip


def by_a_closure() -> nn.Module:
    """The part appends to a list that the network's own ``read`` knows too."""
    seen: list[Tensor] = []
    return Escape(lambda s, y, _: seen.append(y), lambda s, _: seen.pop())


def network(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return randomise(case.make())


def inputs(case: Case, batch: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *case.shape, generator=generator, dtype=torch.float64)


@torch.no_grad()
def calls(model: nn.Module, case: Case, training: bool) -> list[Tensor]:
    """The results of two calls, on two inputs that are no example's."""
    model = copy.deepcopy(model).train(training)
    return [model(inputs(case, 3, seed)) for seed in (2, 3)]


def assert_equal(original: nn.Module, other: nn.Module, case: Case) -> None:
    for training in (False, True):
        expected, found = calls(original, case, training), calls(other, case, training)
        for number, (a, b) in enumerate(zip(expected, found, strict=True)):
            error = float((a - b).abs().max() / a.abs().max())
            assert error <= RELATIVE, f"call {number}, training={training}: {error:.1e}"


ALL = CASES | VARIATIONS


@pytest.mark.parametrize("scope", ["block", "network"])
@pytest.mark.parametrize("name", ALL)
def test_equal_and_rescaled(name: str, scope: Any) -> None:
    case = ALL[name]
    model, example = network(case), inputs(case, 2, 1)
    kept = example.clone()
    converted = pathconvert.reparameterize(model, example, scope=scope)
    assert torch.equal(example, kept)
    assert_equal(model, converted.model, case)
    loaded = network(case)
    loaded.load_state_dict(converted.model.state_dict())
    assert_equal(model, loaded, case)
    if scope == "network":
        assert converted.counts()["channels_rescaled"] == case.rescaled


@pytest.mark.parametrize("name", ["TwoLayersInARow", "DepthwiseThenPointwise"])
def test_path_bn_enters(name: str) -> None:
    case = CASES[name]
    model, example = network(case), inputs(case, 2, 1)
    entered = pathconvert.to_path_bn(model, example, calibration=inputs(case, 8, 4)).eval()
    (a, *_), (b, *_) = calls(model, case, False), calls(entered, case, False)
    assert float((a - b).abs().max() / a.abs().max()) <= RELATIVE


@pytest.mark.parametrize(
    "name", ["AsksItsBatchNorm", "PadsByTensors", *(n for n in VARIATIONS if n.startswith("asks"))]
)
def test_folds(name: str) -> None:
    case = ALL[name]
    model = network(case)
    folded = pathconvert.export.fold(model, inputs(case, 2, 1)).eval()
    (a, *_), (b, *_) = calls(model, case, False), calls(folded, case, False)
    assert float((a - b).abs().max() / a.abs().max()) <= RELATIVE
    if name == "PadsByTensors":
        assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
