"""Networks that are converted part by part are compared as a whole before a file is written."""

# ruff: noqa: ARG001 - fixtures are asked for what they do: `built` makes the builders importable

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from sample_networks import CLASSES
from sample_networks import network as sample
from torch import Tensor, nn

from pathconvert.cli import run
from pathconvert.conversion import whole
from pathconvert.conversion.calls import Observation, observe
from pathconvert.conversion.equivalence import EquivalenceReport
from pathconvert.conversion.record import record_of
from pathconvert.conversion.reparameterize import reparameterize
from pathconvert.conversion.rescale import rescale
from pathconvert.conversion.tracing import parts
from pathconvert.conversion.whole import require_same_whole
from pathconvert.errors import EquivalenceError
from pathconvert.networks import checked
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.checked import convert_network, save_checked
from pathconvert.networks.loading import LoadedNetwork

BUILDERS = """
import torch
import torch.nn.functional as F
from torch import nn

class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.skip = None

    def forward(self, x):
        self.skip = F.relu(self.c1(x))
        return F.relu(self.c2(self.skip))

class Escape(nn.Module):
    # an inner activation leaves its part as an attribute, and the whole decides on numbers

    def __init__(self):
        super().__init__()
        self.backbone, self.head = Backbone(), nn.Conv2d(16, 3, 1)

    def forward(self, x):
        y = self.backbone(x)
        if y.mean() < -1e9:
            y = y * 0
        return self.head(torch.cat([y, self.backbone.skip], 1))

class Selects(nn.Module):
    # returns the scores above a threshold, as a detector does: rounding may change their number

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)
        )

    def forward(self, x):
        scores = self.body(x).flatten()
        return scores[scores > scores.mean()]
"""
SIZE = ("--input-size", "3x12x12")


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the classes above as ``whole_nets``, and a file for each."""
    (tmp_path / "whole_nets.py").write_text(BUILDERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "whole_nets", raising=False)
    torch.manual_seed(0)
    for name in ("Escape", "Selects"):
        torch.save(network(name).state_dict(), f"{name}.pt")
    return tmp_path


def network(name: str) -> nn.Module:
    model: nn.Module = getattr(__import__("whole_nets"), name)()
    return model.eval()


def draw(seed: int) -> Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def reparam(name: str, output: str) -> int:
    return run(["reparam", f"{name}.pt", "--arch", f"whole_nets:{name}", *SIZE, "-o", output])


def forget_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the conversion follow no tensor that leaves its part sideways."""

    def without(*args: object, **kwargs: object) -> Observation:
        seen = observe(*args, **kwargs)  # type: ignore[arg-type]
        calls = {
            name: [dataclasses.replace(call, escapes=frozenset()) for call in called]
            for name, called in seen.calls.items()
        }
        return dataclasses.replace(seen, calls=calls)

    monkeypatch.setattr(parts, "observe", without)


def test_what_leaves_a_part_sideways_is_found_in_the_whole(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reparam("Escape", "right.safetensors") == 0
    forget_escapes(monkeypatch)
    capsys.readouterr()
    assert reparam("Escape", "wrong.safetensors") == 1
    message = capsys.readouterr().err
    assert (
        "error: the converted network differs from the original: the parts of the network agree,"
        " but the whole does not: an output changes by " in message
    )
    assert "in float64; no file was written" in message
    assert not Path("wrong.safetensors").exists()


def test_a_restored_network_is_compared_as_a_whole(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reparam("Escape", "x.safetensors") == 0
    compared: list[int] = []

    def counted(*args: object) -> EquivalenceReport | None:
        compared.append(len(args[3]))  # type: ignore[arg-type]
        return require_same_whole(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(checked, "require_same_whole", counted)
    command = ["restore", "x.safetensors", "--arch", "whole_nets:Escape", *SIZE, "-o", "back.pt"]
    assert run(command) == 0
    assert compared == [2]


def test_outputs_whose_number_depends_on_rounding_pass_in_exact_arithmetic(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = network("Selects"), [draw(0), draw(1)]
    assert reparam("Selects", "x.safetensors") == 0
    converted = reparameterize(model, inputs[0]).model
    record = record_of(converted)
    assert record.parts == ("body",)
    report = require_same_whole(model, converted, record, inputs)
    assert report is not None
    assert report.passed
    monkeypatch.setattr(whole, "_as_they_are", lambda *_: None)  # as if rounding changed the number
    assert require_same_whole(model, converted, record, inputs) is None


def test_a_tensor_that_is_not_rescaled_by_the_record_is_found(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network("Selects")
    converted = reparameterize(model, draw(0)).model
    converted.get_parameter("body.2.weight").data[0, 0, 0, 0] *= 1 + 1e-5
    monkeypatch.setattr(whole, "_as_they_are", lambda *_: None)
    with pytest.raises(EquivalenceError) as error:
        require_same_whole(model, converted, record_of(converted), [draw(0)])
    assert str(error.value) == (
        "body.2.weight of the converted network is not the original's tensor times the recorded"
        " factors"
    )


def test_factors_that_change_the_function_are_found(built: Path) -> None:
    model = network("Selects")
    converted = reparameterize(model, draw(0)).model
    record = record_of(converted)
    wrong = dataclasses.replace(record, slots=record.slots[:1])
    with pytest.raises(EquivalenceError) as error:
        require_same_whole(model, rescale(model, wrong.slots, wrong.scales), wrong, [draw(0)])
    assert str(error.value).startswith("the parts of the network agree, but the whole does not: ")


def test_a_detector_passes_as_a_whole(tmp_path: Path) -> None:
    name, small = "retinanet_resnet50_fpn", {"min_size": 64, "max_size": 64}
    model = sample(name, **small)
    arguments = {"num_classes": CLASSES, **small}
    architecture = Architecture(name, arguments, (3, 64, 64), "detection")
    loaded = LoadedNetwork(model, architecture, None, tuple(model.state_dict()))
    conversion = convert_network(loaded, "block", "max", "unit", partial=False)
    assert len(conversion.parts) > 1
    path = tmp_path / "x.safetensors"
    assert save_checked(conversion, loaded, path, force=False).passed
    assert path.exists()
