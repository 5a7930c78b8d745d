"""A BatchNorm that reads an activation carries the factors of its channels in its statistics.

The BatchNorm is the identity branch of RepVGG here: relu(conv(x) + norm(x)).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conversions import assert_restored
from layer_networks import Net, assert_same, images, pinned, randomise
from torch import Tensor, nn

import pathconvert
from pathconvert.conversion.carrying import TRAINING_CHANGE, carried_range
from pathconvert.conversion.groups import find_units
from pathconvert.conversion.record import Record
from pathconvert.conversion.reparameterize import Conversion
from pathconvert.conversion.tracing.parts import trace_network
from pathconvert.errors import RecordError
from pathconvert.export.graph.balancing import balanced

PINNED = "enters the BatchNorm norm, which normalises any factor away"


def network(forward: Callable[..., Any] | None = None, **layers: nn.Module) -> nn.Module:
    """A block with an identity branch between two convolutions."""

    def usual(s: Any, x: Tensor) -> Tensor:
        x = F.relu(s.first(x))
        return s.last(F.relu(s.conv(x) + s.norm(x)))

    norm = layers.pop("norm", None) or nn.BatchNorm2d(4)
    model = Net(
        forward or usual,
        first=nn.Conv2d(3, 4, 3, padding=1),
        conv=nn.Conv2d(4, 4, 3, padding=1),
        norm=norm,
        last=nn.Conv2d(4, 3, 1),
        **layers,
    )
    return randomise(model)


def converted(model: nn.Module, **options: Any) -> Conversion:
    return pathconvert.reparameterize(model, images(), scope="network", **options)


def test_all_channels_are_rescaled_and_the_function_stays() -> None:
    model = network()
    conversion = converted(model)
    assert conversion.counts()["channels_rescaled"] == 8
    assert conversion.record["format_version"] == 2
    assert_same(model, conversion.model, images())
    assert_same(model, conversion.model, images(), training=True, tolerance=TRAINING_CHANGE)
    assert_restored(conversion, model)


def test_a_convolution_that_a_batch_norm_and_a_layer_read_is_rescaled_in_scope_block() -> None:
    model = network(lambda s, x: s.last(F.relu(s.norm(y := s.first(x)))) + s.conv(F.relu(y))[:, :3])
    conversion = pathconvert.reparameterize(model, images())
    assert conversion.counts()["channels_rescaled"] == 8
    assert_same(model, conversion.model, images())


def test_pow2_holds_the_channels_back_and_keeps_every_bit() -> None:
    model = network()
    conversion = converted(model, gauge="pow2")
    assert conversion.counts()["channels_held_back"] >= 3  # a factor may be 1 by chance
    assert torch.equal(conversion.model.norm.running_var, model.norm.running_var)
    x = images()
    assert torch.equal(model(x), conversion.model(x))
    assert_restored(conversion, model)


@pytest.mark.parametrize("variance", [0.0, 1e-7, 1e-5, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.0])
def test_the_range_keeps_what_training_mode_computes(variance: float, eps: float) -> None:
    low, high = carried_range(np.array([variance]), eps, torch.finfo(torch.float32).max)
    assert 0 <= low[0] <= 1 <= high[0]
    for s in (low[0], high[0]):
        if s > 0 and variance > 0:
            gain = np.sqrt((variance + eps) / (variance + eps / s**2))
            assert abs(gain - 1) <= TRAINING_CHANGE * (1 + 1e-9)
            assert s**2 * (variance + eps) - eps >= -1e-12 * eps


def test_a_channel_with_a_tiny_variance_is_held_back() -> None:
    model = network()
    model.norm.running_var[1] = 1e-9
    conversion = converted(model)
    assert conversion.counts()["channels_held_back"] == 1
    assert_same(model, conversion.model, images())
    assert bool((conversion.model.norm.running_var >= 0).all())


def test_chains_of_small_factors_are_recentred_in_place_of_held_back() -> None:
    blocks = nn.Sequential(*(network() for _ in range(6)))
    for block in blocks:
        for layer in (block.conv, block.last, block.first):
            layer.weight.data *= 0.05
            layer.bias.data *= 0.01
        block.norm.running_var.fill_(0.01)
    conversion = pathconvert.reparameterize(blocks, images(), scope="network")
    assert conversion.counts()["channels_held_back"] == 0
    assert conversion.counts()["channels_rescaled"] == 6 * 8 + 5 * 3
    assert_same(blocks, conversion.model, images())


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: (
            s.last(F.relu(s.conv(y := F.relu(s.first(x))) + s.norm(y))) * s.norm.running_var.sum()
        ),
        lambda s, x: s.last(
            F.relu(s.conv(y := F.relu(s.first(x))) + s.norm(y) - s.norm.running_mean.view(-1, 1, 1))
        ),
        lambda s, x: (
            s.last(F.relu(s.conv(y := F.relu(s.first(x))) + s.norm(y))),
            s.norm.running_var,
        ),
        lambda s, x: s.last(
            F.relu(s.conv(y := F.relu(s.first(x))) + s.norm(y.flip(1)) + s.norm(y))
        ),
    ],
    ids=["read elsewhere", "mean read elsewhere", "returned", "called on other channels"],
)
def test_statistics_with_another_use_pin_the_channels(forward: Callable[..., Any]) -> None:
    model = network(forward)
    units = find_units(trace_network(model, images()).trace)
    assert pinned(units)["first"] == PINNED
    assert_same(model, converted(model).model, images())


def test_a_batch_norm_without_statistics_pins_the_channels() -> None:
    model = network(norm=nn.BatchNorm2d(4, track_running_stats=False))
    units = find_units(trace_network(model, images()).trace)
    assert pinned(units)["first"] == PINNED


def test_two_batch_norms_that_share_statistics_pin_the_channels() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        x = F.relu(s.first(x))
        return s.last(F.relu(s.conv(x) + s.norm(x) + s.other(F.relu(s.conv(x)))))

    model = network(forward, other=nn.BatchNorm2d(4))
    model.other.running_mean, model.other.running_var = (
        model.norm.running_mean,
        model.norm.running_var,
    )
    units = find_units(trace_network(model, images()).trace)
    assert pinned(units)["first"] == PINNED


def test_a_file_keeps_the_statistics_and_older_versions_refuse_it() -> None:
    conversion = converted(network())
    record = Record.from_json(conversion.record)
    assert [slot.statistic for slot in record.slots if slot.statistic] == ["mean", "variance"]
    assert [slot.eps for slot in record.slots if slot.statistic == "variance"] == [1e-5]
    damaged = copy.deepcopy(conversion.record)
    damaged["tensors"]["norm.running_var"]["statistic"] = "median"
    with pytest.raises(RecordError, match="there is no statistic 'median'"):
        Record.from_json(damaged)
    plain = dataclasses.replace(record, slots=tuple(s for s in record.slots if not s.statistic))
    assert plain.to_json()["format_version"] == 1


@pytest.mark.parametrize("skip_scale", [1.0, 0.1])
def test_path_bn_enters_leaves_and_restores(skip_scale: float) -> None:
    model = network(after=nn.BatchNorm2d(4))
    model._forward = lambda s, x: s.last(
        F.relu(s.after(s.conv(y := F.relu(s.first(x)))) + s.norm(y))
    )
    entered = pathconvert.to_path_bn(converted(model), images(), images(), skip_scale)
    assert_same(model, entered, images())
    left = pathconvert.leave_path_bn(entered)
    assert_same(model, left, images())
    restored = pathconvert.restore(left, left.path_record)
    assert_same(model, restored, images())


def test_the_balanced_gauge_leaves_these_channels_alone() -> None:
    model = network()
    assert_same(model, balanced(converted(model).model, images()), images())


def test_a_network_in_path_form_enters_path_bn_from_there() -> None:
    model = network(after=nn.BatchNorm2d(4))
    model._forward = lambda s, x: s.last(F.relu(s.after(s.conv(F.relu(s.first(x))))))
    entered = pathconvert.to_path_bn(converted(model, pivot="max").model, images(), images())
    record = Record.from_json(entered.path_record)
    assert (record.scope, record.pivot) == ("network", "max")
    left = pathconvert.leave_path_bn(entered)
    restored = pathconvert.restore(left, left.path_record)
    for name, tensor in model.first.state_dict().items():
        torch.testing.assert_close(restored.first.state_dict()[name], tensor)
