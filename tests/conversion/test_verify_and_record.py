"""``verify``, and records that are refused."""

# ruff: noqa: ARG005 - every forward takes (network, x), used or not

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch.nn.functional as F
from layer_networks import Net, images, randomise, two_convolutions
from torch import nn

import pathconvert
from pathconvert.errors import EquivalenceError, RecordError


def test_verify() -> None:
    net = two_convolutions(lambda s, x: F.relu(x)).float()
    x = images().float()
    same = pathconvert.verify(net, copy.deepcopy(net), x)
    assert (same.bit_identical, same.max_abs, same.passed) == (True, 0.0, True)
    changed = copy.deepcopy(net)
    changed.a.weight.data[0, 0] *= 1.001
    report = pathconvert.verify(net, changed, x)
    assert report.noise_ratio > 4
    assert not report.passed
    assert not report.bit_identical
    broken = copy.deepcopy(net)
    broken.b.bias.data[0] = float("nan")
    assert not pathconvert.verify(net, broken, x).passed
    other = Net(net._forward, a=net.a, b=nn.Conv2d(4, 3, 1))
    with pytest.raises(EquivalenceError) as error:
        pathconvert.verify(net, other, x)
    assert str(error.value) == "the outputs differ in shape: [(3, 5, 6, 6)] and [(3, 3, 6, 6)]"


def test_record_refusals() -> None:
    net = two_convolutions(lambda s, x: F.relu(x))
    c = pathconvert.reparameterize(net, images())

    def refusal(record: dict[str, Any], model: nn.Module | None = None) -> str:
        with pytest.raises(RecordError) as error:
            pathconvert.restore(model or c.model, record)
        return str(error.value)

    version = pathconvert.__version__
    assert (
        refusal(c.record | {"format_version": 99})
        == f"the conversion record has format version 99; this is pathconvert {version}, which"
        " reads version 1 or 2"
    )
    assert (
        refusal({k: v for k, v in c.record.items() if k != "scales"})
        == "the conversion record is damaged: KeyError: 'scales'"
    )
    assert (
        refusal(c.record | {"scales": [-1.0]})
        == "the conversion record is damaged: a factor is not a positive number"
    )
    assert (
        refusal(c.record | {"scales": [1.0]})
        == "the conversion record is damaged: the entry of a.weight names a channel that does not"
        " exist"
    )
    wider = randomise(Net(net._forward, a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 5, 3)))
    assert (
        refusal(c.record, wider)
        == "the conversion record does not fit the tensor a.weight of shape [6, 3, 3, 3]"
    )
    renamed = Net(net._forward, b=net.b)
    message = "the conversion record belongs to another network: this one has no tensor a.weight"
    assert refusal(c.record, renamed) == message
