"""How runs of finetune fail: what is said, and what they leave."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from finetuning import SMALL, begin, command, settings
from trainable import StopAfter, save_images

from pathconvert.cli import run
from pathconvert.errors import CheckpointError, DataError, PathconvertError, TrainingError
from pathconvert.training.run import begin as finetune
from pathconvert.training.run.failures import explained
from pathconvert.training.run.folder import RunFolder


@pytest.fixture
def fails(weights, capsys):
    """Run finetune, check its exit code and that it prints one error, and return that line."""

    def check(*arguments: object, source: object = weights, code: int = 2) -> str:
        capsys.readouterr()
        assert (
            run(
                command(
                    "finetune", *([source, *SMALL] if source else []), *arguments, "--device", "cpu"
                )
            )
            == code
        )
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
    assert "--lr cannot be given with --resume" in fails(
        "--resume", tmp_path, "--lr", "1", source=None
    )
    assert "--force cannot be given with --resume" in fails(
        "--resume", tmp_path, "--force", source=None
    )
    assert "--amp fp16 needs a GPU" in fails("--data", images, *out, "--amp", "fp16")
    assert "--skip-scale has no effect" in fails(
        "--data", images, *out, "--norm", "bn", "--skip-scale", "1"
    )
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
        (
            "1e-9",
            r"outputs are no longer finite after epoch 1, batch 1",
        ),  # looked at before a checkpoint is written
    ],
)
def test_a_network_that_is_not_finite_ends_with_1_and_leaves_no_checkpoint(
    fails, images, tmp_path, minutes, said
):
    line = fails(
        "--data", images, "--output-dir", tmp_path / "run", "--optimizer", "sgd", "--norm", "bn",
        "--lr", "1e30",
        "--batch-size", 8, "--checkpoint-minutes", minutes, code=1,
    )  # fmt: skip
    assert re.search(said + "; there is no checkpoint yet", line)
    assert RunFolder(tmp_path / "run").load() is None


def test_outputs_that_are_not_finite_end_with_1(weights, images, tmp_path):
    made = begin(
        weights,
        tmp_path / "run",
        settings(images, epochs=1, limit_train=8, lr=1e30, optimizer="sgd"),
    )
    with pytest.raises(
        TrainingError, match="outputs on held-out images are no longer finite after epoch 1"
    ) as caught:
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
    for name, tensor in resumed.learner.raw.state_dict().items():
        assert torch.equal(tensor, made.learner.raw.state_dict()[name]), name


def test_one_value_a_channel_is_explained():
    bn = torch.nn.BatchNorm2d(8)
    said = "BatchNorm one value per channel"
    with pytest.raises(TrainingError, match=said) as caught, explained(1):
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

    def out_of_memory(*_: object, last: bool) -> None:  # noqa: ARG001
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
