"""`reparam --form path-bn` and what the other commands make of its files."""

# ruff: noqa: ARG001 - fixtures are asked for what they do: `here` is the current folder

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import SMALL, header
from PIL import Image
from sample_networks import network

import pathconvert
from pathconvert.cli import run


@pytest.fixture
def here(stock, tmp_path, monkeypatch) -> Path:
    """A folder with a SqueezeNet (``sq.pt``), a ResNet (``res.pt``) and eight images in
    ``photos/``.
    """
    shutil.copy(stock / "squeezenet1_1.pt", tmp_path / "sq.pt")
    shutil.copy(stock / "resnet18.pt", tmp_path / "res.pt")
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / "photos" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def result(capsys, *arguments: str) -> dict:
    capsys.readouterr()
    assert run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_there_and_back(here, capsys):
    summary = result(
        capsys, "reparam", "sq.pt", "--form", "path-bn", "--calibrate", "photos", *SMALL
    )
    assert summary["output"] == "sq.path-bn.safetensors"
    assert (summary["form"], len(summary["path_bn"]["layers"])) == ("path-bn", 16)
    assert summary["path_bn"]["calibration"] == {"source": "images", "images": 8}
    assert summary["equality"]["passed"]
    assert header(Path("sq.path-bn.safetensors"))["record"]["form"] == "path-bn"
    compared = result(
        capsys, "verify", "sq.pt", "sq.path-bn.safetensors", "--images", "photos", *SMALL
    )
    assert compared["same_top1"] == compared["images"] == 8
    seen = result(capsys, "inspect", "sq.path-bn.safetensors")
    assert (seen["form"], seen["path_bn"]["skip_scale"]) == ("path-bn", 1.0)
    restored = result(capsys, "restore", "sq.path-bn.safetensors")
    assert restored["output"] == "sq.restored.pt"
    assert restored["equality"]["passed"]
    assert sorted(pathconvert.load("sq.restored.pt")[0].state_dict()) == sorted(torch.load("sq.pt"))


def test_from_a_file_in_path_form(here, capsys):
    """The pivots are those of the conversion, the source is its source."""
    assert run(["reparam", "res.pt", "--pivot", "max", "--scope", "network", *SMALL]) == 0
    summary = result(
        capsys, "reparam", "res.path.safetensors", "--form", "path-bn", "--skip-scale", "0.1"
    )
    assert (summary["output"], summary["pivot"]) == ("res.path-bn.safetensors", "max")
    assert summary["path_bn"]["calibration"] == {"source": "gaussian"}
    path, path_bn = header(Path("res.path.safetensors")), header(Path("res.path-bn.safetensors"))
    assert path_bn["source"] == path["source"]
    assert path_bn["record"]["pivots"] == path["record"]["pivots"]
    assert result(capsys, "verify", "res.pt", "res.path-bn.safetensors", *SMALL)["equality"][
        "passed"
    ]
    assert result(capsys, "restore", "res.path-bn.safetensors", "-o", "back.pt")["equality"][
        "passed"
    ]
    assert result(capsys, "verify", "res.pt", "back.pt", *SMALL)["equality"]["passed"]


