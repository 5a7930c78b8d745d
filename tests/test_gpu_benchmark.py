"""``benchmarks/gpu.py``: rehearsed whole on the CPU; what it reports when something fails.

What it is brought.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.tags import sys_tags
from torchvision.transforms.v2 import functional as VF

import gpu
from gpu_parts import accuracy, machine
from gpu_parts.accuracy import METHODS, PADDING, Course, Run, crop_and_flip

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

# ---- whole runs ----------------------------------------------------------------------------------


def test_rehearsal(tmp_path: Path) -> None:
    """Every part, as on a GPU, at toy size and on made-up data."""
    results = tmp_path / "gpu.json"
    options = (
        "--rehearse",
        "--data",
        str(tmp_path / "none"),
        "--json",
        str(results),
        "--budget-factor",
        "5",
    )
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == "all packages are new enough"
    parts = json.loads(results.read_text())["parts"]
    assert list(parts) == list(gpu.BUDGETS)
    for part, found in parts.items():
        assert "failed" not in found, (part, found["failed"])
        assert "not prepared" not in found, (part, found["not prepared"])
        assert found["rehearsal"]
    checks, step, errors, runtime = (found["measured"] for found in parts.values())
    assert checks["passed"] > 10
    assert (
        checks["figures"]["test_devices.py::test_synchronised_statistics_of_one_process"][
            "difference"
        ]
        < 1e-10
    )
    assert [row["how"] for row in step["steps"]] == ["cpu", "cpu, compiled"]
    assert all(row["whole step"] > 0 and row["kernels"]["gsgd+path-bn"] for row in step["steps"])
    assert {len(row["errors"]) for row in errors["summary"].values()} == {2}
    assert len(errors["runs"]) == 5 * (4 + 1)
    assert all("error" in proof for proof in runtime["proofs"].values())
    contenders = runtime["timings"]["squeezenet1_1, batches of 1"]
    assert {"torch eager, fp32", "theirs, cpu", "fp32, cpu", "fp16, cpu"} <= set(contenders)


def options(tmp_path: Path, *parts: str, rehearse: bool = False) -> gpu.Options:
    return gpu.Options(list(parts), rehearse, tmp_path, tmp_path, tmp_path / "gpu.json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the first part fails for want of a GPU")
def test_a_part_that_fails_is_reported_and_stops_no_other(
    tmp_path: Path, monkeypatch, capfd
) -> None:
    monkeypatch.setattr(machine, "gpu", lambda: {"name": "a GPU that is not there"})
    monkeypatch.setattr(gpu, "PREPARED", ())
    assert gpu.run(options(tmp_path, "step", "accuracy")) == 1
    printed = capfd.readouterr().out
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert "NVIDIA" in parts["step"]["failed"]
    assert "holds no train-images-idx3-ubyte.gz" in parts["accuracy"]["failed"]
    assert parts["step"]["failed"] in printed
    assert parts["accuracy"]["failed"] in printed


def test_a_part_that_takes_too_long_is_stopped_and_keeps_what_it_had(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(gpu, "BUDGETS", {"accuracy": (1, 1)})
    assert gpu.run(options(tmp_path, "accuracy", rehearse=True)) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]["accuracy"]
    assert found["failed"] == "stopped after 1 s; what it had measured is kept"
    process = gpu.Process(
        options(tmp_path, "x"), "x", "measure", seconds=0, work=tmp_path, paths=[]
    )
    process.into.write_text('{"kept": 1}')
    assert process.wait().startswith("stopped")
    assert process.results() == {"kept": 1}


def test_parts_are_added_to_a_file_of_results(tmp_path: Path, monkeypatch) -> None:
    stored = {"format_version": 1, "parts": {"checks": {"passed": 3}}}
    (tmp_path / "gpu.json").write_text(json.dumps(stored))
    monkeypatch.setattr(gpu, "_part", lambda *_: {"seconds": 1})
    monkeypatch.setattr(gpu, "PREPARED", ())
    assert gpu.run(options(tmp_path, "step", rehearse=True)) == 0
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts["checks"] == {"passed": 3}
    assert (parts["step"]["seconds"], parts["step"]["rehearsal"]) == (1, True)
    (tmp_path / "gpu.json").write_text('{"format_version": 2}')
    with pytest.raises(SystemExit, match="has format version 2; give another --json FILE"):
        gpu.run(options(tmp_path, "step", rehearse=True))


def test_without_a_gpu(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(machine, "gpu", lambda: {"cuda": None})
    assert gpu.run(options(tmp_path, "step")) == 2
    printed = capsys.readouterr().err
    assert f"error: PyTorch {machine.installed('torch')} finds no GPU" in printed
    assert "tip: python benchmarks/gpu.py --rehearse" in printed
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--parts", "checks,nosuch"],
            "there is no part nosuch; there are checks, step, accuracy, runtime",
        ),
        (["--parts", ","], "there is no part (none given)"),
        (["--budget-factor", "0"], "--budget-factor 0 is not positive"),
        (["--json", "nosuch/gpu.json"], "there is no folder nosuch"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.parse(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_parts_run_in_order_of_value() -> None:
    assert gpu.parse(["--parts", "runtime,checks"]).parts == ["checks", "runtime"]
    for rehearse, minutes in ((False, 8), (True, 3)):
        assert gpu.LIMITS[rehearse] == 60 * minutes
        assert sum(budget[rehearse] for budget in gpu.BUDGETS.values()) <= 60 * minutes


def test_an_old_package_leaves_out_what_needs_it_alone(tmp_path: Path, monkeypatch, capsys) -> None:
    versions = {"onnxscript": "0.1", "tensorboard": None, "expecttest": None}
    installed = machine.installed
    monkeypatch.setattr(machine, "installed", lambda name: versions.get(name, installed(name)))
    monkeypatch.setattr(gpu, "_part", lambda *_: {})
    monkeypatch.setattr(gpu, "PREPARED", ())
    assert gpu.run(options(tmp_path, *gpu.BUDGETS, rehearse=True)) == 1
    first = capsys.readouterr().out.splitlines()[0]
    assert first.split("; ") == [
        "tensorboard is not installed: without checks",
        "onnxscript 0.1 is too old: pathconvert needs >=0.5: without runtime",
        "expecttest is not installed: without test_gsgd_torch.py",
    ]
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [part for part, found in parts.items() if "failed" in found] == ["checks", "runtime"]
    versions["torch"] = "2.0"
    assert set(machine.left_out(["step", "accuracy"])) == {"step", "accuracy"}


# ---- an ONNX Runtime that is brought -------------------------------------------------------------


def write_wheel(path: Path, tag: str | None = None) -> Path:
    """A small wheel of a package named onnxruntime."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("onnxruntime/__init__.py", "__version__ = '9.9'\n")
        archive.writestr("onnxruntime/capi/lib.so", bytes(range(256)) * 400)
        archive.writestr(
            "onnxruntime_gpu-9.9.dist-info/WHEEL", f"Tag: {tag or next(iter(sys_tags()))}\n"
        )
    return path


