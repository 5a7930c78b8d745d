"""The small network's weights, images to train it on, and a run that has ended."""

from __future__ import annotations

from pathlib import Path

import pytest
from finetuning import SMALL, command
from trainable import save_images, save_network

from pathconvert.cli import run


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    return save_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    return save_network(tmp_path_factory.mktemp("weights") / "small.pt")


@pytest.fixture(scope="session")
def trained(weights, images, tmp_path_factory) -> Path:
    """The folder that the command left after a run from a plain checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = ("--epochs", 8, "--batch-size", 8, "--lr", "0.08", "--device", "cpu")
    assert (
        run(
            command("finetune", weights, *SMALL, "--data", images, "--output-dir", folder, *options)
        )
        == 0
    )
    return folder
