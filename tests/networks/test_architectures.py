"""Recognise, name, build and load networks: every network of the index, and every refusal by its message."""

import os
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from pathconvert.errors import ArchitectureError
from pathconvert.networks import architectures, make_index, pretrained
from pathconvert.networks.architectures import Architecture, build, load_tensors, modern_names, recognise, resolve

NAMES = [entry.name for entry in architectures.catalogue()]
SUPPORTED = [entry.name for entry in architectures.catalogue() if entry.supported]
TWINS = {"fasterrcnn_mobilenet_v3_large_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn"}  # they have the same tensors
FAMILIES = [
    *("alexnet", "vgg11 vgg13 vgg16 vgg19 vgg11_bn vgg13_bn vgg16_bn vgg19_bn", "squeezenet1_0 squeezenet1_1"),
    *("resnet18 resnet34 resnet50 resnet101 resnet152", "resnext50_32x4d resnext101_32x8d resnext101_64x4d"),
    *("wide_resnet50_2 wide_resnet101_2", "densenet121 densenet161 densenet169 densenet201", "googlenet inception_v3"),
    "shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0",
    "mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3",
    "regnet_x_400mf regnet_x_800mf regnet_x_1_6gf regnet_x_3_2gf regnet_x_8gf regnet_x_16gf regnet_x_32gf",
    "regnet_y_400mf regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf regnet_y_8gf regnet_y_16gf regnet_y_32gf",
    *("regnet_y_128gf", "r3d_18 mc3_18 r2plus1d_18 s3d", "fcn_resnet50 fcn_resnet101"),
    *("deeplabv3_resnet50 deeplabv3_resnet101", "fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2"),
    "maskrcnn_resnet50_fpn maskrcnn_resnet50_fpn_v2 keypointrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn retinanet_resnet50_fpn_v2 fcos_resnet50_fpn ssd300_vgg16",
]
PROMISED = " ".join(FAMILIES).split()


def tensors_of(name: str, **arguments: object) -> dict[str, Tensor]:
    """A state dict on the meta device, made by torchvision and not by the code under test."""
    builder = torchvision.models.get_model_builder(name)
    if builder.__module__.rpartition(".")[0] != "torchvision.models":
        arguments["weights_backbone"] = None
    if ".video." in builder.__module__:
        arguments.pop("weights_backbone")
    if name in ("googlenet", "inception_v3"):
        arguments["init_weights"] = False
    if name.startswith("regnet"):  # its constructor reads numbers from tensors
        return build(Architecture(name, arguments)).state_dict()
    with torch.device("meta"):
        return builder(weights=None, **arguments).state_dict()


def refusal(function, *arguments, **options) -> tuple[str, str]:
    with pytest.raises(ArchitectureError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value) + caught.value.tip
    assert caught.value.tip
    return str(caught.value), caught.value.tip


# --- recognising ------------------------------------------------------------------------------------------------------


def test_everything_promised_is_supported():
    assert set(PROMISED) == set(SUPPORTED)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TWINS])
def test_recognised_with_another_number_of_classes(name):
    found = recognise(tensors_of(name, num_classes=12))
    assert (found.name, found.arguments["num_classes"]) == (name, 12)


@pytest.mark.parametrize("auxiliary", [True, False])
@pytest.mark.parametrize(
    "name", ["googlenet", "inception_v3", "fcn_resnet50", "fcn_resnet101", "deeplabv3_resnet50", "deeplabv3_resnet101"]
)
def test_auxiliary_heads_are_seen(name, auxiliary):
    argument = "aux_logits" if name in ("googlenet", "inception_v3") else "aux_loss"
    found = recognise(tensors_of(name, num_classes=3, **{argument: auxiliary}))
    assert (found.name, found.arguments[argument]) == (name, auxiliary)


