"""Networks that were changed before training are recognised from their tensors, or asked about."""

from collections import OrderedDict

import pytest
import torch
from changed_networks import EQUAL, adjusted, answers_of, difference, images, lively, put, stock
from torch import nn

from pathconvert.errors import ArchitectureError
from pathconvert.networks.adjusting import adjust
from pathconvert.networks.adjusting_heads import ASSUMED_DROPOUT
from pathconvert.networks.builders import build_torchvision

Seq, Lin, ReLU, Drop = nn.Sequential, nn.Linear, nn.ReLU, nn.Dropout


# ---- classifiers that the tensors show -----------------------------------------------------------

HEADS = {
    "embedding": ("resnet18", "fc", lambda: Lin(512, 128), {"num_classes": 128}, None),
    "no bias": (
        "resnet18",
        "fc",
        lambda: Lin(512, 7, bias=False),
        {"num_classes": 7, "head": "linear7nobias"},
        "its classifier fc is a Linear without a bias with 7 outputs",
    ),
    "none": (
        "resnet18",
        "fc",
        nn.Identity,
        {"head": "identity"},
        "it has no classifier: its outputs are the features that fc would read",
    ),
    "dropout": (
        "resnet18",
        "fc",
        lambda: Seq(Drop(), Lin(512, 10)),
        {"num_classes": 10, "head": "dropout-linear10"},
        "its classifier fc is a Sequential(Dropout, Linear) with 10 outputs" + ASSUMED_DROPOUT,
    ),
    "batchnorm": (
        "resnet18",
        "fc",
        lambda: Seq(nn.BatchNorm1d(512), Lin(512, 1, bias=False)),
        {"num_classes": 1, "head": "batchnorm-linear1nobias"},
        "its classifier fc is a Sequential(BatchNorm1d, Linear) with 1 output",
    ),
    "two linear": (
        "shufflenet_v2_x0_5",
        "fc",
        lambda: Seq(Lin(1024, 8), Lin(8, 3)),
        {"num_classes": 3, "head": "linear8-linear3"},
        "its classifier fc is a Sequential(Linear, Linear) with 3 outputs",
    ),
    "regnet": (
        "regnet_x_400mf",
        "fc",
        nn.Identity,
        {"head": "identity"},
        "it has no classifier: its outputs are the features that fc would read",
    ),
    "densenet": (
        "densenet121",
        "classifier",
        lambda: Seq(Drop(0.2), Lin(1024, 4)),
        {"num_classes": 4, "head": "dropout-linear4"},
        "its classifier classifier is a Sequential(Dropout, Linear) with 4 outputs"
        + ASSUMED_DROPOUT,
    ),
    "mnasnet": (
        "mnasnet0_5",
        "classifier",
        lambda: Lin(1280, 5),
        {"num_classes": 5, "head": "linear5"},
        "its classifier classifier is a Linear with 5 outputs",
    ),
    "mnasnet inside": (
        "mnasnet0_5",
        "classifier.1",
        lambda: Seq(Drop(), Lin(1280, 5)),
        {"num_classes": 5, "head": "dropout-linear5", "head_at": "classifier.1"},
        "its classifier classifier.1 is a Sequential(Dropout, Linear) with 5 outputs"
        + ASSUMED_DROPOUT,
    ),
    "vgg": (
        "vgg11",
        "classifier",
        lambda: Lin(25088, 5),
        {"num_classes": 5, "head": "linear5"},
        "its classifier classifier is a Linear with 5 outputs",
    ),
    "vgg none": (
        "vgg11",
        "classifier",
        nn.Identity,
        {"head": "identity"},
        "it has no classifier: its outputs are the features that classifier would read",
    ),
    "vgg narrow": (
        "vgg11",
        "classifier",
        lambda: Seq(Lin(25088, 8), ReLU(), Drop(), Lin(8, 6), ReLU(), Drop(), Lin(6, 5)),
        {
            "num_classes": 5,
            "widths": {
                "classifier.0": [8, 25088],
                "classifier.3": [6, 8],
                "classifier.6": [0, 6],
            },
        },
        "3 layers of it have other widths than the stock network's, for example classifier.0:"
        " 8×25088; the activations of its classifier are assumed to be the stock network's",
    ),
    "alexnet inside": (
        "alexnet",
        "classifier.6",
        lambda: Seq(Drop(), Lin(4096, 5)),
        {"num_classes": 5, "head": "dropout-linear5", "head_at": "classifier.6"},
        "its classifier classifier.6 is a Sequential(Dropout, Linear) with 5 outputs"
        + ASSUMED_DROPOUT,
    ),
    "video": (
        "r3d_18",
        "fc",
        lambda: Seq(Drop(), Lin(512, 3)),
        {"num_classes": 3, "head": "dropout-linear3"},
        "its classifier fc is a Sequential(Dropout, Linear) with 3 outputs" + ASSUMED_DROPOUT,
    ),
}


