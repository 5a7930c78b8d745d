"""Entering Path-BN form: the statistics, which layers take it, and why others do not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from path_bn_networks import (
    draw,
    error,
    geometry,
    layers,
    output,
    randomised,
    randomised_resnet,
    resnet_and_images,
    with_statistics_of,
)
from sample_networks import network
from torch import Tensor, nn

import pathconvert
from pathconvert.errors import EquivalenceError, PathconvertError, RecordError
from pathconvert.path_bn.candidates import NO_PIVOT
from pathconvert.path_bn.layer import PathBN
from pathconvert.path_bn.statistics import _Moments


@pytest.fixture
def resnet() -> tuple[nn.Module, Tensor]:
    return resnet_and_images()


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
    assert error(moments.var, var) < 1e-9  # mean² / var is 1e7, and float64 rounds by 1e-16


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
    """A network whose running statistics come from images that are twice as bright, and images for
    it.
    """
    x = draw(16, 3, 64, 64, seed=5)
    return with_statistics_of(randomised_resnet(), 2 * x.flip(0) + 0.3), x


@pytest.mark.parametrize("scope", ["block", "network"])
def test_training_mode_begins_as_it_was(estranged: tuple[nn.Module, Tensor], scope: str) -> None:
    """Within 1 % of the training-mode loss: only the pivots keep the scale that running statistics
    gave them.
    """
    model, x = estranged
    m = pathconvert.to_path_bn(
        pathconvert.reparameterize(model, x, scope=scope), x, calibration=iter(x.split(5))
    )
    target = torch.arange(16) % 7
    before, after = (F.cross_entropy(output(one, x, training=True), target) for one in (model, m))
    served = F.cross_entropy(output(model, x), target)
    assert error(served, before) > 0.05, (
        "the test needs running statistics that are not those of the images"
    )
    assert error(after, before) < 0.01
    assert error(output(m, x), output(model, x)) < 1e-10


def test_training_mode_can_begin_with_what_is_served(estranged: tuple[nn.Module, Tensor]) -> None:
    model, x = estranged
    conversion = pathconvert.reparameterize(model, x, scope="network")
    m = pathconvert.to_path_bn(conversion, x, calibration=x, begin="evaluation")
    for module in layers(
        m
    ).values():  # the ordinary BatchNorms before the first pivots stay in evaluation mode
        module.bn.train()
    with torch.no_grad():
        assert error(m(x), output(model, x)) < 1e-9


def test_another_beginning_is_refused() -> None:
    model, x = geometry("3x3")
    with pytest.raises(PathconvertError, match="begin is 'anew'"):
        pathconvert.to_path_bn(model, x, calibration=x, begin="anew")


def test_a_constant_channel_keeps_its_statistics() -> None:
    """γ = 0: the output does not depend on the sum, and no statistic is NaN."""
    model, x = geometry("3x3")
    with torch.no_grad():
        model[4].weight[2] = 0
    m = pathconvert.to_path_bn(model, x, calibration=x)
    assert all(t.isfinite().all() for t in m.state_dict().values())
    assert error(output(m, x), output(model, x)) < 1e-10


def test_the_gaussian_estimate_is_near_the_measured_one(resnet: tuple[nn.Module, Tensor]) -> None:
    """The median error is below a third of the deviation: good enough to begin training.

    Recorded as an estimate.
    """
    model, x = resnet
    conversion = pathconvert.reparameterize(model, x)
    measured, estimated = (
        pathconvert.to_path_bn(conversion, x, calibration=images) for images in (x, None)
    )
    assert estimated.path_record["path_bn"]["calibration"] == {"source": "gaussian"}
    for name, module in layers(measured).items():
        ratio = (layers(estimated)[name].bn.running_var / module.bn.running_var).sqrt()
        assert 0.75 < float(ratio.median()) < 1.33, name
        shift = (
            layers(estimated)[name].bn.running_mean - module.bn.running_mean
        ) / module.bn.running_var.sqrt()
        assert float(shift.abs().median()) < 0.34, name


def test_refusals() -> None:
    x = draw(2, 3, 64, 64)
    with pytest.raises(
        PathconvertError, match="SqueezeNet has no BatchNorm to estimate Path-BN's statistics from"
    ) as e:
        pathconvert.to_path_bn(network("squeezenet1_1", torch.float64), x)
    assert "--calibrate DIR" in e.value.tip
    resnet18 = network("resnet18", torch.float64)
    with pytest.raises(PathconvertError, match="skip_scale is 0 but must be positive"):
        pathconvert.to_path_bn(resnet18, x, skip_scale=0)
    with pytest.raises(PathconvertError, match="the calibration contains no images"):
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
    """A network with one layer for each reason not to take Path-BN form."""

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
    """Only to_path_bn sets it, as the size of the pivots depends on it."""
    model, x = geometry("3x3")
    module = layers(pathconvert.to_path_bn(model, x, calibration=x, skip_scale=0.1))["3"]
    assert module.skip_scale == 0.1
    with pytest.raises(AttributeError):
        module.skip_scale = 1.0


def test_wrappers_are_taken_off() -> None:
    model, x = geometry("3x3")
    m = pathconvert.to_path_bn(
        nn.DataParallel(torch.compile(model, backend="eager")), x, calibration=x
    )
    left = pathconvert.leave_path_bn(torch.compile(m, backend="eager"))
    assert list(left.state_dict()) == list(model.state_dict())
    assert error(output(left, x), output(model, x)) < 1e-10
    conversion = pathconvert.reparameterize(torch.compile(model, backend="eager"), x)
    assert list(conversion.model.state_dict()) == list(model.state_dict())
    restored = pathconvert.restore(
        torch.compile(conversion.model, backend="eager"), conversion.record
    )
    assert error(output(restored, x), output(model, x)) < 1e-10


def test_pivots_that_float16_does_not_hold_are_named() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)
    ).half()
    with torch.no_grad():
        model[2].weight.mul_(1e-5)
    x = draw(4, 3, 5, 5).half()
    with pytest.raises(
        PathconvertError,
        match="2: its pivots are held back: their factors leave the range of float16",
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
        "no_bias": (
            "has neither BatchNorm nor bias, and no BatchNorm after it takes up the bias that"
            " Path-BN leaves"
        ),
        "tokens": "reads inputs of 3 dimensions, but its BatchNorm needs 2",
        "last": "is the last layer: no normalization comes before an output",
    }
    assert list(layers(m)) == ["twice"]
    assert error(output(m, x), output(model, x)) < 1e-10


class Odd(nn.Module):
    """A convolution with one obstacle to Path-BN form, chosen by name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(6, 6, 3, padding=1, bias=kind != "bias behind a ReLU")
        self.bn = GatedNorm(6) if kind == "own BatchNorm" else nn.BatchNorm2d(6)
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


