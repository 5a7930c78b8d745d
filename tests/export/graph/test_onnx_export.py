"""Export: one file with the options asked for, proven to be equal; one test per pitfall of the exporter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from sample_networks import network, randomise
from torch import nn

import pathconvert
from pathconvert.errors import CheckpointError, EquivalenceError, OutputError, PathconvertError
from pathconvert.export.card import PROPERTY, ModelCard, read_card, write_card
from pathconvert.export.graph import balancing, verification, wrapping
from pathconvert.export.graph import export as onnx_export
from pathconvert.export.graph.export import export_onnx
from pathconvert.export.graph.folding import fold
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.preprocessing import Preprocessing, labels_for
from pathconvert.path_bn.form import has_path_bn

ROOT = Path(__file__).parents[3]
X = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
IMAGENET = Preprocessing(18, (16, 16), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Small(nn.Module):
    """A small network with every kind of node that matters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))
        self.right = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(self.left(x) + self.right(x))
        return self.fc(x.mean([2, 3]))


@pytest.fixture
def small() -> nn.Module:
    return randomise(Small()).eval()


@pytest.fixture
def refused(tmp_path):
    """A function that exports, checks the error's message and that there is no file, and returns the error."""

    def check(kind, message, model, *arguments, **options):
        with pytest.raises(kind) as caught:
            export_onnx(model, tmp_path / "x.onnx", *(arguments or (X,)), **options)
        assert str(caught.value) == message
        assert os.listdir(tmp_path) == []
        return caught.value

    return check


def ops(path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def ort_run(path, x):
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {"input": x.numpy()})]


# ---- pitfalls of the exporter ----------------------------------------------------------------------------------


