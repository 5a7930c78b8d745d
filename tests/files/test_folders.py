"""Checkpoints in several files, and folders with a checkpoint in them."""

import io
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_files import assert_same, refusal
from safetensors.torch import save_file
from torch.distributed import checkpoint as distributed
from torch.distributed.checkpoint import filesystem, metadata

from pathconvert.files.checkpoint import read_checkpoint


def shard(folder: Path, state: dict, kind: str) -> None:
    """The state dict in two files with an index, as Hugging Face writes it."""
    folder.mkdir()
    names = list(state)
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    places = {}
    for i, part in enumerate((names[:3], names[3:]), 1):
        file = f"{stem}-0000{i}-of-00002.{suffix}"
        tensors = {name: state[name] for name in part}
        (save_file if kind == "safetensors" else torch.save)(tensors, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_sharded_files(tmp_path, net, kind):
    shard(tmp_path / "a", net.state_dict(), kind)
    (index,) = (tmp_path / "a").glob("*.index.json")
    for path in (tmp_path / "a", index):
        read = read_checkpoint(path)
        assert_same(read.tensors, net.state_dict())
        assert list(read.tensors) == list(net.state_dict())
        assert read.container == f"sharded-{kind}"
        assert len(read.sha256) == 64
    (missing, _) = sorted((tmp_path / "a").glob("*-of-*"))
    missing.unlink()
    message, tip = refusal(index)
    assert message == f"{index.name} refers to tensors in {missing.name!r}, which does not exist."
    assert tip == "Download the missing file into the same folder."


@pytest.mark.parametrize("place", ["../a.bin", "/etc/passwd", "", "..", 3])
def test_an_index_refers_to_files_beside_it_only(tmp_path, place):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"w": place}}))
    message, _ = refusal(path)
    assert message == (
        f"model.safetensors.index.json refers to {place!r}, which is not a file beside it."
    )


def test_an_index_that_refers_to_itself(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"weight_map": {"w": "a.json"}}))
    expected = "a.json is the index of a checkpoint in several files, not one of them."
    assert refusal(path)[0] == expected


FOLDERS = {
    "Hugging Face": "model.safetensors",
    "Hugging Face, older": "pytorch_model.bin",
    "DeepSpeed": "global_step7/mp_rank_00_model_states.pt",
    "Lightning with DeepSpeed": "checkpoint/mp_rank_00_model_states.pt",
    "Lightning": "checkpoints/last.ckpt",
    "one file": "anything.pth",
}


@pytest.mark.parametrize("form", FOLDERS)
def test_folders(tmp_path, net, form):
    path = tmp_path / "run" / FOLDERS[form]
    path.parent.mkdir(parents=True)
    (tmp_path / "run" / "notes.txt").write_text("x")
    if form == "DeepSpeed":
        (tmp_path / "run" / "latest").write_text("global_step7\n")
    config = {"model_type": "resnet", "architectures": ["ResNetForImageClassification"]}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    (save_file if path.suffix == ".safetensors" else torch.save)(net.state_dict(), path)
    read = read_checkpoint(tmp_path / "run")
    assert_same(read.tensors, net.state_dict())
    assert read.path == path
    assert read.config == config
    beside = path.name in ("model.safetensors", "pytorch_model.bin")
    assert read_checkpoint(path).config == (config if beside else None)


def test_folders_that_are_refused(tmp_path, net):
    for name in ("a.pt", "b.pt"):
        torch.save(net.state_dict(), tmp_path / name)
    message, tip = refusal(tmp_path)
    assert message == f"{tmp_path.name} is a folder with several checkpoints: 'a.pt', 'b.pt'."
    assert tip == f"Give the file: {tmp_path.name}/a.pt"
    (tmp_path / "unpacked").mkdir()
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        archive.extractall(tmp_path / "unpacked")
    message, tip = refusal(tmp_path / "unpacked" / "a")
    assert message.startswith("a is the unpacked content of a torch.save file; ")
    command = tip.removeprefix("Pack it again: ").split()
    assert command == ["python", "-m", "zipfile", "-c", "a.pt", "a"]
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path / "unpacked", check=True)
    assert_same(read_checkpoint(tmp_path / "unpacked" / "a.pt").tensors, net.state_dict())
    (tmp_path / "zero" / "checkpoint").mkdir(parents=True)
    part = tmp_path / "zero" / "checkpoint" / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    torch.save({}, part)
    message, tip = refusal(tmp_path / "zero")
    assert "whose weights are distributed over several files" in message
    assert tip.endswith(": python zero/zero_to_fp32.py zero weights.pt")


@pytest.mark.filterwarnings("ignore")  # torch warns that there is no process group
def test_distributed_checkpoints(tmp_path, net, monkeypatch):
    optimizer = torch.optim.Adam(net.parameters()).state_dict()
    saved = {"model": net.state_dict(), "optimizer": optimizer, "step": 3}
    distributed.save(saved, checkpoint_id=tmp_path / "step")
    monkeypatch.setattr(pickle, "load", None)
    read = read_checkpoint(tmp_path / "step")
    assert (read.key, read.container, read.path) == ("model", "distributed", tmp_path / "step")
    assert_same(read.tensors, net.state_dict())
    assert len(read.sha256) == 64
    next((tmp_path / "step").glob("*.distcp")).unlink()
    message, _ = refusal(tmp_path / "step")
    assert message == "step has tensors in '__0_0.distcp', which does not exist."


def sharded_step(folder: Path, parts: list[tuple[tuple[int, int], torch.Tensor]]) -> None:
    """A distributed checkpoint of one tensor of 4 × 3 in several parts."""
    folder.mkdir()
    content, storage, chunks = b"", {}, []
    for offset, part in parts:
        file = io.BytesIO()
        torch.save(part, file)
        index = metadata.MetadataIndex("model.w", offset)
        storage[index] = filesystem._StorageInfo("__0_0.distcp", len(content), file.tell())
        chunks.append(metadata.ChunkStorageMetadata(torch.Size(offset), part.shape))
        content += file.getvalue()
    properties = metadata.TensorProperties.create_from_tensor(torch.zeros(1))
    described = metadata.TensorStorageMetadata(properties, torch.Size((4, 3)), chunks)
    paths = {"model.w": ("model", "w")}
    whole = metadata.Metadata({"model.w": described}, paths, storage)
    (folder / ".metadata").write_bytes(pickle.dumps(whole))
    (folder / "__0_0.distcp").write_bytes(content)


def test_parts_of_a_distributed_tensor_are_put_together(tmp_path):
    whole = torch.arange(12.0).reshape(4, 3)
    parts = [((0, 0), whole[:1].clone()), ((1, 0), whole[1:].clone())]
    sharded_step(tmp_path / "a", parts)
    read = read_checkpoint(tmp_path / "a")
    assert read.key == "model"
    assert_same(read.tensors, {"w": whole})
    twice = whole[2:].clone()
    sharded_step(tmp_path / "b", [((0, 0), twice), ((1, 0), twice)])
    sharded_step(tmp_path / "c", parts[1:])
    for name in ("b", "c"):
        assert refusal(tmp_path / name) == (
            f"{name} does not contain all parts of 'model.w'.",
            "Copy the whole folder of the checkpoint.",
        )
