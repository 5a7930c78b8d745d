"""The notes and the tips of recognition, as the command line prints them: a tip that contains a
command works when it is pasted.
"""

import re
import shlex
from pathlib import Path

import pytest
import torch
from state_dicts import trained, under
from torch import Tensor, nn

from pathconvert.cli import run


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return trained("resnet18").float()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def reparam(state: object, *options: str) -> int:
    torch.save(state, "x.pt")
    return run(["reparam", "x.pt", "--input-size", "3x64x64", "--force", *options])


def options_in(tip: str) -> list[str]:
    """The first option that a tip tells to add, with its value."""
    found = re.search(r"--[a-z-]+ (?:'[^']*'|[^\s,;]+)", tip)
    assert found, tip
    return shlex.split(found[0])


def siamese(resnet: nn.Module) -> dict[str, Tensor]:
    other = {name: tensor.clone() for name, tensor in resnet.state_dict().items()}
    other["fc.bias"] += 1
    return under("left.", resnet.state_dict()) | under("right.", other)


def encoder(resnet: nn.Module) -> dict[str, Tensor]:
    state = {n: t for n, t in resnet.state_dict().items() if not n.startswith("fc.")}
    return under("encoder.", state) | {"decoder.0.weight": torch.rand(8, 512, 3, 3)}


def small_stem(resnet: nn.Module) -> dict[str, Tensor]:
    return under("net.", resnet.state_dict() | {"conv1.weight": torch.rand(64, 3, 3, 3)})


def new_head(resnet: nn.Module) -> dict[str, Tensor]:
    state = {n: t for n, t in resnet.state_dict().items() if not n.startswith("fc.")}
    head = nn.Sequential(nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 4))
    state |= under("fc.", head.state_dict())
    return under("encoder_q.", state) | under("encoder_k.", state)


def blurred(resnet: nn.Module) -> dict[str, object]:
    return {"arch": "resnetblur18", "state_dict": resnet.state_dict()}


@pytest.mark.parametrize("state", [siamese, encoder, small_stem, new_head])
def test_the_command_of_a_tip_works(folder, capsys, resnet, state):
    content = state(resnet)
    assert reparam(content) == 2
    error, tip = capsys.readouterr().err.splitlines()[-2:]
    assert error.startswith("error: x.pt")
    options = options_in(tip)
    assert reparam(content, *options) == 0, options
    assert (folder / "x.path.safetensors").exists()


def test_the_command_for_the_stock_network_works(capsys, resnet):
    content = blurred(resnet)
    assert reparam(content) == 2
    tip = capsys.readouterr().err.splitlines()[-1]
    assert reparam(content, *shlex.split(tip.rpartition("stock network: ")[2])) == 0


def test_the_notes_say_what_was_taken_and_what_was_left(capsys, resnet):
    state = under("module.encoder_q.", resnet.state_dict())
    state |= under("module.encoder_k.", {n: t + 0 for n, t in resnet.state_dict().items()})
    state |= {"module.queue": torch.rand(8, 8), "module.queue_ptr": torch.zeros(1).long()}
    assert reparam({"state_dict": state, "epoch": 200}) == 0
    notes = capsys.readouterr().err.splitlines()
    assert notes[:3] == [
        "x.pt: taking the weights under 'state_dict'",
        "x.pt: taking the resnet18 under 'module.encoder_q.', not the resnet18 under"
        " 'module.encoder_k.' (--prefix encoder_k.)",
        "x.pt: left out: queue, queue_ptr",
    ]


def test_a_converted_file_loads_again_without_arch(capsys, resnet):
    state = resnet.state_dict() | {"conv1.weight": torch.rand(64, 1, 7, 7)}
    assert reparam(under("model.", state), "--input-size", "1x64x64") == 0
    capsys.readouterr()
    assert run(["restore", "x.path.safetensors"]) == 0