def test_one_clean_file(small, tmp_path, capfd):
    small.train()
    report = export_onnx(small, tmp_path / "x.onnx", X)
    assert small.training
    captured = capfd.readouterr()
    assert captured.out == ""
    assert os.listdir(tmp_path) == ["x.onnx"]  # no x.onnx.data
    data = (tmp_path / "x.onnx").read_bytes()
    for place in (str(ROOT), str(Path(torch.__file__).parent), "site-packages", "stack_trace", "network."):
        assert place.encode() not in data, place
    model = onnx.load(tmp_path / "x.onnx")
    assert [(e.domain, e.version) for e in model.opset_import] == [("", 20)]
    assert [t.name for t in model.graph.input] == ["input"]
    assert [t.name for t in model.graph.output] == ["logits"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert {t.name for t in model.graph.initializer} >= {"stem.0.weight", "fc.bias"}
    assert ops(tmp_path / "x.onnx").count("BatchNormalization") == report.batch_norms_left == 1  # right.0
    assert report.nodes == len(model.graph.node)
    assert report.file_bytes == len(data)
    assert report.noise_ratio <= 8
    assert report.checked_shapes == ((1, 3, 16, 16), (2, 3, 16, 16), (5, 3, 16, 16))
    assert report.notes == ("1 BatchNorm could not be folded and is left: right.0",)
    assert json.loads(json.dumps(report.to_json()))["path"] == str(tmp_path / "x.onnx")
    expected = small.eval()(X.repeat(3, 1, 1, 1))
    assert torch.allclose(ort_run(tmp_path / "x.onnx", X.repeat(3, 1, 1, 1))[0], expected, rtol=1e-4, atol=1e-4)


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
    assert refused(PathconvertError, message, small, precision="bf16").tip == "Choose one of fp32, fp16."


def test_a_fixed_batch_and_dynamic_sizes(small, tmp_path):
    report = export_onnx(small, tmp_path / "a.onnx", X.repeat(3, 1, 1, 1), dynamic_batch=False)
    assert report.checked_shapes == ((3, 3, 16, 16),)
    assert onnx.load(tmp_path / "a.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3
    report = export_onnx(small, tmp_path / "b.onnx", X, dynamic_size=True)
    dims = onnx.load(tmp_path / "b.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == ["batch", 3, "height", "width"]
    assert (2, 3, 48, 80) in report.checked_shapes


def test_a_size_that_the_network_fixes_is_refused(tmp_path):
    fixed = randomise(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 14 * 14, 4)))
    message = "^the network only takes inputs of the example's size: with an input of size 1×3×48×80 it fails: "
    with pytest.raises(PathconvertError, match=message):
        export_onnx(fixed, tmp_path / "x.onnx", X, dynamic_size=True)
    assert os.listdir(tmp_path) == []


def test_an_adaptive_pooling_fixes_the_size(tmp_path):
    """PyTorch runs at any size, but the graph of the pooling to 2 × 2 pixels does not."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)).eval()
    with pytest.raises(PathconvertError) as caught:
        export_onnx(model, tmp_path / "x.onnx", X, dynamic_size=True)
    assert "without --dynamic-size" in caught.value.tip or "Leave --dynamic-size out" in caught.value.tip
    assert not list(tmp_path.iterdir())


def test_dynamic_sizes_print_nothing(tmp_path, capfd):
    """torch.fx would log that it cannot reduce the inequalities of GoogLeNet's poolings."""
    model = network("googlenet", aux_logits=False, transform_input=False, num_classes=5)
    export_onnx(randomise(model).eval(), tmp_path / "x.onnx", torch.zeros(1, 3, 64, 64), dynamic_size=True)
    assert capfd.readouterr() == ("", "")


def test_example_inputs_of_other_kinds(small, tmp_path):
    """Channels-last inputs, and a tuple of one tensor (which to_path_bn takes, too), give the same graph."""
    plain = export_onnx(small, tmp_path / "a.onnx", X)
    last = export_onnx(small, tmp_path / "b.onnx", X.expand(2, -1, -1, -1).to(memory_format=torch.channels_last))
    one = export_onnx(small, tmp_path / "c.onnx", (X,))
    assert plain.operators == last.operators == one.operators


def test_a_compiled_network_is_exported_as_itself(small, tmp_path):
    compiled = torch.compile(small, backend="eager")
    assert export_onnx(compiled, tmp_path / "a.onnx", X).nodes == export_onnx(small, tmp_path / "b.onnx", X).nodes


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
    code = "import os, pathconvert.export.graph.verification; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.stdout == "1\n"


# ---- fp16 and gauges -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("io_dtype", ["fp32", "fp16"])
def test_fp16(small, tmp_path, io_dtype):
    report = export_onnx(small, tmp_path / "x.onnx", X, precision="fp16", io_dtype=io_dtype)
    model = onnx.load(tmp_path / "x.onnx")
    kinds = {tensor.data_type for tensor in model.graph.initializer if tensor.name.endswith("weight")}
    assert kinds == {onnx.TensorProto.FLOAT16}
    expected = onnx.TensorProto.FLOAT if io_dtype == "fp32" else onnx.TensorProto.FLOAT16
    assert model.graph.input[0].type.tensor_type.elem_type == expected
    assert model.graph.output[0].type.tensor_type.elem_type == expected
    assert report.precision == "fp16"
    assert 0 < report.max_error <= 0.1
    assert read_card(model).precision == "fp16"


def uneven(model, x):
    """The folded network with its unpinned channels scaled by up to 2^±20, which changes no output."""
    folded = fold(model, x)
    units = balancing.find_units(balancing.trace_network(folded, x).trace)
    exponents = np.random.default_rng(0).integers(-20, 21, units.count) * balancing._free(units)
    assert np.count_nonzero(exponents) > 20
    return balancing.rescale(folded, units.slots, np.exp2(exponents))


def test_the_balanced_gauge_saves_an_uneven_network(small, tmp_path):
    bad = uneven(small, X)
    with pytest.raises(
        EquivalenceError, match=r"does not compute what the network computes: .*; the first layer that differs is"
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
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(576, 4)))
    with torch.no_grad():
        model[0].weight.mul_(3e4)
        model[0].bias.mul_(3e4)
        model[2].weight.div_(3e4)
    with pytest.raises(EquivalenceError, match=r"fp16 overflows in 0|the first layer that differs is 0"):
        export_onnx(model, tmp_path / "x.onnx", X, precision="fp16")
    assert os.listdir(tmp_path) == []
    export_onnx(model, tmp_path / "x.onnx", X, precision="fp16", gauge="balanced")


def test_balanced_measures_on_images_too(small):
    images = 100 * torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    folded = fold(small, X)
    usual, bright = balancing.balanced(folded, X), balancing.balanced(folded, X, images)
    assert torch.equal(usual(images), bright(images))
    assert bool((bright.fc.weight.abs() >= 8 * usual.fc.weight.abs()).all())


# ---- the proof -------------------------------------------------------------------------------------------------


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
    [([0.500, 0.504, 0.0], [0.508, 0.496, 0.0], True), ([0.500, 0.512, 0.0], [0.508, 0.507, 0.0], False)],
)
def test_fp16_may_change_the_top_1_only_within_its_error(exact, written, passes):
    """The error is 0.008 in both cases, which is below 1e-2, and the top-1 class changes."""
    x, y = torch.tensor([exact]).double(), torch.tensor([written]).double()
    if passes:
        assert verification.prove(lambda _: [y], nn.Identity(), [x], "fp16").max_error < 1e-2
        return
    with pytest.raises(verification.Differs, match="the top-1 class changes although its margin exceeds the error"):
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
    monkeypatch.setattr(onnx_export.verification, "prove", lambda f, o, xs, p: seen.extend(xs) or real(f, o, xs, p))
    report = export_onnx(small, tmp_path / "x.onnx", X, images=torch.randn(7, 3, 16, 16))
    assert [len(x) for x in seen] == [1, 2, 5, 5, 2]
    assert "the file was also compared on 7 images" in report.notes[-1]


