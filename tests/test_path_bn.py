"""Path-BN form: in, out, and what it is for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import narrow_classifier, network
from reference.path_bn import path_bn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pathconvert
from pathconvert.calibration import _Moments
from pathconvert.entering import NO_PIVOT
from pathconvert.equivalence import forward_outputs
from pathconvert.errors import EquivalenceError, PathconvertError, RecordError
from pathconvert.path_bn import PathBN

COMBINATIONS = [
    (scope, pivot, gauge)
    for scope in ("block", "network")
    for pivot in ("matching", "max", "diagonal")
    for gauge in ("unit", "pow2")
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def output(model: nn.Module, x: Any, training: bool = False) -> Tensor:
    return forward_outputs(model, x, training)[0]


def layers(model: nn.Module) -> dict[str, PathBN]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PathBN)}


class Chain(nn.Sequential):
    """conv, BatchNorm, ReLU, then ``middle`` (with its BatchNorm unless ``bn`` is False), ReLU, mean, classifier."""

    def __init__(self, middle: nn.Module, channels: int = 6, kind: int = 2, bn: bool = True) -> None:
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[kind]
        norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[kind]
        out = middle.out_channels
        after = [norm(out)] if bn else []
        super().__init__(
            conv(3, channels, 3), norm(channels), nn.ReLU(), middle, *after, nn.ReLU(), nn.Flatten(2), Mean(),
            nn.Linear(out, 4),
        )  # fmt: skip


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(2)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """float64; every γ, β and statistic away from 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.5, generator=generator)
                module.running_var.uniform_(0.3, 2.0, generator=generator)
    return model


