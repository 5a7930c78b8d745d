"""The demo's network: a stock torchvision ResNet-18 for scikit-learn's 8×8 digits.

It is trained within seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.transforms.v2.functional import normalize, to_pil_image

from pathconvert.errors import PathconvertError
from pathconvert.networks.inputs import IMAGENET_MEAN, IMAGENET_STD

EPOCHS, BATCH, HELD_OUT = 3, 64, 360


def _digits() -> tuple[Tensor, Tensor]:
    """1797 images [N, 3, 32, 32] in [0, 1] and their labels [N], shuffled."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise PathconvertError(
            "the demo needs scikit-learn", "pip install 'pathconvert[demo]'"
        ) from error
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = F.interpolate(images, size=32, mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
    return images[order], torch.from_numpy(digits.target)[order]


def train_digits(path: Path, note: Callable[[str], None]) -> float:
    """Train, save the state dict at ``path``, and return the accuracy on the held-out images."""
    images, labels = _digits()
    images = normalize(images, list(IMAGENET_MEAN), list(IMAGENET_STD))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torchvision.models.resnet18(num_classes=10)
        _train(model, images[HELD_OUT:], labels[HELD_OUT:], note)
    model.eval()
    with torch.no_grad():
        correct = (model(images[:HELD_OUT]).argmax(1) == labels[:HELD_OUT]).double().mean()
    torch.save(model.state_dict(), path)
    return float(correct)


def save_digits(folder: Path, count: int) -> list[Path]:
    """Save the first images of the training set as PNG files, whose names end with the label."""
    images, labels = _digits()
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{i}_{int(labels[i])}.png" for i in range(HELD_OUT, HELD_OUT + count)]
    for i, path in enumerate(paths, HELD_OUT):
        to_pil_image(images[i]).save(path)
    return paths


def save_turned_digits(folder: Path, train: int = 600, val: int = 200) -> Path:
    """Save digits turned by 90°, in ``train/`` and ``val/`` with one folder per class.

    The network was not trained on turned digits, so that fine-tuning on them has something to do.
    """
    images, labels = _digits()
    for part, start, count in (("val", 0, val), ("train", HELD_OUT, train)):
        for i in range(len(images))[start : start + count]:
            place = folder / part / f"digit {int(labels[i])}"
            place.mkdir(parents=True, exist_ok=True)
            to_pil_image(images[i].rot90(1, (1, 2))).save(place / f"{i}.png")
    return folder


def _train(model: nn.Module, images: Tensor, labels: Tensor, note: Callable[[str], None]) -> None:
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=steps)
    for epoch in range(EPOCHS):
        total = 0.0
        for batch in torch.randperm(len(images)).split(BATCH)[: steps // EPOCHS]:
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        note(f"epoch {epoch + 1}/{EPOCHS}: loss {total / (steps // EPOCHS):.3f}")
