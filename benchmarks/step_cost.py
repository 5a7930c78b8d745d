"""What a training step costs: G-SGD on Path-BN against SGD on BatchNorm, the same network, batch
and precision.

    python benchmarks/step_cost.py [--networks resnet50 resnet56] [--rounds 7] [--threads 1]
    [--batch-50 16]
                                   [--batch-56 64] [--json FILE]

Contenders take turns in one process; medians. *optimizer* is the optimizer's step alone, SGD that
of torch with ``foreach``; *path-bn* what Path-BN adds to forward and backward, of the whole step of
SGD on BatchNorm. Memory is what torch's allocator has given out at the highest during a step, in a
process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
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

import pathconvert
from pathconvert.training import GSGD, path_parameter_groups

from cifar_resnet import CifarResNet

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet50": (resnet50, 224),
    "resnet56": (CifarResNet, 32),
}
FORMS = ("sgd+bn", "gsgd+path-bn")


@dataclass(frozen=True)
class Workload:
    """What is trained, and how.

    Attributes:
        network: its name.
        build: makes it.
        side: of the square images.
        batch: images per step.
        momentum: of either optimizer.
        device: ``cuda`` (bf16, channels-last) or ``cpu`` (float32).
        compiled: by ``torch.compile``.
    """

    network: str
    build: Callable[[], nn.Module]
    side: int
    batch: int
    momentum: float
    device: str
    compiled: bool

    def title(self) -> str:
        """How, in words."""
        precision = ", bf16, channels-last" if self.device == "cuda" else ""
        return f"{self.device}{precision}{', compiled' if self.compiled else ''}"


class Contender:
    """One network with its optimizer, on a batch of random images of its own."""

    def __init__(self, workload: Workload, form: str) -> None:
        torch.manual_seed(0)
        self.device, self.amp = workload.device, workload.device == "cuda"
        side = workload.side
        model = workload.build().eval()
        self.x, self.y = (
            torch.randn(workload.batch, 3, side, side),
            torch.randint(10, (workload.batch,)),
        )
        if form == "gsgd+path-bn":
            example = self.x[:2, :, :64, :64] if side > 64 else self.x[:2]
            model = pathconvert.to_path_bn(
                pathconvert.reparameterize(model, example), example, example
            )
        model.to(
            self.device, memory_format=torch.channels_last if self.amp else torch.contiguous_format
        ).train()
        self.x, self.y = self.x.to(self.device), self.y.to(self.device)
        if self.amp:
            self.x = self.x.to(memory_format=torch.channels_last)
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(model.parameters(), lr=1e-6, momentum=workload.momentum, foreach=True)
            if form == "sgd+bn"
            else GSGD(
                path_parameter_groups(model), lr=1e-6, momentum=workload.momentum, anchor="balanced"
            )
        )
        self.network = model
        self.model: Callable[[Tensor], Tensor] = (
            torch.compile(model) if workload.compiled else model
        )

    def step(self) -> tuple[Any, Any, Any]:
        """One training step.

        Marks at its beginning, before the optimizer's step, and at its end.
        """
        begun = self._mark()
        self.optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.amp):
            loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        between = self._mark()
        self.optimizer.step()
        return begun, between, self._mark()

    def turn(self, steps: int) -> list[tuple[float, float]]:
        """Milliseconds of forward and backward, and of the optimizer, of steps that follow one
        another at once.
        """
        marks = [self.step() for _ in range(steps)]
        if self.device == "cuda":
            torch.cuda.synchronize()
            return [(a.elapsed_time(b), b.elapsed_time(c)) for a, b, c in marks]
        return [(1e3 * (b - a), 1e3 * (c - b)) for a, b, c in marks]

    def _mark(self) -> Any:
        """A moment of the GPU's, or of the clock on the CPU."""
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def compare(contenders: dict[str, Contender], rounds: int, steps: int = 1) -> dict[str, float]:
    """Both forms in turns: milliseconds, and what the second costs over the first.

    Args:
        contenders: by form, as in :data:`FORMS`.
        rounds: turns of each; two more are left out, in which buffers are made and kernels chosen.
        steps: of a turn; the first in its round is alternately one and the other.
    """
    turns: dict[str, list[list[tuple[float, float]]]] = {form: [] for form in FORMS}
    for i in range(rounds + 2):
        for form in FORMS if i % 2 else reversed(FORMS):
            turns[form].append(contenders[form].turn(steps))
    kept = {form: own[2:] for form, own in turns.items()}
    (sgd, sgd_step), (gsgd, gsgd_step) = (
        (
            statistics.median(column)
            for column in zip(*(step for turn in kept[form] for step in turn), strict=True)
        )
        for form in FORMS
    )
    wholes = {form: [statistics.mean(map(sum, turn)) for turn in own] for form, own in kept.items()}
    ratios = [ours / theirs for theirs, ours in zip(*(wholes[form] for form in FORMS), strict=True)]
    low, whole, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    plain = sgd + sgd_step
    return {
        "SGD+BN, ms": plain,
        "whole step": whole,
        "whole step, low": low,
        "whole step, high": high,
        "path-bn": (gsgd - sgd) / plain,
        "optimizer": (gsgd_step - sgd_step) / plain,
        "G-SGD, ms": gsgd_step,
        "SGD, ms": sgd_step,
        "optimizer alone": gsgd_step / sgd_step,
    }


def measure(workload: Workload, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    found = compare({form: Contender(workload, form) for form in FORMS}, rounds)
    first, second = (peak_memory(workload, form) for form in FORMS)
    row: dict[str, Any] = {
        "network": workload.network,
        "batch": workload.batch,
        "device": workload.title(),
        "momentum": workload.momentum,
    }
    return row | found | {"memory": second / first}


def peak_memory(workload: Workload, form: str) -> float:
    """Bytes that the allocator has given out at the highest during a step, in a process of its
    own.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (workload, form))


def _peak(workload: Workload, form: str) -> float:
    torch.set_num_threads(1)
    contender = Contender(workload, form)
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
    state = [
        t
        for group in contender.optimizer.state.values()
        for t in group.values()
        if isinstance(t, Tensor)
    ]
    held = [
        *contender.network.parameters(),
        *contender.network.buffers(),
        *state,
    ]  # from before the profile
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
    runs = [("cpu", False)] + [
        ("cuda", compiled) for compiled in (False, True) if torch.cuda.is_available()
    ]
    rows = [
        measure(
            Workload(network, *NETWORKS[network], batches[network], momentum, device, compiled),
            options.rounds,
        )
        for device, compiled in runs
        for network in options.networks
        for momentum in (0.0, 0.9)
    ]
    columns = [name for name in rows[0] if not name.startswith("whole step,")]
    table = Table(*columns, title="a training step, G-SGD+Path-BN ÷ SGD+BN", title_justify="left")
    for row in rows:
        values = (row[name] for name in columns)
        table.add_row(
            *(f"{value:.3f}" if isinstance(value, float) else str(value) for value in values)
        )
    console = Console(width=150)
    console.print(table)
    if not torch.cuda.is_available():
        console.print("GPU: not measured")
    if options.json:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "not measured"
        content = {
            "torch": torch.__version__,
            "threads": options.threads,
            "gpu": gpu,
            "steps": rows,
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
