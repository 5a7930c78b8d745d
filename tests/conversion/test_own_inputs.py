"""Forwards that change their input: every run gets its own copy, and the caller's tensor stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from small_export import ort_run
from torch import Tensor, nn

import pathconvert
from pathconvert.conversion.equivalence import forward_outputs
from pathconvert.export import export_onnx, fold
from pathconvert.export.runtime.engines import Engine, torch_engine
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.loading import LoadedNetwork
from pathconvert.networks.preprocessing import Preprocessing


def subtracted(x: Tensor) -> None:
    x -= 0.45


def halved(x: Tensor) -> None:
    x.div_(2)


def view_doubled(x: Tensor) -> None:
    x[:, :1] *= 2


CHANGES = [subtracted, halved, view_doubled]


class Changes(nn.Module):
    """A small classifier whose forward first changes its input in place."""

    def __init__(self, change: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.change = change
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        )  # fmt: skip
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.change(x)
        return self.fc(self.body(x).mean((2, 3)))


@pytest.fixture(params=CHANGES, ids=lambda change: change.__name__)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return Changes(request.param).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def expected(model: nn.Module, x: Tensor) -> Tensor:
    return copy.deepcopy(model).double()(x.double().clone())


#: Largest difference of float32's results to float64's, relative to the largest: a few layers round
#: by 6e-8 each.
ROUNDING = 1e-5


def assert_right(output: Tensor, model: nn.Module, x: Tensor) -> None:
    wanted = expected(model, x)
    assert float((output.double() - wanted).abs().max()) <= ROUNDING * float(wanted.abs().max())


def test_conversion_and_verification(model: nn.Module, x: Tensor) -> None:
    given = x.clone()
    conversion = pathconvert.reparameterize(model, given, scope="network")
    assert conversion.counts()["channels_rescaled"] == 20
    assert pathconvert.verify(model, conversion.model, given).passed
    assert pathconvert.verify(model, conversion.model, given, training=True).max_rel < 1e-3
    wrong = copy.deepcopy(conversion.model)
    wrong.get_parameter("fc.weight").data[0, 0] *= 1.05
    assert pathconvert.verify(model, wrong, given).noise_ratio > 100  # not lost in the noise
    assert torch.equal(given, x)
    assert_right(forward_outputs(conversion.model, given)[0], model, x)
    assert torch.equal(given, x)


@pytest.mark.parametrize("batches", [False, True], ids=["tensor", "batches"])
def test_path_bn(model: nn.Module, x: Tensor, batches: bool) -> None:
    given = x.clone()
    calibration = [given[:2], given[2:]] if batches else given
    form = pathconvert.to_path_bn(model, given, calibration)
    assert torch.equal(given, x)
    assert_right(forward_outputs(form, given)[0], model, x)
    # calibrated with the images as they were given: the same as a twin that is given changed ones
    twin, changed = copy.deepcopy(model), x.clone()
    model.change(changed)
    twin.change = lambda _: None
    wanted = pathconvert.to_path_bn(twin, changed, changed.split(2) if batches else changed)
    assert all(torch.equal(t, wanted.state_dict()[name]) for name, t in form.state_dict().items())


def test_fold(model: nn.Module, x: Tensor) -> None:
    given = x.clone()
    folded = fold(model, given)
    assert torch.equal(given, x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert_right(forward_outputs(folded, x)[0], model, x)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("gauge", ["keep", "balanced"])
def test_export(model: nn.Module, x: Tensor, tmp_path: Path, dynamic: bool, gauge: str) -> None:
    given = x.clone()
    path = tmp_path / "x.onnx"
    export_onnx(
        model, path, given, images=given, dynamic_batch=dynamic, dynamic_size=dynamic, gauge=gauge
    )
    assert torch.equal(given, x)
    assert [output.name for output in onnx.load(path).graph.output] == ["logits"]
    assert_right(ort_run(path, given)[0], model, x)


def test_export_with_preprocessing(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    path, recipe = tmp_path / "x.onnx", Preprocessing(12, (12, 12), (0.5,) * 3, (0.5,) * 3)
    export_onnx(model, path, x, with_preprocessing=recipe)
    graph = onnx.load(path).graph
    assert [output.name for output in graph.output] == ["logits"]
    pixels = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8)
    assert_right(ort_run(path, pixels)[0], model, (pixels / 255 - 0.5) / 0.5)


def test_a_network_that_leaves_its_input_alone_is_given_no_copy(x: Tensor, tmp_path: Path) -> None:
    model = Changes(lambda _: None).eval()
    export_onnx(model, tmp_path / "a.onnx", x)
    kinds = [node.op_type for node in onnx.load(tmp_path / "a.onnx").graph.node]
    assert "Identity" not in kinds


# ---- engines -------------------------------------------------------------------------------------


def engine(model: nn.Module) -> Engine:
    architecture = Architecture("own:net", {}, (3, 12, 12), "other")
    loaded = LoadedNetwork(copy.deepcopy(model), architecture, None, tuple(model.state_dict()))
    return torch_engine("net", loaded, "cpu")


def test_engines_leave_the_callers_arrays(model: nn.Module, x: Tensor) -> None:
    array = x.numpy().copy()
    scores = engine(model).run(array)
    assert np.array_equal(array, x.numpy())
    assert_right(torch.from_numpy(scores), model, x)


def test_every_timed_call_gets_the_same_numbers(model: nn.Module, x: Tensor) -> None:
    opened, seen = engine(model), []
    assert isinstance(opened.model, nn.Module)
    opened.model.body[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    array = x.numpy().copy()
    call = opened.runner(array)
    for _ in range(3):
        call()
    assert len(seen) == 4
    assert all(torch.equal(seen[0], later) for later in seen[1:])
    assert np.array_equal(array, x.numpy())


def test_other_networks_run_on_one_batch(x: Tensor) -> None:
    opened, places = engine(Changes(lambda _: None).eval()), []
    assert isinstance(opened.model, nn.Module)
    opened.model.register_forward_pre_hook(lambda _, args: places.append(args[0].data_ptr()))
    call = opened.runner(x.numpy())
    call()
    call()
    assert places[1] == places[2]
