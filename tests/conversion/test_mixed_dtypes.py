"""Networks whose tensors have several dtypes: converted, compared, restored, on the command line.

Four mixes, each with float16 and with bfloat16, and one with float64.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pathconvert
from pathconvert.cli import run
from pathconvert.conversion.equivalence import forward_outputs
from pathconvert.conversion.precision import is_mixed, perturbed
from pathconvert.errors import PathconvertError
from pathconvert.export import export_onnx
from pathconvert.export.runtime.engines import torch_engine
from pathconvert.files.checkpoint import read_checkpoint
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.loading import LoadedNetwork

BUILDERS = """
import torch
import torch.nn.functional as F
from torch import nn

class Casts(nn.Module):
    # convolutions in a narrow dtype and BatchNorms in float32, with explicit casts between them

    def __init__(self, narrow=torch.float16):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 8, 3, dtype=narrow), nn.BatchNorm2d(8)
        self.c2, self.b2 = nn.Conv2d(8, 8, 3, dtype=narrow), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        half = self.c1.weight.dtype == torch.float16
        x = x.half() if half else x.bfloat16()
        x = F.relu(self.b1(self.c1(x).float()))
        x = x.to(torch.float16 if half else torch.bfloat16)
        x = F.relu(self.b2(self.c2(x).type(torch.float32)))
        return self.fc(x.mean((2, 3), dtype=torch.float32))

class Bare(nn.Module):
    # the same without casts

    def __init__(self):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.c2, self.b2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.b1(self.c1(x)))
        return self.fc(F.relu(self.b2(self.c2(x))).mean((2, 3)))
