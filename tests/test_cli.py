"""The commands: what they write, what they print, what they refuse, by the words on stderr."""

# ruff: noqa: ARG001 - fixtures are asked for what they do: `here` is the current folder

import argparse
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import urllib.error
import zipfile
from pathlib import Path

import pytest
import torch
import torchvision
from networks import network
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from pathconvert import checkpoint, conversions
from pathconvert.checkpoint import read_checkpoint, tensors_digest
from pathconvert.cli import run
from pathconvert.equivalence import EquivalenceReport

ROOT = Path(__file__).parent.parent
SMALL = ("--input-size", "3x64x64")
EXPECTED = "expected a PyTorch checkpoint (.pt, .pth) or a .safetensors file."
COMMANDS = ("reparam", "restore", "export", "verify", "inspect", "bench", "predict", "archs", "demo")
STOCK = {
    "squeezenet1_1": {"num_classes": 5},
    "resnet18": {"num_classes": 3},
    "googlenet": {"num_classes": 4, "aux_logits": True},
}
BUILDER = """
from torch import nn

def grey(num_classes=10):
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
"""


class Evil:
    """Unpickling it makes the file ``canary``."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """A folder with the state dict of every network of ``STOCK``."""
    folder = tmp_path_factory.mktemp("stock")
    for name, arguments in STOCK.items():
        torch.save(network(name, **arguments).state_dict(), folder / f"{name}.pt")
    return folder


@pytest.fixture
def here(stock, tmp_path, monkeypatch) -> Path:
    """An empty current folder but for ``sq.pt``, a SqueezeNet with 5 classes."""
    shutil.copy(stock / "squeezenet1_1.pt", tmp_path / "sq.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(here, capsys):
    """Run, expect exit code 2, one or two lines on stderr and no new file; the lines."""

    def check(*arguments: object, code: int = 2) -> list[str]:
        before = sorted(os.listdir(here))
        capsys.readouterr()
        assert run([str(argument) for argument in arguments]) == code
        printed = capsys.readouterr()
        lines = printed.err.splitlines()
        assert printed.out == ""
        assert [line.split(":")[0] for line in lines] in (["error"], ["error", "tip"])
        assert sorted(os.listdir(here)) == before
        return lines

    return check


def tensors(path: Path) -> dict:
    return read_checkpoint(path).tensors


def header(path: Path) -> dict:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["pathconvert"])


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """Units in the last place between float32 numbers of the same sign."""
    return int((a.view(torch.int32).long() - b.view(torch.int32).long()).abs().max())


# --- reparam and restore --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STOCK)
def test_round_trip_of_a_stock_network(stock, here, name, capsys):
    source = stock / f"{name}.pt"
    assert run(["reparam", str(source), "-o", "x.path.safetensors", *SMALL]) == 0
    assert run(["restore", "x.path.safetensors", "-o", "back.pt"]) == 0
    assert "original file   restored to rounding" in capsys.readouterr().out
    original, converted, back = (tensors(path) for path in (source, "x.path.safetensors", "back.pt"))
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
    assert run(["reparam", str(source), "-o", "x.pt", "--gauge", "pow2", "--scope", "network", *SMALL]) == 0
    assert "passed: outputs bit-identical" in capsys.readouterr().out
    assert run(["restore", "x.pt", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bit_identical_to_the_original"]
    assert result["output"] == "x.restored.safetensors"
    assert tensors_digest(tensors("x.restored.safetensors")) == tensors_digest(tensors(source))


def test_counters_that_the_source_lacks_are_not_added(stock, here):
    state = {k: v for k, v in tensors(stock / "resnet18.pt").items() if "num_batches" not in k}
    torch.save(state, "old.pt")
    assert run(["reparam", "old.pt", *SMALL]) == 0
    assert set(tensors("old.path.safetensors")) == set(state)


@pytest.mark.parametrize("options", [("block", "max", "pow2"), ("network", "diagonal", "unit")])
def test_header(here, options):
    scope, pivot, gauge = options
    assert run(["reparam", "sq.pt", "--scope", scope, "--pivot", pivot, "--gauge", gauge, *SMALL]) == 0
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
        "source": {"name": "sq.pt", "sha256": source.sha256, "tensors_sha256": tensors_digest(source.tensors)},
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
    monkeypatch.setattr(conversions, "verify_conversion", lambda *_: endless)
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
    place = "is the source or the output, and no place for the report."
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
        (lambda s: {f"module.{k}": v for k, v in s.items()}, [], ["prefix 'module.' removed from every name"]),
        (
            lambda s: {
                "model": s,
                "model_ema": {f"module.{k}": v for k, v in s.items()} | {"n_averaged": torch.tensor(3)},
            },
            ["--key", "model_ema"],
            ["taking the weights under 'model_ema'", "prefix 'module.' removed from every name"],
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
    torch.save(saved | {"epoch": 3, "args": argparse.Namespace(lr=0.1, data_path="x")}, "checkpoint.pth")
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
        "error: sq.path.safetensors is converted already",
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
        (lambda m: m.update(format_version=9), "has metadata of format version 9; this is pathconvert"),
        (lambda m: m["record"].update(format_version=9), "the conversion record has format version 9"),
        (lambda m: m["record"].pop("scales"), "the conversion record is damaged: KeyError"),
        (lambda m: m["record"].update(scales=[1.0]), "names a channel that it lacks"),
        (
            lambda m: m["record"]["tensors"].update(x=m["record"]["tensors"].popitem()[1]),
            "the conversion record is not of this network: it has no tensor x",
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


# --- verify, inspect, archs, demo -----------------------------------------------------------------------------------


def test_verify_tells_changed_networks(here, capsys):
    assert run(["reparam", "sq.pt", *SMALL]) == 0
    Path("photos").mkdir()
    for seed in range(3):
        pixels = torch.randint(256, (40, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
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
    assert printed.err == "error: sq.pt and changed.pt are not the same function\n"


def test_verify_refuses_other_architectures_and_folders(refused, stock, here):
    lines = refused("verify", "sq.pt", stock / "resnet18.pt")
    assert lines[0] == (
        "error: the networks are of different architectures: squeezenet1_1 {'num_classes': 5} and "
        "resnet18 {'num_classes': 3}"
    )
    for folder in ("empty", "broken"):
        Path(folder).mkdir()
    Path("broken/a.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    for folder, message in (
        ("none", "none is no folder"),
        ("empty", "empty holds no image"),
        ("broken", "broken/a.png is no intact image"),
    ):
        assert refused("verify", "sq.pt", "sq.pt", "--images", folder, *SMALL)[0].startswith(f"error: {message}")


def test_inspect_tells_plain_from_converted(here, capsys):
    assert run(["inspect", "sq.pt", *SMALL]) == 0
    plain = capsys.readouterr().out
    assert "plain checkpoint" in plain
    assert "largest / smallest of a group: median" in plain
    assert run(["reparam", "sq.pt", *SMALL]) == 0
    capsys.readouterr()
    assert run(["inspect", "sq.path.safetensors", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["form"], result["scope"], result["pivot"], result["gauge"]) == ("path", "block", "matching", "unit")
    assert result["source"]["name"] == "sq.pt"


def test_archs(capsys):
    assert run(["archs", "--json"]) == 0
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["architectures"]}
    assert entries["resnet50"]["supported"]
    assert entries["mobilenet_v2"]["reason"] == "ReLU6 is not positively homogeneous"
    assert all(entry["supported"] == (not entry["reason"]) for entry in entries.values())
    assert run(["archs"]) == 0
    assert "GELU is not positively homogeneous" in " ".join(capsys.readouterr().out.split())


def test_demo(tmp_path, capsys, monkeypatch):
    from pathconvert import demo

    few = [tensor[:500] for tensor in demo._digits()]
    monkeypatch.setattr(demo, "_digits", lambda: few)
    monkeypatch.setattr(demo, "EPOCHS", 1)
    assert run(["demo", "--output-dir", str(tmp_path / "demo")]) == 0
    printed = capsys.readouterr()
    assert "trained a torchvision resnet18 on digits" in printed.err
    assert printed.out.count("passed") == 4
    kinds = ("onnx", "path-bn.safetensors", "path.safetensors", "pt", "restored.safetensors")
    assert sorted(os.listdir(tmp_path / "demo")) == ["digits", *(f"digits_resnet18.{kind}" for kind in kinds)]
    assert "× first" in printed.out  # the latency's ratio


def test_demo_into_a_file(refused):
    assert refused("demo", "--output-dir", "sq.pt")[0] == "error: The folder sq.pt cannot be made: File exists."


# --- naming the network ---------------------------------------------------------------------------------------------


def test_a_builder_in_the_current_folder(refused, here, capsys):
    Path("cli_test_nets.py").write_text(BUILDER)
    namespace: dict = {}
    exec(BUILDER, namespace)
    torch.manual_seed(0)
    torch.save(namespace["grey"](4).state_dict(), "grey.pt")
    named = ("--arch", "cli_test_nets:grey", "--num-classes", "4")
    assert refused("reparam", "grey.pt", *named) == [
        "error: cli_test_nets:grey does not tell the size of its input",
        "tip: Give it: --input-size 3x224x224",
    ]
    assert run(["reparam", "grey.pt", *named, "--input-size", "1x20x20"]) == 0
    assert run(["restore", "grey.path.safetensors"]) == 0
    assert run(["inspect", "grey.path.safetensors"]) == 0
    Path("photos").mkdir()
    Image.new("RGB", (30, 40), (200, 10, 10)).save("photos/red.jpg")
    capsys.readouterr()
    assert run(["verify", "grey.path.safetensors", "grey.path.safetensors", "--images", "photos"]) == 0
    assert run(["verify", "grey.pt", "grey.path.safetensors"]) == 0  # the converted file tells what the other is
    assert run(["verify", "grey.path.safetensors", "grey.pt"]) == 0
    assert "same top-1 on 1 of 1" in capsys.readouterr().out


def test_wrong_names(refused):
    assert refused("reparam", "sq.pt", "--arch", "resnet5O") == [
        "error: 'resnet5O' is no network that pathconvert knows",
        "tip: Did you mean resnet50, resnet152, resnet34?",
    ]
    assert refused("reparam", "resnet5O") == [
        "error: resnet5O is neither a file here nor a torchvision network that pathconvert knows.",
        "tip: Did you mean resnet50, resnet152, resnet34?",
    ]
    assert "the tensors are not those of resnet18" in refused("reparam", "sq.pt", "--arch", "resnet18")[0]
    assert (
        "classifier.1.weight has shape [5, 512, 1, 1], expected [7, 512, 1, 1]"
        in (refused("reparam", "sq.pt", "--num-classes", 7)[0])
    )


def test_offline_name(refused, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", "cache")
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    lines = refused("reparam", "squeezenet1_1")
    assert lines[0].startswith("error: the weights of squeezenet1_1 could not be downloaded")
    assert lines[1] == "tip: Offline, give a file with them: pathconvert reparam FILE"


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("224", "squeezenet1_1 takes no input of size 224"),
        ("1x64x64", "squeezenet1_1 takes no input of size 1x64x64"),
        ("3x0x0", "'3x0x0' is no input size"),
        ("big", "'big' is no input size"),
        ("3x1x1", "cannot be followed on shapes alone: Calculated padded input size per channel: (1 x 1)"),
    ],
)
def test_wrong_input_sizes(refused, size, message):
    assert message in refused("reparam", "sq.pt", "--input-size", size)[0]


# --- the bad-input table of the issue -------------------------------------------------------------------------------


def bad_file(name: str) -> Path:
    """A file for a row of the table."""
    state = tensors("sq.pt")
    first = "features.0.weight"
    path = Path(f"{name}.pt")
    if name == "quantized" or name == "integer":
        torch.save(state | {first: state[first].to(torch.int8)}, path)
    elif name == "nan":
        state[first].view(-1)[:2] = torch.tensor([float("nan"), float("inf")])
        torch.save(state, path)
    elif name == "missing_tensor":
        torch.save({k: v for k, v in state.items() if k != first}, path)
    elif name == "extra_tensor":
        torch.save(state | {"extra": torch.ones(2)}, path)
    elif name == "misshapen":
        torch.save(state | {first: torch.ones(64, 4, 3, 3)}, path)
    elif name == "code":
        torch.save({"w": torch.ones(2), "evil": Evil(Path("canary"))}, path)
    elif name == "plain_code":
        path.write_bytes(pickle.dumps(Evil(Path("canary"))))
    elif name == "module":
        torch.save(nn.Linear(2, 2), path)
    elif name == "torchscript":
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), path)
    elif name == "onnx":
        path.write_bytes(bytes([8, 8, 18, 1, 120, 58, 2, 18, 0]))
    elif name == "optimizer":
        torch.save({"optimizer": torch.optim.SGD([torch.ones(1)], lr=0.1).state_dict()}, path)
    elif name == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "no checkpoint")
    elif name == "directory":
        path.mkdir()
    elif name in HEADERS:
        path = Path(f"{name}.safetensors")
        path.write_bytes(HEADERS[name])
    elif name != "absent":
        path.write_bytes(
            {
                "empty": b"",
                "text": b"hello, world\n",
                "random": bytes(range(250, 100, -1)),
                "truncated": Path("sq.pt").read_bytes()[:-1000],
            }[name]
        )
    return path


def safetensors_bytes(entries: dict, size: int) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def entry(begin: int, end: int, count: int) -> dict:
    return {"dtype": "F32", "shape": [count], "data_offsets": [begin, end]}


HEADERS = {
    "liar": safetensors_bytes({"a": entry(0, 8, 2000)}, 8),
    "overlap": safetensors_bytes({"a": entry(0, 8, 2), "b": entry(4, 12, 2)}, 12),
    "huge": struct.pack("<Q", 2_000_000_000) + b"{" + bytes(50),
}


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "absent": f"absent.pt does not exist; {EXPECTED}",
        "empty": f"empty.pt is empty (0 bytes); {EXPECTED}",
        "truncated": "truncated.pt is a truncated or damaged torch.save file",
        "random": f"random.pt is unknown binary data (it begins with fa f9 f8 f7 f6 f5 f4 f3); {EXPECTED}",
        "text": f"text.pt is a text file (it begins with 'hello, world'); {EXPECTED}",
        "zip": f"zip.pt is a zip archive without a checkpoint in it (it holds 'readme.txt'); {EXPECTED}",
        "directory": f"directory.pt is a directory; {EXPECTED}",
        "liar": "liar.safetensors is no intact safetensors file: tensor 'a' needs 8000 bytes, its offsets claim 8.",
        "overlap": "overlap.safetensors is no intact safetensors file: tensors 'a' and 'b' overlap.",
        "huge": "huge.safetensors is no intact safetensors file: its header claims 2000000000 bytes, 51 follow.",
        "code": "nothing of it was executed.",
        "plain_code": "nothing of it was executed; expected a PyTorch checkpoint",
        "module": "module.pt is a pickled module ('torch.nn.modules.linear.Linear'), which runs code when loaded",
        "nan": "nan.pt has NaN or infinite weights: 2 of 1728 values in 'features.0.weight'; 1 of 52 tensors affected.",
        "missing_tensor": "the closest is squeezenet1_1 (1 difference): features.0.weight is missing",
        "extra_tensor": "the closest is squeezenet1_1 (1 difference): extra is extra",
        "misshapen": "features.0.weight has shape [64, 4, 3, 3], expected [64, 3, 3, 3]",
        "integer": "is a quantized or integer checkpoint ('features.0.weight' is int8); expected floating-point",
        "torchscript": f"torchscript.pt is a TorchScript archive (torch.jit.save); {EXPECTED}",
        "onnx": f"onnx.pt is an ONNX file; {EXPECTED}",
        "optimizer": "is a checkpoint of an optimizer only, without the network's weights (its keys: 'optimizer').",
    }.items(),
)
def test_bad_input(refused, here, name, message):
    path = bad_file(name)
    lines = refused("reparam", path, "-o", "out.safetensors")
    assert message in lines[0]
    assert len(lines) == 2
    assert not Path("canary").exists()
    for command in ("restore", "inspect"):
        assert message in refused(command, path)[0]


def test_a_pickled_module_loads_when_trusted(here):
    torch.save(torchvision.models.squeezenet1_1(num_classes=5), "module.pt")
    assert run(["reparam", "module.pt", "--trust-pickle", *SMALL]) == 0


def test_outputs_that_cannot_be(refused, here, monkeypatch):
    for output, message in (
        ("no/x.pt", "The folder no of the output no/x.pt does not exist."),
        ("x.onnx", "x.onnx has the suffix '.onnx'; expected .safetensors, .pt, .pth."),
    ):
        assert refused("reparam", "sq.pt", "-o", output)[0] == f"error: {message}"
    monkeypatch.setattr(checkpoint.os, "access", lambda *_: False)  # root may write everywhere
    assert "is not writable." in refused("reparam", "sq.pt", "-o", "x.pt")[0]


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_full_disk(refused, here, monkeypatch, suffix):
    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(checkpoint, "save_file", full)
    monkeypatch.setattr(torch, "save", full)
    lines = refused("reparam", "sq.pt", "-o", f"x.{suffix}", *SMALL)
    assert lines[0].startswith(f"error: x.{suffix} was not written: disk full: ")


def test_a_check_that_fails_leaves_no_file(refused, here, monkeypatch):
    assert run(["reparam", "sq.pt", "-o", "x.pt", *SMALL]) == 0
    wrong = EquivalenceReport(0.5, 0.5, 9.0, False, 1)
    monkeypatch.setattr(conversions, "verify_conversion", lambda *_: wrong)
    for command, what in ((["reparam", "sq.pt"], "converted"), (["restore", "x.pt"], "restored")):
        lines = refused(*command, "-o", "y.pt", *SMALL, code=1)
        assert lines[0] == (
            f"error: the {what} network differs from the original: its error is 9 times the noise of the dtype "
            "(4 passes), largest difference 0.5; no file was written"
        )


def test_unsupported_activation(refused, here):
    torch.save(network("mobilenet_v2").state_dict(), "m.pt")
    lines = refused("reparam", "m.pt", *SMALL)
    assert "features.0.2 is ReLU6, which is not positively homogeneous" in lines[0]
    assert "--partial" in lines[1]
    assert run(["reparam", "m.pt", "--partial", *SMALL]) == 0


# --- the process ----------------------------------------------------------------------------------------------------

KILLED = """
import os, sys
from pathconvert import conversions
from pathconvert.cli import run
conversions.verify_conversion = lambda *_: os.kill(os.getpid(), 9)
run(sys.argv[1:])
"""


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, timeout=120, env=os.environ | environment, check=False
    )


@pytest.mark.parametrize("existed", [True, False])
def test_kill_before_the_file_has_its_name(here, existed):
    if existed:
        Path("x.pt").write_bytes(b"old")
    done = process("-c", KILLED, "reparam", "sq.pt", "-o", "x.pt", "--force", *SMALL)
    assert done.returncode == -signal.SIGKILL
    assert Path("x.pt").exists() == existed
    assert not existed or Path("x.pt").read_bytes() == b"old"


def test_a_job_managers_end_leaves_no_temporary_file(here):
    ends = (
        KILLED.replace("os.getpid(), 9", "os.getpid(), 15")
        .replace("import run", "import main")
        .replace("run(sys.argv[1:])", "main()")
    )
    done = process("-c", ends, "reparam", "sq.pt", *SMALL)
    assert done.returncode == 128 + signal.SIGTERM
    assert os.listdir(here) == ["sq.pt"]


def test_a_terminal_without_arrows(here):
    done = process("-m", "pathconvert.cli", "reparam", "sq.pt", *SMALL, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"sq.pt ? sq.path.safetensors" in done.stdout


def test_help_loads_no_torch():
    code = "import sys; from pathconvert.cli import run; run(sys.argv[1:]); assert 'torch' not in sys.modules"
    for arguments in (["--help"], ["reparam", "--help"], ["--version"]):
        assert process("-c", code, *arguments).returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    assert run([command, "--help"]) == 0
    assert f": pathconvert {command}" in " ".join(capsys.readouterr().out.split())


def test_completion_of_commands():
    environment = {"_PATHCONVERT_COMPLETE": "complete_bash", "COMP_WORDS": "pathconvert re", "COMP_CWORD": "1"}
    code = "from pathconvert.cli import main; main()"
    assert process("-c", code, **environment).stdout.split() == [b"reparam", b"restore"]


@pytest.mark.parametrize(
    "arguments",
    [["nosuch"], ["reparam"], ["reparam", "x", "--frobnicate"], ["reparam", "x", "--scope", "all"],
     ["reparam", "x", "--num-classes", "0"]],
)  # fmt: skip
def test_wrong_usage(arguments, capsys):
    assert run(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("Usage: pathconvert")


def test_traceback_only_with_debug(here, capsys):
    assert run(["inspect", "none.pt", "--debug"]) == 2
    debugged = capsys.readouterr().err
    assert debugged.startswith("Traceback (most recent call last):")
    assert debugged.splitlines()[-2].startswith("error: none.pt does not exist")
    assert run(["inspect", "none.pt"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            ValueError("one\ntwo"),
            2,
            "error: unexpected ValueError: one\ntip: run again with --debug and report what it prints\n",
        ),
    ],
)
def test_the_unexpected(here, monkeypatch, capsys, error, code, text):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("pathconvert.files.open_network", fail)
    assert run(["inspect", "sq.pt"]) == code
    assert capsys.readouterr().err.endswith(text)
