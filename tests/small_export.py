"""A small network to export, its input, and what is in a written file."""

import onnx
import onnxruntime as ort
import torch
import torch.nn.functional as F
from torch import nn

from pathconvert.networks.preprocessing import Preprocessing

X = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
IMAGENET = Preprocessing(18, (16, 16), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Small(nn.Module):
    """A small network with every kind of node that matters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.left = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        )
        self.right = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(self.left(x) + self.right(x))
        return self.fc(x.mean([2, 3]))


def ops(path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def ort_run(path, x):
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {"input": x.numpy()})]
