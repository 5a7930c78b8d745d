"""Tiny and huge numbers, empty batches, sides of size 0: finite and right, or refused by name."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathconvert
from pathconvert.cli import run
from pathconvert.errors import EquivalenceError, PathconvertError
from pathconvert.export import export_onnx, fold

BUILDER = """
import torch.nn.functional as F
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.c2, self.b2 = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.b2(self.c2(F.relu(self.b1(self.c1(x))))))
        return self.fc(x.mean((2, 3)))
"""
ARCH = ("--arch", "extreme_nets:Net", "--input-size", "3x12x12")
#: Largest error in float64, relative to the largest output: float32 rounds each weight by 6e-8, and
#: a few layers add up.
ROUNDING = 2e-6


@pytest.fixture(autouse=True)
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module ``extreme_nets``, in the current folder."""
    (tmp_path / "extreme_nets.py").write_text(BUILDER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "extreme_nets", raising=False)
    return __import__("extreme_nets")


@torch.no_grad()
def built(nets: Any, change: Callable[[Any], Any] = lambda _: None) -> nn.Module:
    torch.manual_seed(0)
    model = nets.Net().eval()
    for module in (model.b1, model.b2):
        module.weight.uniform_(0.5, 1.5)
        module.bias.normal_(0, 0.2)
        module.running_mean.normal_(0, 0.2)
        module.running_var.uniform_(0.5, 1.5)
    change(model)
    return model


