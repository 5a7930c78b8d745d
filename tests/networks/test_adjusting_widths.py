"""Other widths, biases and auxiliary heads; what does not fit; and the notations of changes."""

import pytest
import torch
import torchvision
from changed_networks import EQUAL, adjusted, difference, images, lively, put, stock
from torch import nn
from torchvision.models.densenet import DenseNet
from torchvision.models.googlenet import InceptionAux
from torchvision.models.mnasnet import MNASNet
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.models.shufflenetv2 import ShuffleNetV2

from pathconvert.errors import ArchitectureError
from pathconvert.networks import heads
from pathconvert.networks.adjusting import adjust, network_text, title
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.builders import build_torchvision

# ---- widths --------------------------------------------------------------------------------------


def pruned_resnet() -> nn.Module:
    """A ResNet-18 whose blocks lost different numbers of inner channels."""
    model = stock("resnet18", num_classes=3)
    blocks = [block for stage in (model.layer1, model.layer2) for block in stage]
    for i, block in enumerate(blocks):
        width = 20 + 3 * i
        first, second = block.conv1, block.conv2
        block.conv1 = nn.Conv2d(first.in_channels, width, 3, first.stride, 1, bias=False)
        block.bn1 = nn.BatchNorm2d(width)
        block.conv2 = nn.Conv2d(width, second.out_channels, 3, padding=1, bias=False)
    return model


def pruned_resnet_with_another_head() -> nn.Module:
    model = pruned_resnet()
    model.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    model.fc = nn.Sequential(nn.Dropout(), nn.Linear(512, 4))
    return model


def narrow_vgg() -> nn.Module:
    """A VGG-11 with half the last channels, and a classifier for them."""
    model = put("vgg11", "features.18", nn.Conv2d(512, 16, 3, padding=1))
    model.classifier = nn.Linear(16 * 7 * 7, 3)
    return model


WIDTHS = {
    "resnet": (
        "resnet18",
        pruned_resnet,
        "12 layers of it have other widths than the stock network's, for example layer1.0.conv1:"
        " 20×64",
    ),
    "resnet, head, input": (
        "resnet18",
        pruned_resnet_with_another_head,
        "12 layers of it have other widths than the stock network's, for example layer1.0.conv1:"
        " 20×64",
    ),
    "groups": (
        "resnext50_32x4d",
        lambda: ResNet(Bottleneck, [3, 4, 6, 3], groups=16, width_per_group=8),
        "16 layers of it have other widths than the stock network's, for example layer1.0.conv2:"
        " 128×8",
    ),
    "depthwise, shuffle": (
        "shufflenet_v2_x0_5",
        lambda: ShuffleNetV2([4, 8, 4], [24, 40, 80, 160, 512]),
        "109 layers of it have other widths than the stock network's, for example"
        " stage2.0.branch1.2: 20×24",
    ),
    "concatenation": (
        "densenet121",
        lambda: DenseNet(8, (6, 12, 24, 16), 16),
        "242 layers of it have other widths than the stock network's, for example features.conv0:"
        " 16×3",
    ),
    "flattened": (
        "vgg11",
        narrow_vgg,
        "1 layer of it has other widths than the stock network's, for example features.18: 16×512",
    ),
}


@pytest.mark.parametrize("case", WIDTHS)
def test_other_widths(case):
    name, build, note = WIDTHS[case]
    model = lively(build())
    result = adjusted(name, model)
    assert result.notes[-1] == note
    channels = result.architecture.input_size[0]
    assert difference(result, model, images(2, channels, 64, 64)) < EQUAL


# ---- biases and auxiliary heads ------------------------------------------------------------------


def test_biases_before_batch_norms():
    """As in ResNets that come from Keras or Caffe."""
    model = stock("resnet18", num_classes=3)
    for block in model.layer1:
        block.conv1 = nn.Conv2d(64, 64, 3, padding=1)
    result = adjusted("resnet18", lively(model))
    assert result.architecture.arguments["biases"] == {
        "layer1.0.conv1": True,
        "layer1.1.conv1": True,
    }
    assert result.notes == (
        "2 layers of it have a bias, unlike the stock network's, for example layer1.0.conv1",
    )
    assert difference(result, model, images(2, 3, 64, 64)) < EQUAL


def test_no_bias_where_the_stock_network_has_one():
    model = put("vgg11_bn", "features.0", nn.Conv2d(3, 64, 3, padding=1, bias=False))
    model.classifier = nn.Linear(25088, 3)
    result = adjusted("vgg11_bn", lively(model))
    assert result.architecture.arguments["biases"] == {"features.0": False}
    assert result.notes[-1] == (
        "1 layer of it has no bias, unlike the stock network's, for example features.0"
    )
    assert difference(result, model, images(2, 3, 64, 64)) < EQUAL


