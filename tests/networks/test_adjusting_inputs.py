"""Other inputs, stems and poolings: read from the tensors, or asked about."""

import pytest
from changed_networks import EQUAL, adjusted, answers_of, difference, images, lively, put, stock
from torch import nn

from pathconvert.errors import ArchitectureError
from pathconvert.networks.adjusting import adjust

# ---- pooling, inputs and stems -------------------------------------------------------------------


def test_vgg_with_another_pooling_is_asked_about():
    model = put("vgg11", "classifier", nn.Linear(512, 5))
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    lively(model)
    with pytest.raises(ArchitectureError) as caught:
        adjust("vgg11", model.state_dict())
    assert str(caught.value) == (
        "these are the tensors of a changed vgg11: its classifier reads a 1×1 feature map instead"
        " of 7×7, and how the features are pooled to that size is not in the file"
    )
    assert answers_of(caught.value) == ("vgg11", {"avgpool": 1})
    result = adjusted("vgg11", model, {"avgpool": 1})
    assert "its features are averaged to a 1×1 map" in result.notes
    assert difference(result, model, images(2, 3, 64, 64)) == 0


INPUTS = {
    "resnet18": ("conv1", lambda c: nn.Conv2d(c, 64, 7, 2, 3, bias=False)),
    "vgg11": ("features.0", lambda c: nn.Conv2d(c, 64, 3, padding=1)),
    "densenet121": ("features.conv0", lambda c: nn.Conv2d(c, 64, 7, 2, 3, bias=False)),
    "mnasnet0_5": ("layers.0", lambda c: nn.Conv2d(c, 16, 3, 2, 1, bias=False)),
    "googlenet": ("conv1.conv", lambda c: nn.Conv2d(c, 64, 7, 2, 3, bias=False)),
    "regnet_x_400mf": ("stem.0", lambda c: nn.Conv2d(c, 32, 3, 2, 1, bias=False)),
}


@pytest.mark.parametrize(("name", "channels"), list(zip(INPUTS, [1, 4, 9, 1, 2, 6], strict=True)))
def test_other_input_channels(name, channels):
    place, convolution = INPUTS[name]
    options = {"aux_logits": False} if name == "googlenet" else {}
    model = put(name, place, convolution(channels), **options)
    if name == "vgg11":
        model.classifier = nn.Linear(25088, 5)
    lively(model)
    result = adjusted(name, model)
    assert result.architecture.arguments["in_channels"] == channels
    assert result.architecture.input_size == (channels, 224, 224)
    note = "1 channel" if channels == 1 else f"{channels} channels"
    assert result.notes[0] == f"its input has {note} instead of 3"
    assert difference(result, model, images(2, channels, 64, 64)) < EQUAL


def test_segmentation_of_grey_images():
    model = stock("fcn_resnet50", num_classes=2)
    model.backbone.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    assert adjusted("fcn_resnet50", model).architecture.arguments["in_channels"] == 1


STEMS = {
    "cifar": ("resnet18", "cifar", "conv1", "maxpool", (3, 1), False),
    "strided": ("resnet18", "conv3-stride2-maxpool", "conv1", "maxpool", (3, 2), True),
    "large": ("resnet18", "conv5-stride2-maxpool", "conv1", "maxpool", (5, 2), True),
    "densenet": ("densenet121", "cifar", "features.conv0", "features.pool0", (3, 1), False),
    "7×7 without pooling": ("resnet18", "conv7-stride2", "conv1", "maxpool", (7, 2), False),
}


def with_stem(name, place, pool, kernel, stride, pooled):
    model = put(name, place, nn.Conv2d(3, 64, kernel, stride, kernel // 2, bias=False))
    if not pooled:
        path, _, leaf = pool.rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Identity())
    return lively(model)


@pytest.mark.parametrize("case", STEMS)
def test_other_stem(case):
    name, stem, place, pool, (kernel, stride), pooled = STEMS[case]
    model = with_stem(name, place, pool, kernel, stride, pooled)
    if kernel != 7:  # a max-pool that is missing behind the stock convolution leaves no trace
        with pytest.raises(ArchitectureError) as caught:
            adjust(name, model.state_dict())
        assert str(caught.value) == (
            f"these are the tensors of a changed {name}: the kernel of {place} is"
            f" {kernel}×{kernel} instead of 7×7, and neither its stride nor whether a max-pool"
            " follows is in the file"
        )
        proposed = "cifar" if kernel == 3 else "conv5-stride2-maxpool"
        assert answers_of(caught.value) == (name, {"stem": proposed})
    result = adjusted(name, model, {"stem": stem})
    assert result.architecture.arguments["stem"] == stem
    assert result.notes == (
        f"its first convolution is {kernel}×{kernel} with stride {stride}, and"
        f" {'a' if pooled else 'no'} max-pool follows",
    )
    assert result.architecture.input_size == ((3, 32, 32) if stem == "cifar" else (3, 224, 224))
    assert difference(result, model, images(2, 3, 32, 32)) < EQUAL


def test_everything_is_asked_at_once():
    model = with_stem("resnet18", "conv1", "maxpool", 3, 1, False)
    model.fc = nn.Sequential(nn.Linear(512, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with pytest.raises(ArchitectureError) as caught:
        adjust("resnet18", model.state_dict())
    name, answers = answers_of(caught.value)
    assert answers == {"stem": "cifar", "head": "linear-relu-linear"}
    assert difference(adjusted(name, model, answers), model, images(2, 3, 32, 32)) == 0


def test_stem_with_another_kernel_than_the_file():
    model = with_stem("resnet18", "conv1", "maxpool", 5, 2, True)
    with pytest.raises(ArchitectureError) as caught:
        adjust("resnet18", model.state_dict(), given={"stem": "cifar"})
    assert str(caught.value) == (
        "resnet18: the stem 'cifar' has a 3×3 kernel, but that of conv1 in the file is 5×5"
    )
    assert answers_of(caught.value) == ("resnet18", {"stem": "conv5-stride2-maxpool"})
