"""reparam, restore, verify, inspect, archs and demo: what they write and print."""

# ruff: noqa: ARG001 - fixtures are asked for what they do: `here` is the current folder

import argparse
import json
import os
from pathlib import Path

import pytest
import torch
import torchvision
from command_line import SMALL, STOCK, header, tensors
from PIL import Image
from safetensors.torch import load_file, save_file
from sample_networks import network

from pathconvert.cli import run
from pathconvert.conversion.equivalence import EquivalenceReport
from pathconvert.files.checkpoint import read_checkpoint
from pathconvert.files.layout import Layout
from pathconvert.files.weights import tensors_digest
from pathconvert.networks import checked


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """Units in the last place between float32 numbers of the same sign."""
    return int((a.view(torch.int32).long() - b.view(torch.int32).long()).abs().max())


# ---- reparam and restore -------------------------------------------------------------------------


@pytest.mark.parametrize("name", STOCK)
def test_round_trip_of_a_stock_network(stock, here, name, capsys):
    source = stock / f"{name}.pt"
    assert run(["reparam", str(source), "-o", "x.path.safetensors", *SMALL]) == 0
    assert run(["restore", "x.path.safetensors", "-o", "back.pt"]) == 0
    assert "original file   restored up to rounding" in capsys.readouterr().out
    original, converted, back = (
        tensors(path) for path in (source, "x.path.safetensors", "back.pt")
    )
    assert set(original) == set(converted) == set(back)
    assert any(not torch.equal(original[key], converted[key]) for key in original)
    for key, tensor in original.items():
        assert (converted[key].shape, converted[key].dtype) == (tensor.shape, tensor.dtype), key
        assert tensor.dtype != torch.float32 or ulps(back[key], tensor) <= 2, key
    arguments = STOCK[name] | ({"init_weights": False} if name == "googlenet" else {})
    model = torchvision.models.get_model(name, **arguments)
    model.load_state_dict(load_file("x.path.safetensors"), strict=True)
    model.load_state_dict(torch.load("back.pt", weights_only=True), strict=True)


