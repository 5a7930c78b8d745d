"""Images that are not prepared as in training show at the first BatchNorm.

The networks here have the statistics of seeded images; the limits were measured on real networks,
which the last tests use where ``PATHCONVERT_DATA`` names them.
"""

# ruff: noqa: ARG001 - some fixtures are requested for their effect: `here` changes the current
# folder

import os
import re
from pathlib import Path

import pytest
import torch
from finetuning import SMALL
from PIL import Image
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d
from trainable import Small, save_images

from pathconvert.cli import run
from pathconvert.conversion.equivalence import EquivalenceReport
from pathconvert.errors import PathconvertError
from pathconvert.networks import checked
from pathconvert.networks.calibration import check_images
from pathconvert.networks.images import folder_images
from pathconvert.networks.inputs import IMAGENET_MEAN, IMAGENET_STD, load_images
from pathconvert.networks.loading import open_network
from pathconvert.networks.preprocessing import Preprocessing
from pathconvert.path_bn.statistics import compare_first

DATA = os.environ.get("PATHCONVERT_DATA")


def recipe(mean: tuple[float, ...], std: tuple[float, ...]) -> Preprocessing:
    return Preprocessing(16, (16, 16), mean, std)


PLAIN, HALF = recipe((0.0,) * 3, (1.0,) * 3), recipe((0.5,) * 3, (0.5,) * 3)
IMAGENET = recipe(IMAGENET_MEAN, IMAGENET_STD)
LEVELS, CAFFE = recipe((0.0,) * 3, (1 / 255,) * 3), recipe(IMAGENET_MEAN, (1 / 255,) * 3)
FLAGS = {
    PLAIN: "--mean 0 --std 1",
    IMAGENET: "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225",
    LEVELS: "--mean 0 --std 0.00392157",
}


def pictures(count: int, seed: int = 0, contrast: float = 0.25) -> Tensor:
    """Smooth images in [0, 1] with a grain, [count, 3, 16, 16]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator) * contrast
    smooth = nn.functional.interpolate(coarse, size=16, mode="bicubic")
    grain = torch.randn(smooth.shape, generator=generator) * 0.05
    return (0.45 + smooth + grain).clamp(0, 1)


def normalised(pixels: Tensor, used: Preprocessing) -> Tensor:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (used.mean, used.std))
    return (pixels - mean) / std


def trained(used: Preprocessing) -> nn.Module:
    """A network whose running statistics are those of 256 images that ``used`` prepares."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16, momentum=1.0), nn.ReLU(),
        nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    with torch.no_grad():
        model.train()(normalised(pictures(256), used))
    return model.eval()


# ---- what is measured ----------------------------------------------------------------------------


def test_against_the_definition():
    model, images = trained(PLAIN), pictures(8, seed=1)
    found = compare_first(model, images.split(3))
    read = model[0](images).detach().double()
    var, mean = torch.var_mean(read, (0, 2, 3), correction=0)
    bn = model[1]
    assert found.name == "1"
    spread = ((var + bn.eps) / (bn.running_var.double() + bn.eps)).quantile(0.9)
    assert found.spread == pytest.approx(float(spread), rel=1e-5)  # float32 convolutions
    shift = (mean - bn.running_mean).abs() / (bn.running_var + bn.eps).sqrt()
    assert found.shift == pytest.approx(float(shift.median()), rel=1e-4)


