"""The same terminal and two threads in all, wherever the tests run.

Fixtures of the commands' tests.

A test that needs a GPU carries the marker ``gpu``: it runs where PyTorch finds one and is skipped
elsewhere, with this reason. ``benchmarks/gpu.py`` runs all of them on a GPU.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import terminal  # noqa: F401 - sets what typer reads when it is imported, below
import torch
from command_line import STOCK
from sample_networks import network

from pathconvert.cli import run

#: One for each of pytest-xdist's two workers.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark PyTorch's device tests of CUDA with ``gpu``, and skip what is marked so where there is
    no GPU.
    """
    for item in items:
        kind = getattr(item, "cls", None)
        if kind is not None and kind.__name__.endswith("CUDA"):
            item.add_marker("gpu")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="PyTorch finds no GPU"))


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Callable[[str, float], None]:
    """Keep a figure of the test that asks, for ``benchmarks/gpu.py``."""
    return record_property


@pytest.fixture(scope="session")
def stock(tmp_path_factory) -> Path:
    """A folder with the state dict of every network of ``STOCK``."""
    folder = tmp_path_factory.mktemp("stock")
    for name, arguments in STOCK.items():
        torch.save(network(name, **arguments).state_dict(), folder / f"{name}.pt")
    return folder


@pytest.fixture
def here(stock, tmp_path, monkeypatch) -> Path:
    """An empty current folder but for ``sq.pt``, a SqueezeNet with 5 classes."""
    shutil.copy(stock / "squeezenet1_1.pt", tmp_path / "sq.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(here, capsys):
    """Run, expect exit code 2, one or two lines on stderr and no new file; the lines."""

    def check(*arguments: object, code: int = 2) -> list[str]:
        before = sorted(os.listdir(here))
        capsys.readouterr()
        assert run([str(argument) for argument in arguments]) == code
        printed = capsys.readouterr()
        lines = printed.err.splitlines()
        assert printed.out == ""
        assert [line.split(":")[0] for line in lines] in (["error"], ["error", "tip"])
        assert sorted(os.listdir(here)) == before
        return lines

    return check
