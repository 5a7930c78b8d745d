"""The options of an export: one list of defaults, and what is refused."""

import dataclasses
import inspect

import pytest
import torch

from pathconvert.errors import PathconvertError
from pathconvert.export.card import ModelCard
from pathconvert.export.graph.export import export_onnx
from pathconvert.export.graph.options import ExportOptions, check_inputs
from pathconvert.networks.preprocessing import Preprocessing

IMAGENET = Preprocessing(18, (16, 16), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_export_onnx_has_the_same_options_and_defaults():
    parameters = inspect.signature(export_onnx).parameters
    for field in dataclasses.fields(ExportOptions):
        name = f"with_{field.name}" if f"with_{field.name}" in parameters else field.name
        assert parameters[name].default == field.default, name


def test_the_arguments_of_export_onnx_keep_their_order():
    """People pass them by position."""
    kinds = inspect.signature(export_onnx).parameters.values()
    assert [p.name for p in kinds if p.kind is p.POSITIONAL_OR_KEYWORD] == [
        "model",
        "path",
        "example_input",
        "opset",
        "precision",
        "dynamic_batch",
        "dynamic_size",
        "with_preprocessing",
        "with_softmax",
        "card",
        "images",
        "force",
        "io_dtype",
    ]


@pytest.mark.parametrize(
    ("options", "message", "tip"),
    [
        (
            {"opset": 17},
            "opset 17 is not offered: pathconvert writes 18 to 24",
            "Use the default, --opset 20; the exporter cannot write opsets below 18.",
        ),
        (
            {"precision": "bfloat16"},
            "precision bf16 is not offered: the exporter writes invalid files for it",
            "Choose one of fp32, fp16.",
        ),
        (
            {"precision": "int8"},
            "precision 'int8' is not offered",
            "Choose one of fp32, fp16.",
        ),
        (
            {"io_dtype": "fp16"},
            "inputs and outputs in 'fp16' are not offered with precision fp32",
            "Use --io-dtype fp32.",
        ),
        (
            {"io_dtype": "int8", "precision": "fp16"},
            "inputs and outputs in 'int8' are not offered with precision fp16",
            "Use --io-dtype fp32.",
        ),
        (
            {"gauge": "pow2"},
            "gauge 'pow2' is not offered for an export",
            "Choose one of keep, balanced.",
        ),
    ],
)
def test_what_is_not_offered_is_refused(options, message, tip):
    with pytest.raises(PathconvertError) as caught:
        ExportOptions(**options)
    assert (str(caught.value), caught.value.tip) == (message, tip)


def test_the_card_says_what_the_options_say():
    card = ExportOptions(preprocessing=IMAGENET, softmax=True, precision="fp16").filled_card()
    assert card == ModelCard(
        preprocessing=IMAGENET, precision="fp16", softmax=True, preprocessing_in_graph=True
    )
    given = ModelCard(form="path", preprocessing=IMAGENET)
    assert ExportOptions(card=given).filled_card() == given


def test_no_images_are_refused():
    example = torch.zeros(1, 3, 8, 8)
    with pytest.raises(PathconvertError) as caught:
        check_inputs(example, ExportOptions(images=torch.zeros(0, 3, 8, 8)))
    assert str(caught.value) == "images of size 0×3×8×8 do not fit an input of size 1×3×8×8"
    larger = torch.zeros(2, 3, 9, 9)
    check_inputs(example, ExportOptions(images=larger, dynamic_size=True))
