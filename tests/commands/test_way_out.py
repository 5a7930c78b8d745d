"""``restore`` writes what the file was: its container, keys, prefix and names.

The restored file is loaded as the script that wrote the original would load it, strictly.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from command_line import SMALL
from safetensors.torch import load_file, save_file
from state_dicts import hugging_face
from torch import Tensor, nn
from torch.nn.utils import prune

from pathconvert.cli import run
from pathconvert.files.checkpoint import read_checkpoint


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=5)


def densenet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.densenet121(num_classes=5)


def old_names(model: nn.Module) -> dict[str, Tensor]:
    """A DenseNet as torchvision saved it in 2017, without counters."""
    return {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", name): tensor
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def odd_counters(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"net.{name}": tensor.reshape(1).float() if name.endswith("tracked") else tensor
        for name, tensor in model.state_dict().items()
    }


def assert_strict(found: Any, expected: dict[str, Tensor]) -> None:
    """The same names in the same order, and the same tensors bit for bit."""
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name


def there_and_back(source: str, *options: str) -> None:
    """Convert with powers of two, with which restoring is exact, and restore."""
    converted = f"{source.partition('.')[0]}.path.safetensors"
    assert run(["reparam", source, "--gauge", "pow2", *SMALL, *options]) == 0
    assert run(["restore", converted, *SMALL]) == 0


@pytest.mark.usefixtures("here")
def test_a_training_script_loads_the_restored_file() -> None:
    model = nn.DataParallel(resnet())
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, "a.pth.tar")
    there_and_back("a.pth.tar")
    found = torch.load("a.restored.pth.tar", weights_only=True)["state_dict"]
    assert_strict(found, model.state_dict())
    nn.DataParallel(resnet()).load_state_dict(found)


@pytest.mark.usefixtures("here")
def test_old_names_come_back() -> None:
    torch.save(old_names(densenet()), "dense.pth")
    there_and_back("dense.pth")
    assert_strict(torch.load("dense.restored.pth", weights_only=True), old_names(densenet()))


@pytest.mark.usefixtures("here")
def test_legacy_files_nested_keys_and_odd_counters_come_back(capsys: Any) -> None:
    state = odd_counters(resnet()) | {"criterion.weight": torch.ones(5)}
    torch.save({"ema": {"model": state}}, "odd.ckpt", _use_new_zipfile_serialization=False)
    there_and_back("odd.ckpt")
    assert "the entries criterion.weight" in capsys.readouterr().out
    assert Path("odd.restored.ckpt").read_bytes()[:2] != b"PK"
    restored = torch.load("odd.restored.ckpt", weights_only=True)["ema"]["model"]
    assert_strict(restored, odd_counters(resnet()))


@pytest.mark.usefixtures("here")
def test_dots_in_keys_come_back() -> None:
    model = nn.DataParallel(resnet())
    torch.save({"stage.1": {"net.best": model.state_dict()}}, "dots.pt")
    there_and_back("dots.pt")
    restored = torch.load("dots.restored.pt", weights_only=True)
    assert_strict(restored["stage.1"]["net.best"], model.state_dict())


@pytest.mark.usefixtures("here")
def test_a_list_that_cannot_come_back_is_named(capsys: Any) -> None:
    torch.save({"models": [resnet().state_dict()]}, "list.pt")
    there_and_back("list.pt")
    assert "not restored the list or object" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("here")
def test_safetensors_stay_safetensors() -> None:
    state = {f"backbone.{name}": tensor for name, tensor in resnet().state_dict().items()}
    save_file(state, "s.safetensors")
    there_and_back("s.safetensors")
    restored = load_file("s.restored.safetensors")
    assert_strict(restored, {name: state[name] for name in restored})
    assert set(restored) == set(state)


@pytest.mark.usefixtures("here")
def test_what_cannot_come_back_is_named(capsys: Any) -> None:
    model = resnet()
    prune.l1_unstructured(model.conv1, "weight", amount=0.3)
    torch.save(model.state_dict(), "pruned.pt")
    there_and_back("pruned.pt")
    shown = " ".join(capsys.readouterr().out.split())
    assert "not restored the tensors from which weights were computed" in shown
    resnet().load_state_dict(torch.load("pruned.restored.pt", weights_only=True))


@pytest.mark.parametrize("form", ["path", "path-bn"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.usefixtures("here")
def test_converted_files_keep_the_wrapper_if_asked(form: str, suffix: str) -> None:
    torch.save({"state_dict": nn.DataParallel(resnet()).state_dict()}, "a.pt")
    output = f"x{suffix}"
    arguments = ["reparam", "a.pt", "--keep-wrapper", "--form", form, "-o", output]
    assert run([*arguments, "--gauge", "pow2", *SMALL]) == 0
    read = read_checkpoint(output)
    assert (read.key, read.prefix) == ("state_dict" if suffix == ".pt" else None, "module.")
    assert run(["restore", output, "-o", "back.pt", *SMALL]) == 0
    found = torch.load("back.pt", weights_only=True)["state_dict"]
    nn.DataParallel(resnet()).load_state_dict(found)
    if form == "path":
        assert_strict(found, nn.DataParallel(resnet()).state_dict())


@pytest.mark.usefixtures("here")
def test_path_bn_form_under_names_of_another_library_opens_again() -> None:
    names = hugging_face(resnet().state_dict())
    torch.save(names, "hf.pt")
    options = ["--keep-wrapper", "--form", "path-bn", "-o", "x.pt"]
    assert run(["reparam", "hf.pt", *options, "--gauge", "pow2", *SMALL]) == 0
    assert run(["restore", "x.pt", "-o", "back.pt", *SMALL]) == 0
    assert torch.load("back.pt", weights_only=True).keys() == names.keys()


@pytest.mark.usefixtures("here")
def test_verify_opens_a_changed_network_like_its_converted_form() -> None:
    """Its stem cannot be read from the tensors; the converted file says what it is."""
    model = torchvision.models.resnet18(num_classes=5)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    torch.save(model.state_dict(), "stem.pt")
    assert run(["reparam", "stem.pt", "--arch", "resnet18(stem=cifar)", *SMALL]) == 0
    assert run(["verify", "stem.pt", "stem.path.safetensors", *SMALL]) == 0