def test_the_first_that_runs_not_the_first_that_is_declared():
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late, self.early = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.early.running_var.fill_(4.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.late(self.early(x))

    found = compare_first(Turned(), [torch.randn(64, 3, 8, 8)])
    assert found.name == "early"
    assert found.spread == pytest.approx(0.25, rel=0.1)  # 4096 numbers a channel


def test_networks_that_tell_nothing():
    images = [pictures(4)]
    assert compare_first(nn.Conv2d(3, 4, 3), images) is None
    untouched = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert compare_first(untouched, images) is None
    unused = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    assert compare_first(unused, images) is None


def test_the_network_stays_as_it_is():
    model = trained(PLAIN).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compare_first(model, [pictures(4)])
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_frozen_batch_norms_tell_too():
    model = trained(PLAIN)
    frozen = FrozenBatchNorm2d(16)
    frozen.load_state_dict({k: v for k, v in model[1].state_dict().items() if "num" not in k})
    expected, model[1] = compare_first(model, [pictures(4)]), frozen
    assert compare_first(model, [pictures(4)]) == expected


def test_images_that_the_network_cannot_take():
    with pytest.raises(PathconvertError) as refused:
        compare_first(trained(PLAIN), [torch.zeros(2, 1, 16, 16)])
    assert str(refused.value).startswith(
        "the network cannot run on a calibration batch of 2×1×16×16: "
    )


# ---- what is said --------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [PLAIN, IMAGENET, HALF, LEVELS, CAFFE])
def test_images_prepared_as_in_training_are_fine(own):
    model = trained(own)
    for pixels in (
        pictures(64, seed=1),
        pictures(1, seed=2),
        pictures(8, seed=3, contrast=0.15),
        pictures(8, seed=4, contrast=0.5),
        pictures(8, seed=5).flip(1),
        1 - pictures(8, seed=6),
    ):
        assert check_images(model, pixels, own) is None


@pytest.mark.parametrize(
    ("own", "used"),
    [
        (PLAIN, IMAGENET),
        (PLAIN, LEVELS),
        (PLAIN, CAFFE),
        (IMAGENET, PLAIN),
        (IMAGENET, LEVELS),
        (LEVELS, PLAIN),
        (LEVELS, IMAGENET),
    ],
)
@pytest.mark.parametrize("count", [1, 8, 64])
def test_another_scale_is_named_with_what_would_fit(own, used, count):
    found = check_images(trained(own), pictures(count, seed=1), used)
    assert re.fullmatch(
        r"the images look wrongly prepared: what 1 reads has [\d.e+-]+ times its running variance,"
        rf" and lies [\d.]+ standard deviations off its running mean; with {FLAGS[own]} it would be"
        r" [\d.]+ times and [\d.]+",
        found,
    ), found


def test_nothing_is_proposed_where_nothing_usual_fits():
    odd = recipe((0.0,) * 3, (30.0,) * 3)
    found = check_images(trained(odd), pictures(8, seed=1), PLAIN)
    assert found.startswith("the images look wrongly prepared: what 1 reads has ")
    assert found.endswith(" off its running mean")


# ---- the commands --------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A current folder with ``n.pt``, trained on images in [0, 1], and such images."""
    torch.manual_seed(0)
    model = Small()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(nn.functional.interpolate(pictures(256), 12))
    torch.save(model.state_dict(), tmp_path / "n.pt")
    (tmp_path / "photos").mkdir()
    for i, pixels in enumerate(pictures(8, seed=1)):
        levels = (pixels * 255).round().byte().permute(1, 2, 0)
        Image.fromarray(levels.numpy()).save(tmp_path / "photos" / f"{i}.png")
    save_images(tmp_path / "data", 4, 2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


WRONG = ("--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225")
ENTER = ("reparam", "n.pt", *SMALL, "--form", "path-bn", "--calibrate", "photos")


def looked(lines: list[str]) -> list[str]:
    return [line for line in lines if "look wrongly prepared" in line]


def test_reparam_says_so(here, capsys):
    assert run([*ENTER]) == 0
    assert not looked(capsys.readouterr().err.splitlines())
    assert run([*ENTER, *WRONG, "--force"]) == 0
    (line,) = looked(capsys.readouterr().err.splitlines())
    assert line.startswith("note: the images look wrongly prepared: what stem_bn reads has ")
    assert "; with --mean 0 --std 1 it would be " in line
    proposed = re.search(r"with (--mean \S+ --std \S+)", line)[1].split()
    assert run([*ENTER, *proposed, "--force"]) == 0
    assert not looked(capsys.readouterr().err.splitlines())


def test_it_is_the_tip_of_a_conversion_that_is_not_equal(here, capsys, monkeypatch):
    report = EquivalenceReport(1.0, 1.0, 9.9, bit_identical=False, outputs=1)
    monkeypatch.setattr(checked, "_equality", lambda *_: report)
    assert run([*ENTER, *WRONG]) == 1
    error, tip = capsys.readouterr().err.splitlines()
    assert error.startswith("error: the converted network differs from the original")
    assert tip.startswith("tip: The images look wrongly prepared: what stem_bn reads has ")
    for rightly in ((), ("--mean", "0")):
        assert run([*ENTER, *rightly]) == 1
        assert capsys.readouterr().err.splitlines()[1].startswith("tip: Try --gauge pow2")


def test_finetune_says_so(here, capsys):
    common = ("finetune", "n.pt", *SMALL, "--data", "data", "--device", "cpu", "--dry-run")
    assert run([*common]) == 0
    assert not looked(capsys.readouterr().err.splitlines())
    assert run([*common, "--std", "0.00392157"]) == 0
    (line,) = looked(capsys.readouterr().err.splitlines())
    assert "; with --mean 0 --std 1 it would be " in line


# ---- real networks -------------------------------------------------------------------------------


@pytest.mark.skipif(DATA is None, reason="PATHCONVERT_DATA names no folder with weights/")
@pytest.mark.parametrize("folder", ["cifar10_20", "imagenet20"])
def test_a_real_network_that_takes_values_between_0_and_1(folder, tmp_path, monkeypatch):
    data = Path(DATA).resolve()
    text = re.findall(r"```python\n(.*?)```", (data / "README.md").read_text(), re.DOTALL)[0]
    (tmp_path / "calibration_test_net.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    network = open_network(
        data / "weights" / "resnet56_cifar10.pth",
        arch="calibration_test_net:CifarResNet",
        input_size=(3, 32, 32),
    )
    paths = folder_images(data / "images" / folder)
    pixels = load_images(paths, network.architecture, Preprocessing.plain((3, 32, 32)))
    for part in (pixels, pixels[:1], pixels[:4]):
        assert check_images(network.model, part, PLAIN) is None
        for used in (IMAGENET, LEVELS, CAFFE):
            assert "with --mean 0 --std 1" in check_images(network.model, part, used)
