"""Export: one file with the options asked for, proven to be equal.

One test per pitfall of the exporter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from sample_networks import network, randomise
from small_export import IMAGENET, X, ops, ort_run
from torch import nn

import pathconvert
from pathconvert.errors import EquivalenceError, PathconvertError
from pathconvert.export.graph import export as onnx_export
from pathconvert.export.graph.export import export_onnx
from pathconvert.networks.preprocessing import Preprocessing
from pathconvert.path_bn.form import has_path_bn

ROOT = Path(__file__).parents[3]

# ---- pitfalls of the exporter --------------------------------------------------------------------


def test_one_clean_file(small, tmp_path, capfd):
    small.train()
    report = export_onnx(small, tmp_path / "x.onnx", X)
    assert small.training
    captured = capfd.readouterr()
    assert captured.out == ""
    assert os.listdir(tmp_path) == ["x.onnx"]  # no x.onnx.data
    data = (tmp_path / "x.onnx").read_bytes()
    for place in (
        str(ROOT),
        str(Path(torch.__file__).parent),
        "site-packages",
        "stack_trace",
        "network.",
    ):
        assert place.encode() not in data, place
    model = onnx.load(tmp_path / "x.onnx")
    assert [(e.domain, e.version) for e in model.opset_import] == [("", 20)]
    assert [t.name for t in model.graph.input] == ["input"]
    assert [t.name for t in model.graph.output] == ["logits"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert {t.name for t in model.graph.initializer} >= {"stem.0.weight", "fc.bias"}
    assert (
        ops(tmp_path / "x.onnx").count("BatchNormalization") == report.batch_norms_left == 1
    )  # right.0
    assert report.nodes == len(model.graph.node)
    assert report.file_bytes == len(data)
    assert report.noise_ratio <= 8
    assert report.checked_shapes == ((1, 3, 16, 16), (2, 3, 16, 16), (5, 3, 16, 16))
    assert report.notes == ("1 BatchNorm could not be folded and is left: right.0",)
    assert json.loads(json.dumps(report.to_json()))["path"] == str(tmp_path / "x.onnx")
    expected = small.eval()(X.repeat(3, 1, 1, 1))
    assert torch.allclose(
        ort_run(tmp_path / "x.onnx", X.repeat(3, 1, 1, 1))[0], expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("opset", [18, 19, 21, 22, 23, 24])
def test_the_opset_is_the_one_asked_for(small, tmp_path, opset):
    export_onnx(small, tmp_path / "x.onnx", X, opset=opset)
    assert onnx.load(tmp_path / "x.onnx").opset_import[0].version == opset


@pytest.mark.parametrize("opset", [13, 17, 25])
def test_another_opset_is_refused(small, refused, opset):
    message = f"opset {opset} is not offered: pathconvert writes 18 to 24"
    error = refused(PathconvertError, message, small, opset=opset)
    assert error.tip == "Use the default, --opset 20; the exporter cannot write opsets below 18."


def test_an_exporter_that_writes_another_opset_is_caught(small, refused, monkeypatch):
    real = onnx_export.to_onnx
    monkeypatch.setattr(onnx_export, "to_onnx", lambda *a: real(*a[:3], 18, a[4]))
    refused(PathconvertError, "opset 20 was asked for, but the exporter wrote {'': 18}", small)


def test_bf16_is_refused_by_name(small, refused):
    message = "precision bf16 is not offered: the exporter writes invalid files for it"
    assert (
        refused(PathconvertError, message, small, precision="bf16").tip
        == "Choose one of fp32, fp16."
    )


def test_a_fixed_batch_and_dynamic_sizes(small, tmp_path):
    report = export_onnx(small, tmp_path / "a.onnx", X.repeat(3, 1, 1, 1), dynamic_batch=False)
    assert report.checked_shapes == ((3, 3, 16, 16),)
    assert (
        onnx.load(tmp_path / "a.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3
    )
    report = export_onnx(small, tmp_path / "b.onnx", X, dynamic_size=True)
    dims = onnx.load(tmp_path / "b.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == ["batch", 3, "height", "width"]
    assert (2, 3, 48, 80) in report.checked_shapes


def test_a_size_that_the_network_fixes_is_refused(tmp_path):
    fixed = randomise(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 14 * 14, 4)))
    message = (
        "^the network only takes inputs of the example's size: with an input of size 1×3×48×80 it"
        " fails: "
    )
    with pytest.raises(PathconvertError, match=message):
        export_onnx(fixed, tmp_path / "x.onnx", X, dynamic_size=True)
    assert os.listdir(tmp_path) == []


def test_an_adaptive_pooling_fixes_the_size(tmp_path):
    """PyTorch runs at any size, but the graph of the pooling to 2 × 2 pixels does not."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)
    ).eval()
    with pytest.raises(PathconvertError) as caught:
        export_onnx(model, tmp_path / "x.onnx", X, dynamic_size=True)
    assert (
        "without --dynamic-size" in caught.value.tip
        or "Leave --dynamic-size out" in caught.value.tip
    )
    assert not list(tmp_path.iterdir())


