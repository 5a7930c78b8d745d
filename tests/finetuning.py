"""Runs of finetune on the small network of ``trainable``."""

from __future__ import annotations

from pathlib import Path

from pathconvert.networks.loading import open_network
from pathconvert.training.run import begin as finetune
from pathconvert.training.run.loop import Run
from pathconvert.training.settings import Settings

SMALL = ("--arch", "trainable:Small", "--input-size", "3x12x12")


def settings(images: Path, **changes: object) -> Settings:
    common = {
        "data": str(images),
        "batch_size": 8,
        "epochs": 2,
        "lr": 0.05,
        "calibration_images": 32,
    }
    return Settings(**(common | changes))


def begin(weights: Path, folder: Path, chosen: Settings, **options: object) -> Run:
    network = open_network(weights, arch="trainable:Small", input_size=(3, 12, 12))
    return finetune.begin(network, chosen, folder, device="cpu", **options)


def command(*arguments: object) -> list[str]:
    return [str(argument) for argument in arguments]
