"""Files that were made to run code, to take all memory, or to crash: nothing of it happens.

Each attack is a pickle that would create the file ``canary`` if anything in it were called. The
fuzz damages files at random; ``PATHCONVERT_FUZZ=20000`` tries more than the few hundred here.
"""

import argparse
import contextlib
import gzip
import io
import os
import pickle
import pickletools
import random
import resource
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import Evil, Net, assert_same, refusal, tar_of
from safetensors.torch import save_file
from torch.distributed import checkpoint as distributed

from pathconvert.errors import CheckpointError
from pathconvert.files.checkpoint import read_checkpoint
from pathconvert.files.tensors import ALLOWED
from pathconvert.files.unpickling import Global, Memory, Object, Unpickler

FUZZ = int(os.environ.get("PATHCONVERT_FUZZ", "400"))


def run(program: bytes) -> object:
    return Unpickler(Memory(memoryview(program)), ALLOWED).load()


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


@pytest.fixture(autouse=True)
def modules() -> Iterator[None]:
    before = set(sys.modules)
    yield
    assert {"antigravity", "this", "turtle"}.isdisjoint(set(sys.modules) - before)


# ---- code ----------------------------------------------------------------------------------------


class Reduced:
    """An object that is pickled as a call."""

    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce_ex__(self, _: object):
        return self.call


def attacks(canary: Path) -> dict[str, bytes]:
    """Pickles that create the canary when they are loaded by Python's own unpickler."""
    touch = f"open({str(canary)!r}, 'w').close()"
    command = f"touch {canary}"
    inner = pickle.dumps(Evil(canary))
    text = str(canary).encode()
    return {
        "os.system": pickle.dumps(Evil(canary)),
        "eval": pickle.dumps(Reduced(eval, (touch,))),
        "exec": pickle.dumps(Reduced(exec, (touch,))),
        "a nested pickle": pickle.dumps(Reduced(pickle.loads, (inner,))),
        "getattr": b"cbuiltins\ngetattr\n(cos\nS'system'\ntR(S'" + command.encode() + b"'\ntR.",
        "a dotted name": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c"
        + bytes([len(command)]) + command.encode() + b"\x85R.",
        "INST": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'" + command.encode() + b"'\no.",
        "NEWOBJ": b"\x80\x02cos\nsystem\nS'" + command.encode() + b"'\n\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04cos\nsystem\nS'" + command.encode() + b"'\n\x85}\x92.",
        "BUILD of a class": b"\x80\x02cargparse\nNamespace\nN}S'__init__'\ncos\nsystem\ns\x86b.",
        "BUILD of a function": b"\x80\x02ctorch._utils\n_rebuild_tensor\n}S'x'\ncos\nsystem\nsb.",
        "a setter": b"\x80\x02cbuiltins\nsetattr\n(cos\nS'name'\nS'x'\ntR.",
        "an import": b"\x80\x02cantigravity\nfly\n.",
        "partial": b"\x80\x02cfunctools\npartial\ncos\nsystem\n\x85R(S'" + command.encode()
        + b"'\ntR.",
        "open": b"cbuiltins\nopen\n(S'" + text + b"'\nS'w'\ntR.",
        "copyreg": b"ccopyreg\n_reconstructor\n(cos\nsystem\nS'" + text + b"'\nS'x'\ntR.",
        "an extension": b"\x80\x02\x82\x01.",
        "numpy": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cos\nsystem\nK\x00\x85S'"
        + command.encode() + b"'\ntR.",
        "a default factory": b"\x80\x02ccollections\ndefaultdict\ncos\nsystem\n\x85R.",
        "torch.load": b"\x80\x02ctorch.serialization\nload\n(S'" + text + b"'\ntR.",
        "map": b"cbuiltins\nlist\n(cbuiltins\nmap\n(cos\nsystem\n(lp0\nS'" + command.encode()
        + b"'\natRtR.",
    }  # fmt: skip


NAMES = list(attacks(Path("x")))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_called(canary, name):
    """The machine itself: the value is inert, or the pickle is refused."""
    program = attacks(canary)[name]
    with contextlib.suppress(Exception):  # the machine may end with any error, as its callers know
        assert isinstance(run(program), (Object, Global, dict, list))


