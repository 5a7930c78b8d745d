"""Engines of both kinds: what they say about a network, in which dtype torch runs, fixed
batches.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from onnx import TensorProto
from onnx_files import CLASSES, save_linear
from torch import nn

from pathconvert.errors import RuntimeUnavailable
from pathconvert.export.card import ModelCard
from pathconvert.export.runtime.engines import (
    compiled,
    is_onnx,
    open_engine,
    torch_device,
    torch_engine,
)
from pathconvert.export.runtime.image_classifier import as_classifier, is_scores
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.loading import LoadedNetwork
from pathconvert.networks.preprocessing import Preprocessing

RESNET = Architecture("resnet18", {"num_classes": CLASSES}, (3, 4, 4), "classification")
RECIPE = Preprocessing(8, (4, 4), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 4, 4)).astype(np.float32)


def linear(dtype: torch.dtype = torch.float32) -> LoadedNetwork:
    """A linear network of an architecture that is not torchvision's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, CLASSES)).to(dtype)
    architecture = Architecture("builders:linear", {}, (3, 4, 4), "other")
    return LoadedNetwork(model, architecture, None, tuple(model.state_dict()))


@pytest.mark.parametrize(
    ("source", "expected"),
    [("a.onnx", True), ("b/A.ONNX", True), ("a.pt", False), ("onnx", False), ("resnet18", False)],
)
def test_the_suffix_decides(source, expected):
    assert is_onnx(source) is expected


def test_an_onnx_file_and_what_its_card_says(tmp_path):
    labels = tuple("abcde")
    card = ModelCard(RESNET, preprocessing=RECIPE, labels=labels)
    weight = save_linear(tmp_path / "a.onnx", ("batch", 3, "height", "width"), card=card)
    engine = open_engine(tmp_path / "a.onnx", "cpu")
    assert (engine.name, engine.kind, engine.library) == (
        str(tmp_path / "a.onnx"),
        "onnxruntime",
        "onnxruntime",
    )
    assert (engine.device, engine.fallback, engine.fixed_batch) == ("cpu", None, None)
    assert (engine.input_size, engine.recorded_size) == ((3, None, None), (3, 4, 4))
    assert (engine.precision, engine.takes_pixels) == ("float32", False)
    assert (engine.architecture, engine.preprocessing, engine.labels) == (RESNET, RECIPE, labels)
    assert engine.gives_probabilities is False
    # float32 sums of 16 and of 3 terms of size 1
    expected = images(2).mean((2, 3)) @ weight
    np.testing.assert_allclose(engine.run(images(2)), expected, atol=1e-5)


def test_an_onnx_file_of_another_tool(tmp_path):
    save_linear(tmp_path / "a.onnx", (2, 3, 4, 4), kind=TensorProto.UINT8)
    engine = open_engine(tmp_path / "a.onnx", "cpu")
    assert (engine.fixed_batch, engine.precision, engine.takes_pixels) == (2, "uint8", True)
    assert engine.recorded_size is None  # the graph fixes all sides
    assert engine.gives_probabilities is None


def test_a_checkpoint():
    network = linear()
    engine = open_engine("net", "cpu", load=lambda _: network)
    assert (engine.name, engine.kind, engine.library) == ("net", "torch eager", "torch")
    assert (engine.input_size, engine.fixed_batch) == ((3, 4, 4), None)
    assert engine.gives_probabilities is None  # it may end in a softmax
    with torch.no_grad():
        expected = network.model(torch.from_numpy(images(2)))
    assert np.array_equal(engine.run(images(2)), expected.numpy())


@pytest.mark.parametrize("own_dtype", [False, True])
def test_torch_runs_in_float32_on_the_cpu(own_dtype):
    engine = torch_engine("net", linear(torch.float16), "cpu", own_dtype=own_dtype)
    assert engine.precision == "float32"
    assert engine.run(images(1)).dtype == np.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("own_dtype", "precision"), [(False, "float32"), (True, "bfloat16")])
def test_torch_keeps_its_own_dtype_on_a_gpu(own_dtype, precision):
    engine = torch_engine("net", linear(torch.bfloat16), "cuda", own_dtype=own_dtype)
    assert (engine.device, engine.precision) == ("cuda", precision)
    assert engine.run(images(1)).dtype == np.float32
    engine.runner(images(1))()


def test_a_compiled_engine_differs_in_how_it_runs_alone(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: lambda x: 2 * model(x))
    eager = torch_engine("net", linear(), "cpu")
    twice = compiled(eager)
    assert (twice.kind, twice.library) == ("torch.compile", "torch")
    assert np.array_equal(twice.run(images(2)), 2 * eager.run(images(2)))
    same = dataclasses.replace(twice, kind=eager.kind, run=eager.run, runner=eager.runner)
    assert same == eager


@pytest.mark.parametrize(
    ("device", "message", "tip"),
    [
        ("npu", "there is no device 'npu'", "Devices: auto, cuda, tensorrt, cpu."),
        (
            "tensorrt",
            "tensorrt only runs .onnx files, and net is not one",
            "Export it first, or use --device cuda.",
        ),
    ],
)
def test_devices_that_torch_does_not_have(device, message, tip):
    with pytest.raises(RuntimeUnavailable) as refused:
        torch_device("net", device)
    assert str(refused.value) == message
    assert refused.value.tip == tip


@pytest.mark.parametrize("count", [1, 3])
def test_a_classifier_fills_a_fixed_batch(tmp_path, count):
    save_linear(tmp_path / "three.onnx", (3, 3, 4, 4))
    weight = save_linear(tmp_path / "free.onnx", card=ModelCard(RESNET, preprocessing=RECIPE))
    for name in ("three.onnx", "free.onnx"):
        classifier = as_classifier(open_engine(tmp_path / name, "cpu"))
        assert classifier.input_size == (3, 4, 4)
        found = classifier.scores(images(count))
        # float32 sums of 16 and of 3 terms of size 1
        np.testing.assert_allclose(found, images(count).mean((2, 3)) @ weight, atol=1e-5)


def test_the_preprocessing_is_for_the_size_of_the_images(tmp_path):
    card = ModelCard(RESNET, preprocessing=RECIPE)
    save_linear(tmp_path / "a.onnx", ("batch", 3, "height", "width"), card=card)
    engine = open_engine(tmp_path / "a.onnx", "cpu")
    assert as_classifier(engine).preprocessing == RECIPE
    larger = as_classifier(engine, (3, 8, 8))
    assert (larger.input_size, larger.preprocessing) == ((3, 8, 8), RECIPE.at((8, 8)))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (("n", 5), True),
        ((1, 5, 1, 1), True),
        ((5,), False),
        ((), False),
        ((1, 5, 7, 7), False),
        (("n", "c", "h", "w"), False),
    ],
)
def test_shapes_of_class_scores(shape, expected):
    assert is_scores(shape) is expected
