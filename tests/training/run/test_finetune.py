"""Whole runs of finetune: the files they leave, and every method and option."""

from __future__ import annotations

import csv
import json

import pytest
import torch
import yaml
from finetuning import SMALL, begin, command, settings
from safetensors.torch import load_file
from trainable import CLASSES, HeadFirst, Plain, Small, save_images, save_network

import pathconvert
from pathconvert.cli import run
from pathconvert.networks.loading import open_network
from pathconvert.training.optimizer.choice import make_schedule
from pathconvert.training.run import begin as finetune
from pathconvert.training.settings import Settings

METHODS = [
    ("gsgd", "path-bn", "path-bn"),
    ("sgd", "path-bn", "path-bn"),
    ("gsgd", "bn", "path"),
    ("sgd", "bn", "plain"),
    ("path-sgd", "bn", "plain"),
    ("path-sgd", "path-bn", "path-bn"),
]


def test_a_run_leaves_its_network_and_its_history(trained, images):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "config.yaml", "initial.path.safetensors", "best.path.safetensors", "last.ckpt",
        "metrics.csv", "curves.png",
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
    """With one folder of class folders, the run's seed and share tell which images training has not
    seen.
    """
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
    before, after = (
        load_file(trained / f"{name}.path.safetensors") for name in ("initial", "best")
    )
    pivots = [
        name for name in before if name.endswith((".pivot_value", ".pivot_row", ".pivot_column"))
    ]
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
    made = begin(
        weights, tmp_path / "run", settings(images, optimizer=optimizer, norm=norm, lr=lr, epochs=4)
    )
    first = made.validate()
    result = made.train()
    assert result.best["val_loss"] < first.loss
    assert (
        open_network(tmp_path / "run", arch="trainable:Small", input_size=(3, 12, 12)).form == form
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"amp": "bf16"}, {"channels_last": True}, {"clip": 0.1}, {"accumulate": 2},
        {"schedule": "step"},
        {"schedule": "constant", "warmup_steps": 3}, {"label_smoothing": 0.1}, {"mixup": 0.5},
        {"ema": 0.9},
        {"freeze_backbone": True}, {"weight_decay": 0.01, "decay": "basis_path_norm"},
        {"anchor": "none", "lr": 1e-4},
        {"start": "weight"}, {"weight_norm": True, "norm": "bn", "start": "weight"}, {"steps": 3},
        {"ema": 0.5},
        {"skip_scale": 0.1, "pivot": "max"}, {"workers": 1, "augment": "resized-crop"},
        {"ordinary_lr": 0.01},
        {"norm": "bn", "scope": "network"},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)  # fmt: skip
def test_options_train(weights, images, tmp_path, changes):
    made = begin(weights, tmp_path / "run", settings(images, epochs=1, limit_train=24, **changes))
    model = made.learner.raw
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = made.train()
    assert result.best["step"] == changes.get("steps", 2 if "accumulate" in changes else 3)
    after = model.state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert "fc.weight" in moved
    assert ("stem.weight" in moved) == ("freeze_backbone" not in changes)


@pytest.mark.parametrize(
    ("schedule", "steps", "warmup", "rates"),
    [
        ("cosine", 1, 0, [1]), ("step", 1, 0, [1]), ("constant", 1, 0, [1]),
        ("step", 2, 0, [1, 0.1]),
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
    made = finetune.begin(
        network, settings(images, steps=1, freeze_backbone=True), tmp_path / "run", device="cpu"
    )
    named = made.learner.raw.named_parameters()
    assert [name for name, p in named if p.requires_grad] == ["fc.weight", "fc.bias"]


def test_the_last_batches_of_an_epoch_make_a_whole_step(weights, images, tmp_path, monkeypatch):
    """Of three batches, two make a step, and the third makes a whole step of its own."""
    made = begin(
        weights, tmp_path / "run", settings(images, epochs=1, limit_train=24, accumulate=2)
    )
    parts, batch = [], made._batch

    def spy(*arguments: object, last: bool) -> object:
        parts.append((arguments[2], last))
        return batch(*arguments, last=last)

    monkeypatch.setattr(made, "_batch", spy)
    assert made.train().best["step"] == 2
    assert parts == [(2, False), (2, True), (1, True)]


def test_accumulated_batches_make_the_step_of_the_whole(images, tmp_path):
    """Without BatchNorm, whose statistics depend on the batch, and without augmentation."""
    save_network(tmp_path / "plain.pt", Plain)
    results = []
    for i, (batch, accumulate) in enumerate(((8, 1), (4, 2))):
        network = open_network(
            tmp_path / "plain.pt", arch="trainable:Plain", input_size=(3, 12, 12)
        )
        chosen = settings(
            images, norm="bn", batch_size=batch, accumulate=accumulate, steps=3, augment="none"
        )
        made = finetune.begin(network, chosen, tmp_path / str(i), device="cpu")
        made.train()
        results.append(made.learner.raw.state_dict())
    for name, tensor in results[0].items():
        error = float((tensor - results[1][name]).abs().max() / tensor.abs().max())
        assert error < 1e-5, (name, error)  # float32 sums in another order, three steps
