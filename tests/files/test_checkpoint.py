"""Reading and writing checkpoints: every refusal by its message, and no half-written file."""

import argparse
import errno
import hashlib
import json
import os
import pickle
import random
import resource
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from pathconvert.errors import CheckpointError, OutputError
from pathconvert.files import checkpoint
from pathconvert.files.checkpoint import read_checkpoint, tensors_digest
from pathconvert.files.writing import prepare_output, write_checkpoint

EXPECTED = "expected a PyTorch checkpoint (.pt, .pth) or a .safetensors file."
WEIGHTS = "Give a file with the network's weights: torch.save(model.state_dict(), 'weights.pt')."
AGAIN = "Download or copy the file again, and compare its size with the original's."


class Net(nn.Sequential):
    """A small network with every kind of state: weights, running statistics, a counter."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


class Evil:
    """Unpickling it makes the file ``canary``."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def assert_same(tensors: dict, expected: dict) -> None:
    assert set(tensors) == set(expected)
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name


def refusal(path: Path, **options) -> tuple[str, str]:
    """The message without the folder, and the tip."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path, **options)
    message, tip = str(caught.value), caught.value.tip
    assert "\n" not in message + tip
    assert str(path) in message
    assert tip
    return message.replace(f"{path.parent}/", ""), tip.replace(f"{path.parent}/", "")


def write_refusal(path: Path, tensors: dict, **options) -> str:
    with pytest.raises(OutputError) as caught:
        write_checkpoint(path, tensors, None, **options)
    assert caught.value.tip
    return str(caught.value).replace(f"{path.parent}/", "").replace(str(path.parent), "FOLDER")


# --- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_a_state_dict_in_file_order(tmp_path, net, zipped):
    torch.save(net.state_dict(), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(tmp_path / "a.pt")
    assert list(read.tensors) == list(net.state_dict())
    assert_same(read.tensors, net.state_dict())
    assert (read.key, read.prefix, read.metadata) == (None, "", None)
    assert read.sha256 == hashlib.sha256((tmp_path / "a.pt").read_bytes()).hexdigest()


def test_reads_stock_safetensors_under_any_name(tmp_path, net):
    save_file(net.state_dict(), tmp_path / "a.pt")
    assert_same(read_checkpoint(tmp_path / "a.pt").tensors, net.state_dict())


def test_parameters_come_without_gradients(tmp_path, net):
    torch.save(dict(net.named_parameters()), tmp_path / "a.pt")
    assert not any(tensor.requires_grad for tensor in read_checkpoint(tmp_path / "a.pt").tensors.values())


@pytest.mark.parametrize("key", checkpoint.WRAPPER_KEYS)
def test_every_wrapper_key(tmp_path, net, key):
    torch.save({"epoch": 3, "args": argparse.Namespace(lr=0.1), key: net.state_dict()}, tmp_path / "a.pt")
    read = read_checkpoint(tmp_path / "a.pt")
    assert read.key == key
    assert_same(read.tensors, net.state_dict())


def test_preferred_and_chosen_key(tmp_path):
    weights = {key: {"w": torch.full((2,), float(i))} for i, key in enumerate(reversed(checkpoint.WRAPPER_KEYS))}
    torch.save(weights | {"other": {"w": torch.full((2,), 9.0)}}, tmp_path / "a.pt")
    assert read_checkpoint(tmp_path / "a.pt").key == "state_dict"
    chosen = read_checkpoint(tmp_path / "a.pt", key="other")
    assert chosen.key == "other"
    assert chosen.tensors["w"][0] == 9


def test_nested_key_is_printed_and_accepted(tmp_path, net):
    torch.save({"ema": {"decay": 0.9, "state_dict": net.state_dict()}}, tmp_path / "a.pt")
    for key in (None, "ema", "ema.state_dict"):
        assert read_checkpoint(tmp_path / "a.pt", key=key).key == "ema.state_dict"


def test_missing_key_names_those_there(tmp_path, net):
    torch.save({"model": net.state_dict(), "gen": net.state_dict()}, tmp_path / "a.pt")
    message, tip = refusal(tmp_path / "a.pt", key="ema")
    assert message == "a.pt has no weights under 'ema'."
    assert tip == "The keys with weights: 'model', 'gen'."
    torch.save(net.state_dict(), tmp_path / "b.pt")
    message, _ = refusal(tmp_path / "b.pt", key="ema")
    assert message == "b.pt has no key 'ema': it is a state dict itself."


def test_unknown_key_is_offered(tmp_path, net):
    torch.save({"gen": net.state_dict(), "epoch": 1}, tmp_path / "a.pt")
    message, tip = refusal(tmp_path / "a.pt")
    keys = "state_dict, model, model_state, model_state_dict, model_ema, ema"
    assert message == f"a.pt has weights under none of {keys} (its keys: 'gen', 'epoch')."
    assert tip == "Choose one with --key: 'gen'."


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."])
def test_prefixes_on_all_names_are_stripped(tmp_path, net, prefix):
    torch.save({f"{prefix}{name}": tensor for name, tensor in net.state_dict().items()}, tmp_path / "a.pt")
    read = read_checkpoint(tmp_path / "a.pt")
    assert read.prefix == prefix
    assert_same(read.tensors, net.state_dict())


def test_a_prefix_on_some_names_stays(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "a.pt")
    read = read_checkpoint(tmp_path / "a.pt")
    assert (list(read.tensors), read.prefix) == (["module.a", "b"], "")


@pytest.mark.parametrize("outer", [False, True])
def test_averaged_model_loses_its_counter(tmp_path, net, outer):
    averaged = torch.optim.swa_utils.AveragedModel(net)
    torch.save({"model_ema": (nn.DataParallel(averaged) if outer else averaged).state_dict()}, tmp_path / "a.pt")
    read = read_checkpoint(tmp_path / "a.pt")
    assert read.prefix == ("module.module." if outer else "module.")
    assert_same(read.tensors, net.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_dtypes_round_trip(tmp_path, dtype, suffix):
    torch.manual_seed(0)
    tensors = {"w": torch.randn(3, 5).to(dtype), "s": torch.tensor(2.0, dtype=dtype), "e": torch.zeros(0, dtype=dtype)}
    tensors["num_batches_tracked"] = torch.tensor(7)
    path = write_checkpoint(tmp_path / f"a{suffix}", tensors, None)
    read = read_checkpoint(path)
    assert_same(read.tensors, tensors)
    assert read.metadata is None
    assert tensors_digest(read.tensors) == tensors_digest(tensors)


# --- metadata -------------------------------------------------------------------------------------------------------

METADATA = {"format_version": 1, "scales": [0.1, 1e-300, 2**53 + 1.0], "name": "Größe \n"}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_metadata_round_trip(tmp_path, net, suffix):
    path = write_checkpoint(tmp_path / f"a{suffix}", net.state_dict(), METADATA)
    read = read_checkpoint(path)
    assert read.metadata == METADATA
    assert_same(read.tensors, net.state_dict())


def test_stock_model_loads_both_formats_strictly(tmp_path, net):
    pt = write_checkpoint(tmp_path / "a.pt", net.state_dict(), METADATA)
    safe = write_checkpoint(tmp_path / "a.safetensors", net.state_dict(), METADATA)
    for state in (torch.load(pt, weights_only=True), load_file(safe)):
        stock = Net()
        stock.load_state_dict(state, strict=True)
        assert_same(stock.state_dict(), net.state_dict())
    with safe_open(safe, "pt") as file:
        assert file.metadata() == {"format": "pt", "pathconvert": json.dumps(METADATA)}


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', ""])
def test_damaged_metadata(tmp_path, net, text):
    save_file(net.state_dict(), tmp_path / "a.safetensors", metadata={"format": "pt", "pathconvert": text})
    state = net.state_dict()
    state._metadata["pathconvert"] = {"json": text}
    torch.save(state, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        message, _ = refusal(tmp_path / name)
        assert message == f"{name} has damaged pathconvert metadata: it is no JSON object."


# --- files that are no checkpoint -----------------------------------------------------------------------------------


def test_missing_directory_and_empty(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.pt").touch()
    os.mkfifo(tmp_path / "pipe.pt")
    assert refusal(tmp_path / "none.pt")[0] == f"none.pt does not exist; {EXPECTED}"
    assert refusal(tmp_path / "folder")[0] == f"folder is a directory; {EXPECTED}"
    assert refusal(tmp_path / "empty.pt") == (f"empty.pt is empty (0 bytes); {EXPECTED}", AGAIN)
    assert refusal(tmp_path / "pipe.pt")[0] == f"pipe.pt is no regular file; {EXPECTED}"


FOREIGN = {
    "random bytes": (random.Random(0).randbytes(5000), "unknown binary data (it begins with "),
    "text": (b"epoch,loss\n1,0.5\n", "a text file (it begins with 'epoch,loss\\n1,0.5')"),
    "html": (b"\n<!DOCTYPE html><html>404", "a web page (HTML), perhaps the error page of a download"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "a git-lfs pointer, not the file itself"),
    "index": (b'{"metadata": {}, "weight_map": {}}', "the index of a checkpoint in several files"),
    "onnx": (b"\x08\x08\x12\x07pytorch\x3a\x03abc", "an ONNX file"),
    "saved model": (b"\x08\x01\x12\x03abc", "a TensorFlow SavedModel"),
    "gguf": (b"GGUF\x03\x00\x00\x00", "a GGUF file (llama.cpp)"),
    "hdf5": (b"\x89HDF\r\n\x1a\n\x00", "an HDF5 file (Keras, TensorFlow)"),
    "gzip": (b"\x1f\x8b\x08\x00", "a gzip-compressed file"),
    "plain pickle": (pickle.dumps({"w": [1.0]}), "a plain pickle, not written by torch.save"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_named(tmp_path, name):
    content, what = FOREIGN[name]
    (tmp_path / "a.pt").write_bytes(content)
    message, _ = refusal(tmp_path / "a.pt")
    assert message.startswith(f"a.pt is {what}")
    assert message.endswith(f"; {EXPECTED}")


def test_zip_archives_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("notes.txt", "x")
    message, _ = refusal(tmp_path / "a.zip")
    assert message == f"a.zip is a zip archive without a checkpoint in it (it holds 'notes.txt'); {EXPECTED}"
    with zipfile.ZipFile(tmp_path / "a.keras", "w") as archive:
        archive.writestr("model.weights.h5", "x")
    assert refusal(tmp_path / "a.keras")[0] == f"a.keras is a Keras archive (.keras); {EXPECTED}"


def test_compressed_again_is_refused_before_it_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(1_000_000))
    message, _ = refusal(tmp_path / "a.pt")
    assert message == "a.pt is a torch.save file that was compressed again, or whose members claim more than it holds."


@pytest.mark.filterwarnings("ignore")  # torch announces the end of TorchScript
def test_torchscript_and_export_archives(tmp_path):
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "a.pt")
    message, tip = refusal(tmp_path / "a.pt")
    assert message == f"a.pt is a TorchScript archive (torch.jit.save); {EXPECTED}"
    assert "torch.save(torch.jit.load('file.pt').state_dict(), 'weights.pt')" in tip
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), tmp_path / "a.pt2")
    message, tip = refusal(tmp_path / "a.pt2")
    assert message == f"a.pt2 is a torch.export archive (.pt2); {EXPECTED}"
    assert "torch.export.load('file.pt2').state_dict" in tip


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
        "zip": "a is a truncated or damaged torch.save file (a zip archive without an intact end record).",
        "legacy": "a is a damaged torch.save file; torch says: ",
        "safetensors": "a is no intact safetensors file: it",
    }
    message, tip = refusal(path)
    assert message.startswith(what[form])
    assert tip == AGAIN


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


LIES = {
    "2 GB": (2 << 30, {}, 0, "its header claims 2147483648 bytes, 2 follow"),
    "2^64": (2**64 - 1, {}, 0, "its header claims 18446744073709551615 bytes, 2 follow"),
    "short data": (None, {"a": entry(0, 16, [4])}, 8, "it is truncated: its tensors need 16 bytes, 8 are there"),
    "long data": (None, {"a": entry(0, 8, [2])}, 12, "4 bytes after the last tensor belong to no tensor"),
    "length": (None, {"a": entry(0, 8, [3])}, 8, "tensor 'a' needs 12 bytes, its offsets claim 8"),
    "overlap": (None, {"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, 12, "tensors 'a' and 'b' overlap"),
    "hole": (
        None,
        {"a": entry(0, 8, [2]), "b": entry(12, 20, [2])},
        20,
        "4 bytes before tensor 'b' belong to no tensor",
    ),
    "negative": (None, {"a": entry(0, -8, [2])}, 8, "the entry of tensor 'a' is malformed"),
    "huge shape": (None, {"a": entry(0, 8, [2**62, 4])}, 8, f"tensor 'a' needs {2**66} bytes, its offsets claim 8"),
    "no JSON": (None, "{nonsense", 0, "its header is no JSON"),
    "deep": (None, '{"a":' + "[" * 100_000, 0, "its header is no JSON"),
    "twice": (None, '{"a": 1, "a": 2}', 0, "its header has the key 'a' twice"),
}


@pytest.mark.parametrize("name", LIES)
def test_safetensors_headers_that_lie(tmp_path, name):
    length, header, data, reason = LIES[name]
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (tmp_path / "a.pt").write_bytes(struct.pack("<Q", length or len(text)) + text + bytes(data))
    assert refusal(tmp_path / "a.pt") == (f"a.pt is no intact safetensors file: {reason}.", AGAIN)


def test_a_sparse_safetensors_file_with_a_2_gb_header_is_not_read(tmp_path):
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 2 << 30) + b"{")
        file.truncate(3 << 30)  # takes no space on disk; the claim agrees with the size
    message, _ = refusal(tmp_path / "a.safetensors")
    claim = "its header claims 2147483648 bytes, more than the 100000000 that are allowed"
    assert message == f"a.safetensors is no intact safetensors file: {claim}."


def test_random_bytes_named_safetensors(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 100)
    message, _ = refusal(tmp_path / "a.safetensors")
    assert message == f"a.safetensors is no intact safetensors file: its header claims {2**64 - 1} bytes, 92 follow."


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
    assert refused > 20  # a flip in padding or in a weight is not seen


# --- pickles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickle_with_code_executes_nothing(tmp_path, protocol, trust):
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"w": Evil(tmp_path / "canary")}, protocol))
    message, tip = refusal(tmp_path / "a.pt", trust_pickle=trust)
    what = f"a pickle with code in it (it calls '{os.system.__module__}.system'); nothing of it was executed"
    assert message == f"a.pt is {what}; {EXPECTED}"
    assert tip.startswith("Do not load it.")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoint_with_code_executes_nothing(tmp_path, net, zipped, protocol):
    saved = {"state_dict": net.state_dict(), "x": Evil(tmp_path / "canary")}
    path = tmp_path / "a.pt"
    torch.save(saved, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    message, tip = refusal(path)
    what = f"a pickle with code in it (it calls '{os.system.__module__}.system'); nothing of it was executed"
    assert message == f"a.pt is {what}."
    assert "trust-pickle" not in tip
    assert not (tmp_path / "canary").exists()
    torch.load(path, weights_only=False)  # the trap is a live one
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_module(tmp_path, net, zipped, wrapped):
    torch.save({"model": net} if wrapped else net, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    message, tip = refusal(tmp_path / "a.pt")
    assert message == f"a.pt is a pickled module ('{__name__}.Net'), which runs code when loaded; {EXPECTED}"
    load = "model = torch.load('a.pt', weights_only=False); torch.save(model.state_dict(), 'a.weights.pt')"
    assert tip == f"If you trust it, save its weights: {load} -- or pass --trust-pickle."
    trusted = read_checkpoint(tmp_path / "a.pt", trust_pickle=True)
    assert trusted.key == ("model" if wrapped else None)
    assert_same(trusted.tensors, net.state_dict())


def test_trusted_module_whose_class_is_missing(tmp_path, net, monkeypatch):
    torch.save(net, tmp_path / "a.pt")
    monkeypatch.delattr(sys.modules[__name__], "Net")
    message, _ = refusal(tmp_path / "a.pt", trust_pickle=True)
    assert message.startswith("a.pt is a pickled module whose code is missing here: ")


def test_other_objects_and_protocols(tmp_path, net):
    torch.save({"model": net.state_dict(), "dir": Path("x")}, tmp_path / "a.pt")
    message, tip = refusal(tmp_path / "a.pt")
    assert message == f"a.pt holds Python objects besides tensors: 'pathlib.PosixPath'; {EXPECTED}"
    assert "--trust-pickle" in tip
    assert_same(read_checkpoint(tmp_path / "a.pt", trust_pickle=True).tensors, net.state_dict())
    torch.save(net.state_dict(), tmp_path / "b.pt", pickle_protocol=4)
    assert refusal(tmp_path / "b.pt")[0] == "b.pt is pickled with protocol 4; expected torch.save's own, 2."


# --- tensors that are no weights ------------------------------------------------------------------------------------


def test_dictionaries_and_objects_without_weights(tmp_path, net):
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    saved = {
        "opt.pt": optimizer.state_dict(),
        "opt2.pt": {"optimizer": optimizer.state_dict(), "epoch": 3},
        "none.pt": {"epoch": 3, "loss": 0.5},
        "one.pt": torch.zeros(2, 3),
        "list.pt": [torch.zeros(3), 1],
    }
    for name, value in saved.items():
        torch.save(value, tmp_path / name)
    only = "is a checkpoint of an optimizer only, without the network's weights"
    assert refusal(tmp_path / "opt.pt") == (f"opt.pt {only} (its keys: 'state', 'param_groups').", WEIGHTS)
    assert refusal(tmp_path / "opt2.pt") == (f"opt2.pt {only} (its keys: 'optimizer', 'epoch').", WEIGHTS)
    expected = "none.pt holds a dictionary without tensors (its keys: 'epoch', 'loss')."
    assert refusal(tmp_path / "none.pt") == (expected, WEIGHTS)
    expected = "one.pt holds a single tensor of shape [2, 3]; expected a state dict."
    assert refusal(tmp_path / "one.pt") == (expected, WEIGHTS)
    assert refusal(tmp_path / "list.pt")[0] == "list.pt holds a list of 2 ('Tensor', 'int'); expected a state dict."


def test_entry_that_is_no_tensor(tmp_path):
    torch.save({"w": torch.ones(2), "note\n": "x", "more": 3}, tmp_path / "a.pt")
    message, _ = refusal(tmp_path / "a.pt")
    assert message == "a.pt has an entry that is no named tensor: 'note\\n', an object of type str."


def test_nan_and_infinity(tmp_path):
    tensors = {name: torch.zeros(2, 5) for name in "abc"}
    tensors["b"][0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    tensors["c"][1, 1] = float("inf")
    for name in ("a.pt", "a.safetensors"):
        write_checkpoint(tmp_path / name, tensors, None)
        message, _ = refusal(tmp_path / name)
        assert message == f"{name} has NaN or infinite weights: 3 of 10 values in 'b'; 2 of 3 tensors affected."


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64"])
def test_integer_weights(tmp_path, dtype):
    torch.save({"fc.weight": torch.ones(2, 2, dtype=getattr(torch, dtype))}, tmp_path / "a.pt")
    message, tip = refusal(tmp_path / "a.pt")
    what = f"a quantized or integer checkpoint ('fc.weight' is {dtype})"
    assert message == f"a.pt is {what}; expected floating-point weights."
    assert "from before quantization" in tip


@pytest.mark.filterwarnings("ignore")  # torch announces the end of its quantized tensors
def test_quantized_weights(tmp_path):
    torch.save({"w": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, tmp_path / "a.pt")
    torch.save(torch.ao.nn.quantized.Linear(2, 2).state_dict(), tmp_path / "b.pt")
    for name, tensor in {"a.pt": "w", "b.pt": "_packed_params.dtype"}.items():
        what = f"a quantized or integer checkpoint ('{tensor}' is quantized)"
        assert refusal(tmp_path / name)[0] == f"{name} is {what}; expected floating-point weights."


@pytest.mark.parametrize("dtype", ["complex64", "float8_e4m3fn"])
def test_unsupported_dtypes(tmp_path, dtype):
    torch.save({"w": torch.ones(2).to(getattr(torch, dtype))}, tmp_path / "a.pt")
    save_file({"w": torch.ones(2).to(getattr(torch, dtype))}, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        assert refusal(tmp_path / name)[0] == f"{name} holds 'w' in {dtype}, which is not supported."


def test_counters_pass(tmp_path):
    tensors = {"n": torch.tensor(3), "on": torch.tensor(True), "bn.num_batches_tracked": torch.zeros(1).int()}
    torch.save({"w": torch.ones(1)} | tensors, tmp_path / "a.pt")
    assert len(read_checkpoint(tmp_path / "a.pt").tensors) == 4


def test_tensors_that_are_not_dense_or_not_there(tmp_path):
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "a.pt")
    kind = "(Tensor, torch.sparse_coo, on cpu)"
    assert refusal(tmp_path / "a.pt")[0] == f"a.pt holds 'w', which is no plain dense tensor {kind}."
    torch.save({"w": torch.ones(1).as_strided((10**12,), (0,))}, tmp_path / "b.pt")
    expected = "b.pt holds 'w' of shape [1000000000000], far larger than its stored data."
    assert refusal(tmp_path / "b.pt")[0] == expected


def test_digest_sees_names_dtypes_shapes_and_bytes():
    base = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}
    others = [
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"], "b": base["b"].half()},
        {"a": base["a"].reshape(3, 2), "b": base["b"]},
        {"a": base["a"] + torch.tensor([0.0, 0, 1e-6]), "b": base["b"]},
        {"a": base["a"], "b": -base["b"]},
    ]
    digests = [tensors_digest(tensors) for tensors in (base, *others)]
    assert len(set(digests)) == 6
    transposed = base["a"].t().contiguous().t()  # the same values, laid out otherwise
    assert tensors_digest({"b": base["b"], "a": transposed}) == digests[0]


# --- writing --------------------------------------------------------------------------------------------------------


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
    assert message == "a.onnx has the suffix '.onnx'; expected .safetensors, .pt, .pth."
    os.mkfifo(tmp_path / "pipe.pt")
    assert (
        write_refusal(tmp_path / "pipe.pt", state, force=True) == "pipe.pt is no regular file and will not be replaced."
    )
    assert old.read_bytes() == content


def test_unwritable_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(OutputError) as caught:
        prepare_output(tmp_path / "a.pt", force=False, source=None)
    assert str(caught.value) == f"The folder {tmp_path} of the output {tmp_path}/a.pt is not writable."


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
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False, **options)


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
    assert result.stderr.splitlines()[-1].endswith(f"OutputError: {path} was not written: {reason}.")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]


def test_an_error_of_torch_that_is_no_system_error_propagates(tmp_path, monkeypatch, net):
    def fail(*_: object) -> None:
        raise RuntimeError("not the disk")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="not the disk"):
        write_checkpoint(tmp_path / "a.pt", net.state_dict(), None)
    assert os.listdir(tmp_path) == []
