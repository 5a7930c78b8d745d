"""Whole runs of finetune: the files they leave, how they resume, and how they fail."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from safetensors.torch import load_file
from trainable import CLASSES, TESTS, HeadFirst, Plain, Small, Still, StopAfter, save_images, save_network

import pathconvert
from pathconvert.cli import run
from pathconvert.errors import CheckpointError, DataError, PathconvertError, TrainingError
from pathconvert.networks.loading import open_network
from pathconvert.training.optimizer.choice import make_schedule
from pathconvert.training.run import begin as finetune
from pathconvert.training.run.folder import RunFolder
from pathconvert.training.run.loop import Run, _explained
from pathconvert.training.settings import Settings

SMALL = ("--arch", "trainable:Small", "--input-size", "3x12x12")
METHODS = [
    ("gsgd", "path-bn", "path-bn"),
    ("sgd", "path-bn", "path-bn"),
    ("gsgd", "bn", "path"),
    ("sgd", "bn", "plain"),
    ("path-sgd", "bn", "plain"),
    ("path-sgd", "path-bn", "path-bn"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return save_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return save_network(tmp_path_factory.mktemp("weights") / "small.pt")


def settings(images: Path, **changes: object) -> Settings:
    common = {"data": str(images), "batch_size": 8, "epochs": 2, "lr": 0.05, "calibration_images": 32}
    return Settings(**(common | changes))


def begin(weights: Path, folder: Path, chosen: Settings, **options: object) -> Run:
    network = open_network(weights, arch="trainable:Small", input_size=(3, 12, 12))
    return finetune.begin(network, chosen, folder, device="cpu", **options)


def command(*arguments: object) -> list[str]:
    return [str(argument) for argument in arguments]


# ---- what a run leaves -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(weights, images, tmp_path_factory) -> Path:
    """The folder that the command left after a run from a plain checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = ("--epochs", 8, "--batch-size", 8, "--lr", "0.08", "--device", "cpu")
    assert run(command("finetune", weights, *SMALL, "--data", images, "--output-dir", folder, *options)) == 0
    return folder