@pytest.mark.parametrize("protocol", range(6))
def test_code_without_weights_is_named(tmp_path, canary, protocol):
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"w": Evil(canary)}, protocol))
    message, tip = refusal(tmp_path / "a.pt")
    assert message == (
        "a.pt is a pickle with code in it and without weights (it calls"
        f" '{os.system.__module__}.system'); nothing of it was executed."
    )
    assert tip.startswith("Do not load it.")


def test_data_classes_of_the_standard_library_are_no_code(tmp_path):
    torch.save(argparse.Namespace(lr=1), tmp_path / "a.pt")
    message, _ = refusal(tmp_path / "a.pt")
    assert "code" not in message


def test_names_from_a_file_stay_on_one_line(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"\x80\x04\x8c\x07a\n\x1b[2Jb\x8c\x01c\x93)R.")
    message, _ = refusal(tmp_path / "a.pt")
    assert message == (
        "a.pt contains an object of the class a??[2Jb.c, which was not made; expected a state dict."
    )


@pytest.mark.parametrize("trust", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_plain_pickles_that_attack_are_refused(tmp_path, canary, name, trust):
    (tmp_path / "a.pt").write_bytes(attacks(canary)[name])
    refusal(tmp_path / "a.pt", trust_pickle=trust)


def replaced(content: bytes, program: bytes) -> bytes:
    """A file by torch.save with another ``data.pkl``."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(file, "w") as new,
    ):
        for name in old.namelist():
            new.writestr(name, program if name.endswith("data.pkl") else old.read(name))
    return file.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_torch_files_that_attack_are_refused(tmp_path, net, canary, name):
    torch.save(net.state_dict(), tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(replaced(content, attacks(canary)[name]))
    refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_beside_an_attack_are_read(tmp_path, net, canary, zipped, protocol):
    saved = {"state_dict": net.state_dict(), "x": Evil(canary)}
    path = tmp_path / "a.pt"
    torch.save(saved, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    assert_same(read_checkpoint(path).tensors, net.state_dict())
    # neither does trust run anything, as the weights are not a module's
    assert_same(read_checkpoint(path, trust_pickle=True).tensors, net.state_dict())
    assert not canary.exists()
    torch.load(path, weights_only=False)  # the object does create the file when it is loaded
    assert canary.exists()
    canary.unlink()


def test_the_metadata_of_a_distributed_checkpoint_runs_nothing(tmp_path, canary):
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / ".metadata").write_bytes(pickle.dumps(Evil(canary)))
    message, _ = refusal(tmp_path / "step")
    assert "is not the metadata of a distributed checkpoint" in message


# ---- tensors that lie ----------------------------------------------------------------------------


def tensor_program(size, stride, offset=0, *, kind="FloatStorage", key="0", count=10) -> bytes:
    """The pickle of ``{"w": tensor}`` for a tensor that is described by these numbers."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return value.pid if isinstance(value, Pid) else None

    class Pid:
        pid = ("storage", getattr(torch, kind), key, "cpu", count)

    call = Reduced(torch._utils._rebuild_tensor_v2, (Pid(), offset, size, stride, False, {}))
    file = io.BytesIO()
    Pickler(file, 2).dump({"w": call})
    return file.getvalue()


LYING = {
    "too large": ((11,), (1,), 0),
    "too far": ((10,), (1,), 1),
    "a large stride": ((2,), (10,), 0),
    "a negative stride": ((2,), (-1,), 5),
    "a negative offset": ((2,), (1,), -1),
    "a negative size": ((-1,), (1,), 0),
    "a stride of 0": ((10**12,), (0,), 0),
    "an overflow": ((2**32, 2**32), (1, 1), 0),
    "a large overflow": ((2**61, 2), (2**61, 2**61), 0),
    "different lengths": ((2, 2), (1,), 0),
    "a size that is no number": (("2",), (1,), 0),
    "a size that is a truth value": ((True,), (1,), 0),
    "too many dimensions": ((1,) * 100, (1,) * 100, 0),
}


@pytest.mark.parametrize("name", LYING)
def test_tensors_that_lie(tmp_path, name):
    torch.save({"w": torch.arange(10.0)}, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(replaced(content, tensor_program(*LYING[name])))
    message, _ = refusal(tmp_path / "a.pt")
    assert message.startswith("a.pt contains 'w', which cannot be read: ")


STORAGES = {
    "missing": ({"key": "7"}, "its storage data/7 is missing"),
    "outside": ({"key": "../../etc/passwd"}, "its storage data/../../etc/passwd is missing"),
    "the pickle": ({"key": "../data.pkl"}, "its storage data/../data.pkl is missing"),
    "a number": ({"key": 0}, "it is a tensor with an unknown storage"),
    "too long": ({"count": 11}, "its storage data/0 has 40 bytes, expected 44"),
    "too short": ({"count": 9}, "its storage data/0 has 40 bytes, expected 36"),
    "another dtype": (
        {"kind": "DoubleStorage"}, "its storage data/0 has 40 bytes, expected 80"
    ),
    "huge": ({"count": 2**62}, f"its storage data/0 has 40 bytes, expected {2**64}"),
}  # fmt: skip


@pytest.mark.parametrize("name", STORAGES)
def test_storages_that_lie(tmp_path, name):
    options, flaw = STORAGES[name]
    torch.save({"w": torch.arange(10.0)}, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    program = tensor_program((2,), (1,), **options)
    (tmp_path / "a.pt").write_bytes(replaced(content, program))
    assert refusal(tmp_path / "a.pt")[0] == f"a.pt contains 'w', which cannot be read: {flaw}."


@pytest.mark.parametrize(
    "state",
    [
        (1, (10**9,), np.dtype("f4"), False, b"1234"),
        (1, (-1,), np.dtype("f4"), False, b"1234"),
        (1, (1,), np.dtype("O"), False, [1]),
        (1, (1,), "f4", False, b"1234"),
        (1, (1,), np.dtype("f4"), False, 4),
        "nothing",
    ],
)
def test_arrays_that_lie(tmp_path, state):
    array = Reduced(np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), state)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"w": array}))
    assert refusal(tmp_path / "a.pkl")[0].startswith("a.pkl contains a dictionary without tensors")