def test_pow2_is_bit_identical_both_ways(stock, here, capsys):
    source = stock / "resnet18.pt"
    assert (
        run(["reparam", str(source), "-o", "x.pt", "--gauge", "pow2", "--scope", "network", *SMALL])
        == 0
    )
    assert "passed: outputs bit-identical" in capsys.readouterr().out
    assert run(["restore", "x.pt", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bit_identical_to_the_original"]
    assert result["output"] == "x.restored.pt"
    assert tensors_digest(tensors("x.restored.pt")) == tensors_digest(tensors(source))


def test_counters_that_the_source_lacks_are_not_added(stock, here):
    state = {k: v for k, v in tensors(stock / "resnet18.pt").items() if "num_batches" not in k}
    torch.save(state, "old.pt")
    assert run(["reparam", "old.pt", *SMALL]) == 0
    assert set(tensors("old.path.safetensors")) == set(state)


@pytest.mark.parametrize("options", [("block", "max", "pow2"), ("network", "diagonal", "unit")])
def test_header(here, options):
    scope, pivot, gauge = options
    assert (
        run(["reparam", "sq.pt", "--scope", scope, "--pivot", pivot, "--gauge", gauge, *SMALL]) == 0
    )
    metadata = header("sq.path.safetensors")
    record = metadata.pop("record")
    assert [record[key] for key in ("scope", "pivot", "gauge")] == list(options)
    assert len(record["scales"]) == sum(group["size"] for group in record["groups"])
    source = read_checkpoint("sq.pt")
    assert metadata == {
        "format_version": 1,
        "tool": record["tool"],
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "architecture": {
            "name": "squeezenet1_1",
            "arguments": {"num_classes": 5},
            "input_size": [3, 64, 64],
            "task": "classification",
        },
        "source": {
            "name": "sq.pt",
            "sha256": source.sha256,
            "tensors_sha256": tensors_digest(source.tensors),
            "layout": Layout("torch").to_json(),
        },
    }


def test_json_is_alone_on_stdout(here, capsys):
    torch.save({"epoch": 1, "model": tensors("sq.pt")}, "w.pt")
    capsys.readouterr()
    assert run(["reparam", "w.pt", "--json", *SMALL]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert (result["architecture"], result["output"]) == ("squeezenet1_1", "w.path.safetensors")
    assert result["equality"]["passed"]
    assert printed.err == "w.pt: taking the weights under 'model'\n"
    for command in (["inspect", "w.pt"], ["verify", "sq.pt", "w.path.safetensors"]):
        assert run([*command, "--json", *SMALL]) == 0
        json.loads(capsys.readouterr().out)


def test_json_knows_no_infinity(here, capsys, monkeypatch):
    endless = EquivalenceReport(float("inf"), float("inf"), float("inf"), False, 1)
    monkeypatch.setattr(checked, "verify_conversion", lambda *_: endless)
    assert run(["verify", "sq.pt", "sq.pt", "--json", *SMALL]) == 1
    assert json.loads(capsys.readouterr().out)["equality"]["max_abs"] is None


def test_report_holds_every_group_and_pivot(here):
    assert run(["reparam", "sq.pt", "--report", "r.json", *SMALL]) == 0
    report = json.loads(Path("r.json").read_text())
    groups = header("sq.path.safetensors")["record"]["groups"]
    assert [group["name"] for group in report["groups"]] == [group["name"] for group in groups]
    for group in report["groups"]:
        assert len(group["pivots"]) == len(group["scales"]) == group["size"]
        assert group["pinned_by"] or all(pivot["sign"] in (-1, 1) for pivot in group["pivots"])


def test_report_is_checked_before_any_work(refused, here):
    before = Path("sq.pt").read_bytes()
    Path("old.json").write_text("old")
    Path("folder").mkdir()
    place = "is the source or the output, so the report cannot be written there."
    for report, message in (
        ("sq.pt", f"sq.pt {place}"),
        ("sq.path.safetensors", f"sq.path.safetensors {place}"),
        ("no/r.json", "The folder no of the report no/r.json does not exist or is not writable."),
        ("old.json", "old.json exists already."),
        ("folder", "folder is a directory; expected the name of a file for the report."),
    ):
        assert refused("reparam", "sq.pt", "--report", report, *SMALL)[0] == f"error: {message}"
    assert Path("sq.pt").read_bytes() == before
    assert Path("old.json").read_text() == "old"


@pytest.mark.parametrize(
    ("wrap", "options", "notes"),
    [
        (lambda s: {"state_dict": s}, [], ["taking the weights under 'state_dict'"]),
        (
            lambda s: {f"module.{k}": v for k, v in s.items()},
            [],
            ["prefix 'module.' removed from every name"],
        ),
        (
            lambda s: {
                "model": s,
                "model_ema": (
                    {f"module.{k}": v for k, v in s.items()} | {"n_averaged": torch.tensor(3)}
                ),
            },
            ["--key", "model_ema"],
            [
                "taking the weights under 'model_ema'",
                "prefix 'module.' removed from every name",
                "left out: n_averaged",
            ],
        ),
    ],
    ids=["wrapper", "prefix", "ema"],
)
def test_wrappers_and_prefixes_are_printed(here, capsys, wrap, options, notes):
    torch.save(wrap(tensors("sq.pt")), "w.pt")
    assert run(["reparam", "w.pt", *options, *SMALL]) == 0
    assert capsys.readouterr().err.splitlines() == [f"w.pt: {note}" for note in notes]
    assert set(tensors("w.path.safetensors")) == set(tensors("sq.pt"))


def test_torchvisions_training_checkpoint(here, capsys):
    model = network("squeezenet1_1", num_classes=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 30)
    saved = {"model": model, "optimizer": optimizer, "lr_scheduler": scheduler}
    saved = {key: value.state_dict() for key, value in saved.items()}
    torch.save(
        saved | {"epoch": 3, "args": argparse.Namespace(lr=0.1, data_path="x")}, "checkpoint.pth"
    )
    assert run(["reparam", "checkpoint.pth", *SMALL]) == 0
    assert capsys.readouterr().err == "checkpoint.pth: taking the weights under 'model'\n"


def test_names_with_spaces_and_letters(here):
    folder = here / "mit Leerraum" / "ünï"
    folder.mkdir(parents=True)
    os.rename("sq.pt", folder / "rés net.pt")
    assert run(["reparam", str(folder / "rés net.pt"), *SMALL]) == 0
    assert (folder / "rés net.path.safetensors").exists()


def test_existing_output_needs_force(refused, here):
    Path("sq.path.safetensors").write_text("old")
    lines = refused("reparam", "sq.pt", *SMALL)
    assert lines[0] == "error: sq.path.safetensors exists already."
    assert Path("sq.path.safetensors").read_text() == "old"
    assert run(["reparam", "sq.pt", "--force", *SMALL]) == 0
    assert header("sq.path.safetensors")["format_version"] == 1


def test_source_is_never_overwritten(refused, here):
    before = Path("sq.pt").read_bytes()
    os.symlink("sq.pt", "link.pt")
    for output in ("sq.pt", "link.pt", "./sq.pt"):
        lines = refused("reparam", "sq.pt", "--force", "-o", output)
        assert lines[0].endswith("is the source itself, which is never overwritten.")
    assert Path("sq.pt").read_bytes() == before


def test_converted_and_plain_are_not_confused(refused, here):
    assert run(["reparam", "sq.pt", *SMALL]) == 0
    assert refused("reparam", "sq.path.safetensors") == [
        "error: sq.path.safetensors is converted already: it is in path form",
        "tip: Restore it first: pathconvert restore sq.path.safetensors",
    ]
    assert refused("restore", "sq.pt") == [
        "error: sq.pt was never converted by pathconvert: it holds no conversion record",
        "tip: Give the .path.safetensors file that pathconvert reparam wrote.",
    ]


def edit(path: str, change) -> None:
    """Write a converted file again with changed metadata."""
    metadata = header(path)
    change(metadata)
    save_file(load_file(path), path, {"format": "pt", "pathconvert": json.dumps(metadata)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.update(format_version=9),
            "has metadata of format version 9; this is pathconvert",
        ),
        (
            lambda m: m["record"].update(format_version=9),
            "the conversion record has format version 9",
        ),
        (lambda m: m["record"].pop("scales"), "the conversion record is damaged: KeyError"),
        (lambda m: m["record"].update(scales=[1.0]), "names a channel that does not exist"),
        (
            lambda m: m["record"]["tensors"].update(x=m["record"]["tensors"].popitem()[1]),
            "the conversion record belongs to another network: this one has no tensor x",
        ),
        (
            lambda m: m["record"]["tensors"].update({"classifier.1.bias": {"rows": [[-1, 4, 1]]}}),
            "the conversion record does not fit the tensor classifier.1.bias of shape [5]",
        ),
        (lambda m: m.update(architecture=None), "does not say how to build its network"),
    ],
    ids=["version", "record", "scales", "channel", "tensor", "shape", "architecture"],
)
def test_restore_of_a_record_that_does_not_fit(refused, here, change, message):
    assert run(["reparam", "sq.pt", *SMALL]) == 0
    edit("sq.path.safetensors", change)
    assert message in refused("restore", "sq.path.safetensors")[0]


# ---- verify, inspect, archs, demo ----------------------------------------------------------------


def test_verify_tells_changed_networks(here, capsys):
    assert run(["reparam", "sq.pt", *SMALL]) == 0
    Path("photos").mkdir()
    for seed in range(3):
        pixels = torch.randint(
            256, (40, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
        )
        Image.fromarray(pixels.numpy()).save(f"photos/{seed}.png")
    capsys.readouterr()
    assert run(["verify", "sq.path.safetensors", "sq.pt", *SMALL]) == 0
    assert run(["verify", "sq.pt", "sq.path.safetensors", "--images", "photos", *SMALL]) == 0
    assert "same top-1 on 3 of 3" in capsys.readouterr().out
    changed = tensors("sq.pt")
    changed["features.0.weight"] = changed["features.0.weight"] * 1.01
    torch.save(changed, "changed.pt")
    assert run(["verify", "sq.pt", "changed.pt", *SMALL]) == 1
    printed = capsys.readouterr()
    assert "FAILED" in printed.out
    assert printed.err == "error: sq.pt and changed.pt do not compute the same function\n"


def test_verify_refuses_other_architectures_and_folders(refused, stock, here):
    lines = refused("verify", "sq.pt", stock / "resnet18.pt")
    assert (
        lines[0]
        == "error: the networks have different architectures: squeezenet1_1 (num_classes=5) and "
        "resnet18 (num_classes=3)"
    )
    for folder in ("empty", "broken"):
        Path(folder).mkdir()
    Path("broken/a.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    for folder, message in (
        ("none", "none is not a folder"),
        ("empty", "empty contains no images"),
        ("broken", "broken/a.png is not an intact image"),
    ):
        assert refused("verify", "sq.pt", "sq.pt", "--images", folder, *SMALL)[0].startswith(
            f"error: {message}"
        )


def test_inspect_tells_plain_from_converted(here, capsys):
    assert run(["inspect", "sq.pt", *SMALL]) == 0
    plain = capsys.readouterr().out
    assert "plain checkpoint" in plain
    assert "largest / smallest of each group: median" in plain
    assert run(["reparam", "sq.pt", *SMALL]) == 0
    capsys.readouterr()
    assert run(["inspect", "sq.path.safetensors", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["form"], result["scope"], result["pivot"], result["gauge"]) == (
        "path",
        "block",
        "matching",
        "unit",
    )
    assert result["source"]["name"] == "sq.pt"


def test_archs(capsys):
    assert run(["archs", "--json"]) == 0
    entries = {
        entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["architectures"]
    }
    assert entries["resnet50"]["supported"]
    assert entries["mobilenet_v2"]["reason"] == "ReLU6 is not positively homogeneous"
    assert all(entry["supported"] == (not entry["reason"]) for entry in entries.values())
    assert run(["archs"]) == 0
    assert "GELU is not positively homogeneous" in " ".join(capsys.readouterr().out.split())


def test_demo(tmp_path, capsys, monkeypatch):
    from pathconvert.commands import digits

    few = [tensor[:500] for tensor in digits._digits()]
    monkeypatch.setattr(digits, "_digits", lambda: few)
    monkeypatch.setattr(digits, "EPOCHS", 1)
    assert run(["demo", "--output-dir", str(tmp_path / "demo")]) == 0
    printed = capsys.readouterr()
    assert "trained a torchvision resnet18 on digits" in printed.err
    assert printed.out.count("passed") == 4
    kinds = ("onnx", "path-bn.safetensors", "path.safetensors", "pt", "restored.pt")
    expected = ["digits", *(f"digits_resnet18.{kind}" for kind in kinds), "run", "turned"]
    assert sorted(os.listdir(tmp_path / "demo")) == expected
    assert "× first" in printed.out  # the latency's ratio


def test_demo_into_a_file(refused):
    assert (
        refused("demo", "--output-dir", "sq.pt")[0]
        == "error: The folder sq.pt cannot be made: File exists."
    )
