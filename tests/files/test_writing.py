"""Checkpoints are written whole or not at all, and every refusal is tested by its message."""

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import assert_same

from pathconvert.errors import OutputError
from pathconvert.files import checkpoint
from pathconvert.files.checkpoint import read_checkpoint
from pathconvert.files.writing import prepare_output, write_checkpoint


def write_refusal(path: Path, tensors: dict, **options) -> str:
    with pytest.raises(OutputError) as caught:
        write_checkpoint(path, tensors, None, **options)
    assert caught.value.tip
    return str(caught.value).replace(f"{path.parent}/", "").replace(str(path.parent), "FOLDER")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_views_and_shared_tensors_are_written_alone(tmp_path, suffix):
    big = torch.arange(100_000.0).reshape(100, 1000)
    tensors = {"column": big[:, 3], "row": big[5], "again": big[5], "t": big[:2, :2].t()}
    path = write_checkpoint(tmp_path / f"a{suffix}", tensors, None)
    assert_same(read_checkpoint(path).tensors, tensors)
    assert path.stat().st_size < 20_000


def test_output_paths_that_are_refused(tmp_path, net):
    state, old = net.state_dict(), tmp_path / "old.pt"
    torch.save(state, old)
    (tmp_path / "link.pt").symlink_to(old)
    (tmp_path / "folder.pt").mkdir()
    content = old.read_bytes()
    assert write_refusal(old, state) == "old.pt exists already."
    for name in ("old.pt", "link.pt", "folder.pt/../old.pt"):
        message = write_refusal(tmp_path / name, state, force=True, source=old)
        assert "is the source itself, which is never overwritten." in message
    message = write_refusal(tmp_path / "folder.pt", state, force=True)
    assert message == "folder.pt is a directory; expected the name of a file."
    message = write_refusal(tmp_path / "no" / "a.pt", state)
    assert message == "The folder FOLDER of the output a.pt does not exist."
    message = write_refusal(tmp_path / "a.onnx", state)
    expected = ".safetensors, .pt, .pth, .ckpt, .bin, .pth.tar"
    assert message == f"a.onnx has the suffix '.onnx'; expected {expected}."
    os.mkfifo(tmp_path / "pipe.pt")
    assert (
        write_refusal(tmp_path / "pipe.pt", state, force=True)
        == "pipe.pt is not a regular file and will not be replaced."
    )
    assert old.read_bytes() == content


def test_unwritable_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # a user such as root may write everywhere
    with pytest.raises(OutputError) as caught:
        prepare_output(tmp_path / "a.pt", force=False, source=None)
    assert (
        str(caught.value) == f"The folder {tmp_path} of the output {tmp_path}/a.pt is not writable."
    )


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_failing_check_keeps_the_old_file(tmp_path, net, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"old")
    seen = []

    def check(temporary: Path) -> None:
        seen.append(temporary)
        assert path.read_bytes() == b"old"
        assert_same(read_checkpoint(temporary).tensors, net.state_dict())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(path, net.state_dict(), None, force=True, check=check)
    assert seen == [tmp_path / f".a{suffix}.{os.getpid()}.tmp"]
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path, net):
    path = tmp_path / "a.pt"
    message = write_refusal(path, net.state_dict(), check=lambda _: path.write_bytes(b"other"))
    assert message == "a.pt exists already."
    assert path.read_bytes() == b"other"


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "disk full: 4.0 MB needed"),
        (errno.EROFS, "Read-only file system"),
        (errno.EACCES, "Permission denied"),
    ],
)
def test_system_errors_are_named_and_lose_nothing(tmp_path, monkeypatch, number, reason):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    message = write_refusal(path, {"w": torch.zeros(1_000_000)}, force=True)
    assert message == f"a.safetensors was not written: {reason}."
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.safetensors"]


CHILD = """
import os, sys, torch
from pathlib import Path
from pathconvert.files.writing import write_checkpoint
def check(temporary):
    assert temporary.stat().st_size > 4_000_000
    os.kill(os.getpid(), 9)
write_checkpoint(Path(sys.argv[1]), {"w": torch.zeros(1_000_000)}, None, force=True, check=check)
"""


def child(path: Path, **options) -> subprocess.CompletedProcess:
    root = Path(checkpoint.__file__).parents[1]
    command = [sys.executable, "-c", CHILD, str(path)]
    return subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=120, check=False, **options
    )


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_kill_during_write_leaves_the_old_file_or_none(tmp_path, suffix, existed):
    path = tmp_path / f"a{suffix}"
    if existed:
        path.write_bytes(b"old")
    assert child(path).returncode == -signal.SIGKILL
    assert path.exists() == existed
    assert not existed or path.read_bytes() == b"old"


def limit_file_size() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_write_that_fails_in_the_middle(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"old")
    result = child(path, preexec_fn=limit_file_size)
    reason = "the file would be too large: 4.0 MB needed"
    assert result.stderr.splitlines()[-1].endswith(
        f"OutputError: {path} was not written: {reason}."
    )
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]


def test_an_error_of_torch_that_is_no_system_error_propagates(tmp_path, monkeypatch, net):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("not the disk")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="not the disk"):
        write_checkpoint(tmp_path / "a.pt", net.state_dict(), None)
    assert os.listdir(tmp_path) == []