class GatedNorm(nn.BatchNorm2d):
    """Reads γ for something else than normalising, too."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.weight.sigmoid().view(1, -1, 1, 1)


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        (
            "own BatchNorm",
            (
                "is followed by bn (GatedNorm), which is not a BatchNorm of torch with something"
                " after it"
            ),
        ),
        ("weight read elsewhere", "has a weight that other code reads too"),
        (
            "bias behind a ReLU",
            (
                "has neither BatchNorm nor bias, and no BatchNorm after it takes up the bias that"
                " Path-BN leaves"
            ),
        ),
    ],
)
def test_what_would_change_the_function_is_left(kind: str, left: str) -> None:
    model, x = randomised(Odd(kind)), draw(2, 3, 6, 6)
    if kind == "bias behind a ReLU":  # it does not reach the output now, but would after training
        nn.init.zeros_(model.bn.weight)
        nn.init.zeros_(model.other.weight)
    with pytest.raises(PathconvertError, match="no layer of Odd can take Path-BN") as refusal:
        pathconvert.to_path_bn(model, x, calibration=x)
    assert f"conv: {left}" in str(refusal.value)


@pytest.mark.parametrize("kind", ["by keyword", "softmax"])
def test_what_is_odd_but_right(kind: str) -> None:
    model, x = randomised(Odd(kind)), draw(2, 3, 6, 6)
    m = pathconvert.to_path_bn(model, x, calibration=x)
    # the classifier before a softmax does not take the form either
    assert list(layers(m)) == ["conv"]
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
    # float16 rounds by 5e-4, often
    assert error(m.double()(x.double()), model.double()(x.double())) < 0.05


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