@torch.no_grad()
def with_statistics_of(model: nn.Module, x: Tensor) -> nn.Module:
    """Running statistics are those of ``x`` to the last bit: training mode and evaluation mode agree."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def note(module: Any, args: tuple[Tensor, ...]) -> None:
        dims = [d for d in range(args[0].dim()) if d != 1]
        var, mean = torch.var_mean(args[0], dims, correction=0)
        module.running_mean.copy_(mean)
        module.running_var.copy_(var)

    handles = [norm.register_forward_pre_hook(note) for norm in norms]
    model.eval()(x)
    for handle in handles:
        handle.remove()
    return model


GEOMETRIES = {
    "3x3": nn.Conv2d(6, 6, 3, padding=1),
    "1x1": nn.Conv2d(6, 6, 1),
    "no padding": nn.Conv2d(6, 6, 3),
    "too much padding": nn.Conv2d(6, 6, 1, padding=2),
    "stride": nn.Conv2d(6, 6, 3, stride=2, padding=1),
    "stride, 1x1": nn.Conv2d(6, 8, 1, stride=2),
    "dilation": nn.Conv2d(6, 6, 3, dilation=2, padding=2),
    "dilation, stride and odd padding": nn.Conv2d(6, 6, 3, dilation=2, stride=3, padding=1),
    "even kernel": nn.Conv2d(6, 6, 4, padding=1),
    "oblong": nn.Conv2d(6, 6, (1, 5), padding=(0, 2), stride=(2, 1)),
    "reflecting": nn.Conv2d(6, 6, 1, padding=2, padding_mode="reflect"),
    "circular": nn.Conv2d(6, 6, 5, padding=2, padding_mode="circular"),
    "same": nn.Conv2d(6, 6, 4, padding="same"),
    "wider": nn.Conv2d(6, 9, 3, padding=1),
    "narrower": nn.Conv2d(6, 2, 3, padding=1),
    "groups": nn.Conv2d(6, 9, 3, groups=3, padding=1),
    "depthwise": nn.Conv2d(6, 6, 3, groups=6, padding=1),
    "depthwise, two each": nn.Conv2d(6, 12, 3, groups=6, padding=1),
    "no bias": nn.Conv2d(6, 6, 3, padding=1, bias=False),
    "1d": nn.Conv1d(6, 6, 3, padding=1),
    "3d": nn.Conv3d(6, 6, 3, padding=1, stride=2),
}


def geometry(name: str, bn: bool = True) -> tuple[nn.Module, Tensor]:
    middle = copy.deepcopy(GEOMETRIES[name])
    dims = middle.weight.dim() - 2
    return randomised(Chain(middle, kind=dims, bn=bn)), draw(4, 3, *(8,) * dims)


@pytest.mark.parametrize("pivot", ["matching", "max", "diagonal"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_geometry_keeps_the_function_both_ways(name: str, pivot: str) -> None:
    model, x = geometry(name)
    model = with_statistics_of(model, x)
    conversion = pathconvert.reparameterize(model, x, pivot=pivot)
    m = pathconvert.to_path_bn(conversion, x, calibration=x)
    assert list(layers(m)) == ["3"]
    assert error(output(m, x), output(model, x)) < 1e-10
    assert error(output(m, x, training=True), output(model, x, training=True)) < 1e-10
    left = pathconvert.leave_path_bn(m)
    assert error(output(left, x), output(model, x)) < 1e-10
    assert {k: v.shape for k, v in left.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert error(output(pathconvert.restore(left, conversion.record), x), output(model, x)) < 1e-10


@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name != "no bias"])
def test_without_batch_norm(name: str) -> None:
    """Path-BN where there was none; leaving folds it into weight and bias."""
    model, x = geometry(name, bn=False)
    model = with_statistics_of(model, x)
    m = pathconvert.to_path_bn(model, x, calibration=x)
    assert list(layers(m)) == ["3"]
    assert error(output(m, x), output(model, x)) < 1e-10
    assert error(output(m, x, training=True), output(m, x)) < 1e-10
    var = layers(m)["3"].bn.running_var  # 0 where the pivot is all that a row has
    assert (var[var > 0].log2().abs() <= 1 + 1e-9).all()  # near 1: eps is small beside it
    with torch.no_grad():
        for module in layers(m).values():  # as training does
            module.bn.bias.add_(draw(len(module.bn.bias)))
            module.bn.weight.mul_(1.5)
    left = pathconvert.leave_path_bn(m)
    assert list(left.state_dict()) == list(model.state_dict())
    assert error(output(left, x), output(m, x)) < 1e-10


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name not in ("same", "3d")])
def test_against_the_formula(name: str, training: bool) -> None:
    """PBN eq. 8-10 by the letter, in both modes, with a λ of its own."""
    model, x = geometry(name)
    m = pathconvert.to_path_bn(model, x, calibration=x, skip_scale=0.3)
    module = m[3].train(training)
    z = draw(2, 6, *(7,) * (module.weight.dim() - 2), seed=3)
    conv = GEOMETRIES[name]
    with torch.no_grad():
        assert error(copy.deepcopy(module)(z), path_bn(z, module, conv, training)) < 1e-10


@pytest.mark.parametrize(("scope", "pivot", "gauge"), COMBINATIONS)
@pytest.mark.parametrize("skip_scale", [1.0, 0.1])
def test_every_combination(scope: str, pivot: str, gauge: str, skip_scale: float) -> None:
    """ResNet-18 with γ of either sign, tiny and zero."""
    model, x = network("resnet18", torch.float64), draw(2, 3, 64, 64)
    conversion = pathconvert.reparameterize(model, x, scope, pivot, gauge)
    m = pathconvert.to_path_bn(conversion, x, skip_scale=skip_scale)
    count = {"block": 8, "network": 11}[scope]
    assert len(layers(m)) == count
    assert error(output(m, x), output(model, x)) < 1e-10
    left = pathconvert.leave_path_bn(m)
    assert error(output(left, x), output(model, x)) < 1e-10
    assert error(output(pathconvert.restore(m, m.path_record), x), output(model, x)) < 1e-10
    if gauge == "unit":
        values = torch.cat([module.pivot_value for module in layers(m).values()])
        assert set(values.tolist()) == {1.0, -1.0}


NETWORKS = {
    "alexnet": 6, "vgg11_bn": 9, "squeezenet1_1": 16, "densenet121": 119, "googlenet": 29, "inception_v3": 59,
    "shufflenet_v2_x0_5": 52, "mnasnet0_5": 36, "regnet_x_400mf": 45, "regnet_y_400mf": 49, "r3d_18": 8,
    "fcn_resnet50": 33, "resnext50_32x4d": 33,
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    """All families, on calibration images; DenseNet's second convolutions have neither BatchNorm nor bias."""
    size = {"inception_v3": (75, 75), "r3d_18": (4, 32, 32), "vgg11_bn": (32, 32)}.get(name, (64, 64))
    arguments = {"aux_logits": False} if name == "inception_v3" else {}  # its auxiliary head wants 299 pixels
    model, x = network(name, torch.float64, **arguments), draw(2, 3, *size)
    if name in ("alexnet", "vgg11_bn"):
        model = narrow_classifier(model)
    m = pathconvert.to_path_bn(pathconvert.reparameterize(model, x, pivot="max"), x, calibration=x)
    assert len(layers(m)) == NETWORKS[name], m.path_record["path_bn"]["left"]
    assert error(output(m, x), output(model, x)) < 1e-10
    with torch.no_grad():
        for module in layers(m).values():  # what training changes
            module.bn.bias.add_(0.1)
    left = pathconvert.leave_path_bn(m)
    assert list(left.state_dict()) == list(model.state_dict())
    assert error(output(left, x), output(m, x)) < 1e-10