def split(wheel: Path, folder: Path, size: int = 30_000) -> list[Path]:
    """As ``split -b`` does."""
    content = wheel.read_bytes()
    pieces = []
    for i in range(0, len(content), size):
        pieces.append(folder / f"onnxruntime-gpu.part.a{chr(ord('a') + i // size)}")
        pieces[-1].write_bytes(content[i : i + size])
    return pieces


def test_pieces_are_joined_and_unpacked_once(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "device"
    folder.mkdir()
    assert machine.onnxruntime_folder(folder) is None
    pieces = split(write_wheel(tmp_path / "whole.whl"), folder)
    assert len(pieces) == 4
    found = machine.onnxruntime_folder(folder)
    assert found == folder / "onnxruntime-gpu"
    assert (found / "onnxruntime/capi/lib.so").read_bytes() == bytes(range(256)) * 400
    assert sorted(folder.iterdir()) == [found, *pieces]
    monkeypatch.setattr(machine, "_unpack", None)  # no second time
    assert machine.onnxruntime_folder(folder) == found
    assert machine.onnxruntime_folder(found) == found


@pytest.mark.parametrize("lost", [0, 1, 3])
def test_pieces_that_are_not_all_there(tmp_path: Path, lost: int) -> None:
    pieces = split(write_wheel(tmp_path / "whole.whl"), tmp_path)
    pieces[lost].unlink()
    with pytest.raises(machine.NotWhole, match="do not make a whole wheel"):
        machine.onnxruntime_folder(tmp_path)
    assert not (tmp_path / "onnxruntime-gpu").exists()


def test_a_damaged_piece(tmp_path: Path) -> None:
    pieces = split(write_wheel(tmp_path / "whole.whl"), tmp_path)
    pieces[1].write_bytes(bytes(len(pieces[1].read_bytes())))
    with pytest.raises(machine.NotWhole, match="do not make a whole wheel"):
        machine.onnxruntime_folder(tmp_path)


@pytest.mark.parametrize("unpacked", [False, True])
def test_a_wheel_for_another_python(tmp_path: Path, unpacked: bool) -> None:
    wheel = write_wheel(tmp_path / "onnxruntime_gpu-9.9-cp27.whl", tag="cp27-cp27m-win32")
    if unpacked:
        zipfile.ZipFile(wheel).extractall(tmp_path / "onnxruntime-gpu")
        wheel.unlink()
    with pytest.raises(machine.NotWhole, match="the wheel is for cp27-cp27m-win32, which Python 3"):
        machine.onnxruntime_folder(tmp_path)
    paths, why = gpu._paths(options(tmp_path, "runtime"), wait=0)
    assert not any("onnxruntime" in path for path in paths)
    assert why.startswith("the wheel is for cp27")


def test_what_was_brought_goes_before_what_is_installed(tmp_path: Path) -> None:
    write_wheel(tmp_path / "onnxruntime_gpu-9.9.whl")
    paths, why = gpu._paths(options(tmp_path, "runtime"), wait=0)
    assert why == ""
    code = (
        f"import gpu; gpu.bring({paths!r}); import onnxruntime, subprocess, sys;"
        " print(onnxruntime.__version__)\n"
    )
    code += (
        "subprocess.run([sys.executable, '-c', 'import onnxruntime;"
        " print(onnxruntime.__version__)'])"
    )
    done = subprocess.run(
        [sys.executable, "-u", "-c", code],
        capture_output=True,
        text=True,
        cwd=BENCHMARKS,
        check=True,
    )
    assert done.stdout.split() == ["9.9", "9.9"]


# ---- the accuracy part's own arithmetic ----------------------------------------------------------


def test_crops_and_flips_are_torchvisions() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 32, 32), generator=generator, dtype=torch.uint8)
    course = Course.drawn(20, steps=1, batch=20, seed=0, device="cpu")
    index, top, left, flip = (t[0] for t in (course.index, course.top, course.left, course.flip))
    found = crop_and_flip(torch.nn.functional.pad(images, [PADDING] * 4), index, top, left, flip)
    assert set(flip.tolist()) == {0, 1}
    for i in range(20):
        image = VF.pad(images[index[i]][None], [PADDING] * 4)
        image = VF.crop(image, int(top[i]), int(left[i]), 32, 32)
        image = VF.horizontal_flip(image) if flip[i] else image
        assert torch.equal(found[i], (image.float() / 255).expand(3, -1, -1))


