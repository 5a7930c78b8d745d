"""Near-dead channels, and factors that are kept within a range by powers of two."""

# ruff: noqa: ARG005 - every forward takes (network, x), used or not
# ruff: noqa: ARG001 - fixtures are asked for what they do: `here` is the current folder

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command_line import SMALL
from conversions import assert_close, assert_restored, draw
from layer_networks import Net, assert_same, images, residual_network, two_convolutions
from sample_networks import network
from torch import Tensor, nn

import pathconvert
from pathconvert.cli import run
from pathconvert.conversion import scales as scales_module
from pathconvert.conversion.equivalence import forward_outputs
from pathconvert.conversion.pivots import MIN_PIVOT
from pathconvert.conversion.record import record_of
from pathconvert.conversion.reparameterize import Conversion, resume
from pathconvert.errors import PathconvertError
from pathconvert.training.optimizer.gsgd import GSGD
from pathconvert.training.optimizer.path_groups import path_parameter_groups

# ---- near-dead channels --------------------------------------------------------------------------


def with_column(size: float) -> Net:
    """conv a (4 channels) → ReLU → conv b; ``size``: the weights that leave channel 1."""
    net = two_convolutions(lambda s, x: F.relu(x))
    net.b.weight.data[:, 1] *= size / float(net.b.weight.data[:, 1, 1, 1].abs().max())
    return net


@pytest.mark.parametrize("pivot", ["matching", "max", "diagonal"])
def test_a_channel_that_training_switched_off_is_near_dead(pivot: Any) -> None:
    net = with_column(1e-9)
    c = pathconvert.reparameterize(net, images(), pivot=pivot)
    group, counts = c.groups[0], c.counts()
    assert group.pivots[1] is None
    assert group.scales[1] == 1
    assert group.near_dead.tolist() == [False, True, False, False]
    assert (counts["channels_near_dead"], counts["channels_dead"]) == (1, 0)
    assert counts["channels_rescaled"] == 3
    record = record_of(c.model)
    assert (record.near_dead.tolist(), int(record.pivots.layer[1])) == ([1], -1)
    assert resume(c.model, images(), record).counts() == counts
    assert_same(net, c.model, images())


def test_no_limit_rescales_every_channel_that_is_not_dead() -> None:
    c = pathconvert.reparameterize(with_column(1e-9), images(), min_pivot=0)
    assert c.counts()["channels_rescaled"] == 4


@pytest.mark.parametrize(("size", "near_dead"), [(0.99, True), (1.01, False)])
def test_the_limit_is_relative_to_the_median_of_the_columns(size: float, near_dead: bool) -> None:
    net = with_column(1.0)
    tops = net.b.weight.data[:, :, 1, 1].abs().amax(0)
    others = np.delete(tops.numpy(), 1)
    limit = 1e-3
    # the column itself is among those whose median is taken
    median = float(np.median([0.0, *others]))
    net = with_column(size * limit * median)
    c = pathconvert.reparameterize(net, images(), pivot="max", min_pivot=limit)
    assert c.groups[0].near_dead.tolist() == [False, near_dead, False, False]


def test_a_tiny_diagonal_is_near_dead_and_matching_takes_the_largest() -> None:
    net = two_convolutions(lambda s, x: F.relu(x), b=nn.Conv2d(4, 4, 3, padding=1))
    net.b.weight.data[:, :, 1, 1] = torch.eye(4, dtype=torch.float64)
    net.b.weight.data[2, 2, 1, 1] = 1e-8
    net.b.weight.data[0, 2, 1, 1] = 0.5
    diagonal = pathconvert.reparameterize(net, images(), pivot="diagonal").groups[0]
    assert diagonal.near_dead.tolist() == [False, False, True, False]
    matching = pathconvert.reparameterize(net, images(), pivot="matching").groups[0]
    rows = [pivot.row for pivot in matching.pivots if pivot]
    assert rows == [0, 1, 0, 3], "the matching alone would take row 2 for column 2"
    assert not matching.near_dead.any()


@pytest.mark.parametrize("limit", [-1e-3, 1.0, math.nan])
def test_a_limit_that_makes_no_sense_is_refused(limit: float) -> None:
    with pytest.raises(PathconvertError) as refusal:
        pathconvert.reparameterize(with_column(1.0), images(), min_pivot=limit)
    assert str(refusal.value) == f"min_pivot is {limit:g} but must be at least 0 and below 1"


