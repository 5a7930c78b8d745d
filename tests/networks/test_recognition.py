"""Recognise networks by their tensors: every network of the index, near misses by their message,
and old files.
"""

import os
import re
from pathlib import Path

import pytest
import torch
import torchvision
from state_dicts import refusal, tensors_of
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from pathconvert.networks import architectures, cifar, make_index
from pathconvert.networks.architectures import (
    Architecture,
    build,
    modern_names,
    recognise,
    resolve,
)

NAMES = [entry.name for entry in architectures.catalogue()]
SUPPORTED = [entry.name for entry in architectures.catalogue() if entry.supported]
# they have the same tensors
TWINS = {
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
}
FAMILIES = [
    *(
        "alexnet",
        "vgg11 vgg13 vgg16 vgg19 vgg11_bn vgg13_bn vgg16_bn vgg19_bn",
        "squeezenet1_0 squeezenet1_1",
    ),
    *(
        "resnet18 resnet34 resnet50 resnet101 resnet152",
        "resnext50_32x4d resnext101_32x8d resnext101_64x4d",
    ),
    *(
        "wide_resnet50_2 wide_resnet101_2",
        "densenet121 densenet161 densenet169 densenet201",
        "googlenet inception_v3",
    ),
    "shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0",
    "mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3",
    (
        "regnet_x_400mf regnet_x_800mf regnet_x_1_6gf regnet_x_3_2gf regnet_x_8gf regnet_x_16gf"
        " regnet_x_32gf"
    ),
    (
        "regnet_y_400mf regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf regnet_y_8gf regnet_y_16gf"
        " regnet_y_32gf"
    ),
    *("regnet_y_128gf", "r3d_18 mc3_18 r2plus1d_18 s3d", "fcn_resnet50 fcn_resnet101"),
    *(
        "deeplabv3_resnet50 deeplabv3_resnet101",
        "fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2",
    ),
    "maskrcnn_resnet50_fpn maskrcnn_resnet50_fpn_v2 keypointrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn retinanet_resnet50_fpn_v2 fcos_resnet50_fpn ssd300_vgg16",
]
PROMISED = [*" ".join(FAMILIES).split(), *cifar.BUILDERS]

# ---- recognising ---------------------------------------------------------------------------------


def test_everything_promised_is_supported():
    assert set(PROMISED) == set(SUPPORTED)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TWINS])
def test_recognised_with_another_number_of_classes(name):
    found = recognise(tensors_of(name, num_classes=12))
    assert (found.name, found.arguments["num_classes"]) == (name, 12)


@pytest.mark.parametrize("auxiliary", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "googlenet",
        "inception_v3",
        "fcn_resnet50",
        "fcn_resnet101",
        "deeplabv3_resnet50",
        "deeplabv3_resnet101",
    ],
)
def test_auxiliary_heads_are_seen(name, auxiliary):
    argument = "aux_logits" if name in ("googlenet", "inception_v3") else "aux_loss"
    found = recognise(tensors_of(name, num_classes=3, **{argument: auxiliary}))
    assert (found.name, found.arguments[argument]) == (name, auxiliary)


@pytest.mark.parametrize(
    "size", ["resnet18", "inception_v3", "r3d_18", "s3d", "ssd300_vgg16", "fcos_resnet50_fpn"]
)
def test_input_sizes(size):
    sides = {"inception_v3": 299, "r3d_18": 112, "ssd300_vgg16": 300, "fcos_resnet50_fpn": 320}
    frames = (16,) if size in ("r3d_18", "s3d") else ()
    assert resolve(size, None).input_size == (
        3,
        *frames,
        sides.get(size, 224),
        sides.get(size, 224),
    )


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mnasnet0_5", "squeezenet1_1"])
def test_counters_may_be_missing(name):
    tensors = {k: v for k, v in tensors_of(name).items() if not k.endswith("num_batches_tracked")}
    assert recognise(tensors).name == name


def test_real_weights_are_recognised():
    folder = os.environ.get("PATHCONVERT_DATA")
    if not folder:
        pytest.skip("PATHCONVERT_DATA is not set: no real weights")
    tensors = torch.load(Path(folder, "weights", "squeezenet1_1.pth"), weights_only=True)
    assert recognise(tensors) == Architecture(
        "squeezenet1_1", {"num_classes": 1000}, (3, 224, 224), "classification"
    )


def test_twins_are_ambiguous():
    message, tip = refusal(recognise, tensors_of("fasterrcnn_mobilenet_v3_large_fpn"))
    assert message.startswith("these tensors fit several networks: ")
    assert set(message.partition(": ")[2].split(", ")) == TWINS
    assert "--arch" in tip


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "googlenet",
        "regnet_x_400mf",
        "fcos_resnet50_fpn",
        "convnext_tiny",
        "cifar_resnet20",
        "cifar_resnet18",
    ],
)
def test_index_is_in_step_with_torchvision(name):
    fresh = make_index.describe(name)
    assert fresh | {"input_size": list(fresh["input_size"])} == architectures.index()[name]


