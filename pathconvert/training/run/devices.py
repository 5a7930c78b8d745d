"""The devices, the precision and the processes of a run."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers.tensorboard import TensorBoardLogger

from pathconvert.choices import TrainingDevice
from pathconvert.errors import TrainingError
from pathconvert.training.run.folder import RunFolder
from pathconvert.training.settings import Settings


def make_fabric(
    settings: Settings, device: TrainingDevice, folder: RunFolder | None = None
) -> Fabric:
    """Set up devices, precision and processes.

    The processes are those of the environment that ``torchrun`` sets.

    Args:
        settings: the run's settings.
        device: ``auto``, ``cuda`` or ``cpu``.
        folder: where the TensorBoard logs go; None for no logs.

    Raises:
        TrainingError: there is no GPU and one was asked for, fp16 is asked for on the CPU, or the
            batch size is not a multiple of the number of processes.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise TrainingError(
            "--device cuda: torch finds no usable GPU", "Leave --device out to train on the CPU."
        )
    accelerator = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    local, world = (int(os.environ.get(name, 1)) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    precision: Any = {"off": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[settings.amp]
    if accelerator == "cpu" and settings.amp == "fp16":
        raise TrainingError("--amp fp16 needs a GPU", "On the CPU, give --amp bf16 or --amp off.")
    if settings.batch_size % world:
        raise TrainingError(
            f"--batch-size {settings.batch_size} cannot be divided among {world} processes",
            f"Give a multiple of {world}.",
        )
    return Fabric(
        accelerator=accelerator,
        devices=local,
        num_nodes=world // local,
        strategy="ddp" if world > 1 else "auto",
        precision=precision,
        loggers=TensorBoardLogger(folder.path, name="", version="tensorboard") if folder else None,
    )
