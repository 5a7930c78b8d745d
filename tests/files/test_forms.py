"""Every form of file that training frameworks write: what is taken from it, and what is left.

Each case writes a file with the framework's own writer where that is installed, else by hand with
the same keys and with objects of the same classes, whose modules do not exist when it is read.
"""

import argparse
import bz2
import collections
import contextlib
import datetime
import enum
import functools
import gzip
import hashlib
import io
import lzma
import pickle
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import Net, assert_same, refusal, tar_of
from safetensors.torch import save_file
from torch import nn

from pathconvert.files.checkpoint import read_checkpoint
from pathconvert.files.containers import Container


@contextlib.contextmanager
def foreign(**classes: type) -> Iterator[types.SimpleNamespace]:
    """Classes of a package that can be imported while a file is written, and never after."""
    module = types.ModuleType("a_framework")
    made = {}
    for name, base in classes.items():
        made[name] = type(name, (base,), {"__module__": module.__name__})
        setattr(module, name, made[name])
    sys.modules[module.__name__] = module
    try:
        yield types.SimpleNamespace(**made)
    finally:
        del sys.modules[module.__name__]


class Color(enum.Enum):
    RED = 1


def averaged(net: nn.Module) -> dict:
    return {name: tensor + 1 for name, tensor in net.state_dict().items()}


# ---- what lies beside the weights ----------------------------------------------------------------

