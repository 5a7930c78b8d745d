"""What a file is: foreign, damaged and hostile files are named in the refusal, and nothing in them
is executed.
"""

import json
import os
import random
import shlex
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_files import AGAIN, EXPECTED, assert_same, refusal
from safetensors.torch import save_file
from torch import nn

from pathconvert.errors import CheckpointError
from pathconvert.files.checkpoint import read_checkpoint
from pathconvert.files.filetypes import recognise


def test_missing_directory_and_empty(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.pt").touch()
    os.mkfifo(tmp_path / "pipe.pt")
    assert refusal(tmp_path / "none.pt")[0] == f"none.pt does not exist; {EXPECTED}"
    assert refusal(tmp_path / "folder")[0] == (
        f"folder is a folder without a checkpoint in it; {EXPECTED}"
    )
    assert refusal(tmp_path / "empty.pt") == (f"empty.pt is empty (0 bytes); {EXPECTED}", AGAIN)
    assert refusal(tmp_path / "pipe.pt")[0] == f"pipe.pt is not a regular file; {EXPECTED}"


FOREIGN = {
    "random bytes": (random.Random(0).randbytes(5000), "unknown binary data (it begins with "),
    "text": (b"epoch,loss\n1,0.5\n", "a text file (it begins with 'epoch,loss\\n1,0.5')"),
    "html": (
        b"\n<!DOCTYPE html><html>404",
        "a web page (HTML), perhaps the error page of a download",
    ),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid",
        "a git-lfs pointer, not the file itself",
    ),
    "openvino": (b'<?xml version="1.0"?>\n<net name="resnet">', "an OpenVINO network (.xml)"),
    "tflite": (b"\x1c\x00\x00\x00TFL3\x14\x00", "a TensorFlow Lite file"),
    "torch7": (
        b"\x04\0\0\0\x01\0\0\0\x03\0\0\0V 1\x0d\0\0\0nn.Sequential\x03\0\0\0",
        "a Torch7 file (.t7)",
    ),
    "onnx": (b"\x08\x08\x12\x07pytorch\x3a\x03abc", "an ONNX file"),
    "saved model": (b"\x08\x01\x12\x03abc", "a TensorFlow SavedModel"),
    "gguf": (b"GGUF\x03\x00\x00\x00", "a GGUF file (llama.cpp)"),
    "hdf5": (b"\x89HDF\r\n\x1a\n\x00", "an HDF5 file (Keras, TensorFlow)"),
    "zstd": (b"\x28\xb5\x2f\xfd\x00", "a zstd-compressed file"),
    "tar": (b"a.pt" + bytes(253) + b"ustar\x0000", "a tar archive"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_named(tmp_path, name):
    content, what = FOREIGN[name]
    (tmp_path / "a.pt").write_bytes(content)
    message, _ = refusal(tmp_path / "a.pt")
    assert message.startswith(f"a.pt is {what}")
    assert message.endswith(f"; {EXPECTED}")


@pytest.mark.parametrize(
    ("address", "command"),
    [
        (
            "https://host/a/resnet50-0676ba61.pth?x=1",
            "curl -L -o resnet50-0676ba61.pth 'https://host/a/resnet50-0676ba61.pth?x=1'",
        ),
        ("s3://bucket/a.pt", "aws s3 cp s3://bucket/a.pt a.pt"),
    ],
)
def test_an_address_is_told_to_be_downloaded(address, command):
    for given in (address, Path(address)):  # a path joins the two slashes
        with pytest.raises(CheckpointError) as caught:
            read_checkpoint(given)
        assert str(caught.value) == f"{address} is an address; {EXPECTED}"
        assert caught.value.tip == f"Download it first: {command}"


def test_zip_archives_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("notes.txt", "x")
    message, _ = refusal(tmp_path / "a.zip")
    assert (
        message == "a.zip is a zip archive without a checkpoint in it (it contains 'notes.txt');"
        f" {EXPECTED}"
    )
    with zipfile.ZipFile(tmp_path / "a.keras", "w") as archive:
        archive.writestr("model.weights.h5", "x")
    assert refusal(tmp_path / "a.keras")[0] == f"a.keras is a Keras archive (.keras); {EXPECTED}"


def test_zip_archives_of_several_checkpoints(tmp_path, net):
    torch.save(net.state_dict(), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.pt", "run/a.pt")
        archive.writestr("__MACOSX/run/._a.pt", "x")
    assert_same(read_checkpoint(tmp_path / "a.zip").tensors, net.state_dict())
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        archive.write(tmp_path / "a.pt", "run/b.pt")
    message, tip = refusal(tmp_path / "a.zip")
    assert message == (
        f"a.zip is a zip archive of several checkpoints ('run/a.pt', 'run/b.pt'); {EXPECTED}"
    )
    assert tip == "Unpack it and give the checkpoint inside."


def test_the_weights_of_an_openvino_network(tmp_path):
    (tmp_path / "a.xml").write_text('<?xml version="1.0"?>\n<net name="resnet">')
    (tmp_path / "a.bin").write_bytes(bytes(range(1, 100)) * 9)
    message, _ = refusal(tmp_path / "a.bin")
    assert message == f"a.bin is the weights of an OpenVINO network (.xml beside it); {EXPECTED}"


def test_compressed_again_is_refused_before_it_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(1_000_000))
    message, _ = refusal(tmp_path / "a.pt")
    size = (tmp_path / "a.pt").stat().st_size
    assert (
        message == "a.pt is a compressed torch.save file whose members claim 1000000 bytes, far"
        f" more than its {size} can contain."
    )


@pytest.mark.filterwarnings("ignore")  # torch warns that TorchScript is deprecated
def test_torchscript_and_export_archives(tmp_path):
    layer, x = nn.Linear(2, 2), torch.zeros(1, 2)
    torch.jit.trace(layer, x).save(tmp_path / "a.pt")
    torch.export.save(torch.export.export(layer, (x,)), tmp_path / "b.pt2")
    for name, what in (
        ("a.pt", "a TorchScript archive (torch.jit.save)"),
        ("b.pt2", "a torch.export archive (.pt2)"),
    ):
        with pytest.raises(CheckpointError) as caught:
            recognise(tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name} is {what}; {EXPECTED}"
        command = caught.value.tip.partition("give that file: python ")[2]
        subprocess.run([sys.executable, *shlex.split(command)], check=True)
        written = read_checkpoint(tmp_path / Path(name).with_suffix(".weights.pt"))
        assert_same(written.tensors, layer.state_dict())


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_truncated_files(tmp_path, net, form, kept):
    path = tmp_path / "a"
    if form == "safetensors":
        save_file(net.state_dict(), path)
    else:
        torch.save(net.state_dict(), path, _use_new_zipfile_serialization=form == "zip")
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    what = {
        "zip": (
            "a is a truncated or damaged torch.save file (a zip archive without an intact end"
            " record)."
        ),
        "legacy": "a is a damaged torch.save file: it ends ",
        "safetensors": "a is not an intact safetensors file: it",
    }
    message, tip = refusal(path)
    assert message.startswith(what[form])
    assert tip == AGAIN


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


LIES = {
    "2 GB": (2 << 30, {}, 0, "its header claims 2147483648 bytes, but only 2 follow"),
    "2^64": (2**64 - 1, {}, 0, "its header claims 18446744073709551615 bytes, but only 2 follow"),
    "short data": (
        None,
        {"a": entry(0, 16, [4])},
        8,
        "it is truncated: its tensors need 16 bytes, but only 8 are there",
    ),
    "long data": (
        None,
        {"a": entry(0, 8, [2])},
        12,
        "4 bytes after the last tensor belong to no tensor",
    ),
    "length": (
        None,
        {"a": entry(0, 8, [3])},
        8,
        "tensor 'a' needs 12 bytes, but its offsets claim 8",
    ),
    "overlap": (
        None,
        {"a": entry(0, 8, [2]), "b": entry(4, 12, [2])},
        12,
        "tensors 'a' and 'b' overlap",
    ),
    "hole": (
        None,
        {"a": entry(0, 8, [2]), "b": entry(12, 20, [2])},
        20,
        "4 bytes before tensor 'b' belong to no tensor",
    ),
    "negative": (None, {"a": entry(0, -8, [2])}, 8, "the entry of tensor 'a' is malformed"),
    "huge shape": (
        None,
        {"a": entry(0, 8, [2**62, 4])},
        8,
        f"tensor 'a' needs {2**66} bytes, but its offsets claim 8",
    ),
    "no JSON": (None, "{nonsense", 0, "its header is not JSON"),
    "deep": (None, '{"a":' + "[" * 100_000, 0, "its header is not JSON"),
    "twice": (None, '{"a": 1, "a": 2}', 0, "its header has the key 'a' twice"),
}


@pytest.mark.parametrize("name", LIES)
def test_safetensors_headers_that_lie(tmp_path, name):
    length, header, data, reason = LIES[name]
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (tmp_path / "a.pt").write_bytes(struct.pack("<Q", length or len(text)) + text + bytes(data))
    assert refusal(tmp_path / "a.pt") == (
        f"a.pt is not an intact safetensors file: {reason}.",
        AGAIN,
    )


def test_a_sparse_safetensors_file_with_a_2_gb_header_is_not_read(tmp_path):
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 2 << 30) + b"{")
        # takes no space on disk; the size agrees with what the header claims
        file.truncate(3 << 30)
    message, _ = refusal(tmp_path / "a.safetensors")
    claim = "its header claims 2147483648 bytes, more than the 100000000 that are allowed"
    assert message == f"a.safetensors is not an intact safetensors file: {claim}."


def test_random_bytes_named_safetensors(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 100)
    message, _ = refusal(tmp_path / "a.safetensors")
    assert (
        message
        == f"a.safetensors is not an intact safetensors file: its header claims {2**64 - 1} bytes,"
        " but only 92 follow."
    )


def test_flipped_bytes_never_escape_as_other_errors(tmp_path, net):
    torch.save(net.state_dict(), tmp_path / "a.pt")
    content, dice, refused = (tmp_path / "a.pt").read_bytes(), random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(content)
        damaged[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        (tmp_path / "a.pt").write_bytes(damaged)
        try:
            read_checkpoint(tmp_path / "a.pt")
        except CheckpointError:
            refused += 1
    assert refused > 20  # a flip in padding or in a weight is not noticed