# ---- recentring ----------------------------------------------------------------------------------


def chain(layers: int = 40, width: int = 8) -> nn.Sequential:
    """Convolutions with He-like weights and ReLUs, without BatchNorm, and a linear layer."""
    modules: list[nn.Module] = []
    for i in range(layers):
        modules += [nn.Conv2d(width if i else 3, width, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
    generator = torch.Generator().manual_seed(0)
    for parameter in net.double().parameters():
        fan = max(1, parameter[0].numel()) if parameter.dim() > 1 else 100
        normal = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = normal * math.sqrt(2 / fan)
    return net.eval()


def assert_recentred(conversion: Conversion, width: float = scales_module.RANGE) -> None:
    """Factors are within the range, and the record's magnitudes are those of the weights."""
    assert np.abs(np.log2(conversion.scales)).max() <= width
    rescaled = conversion.rescaled()
    exponents = conversion.exponents()[rescaled]
    assert (exponents != 0).any()
    recorded = record_of(conversion.model).pivots.magnitude
    assert recorded is not None
    # read off the converted network
    again = resume(conversion.model, draw((2, 3, 32, 32)), conversion.record)
    measured = again.magnitudes()[rescaled]
    np.testing.assert_allclose(recorded[rescaled], measured, rtol=1e-10)
    if conversion.gauge == "unit":
        assert (recorded[rescaled] == conversion.skip_scale * 2.0**exponents).all()


@pytest.mark.parametrize("gauge", ["unit", "pow2"])
@pytest.mark.parametrize("pivot", ["max", "matching", "diagonal"])
def test_a_long_chain_is_recentred(pivot: Any, gauge: Any) -> None:
    net, x = chain(), draw((2, 3, 32, 32))
    conversion = pathconvert.reparameterize(net, x, "network", pivot, gauge)
    counts = conversion.counts()
    assert counts["channels_rescaled"] + counts["channels_near_dead"] == 40 * 8
    assert_recentred(conversion)
    outputs, expected = (forward_outputs(model, x) for model in (conversion.model, net))
    assert_close(outputs, expected)
    if gauge == "pow2":
        assert all(map(torch.equal, outputs, expected))
    assert_restored(conversion, net)


@pytest.mark.parametrize("gauge", ["unit", "pow2"])
def test_resnet18_stays_in_the_range(gauge: Any) -> None:
    """With the rule diagonal, whose factors would go down to 2^-60."""
    net, x = network("resnet18", torch.float64), draw((2, 3, 32, 32))
    conversion = pathconvert.reparameterize(net, x, "network", "diagonal", gauge)
    assert_recentred(conversion)
    assert_close(*(forward_outputs(model, x) for model in (conversion.model, net)))
    assert_restored(conversion, net)


def test_units_of_one_group_move_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scales_module, "RANGE", 10)
    conversion = pathconvert.reparameterize(chain(), draw((2, 3, 32, 32)), "network", "max")
    exponents = conversion.exponents()
    moved = [
        group.name
        for group in conversion.units.groups
        if len(set(exponents[group.start : group.start + group.size].tolist())) == 1
        and exponents[group.start] != 0
    ]
    assert len(moved) >= 3, "whole layers, not single channels, hold the pivots that are not ±1"


def test_a_network_within_the_range_is_not_touched() -> None:
    conversion = pathconvert.reparameterize(residual_network(), images(), "network")
    assert not conversion.exponents().any()
    assert record_of(conversion.model).pivots.magnitude is None


@pytest.mark.parametrize("gauge", ["unit", "pow2"])
@pytest.mark.parametrize("skip_scale", [1.0, 0.1])
def test_path_bn_of_a_recentred_network(gauge: Any, skip_scale: float) -> None:
    net, x = chain(24), draw((8, 3, 32, 32))
    conversion = pathconvert.reparameterize(net, x, "network", "max", gauge)
    entered = pathconvert.to_path_bn(conversion, x, calibration=x, skip_scale=skip_scale)
    record = record_of(entered)
    assert np.abs(np.log2(record.scales)).max() <= scales_module.RANGE
    outputs, expected = (forward_outputs(model, x) for model in (entered, net))
    assert_close(outputs, expected)
    left = pathconvert.leave_path_bn(entered)
    assert_close(forward_outputs(left, x), expected)
    assert_close(forward_outputs(pathconvert.restore(left, left.path_record), x), expected)


def test_lambda_alone_is_recentred(monkeypatch: pytest.MonkeyPatch) -> None:
    """λ divides every factor once per layer."""
    monkeypatch.setattr(scales_module, "RANGE", 12)
    net, x = chain(10), draw((8, 3, 32, 32))
    conversion = pathconvert.reparameterize(net, x, "network", "max")
    entered = pathconvert.to_path_bn(conversion, x, calibration=x, skip_scale=1e-3)
    assert np.abs(np.log2(record_of(entered).scales)).max() <= 12
    assert_close(*(forward_outputs(model, x) for model in (entered, net)))


def test_gsgd_computes_the_same_in_a_recentred_gauge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Path-values do not change with the gauge, so that a step leads to the same function."""
    x, results = draw((4, 3, 16, 16)), []
    target = draw((4, 5), seed=1)
    for width in (6, 1000):
        monkeypatch.setattr(scales_module, "RANGE", width)
        conversion = pathconvert.reparameterize(chain(6, 5), x, "network", "max")
        model = conversion.model.train()
        assert conversion.exponents().any() == (width == 6)
        optimizer = GSGD(path_parameter_groups(model), lr=0.02, start="weight", momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            F.mse_loss(model(x), target).backward()
            optimizer.step()
        results.append(forward_outputs(model, x))
    before = forward_outputs(chain(6, 5), x)
    assert float((results[0][0] - before[0]).abs().max()) > 1e-4
    assert_close(*results)


def test_float16_keeps_more_channels_in_path_space() -> None:
    """Its factors are recentred to 2^±7, all that it allows, so that few leave the range."""
    net = residual_network()
    counts = pathconvert.reparameterize(
        network("resnet18").half(), draw((1, 3, 32, 32)).half(), "network", "max"
    ).counts()
    assert counts["channels_rescaled"] > 2 * counts["channels_held_back"]
    conversion = pathconvert.reparameterize(net.half(), images().half(), "network", "max")
    assert np.abs(np.log2(conversion.scales)).max() <= 7


# ---- what the commands print ---------------------------------------------------------------------


def test_reparam_and_inspect_show_scales_and_near_dead_channels(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state: dict[str, Tensor] = torch.load("sq.pt", weights_only=True)
    state["features.3.squeeze.weight"][:, 5] *= 1e-9
    torch.save(state, "tiny.pt")
    command = ["reparam", "tiny.pt", "--report", "r.json", "-o", "x.safetensors", *SMALL]
    assert run([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["channels_near_dead"], result["channels_dead"]) == (1, 0)
    spread = result["scales"]
    assert 0 < spread["min"] < spread["median"] < spread["max"]
    report = json.loads(Path("r.json").read_text())["groups"]
    assert {group["name"]: group["near_dead"] for group in report if group["near_dead"]} == {
        "features.0": [5]
    }
    assert run(["inspect", "x.safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scales"] == spread
    row = ", ".join(f"{name} " for name in spread).split(", ")
    for shown in (["inspect", "x.safetensors"], [*command, "--force"]):
        assert run(shown) == 0
        printed = capsys.readouterr()
        (line,) = (line for line in printed.out.splitlines() if line.split()[:1] == ["scales"])
        assert all(name in line for name in row)
    assert "0 dead, 1 near-dead" in printed.out
    assert "1 channels are near-dead" in printed.err


def test_the_option_min_pivot(refused: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("-0.5", "1"):
        error, tip = refused("reparam", "sq.pt", "--min-pivot", value, *SMALL)
        assert error == f"error: min_pivot is {value} but must be at least 0 and below 1"
        assert tip == "tip: The default is 1e-06; 0 uses every pivot that is not exactly 0."
    assert run(["reparam", "--help"]) == 0
    assert f"{MIN_PIVOT:g}" in capsys.readouterr().out.replace("1e-6", "1e-06")
