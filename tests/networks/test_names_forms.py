"""Weights that a file stores in parts, other libraries' names, and what a file says beside them."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from state_dicts import (
    assert_computes_the_same,
    file_refusal,
    hugging_face,
    loaded,
    trained,
    under,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from pathconvert.errors import ArchitectureError
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.names_forms import compute
from pathconvert.networks.names_identity import check_config, check_module


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return trained("resnet18")


# ---- weights in parts ----------------------------------------------------------------------------


def convolutions(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def pruned(model: nn.Module) -> nn.Module:
    for convolution in convolutions(model)[::2]:
        prune.random_unstructured(convolution, "weight", 0.3)
    prune.l1_unstructured(model.fc, "bias", 2)
    return model


def old_weight_norm(model: nn.Module) -> nn.Module:
    for convolution in convolutions(model)[1:4]:
        nn.utils.weight_norm(convolution)
    nn.utils.weight_norm(model.fc, dim=None)
    return model


def weight_norm(model: nn.Module) -> nn.Module:
    for dim, convolution in enumerate(convolutions(model)[1:4]):
        parametrizations.weight_norm(convolution, dim=dim)
    parametrizations.weight_norm(model.fc)
    with torch.no_grad():
        model.fc.parametrizations.weight.original0.mul_(1.5)
    return model


def old_spectral_norm(model: nn.Module) -> nn.Module:
    for layer in (model.conv1, model.fc):
        nn.utils.spectral_norm(layer)
    return model


def spectral_norm(model: nn.Module) -> nn.Module:
    for layer in (model.conv1, model.fc):
        parametrizations.spectral_norm(layer)
    return model


FORMS: dict[Callable[[nn.Module], nn.Module], str] = {
    pruned: "masks of pruned weights multiplied in",
    old_weight_norm: "weight norm computed",
    weight_norm: "weight norm computed",
    old_spectral_norm: "spectral norm computed",
    spectral_norm: "spectral norm computed",
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("change", FORMS, ids=lambda change: change.__name__)
def test_weights_that_are_stored_in_parts(tmp_path, change):
    source = change(trained("resnet18")).eval()
    found = loaded(tmp_path, under("model.", source.state_dict()))
    assert found.notes == (
        "prefix 'model.' removed from every name",
        f"read as resnet18: {FORMS[change]}",
    )
    assert_computes_the_same(found.model, source)
    assert found.view.parts
    assert not found.view.parts.keys() & found.view.original.keys()


def test_a_transposed_convolution_is_spectrally_normalised_along_its_second_dimension():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.utils.spectral_norm(nn.ConvTranspose2d(6, 4, 3).double())).eval()
    layer(torch.rand(1, 6, 5, 5, dtype=torch.float64))
    computed = compute(layer.state_dict())
    assert computed.parts == {"0.weight": ("0.weight_orig", "0.weight_u", "0.weight_v")}
    torch.testing.assert_close(computed.tensors["0.weight"], layer[0].weight, rtol=1e-12, atol=0)


def test_the_direction_of_u_tells_along_which_of_two_dimensions_a_weight_is_normalised():
    torch.manual_seed(0)
    for dim in (0, 1):
        layer = nn.Conv2d(6, 6, 3).double()
        layer = nn.Sequential(nn.utils.parametrizations.spectral_norm(layer, dim=dim)).eval()
        found = compute(layer.state_dict()).tensors["0.weight"]
        torch.testing.assert_close(found, layer[0].weight.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "state",
    [
        {"a.weight_orig": torch.rand(2, 2)},
        {"a.weight_orig": torch.rand(2, 2), "a.weight_mask": torch.ones(3, 2)},
        {"a.weight_g": torch.rand(3, 1), "a.weight_v": torch.rand(2, 2)},
        {"a.weight_orig": torch.rand(2, 2), "a.weight_u": torch.rand(2)},
        {"a.weight": torch.rand(2), "a.weight_orig": torch.rand(2), "a.weight_mask": torch.ones(2)},
    ],
    ids=lambda state: "+".join(name[2:] for name in state),
)
def test_parts_that_do_not_belong_together_stay(state):
    computed = compute(state)
    assert computed.tensors.keys() == state.keys()
    assert (computed.parts, computed.sentence) == ({}, None)


# ---- other libraries' names ----------------------------------------------------------------------


def open_mmlab(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet's names as MMPretrain's ImageClassifier has them."""
    return {
        f"head.{name}" if name.startswith("fc.") else f"backbone.{name}": tensor
        for name, tensor in state.items()
    }


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize(
    ("names", "note", "assumed"),
    [
        (hugging_face, "Hugging Face's names for a ResNet", "there is no config.json"),
        (open_mmlab, "OpenMMLab's names for a ResNet", "style='pytorch' is assumed"),
    ],
)
def test_other_libraries_names(tmp_path, name, names, note, assumed):
    source = trained(name)
    found = loaded(tmp_path, names(source.state_dict()))
    assert found.notes[0] == f"read as {name}: {note}"
    assert assumed in found.notes[1]
    assert_computes_the_same(found.model, source)


def test_hugging_faces_backbone_is_a_headless_resnet(tmp_path, resnet):
    state = {
        name.removeprefix("resnet."): tensor
        for name, tensor in hugging_face(resnet.state_dict()).items()
        if not name.startswith("classifier")
    }
    headless = copy.deepcopy(resnet)
    headless.fc = nn.Identity()
    assert_computes_the_same(loaded(tmp_path, state).model, headless)