def test_a_run_leaves_its_network_and_its_history(trained, images):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "config.yaml", "initial.path.safetensors", "best.path.safetensors", "last.ckpt", "metrics.csv", "curves.png",
        "tensorboard",
    }  # fmt: skip
    rows = list(csv.DictReader((trained / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == [str(epoch) for epoch in range(1, 9)]
    assert max(float(row["val_top1"]) for row in rows) > 0.6  # chance is a third
    text = (trained / "config.yaml").read_text()
    assert yaml.safe_load(text)["lr"] == 0.08
    assert "form: path-bn, scope block, pivot matching, gauge unit, skip scale 1" in text
    assert "inputs: 3x12x12" in text
    assert list((trained / "tensorboard").iterdir())
    network = open_network(trained / "best.path.safetensors")
    assert network.form == "path-bn"
    assert network.labels == CLASSES
    assert network.metadata["training"]["settings"]["data"] == str(images)
    assert network.metadata["source"]["name"] == "small.pt"


def test_evaluate_holds_out_what_the_run_did(weights, tmp_path, capsys):
    """With one folder of class folders, the run's seed and share tell which images training has not seen."""
    data = save_images(tmp_path / "data", 12, 1) / "train"
    made = begin(weights, tmp_path / "run", settings(data, epochs=1, seed=3, val_fraction=0.4))
    made.train()
    capsys.readouterr()
    assert run(command("evaluate", tmp_path / "run", "--data", data, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["data_digest"] == made.data.digest
    assert run(command("evaluate", tmp_path / "run", "--data", data, "--json", "--seed", 4)) == 0
    assert json.loads(capsys.readouterr().out)["data_digest"] != made.data.digest
    assert run(command("evaluate", weights, *SMALL, "--data", data)) == 0
    assert "is held out, chosen by seed 0" in capsys.readouterr().err


def test_the_folder_stands_for_its_best_network(trained, images, tmp_path, capsys):
    rows = list(csv.DictReader((trained / "metrics.csv").open()))
    best = max(rows, key=lambda row: (float(row["val_top1"]), -float(row["val_loss"])))
    capsys.readouterr()
    assert run(command("evaluate", trained, "--data", images, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["top1"] == float(best["val_top1"])
    assert found["loss"] == pytest.approx(float(best["val_loss"]), rel=1e-6)
    assert run(command("export", trained, "-o", tmp_path / "m.onnx", "--json")) == 0
    capsys.readouterr()
    assert run(command("restore", trained, "-o", tmp_path / "m.pt")) == 0
    assert "has other weights, because the network was fine-tuned" in capsys.readouterr().out
    assert run(command("inspect", trained)) == 0
    assert f"gsgd, norm path-bn, on {images}" in " ".join(capsys.readouterr().out.split())
    assert set(torch.load(tmp_path / "m.pt")) == set(Small().state_dict())
    capsys.readouterr()
    for source in (tmp_path / "m.onnx", trained):
        assert run(command("evaluate", source, "--data", images, "--json")) == 0
        assert json.loads(capsys.readouterr().out)["top1"] == found["top1"]


def test_skeletons_did_not_move(trained):
    before, after = (load_file(trained / f"{name}.path.safetensors") for name in ("initial", "best"))
    pivots = [name for name in before if name.endswith((".pivot_value", ".pivot_row", ".pivot_column"))]
    assert pivots
    assert all(torch.equal(before[name], after[name]) for name in pivots)
    model, _ = pathconvert.load(trained / "best.path.safetensors")
    for layer in model.modules():
        if isinstance(layer, pathconvert.PathBN):
            assert (layer.weight[tuple(layer._place.unbind())] == 0).all()
            assert (layer.pivot_value.abs() == 1).all()


@pytest.mark.parametrize(("optimizer", "norm", "form"), METHODS)
def test_every_method_trains(weights, images, tmp_path, optimizer, norm, form):
    lr = 0.003 if optimizer == "path-sgd" else 0.03
    made = begin(weights, tmp_path / "run", settings(images, optimizer=optimizer, norm=norm, lr=lr, epochs=4))
    first = made.validate()
    result = made.train()
    assert result.best["val_loss"] < first.loss
    assert open_network(tmp_path / "run", arch="trainable:Small", input_size=(3, 12, 12)).form == form


@pytest.mark.parametrize(
    "changes",
    [
        {"amp": "bf16"}, {"channels_last": True}, {"clip": 0.1}, {"accumulate": 2}, {"schedule": "step"},
        {"schedule": "constant", "warmup_steps": 3}, {"label_smoothing": 0.1}, {"mixup": 0.5}, {"ema": 0.9},
        {"freeze_backbone": True}, {"weight_decay": 0.01, "decay": "basis_path_norm"}, {"anchor": "none", "lr": 1e-4},
        {"start": "weight"}, {"weight_norm": True, "norm": "bn", "start": "weight"}, {"steps": 3}, {"ema": 0.5},
        {"skip_scale": 0.1, "pivot": "max"}, {"workers": 1, "augment": "resized-crop"}, {"ordinary_lr": 0.01},
        {"norm": "bn", "scope": "network"},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)  # fmt: skip
def test_options_train(weights, images, tmp_path, changes):
    made = begin(weights, tmp_path / "run", settings(images, epochs=1, limit_train=24, **changes))
    before = {name: tensor.clone() for name, tensor in made.raw.state_dict().items()}
    result = made.train()
    assert result.best["step"] == changes.get("steps", 2 if "accumulate" in changes else 3)
    moved = {name for name, tensor in made.raw.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "fc.weight" in moved
    assert ("stem.weight" in moved) == ("freeze_backbone" not in changes)


@pytest.mark.parametrize(
    ("schedule", "steps", "warmup", "rates"),
    [
        ("cosine", 1, 0, [1]), ("step", 1, 0, [1]), ("constant", 1, 0, [1]), ("step", 2, 0, [1, 0.1]),
        ("step", 4, 0, [1, 1, 0.1, 0.01]), ("step", 4, 3, [0.25, 0.5, 0.75, 1]),
        ("cosine", 4, 0, [1, 0.854, 0.5, 0.146]), ("constant", 4, 2, [1 / 3, 2 / 3, 1, 1]),
    ],
)  # fmt: skip
def test_rates(schedule, steps, warmup, rates):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    made = make_schedule(optimizer, Settings(schedule=schedule, warmup_steps=warmup), steps)
    found = []
    for _ in range(steps):
        found.append(made.get_last_lr()[0])
        optimizer.step()
        made.step()
    assert found == pytest.approx(rates, abs=1e-3)


def test_the_layer_that_runs_last_is_the_one_that_a_frozen_backbone_leaves(tmp_path, images):
    save_network(tmp_path / "head.pt", HeadFirst)
    network = open_network(tmp_path / "head.pt", arch="trainable:HeadFirst", input_size=(3, 12, 12))
    assert next(name for name, _ in network.model.named_parameters()) == "fc.weight"
    made = finetune.begin(network, settings(images, steps=1, freeze_backbone=True), tmp_path / "run", device="cpu")
    assert [name for name, p in made.raw.named_parameters() if p.requires_grad] == ["fc.weight", "fc.bias"]


def test_the_last_batches_of_an_epoch_make_a_whole_step(weights, images, tmp_path, monkeypatch):
    """Of three batches, two make a step, and the third makes a whole step of its own."""
    made = begin(weights, tmp_path / "run", settings(images, epochs=1, limit_train=24, accumulate=2))
    parts, batch = [], made._batch

    def spy(*arguments: object) -> object:
        parts.append(arguments[2:])
        return batch(*arguments)

    monkeypatch.setattr(made, "_batch", spy)
    assert made.train().best["step"] == 2
    assert parts == [(2, False), (2, True), (1, True)]


def test_accumulated_batches_make_the_step_of_the_whole(images, tmp_path):
    """Without BatchNorm, whose statistics depend on the batch, and without augmentation."""
    save_network(tmp_path / "plain.pt", Plain)
    results = []
    for i, (batch, accumulate) in enumerate(((8, 1), (4, 2))):
        network = open_network(tmp_path / "plain.pt", arch="trainable:Plain", input_size=(3, 12, 12))
        chosen = settings(images, norm="bn", batch_size=batch, accumulate=accumulate, steps=3, augment="none")
        made = finetune.begin(network, chosen, tmp_path / str(i), device="cpu")
        made.train()
        results.append(made.raw.state_dict())
    for name, tensor in results[0].items():
        error = float((tensor - results[1][name]).abs().max() / tensor.abs().max())
        assert error < 1e-5, (name, error)  # float32 sums in another order, three steps


# ---- heads and forms ---------------------------------------------------------------------------------------------


def test_other_classes_get_a_new_head(weights, tmp_path, capsys):
    data = save_images(tmp_path / "data", 4, 2, ("a", "b", "c", "d", "e"))
    options = ("--epochs", 1, "--batch-size", 4, "--device", "cpu", "--output-dir", tmp_path / "run")
    assert run(command("finetune", weights, *SMALL, "--data", data, *options)) == 0
    assert "note: a new classifier for 5 classes: fc.weight, fc.bias" in capsys.readouterr().err
    network = open_network(tmp_path / "run")
    assert network.labels == ("a", "b", "c", "d", "e")
    assert network.model.fc.weight.shape == (5, 8)


def test_more_outputs_than_classes(weights, images, tmp_path):
    made = begin(weights, tmp_path / "run", settings(images, num_classes=5, epochs=1, limit_train=8))
    made.train()
    assert open_network(tmp_path / "run").labels == (*CLASSES, "class 3", "class 4")
    with pytest.raises(DataError, match="has 3 classes, more than --num-classes 2"):
        begin(weights, tmp_path / "other", settings(images, num_classes=2))


def test_a_torchvision_network_gets_a_new_head_and_keeps_its_weights(tmp_path, images):
    torch.manual_seed(0)
    stock = torchvision.models.squeezenet1_1(num_classes=7)
    torch.save(stock.state_dict(), tmp_path / "sq.pt")
    network = open_network(tmp_path / "sq.pt")
    chosen = settings(images, size="32", limit_train=8, limit_val=3, epochs=1, batch_size=4, lr=1e-5)
    made = finetune.begin(network, chosen, tmp_path / "run", device="cpu")
    assert made.prepared.head == ("classifier.1.weight", "classifier.1.bias")
    plain = pathconvert.restore(made.prepared.model, made.prepared.model.path_record)
    for name, tensor in stock.state_dict().items():
        if not name.startswith("classifier.1"):
            assert torch.allclose(plain.state_dict()[name], tensor, rtol=1e-5, atol=2e-6), (
                name
            )  # there and back in float32
    assert plain.classifier[1].weight.shape == (3, 512, 1, 1)
    assert made.train().best["step"] == 2


@pytest.mark.parametrize("form", ["path", "path-bn"])
def test_a_converted_source_keeps_its_conversion(weights, images, tmp_path, form):
    source = tmp_path / f"s.{form}.safetensors"
    options = ("--calibrate", images / "val" / "red", "--skip-scale", "0.5") if form == "path-bn" else ()
    assert run(command("reparam", weights, *SMALL, "--pivot", "max", "--form", form, *options, "-o", source)) == 0
    made = finetune.begin(open_network(source), settings(images), tmp_path / "run", device="cpu")
    record = made.prepared.model.path_record
    assert (record["pivot"], record["path_bn"]["skip_scale"]) == ("max", 0.5 if form == "path-bn" else 1.0)
    assert record["path_bn"]["calibration"]["images"] == (6 if form == "path-bn" else 32)
    with pytest.raises(PathconvertError, match="the source is converted already, with pivot max"):
        finetune.begin(open_network(source), settings(images, pivot="matching"), tmp_path / "other", device="cpu")


def test_training_in_path_space_begins_with_the_same_function(weights, images, tmp_path):
    made = begin(weights, tmp_path / "run", settings(images))
    plain = open_network(weights, arch="trainable:Small", input_size=(3, 12, 12)).model
    report = pathconvert.verify(plain, made.prepared.model, torch.randn(4, 3, 12, 12))
    assert report.passed


# ---- resuming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [1, 4, 6, 10, 17])
def test_a_run_goes_on_bit_for_bit(weights, images, tmp_path, batches):
    """Six batches per epoch with a checkpoint after each; momentum, average, schedule, mixup, dropout and crops."""
    chosen = settings(
        images, epochs=3, ema=0.8, mixup=0.2, momentum=0.9, warmup_steps=3, weight_decay=0.01, checkpoint_minutes=1e-9
    )
    whole = begin(weights, tmp_path / "whole", chosen)
    expected = whole.train()
    begun = begin(weights, tmp_path / "run", chosen)
    with pytest.raises(KeyboardInterrupt):
        begun.train(StopAfter(batches))
    resumed = finetune.resume(tmp_path / "run", device="cpu")
    assert (resumed.position.step, resumed.position.batch) == ((batches - 1), (batches - 1) % 6)
    result = resumed.train()
    assert without_times(result.history) == without_times(expected.history)
    for left, right in (
        (whole.raw.state_dict(), resumed.raw.state_dict()),
        (whole.average.state_dict(), resumed.average.state_dict()),
        *([load_file(tmp_path / run_name / "best.path.safetensors") for run_name in ("whole", "run")],),
    ):
        assert all(torch.equal(left[name], right[name]) for name in left)
    states = [made.raw_optimizer.state_dict()["state"] for made in (whole, resumed)]
    assert all(torch.equal(states[0][i][key], states[1][i][key]) for i in states[0] for key in states[0][i])


def without_times(history: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "images_per_second"} for row in history]


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
    options = ("--epochs", "40", "--batch-size", "8", "--lr", "0.02", "--checkpoint-minutes", "1e-6", "--device", "cpu")
    start = [sys.executable, "-m", "pathconvert.cli", "finetune", str(weights), *SMALL, "--data", str(images), *options]
    folder = tmp_path / "run"
    process = subprocess.Popen([*start, "--output-dir", str(folder)], env=environment, stderr=subprocess.DEVNULL)
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
    """Equal to float32's rounding, with BatchNorm over both processes; without dropout, which each draws alone."""
    still = save_network(tmp_path / "still.pt", Still)
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    options = command(
        "finetune", still, "--arch", "trainable:Still", *SMALL[2:], "--data", images, "--epochs", 2, "--batch-size", 8,
        "--lr", "0.02", "--device",
        "cpu", "--momentum", "0.5",
    )  # fmt: skip
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = Path(pathconvert.__file__).parent / "cli.py"
    both = tmp_path / "both"
    process = subprocess.run(
        [*two, str(program), *options, "--output-dir", str(both)], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    one = subprocess.run(
        [sys.executable, str(program), *options, "--output-dir", str(tmp_path / "one")], env=environment, check=False
    )
    assert one.returncode == 0
    rows = [list(csv.DictReader((tmp_path / name / "metrics.csv").open())) for name in ("one", "both")]
    assert [r["val_top1"] for r in rows[0]] == [r["val_top1"] for r in rows[1]]
    assert [float(r["train_loss"]) for r in rows[1]] == pytest.approx(
        [float(r["train_loss"]) for r in rows[0]], rel=1e-5
    )
    first, second = (RunFolder(tmp_path / name).load()["model"] for name in ("one", "both"))
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], rtol=1e-5, atol=1e-5), name


def test_a_process_of_several_leaves_its_group_before_the_interpreter_ends(tmp_path, monkeypatch):
    """A gloo group that is still alive at that moment aborts the process in about one of 25 runs."""

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


# ---- plans and settings ------------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing(weights, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(command("finetune", weights, *SMALL, "--data", images, "--dry-run", "--json", "--batch-size", 8)) == 0
    plan = json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    model = Small()
    kinds = plan["parameters"]
    assert min(kinds.values()) >= 0
    assert sum(kinds.values()) == sum(p.numel() for p in model.parameters())
    assert (kinds["starts"], kinds["pivots that do not move"]) == (plan["chains"]["chains"], 0)  # those of PathBN are 0
    assert (plan["form"], plan["steps"], plan["classes"], plan["train_images"]) == ("path-bn", 60, 3, 48)
    assert plan["pivots"] == 16  # the stem's channels, read by down, and the block's, read by conv2
    assert plan["chains"]["units"] == 16
    assert plan["memory_bytes"]["activations"] > 8 * 12 * 12 * 8 * 4


def test_a_plan_counts_pivots_and_what_is_frozen(weights, images, capsys):
    options = ("--norm", "bn", "--freeze-backbone", "--dry-run", "--json", "--batch-size", 8)
    assert run(command("finetune", weights, *SMALL, "--data", images, *options)) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["pivots"] == 16
    everything = sum(p.numel() for p in Small().parameters())
    assert plan["parameters"]["frozen"] == everything - 8 * 3 - 3
    assert sum(plan["parameters"].values()) == everything
    assert min(plan["parameters"].values()) >= 0


def test_flags_win_over_the_file(weights, images, tmp_path):
    config = tmp_path / "my.yaml"
    config.write_text(
        f"data: {images}\nlr: 0.5\nbatch-size: 4\nepochs: 1\nlimit_train: 8\nchannels_last: true\nclip: 1e3\n"
    )
    options = (
        "--config",
        config,
        "--lr",
        "0.01",
        "--no-channels-last",
        "--device",
        "cpu",
        "--output-dir",
        tmp_path / "run",
    )
    assert run(command("finetune", weights, *SMALL, *options)) == 0
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (stored["lr"], stored["batch_size"], stored["epochs"], stored["channels_last"]) == (0.01, 4, 1, False)
    assert stored["clip"] == 1000  # which YAML 1.1 reads as a text
    assert Settings.from_file(tmp_path / "run" / "config.yaml", {}) == Settings(**stored)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1", "there is no setting 'learning_rate'"),
        ("lr: fast", "--lr 'fast' is not a number"),
        ("lr: 0", "--lr must be more than 0, not 0"),
        ("optimizer: sgd\nanchor: none", "--norm path-bn: it needs --optimizer gsgd"),
        ("optimizer: sgd\nnorm: bn\npivot: max", "--pivot has no effect with --optimizer sgd --norm bn"),
        ("epochs: 0", "--epochs must be at least 1, not 0"),
        ("momentum: 1.0", "--momentum must be less than 1, not 1.0"),
        ("norm: layer", "--norm layer is not one of path-bn, bn"),
        ("compile: 1", "--compile 1 is not true or false"),
        ("- a\n- b", "is not a list of settings"),
        ("a: [", "cannot be read as settings"),
    ],
)
def test_settings_are_checked(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(PathconvertError, match=message.replace("[", r"\[")):
        Settings.from_file(path, {})


def test_what_yaml_makes_of_words_and_numbers(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("amp: off\nsize: 32\nmean: 0.5\nstd: [0.1, 0.2, 0.3]\nlr: 1e-3\n")
    found = Settings.from_file(path, {})
    assert (found.amp, found.size, found.mean, found.std, found.lr) == ("off", "32", "0.5", "0.1,0.2,0.3", 0.001)


# ---- failures ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fails(weights, capsys):
    """Run finetune, check its exit code and that it prints one error, and return that line."""

    def check(*arguments: object, source: object = weights, code: int = 2) -> str:
        capsys.readouterr()
        assert run(command("finetune", *([source, *SMALL] if source else []), *arguments, "--device", "cpu")) == code
        lines = capsys.readouterr().err.splitlines()
        assert [line.split(":")[0] for line in lines if not line.startswith(("note", "epoch"))] in (
            ["error"],
            ["error", "tip"],
        )
        return next(line for line in lines if line.startswith("error"))

    return check


def test_bad_data_and_options(fails, images, tmp_path):
    (tmp_path / "empty").mkdir()
    gone = save_images(tmp_path / "gone", 2, 2)
    shutil.rmtree(gone / "val" / "green")
    corrupt = save_images(tmp_path / "corrupt", 4, 2)
    (corrupt / "train" / "red" / "1.png").write_bytes(b"nothing")
    out = ("--output-dir", tmp_path / "run")
    assert "green" in fails("--data", gone, *out)
    assert "empty" in fails("--data", tmp_path / "empty", *out)
    assert "1.png" in fails("--data", corrupt, *out, "--batch-size", 4)
    assert "no images to train on" in fails(*out)
    assert "nothing to train" in fails("--data", images, source=None)
    assert "no run began there" in fails("--resume", tmp_path, source=None)
    assert "--lr cannot be given with --resume" in fails("--resume", tmp_path, "--lr", "1", source=None)
    assert "--force cannot be given with --resume" in fails("--resume", tmp_path, "--force", source=None)
    assert "--amp fp16 needs a GPU" in fails("--data", images, *out, "--amp", "fp16")
    assert "--skip-scale has no effect" in fails("--data", images, *out, "--norm", "bn", "--skip-scale", "1")
    assert not (tmp_path / "run" / "best.path.safetensors").exists()


def test_a_full_folder_is_not_written_into(fails, images, trained):
    before = {path.name: path.stat().st_mtime_ns for path in trained.iterdir()}
    assert "is not empty" in fails("--data", images, "--output-dir", trained)
    assert {path.name: path.stat().st_mtime_ns for path in trained.iterdir()} == before


def test_force_leaves_nothing_of_an_earlier_run(weights, images, tmp_path):
    folder = tmp_path / "run"
    begin(weights, folder, settings(images, epochs=1)).train()
    begin(weights, folder, settings(images, epochs=1, norm="bn", optimizer="sgd"), force=True)
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.yaml", "initial.safetensors", "tensorboard"}


@pytest.mark.parametrize(
    ("minutes", "said"),
    [
        ("10", r"the loss is (nan|inf) in epoch 1, batch 2"),
        ("1e-9", r"outputs are no longer finite after epoch 1, batch 1"),  # looked at before a checkpoint is written
    ],
)
def test_a_network_that_is_not_finite_ends_with_1_and_leaves_no_checkpoint(fails, images, tmp_path, minutes, said):
    line = fails(
        "--data", images, "--output-dir", tmp_path / "run", "--optimizer", "sgd", "--norm", "bn", "--lr", "1e30",
        "--batch-size", 8, "--checkpoint-minutes", minutes, code=1,
    )  # fmt: skip
    assert re.search(said + "; there is no checkpoint yet", line)
    assert RunFolder(tmp_path / "run").load() is None


def test_outputs_that_are_not_finite_end_with_1(weights, images, tmp_path):
    made = begin(weights, tmp_path / "run", settings(images, epochs=1, limit_train=8, lr=1e30, optimizer="sgd"))
    with pytest.raises(TrainingError, match="outputs on held-out images are no longer finite after epoch 1") as caught:
        made.train()
    assert caught.value.exit_code == 1
    assert not (tmp_path / "run" / "best.path.safetensors").exists()


def test_data_that_changed_is_noticed(weights, tmp_path):
    data = save_images(tmp_path / "data", 8, 2)
    made = begin(weights, tmp_path / "run", settings(data, epochs=1))
    made.train()
    (data / "train" / "red" / "0.png").unlink()
    with pytest.raises(DataError, match="is not the data set that the run began with"):
        finetune.resume(tmp_path / "run", device="cpu")


def test_data_may_move(weights, tmp_path):
    data = save_images(tmp_path / "data", 8, 2)
    begin(weights, tmp_path / "run", settings(data, epochs=1)).train()
    data.rename(tmp_path / "moved")
    with pytest.raises(DataError, match="data does not exist"):
        finetune.resume(tmp_path / "run", device="cpu")
    finetune.resume(tmp_path / "run", device="cpu", data=str(tmp_path / "moved"))
    finetune.resume(tmp_path / "run", device="cpu")  # the run's config.yaml knows now


def test_a_held_out_image_that_cannot_be_read_does_not_cost_the_epoch(weights, tmp_path):
    data = save_images(tmp_path / "data", 8, 2)
    image = data / "val" / "red" / "1.png"
    whole = image.read_bytes()
    image.write_bytes(b"nothing")
    made = begin(weights, tmp_path / "run", settings(data, epochs=1))
    with pytest.raises(CheckpointError, match=r"1\.png"):
        made.train()
    image.write_bytes(whole)
    resumed = finetune.resume(tmp_path / "run", device="cpu")
    assert resumed.position.batch == 3
    assert [row["step"] for row in resumed.train().history] == [3]
    for name, tensor in resumed.raw.state_dict().items():
        assert torch.equal(tensor, made.raw.state_dict()[name]), name


def test_one_value_a_channel_is_explained():
    bn = torch.nn.BatchNorm2d(8)
    with pytest.raises(TrainingError, match="BatchNorm one value per channel") as caught, _explained(1):
        bn(torch.zeros(1, 8, 1, 1))
    assert caught.value.tip.startswith("Give --batch-size 2 or more")


def test_a_damaged_checkpoint_is_named(weights, images, tmp_path):
    begin(weights, tmp_path / "run", settings(images, epochs=1, limit_train=8)).train()
    path = tmp_path / "run" / "last.ckpt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"last\.ckpt is damaged"):
        finetune.resume(tmp_path / "run", device="cpu")


def test_a_newer_checkpoint_is_refused(weights, images, tmp_path):
    begin(weights, tmp_path / "run", settings(images, epochs=1, limit_train=8)).train()
    path = tmp_path / "run" / "last.ckpt"
    state = torch.load(path)
    torch.save(state | {"format_version": 99, "tool": "pathconvert 9"}, path)
    with pytest.raises(CheckpointError, match="has format version 99") as caught:
        finetune.resume(tmp_path / "run", device="cpu")
    assert "pathconvert 9" in caught.value.tip


def test_short_memory_says_what_to_do(weights, images, tmp_path, monkeypatch):
    made = begin(weights, tmp_path / "run", settings(images))

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(made, "_batch", out_of_memory)
    with pytest.raises(TrainingError, match="out of memory with batches of 8") as caught:
        made.train()
    assert caught.value.tip == "Give --batch-size 4 --accumulate 2, or --amp bf16."


def test_a_full_disk_keeps_the_last_checkpoint(weights, images, tmp_path, monkeypatch):
    made = begin(weights, tmp_path / "run", settings(images, epochs=2))
    path = tmp_path / "run" / "last.ckpt"

    class FullAfterOne(StopAfter):
        def epoch(self, _: object) -> None:
            def full(*_: object, **__: object) -> None:
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(torch, "save", full)

    with pytest.raises(PathconvertError, match=r"last\.ckpt was not written: disk full"):
        made.train(FullAfterOne(1000))
    monkeypatch.undo()
    assert RunFolder(tmp_path / "run").load()["position"]["epoch"] == 1
    assert [p.name for p in path.parent.iterdir() if p.name.endswith(".tmp")] == []