BESIDE: dict[str, Callable[[nn.Module], object]] = {
    "numpy scalars": lambda _: {"best": np.float64(0.5), "step": np.int64(3), "m": np.float32(1)},
    "numpy arrays": lambda _: [np.arange(5.0), np.array(["a"]), np.array([{}], dtype=object)],
    "paths": lambda _: Path("runs/x"),
    "dates": lambda _: datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    "enums": lambda _: Color.RED,
    "partial": lambda _: functools.partial(torch.optim.SGD, lr=0.1),
    "defaultdict": lambda _: collections.defaultdict(list, a=[1]),
    "counter": lambda _: collections.Counter("abc"),
    "optimizer": lambda net: torch.optim.Adam(net.parameters()),
    "scheduler": lambda net: torch.optim.lr_scheduler.StepLR(
        torch.optim.SGD(net.parameters(), 0.1), 3
    ),
    "loss module": lambda _: nn.CrossEntropyLoss(weight=torch.ones(3)),
    "random state": lambda _: (torch.get_rng_state(), np.random.default_rng(0).bit_generator.state),
    "namespace": lambda _: argparse.Namespace(lr=0.1, device=torch.device("cpu")),
    "dtype and size": lambda _: [torch.float16, torch.Size([3])],
    "set and slice": lambda _: [{1, 2}, frozenset("a"), slice(1, 2), complex(1, 2), b"x"],
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("beside", BESIDE)
def test_what_lies_beside_the_weights_is_no_hindrance(tmp_path, net, beside, zipped, protocol):
    saved = {"epoch": 3, "beside": BESIDE[beside](net), "state_dict": net.state_dict()}
    torch.save(
        saved,
        tmp_path / "a.pt",
        _use_new_zipfile_serialization=zipped,
        pickle_protocol=protocol,
    )
    read = read_checkpoint(tmp_path / "a.pt")
    assert (read.key, read.others, read.module) == ("state_dict", (), None)
    assert read.container is (Container.ZIP if zipped else Container.LEGACY)
    assert_same(read.tensors, net.state_dict())


def test_objects_of_packages_that_are_not_installed(tmp_path, net):
    with foreign(DictConfig=dict, HistoryBuffer=object, Callback=list, Config=object) as package:
        config = package.Config()
        config.__dict__ = {"_content": package.DictConfig(lr=0.1), "deep": [package.Callback([1])]}
        history = package.HistoryBuffer()
        history._history = np.arange(4.0)
        saved = {
            "meta": {"cfg": config},
            "message_hub": {"log_scalars": {"loss": history}},
            "state_dict": net.state_dict(),
        }
        torch.save(saved, tmp_path / "a.pth")
    read = read_checkpoint(tmp_path / "a.pth")
    assert (read.key, read.others) == ("state_dict", ())
    assert_same(read.tensors, net.state_dict())


# ---- keys ----------------------------------------------------------------------------------------

KEYS = {
    "the ImageNet example": (
        lambda net: {"epoch": 1, "arch": "resnet18", "state_dict": net.state_dict(),
                     "best_acc1": torch.tensor(70.0)},
        "state_dict", (), {"arch": "resnet18"},
    ),
    "torchvision": (
        lambda net: {"model": net.state_dict(), "args": argparse.Namespace(model="resnet18"),
                     "optimizer": torch.optim.Adam(net.parameters()).state_dict(),
                     "model_ema": averaged(net)},
        "model", ("model_ema",), {"arch": "resnet18"},
    ),
    "timm": (
        lambda net: {"arch": "resnet18", "state_dict": net.state_dict(), "metric": np.float64(7),
                     "state_dict_ema": averaged(net), "args": argparse.Namespace(x=1)},
        "state_dict", ("state_dict_ema",), {"arch": "resnet18"},
    ),
    "Lightning": (
        lambda net: {"state_dict": {f"model.{n}": t for n, t in net.state_dict().items()},
                     "hyper_parameters": {"arch": "resnet18"}, "callbacks": {"x": torch.ones(2)},
                     "loops": {"fit": {"w": torch.ones(2)}}, "optimizer_states": [{"state": {}}]},
        "state_dict", (), {"arch": "resnet18"},
    ),
    "teacher and student": (
        lambda net: {"teacher": averaged(net), "student": net.state_dict()},
        "student", ("teacher",), None,
    ),
    "unknown keys, the largest first": (
        lambda net: {"small": {"w": torch.ones(2)}, "large": net.state_dict()},
        "large", ("small",), None,
    ),
    "a curve beside an unknown key": (
        lambda net: {"curve": torch.ones(9), "gen": {"best": {"w": net.state_dict()}}},
        "gen.best.w", (), None,
    ),
    "BasicSR": (
        lambda net: {"params_ema": averaged(net), "params": net.state_dict()},
        "params", ("params_ema",), None,
    ),
    "DeepSpeed": (
        lambda net: {"module": net.state_dict(), "optimizer": None, "param_shapes": [{}]},
        "module", (), None,
    ),
    "EMA within": (
        lambda net: {"ema": {"decay": 0.9, "state_dict": net.state_dict()}},
        "ema.state_dict", (), None,
    ),
    "a tuple": (
        lambda net: (net.state_dict(), {"state": {}, "param_groups": []}), "0", (), None,
    ),
    "metrics beside the weights": (
        lambda net: {"loss": {"curve": torch.ones(9999)}, "my_net": net.state_dict()},
        "my_net", (), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", KEYS)
def test_which_state_dict_is_taken(tmp_path, net, form):
    make, key, others, config = KEYS[form]
    torch.save(make(net), tmp_path / "a.pt")
    read = read_checkpoint(tmp_path / "a.pt")
    assert (read.key, read.others, read.config) == (key, others, config)
    expected = {name.removeprefix("model."): tensor for name, tensor in read.tensors.items()}
    assert_same(expected, net.state_dict())
    for other in others:
        assert read_checkpoint(tmp_path / "a.pt", key=other).key == other


def test_a_key_of_what_is_never_taken_by_itself(tmp_path, net):
    torch.save({"model": net.state_dict(), "criterion": {"w": torch.ones(2)}}, tmp_path / "a.pt")
    assert read_checkpoint(tmp_path / "a.pt").others == ()
    assert list(read_checkpoint(tmp_path / "a.pt", key="criterion").tensors) == ["w"]


# ---- modules -------------------------------------------------------------------------------------


class Shared(nn.Module):
    """A module with all that a state dict treats in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
        self.again = self.body  # one module under two names
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        self.register_parameter("none", None)
        self.scale = nn.Parameter(torch.ones(1))


MODULES = {
    "a module": lambda module: (module, None, ""),
    "under a key": lambda module: ({"epoch": 1, "model": module}, "model", ""),
    "data parallel": lambda module: (nn.DataParallel(module), None, "module."),
    "a learner": lambda module: (argparse.Namespace(model=module, lr=1), "model", ""),
}


@pytest.mark.filterwarnings("ignore")  # torch warns that it cannot save the source of the class
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("form", MODULES)
def test_modules_are_read_as_their_state_dict_without_their_class(tmp_path, form, zipped):
    with foreign(Shared=Shared) as package:
        module = package.Shared()
        expected = module.state_dict()
        saved, key, prefix = MODULES[form](module)
        torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(tmp_path / "a.pt")
    assert list(read.tensors) == list(expected)
    assert_same(read.tensors, expected)
    assert (read.key, read.prefix, read.module) == (key, prefix, "a_framework.Shared")
    assert read.trusted is None
    message, _ = refusal(tmp_path / "a.pt", trust_pickle=True)
    assert message.startswith("a.pt is a pickled module whose code is missing here: ")


@pytest.mark.parametrize("form", MODULES)
def test_a_trusted_module_is_loaded_itself(tmp_path, net, form):
    net[0].stride = (2, 2)  # which its tensors do not show
    saved, _, _ = MODULES[form](net)
    torch.save(saved, tmp_path / "a.pt")
    read = read_checkpoint(tmp_path / "a.pt", trust_pickle=True)
    assert type(read.trusted) is Net
    assert read.trusted[0].stride == (2, 2)
    assert_same(read.tensors, net.state_dict())
    assert read.module == f"{Net.__module__}.Net"


def test_a_trusted_module_in_a_plain_pickle(tmp_path, net):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": net}))
    read = read_checkpoint(tmp_path / "a.pkl", trust_pickle=True)
    assert_same(read.tensors, net.state_dict())
    assert type(read.trusted) is Net


def test_trust_runs_nothing_for_a_state_dict(tmp_path, net, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    torch.save(net.state_dict(), tmp_path / "a.pt")
    assert read_checkpoint(tmp_path / "a.pt", trust_pickle=True).trusted is None


# ---- containers ----------------------------------------------------------------------------------


def bytes_of(value: object, **options: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def zip_of(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return file.getvalue()


def compressed_again(content: bytes) -> bytes:
    """A file by torch.save whose members were unpacked and packed again."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return file.getvalue()


def arrays(state: dict) -> dict:
    return {name: tensor.numpy() for name, tensor in state.items()}


CONTAINERS = {
    "zip": ("a.pt", bytes_of, "zip"),
    "legacy": ("a.pth", lambda s: bytes_of(s, _use_new_zipfile_serialization=False), "legacy"),
    "tar": ("a.pt", tar_of, "tar"),
    "named safetensors": ("a.safetensors", bytes_of, "zip"),
    "bin": ("pytorch_model.bin", bytes_of, "zip"),
    "pth.tar": ("model_best.pth.tar", bytes_of, "zip"),
    "ckpt": ("last.ckpt", lambda s: bytes_of({"state_dict": s}), "zip"),
    "Detectron2": ("R-50.pkl", lambda s: pickle.dumps({"model": arrays(s)}), "pickle"),
    "Caffe2": ("x.pkl", lambda s: pickle.dumps({"blobs": arrays(s)}, 2), "pickle"),
    "text pickle": ("x.pkl", lambda s: pickle.dumps(arrays(s), 0), "pickle"),
    "protocol 5": ("x.pkl", lambda s: pickle.dumps(arrays(s), 5), "pickle"),
    "pickled tensors": ("x.pkl", lambda s: pickle.dumps(s), "pickle"),
    "compressed again": ("a.pt", lambda s: compressed_again(bytes_of(s)), "zip"),
    "in a zip": ("a.zip", lambda s: zip_of(readme__txt=b"x", a__pth=bytes_of(s)), "zip"),
    "gz": ("a.pth.gz", lambda s: gzip.compress(bytes_of(s)), "zip"),
    "bz2": ("a.pth.bz2", lambda s: bz2.compress(bytes_of(s)), "zip"),
    "xz": ("a.pth.xz", lambda s: lzma.compress(bytes_of(s)), "zip"),
    "gz of a pickle": ("a.pkl.gz", lambda s: gzip.compress(pickle.dumps(arrays(s))), "pickle"),
}


@pytest.mark.parametrize("form", CONTAINERS)
def test_containers(tmp_path, net, form):
    name, write, container = CONTAINERS[form]
    (tmp_path / name).write_bytes(write(net.state_dict()))
    read = read_checkpoint(tmp_path / name)
    assert_same(read.tensors, net.state_dict())
    assert read.container == container
    assert read.module is None
    assert read.sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_safetensors_under_another_name_and_in_a_zip(tmp_path, net):
    save_file(net.state_dict(), tmp_path / "a.bin")
    content = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "b.zip").write_bytes(zip_of(model__safetensors=content, config__json=b"{}"))
    for name in ("a.bin", "b.zip"):
        read = read_checkpoint(tmp_path / name)
        assert_same(read.tensors, net.state_dict())
        assert read.container is Container.SAFETENSORS


def test_big_endian_files_and_arrays(tmp_path):
    values = torch.arange(6.0).reshape(2, 3)
    content = bytes_of({"w": values})
    swapped = values.numpy().astype(">f4").tobytes()
    big = content.replace(values.numpy().tobytes(), swapped).replace(b"little", b"big")
    # the member has become three bytes shorter, so that it is packed anew
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(file, "w") as new,
    ):
        for name in old.namelist():
            parts = {"data/0": swapped, "byteorder": b"big"}
            new.writestr(name, parts.get(name.partition("/")[2], old.read(name)))
    assert len(big) < len(content)
    (tmp_path / "a.pt").write_bytes(file.getvalue())
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"w": values.numpy().astype(">f4")}))
    for name in ("a.pt", "a.pkl"):
        assert torch.equal(read_checkpoint(tmp_path / name).tensors["w"], values)


def test_tied_and_strided_tensors(tmp_path):
    big = torch.arange(1000.0).reshape(100, 10)
    state = {"w": big, "tied": big, "t": big[:3].t(), "row": big[2], "e": torch.ones(1).expand(4)}
    for zipped in (True, False):
        torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        read = read_checkpoint(tmp_path / "a.pt").tensors
        assert_same(read, state)
        assert read["w"].data_ptr() == read["tied"].data_ptr()


def test_the_rest_of_a_large_file_is_released(tmp_path):
    saved = {"model": {"w": torch.ones(10)}, "optimizer": {"state": {0: torch.ones(10_000)}}}
    torch.save(saved, tmp_path / "a.pt")
    assert read_checkpoint(tmp_path / "a.pt").tensors["w"].untyped_storage().nbytes() == 40