def test_an_epoch_takes_every_image_once() -> None:
    course = Course.drawn(10, steps=5, batch=4, seed=1, device="cpu")
    assert [len(set(course.index[i : i + 2].flatten().tolist())) for i in (0, 2)] == [8, 8]
    again, other = (Course.drawn(10, steps=5, batch=4, seed=seed, device="cpu") for seed in (1, 2))
    assert torch.equal(again.top, course.top)
    assert not torch.equal(other.index, course.index)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_was_made_ready_trains_as_one_that_was_not(name: str) -> None:
    """The steps that make buffers leave no trace, in weights, statistics or optimizer."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (16, 40, 40), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (16,), generator=generator)
    course = Course.drawn(16, steps=4, batch=8, seed=0, device="cpu")
    context = gpu.Context("cpu", True, Path("none"), Path(), Path(), 0.0)
    form = accuracy.forms(context, accuracy.Images(pixels[:, 4:36, 4:36], labels))[
        METHODS[name].form
    ]
    found = []
    for ready in (False, True):
        run = Run(copy.deepcopy(form), METHODS[name].optimizer, 0.01, pixels, labels, course)
        if ready:
            run.make_ready()
        for _ in range(4):
            run.advance()
        found.append(run.model.state_dict())
    assert all(torch.equal(found[0][key], value) for key, value in found[1].items())
    assert not torch.equal(found[0]["fc.weight"], form.state_dict()["fc.weight"])
