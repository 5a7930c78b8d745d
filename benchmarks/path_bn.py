"""What Path-BN costs in training: the skip by index and by a sparse 1×1 convolution, and a step of
a whole network.

    python benchmarks/path_bn.py [--rounds 15] [--threads 2] [--json FILE]

Forward and backward, float32, medians over rounds in which all contenders take turns. *index* is
what ``pathconvert.PathBN`` does (``index_select``, and ``index_add`` where pivots share a row);
*1×1* is a fixed convolution with the pivots in a dense weight. *BN* is the network before it
entered Path-BN.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pathconvert

from convert import build, example_for

#: Channels and side of the feature maps: ResNet-50's four stages.
SHAPES = ((64, 56), (128, 28), (256, 14), (512, 7))
BATCH = 8
NETWORKS = ("resnet18", "squeezenet1_1", "shufflenet_v2_x1_0")


def medians(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            begun = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - begun))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def skips(channels: int, side: int, shared: bool, rounds: int) -> dict[str, Any]:
    """One skip, λ = 1, signs random.

    ``shared``: rows drawn with repetition (as max does), else a permutation.
    """
    generator = torch.Generator().manual_seed(0)
    columns = torch.arange(channels)
    rows = torch.randperm(channels, generator=generator)
    if shared:
        rows = torch.randint(channels, (channels,), generator=generator)
    values = torch.randint(2, (channels,), generator=generator) * 2.0 - 1
    x = torch.randn(BATCH, channels, side, side, generator=generator, requires_grad=True)
    dense = torch.zeros(channels, channels, 1, 1).index_put((rows, columns), values.view(-1, 1, 1))
    gather = torch.zeros(channels, dtype=torch.int64).index_put((rows,), columns)
    gain = torch.zeros(channels).index_put((rows,), values)

    def index() -> Tensor:
        if shared:
            return torch.zeros_like(x).index_add(1, rows, x * values.view(-1, 1, 1))
        return x.index_select(1, gather) * gain.view(-1, 1, 1)

    def step(skip: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            x.grad = None
            skip().sum().backward()

        return run

    torch.testing.assert_close(index(), F.conv2d(x, dense))
    found = medians({"index": step(index), "1x1": step(lambda: F.conv2d(x, dense))}, rounds)
    return {
        "channels": channels,
        "side": side,
        "pivots": "shared rows" if shared else "permutation",
        **found,
    }


def network(name: str, rounds: int) -> dict[str, Any]:
    """A training step on eight images of 64 pixels: with BatchNorm as it was, and in Path-BN
    form.
    """
    model = build(name)
    example = example_for(name, small=True)
    images = torch.randn(BATCH, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    contenders = {"BN": model}
    for pivot in ("matching", "max"):
        conversion = pathconvert.reparameterize(model, example, pivot=pivot)
        contenders[f"Path-BN, {pivot}"] = pathconvert.to_path_bn(
            conversion, example, calibration=images
        )

    def step(one: torch.nn.Module) -> Callable[[], None]:
        one.train()

        def run() -> None:
            one.zero_grad()
            one(images).square().mean().backward()

        return run

    return {
        "network": name,
        **medians({name: step(one) for name, one in contenders.items()}, rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [skips(*shape, shared, options.rounds) for shape in SHAPES for shared in (False, True)]
    networks = [network(name, options.rounds) for name in NETWORKS]
    console = Console()
    for title, results in (
        ("skip, forward and backward, ms", rows),
        ("training step, ms", networks),
    ):
        table = Table(*results[0], title=title, title_justify="left")
        for row in results:
            table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
        console.print(table)
    if options.json:
        content = {
            "torch": torch.__version__,
            "threads": options.threads,
            "skips": rows,
            "networks": networks,
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
