"""Pixels that images and networks are tested with, and a network for them."""

from __future__ import annotations

import numpy as np
from sample_networks import network

from pathconvert.networks.architectures import Architecture
from pathconvert.networks.loading import LoadedNetwork


def pixels(*shape: int, top: int = 256, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(3).integers(0, top, shape).astype(dtype)


COLOUR = pixels(20, 30, 3)


def squeezenet(task: str = "classification") -> LoadedNetwork:
    architecture = Architecture("squeezenet1_1", {"num_classes": 1000}, (3, 64, 64), task)
    return LoadedNetwork(network("squeezenet1_1", num_classes=1000), architecture, None, ())
