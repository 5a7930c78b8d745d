"""Fixtures of the tests of images and predictions."""

from __future__ import annotations

import pytest
from onnx_files import save_linear
from pictures import COLOUR
from PIL import Image


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with ``a.png`` of 30 × 20 pixels and ``a.onnx`` of another tool, which takes inputs
    of 3x4x4.
    """
    monkeypatch.chdir(tmp_path)
    save_linear(tmp_path / "a.onnx")
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    return tmp_path
