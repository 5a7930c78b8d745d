"""Networks whose BatchNorms were folded: recognised, converted, in Path-BN form, exported."""

from collections.abc import Callable

import pytest
import torch
from changed_networks import EQUAL, adjusted, difference, images, kept, lively, put, stock
from path_bn_networks import layers
from small_export import ort_run
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_eval

import pathconvert
from pathconvert.export import export_onnx, fold
from pathconvert.networks import architectures, folded
from pathconvert.networks.adjusting import adjust, title
from pathconvert.networks.builders import build_torchvision

NOTE = "its BatchNorms are folded into its convolutions"


def fused(model: nn.Module, pairs: dict[str, str]) -> nn.Module:
    """Fold BatchNorms with PyTorch's own function: BatchNorm → the convolution before it."""
    for norm, convolution in pairs.items():
        merged = fuse_conv_bn_eval(model.get_submodule(convolution), model.get_submodule(norm))
        for name, module in ((convolution, merged), (norm, nn.Identity())):
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, module)
    return model


NETWORKS: dict[str, tuple[dict[str, object], tuple[int, ...]]] = {
    "resnet18": ({}, (3, 64, 64)),
    "resnext50_32x4d": ({}, (3, 64, 64)),
    "wide_resnet50_2": ({}, (3, 64, 64)),
    "vgg11_bn": ({}, (3, 64, 64)),
    "densenet121": ({}, (3, 64, 64)),
    "googlenet": ({"aux_logits": False}, (3, 64, 64)),
    "inception_v3": ({"aux_logits": False}, (3, 96, 96)),
    "shufflenet_v2_x0_5": ({}, (3, 64, 64)),
    "mnasnet0_5": ({}, (3, 64, 64)),
    "regnet_y_400mf": ({}, (3, 64, 64)),
    "r2plus1d_18": ({}, (3, 4, 32, 32)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_folded_network_is_recognised(name):
    """``pathconvert.export.fold`` finds what can be folded by the operations, not by the names."""
    arguments, size = NETWORKS[name]
    model = lively(stock(name, num_classes=5, **arguments))
    without = fold(model, images(2, *size))
    result = adjusted(name, without)
    assert result.notes == (NOTE,)
    assert title(result.architecture) == f"{name} (BatchNorm folded)"
    assert difference(result, without, images(2, *size)) < EQUAL


def neighbours_that_run(model: nn.Module, size: tuple[int, ...]) -> dict[str, str]:
    """BatchNorm → the convolution whose result it reads, for all that run in evaluation mode."""
    results: dict[int, tuple[str, torch.Tensor]] = {}
    found = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, __, result: results.update({id(result): (name, result)})

    def look(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if id(inputs[0]) in results:
                found[name] = results[id(inputs[0])][0]

        return hook

    for name, module in model.named_modules():
        if isinstance(module, _ConvNd):
            module.register_forward_hook(keep(name))
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(look(name))
    with torch.no_grad():
        model(torch.empty(1, *size, device="meta"))
    return found


PAIRED = [
    entry.name
    for entry in architectures.catalogue()
    if entry.supported and entry.task != "detection" and not entry.name.startswith("regnet")
]


@pytest.mark.parametrize("name", PAIRED)
def test_pairs_are_what_runs_one_after_the_other(name):
    """In every network: neighbours in the tree of modules are neighbours in the forward."""
    arguments = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        model = build_torchvision(name, arguments)
    pairs = folded.pairs(model)
    auxiliary = {norm for norm in pairs if norm.startswith(("aux", "Aux"))}  # it does not run
    runs = neighbours_that_run(model, tuple(architectures.index()[name]["input_size"]))
    assert {norm: pairs[norm] for norm in pairs.keys() - auxiliary} == runs


def test_partly_folded_network():
    """GoogLeNet's auxiliary heads do not run in evaluation mode; folding tools leave them alone."""
    model = lively(stock("googlenet", aux_logits=True))
    pairs = {n: c for n, c in folded.pairs(model).items() if not n.startswith("aux")}
    result = adjusted("googlenet", fused(model, pairs))
    assert result.architecture.arguments["batch_norm_kept"] == ["aux1.conv.bn", "aux2.conv.bn"]
    assert result.notes == (
        "some of its BatchNorms are folded into its convolutions, and 2 are not, for example"
        " aux1.conv.bn; nothing is assumed in the place of the others",
    )
    assert difference(result, model, images(2, 3, 64, 64)) < EQUAL


def test_folded_network_with_other_changes():
    model = put("resnet18", "fc", nn.Sequential(nn.Dropout(), nn.Linear(512, 3)))
    model.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    fused(lively(model), folded.pairs(model))
    result = adjusted("resnet18", model)
    assert result.architecture.arguments == {
        "batch_norm": "folded",
        "in_channels": 1,
        "head": "dropout-linear3",
        "num_classes": 3,
    }
    assert difference(result, model, images(2, 1, 64, 64)) < EQUAL


def test_bias_without_a_folded_batch_norm_does_not_fit():
    model = stock("resnet18")
    tensors = fused(lively(model), folded.pairs(model)).state_dict()
    del tensors["layer1.0.conv1.bias"]
    assert adjust("resnet18", tensors) is None


# ---- what is done with it ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, nn.Module]:
    """A ResNet-18 in a narrow form, folded; and the network that is loaded from its tensors."""
    model = stock("resnet18", num_classes=4, width_per_group=64)
    for block in (block for stage in (model.layer3, model.layer4) for block in stage):
        first, second = block.conv1, block.conv2
        block.conv1 = nn.Conv2d(first.in_channels, 16, 3, first.stride, 1, bias=False)
        block.bn1 = nn.BatchNorm2d(16)
        block.conv2 = nn.Conv2d(16, second.out_channels, 3, padding=1, bias=False)
    lively(model)
    without = fold(model, images(2, 3, 64, 64))
    result = adjusted("resnet18", without)
    loaded = architectures.load_tensors(kept(result.architecture), without.state_dict())
    return without, loaded


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def test_it_converts(small):
    without, loaded = small
    x = images(4, 3, 64, 64)
    converted = pathconvert.reparameterize(loaded, x)
    assert converted.groups
    error = (output(converted.model, x) - output(without, x)).abs().max()
    assert error < 1e-10 * output(without, x).abs().max()


def test_it_enters_path_bn_with_images_and_trains(small):
    without, loaded = small
    x = images(8, 3, 64, 64)
    entered = pathconvert.to_path_bn(loaded, x, x)
    assert layers(entered)
    expected = output(without, x)
    assert (output(entered, x) - expected).abs().max() < 1e-9 * expected.abs().max()
    entered.train()
    entered(x).square().mean().backward()
    gradients = [p.grad for p in entered.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_it_exports(small, tmp_path):
    _, loaded = small
    model = architectures.load_tensors(
        adjusted("resnet18", loaded).architecture,
        {name: tensor.float() for name, tensor in loaded.state_dict().items()},
    )
    x = images(1, 3, 64, 64).float()
    export_onnx(model, tmp_path / "folded.onnx", x)
    expected = output(model, x)
    error = (ort_run(tmp_path / "folded.onnx", x)[0] - expected).abs().max()
    assert error < 1e-4 * expected.abs().max()