@pytest.mark.parametrize(
    ("name", "scope", "pivot", "count"),
    [
        ("squeezenet1_1", "network", "diagonal", 16), ("googlenet", "block", "diagonal", 29),
        ("shufflenet_v2_x0_5", "network", "matching", 52), ("mnasnet0_5", "network", "diagonal", 41),
        ("regnet_y_400mf", "network", "matching", 52), ("r3d_18", "network", "diagonal", 11),
    ],
)  # fmt: skip
def test_networks_in_other_modes(name: str, scope: str, pivot: str, count: int) -> None:
    model, x = network(name, torch.float64), draw(2, 3, *((4, 32, 32) if name == "r3d_18" else (64, 64)))
    m = pathconvert.to_path_bn(pathconvert.reparameterize(model, x, scope, pivot), x, calibration=x, skip_scale=0.1)
    assert len(layers(m)) == count
    assert error(output(m, x), output(model, x)) < 1e-10
    assert error(output(pathconvert.leave_path_bn(m), x), output(model, x)) < 1e-10


# ---- what Path-BN is for -------------------------------------------------------------------------------------------


@pytest.fixture
def resnet() -> tuple[nn.Module, Tensor]:
    """A trained ResNet-18 in miniature: statistics of the images, in Path-BN form."""
    x = draw(8, 3, 32, 32)
    return with_statistics_of(randomised_resnet(), x), x


def randomised_resnet() -> nn.Module:
    model = network("resnet18", torch.float64)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.abs_().clamp_(min=0.5)
    return model


@pytest.mark.parametrize("factor", [1e-2, 3.0, 1e3])
def test_the_trained_weights_scale_is_free(resnet: tuple[nn.Module, Tensor], factor: float) -> None:
    """PBN Proposition 2: u → c u leaves the training-mode output, up to BatchNorm's eps."""
    model, x = resnet
    m = pathconvert.to_path_bn(model, x, calibration=x)
    before = output(m, x, training=True)
    with torch.no_grad():
        for module in layers(m).values():
            module.bn.eps = 1e-30
            module.weight.mul_(factor)
    without_eps = output(m, x, training=True)
    assert error(without_eps, before) < 1e-3
    with torch.no_grad():
        for module in layers(m).values():
            module.weight.div_(factor)
    assert error(output(m, x, training=True), without_eps) < 1e-9


def test_pivots_stay_zero_and_receive_no_gradient(resnet: tuple[nn.Module, Tensor]) -> None:
    model, x = resnet
    m = pathconvert.to_path_bn(model, x, calibration=x).train()
    optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        m(x).square().mean().backward()
        optimizer.step()
    for name, module in layers(m).items():
        places = (module.pivot_row, module.pivot_column, 1, 1)
        assert not module.weight[places].any(), name
        assert not module.weight.grad[places].any(), name
        assert module.weight.grad.abs().sum() > 0
        assert set(module.pivot_value.tolist()) <= {1.0, -1.0}
    left = pathconvert.leave_path_bn(m)
    assert error(output(left, x), output(m, x)) < 1e-10


