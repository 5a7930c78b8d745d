"""A network small enough to be trained in a test, and images that it can learn to tell apart."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

CLASSES = ("blue", "green", "red")
TESTS = Path(__file__).parent


class Small(nn.Module):
    """Two convolutions, a residual block, dropout; 3 × 12 × 12."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.down, self.down_bn = nn.Conv2d(8, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_bn(self.stem(x)).relu()
        x = self.down_bn(self.down(x)).relu()
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        x = (x + y).relu().mean([2, 3])
        return self.fc(self.drop(x))


class Still(Small):
    """Without dropout, whose chance is a process's own."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__(num_classes)
        self.drop = nn.Identity()


class Plain(nn.Sequential):
    """Convolutions without BatchNorm."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, padding=1), nn.ReLU(),
            nn.Conv2d(8, 8, 3, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(72, num_classes),
        )  # fmt: skip


class HeadFirst(Still):
    """Declares its classifier before what it reads."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__(num_classes)
        self._modules = dict(reversed(self._modules.items()))


def save_network(path: Path, kind: type[nn.Module] = Small, num_classes: int = 3) -> Path:
    """Seeded weights of a network of that kind."""
    torch.manual_seed(0)
    torch.save(kind(num_classes).state_dict(), path)
    return path


def save_images(
    folder: Path, train: int = 16, val: int = 6, classes: tuple[str, ...] = CLASSES
) -> Path:
    """``folder/train`` and ``folder/val``: noise, brighter in one channel.

    So many images a class.
    """
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 160, (12, 12, 3), generator=generator)
                pixels[..., label % 3] += 60
                Image.fromarray(pixels.byte().numpy()).save(folder / part / name / f"{i}.png")
    return folder


class StopAfter:
    """Progress that ends the run after so many batches, as a crash would."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def step(self, *_: object) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def epoch(self, _: object) -> None:
        pass