# ---- what the graph holds --------------------------------------------------------------------------------------


def test_preprocessing_and_softmax_in_the_graph(small, tmp_path):
    export_onnx(small, tmp_path / "x.onnx", X, with_preprocessing=IMAGENET, with_softmax=True)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET.mean, IMAGENET.std))
    expected = small((pixels / 255 - mean) / std).softmax(1)
    assert torch.allclose(ort_run(tmp_path / "x.onnx", pixels)[0], expected, atol=1e-5)
    card = read_card(onnx.load(tmp_path / "x.onnx"))
    assert (card.softmax, card.preprocessing_in_graph, card.preprocessing) == (True, True, IMAGENET)


def test_segmentation_has_its_auxiliary_head_only_when_asked(tmp_path):
    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 3, 1)

        def forward(self, x):
            y = self.body(x)
            size = x.shape[-2:]
            return {name: F.interpolate(self.head(f(y)), size, mode="bilinear") for name, f in PARTS.items()}

    PARTS = {"out": F.relu, "aux": torch.neg}
    model = randomise(Segmenter())
    export_onnx(model, tmp_path / "a.onnx", X)
    assert [t.name for t in onnx.load(tmp_path / "a.onnx").graph.output] == ["logits"]
    export_onnx(model, tmp_path / "b.onnx", X, auxiliary=True, dynamic_size=True)
    assert [t.name for t in onnx.load(tmp_path / "b.onnx").graph.output] == ["out", "aux"]


def test_a_softmax_needs_classes(refused):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 1), nn.Flatten(0))
    error = refused(
        PathconvertError, "Sequential gives an output of size [1], which has no classes for a softmax",
        model, torch.randn(1, 3, 2, 2), with_softmax=True,
    )  # fmt: skip
    assert error.tip == "Leave --with-softmax out."


@pytest.mark.parametrize(
    ("name", "size", "heads"), [("googlenet", 64, "aux1, aux2"), ("inception_v3", 96, "AuxLogits")]
)
def test_weights_that_training_alone_uses_are_left_out_and_named(name, size, heads):
    model, x = network(name, aux_logits=True), torch.randn(2, 3, size, size)
    outputs = wrapping.outputs_of(model, x, auxiliary=False, softmax=False)
    notes = onnx_export._notes((), outputs, auxiliary=False, images=None)
    assert notes == (f"the file does not contain the weights of {heads}, which do not run in evaluation mode",)


def test_batch_norms_that_are_not_in_the_graph_are_not_called_left(tmp_path):
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.aux = nn.Conv2d(3, 4, 3), nn.ModuleDict({"bn": nn.BatchNorm2d(4)})

        def forward(self, x):
            x = self.conv(x)
            return (x.mean((2, 3)), self.aux.bn(x)) if self.training else x.mean((2, 3))

    report = export_onnx(Auxiliary(), tmp_path / "x.onnx", X)
    assert report.notes == ("the file does not contain the weights of aux, which do not run in evaluation mode",)


def test_weights_that_are_read_without_a_call_are_in_the_file(tmp_path):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return F.conv2d(x, self.conv.weight + 0).mean((2, 3))

    assert export_onnx(Reads(), tmp_path / "x.onnx", X).notes == ()


def test_the_card():
    architecture = Architecture("resnet50", {"num_classes": 1000}, (3, 64, 64), "classification")
    card = ModelCard(
        architecture, "path", "r.pt", "00ff", Preprocessing.for_architecture(architecture), labels_for(architecture)
    )
    assert card.preprocessing.resize == 66
    assert card.preprocessing.crop == (64, 64)
    assert card.labels[0] == "tench"
    model = onnx.ModelProto()
    assert read_card(model) is None
    for _ in range(2):
        write_card(model, card)
    assert read_card(model) == card == read_card({PROPERTY: model.metadata_props[0].value})
    for architecture in (
        Architecture("r3d_18", {}, (3, 16, 112, 112), "video"),
        Architecture("a:b", {}, (3, 8, 8), "other"),
    ):
        assert Preprocessing.for_architecture(architecture) is None
    assert labels_for(Architecture("resnet50", {"num_classes": 7}, None, "classification")) is None


