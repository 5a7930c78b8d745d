"""Exports in fp16, and the balanced gauge."""

import os

import numpy as np
import onnx
import pytest
import torch
from sample_networks import randomise
from small_export import X
from torch import nn

from pathconvert.errors import EquivalenceError
from pathconvert.export.card import read_card
from pathconvert.export.graph import balancing
from pathconvert.export.graph.export import export_onnx
from pathconvert.export.graph.folding import fold


@pytest.mark.parametrize("io_dtype", ["fp32", "fp16"])
def test_fp16(small, tmp_path, io_dtype):
    report = export_onnx(small, tmp_path / "x.onnx", X, precision="fp16", io_dtype=io_dtype)
    model = onnx.load(tmp_path / "x.onnx")
    kinds = {
        tensor.data_type for tensor in model.graph.initializer if tensor.name.endswith("weight")
    }
    assert kinds == {onnx.TensorProto.FLOAT16}
    expected = onnx.TensorProto.FLOAT if io_dtype == "fp32" else onnx.TensorProto.FLOAT16
    assert model.graph.input[0].type.tensor_type.elem_type == expected
    assert model.graph.output[0].type.tensor_type.elem_type == expected
    assert report.precision == "fp16"
    assert 0 < report.max_error <= 0.1
    assert read_card(model).precision == "fp16"


def uneven(model, x):
    """The folded network with its unpinned channels scaled by up to 2^±20, which changes no
    output.
    """
    folded = fold(model, x)
    units = balancing.find_units(balancing.trace_network(folded, x).trace)
    exponents = np.random.default_rng(0).integers(-20, 21, units.count) * balancing._free(units)
    assert np.count_nonzero(exponents) > 20
    return balancing.rescale(folded, units.slots, np.exp2(exponents))


def test_the_balanced_gauge_saves_an_uneven_network(small, tmp_path):
    bad = uneven(small, X)
    with pytest.raises(
        EquivalenceError,
        match=r"does not compute what the network computes: .*; the first layer that differs is",
    ):
        export_onnx(bad, tmp_path / "x.onnx", X, precision="fp16")
    assert os.listdir(tmp_path) == []
    good = balancing.balanced(bad, X)
    assert torch.equal(good(X), bad(X))
    assert max(float(p.detach().abs().max()) for p in good.parameters()) < 2.0**balancing.WEIGHT_TOP
    report = export_onnx(bad, tmp_path / "x.onnx", X, precision="fp16", gauge="balanced")
    assert report.max_error <= 1e-2 * max(1.0, float(bad(X).detach().abs().max()))


def test_the_balanced_gauge_brings_back_channels_of_any_size(small, tmp_path):
    """In path space, factors of 2^±100 occur."""
    folded = fold(small, X).float()
    units = balancing.find_units(balancing.trace_network(folded, X).trace)
    exponents = np.where(balancing._free(units), np.where(np.arange(units.count) % 2, 60, -60), 0)
    bad = balancing.rescale(folded, units.slots, np.exp2(exponents))
    assert max(float(p.detach().abs().max()) for p in bad.parameters()) > 2.0**50
    export_onnx(bad, tmp_path / "x.onnx", X, precision="fp16", gauge="balanced")
    with pytest.raises(EquivalenceError) as caught:
        export_onnx(bad, tmp_path / "y.onnx", X, precision="fp16")
    assert caught.value.tip == "Try --gauge balanced, or use --precision fp32."


def test_an_overflow_that_onnx_runtimes_cpu_hides_is_found(tmp_path):
    model = randomise(
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(576, 4)
        )
    )
    with torch.no_grad():
        model[0].weight.mul_(3e4)
        model[0].bias.mul_(3e4)
        model[2].weight.div_(3e4)
    with pytest.raises(
        EquivalenceError, match=r"fp16 overflows in 0|the first layer that differs is 0"
    ):
        export_onnx(model, tmp_path / "x.onnx", X, precision="fp16")
    assert os.listdir(tmp_path) == []
    export_onnx(model, tmp_path / "x.onnx", X, precision="fp16", gauge="balanced")


def test_balanced_measures_on_images_too(small):
    images = 100 * torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    folded = fold(small, X)
    usual, bright = balancing.balanced(folded, X), balancing.balanced(folded, X, images)
    assert torch.equal(usual(images), bright(images))
    assert bool((bright.fc.weight.abs() >= 8 * usual.fc.weight.abs()).all())