"""


@pytest.fixture(autouse=True)
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module ``mixed_nets`` with the classes above, in the current folder."""
    (tmp_path / "mixed_nets.py").write_text(BUILDERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mixed_nets", raising=False)
    torch.manual_seed(0)
    return __import__("mixed_nets")


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def explicit_casts(nets: Any, narrow: torch.dtype) -> nn.Module:
    return randomised(nets.Casts(narrow))


def wide_batch_norms(nets: Any, narrow: torch.dtype) -> nn.Module:
    model = randomised(nets.Bare()).to(narrow)
    for module in batch_norms(model):
        module.float()
    return model


def wide_statistics(nets: Any, narrow: torch.dtype) -> nn.Module:
    """torch's CPU kernels cannot run this one in its own dtypes."""
    model = randomised(nets.Bare()).to(narrow)
    for module in batch_norms(model):
        module.running_mean, module.running_var = (
            module.running_mean.float(),
            module.running_var.float(),
        )
    return model


def narrow_throughout(nets: Any, narrow: torch.dtype) -> nn.Module:
    return randomised(nets.Bare()).to(narrow)


def one_wide_buffer(nets: Any, _: torch.dtype) -> nn.Module:
    model = randomised(nets.Bare())
    model.b1.running_var = model.b1.running_var.double()
    return model


MIXES = [
    pytest.param(make, narrow, id=f"{make.__name__}-{str(narrow).removeprefix('torch.')}")
    for make in (explicit_casts, wide_batch_norms, wide_statistics, narrow_throughout)
    for narrow in (torch.float16, torch.bfloat16)
] + [pytest.param(one_wide_buffer, torch.float64, id="one_wide_buffer")]
each_mix = pytest.mark.parametrize(("make", "narrow"), MIXES)
each_gauge = pytest.mark.parametrize("gauge", ["unit", "pow2"])
Make = Callable[[Any, torch.dtype], nn.Module]


def draw(seed: int = 0) -> Tensor:
    return torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


@each_mix
@each_gauge
def test_conversions_are_equal_and_restored(
    nets: Any, make: Make, narrow: torch.dtype, gauge: Any
) -> None:
    model = make(nets, narrow)
    conversion = pathconvert.reparameterize(model, draw(), gauge=gauge)
    # float16 holds a few channels back, as the factors would leave its range
    assert conversion.counts()["channels_rescaled"] >= (8 if narrow == torch.float16 else 16)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert dtypes == {n: t.dtype for n, t in conversion.model.state_dict().items()}
    for x in (draw(), draw(1)):
        report = pathconvert.verify(model, conversion.model, x)
        assert report.passed, report
        # in float16, a small activation may become subnormal, where it is rounded more coarsely
        assert report.bit_identical or gauge == "unit" or narrow == torch.float16
    restored = pathconvert.restore(conversion.model, conversion.record).state_dict()
    for name, tensor in model.state_dict().items():
        if gauge == "pow2":
            assert torch.equal(restored[name], tensor), name
        elif tensor.is_floating_point():
            rounding = 2 * torch.finfo(tensor.dtype).eps * tensor.double().abs()
            difference = (restored[name].double() - tensor.double()).abs()
            assert bool((difference <= rounding).all()), name


@each_mix
@each_gauge
def test_a_wrong_network_is_found(nets: Any, make: Make, narrow: torch.dtype, gauge: Any) -> None:
    model = make(nets, narrow)
    wrong = pathconvert.reparameterize(model, draw(), gauge=gauge).model
    # the last weight, 5 % off
    wrong.get_parameter("fc.weight").data.mul_(1.05)
    report = pathconvert.verify(model, wrong, draw())
    assert not report.passed, report
    if narrow != torch.bfloat16:  # there, one number's 5 % are lost among the others' roundings
        wrong = copy.deepcopy(model)
        weight = wrong.get_parameter("fc.weight").data.view(-1)
        weight[weight.float().abs().argmax()] *= 1.05
        assert not pathconvert.verify(model, wrong, draw()).passed


@each_mix
def test_the_reference_is_exact(nets: Any, make: Make, narrow: torch.dtype) -> None:
    model = make(nets, narrow)
    exact = nets.Bare().double().eval()
    exact.load_state_dict({k: t.double() for k, t in model.state_dict().items()})
    with torch.no_grad():
        expected = exact(draw().double())
    (reference,) = forward_outputs(model, draw(), dtype=torch.float64)
    assert reference.dtype == torch.float64
    assert float((reference - expected).abs().max()) < 1e-12  # float64 rounds by 1e-16


@each_mix
def test_the_command_line_converts_and_restores(
    nets: Any, make: Make, narrow: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make(nets, narrow)
    torch.save(model.state_dict(), "m.pt")
    arch = ["--arch", f"mixed_nets:{type(model).__name__}", "--input-size", "3x12x12"]
    for gauge in ("unit", "pow2"):
        output = f"{gauge}.safetensors"
        assert run(["reparam", "m.pt", *arch, "--gauge", gauge, "-o", output]) == 0
        assert run(["verify", "m.pt", output, *arch]) == 0
        assert run(["restore", output, *arch, "-o", f"{gauge}.pt"]) == 0
    back = read_checkpoint("pow2.pt").tensors
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())
    wrong = model.state_dict()
    wrong["fc.weight"] = wrong["fc.weight"] * 1.05
    torch.save(wrong, "wrong.pt")
    assert run(["verify", "m.pt", "wrong.pt", *arch]) == 1
    assert "do not compute the same function" in capsys.readouterr().err


@each_mix
def test_engines_run_it_in_float32(nets: Any, make: Make, narrow: torch.dtype) -> None:
    model = make(nets, narrow)
    architecture = Architecture("own:net", {}, (3, 12, 12), "other")
    loaded = LoadedNetwork(copy.deepcopy(model), architecture, None, tuple(model.state_dict()))
    engine = torch_engine("net", loaded, "cpu")
    (reference,) = forward_outputs(model, draw(), dtype=torch.float64)
    scores = torch.from_numpy(engine.run(draw().numpy()))
    assert engine.precision == "float32"
    # a few layers round by 6e-8 each
    assert float((scores - reference).abs().max()) <= 1e-5 * float(reference.abs().max())


def test_an_export_without_casts_is_proven_and_one_with_casts_refused(nets: Any) -> None:
    export_onnx(wide_batch_norms(nets, torch.float16), "x.onnx", draw())
    with pytest.raises(PathconvertError) as refusal:
        export_onnx(explicit_casts(nets, torch.float16), "y.onnx", draw())
    assert str(refusal.value).startswith(
        "Casts has tensors of several dtypes and cannot run in float32, as its file would: "
    )
    assert not Path("y.onnx").exists()


def test_every_number_is_moved_by_half_a_unit_of_its_own_dtype() -> None:
    model = nn.Module()
    model.register_parameter("narrow", nn.Parameter(torch.tensor([1.0, -3.0, 0.0, 6e-8]).half()))
    model.register_buffer("wide", torch.tensor([1.0, float("inf")]))
    model.register_buffer("count", torch.tensor(3))
    assert is_mixed(model)
    moved = perturbed(model, 0).state_dict()
    # float16 has 11 bits: 1 is followed by 1 + 2⁻¹⁰, and 2⁻²⁴ is its smallest number
    assert (moved["narrow"] - model.narrow.double()).abs().tolist() == [2**-11, 2**-10, 0, 2**-25]
    assert (moved["wide"] - model.wide.double()).abs()[0] == 2**-24
    assert moved["wide"][1] == float("inf")
    assert moved["count"] == 3
    assert model.narrow.dtype == torch.float16
