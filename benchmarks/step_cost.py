"""What a training step costs: G-SGD on Path-BN against SGD on BatchNorm, the same network, batch and precision.

    python benchmarks/step_cost.py [--networks resnet50 resnet56] [--rounds 7] [--threads 1] [--batch-50 16]
                                   [--batch-56 64] [--json FILE]

Contenders take turns in one process; medians. *optimizer* is the optimizer's step alone, SGD that of torch with
``foreach``; *path-bn* what Path-BN adds to forward and backward, of the whole step of SGD on BatchNorm. Memory is what
torch's allocator has given out at the highest during a step, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torchvision.models import resnet50
from torchvision.models.resnet import BasicBlock, ResNet

import pathconvert
from pathconvert.training import GSGD, path_parameter_groups


class CifarResNet(ResNet):
    """ResNet-56 for 32×32 images: torchvision's BasicBlocks in stages of 16, 32 and 64 channels."""

    def __init__(self, n: int = 9, num_classes: int = 10) -> None:
        super().__init__(BasicBlock, [1, 1, 1, 1], num_classes=num_classes)
        self.inplanes = 16
        self.conv1, self.bn1, self.maxpool = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.Identity()
        self.layer1 = self._make_layer(BasicBlock, 16, n)
        self.layer2 = self._make_layer(BasicBlock, 32, n, stride=2)
        self.layer3 = self._make_layer(BasicBlock, 64, n, stride=2)
        self.layer4, self.fc = nn.Identity(), nn.Linear(64, num_classes)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {"resnet50": (resnet50, 224), "resnet56": (CifarResNet, 32)}
FORMS = ("sgd+bn", "gsgd+path-bn")


class Contender:
    """One network with its optimizer on a batch of its own random images."""

    def __init__(self, network: str, form: str, batch: int, momentum: float, device: str, compiled: bool) -> None:
        torch.manual_seed(0)
        build, side = NETWORKS[network]
        self.device, self.amp = device, device == "cuda"
        model = build().eval()
        self.x, self.y = torch.randn(batch, 3, side, side), torch.randint(10, (batch,))
        if form == "gsgd+path-bn":
            example = self.x[:2, :, :64, :64] if side > 64 else self.x[:2]
            model = pathconvert.to_path_bn(pathconvert.reparameterize(model, example), example, example)
        model.to(device, memory_format=torch.channels_last if self.amp else torch.contiguous_format).train()
        self.x, self.y = self.x.to(device), self.y.to(device)
        if self.amp:
            self.x = self.x.to(memory_format=torch.channels_last)
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(model.parameters(), lr=1e-6, momentum=momentum, foreach=True)
            if form == "sgd+bn"
            else GSGD(path_parameter_groups(model), lr=1e-6, momentum=momentum, anchor="balanced")
        )
        self.network = model
        self.model: Callable[[Tensor], Tensor] = torch.compile(model) if compiled else model

    def step(self) -> tuple[float, float]:
        """Milliseconds of forward and backward, and of the optimizer's step."""
        begun = self.now()
        self.optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.amp):
            loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        between = self.now()
        self.optimizer.step()
        return 1e3 * (between - begun), 1e3 * (self.now() - between)

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def measure(network: str, batch: int, momentum: float, device: str, compiled: bool, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    contenders = {form: Contender(network, form, batch, momentum, device, compiled) for form in FORMS}
    times: dict[str, list[tuple[float, float]]] = {form: [] for form in FORMS}
    for _ in range(rounds + 2):
        for form, contender in contenders.items():
            times[form].append(contender.step())
    sgd, sgd_step = (statistics.median(column) for column in zip(*times[FORMS[0]][2:], strict=True))
    gsgd, gsgd_step = (statistics.median(column) for column in zip(*times[FORMS[1]][2:], strict=True))
    plain = sgd + sgd_step
    pairs = zip(times[FORMS[1]][2:], times[FORMS[0]][2:], strict=True)
    whole = statistics.median(sum(ours) / sum(theirs) for ours, theirs in pairs)
    first, second = (peak_memory(network, form, batch, momentum, device, compiled) for form in FORMS)
    return {
        "network": network,
        "batch": batch,
        "device": device + (", bf16, channels-last" if device == "cuda" else "") + (", compiled" if compiled else ""),
        "momentum": momentum,
        "SGD+BN, ms": plain,
        "whole step": whole,
        "path-bn": (gsgd - sgd) / plain,
        "optimizer": (gsgd_step - sgd_step) / plain,
        "G-SGD, ms": gsgd_step,
        "SGD, ms": sgd_step,
        "optimizer alone": gsgd_step / sgd_step,
        "memory": second / first,
    }


def peak_memory(network: str, form: str, batch: int, momentum: float, device: str, compiled: bool) -> float:
    """Bytes that the allocator has given out at the highest during a step, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (network, form, batch, momentum, device, compiled))


def _peak(*arguments: Any) -> float:
    torch.set_num_threads(1)
    contender = Contender(*arguments)
    contender.step()  # makes the gradients and the optimizer's buffers
    if contender.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        contender.step()
        return float(torch.cuda.max_memory_allocated())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        contender.step()
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    state = [t for group in contender.optimizer.state.values() for t in group.values() if isinstance(t, Tensor)]
    held = [*contender.network.parameters(), *contender.network.buffers(), *state]  # from before the profile
    given = max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")
    return given + sum(t.numel() * t.element_size() for t in held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-50", type=int, default=16)
    parser.add_argument("--batch-56", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batches = {"resnet50": options.batch_50, "resnet56": options.batch_56}
    runs = [("cpu", False)] + [("cuda", compiled) for compiled in (False, True) if torch.cuda.is_available()]
    rows = [
        measure(network, batches[network], momentum, device, compiled, options.rounds)
        for device, compiled in runs
        for network in options.networks
        for momentum in (0.0, 0.9)
    ]
    table = Table(*rows[0], title="a training step, G-SGD+Path-BN ÷ SGD+BN", title_justify="left")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    console = Console(width=150)
    console.print(table)
    if not torch.cuda.is_available():
        console.print("GPU: not measured")
    if options.json:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "not measured"
        content = {"torch": torch.__version__, "threads": options.threads, "gpu": gpu, "steps": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
