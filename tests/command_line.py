"""What the tests of the commands share beside their fixtures (conftest.py)."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pathconvert.files.checkpoint import read_checkpoint

SMALL = ("--input-size", "3x64x64")
STOCK = {
    "squeezenet1_1": {"num_classes": 5},
    "resnet18": {"num_classes": 3},
    "googlenet": {"num_classes": 4, "aux_logits": True},
}


def tensors(path: Path) -> dict:
    return read_checkpoint(path).tensors


def header(path: Path) -> dict:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["pathconvert"])


def change_metadata(path, change) -> None:
    """Let ``change`` alter what pathconvert recorded in a safetensors file."""
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["pathconvert"])
    change(metadata)
    save_file(load_file(path), path, {"pathconvert": json.dumps(metadata)})