@pytest.mark.parametrize("case", HEADS)
def test_classifier_that_the_tensors_show(case):
    name, place, head, arguments, note = HEADS[case]
    model = lively(put(name, place, head()))
    result = adjusted(name, model)
    kept = {k: v for k, v in result.architecture.arguments.items() if k != "init_weights"}
    assert kept == arguments
    assert result.notes == ((note,) if note else ())
    x = images(2, 3, 4, 32, 32) if name == "r3d_18" else images(2, 3, 64, 64)
    assert difference(result, model, x) < EQUAL


def test_stock_network_is_left_as_it_is():
    result = adjusted("resnet18", stock("resnet18", num_classes=3))
    assert (result.architecture.arguments, result.notes) == ({"num_classes": 3}, ())
    assert result.architecture.input_size == (3, 224, 224)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet18", {"head": "linear8-relu-linear10-softmax", "num_classes": 4}),
        ("alexnet", {"head": "dropout-linear5", "head_at": "classifier.6", "num_classes": 4}),
        (
            "alexnet",
            {"widths": {"classifier.6": [0, 8], "classifier.4": [8, 4096]}, "num_classes": 4},
        ),
    ],
)
def test_changed_network_can_be_given_other_classes(name, arguments):
    """As ``finetune --new-head`` does: with ``num_classes`` alone."""
    layers = [x for x in build_torchvision(name, arguments).modules() if isinstance(x, Lin)]
    assert layers[-1].out_features == 4


# ---- classifiers that have to be asked about -----------------------------------------------------

BETWEEN = ", and which activations stand between or behind them is not in the file"
ASKED_HEADS = {
    "two linear layers that could stand side by side": (
        "resnet18",
        "fc",
        lambda: Seq(Lin(512, 512), Lin(512, 512)),
        f"the classifier has its weights in fc.0, fc.1{BETWEEN}",
        {"head": "linear-linear"},
        {"head": "linear512-linear512"},
    ),
    "mlp": (
        "resnet18",
        "fc",
        lambda: Seq(Lin(512, 8), ReLU(), Lin(8, 3)),
        f"the classifier has its weights in fc.0, fc.2{BETWEEN}",
        {"head": "linear-relu-linear"},
        {"head": "linear8-relu-linear3"},
    ),
    "mlp with dropout": (
        "resnet18",
        "fc",
        lambda: Seq(Lin(512, 8, bias=False), ReLU(), Drop(), Lin(8, 3)),
        f"the classifier has its weights in fc.0, fc.3{BETWEEN}",
        {"head": "linear-relu-dropout-linear"},
        {"head": "linear8nobias-relu-dropout-linear3"},
    ),
    "mlp with batchnorm": (
        "resnet18",
        "fc",
        lambda: Seq(Drop(), Lin(512, 8), nn.BatchNorm1d(8), ReLU(), Lin(8, 3)),
        f"the classifier has its weights in fc.1, fc.2, fc.4{BETWEEN}",
        {"head": "dropout-linear-batchnorm-relu-linear"},
        {"head": "dropout-linear8-batchnorm-relu-linear3"},
    ),
    "named layers": (
        "resnet18",
        "fc",
        lambda: Seq(OrderedDict(fc1=Lin(512, 8), relu=ReLU(), fc2=Lin(8, 3))),
        f"the classifier has its weights in fc.fc1, fc.fc2{BETWEEN}",
        {"head": "linear-relu-linear"},
        {"head": "fc1:linear8-relu-fc2:linear3"},
    ),
    "named layers with batchnorm": (
        "resnet18",
        "fc",
        lambda: Seq(OrderedDict(a=Lin(512, 8), b=nn.BatchNorm1d(8), c=ReLU(), d=Lin(8, 3))),
        f"the classifier has its weights in fc.a, fc.b, fc.d{BETWEEN}",
        {"head": "linear-batchnorm-relu-linear"},
        {"head": "a:linear8-b:batchnorm-relu-d:linear3"},
    ),
    "flattened": (
        "resnet18",
        "fc",
        lambda: Seq(nn.Flatten(), Drop(), Lin(512, 3)),
        f"the classifier has its weights in fc.2{BETWEEN}",
        {"head": "flatten-dropout-linear"},
        {"head": "flatten-dropout-linear3"},
    ),
    "one layer in a Sequential": (
        "shufflenet_v2_x0_5",
        "fc",
        lambda: Seq(Lin(1024, 4)),
        f"the classifier has its weights in fc.0{BETWEEN}",
        {"head": "linear"},
        {"head": "0:linear4"},
    ),
    "alexnet": (
        "alexnet",
        "classifier",
        lambda: Seq(Drop(), Lin(9216, 8), ReLU(), Lin(8, 3)),
        f"the classifier has its weights in classifier.1, classifier.3{BETWEEN}",
        {"head": "dropout-linear-relu-linear"},
        {"head": "dropout-linear8-relu-linear3"},
    ),
    "squeezenet": (
        "squeezenet1_1",
        "classifier.1",
        nn.Identity,
        "classifier.1 is missing, and whether the features are pooled without it is not in the"
        " file",
        {"head": "identity", "head_at": "classifier.1"},
        {"head": "identity", "head_at": "classifier.1"},
    ),
}