def test_training_loss_agrees_with_the_original(resnet: tuple[nn.Module, Tensor]) -> None:
    model, x = resnet
    target = torch.arange(8) % 7
    m = pathconvert.to_path_bn(model, x, calibration=x)
    losses = [F.cross_entropy(output(one, x, training=True), target) for one in (model, m)]
    assert error(losses[1], losses[0]) < 1e-8


@pytest.mark.parametrize("kind", ["straight", "gather", "scatter"])
def test_gradients(kind: str) -> None:
    """gradcheck, through batch statistics and every kind of skip."""
    conv = nn.Conv2d(3, 3, 3, padding=1, stride=2, bias=False).double()
    rows = {"straight": [0, 1, 2], "gather": [0, 2], "scatter": [1, 1, 2]}[kind]
    columns = {"straight": [0, 1, 2], "gather": [1, 0], "scatter": [0, 1, 2]}[kind]
    values = torch.tensor([1.0, -1.0, 1.0])[: len(rows)]
    values = values.abs() if kind == "straight" else values
    module = PathBN(conv, nn.BatchNorm2d(3).double(), torch.tensor(rows), torch.tensor(columns), values, 0.5)
    assert module._skip_kind == kind
    x = draw(2, 3, 3, 3).requires_grad_()

    def call(x: Tensor, weight: Tensor, gamma: Tensor) -> Tensor:
        changed = {"weight": weight, "bn.weight": gamma}
        result: Tensor = torch.func.functional_call(module, changed, (x,))
        return result

    weight = draw(*module.weight.shape, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(call, (x, weight, draw(3, seed=5).requires_grad_()))


class Operations(TorchDispatchMode):
    """Notes what is computed; views are no computation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return result


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("kind", "extra"), [("straight", ["add"]), ("gather", ["index_select", "add"])])
def test_what_the_skip_costs(kind: str, extra: list[str], stride: int) -> None:
    """Beside the convolution and its BatchNorm: an identity map is one addition, at any stride."""
    conv = nn.Conv2d(4, 4, 3, stride=stride, padding=1, bias=False)
    rows = torch.arange(4)
    m = PathBN(conv, nn.BatchNorm2d(4), rows, rows if kind == "straight" else rows.flip(0), torch.ones(4), 1.0)
    m, x = m.eval(), torch.randn(2, 4, 8, 8)
    with torch.no_grad(), Operations() as seen:
        m(x)
    own = ("convolution", "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training")
    of_the_weight = ("new_zeros", "zeros", "index_put", "_index_put_impl_", "empty_like", "clone", "fill_", "empty")
    assert [name for name in seen.names if name not in own + of_the_weight] == extra, seen.names


# ---- statistics ----------------------------------------------------------------------------------------------------


def test_calibration_is_streamed_and_weighted_by_count(resnet: tuple[nn.Module, Tensor]) -> None:
    model, x = resnet
    conversion = pathconvert.reparameterize(model, x)
    whole = pathconvert.to_path_bn(conversion, x, calibration=x)
    uneven = pathconvert.to_path_bn(conversion, x, calibration=iter([x[:1], x[1:6], x[6:]]))
    assert uneven.path_record["path_bn"]["calibration"] == {"source": "images", "images": 8}
    for name, module in layers(whole).items():
        for statistic in ("running_mean", "running_var"):
            a, b = (getattr(one, statistic) for one in (layers(uneven)[name].bn, module.bn))
            assert error(a, b) < 1e-12, (name, statistic)


def test_statistics_are_summed_in_float64() -> None:
    """Float32 sums of a thousand batches far from zero would lose the variance."""
    moments, truth = _Moments(), []
    for seed in range(1000):
        truth.append((draw(2, 1, 3, seed=seed) + 3000).float())
        moments.add(truth[-1])
    var, mean = torch.var_mean(torch.cat(truth).double(), correction=0)
    assert moments.mean.dtype == moments.var.dtype == torch.float64
    assert error(moments.mean, mean) < 1e-13
    assert error(moments.var, var) < 1e-9  # mean² / var is 1e7, of float64's 1e-16


def test_statistics_are_those_of_the_off_pivot_sum(resnet: tuple[nn.Module, Tensor]) -> None:
    model, x = resnet
    m = pathconvert.to_path_bn(model, x, calibration=x)
    sums: dict[str, Tensor] = {}
    for name, module in layers(m).items():
        module.bn.register_forward_pre_hook(lambda _, args, name=name: sums.update({name: args[0]}))
    m(x)
    for name, module in layers(m).items():
        var, mean = torch.var_mean(sums[name], (0, 2, 3), correction=0)
        assert error(module.bn.running_var, var) < 1e-12
        assert error(module.bn.running_mean, mean) < 1e-12


@pytest.fixture(scope="module")
def estranged() -> tuple[nn.Module, Tensor]:
    """A network whose running statistics are those of other images, twice as bright, and images of its own."""
    x = draw(16, 3, 64, 64, seed=5)
    return with_statistics_of(randomised_resnet(), 2 * x.flip(0) + 0.3), x


@pytest.mark.parametrize("scope", ["block", "network"])
def test_training_mode_begins_as_it_was(estranged: tuple[nn.Module, Tensor], scope: str) -> None:
    """Within 1 % of the training-mode loss: the pivots alone keep the scale that running statistics gave them."""
    model, x = estranged
    m = pathconvert.to_path_bn(pathconvert.reparameterize(model, x, scope=scope), x, calibration=iter(x.split(5)))
    target = torch.arange(16) % 7
    before, after = (F.cross_entropy(output(one, x, training=True), target) for one in (model, m))
    served = F.cross_entropy(output(model, x), target)
    assert error(served, before) > 0.05, "the test needs running statistics that are not those of the images"
    assert error(after, before) < 0.01
    assert error(output(m, x), output(model, x)) < 1e-10


def test_training_mode_can_begin_with_what_is_served(estranged: tuple[nn.Module, Tensor]) -> None:
    model, x = estranged
    conversion = pathconvert.reparameterize(model, x, scope="network")
    m = pathconvert.to_path_bn(conversion, x, calibration=x, begin="evaluation")
    for module in layers(m).values():  # the ordinary BatchNorms before the first pivots stay in evaluation mode
        module.bn.train()
    with torch.no_grad():
        assert error(m(x), output(model, x)) < 1e-9


def test_another_beginning_is_refused() -> None:
    model, x = geometry("3x3")
    with pytest.raises(PathconvertError, match="begin is 'anew'"):
        pathconvert.to_path_bn(model, x, calibration=x, begin="anew")


def test_a_constant_channel_keeps_its_statistics() -> None:
    """γ = 0: the output tells nothing of the sum, and no statistic is NaN."""
    model, x = geometry("3x3")
    with torch.no_grad():
        model[4].weight[2] = 0
    m = pathconvert.to_path_bn(model, x, calibration=x)
    assert all(t.isfinite().all() for t in m.state_dict().values())
    assert error(output(m, x), output(model, x)) < 1e-10


def test_the_gaussian_estimate_is_near_the_measured_one(resnet: tuple[nn.Module, Tensor]) -> None:
    """Within a third of the deviation in the median: a start for training, recorded as an estimate."""
    model, x = resnet
    conversion = pathconvert.reparameterize(model, x)
    measured, estimated = (pathconvert.to_path_bn(conversion, x, calibration=images) for images in (x, None))
    assert estimated.path_record["path_bn"]["calibration"] == {"source": "gaussian"}
    for name, module in layers(measured).items():
        ratio = (layers(estimated)[name].bn.running_var / module.bn.running_var).sqrt()
        assert 0.75 < float(ratio.median()) < 1.33, name
        shift = (layers(estimated)[name].bn.running_mean - module.bn.running_mean) / module.bn.running_var.sqrt()
        assert float(shift.abs().median()) < 0.34, name


def test_refusals() -> None:
    x = draw(2, 3, 64, 64)
    with pytest.raises(
        PathconvertError, match="SqueezeNet has no BatchNorm to estimate Path-BN's statistics from"
    ) as e:
        pathconvert.to_path_bn(network("squeezenet1_1", torch.float64), x)
    assert "--calibrate DIR" in e.value.tip
    resnet18 = network("resnet18", torch.float64)
    with pytest.raises(PathconvertError, match="skip_scale is 0, and has to be positive"):
        pathconvert.to_path_bn(resnet18, x, skip_scale=0)
    with pytest.raises(PathconvertError, match="the calibration gave no image"):
        pathconvert.to_path_bn(resnet18, x, calibration=[])
    for calibration, message in (
        (3, "the calibration is a int, not images"),
        ("photos", "the calibration is a str, not images"),
        (["a.png", "b.png"], "a calibration batch is a str, not images"),
        ([torch.ones(())], "a calibration batch is a Tensor, not images"),
        (torch.ones(4, 5), "the network cannot run on a calibration batch of 4×5: "),
    ):
        with pytest.raises(PathconvertError, match=message) as e:
            pathconvert.to_path_bn(resnet18, x, calibration=calibration)
        assert "--calibrate DIR" in e.value.tip
    m = pathconvert.to_path_bn(resnet18, x)
    for enter in (pathconvert.to_path_bn, pathconvert.reparameterize):
        with pytest.raises(PathconvertError, match="the network is in Path-BN form already"):
            enter(m, x)
    with pytest.raises(RecordError, match="this ResNet holds no conversion record"):
        pathconvert.leave_path_bn(resnet18)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).double()
    with pytest.raises(PathconvertError, match="no layer of Sequential can take Path-BN"):
        pathconvert.to_path_bn(linear, draw(2, 3, 2, 2))


class Reasons(nn.Module):
    """One layer for each reason to be left."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.transposed = nn.ConvTranspose2d(4, 5, 2, stride=2)
        self.free = nn.Parameter(torch.ones(6, 5, 1, 1))
        self.twice = nn.Conv2d(6, 7, 1)
        self.no_bias = nn.Conv2d(7, 8, 1, bias=False)
        self.tokens = nn.Linear(8, 9)
        self.last = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.transposed(F.relu(self.first(x))))
        x = F.relu(F.conv2d(x, self.free))
        x = F.relu(self.no_bias(F.relu(self.twice(x))))
        return self.last(F.relu(self.tokens(x.flatten(2).transpose(1, 2))))


