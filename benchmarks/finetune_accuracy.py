"""Error after fine-tuning ResNet-56, CIFAR-10 → Fashion-MNIST: five methods, G-SGD's choices.

Every configuration takes the learning rate of the same grid that does best with seed 0; then all
seeds at that rate. A run is what ``pathconvert finetune`` does, in a folder that is thrown away.
Results are written after every run, and runs that are there already are not repeated::

    export PATHCONVERT_DATA=shared/data
    python benchmarks/finetune_accuracy.py --steps 100 --curves 4 --output FILE.json
    python benchmarks/finetune_accuracy.py --steps 200 --rates-of 100 --methods …

``--rates-of N`` takes the rates from runs of N steps that are there already. The network's class is
the one in the data's README.md; ``--arch`` says where it is.
"""

from __future__ import annotations

import argparse
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
from pathconvert.networks.loading import open_network
from pathconvert.training.run.begin import begin
from pathconvert.training.settings import Settings

RATES = (0.003, 0.01, 0.03, 0.1)
OURS: dict[str, Any] = {"norm": "path-bn", "optimizer": "gsgd", "anchor": "balanced"}
#: The five methods; then one choice of G-SGD+Path-BN changed at a time.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "SGD+BN": {"norm": "bn", "optimizer": "sgd"},
    "G-SGD+Path-BN": OURS,
    "SGD+Path-BN": {"norm": "path-bn", "optimizer": "sgd"},
    "G-SGD+BN": OURS | {"norm": "bn"},
    "G-SGD+BN(wnorm)": OURS | {"norm": "bn", "weight_norm": True},
    "G-SGD+Path-BN, anchor initial": OURS | {"anchor": "initial"},
    "G-SGD+Path-BN, no anchor": OURS | {"anchor": "none"},
    "G-SGD+Path-BN, pivot max": OURS | {"pivot": "max"},
    "G-SGD+Path-BN, pivot diagonal": OURS | {"pivot": "diagonal"},
    "G-SGD+Path-BN, λ 0.1": OURS | {"skip_scale": 0.1},
    "G-SGD+Path-BN, start weight": OURS | {"start": "weight"},
}


def changed(settings: Settings, **changes: Any) -> Settings:
    """``settings`` with some values replaced; all are checked again."""
    return Settings(**(settings.model_dump() | changes))


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


def curves(
    common: Settings, arch: str, weights: Path, name: str, rate: float
) -> list[dict[str, Any]]:
    """The history of one longer run, an epoch a row."""
    settings = changed(common, lr=rate, steps=None, **CONFIGURATIONS[name])
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


def show(runs: dict[str, Any], steps: int, grid: int, seeds: int) -> Table:
    """A row for every configuration; rates were chosen after ``grid`` steps."""
    chosen = f"rate: the best of {', '.join(map(str, RATES))} after {grid} steps with seed 0"
    table = Table(title=f"Error in % after {steps} steps ({chosen})")
    for column in ("method", "rate", "error", "± standard error", "seeds", "diverged at"):
        table.add_column(column)
    for name in CONFIGURATIONS:
        rate = best_rate(runs, name, grid)
        if rate is None or _key(name, rate, 0, steps) not in runs:
            continue
        found = [runs.get(_key(name, rate, seed, steps), {}).get("error") for seed in range(seeds)]
        errors = [error for error in found if error is not None]
        spread = statistics.stdev(errors) / len(errors) ** 0.5 if len(errors) > 1 else float("nan")
        diverged = [f"{r:g}" for r in RATES if "failed" in runs.get(_key(name, r, 0, grid), {})]
        row = (f"{rate:g}", f"{statistics.mean(errors):.2f}", f"{spread:.2f}", str(len(errors)))
        table.add_row(name, *row, ", ".join(diverged))
    return table


def _arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--limit-val", type=int, default=2000)
    parser.add_argument("--arch", default="cifar_resnet:CifarResNet")
    parser.add_argument(
        "--curves",
        type=int,
        help="Also train SGD+BN and G-SGD+Path-BN for so many epochs, and plot.",
    )
    parser.add_argument(
        "--rates-of",
        type=int,
        metavar="STEPS",
        help="Choose rates among the runs of so many steps.",
    )
    parser.add_argument(
        "--methods", action="store_true", help="The five methods alone, not G-SGD's choices."
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="Begin no run after so long."
    )
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
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
    stored: dict[str, Any] = {"runs": {}}
    if arguments.output and arguments.output.exists():
        stored = json.loads(arguments.output.read_text())
    runs = stored["runs"]
    begun = time.monotonic()

    def measure(name: str, rate: float, seed: int) -> None:
        key = _key(name, rate, seed, arguments.steps)
        if key in runs or time.monotonic() - begun > 60 * arguments.minutes:
            return
        settings = changed(common, lr=rate, seed=seed, **CONFIGURATIONS[name])
        runs[key] = run_once(settings, arguments.arch, data / "weights" / "resnet56_cifar10.pth")
        print(key, runs[key], flush=True)
        if arguments.output:
            stored["about"] = {
                "torch": torch.__version__, "threads": torch.get_num_threads(),
                "batch": arguments.batch_size,
            }  # fmt: skip
            arguments.output.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n")

    names = list(CONFIGURATIONS)
    grid = arguments.rates_of or arguments.steps
    for part in (names[:5],) if arguments.methods else (names[:5], names[5:]):
        for name in part if grid == arguments.steps else ():
            for rate in RATES:
                measure(name, rate, 0)
        for seed in range(arguments.seeds):
            for name in part:
                rate = best_rate(runs, name, grid)
                if rate is not None:
                    measure(name, rate, seed)
    if arguments.curves:
        rates = {name: best_rate(runs, name, grid) or 0.03 for name in ("SGD+BN", "G-SGD+Path-BN")}
        _train_curves(arguments, common, data, rates, stored)
    Console().print(show(runs, arguments.steps, grid, arguments.seeds))


def _train_curves(
    arguments: argparse.Namespace,
    common: Settings,
    data: Path,
    rates: dict[str, float],
    stored: dict[str, Any],
) -> None:
    """Train the methods of ``rates`` for ``--curves`` epochs; keep and plot their histories."""
    longer = changed(common, epochs=arguments.curves)
    weights = data / "weights" / "resnet56_cifar10.pth"
    histories = {
        name: curves(longer, arguments.arch, weights, name, rate) for name, rate in rates.items()
    }
    if arguments.output:
        stored["curves"] = histories
        arguments.output.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n")
        plot(histories, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