@pytest.mark.parametrize("size", ["resnet18", "inception_v3", "r3d_18", "s3d", "ssd300_vgg16", "fcos_resnet50_fpn"])
def test_input_sizes(size):
    sides = {"inception_v3": 299, "r3d_18": 112, "ssd300_vgg16": 300, "fcos_resnet50_fpn": 320}
    frames = (16,) if size in ("r3d_18", "s3d") else ()
    assert resolve(size, None).input_size == (3, *frames, sides.get(size, 224), sides.get(size, 224))


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mnasnet0_5", "squeezenet1_1"])
def test_counters_may_be_missing(name):
    tensors = {k: v for k, v in tensors_of(name).items() if not k.endswith("num_batches_tracked")}
    assert recognise(tensors).name == name


def test_real_weights_are_recognised():
    folder = os.environ.get("PATHCONVERT_DATA")
    if not folder:
        pytest.skip("PATHCONVERT_DATA is not set: no real weights")
    tensors = torch.load(Path(folder, "weights", "squeezenet1_1.pth"), weights_only=True)
    assert recognise(tensors) == Architecture("squeezenet1_1", {"num_classes": 1000}, (3, 224, 224), "classification")


def test_twins_are_ambiguous():
    message, tip = refusal(recognise, tensors_of("fasterrcnn_mobilenet_v3_large_fpn"))
    assert message.startswith("these tensors fit several networks: ")
    assert set(message.partition(": ")[2].split(", ")) == TWINS
    assert "--arch" in tip


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "regnet_x_400mf", "fcos_resnet50_fpn", "convnext_tiny"])
def test_index_is_in_step_with_torchvision(name):
    fresh = make_index.describe(name)
    assert fresh | {"input_size": list(fresh["input_size"])} == architectures.index()[name]


def test_index_names_every_network_of_torchvision():
    installed = {n for n in torchvision.models.list_models() if not n.startswith(("quantized_", "raft_"))}
    assert installed == set(NAMES)


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


# --- near misses ------------------------------------------------------------------------------------------------------


def test_missing_tensor():
    tensors = tensors_of("resnet50")
    del tensors["layer1.0.conv2.weight"]
    message, tip = refusal(recognise, tensors)
    assert message == (
        "no torchvision network has these tensors; the closest is resnet50 (1 difference): "
        "layer1.0.conv2.weight is missing"
    )
    assert "resnext50_32x4d" in tip or "none" in tip


def test_one_layer_more_gives_the_first_three():
    tensors = tensors_of("resnet50")
    tensors |= {k.replace("layer1.2", "layer1.3"): v for k, v in tensors.items() if k.startswith("layer1.2.")}
    message, _ = refusal(recognise, tensors)
    assert message == (
        "no torchvision network has these tensors; the closest is resnet50 (18 differences): "
        "layer1.3.conv1.weight is extra; layer1.3.bn1.weight is extra; layer1.3.bn1.bias is extra"
    )


def test_misshapen_tensor():
    tensors = tensors_of("resnet18") | {"conv1.weight": torch.empty(64, 1, 7, 7)}
    message, _ = refusal(recognise, tensors)
    assert message == (
        "no torchvision network has these tensors; the closest is resnet18 (1 difference): "
        "conv1.weight has shape [64, 1, 7, 7], expected [64, 3, 7, 7]"
    )


def test_another_number_of_classes_is_believed_and_does_not_fit():
    message, _ = refusal(recognise, tensors_of("resnet18"), num_classes=10)
    assert message.endswith(
        "fc.weight has shape [1000, 512], expected [10, 512]; fc.bias has shape [1000], expected [10]"
    )


def test_nothing_like_it():
    message, tip = refusal(recognise, {"a.weight": torch.empty(2, 2), "b.weight": torch.empty(2)})
    assert message.startswith(
        "these 2 tensors are not those of a torchvision network that pathconvert knows (the closest: "
    )
    assert "--arch package.module:builder" in tip


# --- old files --------------------------------------------------------------------------------------------------------


def old(tensors: dict[str, Tensor], *rules: tuple[str, object]) -> dict[str, Tensor]:
    for pattern, replacement in rules:
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    return tensors


