"""What finetune plans without training, and where its settings come from."""

from __future__ import annotations

import json

import yaml
from finetuning import SMALL, command
from trainable import Small

from pathconvert.cli import run
from pathconvert.training.settings import Settings


def test_a_dry_run_writes_nothing(weights, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        run(
            command(
                "finetune",
                weights,
                *SMALL,
                "--data",
                images,
                "--dry-run",
                "--json",
                "--batch-size",
                8,
            )
        )
        == 0
    )
    plan = json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    model = Small()
    kinds = plan["parameters"]
    assert min(kinds.values()) >= 0
    assert sum(kinds.values()) == sum(p.numel() for p in model.parameters())
    # those of PathBN are 0
    assert (kinds["starts"], kinds["pivots that do not move"]) == (
        plan["chains"]["chains"],
        0,
    )
    assert (plan["form"], plan["steps"], plan["classes"], plan["train_images"]) == (
        "path-bn",
        60,
        3,
        48,
    )
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
        f"data: {images}\nlr: 0.5\nbatch-size: 4\nepochs: 1\nlimit_train: 8\nchannels_last:"
        " true\nclip: 1e3\n"
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
    assert (stored["lr"], stored["batch_size"], stored["epochs"], stored["channels_last"]) == (
        0.01,
        4,
        1,
        False,
    )
    assert stored["clip"] == 1000  # which YAML 1.1 reads as a text
    assert Settings.from_file(tmp_path / "run" / "config.yaml", {}) == Settings(**stored)
