"""Error after fine-tuning: ResNet-56, CIFAR-10 → Fashion-MNIST, the five methods and G-SGD's choices.

Every configuration takes the learning rate of the same grid that does best with seed 0; then all seeds at that rate. A
run is what ``pathconvert finetune`` does, in a folder that is thrown away. Results are written after every run, and
runs that are there already are not repeated::

    PATHCONVERT_DATA=shared/data python benchmarks/finetune_accuracy.py --output results/finetune_accuracy.json

The network's class is the one in the data's README.md; ``--arch`` says where it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pathconvert.errors import PathconvertError
from pathconvert.files import open_network
from pathconvert.training.finetune import begin
from pathconvert.training.settings import Settings

RATES = (0.003, 0.01, 0.03, 0.1)
OURS: dict[str, Any] = {"norm": "path-bn", "optimizer": "gsgd", "anchor": "balanced"}
#: The five methods; then one choice of G-SGD+Path-BN changed at a time.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "SGD+BN": {"norm": "bn", "optimizer": "sgd"},
    "G-SGD+Path-BN": OURS,
    "SGD+Path-BN": {"norm": "path-bn", "optimizer": "sgd"},
    "G-SGD+BN": OURS | {"norm": "bn"},
    "G-SGD+BN(wnorm)": {"norm": "bn", "optimizer": "gsgd", "anchor": "initial", "weight_norm": True, "start": "weight"},
    "G-SGD+Path-BN, anchor initial": OURS | {"anchor": "initial"},
    "G-SGD+Path-BN, no anchor": OURS | {"anchor": "none"},
    "G-SGD+Path-BN, pivot max": OURS | {"pivot": "max"},
    "G-SGD+Path-BN, pivot diagonal": OURS | {"pivot": "diagonal"},
    "G-SGD+Path-BN, λ 0.1": OURS | {"skip_scale": 0.1},
    "G-SGD+Path-BN, start weight": OURS | {"start": "weight"},
}


def run_once(settings: Settings, arch: str, weights: Path) -> dict[str, Any]:
    """Error in percent after the last step; None where training failed, with the reason."""
    network = open_network(weights, arch=arch, input_size=(3, 32, 32))
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = begin(network, settings, Path(folder) / "run", device="cpu").train()
        except PathconvertError as error:
            return {"error": None, "failed": str(error), "seconds": time.perf_counter() - begun}
    row = result.history[-1]
    return {
        "error": 100 * (1 - row["val_top1"]),
        "val_loss": row["val_loss"],
        "train_loss": row["train_loss"],
        "shortened": result.shortened,
        "seconds": time.perf_counter() - begun,
    }


def curves(common: Settings, arch: str, weights: Path, name: str, rate: float) -> list[dict[str, Any]]:
    """The history of one longer run, an epoch a row."""
    settings = dataclasses.replace(common, lr=rate, steps=None, **CONFIGURATIONS[name])
    network = open_network(weights, arch=arch, input_size=(3, 32, 32))
    with tempfile.TemporaryDirectory() as folder:
        return begin(network, settings, Path(folder) / "run", device="cpu").train().history


def plot(histories: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Training loss and held-out error over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, rows in histories.items():
        steps = [row["step"] for row in rows]
        left.plot(steps, [row["train_loss"] for row in rows], marker=".", label=name)
        right.plot(steps, [100 * (1 - row["val_top1"]) for row in rows], marker=".", label=name)
    left.set(xlabel="step", ylabel="training loss (nats)")
    right.set(xlabel="step", ylabel="held-out error (%)")
    left.legend()
    figure.savefig(path, format="png", dpi=120)


def best_rate(runs: dict[str, Any], name: str, steps: int) -> float | None:
    """The rate with the smallest error of seed 0."""
    errors = {rate: runs.get(_key(name, rate, 0, steps), {}).get("error") for rate in RATES}
    known = {rate: error for rate, error in errors.items() if error is not None}
    return min(known, key=known.__getitem__) if known else None


def _key(name: str, rate: float, seed: int, steps: int) -> str:
    return f"{name} | lr {rate:g} | seed {seed} | {steps} steps"


def show(runs: dict[str, Any], steps: int, seeds: int) -> Table:
    table = Table(title=f"Error in % after {steps} steps (rate: the best of {', '.join(map(str, RATES))} with seed 0)")
    for column in ("method", "rate", "error", "± standard error", "seeds", "diverged at"):
        table.add_column(column)
    for name in CONFIGURATIONS:
        rate = best_rate(runs, name, steps)
        if rate is None:
            continue
        found = [runs.get(_key(name, rate, seed, steps), {}).get("error") for seed in range(seeds)]
        errors = [error for error in found if error is not None]
        spread = statistics.stdev(errors) / len(errors) ** 0.5 if len(errors) > 1 else float("nan")
        diverged = [f"{r:g}" for r in RATES if "failed" in runs.get(_key(name, r, 0, steps), {})]
        row = (f"{rate:g}", f"{statistics.mean(errors):.2f}", f"{spread:.2f}", str(len(errors)))
        table.add_row(name, *row, ", ".join(diverged))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--limit-val", type=int, default=2000)
    parser.add_argument("--arch", default="cifar_resnet:CifarResNet")
    parser.add_argument("--curves", type=int, help="Also train SGD+BN and G-SGD+Path-BN for so many epochs, and plot.")
    parser.add_argument("--only", nargs="*", default=list(CONFIGURATIONS), help="Run these configurations alone.")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="Begin no run after so long.")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    data = Path(os.environ["PATHCONVERT_DATA"])
    common = Settings(
        data=f"fashion-mnist:{data}",
        limit_train=arguments.steps * arguments.batch_size,
        limit_val=arguments.limit_val,
        batch_size=arguments.batch_size,
        steps=arguments.steps,
        epochs=1,
    )
    runs: dict[str, Any] = {}
    if arguments.output and arguments.output.exists():
        runs = json.loads(arguments.output.read_text())["runs"]
    begun = time.monotonic()

    def measure(name: str, rate: float, seed: int) -> None:
        key = _key(name, rate, seed, arguments.steps)
        if key in runs or name not in arguments.only or time.monotonic() - begun > 60 * arguments.minutes:
            return
        settings = dataclasses.replace(common, lr=rate, seed=seed, **CONFIGURATIONS[name])
        runs[key] = run_once(settings, arguments.arch, data / "weights" / "resnet56_cifar10.pth")
        print(key, runs[key], flush=True)
        if arguments.output:
            about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "batch": arguments.batch_size}
            arguments.output.write_text(json.dumps({"about": about, "runs": runs}, indent=1, ensure_ascii=False))

    names = list(CONFIGURATIONS)
    for part in (names[:5], names[5:]):
        for name in part:
            for rate in RATES:
                measure(name, rate, 0)
        for seed in range(1, arguments.seeds):
            for name in part:
                rate = best_rate(runs, name, arguments.steps)
                if rate is not None:
                    measure(name, rate, seed)
    if arguments.curves:
        longer = dataclasses.replace(common, epochs=arguments.curves)
        weights = data / "weights" / "resnet56_cifar10.pth"
        histories = {
            name: curves(longer, arguments.arch, weights, name, best_rate(runs, name, arguments.steps) or 0.03)
            for name in ("SGD+BN", "G-SGD+Path-BN")
        }
        if arguments.output:
            stored = json.loads(arguments.output.read_text()) | {"curves": histories}
            arguments.output.write_text(json.dumps(stored, indent=1, ensure_ascii=False))
            plot(histories, arguments.output.with_suffix(".png"))
    Console().print(show(runs, arguments.steps, arguments.seeds))


if __name__ == "__main__":
    main()
