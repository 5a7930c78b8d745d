"""The proof that an exported file computes what the network computes."""

import os

import onnx
import pytest
import torch
from small_export import X
from torch import nn

from pathconvert.errors import EquivalenceError
from pathconvert.export.graph import export as onnx_export
from pathconvert.export.graph import verification
from pathconvert.export.graph.export import export_onnx


@pytest.mark.parametrize(("weight", "layer"), [("left.2.weight", "left.2"), ("fc.bias", "fc")])
def test_a_wrong_weight_is_found_and_its_layer_named(small, tmp_path, monkeypatch, weight, layer):
    real = onnx_export.to_onnx

    def wrong(*arguments):
        proto, layers = real(*arguments)
        tensor = next(t for t in proto.graph.initializer if t.name == weight)
        value = onnx.numpy_helper.to_array(tensor).copy()
        value.flat[0] += 0.1
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, weight))
        return proto, layers

    monkeypatch.setattr(onnx_export, "to_onnx", wrong)
    (tmp_path / "x.onnx").write_bytes(b"before")
    with pytest.raises(EquivalenceError, match=f"the first layer that differs is {layer}$"):
        export_onnx(small, tmp_path / "x.onnx", X, force=True)
    assert os.listdir(tmp_path) == ["x.onnx"]
    assert (tmp_path / "x.onnx").read_bytes() == b"before"


@pytest.mark.parametrize(
    ("exact", "written", "passes"),
    [
        ([0.500, 0.504, 0.0], [0.508, 0.496, 0.0], True),
        ([0.500, 0.512, 0.0], [0.508, 0.507, 0.0], False),
    ],
)
def test_fp16_may_change_the_top_1_only_within_its_error(exact, written, passes):
    """The error is 0.008 in both cases, which is below 1e-2, and the top-1 class changes."""
    x, y = torch.tensor([exact]).double(), torch.tensor([written]).double()
    if passes:
        assert verification.prove(lambda _: [y], nn.Identity(), [x], "fp16").max_error < 1e-2
        return
    with pytest.raises(
        verification.Differs, match="the top-1 class changes although its margin exceeds the error"
    ):
        verification.prove(lambda _: [y], nn.Identity(), [x], "fp16")


def test_an_invalid_graph_is_found(small, tmp_path, monkeypatch):
    def wrong(*arguments):
        proto, layers = real(*arguments)
        proto.graph.node[0].input[0] = "nowhere"
        return proto, layers

    real = onnx_export.to_onnx
    monkeypatch.setattr(onnx_export, "to_onnx", wrong)
    with pytest.raises(EquivalenceError, match=r"^the exported graph is invalid: "):
        export_onnx(small, tmp_path / "x.onnx", X)
    assert os.listdir(tmp_path) == []


def test_images_are_compared_too(small, tmp_path, monkeypatch):
    seen = []
    real = onnx_export.verification.prove
    monkeypatch.setattr(
        onnx_export.verification, "prove", lambda f, o, xs, p: seen.extend(xs) or real(f, o, xs, p)
    )
    report = export_onnx(small, tmp_path / "x.onnx", X, images=torch.randn(7, 3, 16, 16))
    assert [len(x) for x in seen] == [1, 2, 5, 5, 2]
    assert "the file was also compared on 7 images" in report.notes[-1]
