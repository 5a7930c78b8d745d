"""What an exported graph holds: preprocessing, softmax, heads, weights and the model card."""

import json

import onnx
import pytest
import torch
import torch.nn.functional as F
from sample_networks import network, randomise
from small_export import IMAGENET, X, ort_run
from torch import nn

from pathconvert.errors import CheckpointError, PathconvertError
from pathconvert.export.card import PROPERTY, ModelCard, read_card, write_card
from pathconvert.export.graph import export as onnx_export
from pathconvert.export.graph import wrapping
from pathconvert.export.graph.export import export_onnx
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.preprocessing import for_weights, labels_of


def test_preprocessing_and_softmax_in_the_graph(small, tmp_path):
    export_onnx(small, tmp_path / "x.onnx", X, with_preprocessing=IMAGENET, with_softmax=True)
    pixels = torch.randint(
        0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
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
            return {
                name: F.interpolate(self.head(f(y)), size, mode="bilinear")
                for name, f in PARTS.items()
            }

    PARTS = {"out": F.relu, "aux": torch.neg}
    model = randomise(Segmenter())
    export_onnx(model, tmp_path / "a.onnx", X)
    assert [t.name for t in onnx.load(tmp_path / "a.onnx").graph.output] == ["logits"]
    export_onnx(model, tmp_path / "b.onnx", X, auxiliary=True, dynamic_size=True)
    assert [t.name for t in onnx.load(tmp_path / "b.onnx").graph.output] == ["out", "aux"]


def test_a_softmax_needs_classes(refused):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 1), nn.Flatten(0))
    error = refused(
        PathconvertError,
        "Sequential gives an output of size [1], which has no classes for a softmax",
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
    assert notes == (
        f"the file does not contain the weights of {heads}, which do not run in evaluation mode",
    )


def test_batch_norms_that_are_not_in_the_graph_are_not_called_left(tmp_path):
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.aux = nn.Conv2d(3, 4, 3), nn.ModuleDict({"bn": nn.BatchNorm2d(4)})

        def forward(self, x):
            x = self.conv(x)
            return (x.mean((2, 3)), self.aux.bn(x)) if self.training else x.mean((2, 3))

    report = export_onnx(Auxiliary(), tmp_path / "x.onnx", X)
    assert report.notes == (
        "the file does not contain the weights of aux, which do not run in evaluation mode",
    )


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
        architecture,
        "path",
        "r.pt",
        "00ff",
        for_weights(architecture, None),
        labels_of(architecture, None),
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
        assert for_weights(architecture, None) is None
    assert (
        labels_of(Architecture("resnet50", {"num_classes": 7}, None, "classification"), None)
        is None
    )


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