def test_skip_scale_is_read_only() -> None:
    """Only to_path_bn sets it: the pivots' size goes with it."""
    model, x = geometry("3x3")
    module = layers(pathconvert.to_path_bn(model, x, calibration=x, skip_scale=0.1))["3"]
    assert module.skip_scale == 0.1
    with pytest.raises(AttributeError):
        module.skip_scale = 1.0


def test_wrappers_are_taken_off() -> None:
    model, x = geometry("3x3")
    m = pathconvert.to_path_bn(nn.DataParallel(torch.compile(model, backend="eager")), x, calibration=x)
    left = pathconvert.leave_path_bn(torch.compile(m, backend="eager"))
    assert list(left.state_dict()) == list(model.state_dict())
    assert error(output(left, x), output(model, x)) < 1e-10
    conversion = pathconvert.reparameterize(torch.compile(model, backend="eager"), x)
    assert list(conversion.model.state_dict()) == list(model.state_dict())
    restored = pathconvert.restore(torch.compile(conversion.model, backend="eager"), conversion.record)
    assert error(output(restored, x), output(model, x)) < 1e-10


def test_pivots_that_float16_does_not_hold_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).half()
    with torch.no_grad():
        model[2].weight.mul_(1e-5)
    x = draw(4, 3, 5, 5).half()
    with pytest.raises(
        PathconvertError, match="2: its pivots are held back: their factors leave the range of float16"
    ) as e:
        pathconvert.to_path_bn(model, x, calibration=x)
    assert e.value.tip == "Convert the checkpoint to float32 first."


