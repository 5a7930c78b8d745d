"""Name, build and load networks, and every refusal by its message."""

import sys
import urllib.error
import urllib.request

import pytest
import torch
import torchvision
from state_dicts import refusal, tensors_of
from torchvision.ops.misc import FrozenBatchNorm2d

import pathconvert
from pathconvert.errors import ArchitectureError
from pathconvert.networks import architectures, pretrained
from pathconvert.networks.architectures import (
    Architecture,
    build,
    load_tensors,
    recognise,
    resolve,
)

# ---- by name -------------------------------------------------------------------------------------


def test_misspelt_name():
    assert refusal(resolve, "resnet5", None) == (
        "'resnet5' is not a network that pathconvert knows",
        "Did you mean resnet50, resnet152, resnet34?",
    )


def test_named_network_takes_classes_from_tensors():
    assert resolve(
        "resnet18", tensors_of("resnet18", num_classes=7), input_size=(3, 32, 32)
    ) == Architecture("resnet18", {"num_classes": 7}, (3, 32, 32), "classification")


@pytest.mark.parametrize("number", [0, -1])
def test_no_number_of_classes(number):
    message, _ = refusal(recognise, tensors_of("resnet18"), num_classes=number)
    assert message == f"{number} is not a number of classes"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A function that writes a module into the current folder.

    Python forgets the module after the test.
    """
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
    assert (
        message == "--arch no_such_module:net: importing no_such_module failed: "
        "ModuleNotFoundError: No module named 'no_such_module'"
    )


def test_module_that_raises_on_two_lines(module):
    module("own_c", "raise ValueError('one\\ntwo')\n")
    assert (
        refusal(resolve, "own_c:net", None)[0]
        == "--arch own_c:net: importing own_c failed: ValueError: one two"
    )


def test_module_that_exits(module):
    module("own_d", "raise SystemExit(3)\n")
    assert (
        refusal(resolve, "own_d:net", None)[0]
        == "--arch own_d:net: importing own_d failed: SystemExit: 3"
    )


def test_builder_that_returns_something_else(module):
    module("own_e", "def net():\n    return 3\n")
    message, _ = refusal(build, resolve("own_e:net", None))
    assert message == "--arch own_e:net returned int, expected a torch.nn.Module"


def test_builder_that_fails(module):
    module("own_f", "def net(width):\n    return nn.Linear(width, 2)\n")
    message, _ = refusal(build, resolve("own_f:net", None))
    assert (
        message == "--arch own_f:net: building the network failed: "
        "TypeError: net() missing 1 required positional argument: 'width'"
    )


def test_timm_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert refusal(resolve, "timm/resnet18", None) == ("timm is not installed", "pip install timm")


@pytest.mark.parametrize(
    ("text", "size"),
    [("3x32x32", (3, 32, 32)), ("3x16x112x112", (3, 16, 112, 112)), ("784", (784,))],
)
def test_input_size(text, size):
    assert architectures.parse_input_size(text) == size


@pytest.mark.parametrize("text", ["", "3x", "3x0x32", "3x-1x2", "3 x 3", "axb", "3.0x2"])
def test_no_input_size(text):
    assert refusal(architectures.parse_input_size, text) == (
        f"{text!r} is not an input size",
        "Give the channels and the side lengths: --input-size 3x32x32",
    )


# ---- loading -------------------------------------------------------------------------------------


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
        # this includes the counters, which are 0 in a new network
        assert torch.equal(loaded[name], value), name
    assert "conv1.1.num_batches_tracked" not in tensors


@pytest.mark.parametrize("name", ["mnasnet0_5", "mnasnet1_0"])
def test_a_plain_dictionary_loads_into_mnasnet(name):
    """MNASNet refuses a state dict without a version, which neither safetensors nor a plain
    dictionary has.
    """
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
    message, _ = refusal(
        load_tensors, Architecture("resnet18", {"num_classes": 1000}), tensors_of("resnet34")
    )
    assert message.startswith("the tensors are not those of resnet18 (")
    assert message.endswith(
        "layer1.2.conv1.weight is extra; layer1.2.bn1.weight is extra; layer1.2.bn1.bias is extra"
    )


def test_arguments_that_the_constructor_does_not_take():
    message, _ = refusal(build, Architecture("resnet18", {"bogus": 1}))
    assert message.startswith("torchvision cannot build resnet18 with {'bogus': 1}: TypeError: ")


# ---- torchvision's weights -----------------------------------------------------------------------


def test_pretrained_offline(monkeypatch, tmp_path, capfd):
    def no_network(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    assert refusal(pretrained.pretrained, "squeezenet1_1") == (
        (
            "the weights of squeezenet1_1 could not be downloaded (<urlopen error Name or service"
            " not known>)"
        ),
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
    state = build(
        Architecture(name, options | {"num_classes": len(weights.meta["categories"])})
    ).state_dict()
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", lambda *_, **__: state)
    monkeypatch.setattr(pretrained, "_check_reachable", lambda _: None)
    found, model = pretrained.pretrained(name)
    assert {key: found.arguments.get(key) for key in arguments} == arguments
    rebuilt = load_tensors(found, model.state_dict())
    eps = [
        [module.eps for module in m.modules() if isinstance(module, FrozenBatchNorm2d)]
        for m in (model, rebuilt)
    ]
    assert eps[0] == eps[1]


def test_timms_deploy_forms_are_named_with_an_argument(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("mobileone_s0", num_classes=3).eval()
    deployed = timm.utils.model.reparameterize_model(model).double()
    torch.save(deployed.state_dict(), tmp_path / "a.pt")
    loaded, _ = pathconvert.load(
        tmp_path / "a.pt", arch="timm/mobileone_s0(deploy=True, num_classes=3)"
    )
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert torch.equal(loaded(x), deployed(x))
    with pytest.raises(ArchitectureError) as caught:
        architectures.build(architectures.resolve("timm/mobileone_s0(deply=True)", None))
    assert "timm cannot build timm/mobileone_s0 with {'deply': True}: TypeError" in str(
        caught.value
    )
    assert caught.value.tip == "Check the arguments in --arch."