# ---- memory and time -----------------------------------------------------------------------------


def doubled(depth: int) -> bytes:
    """A tuple of 2^depth leaves in a few bytes, as the key of a dictionary."""
    return b"\x80\x02}K\x01\x85" + b"q\x00h\x00\x86" * depth + b"K\x01s."


BOMBS = {
    "a key of 2^60 leaves": doubled(60),
    "a key that is nested 100000 times": b"\x80\x02}K\x01" + b"\x85" * 100_000 + b"K\x01s.",
    "a set of such": b"\x80\x04\x8f(K\x01" + b"\x85" * 100_000 + b"\x90.",
    "bytes that are claimed": b"\x80\x05\x8e" + struct.pack("<Q", 2**50) + b"x.",
    "a bytearray that is claimed": b"\x80\x05\x96" + struct.pack("<Q", 2**50) + b"x.",
    "a frame that is claimed": b"\x80\x04\x95" + struct.pack("<Q", 2**50) + b"x",
    "a range": b"\x80\x02cbuiltins\nlist\ncbuiltins\nrange\nJ\xff\xff\xff\x7f\x85R\x85R.",
    "a length": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "one list copied 100000 times": b"\x80\x02]q\x00(" + b"K\x01" * 10_000 + b"e0("
    + b"cbuiltins\nlist\nh\x00\x85R" * 100_000 + b"l.",
    "a number of many digits": b"\x80\x02L" + b"9" * 60_000 + b"L\n.",
    "nested lists": b"\x80\x02" + b"]" * 500_000 + b"a" * 499_999 + b".",
    "instructions": b"\x80\x02" + b"N0" * 2_600_000 + b".",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_memory_and_time_are_bounded(tmp_path, name):
    (tmp_path / "a.pkl").write_bytes(BOMBS[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(tmp_path / "a.pkl")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kilobytes


def test_a_module_that_contains_itself(tmp_path):
    net = Net()
    torch.save(net, tmp_path / "a.pt")
    net._modules["2"] = net
    torch.save(net, tmp_path / "a.pt")
    read = read_checkpoint(tmp_path / "a.pt")
    assert len(read.tensors) > 7
    assert max(name.count(".") for name in read.tensors) <= 101


def test_a_wrapper_that_wraps_itself(tmp_path):
    wrapper = torch.nn.DataParallel(Net())
    wrapper.register_buffer("own", torch.ones(2))
    wrapper._modules["module"] = wrapper
    torch.save(wrapper, tmp_path / "a.pt")
    assert "own" in read_checkpoint(tmp_path / "a.pt").tensors


def test_modules_that_share_without_limit(tmp_path):
    module = Net()
    for _ in range(60):
        outer = torch.nn.Module()
        outer._modules = {"a": module, "b": module}
        module = outer
    torch.save(module, tmp_path / "a.pt")
    assert len(read_checkpoint(tmp_path / "a.pt").tensors) < 1_000_000


def test_containers_that_share_without_limit(tmp_path):
    value: object = {f"w{i}": torch.ones(1) for i in range(1000)}
    for _ in range(3):
        value = {f"k{i}": value for i in range(1000)}
    torch.save({"model": Net().state_dict(), "x": value}, tmp_path / "a.pt")
    assert read_checkpoint(tmp_path / "a.pt").key == "model"


@pytest.mark.parametrize("kind", ["gz", "zip"])
def test_compressed_bombs(tmp_path, kind):
    if kind == "gz":
        (tmp_path / "a").write_bytes(gzip.compress(bytes(50_000_000)))
    else:
        with zipfile.ZipFile(tmp_path / "a", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.pt", bytes(50_000_000))
    message, _ = refusal(tmp_path / "a")
    assert "a contains more than " in message


# ---- damage at random ----------------------------------------------------------------------------


def originals(folder: Path) -> dict[str, bytes]:
    """Small files of every container."""
    state = Net().state_dict()
    saved = {"model": state, "optimizer": {"lr": 0.1}, "best": np.float64(1), "m": Net()}
    files = {}
    for name, zipped in (("zip", True), ("legacy", False)):
        torch.save(saved, folder / name, _use_new_zipfile_serialization=zipped)
        files[name] = (folder / name).read_bytes()
    save_file(state, folder / "safetensors")
    files["safetensors"] = (folder / "safetensors").read_bytes()
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    for protocol in (0, 2, 4, 5):
        files[f"pickle {protocol}"] = pickle.dumps({"model": arrays, "x": Path("x")}, protocol)
    files["pickled tensors"] = pickle.dumps(state)
    files["tar"] = tar_of(state)
    files["gz"] = gzip.compress(files["zip"])
    files["data.pkl"] = zipfile.ZipFile(folder / "zip").read("zip/data.pkl")
    return files


def damaged(content: bytes, dice: random.Random) -> bytes:
    """The content with one kind of damage."""
    data, where = bytearray(content), dice.randrange(len(content))
    kind = dice.randrange(6)
    if kind == 0:
        return bytes(data[:where])
    if kind == 1:
        data[where] ^= 1 << dice.randrange(8)
    elif kind == 2:
        for _ in range(dice.randrange(1, 20)):
            data[dice.randrange(len(data))] = dice.randrange(256)
    elif kind == 3:
        del data[where : where + dice.randrange(1, 50)]
    elif kind == 4:
        data[where:where] = dice.randbytes(dice.randrange(1, 50))
    else:  # an instruction of a pickle, or the length that it claims
        codes = b"".join(opcode.code.encode("latin1") for opcode in pickletools.opcodes)
        data[where : where + 4] = bytes(dice.choice([*codes, 0, 255]) for _ in range(4))
    return bytes(data)


def outcome(path: Path, what: str) -> bool:
    """Whether a damaged file is refused; it must not end in any other way than with tensors."""
    try:
        read = read_checkpoint(path)
    except CheckpointError as error:
        return "\n" not in str(error) + error.tip
    except Exception as error:
        raise AssertionError(f"{what} raised {error!r}") from error
    assert all(isinstance(tensor, torch.Tensor) for tensor in read.tensors.values())
    return False


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in damaged text
def test_damage_only_ever_leads_to_a_refusal_or_to_tensors(tmp_path):
    files, dice, refused = originals(tmp_path), random.Random(13), 0
    for i in range(FUZZ):
        name = dice.choice(list(files))
        content = damaged(files[name], dice)
        if name == "data.pkl":
            content = replaced(files["zip"], content)
        (tmp_path / "a").write_bytes(content)
        refused += outcome(tmp_path / "a", f"damage {i} of {name}")
    assert FUZZ / 4 < refused < FUZZ


@pytest.mark.filterwarnings("ignore")  # torch warns that there is no process group
def test_damage_of_a_distributed_checkpoint(tmp_path):
    folder = tmp_path / "step"
    distributed.save({"model": Net().state_dict()}, checkpoint_id=folder)
    dice = random.Random(14)
    for i in range(FUZZ // 4):
        path = dice.choice(sorted(folder.iterdir()))
        content = path.read_bytes()
        path.write_bytes(damaged(content, dice))
        outcome(folder, f"damage {i} of {path.name}")
        path.write_bytes(content)