def test_old_densenet_names():
    tensors = tensors_of("densenet121")
    before = old(tensors, (r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2."))
    assert "features.denseblock1.denselayer1.norm.1.weight" in before
    assert list(modern_names(before)) == list(tensors)


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "keypointrcnn_resnet50_fpn"])
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


@pytest.mark.parametrize("name", [n for n in SUPPORTED if re.search("densenet121|rcnn|retina|fcos|ssd", n)])
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


# --- by name ----------------------------------------------------------------------------------------------------------


def test_misspelt_name():
    assert refusal(resolve, "resnet5", None) == (
        "'resnet5' is not a network that pathconvert knows",
        "Did you mean resnet50, resnet152, resnet34?",
    )


def test_named_network_takes_classes_from_tensors():
    assert resolve("resnet18", tensors_of("resnet18", num_classes=7), input_size=(3, 32, 32)) == Architecture(
        "resnet18", {"num_classes": 7}, (3, 32, 32), "classification"
    )


@pytest.mark.parametrize("number", [0, -1])
def test_no_number_of_classes(number):
    message, _ = refusal(recognise, tensors_of("resnet18"), num_classes=number)
    assert message == f"{number} is not a number of classes"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A function that writes a module into the current folder; Python forgets the module after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = []

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text("from torch import nn\nimport torch\n" + text)
        names.append(name)

    yield write
    for name in names:
        sys.modules.pop(name, None)


def test_builder_with_and_without_classes(module):
    module("own_a", "def net(num_classes=3):\n    return nn.Linear(4, num_classes)\n")
    assert resolve("own_a:net", None) == Architecture("own_a:net", {}, None, "other")
    assert build(resolve("own_a:net", None)).out_features == 3
    assert build(resolve("own_a:net", None, num_classes=5)).out_features == 5


def test_builder_that_is_not_there(module):
    module("own_b", "def network():\n    return nn.Linear(4, 2)\n")
    message, tip = refusal(resolve, "own_b:netwrk", None)
    assert message == "--arch own_b:netwrk: own_b has no function or class 'netwrk'"
    assert tip == "It has network."


def test_module_that_is_not_there():
    message, _ = refusal(resolve, "no_such_module:net", None)
    assert message == (
        "--arch no_such_module:net: importing no_such_module failed: "
        "ModuleNotFoundError: No module named 'no_such_module'"
    )


def test_module_that_raises_on_two_lines(module):
    module("own_c", "raise ValueError('one\\ntwo')\n")
    assert refusal(resolve, "own_c:net", None)[0] == "--arch own_c:net: importing own_c failed: ValueError: one two"


def test_module_that_exits(module):
    module("own_d", "raise SystemExit(3)\n")
    assert refusal(resolve, "own_d:net", None)[0] == "--arch own_d:net: importing own_d failed: SystemExit: 3"


def test_builder_that_returns_something_else(module):
    module("own_e", "def net():\n    return 3\n")
    message, _ = refusal(build, resolve("own_e:net", None))
    assert message == "--arch own_e:net returned int, expected a torch.nn.Module"


def test_builder_that_fails(module):
    module("own_f", "def net(width):\n    return nn.Linear(width, 2)\n")
    message, _ = refusal(build, resolve("own_f:net", None))
    assert message == (
        "--arch own_f:net: building the network failed: "
        "TypeError: net() missing 1 required positional argument: 'width'"
    )


def test_timm_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert refusal(resolve, "timm/resnet18", None) == ("timm is not installed", "pip install timm")


@pytest.mark.parametrize(
    ("text", "size"), [("3x32x32", (3, 32, 32)), ("3x16x112x112", (3, 16, 112, 112)), ("784", (784,))]
)
def test_input_size(text, size):
    assert architectures.parse_input_size(text) == size


