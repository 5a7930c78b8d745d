"""Reading checkpoints: what is accepted, and every refusal by its message."""

import argparse
import hashlib
import json

import pytest
import torch
from checkpoint_files import Net, assert_same, refusal, refused_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from pathconvert.files.checkpoint import read_checkpoint
from pathconvert.files.states import WRAPPER_KEYS
from pathconvert.files.weights import tensors_digest
from pathconvert.files.writing import write_checkpoint

WEIGHTS = "Give a file with the network's weights: torch.save(model.state_dict(), 'weights.pt')."


# ---- what is read --------------------------------------------------------------------------------


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
    assert not any(
        tensor.requires_grad for tensor in read_checkpoint(tmp_path / "a.pt").tensors.values()
    )


@pytest.mark.parametrize("key", WRAPPER_KEYS)
def test_every_wrapper_key(tmp_path, net, key):
    torch.save(
        {"epoch": 3, "args": argparse.Namespace(lr=0.1), key: net.state_dict()}, tmp_path / "a.pt"
    )
    read = read_checkpoint(tmp_path / "a.pt")
    assert read.key == key
    assert_same(read.tensors, net.state_dict())


def test_preferred_and_chosen_key(tmp_path):
    weights = {
        key: {"w": torch.full((2,), float(i))} for i, key in enumerate(reversed(WRAPPER_KEYS))
    }
    torch.save(weights | {"other": {"w": torch.full((2,), 9.0)}}, tmp_path / "a.pt")
    read = read_checkpoint(tmp_path / "a.pt")
    assert read.key == "state_dict"
    assert read.others == (*WRAPPER_KEYS[1:], "other")
    chosen = read_checkpoint(tmp_path / "a.pt", key="other")
    assert chosen.key == "other"
    assert chosen.tensors["w"][0] == 9
    assert chosen.others == WRAPPER_KEYS


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