def test_index_names_every_network_of_torchvision():
    installed = {
        n for n in torchvision.models.list_models() if not n.startswith(("quantized_", "raft_"))
    }
    assert installed | set(cifar.BUILDERS) == set(NAMES)


@pytest.mark.parametrize(
    "name",
    [
        "mobilenet_v2",
        "mobilenet_v3_small",
        "efficientnet_b0",
        "convnext_tiny",
        "swin_t",
        "vit_b_32",
        "maxvit_t",
        "mvit_v2_s",
        "ssdlite320_mobilenet_v3_large",
    ],
)
def test_unsupported_networks_give_their_activation(name):
    activation = architectures.index()[name]["reason"].partition(" ")[0]
    with torch.device("meta"):
        builder = torchvision.models.get_model_builder(name)
        backbone = {"weights_backbone": None} if re.search("rcnn|ssd|lraspp|deeplab", name) else {}
        kinds = {type(module).__name__ for module in builder(weights=None, **backbone).modules()}
    assert activation in kinds


# ---- near misses ---------------------------------------------------------------------------------


def test_missing_tensor():
    tensors = tensors_of("resnet50")
    del tensors["layer1.0.conv2.weight"]
    message, tip = refusal(recognise, tensors)
    assert (
        message
        == "no torchvision network has these tensors; the closest is resnet50 (1 difference): "
        "layer1.0.conv2.weight is missing"
    )
    assert tip == (
        "Other close networks: cifar_resnet50. For a network of your own: --arch"
        " package.module:builder"
    )


def test_one_layer_more_gives_the_first_three():
    tensors = tensors_of("resnet50")
    tensors |= {
        k.replace("layer1.2", "layer1.3"): v
        for k, v in tensors.items()
        if k.startswith("layer1.2.")
    }
    message, _ = refusal(recognise, tensors)
    assert (
        message
        == "no torchvision network has these tensors; the closest is resnet50 (18 differences): "
        "layer1.3.conv1.weight is extra; layer1.3.bn1.weight is extra; layer1.3.bn1.bias is extra"
    )


def test_misshapen_tensor():
    tensors = tensors_of("resnet18") | {"conv1.weight": torch.empty(64, 1, 7, 7)}
    message, _ = refusal(recognise, tensors)
    assert (
        message
        == "no torchvision network has these tensors; the closest is resnet18 (1 difference): "
        "conv1.weight has shape [64, 1, 7, 7], expected [64, 3, 7, 7]"
    )


def test_another_number_of_classes_is_believed_and_does_not_fit():
    message, _ = refusal(recognise, tensors_of("resnet18"), num_classes=10)
    assert message.endswith(
        "fc.weight has shape [1000, 512], expected [10, 512]; fc.bias has shape [1000], expected"
        " [10]"
    )


def test_nothing_like_it():
    message, tip = refusal(recognise, {"a.weight": torch.empty(2, 2), "b.weight": torch.empty(2)})
    assert message == (
        "nothing in these 2 tensors resembles a torchvision network that pathconvert knows"
    )
    assert "--arch package.module:builder" in tip


# ---- old files -----------------------------------------------------------------------------------


def old(tensors: dict[str, Tensor], *rules: tuple[str, object]) -> dict[str, Tensor]:
    for pattern, replacement in rules:
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    return tensors


def test_old_densenet_names():
    tensors = tensors_of("densenet121")
    before = old(tensors, (r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2."))
    assert "features.denseblock1.denselayer1.norm.1.weight" in before
    assert list(modern_names(before)) == list(tensors)


@pytest.mark.parametrize(
    "name", ["maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "keypointrcnn_resnet50_fpn"]
)
def test_old_detection_names(name):
    tensors = tensors_of(name)
    before = old(
        tensors,
        (r"(fpn\.(?:inner|layer)_blocks\.\d)\.0\.", r"\1."),
        (r"(rpn\.head\.conv)\.0\.0\.", r"\1."),
        (r"mask_head\.(\d)\.0\.", lambda m: f"mask_head.mask_fcn{int(m[1]) + 1}."),
        (r"(head\.\w+_head\.conv)\.(\d)\.0\.", lambda m: f"{m[1]}.{2 * int(m[2])}."),
    )
    assert before.keys() != tensors.keys()
    assert list(modern_names(before)) == list(tensors)


@pytest.mark.parametrize(
    "name", [n for n in SUPPORTED if re.search("densenet121|rcnn|retina|fcos|ssd", n)]
)
def test_todays_names_stay(name):
    tensors = tensors_of(name)
    assert list(modern_names(tensors)) == list(tensors)


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "fcos_resnet50_fpn"])
def test_frozen_batch_norm_of_a_detector(name):
    tensors = tensors_of(name)
    counters = [k for k in tensors if "backbone.body" in k and "num_batches_tracked" in k]
    assert "frozen_batch_norm" not in recognise(tensors).arguments
    found = recognise({k: v for k, v in tensors.items() if k not in counters})
    assert found.arguments["frozen_batch_norm"] is True
    model = build(found)
    assert isinstance(model.backbone.body.bn1, FrozenBatchNorm2d)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.backbone.body.modules())