def draw(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def error(model: nn.Module, original: nn.Module, x: Tensor) -> float:
    got, wanted = (copy.deepcopy(one).double().eval()(x.double()) for one in (model, original))
    return float((got - wanted).abs().max() / wanted.abs().max())


def assert_finite(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        assert bool(tensor.isfinite().all()), name


#: What makes a network extreme; float32 ends at 1.2e-38 (normal numbers) and 3.4e38.
EXTREME = {
    "one tiny gamma": lambda m: m.b1.weight[0].fill_(1e-38),
    "one subnormal gamma": lambda m: m.b1.weight[0].fill_(1e-44),
    "tiny gammas": lambda m: m.b1.weight.fill_(1e-38),
    "tiny variances": lambda m: m.b1.running_var.fill_(1e-38),
    "tiny variances, no eps": lambda m: (m.b1.running_var.fill_(1e-38), setattr(m.b1, "eps", 0.0)),
    "huge variances": lambda m: m.b1.running_var.fill_(1e38),
    "huge first weights": lambda m: m.c1.weight.mul_(1e30),
    "huge second weights": lambda m: m.c2.weight.mul_(1e30),
    "one huge weight": lambda m: m.c2.weight[0, 0].fill_(1e30),
    "huge last weights": lambda m: m.fc.weight.mul_(1e30),
    "tiny gamma, huge weights": lambda m: (m.b1.weight.fill_(1e-38), m.c2.weight.mul_(1e30)),
}


@pytest.mark.parametrize("change", EXTREME.values(), ids=EXTREME)
def test_extreme_numbers_are_converted(nets: Any, change: Any) -> None:
    model, x = built(nets, change), draw()
    for gauge in ("unit", "pow2"):
        conversion = pathconvert.reparameterize(model, x, gauge=gauge)
        assert_finite(conversion.model)
        assert pathconvert.verify(model, conversion.model, x).passed
        assert error(conversion.model, model, x) <= ROUNDING
        restored = pathconvert.restore(conversion.model, conversion.record)
        assert error(restored, model, x) <= ROUNDING
    folded = fold(model, x)
    assert_finite(folded)
    assert error(folded, model, x) <= ROUNDING
    export_onnx(model, "x.onnx", x)  # which compares the file


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("change", EXTREME.values(), ids=EXTREME)
def test_extreme_numbers_enter_path_bn_or_are_refused(
    nets: Any, change: Any, calibrated: bool
) -> None:
    model, x = built(nets, change), draw()
    try:
        form = pathconvert.to_path_bn(model, x, calibration=x if calibrated else None)
    except PathconvertError as refusal:
        assert "c2: its pivots are held back" in str(refusal)  # noqa: PT017 - or it does not raise
        return
    assert_finite(form)
    assert error(form, model, x) <= ROUNDING


# ---- not finite ----------------------------------------------------------------------------------


NOT_FINITE = {
    "gamma": (lambda m: m.b1.weight[0].fill_(torch.nan), "b1"),
    "weight": (lambda m: m.fc.weight[0, 0].fill_(torch.inf), "fc"),
    "variance": (lambda m: (m.b1.running_var[0].fill_(0), setattr(m.b1, "eps", 0.0)), "b1"),
    "overflow": (lambda m: (m.c1.weight.mul_(1e38), m.b1.weight.mul_(1e30)), "b1"),
}


@pytest.mark.parametrize(("change", "layer"), NOT_FINITE.values(), ids=NOT_FINITE)
def test_a_network_that_is_not_finite_is_refused_by_the_name_of_its_layer(
    nets: Any, change: Any, layer: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = built(nets, change)
    torch.save(model.state_dict(), "m.pt")
    eps = model.b1.eps
    monkeypatch.setattr(nets, "Net", with_eps(nets.Net, eps))
    assert run(["reparam", "m.pt", *ARCH, "-o", "x.safetensors"]) in (1, 2)
    message = capsys.readouterr().err
    assert layer in message
    assert "finite" in message
    assert not Path("x.safetensors").exists()


def with_eps(builder: Callable[[], Any], eps: float) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model: nn.Module = builder()
        model.b1.eps = eps
        return model

    return build


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_no_file_of_a_network_that_is_not_finite_is_saved(nets: Any, value: float) -> None:
    conversion = pathconvert.reparameterize(built(nets), draw())
    conversion.model.get_parameter("fc.bias").data[0] = value
    with pytest.raises(PathconvertError) as refusal:
        pathconvert.save(conversion, "x.safetensors")
    assert str(refusal.value) == (
        "fc.bias contains numbers that are not finite, so the network is not saved"
    )
    assert not Path("x.safetensors").exists()


def test_an_export_in_which_float32_overflows_is_refused(nets: Any) -> None:
    model = built(nets, lambda m: (m.b1.weight.mul_(1e30), m.c2.weight.mul_(1e30)))
    with pytest.raises(EquivalenceError) as refusal:
        export_onnx(model, "x.onnx", draw())
    assert str(refusal.value) == "the network's own outputs are not finite in float32"
    assert not Path("x.onnx").exists()


# ---- nothing to compute on -----------------------------------------------------------------------


def test_an_empty_batch_proves_nothing(nets: Any) -> None:
    model, empty = built(nets), draw()[:0]
    conversion = pathconvert.reparameterize(model, empty)  # only shapes matter
    assert error(conversion.model, model, draw()) <= ROUNDING
    for other in (conversion.model, nets.Net().eval()):
        with pytest.raises(EquivalenceError) as refusal:
            pathconvert.verify(model, other, empty)
        assert str(refusal.value) == (
            "there is nothing to compare, because all outputs of the networks are empty"
        )
    with pytest.raises(PathconvertError, match="the calibration contains no images"):
        pathconvert.to_path_bn(model, draw(), calibration=empty)
    export_onnx(model, "x.onnx", empty)  # is compared on other batches
    with pytest.raises(EquivalenceError, match=r"^there is nothing to compare the file on, "):
        export_onnx(model, "y.onnx", empty, dynamic_batch=False)
    assert not Path("y.onnx").exists()


def test_inputs_that_a_network_does_not_take_are_refused_by_the_layer(nets: Any) -> None:
    model = built(nets)
    for x in (draw()[:, :, :0], draw()[:, :0], draw()[:, :2], draw()[0, 0, 0]):
        with pytest.raises(PathconvertError, match=r"^Net cannot run on these inputs, in c1: "):
            pathconvert.verify(model, model, x)
        with pytest.raises(PathconvertError):
            pathconvert.reparameterize(model, x)
        with pytest.raises(PathconvertError):
            fold(model, x)


class Headless(nn.Module):
    """One of its layers has no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.none, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 0), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c1(x)).mean((2, 3))
        return torch.cat([self.fc(x), self.none(x)], 1)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_rows() -> None:
    torch.manual_seed(0)
    model, x = Headless().eval(), draw()
    conversion = pathconvert.reparameterize(model, x)
    assert pathconvert.verify(model, conversion.model, x).passed
    assert error(fold(model, x), model, x) <= ROUNDING


def test_float64_networks_beyond_the_range_of_float32_have_their_own_noise(nets: Any) -> None:
    def change(m: Any) -> None:
        m.double()
        m.c2.weight.mul_(1e-200)
        m.b2.running_var.fill_(1e-300)
        m.b2.eps = 0.0
        m.b2.running_mean.fill_(0)
        m.b2.weight.mul_(1e50)

    model, x = built(nets, change), draw().double()
    conversion = pathconvert.reparameterize(model, x)
    assert pathconvert.verify(model, conversion.model, x).passed
    wrong = copy.deepcopy(conversion.model)
    wrong.get_parameter("fc.weight").data[0, 0] *= 1 + 1e-9
    assert not pathconvert.verify(model, wrong, x).passed


def test_a_layer_without_channels_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(5, 0), nn.ReLU(), nn.Linear(0, 3)).double()
    inputs = torch.randn(2, 5, dtype=torch.float64)
    conversion = pathconvert.reparameterize(model, inputs)
    assert torch.equal(conversion.model(inputs), model(inputs))


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model[2].weight[0, 1] = float("nan")
    with pytest.raises(pathconvert.errors.PathconvertError) as refused:
        pathconvert.reparameterize(model, torch.randn(2, 5))
    assert str(refused.value) == "2.weight has NaN or infinite values"


def test_an_example_with_an_empty_side_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with pytest.raises(pathconvert.errors.TraceError) as refused:
        pathconvert.reparameterize(model, torch.randn(2, 3, 0, 4))
    assert str(refused.value) == "the example input is empty: its size is 2×3×0×4"