def test_what_is_left_has_a_reason() -> None:
    model, x = randomised(Reasons()), draw(2, 3, 6, 6)
    m = pathconvert.to_path_bn(model, x, calibration=x)
    assert m.path_record["path_bn"]["left"] == {
        "first": NO_PIVOT,
        "transposed": "is a transposed convolution, whose skip would be spread over the output",
        "free": "is computed by Reasons, not by a convolution or linear layer of torch",
        "no_bias": "has neither BatchNorm nor bias, and no BatchNorm after it takes up the bias that Path-BN leaves",
        "tokens": "reads 3 dimensions, and BatchNorm wants 2",
        "last": "is the last layer: no normalization comes before an output",
    }
    assert list(layers(m)) == ["twice"]
    assert error(output(m, x), output(model, x)) < 1e-10


class Odd(nn.Module):
    """A convolution with everything around it that may go wrong, by name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(6, 6, 3, padding=1, bias=kind != "bias behind a ReLU")
        self.bn = ActivatedNorm(6) if kind == "own BatchNorm" else nn.BatchNorm2d(6)
        self.other = nn.BatchNorm2d(6)
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.norm(self.first(x)))
        if self.kind == "bias behind a ReLU":
            y = F.relu(self.conv(z))
            y = self.bn(y) + self.other(y)
        elif self.kind == "weight read elsewhere":
            y = self.bn(self.conv(z)) + self.other(F.conv2d(z.flip(2), self.conv.weight, padding=1))
        elif self.kind == "by keyword":
            y = self.bn(input=self.conv(input=z)) / self.conv.out_channels
        else:
            y = self.bn(self.conv(z))
        y = self.last(F.relu(y).mean((2, 3)))
        return y.softmax(1) if self.kind == "softmax" else y


class ActivatedNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        ("own BatchNorm", "is followed by bn (ActivatedNorm), which is no BatchNorm of torch's own"),
        ("weight read elsewhere", "has a weight that other code reads too"),
        (
            "bias behind a ReLU",
            "has neither BatchNorm nor bias, and no BatchNorm after it takes up the bias that Path-BN leaves",
        ),
    ],
)
def test_what_would_change_the_function_is_left(kind: str, left: str) -> None:
    model, x = randomised(Odd(kind)), draw(2, 3, 6, 6)
    if kind == "bias behind a ReLU":  # nothing of it reaches the output now; after training it would
        nn.init.zeros_(model.bn.weight)
        nn.init.zeros_(model.other.weight)
    with pytest.raises(PathconvertError, match="no layer of Odd can take Path-BN") as refusal:
        pathconvert.to_path_bn(model, x, calibration=x)
    assert f"conv: {left}" in str(refusal.value)


@pytest.mark.parametrize("kind", ["by keyword", "softmax"])
def test_what_is_odd_but_right(kind: str) -> None:
    model, x = randomised(Odd(kind)), draw(2, 3, 6, 6)
    m = pathconvert.to_path_bn(model, x, calibration=x)
    assert list(layers(m)) == ["conv"]  # the classifier before a softmax is none either
    assert error(output(m, x), output(model, x)) < 1e-10


def test_variances_that_float16_does_not_hold() -> None:
    model, x = randomised(Odd("plain")), draw(2, 3, 6, 6)
    with torch.no_grad():  # sums of 1e3, variances of 1e6
        for tensor in (model.conv.weight, model.bn.running_mean):
            tensor.mul_(1e3)
        model.bn.running_var.mul_(1e3).mul_(10)
    model, x = model.half(), x.half()
    m = pathconvert.to_path_bn(model, x, calibration=x)
    assert torch.isfinite(m(x)).all()
    assert error(m.double()(x.double()), model.double()(x.double())) < 0.05  # float16 rounds by 5e-4, often


def test_frozen_layers_stay_frozen() -> None:
    model, x = network("squeezenet1_1", torch.float64), draw(2, 3, 64, 64)
    model.requires_grad_(False).train()
    m = pathconvert.to_path_bn(model, x, calibration=x)
    assert not any(parameter.requires_grad for parameter in m.parameters())
    assert all(module.training for module in m.modules())


def test_a_guard_refuses_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PathBN, "_add_skip", lambda *tensors: tensors[1])
    x = draw(2, 3, 64, 64)
    with pytest.raises(EquivalenceError, match="Path-BN form changed the network's output"):
        pathconvert.to_path_bn(network("resnet18", torch.float64), x)


# ---- the rest of PyTorch -------------------------------------------------------------------------------------------


@pytest.fixture
def small() -> tuple[nn.Module, Tensor]:
    """Path-BN with a gather and with a scatter, float32."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 6), nn.ReLU(),
        nn.Linear(6, 3),
    )  # fmt: skip
    x = draw(4, 3, 10, 10)
    return pathconvert.to_path_bn(randomised(model), x, calibration=x).float(), x.float()


