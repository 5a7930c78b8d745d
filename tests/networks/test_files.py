"""Save and load networks through the Python API, and check what ``import pathconvert`` imports."""

import dataclasses
import hashlib
import json
import subprocess
import sys

import pytest
import torch
import torchvision
from command_line import change_metadata
from sample_networks import network
from torch import nn

import pathconvert
from pathconvert import cli
from pathconvert.errors import ArchitectureError, CheckpointError, OutputError, RecordError
from pathconvert.networks.loading import open_network

BUILDER = """
from torch import nn

class Small(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
"""


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def small(tmp_path, monkeypatch) -> nn.Module:
    """A network of a class that torchvision does not have: ``files_test_nets:Small``."""
    (tmp_path / "files_test_nets.py").write_text(BUILDER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "files_test_nets", raising=False)
    torch.manual_seed(0)
    return __import__("files_test_nets").Small().eval()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    assert list(a.state_dict()) == list(b.state_dict())
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_the_api_of_the_issue(tmp_path, image, suffix):
    model = network("resnet18")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    c = pathconvert.reparameterize(
        model, image, scope="block", pivot="matching", gauge="unit", partial=False
    )  # fmt: skip
    assert type(c.model) is type(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for group in c.groups:
        assert group.scales.shape == (group.size,)
        assert group.scales.dtype == "float64"
        assert len(group.pivots) == group.size
        assert group.pinned_by is None or (group.scales == 1).all()
    assert json.loads(json.dumps(c.record)) == c.record
    restored = pathconvert.restore(c.model, c.record)
    report = pathconvert.verify(model, restored, image)
    assert report.passed
    assert (report.max_abs, report.max_rel, report.noise_ratio) >= (0, 0, 0)
    assert isinstance(report.bit_identical, bool)
    path = tmp_path / f"x.path.{suffix}"
    assert pathconvert.save(c, path) == path
    loaded, record = pathconvert.load(path)
    assert record == c.record
    assert isinstance(loaded, torchvision.models.ResNet)
    assert not loaded.training
    assert_same(loaded, c.model)
    assert_same(pathconvert.restore(loaded, record), restored)


def test_plain_checkpoints_load_without_a_record(tmp_path):
    model = network("squeezenet1_1")
    torch.save(model.state_dict(), tmp_path / "x.pt")
    loaded, record = pathconvert.load(tmp_path / "x.pt")
    assert record is None
    assert_same(loaded, model)


def test_a_class_of_ones_own_is_named_at_load(tmp_path, small, image):
    c = pathconvert.reparameterize(small, image)
    path = pathconvert.save(c, tmp_path / "x.safetensors")
    with pytest.raises(ArchitectureError) as caught:
        pathconvert.load(path)
    assert str(caught.value) == f"{path} does not say how to build its network"
    assert (
        caught.value.tip == "Name it: --arch package.module:builder, or pathconvert.load(...,"
        " arch='package.module:builder')."
    )
    loaded, record = pathconvert.load(path, arch="files_test_nets:Small")
    assert type(loaded) is type(small)
    assert record == c.record
    assert_same(loaded, c.model)


def test_what_the_weights_do_not_reveal_is_noted(tmp_path, monkeypatch, capsys):
    """torchvision's weights of GoogLeNet and Inception need ``transform_input``.

    A file of them does not reveal it.
    """
    model = network("googlenet", aux_logits=False, transform_input=True, num_classes=5)
    torch.save(model.state_dict(), tmp_path / "gn.pth")
    plain = open_network(tmp_path / "gn.pth")
    assert not plain.model.transform_input
    assert plain.doubt is not None
    assert "--arch 'googlenet(transform_input=True)'" in plain.doubt
    told = open_network(tmp_path / "gn.pth", arch="googlenet(transform_input=True)")
    assert told.model.transform_input
    assert told.doubt is None
    assert cli.run(["reparam", str(tmp_path / "gn.pth"), "--input-size", "3x64x64"]) == 0
    assert "whether this googlenet transforms its input" in capsys.readouterr().err
    assert open_network(tmp_path / "gn.path.safetensors").doubt is None
    digest = hashlib.sha256((tmp_path / "gn.pth").read_bytes()).hexdigest()
    weights = torchvision.models.GoogLeNet_Weights.IMAGENET1K_V1
    real = dataclasses.replace(weights.value, url=f"https://example.org/googlenet-{digest[:8]}.pth")
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda _: [real])
    assert open_network(tmp_path / "gn.pth").model.transform_input


@pytest.mark.parametrize("transform_input", [True, False])
def test_transform_input_comes_back(tmp_path, image, transform_input):
    """The weights do not reveal it, and it changes the function."""
    model = network("googlenet", aux_logits=False, transform_input=transform_input)
    path = pathconvert.save(pathconvert.reparameterize(model, image), tmp_path / "x.safetensors")
    loaded, _ = pathconvert.load(path)
    assert loaded.transform_input == transform_input
    assert pathconvert.verify(model, loaded, image).passed


def test_settings_that_the_weights_do_not_reveal_are_not_lost(tmp_path, image):
    """A dilated ResNet has the same tensors as the stock one, but its file must not claim to be the
    stock one.
    """
    model = network("resnet50", replace_stride_with_dilation=[False, True, True])
    path = pathconvert.save(pathconvert.reparameterize(model, image), tmp_path / "x.safetensors")
    with pytest.raises(ArchitectureError, match="does not say how to build its network"):
        pathconvert.load(path)


def test_versions(tmp_path, small, image):
    path = pathconvert.save(
        pathconvert.reparameterize(network("squeezenet1_1"), image), tmp_path / "x.safetensors"
    )
    change_metadata(
        path, lambda metadata: metadata.update(format_version=2, tool="pathconvert 9.0")
    )
    with pytest.raises(CheckpointError) as caught:
        pathconvert.load(path)
    assert (
        str(caught.value) == f"{path} has metadata of format version 2; this is pathconvert"
        f" {pathconvert.__version__}, which reads version 1"
    )
    assert caught.value.tip == "Use the version of pathconvert that wrote it: pathconvert 9.0."
    c = pathconvert.reparameterize(small, image)
    with pytest.raises(RecordError) as refused:
        pathconvert.restore(c.model, c.record | {"format_version": 3, "tool": "pathconvert 9.0"})
    assert (
        str(refused.value) == "the conversion record has format version 3; this is pathconvert"
        f" {pathconvert.__version__}, which reads version 1 or 2"
    )


def test_save_keeps_what_is_there(tmp_path, small, image):
    c = pathconvert.reparameterize(small, image)
    path = tmp_path / "x.pt"
    path.write_bytes(b"old")
    with pytest.raises(OutputError, match=r"x\.pt exists already"):
        pathconvert.save(c, path)
    assert path.read_bytes() == b"old"
    pathconvert.save(c, path, force=True)
    assert_same(pathconvert.load(path, arch="files_test_nets:Small")[0], c.model)


def test_import_is_light_and_verify_stays_the_function():
    code = """
import sys, pathconvert
assert "torch" not in sys.modules
assert {"load", "save", "verify", "restore", "reparameterize"} <= set(dir(pathconvert))
import pathconvert.conversion.reparameterize, pathconvert.conversion.equivalence
from pathconvert import verify
assert callable(verify) and callable(pathconvert.verify) and callable(pathconvert.restore)
try:
    pathconvert.nothing
except AttributeError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout, done.stderr) == ("module 'pathconvert' has no attribute 'nothing'\n", "")