def test_dynamic_sizes_print_nothing(tmp_path, capfd):
    """torch.fx would log that it cannot reduce the inequalities of GoogLeNet's poolings."""
    model = network("googlenet", aux_logits=False, transform_input=False, num_classes=5)
    export_onnx(
        randomise(model).eval(), tmp_path / "x.onnx", torch.zeros(1, 3, 64, 64), dynamic_size=True
    )
    assert capfd.readouterr() == ("", "")


def test_example_inputs_of_other_kinds(small, tmp_path):
    """Channels-last inputs, and a tuple of one tensor (which to_path_bn takes, too), give the same
    graph.
    """
    plain = export_onnx(small, tmp_path / "a.onnx", X)
    last = export_onnx(
        small, tmp_path / "b.onnx", X.expand(2, -1, -1, -1).to(memory_format=torch.channels_last)
    )
    one = export_onnx(small, tmp_path / "c.onnx", (X,))
    assert plain.operators == last.operators == one.operators


def test_a_compiled_network_is_exported_as_itself(small, tmp_path):
    compiled = torch.compile(small, backend="eager")
    assert (
        export_onnx(compiled, tmp_path / "a.onnx", X).nodes
        == export_onnx(small, tmp_path / "b.onnx", X).nodes
    )


def test_preprocessing_wants_images(refused):
    model = nn.Sequential(nn.Conv3d(3, 2, 1), nn.Flatten()).eval()
    refused(
        PathconvertError,
        "an input of size 1×3×4×8×8 is not a batch of images, so it cannot be preprocessed",
        model,
        torch.zeros(1, 3, 4, 8, 8),
        with_preprocessing=IMAGENET,
    )


def test_without_telemetry():
    code = (
        "import os, pathconvert.export.graph.verification;"
        " print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.stdout == "1\n"


# ---- networks ------------------------------------------------------------------------------------


def test_a_torchvision_network(tmp_path):
    model = network("resnet18")
    report = export_onnx(model, tmp_path / "x.onnx", torch.randn(1, 3, 64, 64))
    assert report.batch_norms_left == 0
    assert report.file_bytes <= 1.02 * report.weight_bytes
    assert report.operators["Conv"] == sum(isinstance(m, nn.Conv2d) for m in model.modules())


def test_video(tmp_path):
    model = nn.Sequential(
        nn.Conv3d(3, 4, (3, 3, 3), padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.AdaptiveAvgPool3d(1)
    )
    x = torch.randn(1, 3, 4, 8, 8)
    export_onnx(
        randomise(nn.Sequential(model, nn.Flatten(), nn.Linear(4, 3))), tmp_path / "x.onnx", x
    )
    assert "BatchNormalization" not in ops(tmp_path / "x.onnx")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_half_and_double_checkpoints_export_as_float32(tmp_path, dtype):
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())).to(dtype)
    export_onnx(model, tmp_path / "x.onnx", X.to(dtype))
    assert {t.data_type for t in onnx.load(tmp_path / "x.onnx").graph.initializer} <= {
        1,
        7,
    }  # FLOAT, INT64


def test_a_path_bn_network_folds_to_what_it_was(tmp_path):
    to_path_bn = pathconvert.to_path_bn

    def block(width):
        return nn.Conv2d(width, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()

    model = randomise(
        nn.Sequential(*block(3), *block(8), *block(8), nn.Conv2d(8, 4, 1), nn.Flatten())
    ).eval()
    entered = to_path_bn(model, X, X.repeat(4, 1, 1, 1) + torch.arange(4).view(4, 1, 1, 1))
    assert has_path_bn(entered)
    report = export_onnx(entered, tmp_path / "x.onnx", X)
    assert ops(tmp_path / "x.onnx") == [*["Conv", "Relu"] * 3, "Conv", "Reshape"]
    assert report.batch_norms_left == 0
    assert torch.allclose(ort_run(tmp_path / "x.onnx", X)[0], model(X), rtol=1e-3, atol=1e-4)


def test_outputs_that_are_not_finite_prove_nothing(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    nn.init.constant_(model[3].bias, float("nan"))
    with pytest.raises(EquivalenceError):
        export_onnx(model, tmp_path / "x.onnx", torch.randn(1, 3, 8, 8))
    assert not list(tmp_path.iterdir())


def test_a_parameter_named_as_an_input(tmp_path):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.input = nn.Parameter(torch.ones(3, 1, 1))
            self.scale = nn.Parameter(torch.ones(3, 1, 1))
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, x):
            return self.conv(x * self.input + self.scale).mean((2, 3))

    report = export_onnx(
        Named(), tmp_path / "x.onnx", torch.randn(2, 3, 8, 8),
        with_preprocessing=Preprocessing(8, (8, 8), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)),
    )  # fmt: skip
    assert report.noise_ratio <= 8


def test_images_of_another_size_are_refused(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    with pytest.raises(
        PathconvertError, match="images of size 2×3×9×9 do not fit an input of size 1×3×8×8"
    ):
        export_onnx(
            model, tmp_path / "x.onnx", torch.randn(1, 3, 8, 8), images=torch.randn(2, 3, 9, 9)
        )