def body(model: nn.Module, children: int = -1) -> nn.Module:
    return nn.Sequential(*list(model.children())[:children])


def test_numbered_children(tmp_path, resnet):
    found = loaded(tmp_path, body(resnet).state_dict())
    assert (
        "read as resnet18: numbered as nn.Sequential numbers a ResNet's children" in found.notes[0]
    )
    headless = copy.deepcopy(resnet)
    headless.fc = nn.Identity()
    assert_computes_the_same(found.model, headless)


@pytest.mark.parametrize(
    ("place", "layer"),
    [(2, nn.PReLU()), (10, nn.Linear(512, 5)), (9, nn.BatchNorm2d(512))],
    ids=["PReLU", "Linear", "BatchNorm"],
)
def test_layers_among_numbered_children_are_never_left_out(tmp_path, resnet, place, layer):
    state = body(resnet).state_dict()
    state |= {f"{place}.{name}": tensor.double() for name, tensor in layer.state_dict().items()}
    message, _ = file_refusal(tmp_path, state)
    assert f"fc.bias is missing; {place}.weight is extra" in message


def test_a_neck_in_open_mmlabs_network_is_never_left_out(tmp_path, resnet):
    state = open_mmlab(resnet.state_dict()) | {"neck.weight": torch.rand(512, 512).double()}
    message, _ = file_refusal(tmp_path, state)
    assert "neck.weight is extra" in message


class ConcatPool(nn.Module):
    """fastai's AdaptiveConcatPool2d: the maximum and the average of every channel."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1)


def test_fastais_network_is_asked_for_its_head(tmp_path, resnet):
    torch.manual_seed(0)
    head = nn.Sequential(
        *(ConcatPool(), nn.Flatten(), nn.BatchNorm1d(1024), nn.Dropout(0.25)),
        *(nn.Linear(1024, 512, bias=False), nn.ReLU(), nn.BatchNorm1d(512), nn.Dropout()),
        nn.Linear(512, 7, bias=False),
    )
    source = nn.Sequential(body(resnet, -2), head).double().eval()
    message, tip = file_refusal(tmp_path, source.state_dict())
    assert message.startswith("x.pt: these are the tensors of a changed resnet18")
    ready = re.search(r"--arch '(.*?)'", tip)[1]
    found = loaded(tmp_path, source.state_dict(), arch=ready)
    assert "fastai's names for a ResNet" in found.notes[-1]
    assert_computes_the_same(found.model, source)


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        ({"stem.0.weight": torch.rand(32, 3, 3, 3)}, "a ResNet with a deep stem"),
        ({"stem.conv1.norm.weight": torch.rand(64)}, "Detectron2's ResNet"),
    ],
)
def test_names_of_other_functions_are_refused(tmp_path, extra, what):
    blocks = {"layer1.0.conv1.weight": torch.rand(64, 64, 1, 1)}
    blocks |= {"res2.0.conv1.norm.weight": torch.rand(64)}
    message, tip = file_refusal(tmp_path, under("backbone.", extra | blocks))
    assert message.startswith(f"x.pt holds {what}")
    assert "--arch package.module:builder" in tip


# ---- what the file says beside the tensors -------------------------------------------------------

RESNET = Architecture("resnet50")


@pytest.mark.parametrize(
    "config",
    [
        None,
        {},
        {"arch": "resnet50"},
        {"architecture": "resnet50.a1_in1k"},
        {"architecture": "timm/resnet50.tv_in1k"},
        {"model": "tv_resnet50"},
        {"model": "gluon_resnet50_v1b"},
        {"arch": "ResNet-50"},
        {"model_type": "resnet", "hidden_act": "relu", "downsample_in_bottleneck": False},
    ],
)
def test_a_config_that_agrees(config):
    assert check_config(config, RESNET, "x.pt") == []


def test_a_name_that_says_nothing_is_noted():
    assert check_config({"arch": "baseline"}, RESNET, "x.pt") == [
        "the file calls its network 'baseline', which is not a name that pathconvert knows"
    ]


@pytest.mark.parametrize(
    ("named", "ready"),
    [
        ("resnetblur50", "--arch timm/resnetblur50"),
        ("resnetaa50.a1h_in1k", "--arch timm/resnetaa50"),
        ("seresnet50", "--arch timm/seresnet50"),
        ("resnet34", "--arch resnet34"),
        ("resnet50_caffe", "--arch package.module:builder"),
    ],
)
def test_a_config_that_names_another_network(named, ready):
    with pytest.raises(ArchitectureError) as caught:
        check_config({"architecture": named}, RESNET, "x.pt")
    assert str(caught.value) == (
        f"x.pt says that its network is {named!r}, and its tensors are those of resnet50; networks"
        " with the same tensors can compute something else"
    )
    assert caught.value.tip == (
        f"If it is {named}: {ready} -- if it is the stock network: --arch resnet50"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("downsample_in_bottleneck", True),
        ("downsample_in_first_stage", True),
        ("hidden_act", "gelu"),
    ],
)
def test_hugging_faces_other_resnets_are_refused(key, value):
    with pytest.raises(ArchitectureError, match=f"config.json has {key} = {value!r}"):
        check_config({"model_type": "resnet", key: value}, RESNET, "x.pt")


def test_a_pickled_module_of_another_class_is_refused():
    with pytest.raises(ArchitectureError) as caught:
        check_module("lab.models.ResNet", RESNET, None, "x.pt")
    assert "of the class lab.models.ResNet" in str(caught.value)
    assert "--trust-pickle" in caught.value.tip
    assert "--arch resnet50" in caught.value.tip
