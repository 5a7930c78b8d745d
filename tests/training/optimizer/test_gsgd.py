"""GSGD against SGD in path coordinates through autograd (``reference/gsgd.py``)."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from path_networks import NETWORKS, converted, loss, mlp
from reference.gsgd import PathCoordinates
from torch import Tensor, nn

import pathconvert
from pathconvert.conversion.rescale import rescale
from pathconvert.errors import RecordError
from pathconvert.training import GSGD, path_parameter_groups


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> None:
    for x in batches:
        optimizer.zero_grad()
        loss(model(x)).backward()
        optimizer.step()


def assert_equal(found: nn.Module, expected: dict[str, Tensor], tolerance: float) -> None:
    for name, parameter in found.named_parameters():
        error = float(
            (parameter.detach() - expected[name]).abs().max() / expected[name].abs().max()
        )
        assert error < tolerance, f"{name} differs by {error:.2e} of its largest element"


# without biases and BatchNorm it takes no Path-BN
CASES = [
    (name, skip_scale, start)
    for name, skip_scale, start in itertools.product(NETWORKS, (None, 1.0), ("bn", "weight"))
    if not (name == "equal widths" and skip_scale)
]


@pytest.mark.parametrize(("name", "skip_scale", "start"), CASES)
@pytest.mark.parametrize("pivot", ["diagonal", "max"])
@pytest.mark.parametrize("anchor", ["balanced", "initial", None])
def test_step_is_sgd_on_path_coordinates(
    name: str, skip_scale: float | None, start: str, pivot: str, anchor
) -> None:
    conversion, model, layers, batches = converted(name, pivot, skip_scale=skip_scale)
    expected = PathCoordinates(copy.deepcopy(model), conversion, layers, start, anchor)
    # path-values as they are: 1 / d² multiplies the rate, and a chain's value should stay above a
    # tenth of itself
    lr = 1e-4 if anchor else 1e-4 * min(expected.values) ** 2
    optimizer = GSGD(path_parameter_groups(model), lr=lr, start=start, anchor=anchor)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, batches[:1])
    assert_equal(model, expected.train(loss, batches[:1], lr), 1e-12)
    assert optimizer.shortened() == 0
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(("name", "skip_scale", "start"), CASES)
@pytest.mark.parametrize("decay", ["l2", "basis_path_norm"])
@pytest.mark.parametrize("anchor", ["balanced", "initial"])
def test_momentum_and_decay_act_on_path_coordinates(
    name: str, skip_scale: float | None, start: str, anchor: str, decay: str
) -> None:
    conversion, model, layers, batches = converted(name, skip_scale=skip_scale)
    settings = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 0.1}
    expected = PathCoordinates(copy.deepcopy(model), conversion, layers, start, anchor)
    train(
        model,
        GSGD(path_parameter_groups(model), start=start, decay=decay, anchor=anchor, **settings),
        batches,
    )
    if decay == "basis_path_norm":
        assert expected.chains
    assert_equal(model, expected.train(loss, batches, decay=decay, **settings), 1e-12)


@pytest.mark.parametrize(("name", "skip_scale", "start"), CASES)
@pytest.mark.parametrize("anchor", ["balanced", "initial"])
def test_weight_norm_multiplies_the_gradients_of_all_weights(
    name: str, skip_scale: float | None, start: str, anchor: str
) -> None:
    conversion, model, layers, batches = converted(name, skip_scale=skip_scale)
    settings = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 0.1, "weight_norm": True}
    expected = PathCoordinates(copy.deepcopy(model), conversion, layers, start, anchor)
    train(
        model,
        GSGD(path_parameter_groups(model), start=start, anchor=anchor, **settings),
        batches[:2],
    )
    assert_equal(model, expected.train(loss, batches[:2], **settings), 1e-12)


def rescaled_by_anything(
    conversion: pathconvert.Conversion, model: nn.Module, seed: int
) -> nn.Module:
    """``model`` rescaled by random factors from [0.1, 10] for all free units: other weights, the
    same function.
    """
    generator = torch.Generator().manual_seed(seed)
    free = [group.pinned_by is None for group in conversion.groups for _ in range(group.size)]
    powers = torch.rand(len(free), generator=generator, dtype=torch.float64) * 2 - 1
    return rescale(
        model, conversion.units.slots, (10**powers).where(torch.tensor(free), 1.0).numpy()
    )


@pytest.mark.parametrize("anchor", ["balanced", "initial"])
@pytest.mark.parametrize(
    ("skip_scale", "start"), [(None, "bn"), (None, "weight"), (0.5, "bn"), (1.0, "weight")]
)
@pytest.mark.parametrize("name", NETWORKS)
def test_rescalings_of_a_network_train_alike(
    name: str, skip_scale: float | None, start: str, anchor: str
) -> None:
    """With either gauge.

    With pivot rule diagonal, as the others may take other pivots in another rescaling.

    Where Path-BN puts in BatchNorms of its own, the gauge decides what eps is beside their
    variance: there, unit alone.
    """
    if name == "equal widths" and skip_scale:
        pytest.skip("without biases and BatchNorm it takes no Path-BN")
    conversion, original, _, batches = converted(name)
    start_outputs = torch.stack([original(x) for x in batches]).detach()
    has_bn = any(isinstance(module, nn.BatchNorm2d) for module in original.modules())
    rescalings = [(None, "unit"), (1, "unit")] + [(None, "pow2"), (2, "pow2")] * (
        has_bn or not skip_scale
    )
    outputs = []
    for seed, gauge in rescalings:
        plain = pathconvert.restore(conversion.model, conversion.record)
        plain = plain if seed is None else rescaled_by_anything(conversion, plain, seed)
        c = pathconvert.reparameterize(plain.eval(), batches[0], pivot="diagonal", gauge=gauge)
        model = c.model if skip_scale is None else to_path_bn(c, batches, skip_scale)
        groups = path_parameter_groups(model.train())
        optimizer = GSGD(
            groups, lr=1e-7, momentum=0.5, weight_decay=0.01, start=start, anchor=anchor
        )
        train(model, optimizer, list(itertools.islice(itertools.cycle(batches), 20)))
        outputs.append(torch.stack([model(x) for x in batches]).detach())
    scale = float(outputs[0].abs().max())
    assert float((outputs[0] - start_outputs).abs().max()) > 1e-7 * scale
    for other in outputs[1:]:
        error = float((other - outputs[0]).abs().max()) / scale
        assert error < 1e-10, f"after 20 steps the functions differ by {error:.1e}"


def to_path_bn(
    conversion: pathconvert.Conversion, batches: list[Tensor], skip_scale: float
) -> nn.Module:
    return pathconvert.to_path_bn(conversion, batches[0], torch.cat(batches), skip_scale)


@pytest.mark.parametrize("gauge", ["unit", "pow2"])
@pytest.mark.parametrize("name", NETWORKS)
def test_pivots_do_not_move(name: str, gauge: str) -> None:
    conversion, model, _, batches = converted(name, gauge=gauge)
    model.float()
    pivots = [p for group in conversion.groups for p in group.pivots if p is not None]
    places = [(p.parameter, (p.row, p.column)) for p in pivots]
    if name == "cnn":  # conv, flatten → linear: a pivot's column counts the channel's pixels
        assert any(column >= 6 for parameter, (_, column) in places if parameter == "5.weight")

    def skeleton() -> list[Tensor]:
        named = dict(model.named_parameters())
        weights = [(named[parameter], place) for parameter, place in places]
        return [w[(*place, *(s // 2 for s in w.shape[2:]))].clone() for w, place in weights]

    before = skeleton()
    optimizer = GSGD(path_parameter_groups(model), lr=1e-3, momentum=0.9, weight_decay=0.1)
    train(model, optimizer, [x.float() for x in batches] * 10)
    assert all(torch.equal(a, b) for a, b in zip(before, skeleton(), strict=True))
    if gauge == "unit" and name in ("equal widths", "unequal widths", "cnn"):
        assert {abs(value.item()) for value in before} == {1.0}


def test_a_step_through_zero_is_shortened_and_counted() -> None:
    _, model, _, batches = converted("cnn with BatchNorm")
    optimizer = GSGD(path_parameter_groups(model), lr=1e4, momentum=0.9)
    gamma = dict(model.named_parameters())["1.weight"]
    before = gamma.detach().clone()
    train(model, optimizer, batches[:1])
    assert 0 < optimizer.shortened() <= optimizer.chains[0].count
    assert torch.equal(gamma.sign(), before.sign())
    ratio = (gamma / before).detach()
    assert ratio.min() == pytest.approx(0.1)
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.state_dict()["state"]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_norm", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_foreach_equals_the_loop(name: str, weight_norm: bool, momentum: float) -> None:
    results = []
    for foreach in (False, True):
        _, model, _, batches = converted(name)
        settings = {
            "lr": 1e-3,
            "momentum": momentum,
            "weight_decay": 0.1,
            "weight_norm": weight_norm,
        }
        train(model, GSGD(path_parameter_groups(model), foreach=foreach, **settings), batches)
        results.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_state_dict_continues_bit_for_bit() -> None:
    _, model, _, batches = converted("residual block")
    model.float()
    batches = [x.float() for x in batches]
    settings = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.1}
    optimizer = GSGD(path_parameter_groups(model), **settings)
    train(model, optimizer, batches)
    other = copy.deepcopy(model)
    resumed = GSGD(path_parameter_groups(other), **settings)
    resumed.load_state_dict(state_dict=copy.deepcopy(optimizer.state_dict()))
    pickled_model, pickled = pickle.loads(pickle.dumps((model, optimizer)))
    for m, o in ((model, optimizer), (other, resumed), (pickled_model, pickled)):
        train(m, o, batches)
    for a, b, c in zip(
        model.parameters(), other.parameters(), pickled_model.parameters(), strict=True
    ):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_gradients_stay_and_none_is_left_alone() -> None:
    _, model, _, batches = converted("cnn with BatchNorm")
    optimizer = GSGD(
        path_parameter_groups(model), lr=1e-3, weight_decay=0.1, weight_norm=True, maximize=True
    )
    loss(model(batches[0])).backward()
    model.get_parameter("6.weight").grad = None
    before = {
        n: (p.detach().clone(), None if p.grad is None else p.grad.clone())
        for n, p in model.named_parameters()
    }
    optimizer.step()
    for name, p in model.named_parameters():
        value, grad = before[name]
        assert (p.grad is None) if grad is None else torch.equal(p.grad, grad)
        assert torch.equal(p, value) == (grad is None), name


def test_a_closure_is_called_with_gradients() -> None:
    _, model, _, batches = converted("equal widths")
    optimizer = GSGD(path_parameter_groups(model), lr=1e-3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model(batches[0]))
        value.backward()
        return value

    first, second = optimizer.step(closure).item(), optimizer.step(closure).item()
    assert second < first


def test_groups_tell_chains_from_the_rest() -> None:
    _, model, _, _ = converted("residual block", skip_scale=1.0)
    path, ordinary = path_parameter_groups(model, ordinary_lr=0.3, ordinary_momentum=0.9)
    named = {id(p): name for name, p in model.named_parameters()}
    assert {named[id(p)] for p in path["params"]} == {
        "conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "conv2.bn.weight",
        "conv2.bn.bias", "conv3.weight",
    }  # fmt: skip
    assert (ordinary["lr"], ordinary["momentum"]) == (0.3, 0.9)
    assert len(path["params"]) + len(ordinary["params"]) == len(list(model.parameters()))
    optimizer = GSGD([path, ordinary], lr=0.1)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.3]


def test_without_chains_it_is_sgd() -> None:
    torch.manual_seed(0)
    first, second = (copy.deepcopy(mlp(4, 3, 2, bias=True)) for _ in range(2))
    second.load_state_dict(first.state_dict())
    settings = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}
    batches = [torch.randn(3, 4) for _ in range(3)]
    train(first, GSGD(first.parameters(), **settings), batches)
    train(second, torch.optim.SGD(second.parameters(), **settings), batches)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


def test_refusals() -> None:
    _, model, _, _ = converted("equal widths")
    with pytest.raises(RecordError, match="this Sequential holds no conversion record"):
        path_parameter_groups(mlp(3, 3, bias=True))
    old = copy.deepcopy(model)
    del old.path_record["pivots"]["next_unit"]
    with pytest.raises(RecordError, match="written before chains were recorded"):
        path_parameter_groups(old)
    for setting, message in (
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"momentum": -1.0}, "Invalid momentum value: -1.0"),
        (
            {"anchor": "always"},
            "Invalid anchor: 'always' is not one of 'balanced', 'initial', None",
        ),
        ({"start": "gamma"}, "Invalid start: 'gamma' is not one of 'bn', 'weight'"),
        ({"decay": "l1"}, "Invalid decay: 'l1' is not one of 'l2', 'basis_path_norm'"),
        ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
    ):
        with pytest.raises(ValueError, match=message):
            GSGD(path_parameter_groups(model), **setting)


# ---- going on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", ["initial", "balanced", None])
@pytest.mark.parametrize("gauge", ["unit", "pow2"])
def test_a_state_brings_its_start_weights(gauge: str, anchor: str | None) -> None:
    """The largest weights of rows begin chains, and training changes which weights are the
    largest.
    """
    torch.manual_seed(0)
    model, x = mlp(4, 6, 3, 7, 2, bias=True).double(), torch.randn(16, 4, dtype=torch.float64)
    wanted = torch.randn(16, 2, dtype=torch.float64)
    trained = pathconvert.reparameterize(model, x, gauge=gauge).model
    settings = {"lr": 2e-4 if anchor is None else 0.03, "momentum": 0.9, "anchor": anchor}
    optimizer = GSGD(path_parameter_groups(trained), **settings)

    def train(network: nn.Module, its: GSGD, steps: int) -> None:
        for _ in range(steps):
            its.zero_grad()
            (network(x) - wanted).square().mean().backward()
            its.step()

    def change(element: Tensor) -> bool:
        return not torch.equal(element, optimizer.chains[0].element)

    train(trained, optimizer, 40)
    twin = copy.deepcopy(trained)
    resumed = GSGD(path_parameter_groups(twin), **settings)
    assert change(resumed.chains[0].element), (
        "the test needs a start that is no longer its row's largest"
    )
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not change(resumed.chains[0].element)
    for field in ("parent", "scale"):
        assert torch.equal(getattr(resumed.chains[0], field), getattr(optimizer.chains[0], field))
    train(trained, optimizer, 5)
    train(twin, resumed, 5)
    for (name, p), q in zip(trained.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_start_weights_of_another_network_are_refused() -> None:
    x = torch.randn(2, 4)
    state = GSGD(
        path_parameter_groups(pathconvert.reparameterize(mlp(4, 6, 3, bias=True), x))
    ).state_dict()
    other = GSGD(path_parameter_groups(pathconvert.reparameterize(mlp(4, 5, 3, bias=True), x)))
    with pytest.raises(RecordError, match="6 chains were saved, and this network has 5"):
        other.load_state_dict(state)