def googlenet() -> nn.Module:
    model = put("googlenet", "fc", nn.Linear(1024, 4))
    assert isinstance(model.aux1, InceptionAux)
    return model


def segmentation() -> nn.Module:
    model = stock("fcn_resnet50", aux_loss=True, num_classes=3)
    model.aux_classifier = FCNHead(1024, 5)
    return model


AUXILIARY = {
    "googlenet": (googlenet, {"aux1.fc2": [1000, 1024], "aux2.fc2": [1000, 1024]}),
    "fcn_resnet50": (segmentation, {"aux_classifier.4": [5, 256]}),
}


@pytest.mark.parametrize("name", AUXILIARY)
def test_auxiliary_head_with_other_classes(name):
    build, widths = AUXILIARY[name]
    result = adjusted(name, build())
    assert result.architecture.arguments["widths"] == widths
    assert result.notes == tuple(
        f"its auxiliary classifier {place} has {sizes[0]} outputs"
        for place, sizes in widths.items()
    )


def test_number_of_keypoints():
    model = torchvision.models.detection.keypointrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_keypoints=4
    )
    result = adjusted("keypointrcnn_resnet50_fpn", model)
    assert result.architecture.arguments["num_keypoints"] == 4
    assert result.notes == ("it finds 4 keypoints",)


# ---- what does not fit ---------------------------------------------------------------------------


def resized(name: str, *shape: int) -> dict[str, torch.Tensor]:
    return dict(stock("resnet18").state_dict()) | {name: torch.zeros(shape)}


def grey_retinanet() -> nn.Module:
    model = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    model.backbone.body.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    return model


def single_channel() -> nn.Module:
    """An addition would repeat the single channel, and the network would run."""
    model = put("resnet18", "layer1.1.conv2", nn.Conv2d(64, 1, 3, padding=1, bias=False))
    model.layer1[1].bn2 = nn.BatchNorm2d(1)
    return model


