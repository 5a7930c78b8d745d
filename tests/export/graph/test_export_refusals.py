"""Exports that are refused: networks, sizes and places."""

import os
from pathlib import Path

import pytest
from sample_networks import randomise
from small_export import X
from torch import nn

from pathconvert.errors import OutputError, PathconvertError
from pathconvert.export.graph import preparation
from pathconvert.export.graph.export import export_onnx


def test_what_is_no_single_tensor_is_refused(refused):
    class Detector(nn.Module):
        def forward(self, x):
            return [{"boxes": x}]

    with pytest.raises(
        PathconvertError,
        match=r"^Detector takes a list, not one tensor: detectors are not exported",
    ):
        export_onnx(Detector(), "x.onnx", [X[0]])
    message = "Detector returns a list, not one tensor or a dictionary with the key 'out'"
    refused(PathconvertError, message, Detector())


def test_a_network_of_2_gb_is_refused(refused, small, monkeypatch):
    monkeypatch.setattr(preparation, "LARGEST_FILE", 1000)
    message = "the weights take 0.0 GB, but one .onnx file holds less than 2 GB"
    refused(PathconvertError, message, small)


def test_control_flow_that_depends_on_numbers_is_refused(tmp_path):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            y = self.conv(x)
            return y if bool((y.sum() > 0).item()) else -y

    with pytest.raises(PathconvertError):
        export_onnx(randomise(Branching()), tmp_path / "x.onnx", X)
    assert os.listdir(tmp_path) == []


def test_outputs_that_may_not_be_written(small, tmp_path):
    (tmp_path / "there.onnx").write_text("")
    (tmp_path / "dir.onnx").mkdir()
    for name, message in {
        "x.pt": "has the suffix '.pt'; expected .onnx.",
        "there.onnx": "exists already.",
        "dir.onnx": "is a directory; expected the name of a file.",
        "no/x.onnx": "does not exist.",
    }.items():
        with pytest.raises(OutputError) as caught:
            export_onnx(small, tmp_path / name, X)
        assert str(caught.value).endswith(message)


def test_a_full_disk_and_a_folder_that_is_not_writable(small, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OutputError, match=r"x.onnx was not written: disk full: "):
            export_onnx(small, tmp_path / "x.onnx", X)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(OutputError, match="is not writable"):
        export_onnx(small, tmp_path / "x.onnx", X)
    assert os.listdir(tmp_path) == []