def test_the_only_state_dict_is_taken_under_any_key(tmp_path, net):
    torch.save({"gen": {"deep": {"er": net.state_dict()}}, "epoch": 1}, tmp_path / "a.pt")
    read = read_checkpoint(tmp_path / "a.pt")
    assert (read.key, read.others) == ("gen.deep.er", ())
    assert_same(read.tensors, net.state_dict())


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."]
)
def test_prefixes_on_all_names_are_stripped(tmp_path, net, prefix):
    torch.save(
        {f"{prefix}{name}": tensor for name, tensor in net.state_dict().items()}, tmp_path / "a.pt"
    )
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
    torch.save(
        {"model_ema": (nn.DataParallel(averaged) if outer else averaged).state_dict()},
        tmp_path / "a.pt",
    )
    read = read_checkpoint(tmp_path / "a.pt")
    assert read.prefix == ("module.module." if outer else "module.")
    assert read.skipped == ("module.n_averaged" if outer else "n_averaged",)
    assert_same(read.tensors, net.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_dtypes_round_trip(tmp_path, dtype, suffix):
    torch.manual_seed(0)
    tensors = {
        "w": torch.randn(3, 5).to(dtype),
        "s": torch.tensor(2.0, dtype=dtype),
        "e": torch.zeros(0, dtype=dtype),
    }
    tensors["num_batches_tracked"] = torch.tensor(7)
    path = write_checkpoint(tmp_path / f"a{suffix}", tensors, None)
    read = read_checkpoint(path)
    assert_same(read.tensors, tensors)
    assert read.metadata is None
    assert tensors_digest(read.tensors) == tensors_digest(tensors)


# ---- metadata ------------------------------------------------------------------------------------

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
    save_file(
        net.state_dict(), tmp_path / "a.safetensors", metadata={"format": "pt", "pathconvert": text}
    )
    state = net.state_dict()
    state._metadata["pathconvert"] = {"json": text}
    torch.save(state, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        message, _ = refusal(tmp_path / name)
        assert message == f"{name} has damaged pathconvert metadata: it is not a JSON object."


# ---- tensors that are not weights ----------------------------------------------------------------


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
    assert refusal(tmp_path / "opt.pt") == (
        f"opt.pt {only} (its keys: 'state', 'param_groups').",
        WEIGHTS,
    )
    assert refusal(tmp_path / "opt2.pt") == (
        f"opt2.pt {only} (its keys: 'optimizer', 'epoch').",
        WEIGHTS,
    )
    expected = "none.pt contains a dictionary without tensors (its keys: 'epoch', 'loss')."
    assert refusal(tmp_path / "none.pt") == (expected, WEIGHTS)
    expected = "one.pt contains a single tensor of shape [2, 3]; expected a state dict."
    assert refusal(tmp_path / "one.pt") == (expected, WEIGHTS)
    assert (
        refusal(tmp_path / "list.pt")[0]
        == "list.pt contains a list of 2 ('Tensor', 'int'); expected a state dict."
    )


def test_entries_that_are_no_tensors_are_skipped(tmp_path):
    torch.save({"w": torch.ones(2), "note": "x", "more": 3, 4: torch.ones(2)}, tmp_path / "a.pt")
    read = read_checkpoint(tmp_path / "a.pt")
    assert list(read.tensors) == ["w"]
    assert read.skipped == ("note", "more", "4")


def test_nan_and_infinity(tmp_path):
    tensors = {name: torch.zeros(2, 5) for name in "abc"}
    tensors["b"][0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    tensors["c"][1, 1] = float("inf")
    for name in ("a.pt", "a.safetensors"):
        write_checkpoint(tmp_path / name, tensors, None)
        message, _ = refused_weights(tmp_path / name)
        assert (
            message == f"{name} has NaN or infinite weights: 3 of 10 values in 'b'; 2 of 3 tensors"
            " affected."
        )


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64"])
def test_integer_weights(tmp_path, dtype):
    torch.save({"fc.weight": torch.ones(2, 2, dtype=getattr(torch, dtype))}, tmp_path / "a.pt")
    message, tip = refused_weights(tmp_path / "a.pt")
    what = f"a quantized or integer checkpoint ('fc.weight' is {dtype})"
    assert message == f"a.pt is {what}; expected floating-point weights."
    assert "from before quantization" in tip


@pytest.mark.filterwarnings("ignore")  # torch warns that quantized tensors are deprecated
def test_quantized_weights(tmp_path):
    torch.save(
        {"w": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, tmp_path / "a.pt"
    )
    torch.save(torch.ao.nn.quantized.Linear(2, 2).state_dict(), tmp_path / "b.pt")
    for name, tensor in {"a.pt": "w", "b.pt": "_packed_params.dtype"}.items():
        what = f"a quantized or integer checkpoint ('{tensor}' is quantized)"
        assert refusal(tmp_path / name)[0] == f"{name} is {what}; expected floating-point weights."


@pytest.mark.parametrize("dtype", ["complex64", "float8_e4m3fn"])
def test_unsupported_dtypes(tmp_path, dtype):
    torch.save({"w": torch.ones(2).to(getattr(torch, dtype))}, tmp_path / "a.pt")
    save_file({"w": torch.ones(2).to(getattr(torch, dtype))}, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        assert (
            refused_weights(tmp_path / name)[0]
            == f"{name} contains 'w' in {dtype}, which is not supported."
        )


def test_counters_pass(tmp_path):
    tensors = {
        "n": torch.tensor(3),
        "on": torch.tensor(True),
        "bn.num_batches_tracked": torch.zeros(1).int(),
    }
    torch.save({"w": torch.ones(1)} | tensors, tmp_path / "a.pt")
    assert len(read_checkpoint(tmp_path / "a.pt").tensors) == 4


def test_tensors_that_are_not_dense_or_not_there(tmp_path):
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "a.pt")
    kind = "(_rebuild_sparse_tensor)"
    assert (
        refusal(tmp_path / "a.pt")[0]
        == f"a.pt contains 'w', which is not a plain dense tensor {kind}."
    )
    torch.save({"w": torch.ones(1).as_strided((10**12,), (0,))}, tmp_path / "b.pt")
    flaw = "its shape is [1000000000000], far larger than its stored data"
    assert refusal(tmp_path / "b.pt")[0] == f"b.pt contains 'w', which cannot be read: {flaw}."


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
    transposed = base["a"].t().contiguous().t()  # the same values in another memory layout
    assert tensors_digest({"b": base["b"], "a": transposed}) == digests[0]