MISFITS = {
    "another depth": ("resnet18", lambda: stock("resnet34").state_dict()),
    "without BatchNorm": ("vgg16_bn", lambda: stock("vgg16").state_dict()),
    "no normalization": (
        "resnet18",
        lambda: stock("resnet18", norm_layer=nn.Identity).state_dict(),
    ),
    "group norm": (
        "resnet18",
        lambda: stock("resnet18", norm_layer=lambda c: nn.GroupNorm(8, c)).state_dict(),
    ),
    "outputs that nothing reads": (
        "resnet18",
        lambda: resized("layer1.0.conv1.weight", 40, 64, 3, 3),
    ),
    "another kernel": ("resnet18", lambda: resized("layer1.0.conv1.weight", 64, 64, 5, 5)),
    "a stem of another form": ("resnet18", lambda: resized("conv1.weight", 64, 3, 7)),
    "a head of another kind": (
        "resnet18",
        lambda: put(
            "resnet18", "fc", nn.Sequential(nn.LayerNorm(512), nn.Linear(512, 3))
        ).state_dict(),
    ),
    "a nested head": (
        "resnet18",
        lambda: put("resnet18", "fc", nn.Sequential(nn.Sequential(nn.Linear(512, 3)))).state_dict(),
    ),
    "more features than there are": (
        "resnet18",
        lambda: put("resnet18", "fc", nn.Sequential(nn.Dropout(), nn.Linear(2048, 3))).state_dict(),
    ),
    "a detector's input": ("retinanet_resnet50_fpn", lambda: grey_retinanet().state_dict()),
    "a single channel": ("resnet18", lambda: single_channel().state_dict()),
    "a residual that may be one": ("mnasnet0_5", lambda: MNASNet(0.35).state_dict()),
    "an inverted residual that may be one": (
        "mobilenet_v2",
        lambda: stock("mobilenet_v2", width_mult=0.25).state_dict(),
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_network_that_no_change_makes_fit(case):
    name, tensors = MISFITS[case]
    assert adjust(name, tensors()) is None


def test_transformed_input_has_three_channels():
    model = put("googlenet", "conv1.conv", nn.Conv2d(1, 64, 7, 2, 3, bias=False))
    tensors = model.state_dict()
    assert adjust("googlenet", tensors, given={"transform_input": True}) is None
    assert adjust("googlenet", tensors, given={"transform_input": False}) is not None


# ---- what was named does not fit -----------------------------------------------------------------

NAMED = {
    "in_channels": (
        "resnet18",
        {"in_channels": 4},
        "resnet18: in_channels=4 was given, but in the file there is no such change",
        "Leave in_channels out: it is read from the tensors.",
    ),
    "batch_norm": (
        "resnet18",
        {"batch_norm": "folded"},
        "resnet18: batch_norm=folded was given, but in the file there is no such change",
        "Leave batch_norm out: it is read from the tensors.",
    ),
    "stem": (
        "resnet18",
        {"stem": "small"},
        "the stem 'small' cannot be read",
        "Write stem=cifar for a 3×3 convolution with stride 1 and no max-pool, or the kernel size,"
        " the stride and the max-pool: stem=conv3-stride2-maxpool",
    ),
    "no stem": (
        "mnasnet0_5",
        {"stem": "cifar"},
        "the stem of a MNASNet cannot be changed",
        "Leave out stem=, or name a builder of your own: --arch package.module:builder",
    ),
    "pooling": (
        "resnet18",
        {"avgpool": 2},
        "avgpool=2 is not possible in a ResNet",
        "Leave it out; in a VGG or an AlexNet, give the side of the pooled feature map: avgpool=1",
    ),
    "head": (
        "resnet18",
        {"head": "linear-rlu"},
        "the head 'linear-rlu' cannot be read: there is no layer 'rlu'",
        "Write the kinds of the layers in their order, for example head=linear-relu-linear; the"
        " kinds are linear, batchnorm, relu, leakyrelu, elu, gelu, silu, tanh, sigmoid, softmax,"
        " logsoftmax, dropout, flatten, identity.",
    ),
    "no head": (
        "fcn_resnet50",
        {"head": "linear"},
        "fcn_resnet50 has no classifier that could be replaced",
        "Leave out head=, or name a builder of your own: --arch package.module:builder",
    ),
    "place": (
        "mnasnet0_5",
        {"head": "linear", "head_at": "layers"},
        "mnasnet0_5: head_at=layers is not a part of its classifier",
        "Choose one of classifier, classifier.0, classifier.1, or leave head_at out for"
        " classifier.",
    ),
}


@pytest.mark.parametrize("case", NAMED)
def test_named_change_that_does_not_fit(case):
    name, given, message, tip = NAMED[case]
    tensors = stock(name).state_dict()
    with pytest.raises(ArchitectureError) as caught:
        adjust(name, tensors, given=given)
    assert (str(caught.value), caught.value.tip) == (message, tip)


BUILT = {
    "head without sizes": (
        {"head": "linear-relu-linear"},
        "the head 'linear-relu-linear' does not say how many outputs every linear layer has",
    ),
    "folding": (
        {"batch_norm": "merged"},
        "torchvision cannot build resnet18 with {'batch_norm': 'merged'}: ValueError:"
        " batch_norm='merged' is not 'folded'",
    ),
    "no such layer": (
        {"widths": {"layer9": [3, 4]}},
        "the network has no layer 'layer9' whose width could be changed",
    ),
    "sizes of another kind": (
        {"widths": {"conv1": "wide"}},
        "torchvision cannot build resnet18 with {'widths': {'conv1': 'wide'}}: TypeError:",
    ),
    "no channels": (
        {"in_channels": 0},
        "torchvision cannot build resnet18 with {'in_channels': 0}: ValueError: a layer cannot have"
        " a weight of shape [64, 0, 7, 7]",
    ),
    "biases of another kind": (
        {"biases": ["conv1"]},
        "torchvision cannot build resnet18 with {'biases': ['conv1']}: AttributeError:",
    ),
    "no such layer for a bias": (
        {"biases": {"bn1": True}},
        "the network has no layer 'bn1' that could have a bias",
    ),
    "channels of another kind": (
        {"in_channels": "three"},
        "torchvision cannot build resnet18 with {'in_channels': 'three'}: TypeError:",
    ),
}


@pytest.mark.parametrize("case", BUILT)
def test_changes_that_cannot_be_built(case):
    """They may come from a file that somebody wrote."""
    arguments, message = BUILT[case]
    with pytest.raises(ArchitectureError) as caught:
        build_torchvision("resnet18", arguments)
    assert str(caught.value).startswith(message)
    assert caught.value.tip


@pytest.mark.parametrize(
    "text",
    [
        "linear10",
        "linear10nobias",
        "linear512x10",
        "dropout-linear256-batchnorm-relu-linear10",
        "fc1:linear8-relu-fc2:linear3",
        "0:linear4",
        "identity",
    ],
)
def test_notation_of_a_head(text):
    assert heads.text_of(heads.parse(text)) == text


def test_title():
    assert title(Architecture("resnet50", {"batch_norm": "folded"})) == (
        "resnet50 (BatchNorm folded)"
    )
    assert title(Architecture("resnet50")) == "resnet50"


def test_summary_counts_layers():
    arguments = {"num_classes": 5, "batch_norm": "folded", "widths": {"conv1": [8, 3]}}
    assert network_text("resnet18", arguments) == (
        "resnet18 (num_classes=5, BatchNorm folded, widths of 1 layer)"
    )
    assert network_text("resnet18", {}) == "resnet18"