@pytest.mark.parametrize("case", ASKED_HEADS)
def test_classifier_that_is_asked_about(case):
    """The command in the tip makes the commonest network of such a file."""
    name, place, head, text, answers, arguments = ASKED_HEADS[case]
    model = lively(put(name, place, head()))
    with pytest.raises(ArchitectureError) as caught:
        adjust(name, model.state_dict())
    assert str(caught.value) == f"these are the tensors of a changed {name}: {text}"
    assert answers_of(caught.value) == (name, answers)
    result = adjusted(name, model, given=answers)
    found = result.architecture.arguments
    assert {key: found[key] for key in arguments} == arguments
    assert difference(result, model, images(2, 3, 64, 64)) < EQUAL


OTHER_ANSWERS = {
    "tanh": ("linear-tanh-linear", lambda: Seq(Lin(512, 8), nn.Tanh(), Lin(8, 3))),
    "dropout": ("linear-dropout-linear", lambda: Seq(Lin(512, 8), Drop(), Lin(8, 3))),
    "leaky": ("linear-leakyrelu-linear", lambda: Seq(Lin(512, 8), nn.LeakyReLU(), Lin(8, 3))),
    "sigmoid": ("linear-sigmoid", lambda: Seq(Lin(512, 3), nn.Sigmoid())),
    "with sizes": ("linear8-relu-linear3", lambda: Seq(Lin(512, 8), ReLU(), Lin(8, 3))),
    "log softmax": (
        "linear-relu-linear-logsoftmax",
        lambda: Seq(OrderedDict(a=Lin(512, 8), b=ReLU(), c=Lin(8, 3), output=nn.LogSoftmax(dim=1))),
    ),
}


@pytest.mark.parametrize("case", OTHER_ANSWERS)
def test_other_answer(case):
    text, head = OTHER_ANSWERS[case]
    model = lively(put("resnet18", "fc", head()))
    assert difference(adjusted("resnet18", model, {"head": text}), model, images(2, 3, 64, 64)) == 0


def test_squeezenet_without_a_classifier_is_not_pooled():
    model = lively(put("squeezenet1_1", "classifier", nn.Identity()))
    result = adjusted("squeezenet1_1", model, {"head": "identity"})
    assert difference(result, model, images(2, 3, 64, 64)) == 0


@pytest.mark.parametrize("head", ["linear-relu-dropout-linear", "linear9-relu-linear", "linear"])
def test_head_with_its_weights_elsewhere(head):
    model = put("resnet18", "fc", Seq(Lin(512, 8), ReLU(), Lin(8, 3)))
    with pytest.raises(ArchitectureError) as caught:
        adjust("resnet18", model.state_dict(), given={"head": head})
    assert str(caught.value) == (
        f"resnet18: the head {head!r} does not have its weights where the file has them"
        " (fc.0, fc.2)"
    )
    assert answers_of(caught.value) == ("resnet18", {"head": "linear-relu-linear"})


@pytest.mark.parametrize(("classes", "fits"), [(3, True), (4, False)])
def test_number_of_classes_of_a_new_head(classes, fits):
    model = put("resnet18", "fc", Seq(Drop(), Lin(512, 3)))
    assert (adjust("resnet18", model.state_dict(), classes) is not None) is fits


def fastai_head(features: int) -> nn.Module:
    """fastai's ``create_head`` behind its pooling, which holds the first two places."""
    return Seq(
        nn.Identity(),
        nn.Flatten(),
        nn.BatchNorm1d(2 * features),
        Drop(0.25),
        Lin(2 * features, 512, bias=False),
        ReLU(),
        nn.BatchNorm1d(512),
        Drop(),
        Lin(512, 3, bias=False),
    )


class MaximumAndMean(nn.Module):
    """fastai's AdaptiveConcatPool2d."""

    def forward(self, x):
        return torch.cat([x.amax((2, 3), keepdim=True), x.mean((2, 3), keepdim=True)], 1)


def test_fastai_head_is_asked_about():
    model = put("resnet18", "fc", fastai_head(512))
    model.avgpool = MaximumAndMean()
    lively(model)
    with pytest.raises(ArchitectureError) as caught:
        adjust("resnet18", model.state_dict())
    assert "its classifier reads 1024 features instead of 512, and how they are pooled is" in str(
        caught.value
    )
    name, answers = answers_of(caught.value)
    assert answers == {
        "avgpool": "concat",
        "head": "identity-flatten-batchnorm-dropout-linear-relu-batchnorm-dropout-linear",
    }
    result = adjusted(name, model, answers)
    assert result.notes[0] == "its features are the maximum and the mean of every channel"
    assert difference(result, model, images(2, 3, 64, 64)) < EQUAL