def test_deepcopy_and_state_dict(small: tuple[nn.Module, Tensor]) -> None:
    m, x = small
    twin = copy.deepcopy(m)
    assert torch.equal(twin(x), m(x))
    other = pathconvert.to_path_bn(pathconvert.leave_path_bn(m), x, calibration=x)
    other.load_state_dict(m.state_dict())
    assert torch.equal(other(x), m(x))


def test_sync_batch_norm_and_channels_last(small: tuple[nn.Module, Tensor]) -> None:
    m, x = small
    expected = m(x)
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(m))
    assert all(isinstance(module.bn, nn.SyncBatchNorm) for name, module in layers(sync).items() if name != "10")
    assert torch.equal(pathconvert.leave_path_bn(sync.eval())(x), pathconvert.leave_path_bn(m)(x))
    last = copy.deepcopy(m).to(memory_format=torch.channels_last)
    assert error(last(x.to(memory_format=torch.channels_last)), expected) < 1e-5  # float32, another summation order
    last.train()(x).sum().backward()


def test_autocast(small: tuple[nn.Module, Tensor]) -> None:
    m, x = small
    with torch.autocast("cpu", torch.bfloat16):
        assert error(m(x).float(), m.float()(x)) < 0.05  # bfloat16 rounds by 2^-9, a few times
        m.train()(x).float().sum().backward()