def test_cards_that_are_newer_or_damaged_are_refused():
    newer = json.dumps({"format_version": 2, "tool": "pathconvert 9"})
    with pytest.raises(
        CheckpointError, match="pathconvert metadata of format version 2; this is pathconvert"
    ) as caught:
        read_card({PROPERTY: newer})
    assert caught.value.tip == "Use the version of pathconvert that wrote it: pathconvert 9."
    for text in ("{", "[]", '{"format_version": 1, "preprocessing": {"resize": 3}}'):
        with pytest.raises(CheckpointError, match=r"^the file has damaged pathconvert metadata: "):
            read_card({PROPERTY: text})


# ---- refusals --------------------------------------------------------------------------------------------------


def test_what_is_no_single_tensor_is_refused(refused):
    class Detector(nn.Module):
        def forward(self, x):
            return [{"boxes": x}]

    with pytest.raises(PathconvertError, match=r"^Detector takes a list, not one tensor: detectors are not exported"):
        export_onnx(Detector(), "x.onnx", [X[0]])
    message = "Detector returns a list, not one tensor or a dictionary with the key 'out'"
    refused(PathconvertError, message, Detector())


def test_a_network_of_2_gb_is_refused(refused, small, monkeypatch):
    monkeypatch.setattr(onnx_export, "LARGEST_FILE", 1000)
    message = "the weights take 0.0 GB, but one .onnx file holds less than 2 GB"
    refused(PathconvertError, message, small)


def test_control_flow_that_depends_on_numbers_is_refused(tmp_path):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            y = self.conv(x)
            return y if bool((y.sum() > 0).item()) else -y

    with pytest.raises(PathconvertError):
        export_onnx(randomise(Branching()), tmp_path / "x.onnx", X)
    assert os.listdir(tmp_path) == []


def test_outputs_that_may_not_be_written(small, tmp_path):
    (tmp_path / "there.onnx").write_text("")
    (tmp_path / "dir.onnx").mkdir()
    for name, message in {
        "x.pt": "has the suffix '.pt'; expected .onnx.",
        "there.onnx": "exists already.",
        "dir.onnx": "is a directory; expected the name of a file.",
        "no/x.onnx": "does not exist.",
    }.items():
        with pytest.raises(OutputError) as caught:
            export_onnx(small, tmp_path / name, X)
        assert str(caught.value).endswith(message)


def test_a_full_disk_and_a_folder_that_is_not_writable(small, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OutputError, match=r"x.onnx was not written: disk full: "):
            export_onnx(small, tmp_path / "x.onnx", X)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(OutputError, match="is not writable"):
        export_onnx(small, tmp_path / "x.onnx", X)
    assert os.listdir(tmp_path) == []


# ---- networks --------------------------------------------------------------------------------------------------


def test_a_torchvision_network(tmp_path):
    model = network("resnet18")
    report = export_onnx(model, tmp_path / "x.onnx", torch.randn(1, 3, 64, 64))
    assert report.batch_norms_left == 0
    assert report.file_bytes <= 1.02 * report.weight_bytes
    assert report.operators["Conv"] == sum(isinstance(m, nn.Conv2d) for m in model.modules())


def test_video(tmp_path):
    model = nn.Sequential(nn.Conv3d(3, 4, (3, 3, 3), padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.AdaptiveAvgPool3d(1))
    x = torch.randn(1, 3, 4, 8, 8)
    export_onnx(randomise(nn.Sequential(model, nn.Flatten(), nn.Linear(4, 3))), tmp_path / "x.onnx", x)
    assert "BatchNormalization" not in ops(tmp_path / "x.onnx")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_half_and_double_checkpoints_export_as_float32(tmp_path, dtype):
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())).to(dtype)
    export_onnx(model, tmp_path / "x.onnx", X.to(dtype))
    assert {t.data_type for t in onnx.load(tmp_path / "x.onnx").graph.initializer} <= {1, 7}  # FLOAT, INT64


def test_a_path_bn_network_folds_to_what_it_was(tmp_path):
    to_path_bn = pathconvert.to_path_bn

    def block(width):
        return nn.Conv2d(width, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()

    model = randomise(nn.Sequential(*block(3), *block(8), *block(8), nn.Conv2d(8, 4, 1), nn.Flatten())).eval()
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
    with pytest.raises(PathconvertError, match="images of size 2×3×9×9 do not fit an input of size 1×3×8×8"):
        export_onnx(model, tmp_path / "x.onnx", torch.randn(1, 3, 8, 8), images=torch.randn(2, 3, 9, 9))