@pytest.mark.parametrize("text", ["", "3x", "3x0x32", "3x-1x2", "3 x 3", "axb", "3.0x2"])
def test_no_input_size(text):
    assert refusal(architectures.parse_input_size, text) == (
        f"{text!r} is not an input size",
        "Give the channels and the side lengths: --input-size 3x32x32",
    )


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept_and_counters_filled(dtype):
    torch.manual_seed(0)
    full = torchvision.models.shufflenet_v2_x0_5(num_classes=4).to(dtype).state_dict()
    tensors = {k: v for k, v in full.items() if not k.endswith("num_batches_tracked")}
    model = load_tensors(recognise(tensors), tensors)
    assert not model.training
    loaded = model.state_dict()
    assert loaded.keys() == full.keys()
    for name, value in full.items():
        assert loaded[name].dtype == value.dtype, name
        assert torch.equal(loaded[name], value), name  # this includes the counters, which are 0 in a new network
    assert "conv1.1.num_batches_tracked" not in tensors


@pytest.mark.parametrize("name", ["mnasnet0_5", "mnasnet1_0"])
def test_a_plain_dictionary_loads_into_mnasnet(name):
    """MNASNet refuses a state dict without a version, which neither safetensors nor a plain dictionary has."""
    torch.manual_seed(0)
    source = torchvision.models.get_model(name, weights=None, num_classes=4).eval()
    tensors = dict(source.state_dict())
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(load_tensors(recognise(tensors), tensors)(image), source(image))


def test_shared_parameters_stay_shared(module):
    module(
        "own_g",
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)\n"
        "        self.b.weight = self.a.weight\n"
        "        self.register_buffer('steps', torch.arange(3.0), persistent=False)\n",
    )
    architecture = resolve("own_g:Net", None)
    tensors = dict(build(architecture).state_dict())
    model = load_tensors(architecture, tensors)
    assert model.a.weight is model.b.weight
    assert model.steps.tolist() == [0, 1, 2]


def test_tensors_of_another_network():
    message, _ = refusal(load_tensors, Architecture("resnet18", {"num_classes": 1000}), tensors_of("resnet34"))
    assert message.startswith("the tensors are not those of resnet18 (")
    assert message.endswith("layer1.2.conv1.weight is extra; layer1.2.bn1.weight is extra; layer1.2.bn1.bias is extra")


def test_arguments_that_the_constructor_does_not_take():
    message, _ = refusal(build, Architecture("resnet18", {"bogus": 1}))
    assert message.startswith("torchvision cannot build resnet18 with {'bogus': 1}: TypeError: ")


# --- torchvision's weights --------------------------------------------------------------------------------------------


def test_pretrained_offline(monkeypatch, tmp_path, capfd):
    def no_network(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    assert refusal(pretrained.pretrained, "squeezenet1_1") == (
        "the weights of squeezenet1_1 could not be downloaded (<urlopen error Name or service not known>)",
        "When offline, give a file with the weights instead of the name.",
    )
    assert capfd.readouterr().err == ""  # torch.hub says "Downloading" before it tries


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("googlenet", {"aux_logits": False, "transform_input": True}),
        ("keypointrcnn_resnet50_fpn", {"frozen_batch_norm": True, "frozen_batch_norm_eps": 0.0}),
    ],
)
def test_pretrained_records_what_the_weights_set(monkeypatch, name, arguments):
    weights = torchvision.models.get_model_weights(name).DEFAULT
    options = {"aux_logits": True} if name == "googlenet" else {}
    state = build(Architecture(name, options | {"num_classes": len(weights.meta["categories"])})).state_dict()
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", lambda *_, **__: state)
    monkeypatch.setattr(pretrained, "_check_reachable", lambda _: None)
    found, model = pretrained.pretrained(name)
    assert {key: found.arguments.get(key) for key in arguments} == arguments
    rebuilt = load_tensors(found, model.state_dict())
    eps = [[module.eps for module in m.modules() if isinstance(module, FrozenBatchNorm2d)] for m in (model, rebuilt)]
    assert eps[0] == eps[1]