def test_the_table_says_where_statistics_come_from(here, capsys):
    assert run(["reparam", "res.pt", "--form", "path-bn", *SMALL]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    statistics = "statistics estimated from the BatchNorms (Gaussian), without images"
    assert f"8 layers, 13 left as they are; λ 1; {statistics}" in printed
    assert run(["reparam", "sq.pt", "--form", "path-bn", "--calibrate", "photos", *SMALL]) == 0
    printed = capsys.readouterr()
    assert "16 layers, 10 left as they are; λ 1; calibrated on 8 images" in " ".join(
        printed.out.split()
    )
    assert (
        "no Path-BN: classifier.1 (is the last layer: no normalization comes before an output)"
        in printed.err
    )
    assert (
        "note: no Path-BN: features.0, features.3.expand3x3, features.4.expand3x3, " in printed.err
    )
    assert (
        " and 4 more (holds no pivot: it begins a chain, or what it reads has its pivots elsewhere)"
        in printed.err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--calibrate", "photos"], "--calibrate and --skip-scale apply only to the Path-BN form"),
        (["--skip-scale", "0.1"], "--calibrate and --skip-scale apply only to the Path-BN form"),
        (
            ["--form", "path-bn"],
            "SqueezeNet has no BatchNorm to estimate Path-BN's statistics from",
        ),
        (["--form", "path-bn", "--calibrate", "nowhere"], "nowhere is not a folder"),
        (["--form", "path-bn", "--calibrate", "empty"], "empty contains no images"),
        (["--form", "path-bn", "--calibrate", "broken"], "broken/x.png is not an intact image"),
        (["--form", "path-bn", "--skip-scale", "-1"], "skip_scale is -1.0 but must be positive"),
        (["--form", "path-bn", "--skip-scale", "nan"], "skip_scale is nan but must be positive"),
    ],
)
def test_bad_input(here, refused, arguments, message):
    for folder in ("empty", "broken"):
        (here / folder).mkdir()
    (here / "broken" / "x.png").write_bytes(b"no picture")
    assert message in " ".join(refused("reparam", "sq.pt", *SMALL, *arguments)[0].split())


def test_what_is_converted_is_not_converted_again(here, refused):
    assert run(["reparam", "res.pt", "--form", "path-bn", *SMALL]) == 0
    for form in ("path", "path-bn"):
        lines = refused("reparam", "res.path-bn.safetensors", "--form", form, "-o", "x.safetensors")
        assert "res.path-bn.safetensors is converted already: it is in Path-BN form" in lines[0]
    shutil.copy("res.path-bn.safetensors", "other.path-bn.safetensors")
    for form in ("path", "path-bn"):
        lines = refused("reparam", "other.path-bn.safetensors", "--form", form)
        assert "other.path-bn.safetensors is converted already: it is in Path-BN form" in lines[0]


def test_a_failed_check_leaves_no_file(here, capsys, monkeypatch):
    from pathconvert.networks import checked

    real = checked.to_path_bn

    def spoiled(*arguments):
        model = real(*arguments)
        with torch.no_grad():
            next(m for m in model.modules() if isinstance(m, pathconvert.PathBN)).bn.bias.add_(1.0)
        return model

    monkeypatch.setattr(checked, "to_path_bn", spoiled)
    assert run(["reparam", "res.pt", "--form", "path-bn", *SMALL]) == 1
    assert "the converted network differs from the original" in capsys.readouterr().err
    assert not Path("res.path-bn.safetensors").exists()


def test_resume_refuses_another_networks_record():
    x = torch.randn(1, 3, 64, 64)
    record = pathconvert.reparameterize(network("resnet18"), x).record
    from pathconvert.conversion.reparameterize import resume
    from pathconvert.errors import RecordError

    with pytest.raises(RecordError, match="the conversion record belongs to another network"):
        resume(network("resnet34"), x, record)


def test_resume_is_the_conversion_again():
    from pathconvert.conversion.reparameterize import resume

    x = torch.randn(1, 3, 64, 64)
    conversion = pathconvert.reparameterize(network("resnet18"), x, "network", "max")
    again = resume(conversion.model, x, conversion.record)
    assert np.array_equal(again.scales, conversion.scales)
    assert np.array_equal(again.pivots.layer, conversion.pivots.layer)
    # float32 weights
    assert np.allclose(again.pivots.value, conversion.pivots.value, rtol=1e-5, atol=0)
    places = [
        [pivot and pivot[:4] for pivot in one.groups[0].pivots] for one in (again, conversion)
    ]
    assert places[0] == places[1]


def test_resume_knows_what_was_held_back():
    """float16 and diagonals of 1e-6: most factors would leave the normal range."""
    from pathconvert.conversion.reparameterize import resume

    model, x = network("squeezenet1_1"), torch.randn(1, 3, 64, 64)
    conversion = pathconvert.reparameterize(model.half(), x, pivot="diagonal", gauge="pow2")
    again = resume(conversion.model, x, conversion.record)
    assert conversion.counts()["channels_held_back"] > 0
    assert again.counts() == conversion.counts()
