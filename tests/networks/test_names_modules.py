"""Pickled modules, and files that say beside the tensors which network they hold."""

import copy
import json
import sys

import pytest
import safetensors.torch
import torch
import torchvision
from sample_networks import network
from state_dicts import assert_computes_the_same, file_refusal, hugging_face, loaded, trained
from torch import nn
from torch.nn.utils import prune

from pathconvert.errors import ArchitectureError
from pathconvert.networks.architectures import PICKLED_MODULE
from pathconvert.networks.loading import build_form, open_network


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return trained("resnet18")


def dilated() -> nn.Module:
    """A ResNet-50 with a ResNet-50's tensors and another function."""
    torch.manual_seed(0)
    replaced = [False, True, True]
    return torchvision.models.resnet50(replace_stride_with_dilation=replaced).double().eval()


@pytest.fixture
def own_class(tmp_path, monkeypatch, resnet):
    """A module of a user's own class, which has a ResNet-18's tensors and another function."""
    (tmp_path / "lab_networks.py").write_text(
        "from torchvision.models import ResNet\n"
        "class Doubled(ResNet):\n"
        "    def forward(self, x):\n"
        "        return 2 * super().forward(x)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import lab_networks

    model = copy.deepcopy(resnet)
    model.__class__ = lab_networks.Doubled
    yield model
    sys.modules.pop("lab_networks")


# ---- pickled modules -----------------------------------------------------------------------------


def test_a_pickled_torchvision_network_is_built_anew(tmp_path, resnet):
    found = loaded(tmp_path, resnet)
    assert found.architecture.name == "resnet18"
    assert "the pickled module was built anew as torchvision's resnet18" in found.notes[-1]
    assert_computes_the_same(found.model, resnet)


def test_a_pickled_network_with_other_settings_is_refused(tmp_path):
    message, tip = file_refusal(tmp_path, {"model": dilated()})
    assert message == (
        "x.pt (the weights under 'model') is a pickled resnet50 with settings that the stock"
        " network does not have: dilation = 4, expected 1; layer3.0.stride = 1, expected 2;"
        " layer3.0.conv2.stride = (1, 1), expected (2, 2)"
    )
    assert "--trust-pickle" in tip


def doubled(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


def test_hooks_of_a_pickled_network_are_not_lost(tmp_path, resnet):
    hooked = copy.deepcopy(resnet)
    hooked.layer1.register_forward_hook(doubled)
    hooked.layer2.forward = hooked.layer1.forward
    message, tip = file_refusal(tmp_path, hooked)
    assert "layer1 has a forward hook; layer2 has a forward of its own" in message
    assert "--trust-pickle" in tip


def test_pruning_in_a_pickled_network_is_no_other_setting(tmp_path, resnet):
    pruned = copy.deepcopy(resnet)
    prune.l1_unstructured(pruned.conv1, "weight", amount=0.3)
    assert_computes_the_same(loaded(tmp_path, pruned).model, pruned)


def test_transform_input_of_a_pickled_network_is_not_lost(tmp_path):
    model = network("googlenet", aux_logits=False, transform_input=True, num_classes=5)
    message, tip = file_refusal(tmp_path, model)
    assert "transform_input = True, expected False" in message
    assert "--trust-pickle" in tip
    found = loaded(tmp_path, model, trust_pickle=True)
    assert found.architecture.arguments["transform_input"] is True
    assert found.model.transform_input


@pytest.mark.parametrize(
    "name", ["squeezenet1_1", "vgg11_bn", "densenet121", "shufflenet_v2_x0_5", "mnasnet0_5"]
)
def test_pickled_stock_networks_have_the_stock_settings(tmp_path, name):
    source = trained(name)
    found = loaded(tmp_path, nn.DataParallel(source))
    assert found.notes[-1] == f"the pickled module was built anew as torchvision's {name}"
    assert_computes_the_same(found.model, source)


def test_a_trusted_module_is_taken_itself(tmp_path, resnet):
    found = loaded(tmp_path, resnet, trust_pickle=True)
    assert found.architecture.name == "resnet18"
    assert found.notes == (
        "taking the pickled module itself, of the class torchvision.models.resnet.ResNet",
    )
    assert_computes_the_same(found.model, resnet)


def test_a_trusted_module_with_other_settings_keeps_them(tmp_path):
    model = dilated()
    found = loaded(tmp_path, model, trust_pickle=True)
    assert found.architecture.name == PICKLED_MODULE
    assert_computes_the_same(found.model, model)
    other = {name: torch.rand_like(tensor.double()) for name, tensor in model.state_dict().items()}
    rebuilt = build_form(found.architecture, other, found.checkpoint, template=found.model)
    assert rebuilt.layer4[1].conv2.dilation == (4, 4)
    assert torch.equal(rebuilt.fc.weight, other["fc.weight"])
    assert not torch.equal(found.model.fc.weight, other["fc.weight"])
    with pytest.raises(ArchitectureError, match="pickled module"):
        build_form(found.architecture, other, found.checkpoint)


def test_a_module_of_another_class_needs_trust_or_a_name(tmp_path, own_class, resnet):
    message, tip = file_refusal(tmp_path, own_class)
    assert message == (
        "x.pt is a pickled module of the class lab_networks.Doubled; it has the tensors of"
        " resnet18, but what its forward computes is not known"
    )
    assert "--trust-pickle" in tip
    assert tip.endswith("--arch resnet18")
    found = loaded(tmp_path, own_class, arch="resnet18")
    assert found.notes == (
        "the pickled module differs from the network that --arch names: it is a"
        " lab_networks.Doubled, expected torchvision.models.resnet.ResNet",
    )
    assert_computes_the_same(found.model, resnet)
    found = loaded(tmp_path, own_class, trust_pickle=True)
    assert found.architecture.name == PICKLED_MODULE
    assert_computes_the_same(found.model, own_class)


def test_a_wrapped_module_is_unwrapped(tmp_path, resnet):
    found = loaded(tmp_path, {"model": nn.DataParallel(resnet)}, trust_pickle=True)
    assert type(found.model) is type(resnet)
    assert_computes_the_same(found.model, resnet)


# ---- config.json and arch ------------------------------------------------------------------------


def test_timms_folder_with_a_stock_network(tmp_path, resnet):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    safetensors.torch.save_file(resnet.state_dict(), tmp_path / "model.safetensors")
    found = open_network(tmp_path)
    assert found.notes == ()
    assert_computes_the_same(found.model, resnet)


def test_a_name_beside_the_tensors_that_means_another_function(tmp_path, resnet):
    message, tip = file_refusal(
        tmp_path, {"arch": "resnetblur18", "state_dict": resnet.state_dict()}
    )
    assert message.startswith(
        "x.pt (the weights under 'state_dict') says that its network is 'resnetblur18'"
    )
    assert "--arch timm/resnetblur18" in tip
    assert "--arch resnet18" in tip
    found = loaded(
        tmp_path, {"arch": "resnetblur18", "state_dict": resnet.state_dict()}, arch="resnet18"
    )
    assert_computes_the_same(found.model, resnet)


def test_the_ready_command_for_a_timm_network_works(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    source = timm.create_model("resnetblur18", num_classes=7).double().eval()
    state = {"arch": "resnetblur18", "state_dict": source.state_dict()}
    _, tip = file_refusal(tmp_path, state, num_classes=7)
    assert "--arch timm/resnetblur18" in tip
    found = loaded(tmp_path, state, arch="timm/resnetblur18", num_classes=7)
    assert_computes_the_same(found.model, source)


def test_hugging_faces_folder(tmp_path):
    source = trained("resnet18")
    config = {"model_type": "resnet", "architectures": ["ResNetForImageClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_type": "basic"}))
    safetensors.torch.save_file(hugging_face(source.state_dict()), tmp_path / "model.safetensors")
    found = open_network(tmp_path)
    assert found.notes == ("read as resnet18: Hugging Face's names for a ResNet",)
    assert_computes_the_same(found.model, source)
    (tmp_path / "config.json").write_text(json.dumps(config | {"downsample_in_bottleneck": True}))
    with pytest.raises(ArchitectureError, match="downsample_in_bottleneck = True"):
        open_network(tmp_path)


def test_a_timm_network_that_torchvision_does_not_have_is_suggested(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    source = timm.create_model("seresnet18", num_classes=1000).double().eval()
    state = {"arch": "seresnet18", "state_dict": source.state_dict()}
    message, tip = file_refusal(tmp_path, state)
    assert message.endswith("; the file calls its network 'seresnet18'")
    assert tip == "Name it: --arch timm/seresnet18"
    assert_computes_the_same(loaded(tmp_path, state, arch="timm/seresnet18").model, source)