def test_compile_and_export(small: tuple[nn.Module, Tensor]) -> None:
    """No graph break: fullgraph raises at one. The compiler itself is left out, tracing is what is tested."""
    m, x = small
    compiled = torch.compile(m.train(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), copy.deepcopy(m)(x))
    program = torch.export.export(m.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(x[:3]), m(x[:3]))


def test_half_precision_and_devices(small: tuple[nn.Module, Tensor]) -> None:
    m, x = small
    assert error(copy.deepcopy(m).bfloat16()(x.bfloat16()).float(), m(x)) < 0.05
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the CPU part passed")
    torch.testing.assert_close(m.cuda()(x.cuda()).cpu(), m.cpu()(x), rtol=1e-3, atol=1e-3)


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_save_and_load(tmp_path: Any, suffix: str) -> None:
    model, x = network("resnet18"), draw(2, 3, 64, 64).float()
    m = pathconvert.to_path_bn(pathconvert.reparameterize(model, x, pivot="max"), x, skip_scale=0.1)
    path = pathconvert.save(m, tmp_path / f"net.path-bn.{suffix}")
    loaded, record = pathconvert.load(path)
    assert record["form"] == "path-bn"
    assert record == loaded.path_record
    assert torch.equal(loaded(x), m(x))
    assert torch.equal(copy.deepcopy(loaded).train()(x), copy.deepcopy(m).train()(x))
    restored = pathconvert.restore(loaded, record)
    report = pathconvert.verify(model, restored, x)
    assert report.passed, report


def test_a_newer_or_foreign_record_is_refused(tmp_path: Any) -> None:
    from test_files import change_metadata

    m = pathconvert.to_path_bn(network("resnet18"), draw(2, 3, 64, 64).float())
    path = pathconvert.save(m, tmp_path / "net.safetensors")
    change_metadata(path, lambda metadata: metadata["record"]["path_bn"].update(format_version=2))
    with pytest.raises(RecordError, match="the Path-BN record has format version 2"):
        pathconvert.load(path)
    change_metadata(
        path, lambda metadata: metadata["record"]["path_bn"].update(format_version=1, layers=[{"name": "x"}])
    )
    with pytest.raises(RecordError, match="the Path-BN record is not of this network"):
        pathconvert.load(path)
