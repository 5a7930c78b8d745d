"""Training runs and the commands on a GPU where PyTorch finds one, else on the CPU.

Like the tests of ``test_devices.py``, ``benchmarks/gpu.py`` runs them on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainable import Still, StopAfter, save_images, save_network

from pathconvert.cli import run
from pathconvert.networks.loading import open_network
from pathconvert.training.run import begin as finetune
from pathconvert.training.settings import Settings

pytestmark = pytest.mark.device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = ("--arch", "trainable:Still", "--input-size", "3x12x12")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return save_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return save_network(tmp_path_factory.mktemp("weights") / "still.pt", Still)


def _settings(images: Path, **changes: Any) -> Settings:
    return Settings(data=str(images), batch_size=8, epochs=2, lr=0.02, workers=0, **changes)


def test_a_run_of_the_cpu_goes_on_here(
    weights: Path, images: Path, tmp_path: Path, measured
) -> None:
    """Begun on the CPU, left in its second epoch, resumed here.

    It ends where one that stayed on the CPU does.
    """
    network = open_network(weights, arch="trainable:Still", input_size=(3, 12, 12))
    chosen = _settings(images, momentum=0.9, ema=0.8, checkpoint_minutes=1e-9)
    whole = finetune.begin(network, chosen, tmp_path / "whole", device="cpu")
    whole.train()
    begun = finetune.begin(network, chosen, tmp_path / "run", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        begun.train(StopAfter(9))
    resumed = finetune.resume(tmp_path / "run", device=DEVICE)
    assert resumed.position.step == 8
    assert resumed.fabric.device.type == DEVICE
    resumed.train()
    found, expected = (
        {k: v.cpu().double() for k, v in r.learner.raw.state_dict().items()}
        for r in (resumed, whole)
    )
    measured(
        "difference",
        difference := max(float((found[k] - v).abs().max()) for k, v in expected.items()),
    )
    assert difference < 1e-3  # four steps in float32, or in the GPU's TF32


@pytest.mark.gpu
def test_batches_wait_in_pinned_memory(weights: Path, images: Path, tmp_path: Path) -> None:
    network = open_network(weights, arch="trainable:Still", input_size=(3, 12, 12))
    made = finetune.begin(network, _settings(images), tmp_path / "run", device="cuda")
    pixels, labels = next(iter(made._training_batches()))
    assert pixels.is_pinned()
    assert labels.is_pinned()


@pytest.mark.parametrize("amp", ["off", "bf16", pytest.param("fp16", marks=pytest.mark.gpu)])
def test_finetune_evaluate_predict_and_export(
    weights: Path, images: Path, tmp_path: Path, amp: str
) -> None:
    """The commands, one after the other, on this device."""
    folder = tmp_path / "run"
    options = (
        "--epochs",
        "2",
        "--batch-size",
        "8",
        "--amp",
        amp,
        "--channels-last",
        "--workers",
        "2",
    )
    data = ("--data", str(images))
    commands = [
        ("finetune", weights, *SMALL, *data, *options, "--output-dir", folder, "--device", DEVICE),
        ("finetune", "--resume", folder, "--device", DEVICE),
        ("evaluate", folder, *data, "--device", DEVICE),
        ("predict", folder, images / "val" / "red", "--device", DEVICE),
        ("export", folder, "-o", tmp_path / "run.onnx"),
        ("bench", folder, "--batch", "1", "--repeats", "2", "--device", DEVICE),
    ]
    for command in commands:
        assert run([str(word) for word in command]) == 0, command


@pytest.mark.gpu
def test_finetune_compiled(weights: Path, images: Path, tmp_path: Path) -> None:
    arguments = (
        "finetune",
        weights,
        *SMALL,
        "--data",
        images,
        "--epochs",
        1,
        "--batch-size",
        8,
        "--compile",
    )
    options = ("--amp", "bf16", "--output-dir", tmp_path / "run", "--device", "cuda")
    assert run([str(word) for word in (*arguments, *options)]) == 0
