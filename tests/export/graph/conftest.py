"""Fixtures of the exports' tests."""

import os

import pytest
from sample_networks import randomise
from small_export import Small, X
from torch import nn

from pathconvert.export.graph.export import export_onnx


@pytest.fixture
def small() -> nn.Module:
    return randomise(Small()).eval()


@pytest.fixture
def refused(tmp_path):
    """A function that exports, checks the error's message and that there is no file, and returns
    the error.
    """

    def check(kind, message, model, *arguments, **options):
        with pytest.raises(kind) as caught:
            export_onnx(model, tmp_path / "x.onnx", *(arguments or (X,)), **options)
        assert str(caught.value) == message
        assert os.listdir(tmp_path) == []
        return caught.value

    return check
