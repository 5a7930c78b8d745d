"""Runs of finetune that were stopped go on bit for bit, and several processes train as one."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from finetuning import SMALL, begin, command, settings
from safetensors.torch import load_file
from trainable import TESTS, Still, StopAfter, save_network

import pathconvert
from pathconvert.cli import run
from pathconvert.training.run import begin as finetune
from pathconvert.training.run.folder import RunFolder
from pathconvert.training.settings import Settings


@pytest.mark.parametrize("done", [1, 4, 6, 10, 17])
def test_a_run_goes_on_bit_for_bit(weights, images, tmp_path, done):
    """Six batches per epoch with a checkpoint after each.

    Momentum, average, schedule, mixup, dropout and crops.
    """
    chosen = settings(
        images,
        epochs=3,
        ema=0.8,
        mixup=0.2,
        momentum=0.9,
        warmup_steps=3,
        weight_decay=0.01,
        checkpoint_minutes=1e-9,
    )
    whole = begin(weights, tmp_path / "whole", chosen)
    expected = whole.train()
    begun = begin(weights, tmp_path / "run", chosen)
    with pytest.raises(KeyboardInterrupt):
        begun.train(StopAfter(done))
    resumed = finetune.resume(tmp_path / "run", device="cpu")
    assert (resumed.position.step, resumed.position.batch) == (done - 1, (done - 1) % 6)
    result = resumed.train()
    assert without_times(result.history) == without_times(expected.history)
    for left, right in (
        (whole.learner.raw.state_dict(), resumed.learner.raw.state_dict()),
        (whole.learner.average.state_dict(), resumed.learner.average.state_dict()),
        *(
            [
                load_file(tmp_path / run_name / "best.path.safetensors")
                for run_name in ("whole", "run")
            ],
        ),
    ):
        assert all(torch.equal(left[name], right[name]) for name in left)
    states = [made.learner.raw_optimizer.state_dict()["state"] for made in (whole, resumed)]
    assert all(
        torch.equal(states[0][i][key], states[1][i][key]) for i in states[0] for key in states[0][i]
    )


def without_times(history: list[dict]) -> list[dict]:
    return [
        {name: value for name, value in row.items() if name != "images_per_second"}
        for row in history
    ]


@pytest.fixture
def one_thread():
    """As the processes that a test starts: sums in another order differ in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def steps_of(folder: Path) -> int:
    """The number of steps at the last checkpoint."""
    state = RunFolder(folder).load() if (folder / "last.ckpt").exists() else None
    return state["position"]["step"] if state else 0


@pytest.mark.usefixtures("one_thread")
def test_kill_and_resume(weights, images, tmp_path):
    """A run that was killed at some moment and resumed ends where an undisturbed run ends."""
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    options = (
        "--epochs",
        "40",
        "--batch-size",
        "8",
        "--lr",
        "0.02",
        "--checkpoint-minutes",
        "1e-6",
        "--device",
        "cpu",
    )
    start = [
        sys.executable,
        "-m",
        "pathconvert.cli",
        "finetune",
        str(weights),
        *SMALL,
        "--data",
        str(images),
        *options,
    ]
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [*start, "--output-dir", str(folder)], env=environment, stderr=subprocess.DEVNULL
    )
    while steps_of(folder) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 3 <= steps_of(folder) < 240, "the run ended by itself, before it could be killed"
    resumed = finetune.resume(folder, device="cpu").train()
    chosen = settings(images, epochs=40, lr=0.02, calibration_images=512)
    expected = begin(weights, tmp_path / "whole", chosen).train()
    assert without_times(resumed.history) == without_times(expected.history)


def test_a_finished_run_has_nothing_left_to_do(trained, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    before = (folder / "best.path.safetensors").read_bytes()
    assert run(command("finetune", "--resume", folder, "--device", "cpu")) == 0
    assert (folder / "best.path.safetensors").read_bytes() == before
    assert "8 epochs" in capsys.readouterr().out


def test_two_processes_train_as_one(images, tmp_path):
    """Equal to float32's rounding, with BatchNorm over both processes.

    Without dropout, which each draws alone.
    """
    still = save_network(tmp_path / "still.pt", Still)
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    options = command(
        "finetune", still, "--arch", "trainable:Still", *SMALL[2:], "--data", images, "--epochs",
        2, "--batch-size", 8,
        "--lr", "0.02", "--device",
        "cpu", "--momentum", "0.5",
    )  # fmt: skip
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = Path(pathconvert.__file__).parent / "cli.py"
    both = tmp_path / "both"
    process = subprocess.run(
        [*two, str(program), *options, "--output-dir", str(both)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    one = subprocess.run(
        [sys.executable, str(program), *options, "--output-dir", str(tmp_path / "one")],
        env=environment,
        check=False,
    )
    assert one.returncode == 0
    rows = [
        list(csv.DictReader((tmp_path / name / "metrics.csv").open())) for name in ("one", "both")
    ]
    assert [r["val_top1"] for r in rows[0]] == [r["val_top1"] for r in rows[1]]
    assert [float(r["train_loss"]) for r in rows[1]] == pytest.approx(
        [float(r["train_loss"]) for r in rows[0]], rel=1e-5
    )
    first, second = (RunFolder(tmp_path / name).load()["model"] for name in ("one", "both"))
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], rtol=1e-5, atol=1e-5), name


def test_a_process_of_several_leaves_its_group_before_the_interpreter_ends(tmp_path, monkeypatch):
    """A gloo group that is still alive at that moment aborts the process in about one of 25
    runs.
    """

    class Two:
        world_size = 2

        def launch(self) -> None:
            store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

    at_exit = []
    monkeypatch.setattr(finetune, "make_fabric", lambda *_: Two())
    monkeypatch.setattr(finetune.atexit, "register", at_exit.append)
    finetune._launched(Settings(), "cpu", None)
    (leave,) = at_exit
    assert torch.distributed.is_initialized()
    leave()
    assert not torch.distributed.is_initialized()
    leave()  # nothing is left to do where an error ended the group already
