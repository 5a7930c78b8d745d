"""Training from scratch, the papers' setting scaled down: four methods on PlainNet-18 and
ResNet-18; signals in depth.

::

    export PATHCONVERT_DATA=shared/data
    python benchmarks/from_scratch.py --json benchmarks/results/from_scratch.json
    python benchmarks/from_scratch.py --data cifar10:ROOT --width 64 --batch-size 128
        --steps 64000 --seeds 5 --json …
    PATHCONVERT_DATA=shared/data python benchmarks/from_scratch.py --signals --json …

**Methods** (PBN 5.1.1, hyperparameters of PBN-A F.1): no momentum, rate × 0.1 at 1/2 and 3/4 of the
steps, decay 1e-4 (of basis paths for G-SGD+BN and G-SGD+Path-BN, L2 for the others), images in [0,
1], cropped at random and flipped. G-SGD takes path-values as they are (``anchor=None``), from each
chain's first layer (``start="weight"``).

**Initialisation.** In layers on chains every weight at the kernel's centre in row k mod out, column
k mod in is 1 (skeleton and start weights), the rest small normal: the standard deviation that torch
gives a convolution, √(1 / (3 fan-in)), times ``--small``. All other layers, and SGD+BN's whole
network, begin as torchvision's ResNets do (He normal). γ = 1, β = 0. Chains run through the whole
PlainNet, and in ResNets inside blocks; λ is 1 and 0.1.

**Signals** (PBN 5.2, Fig. 4): a stack of convolutions at initialisation, one batch. With BatchNorm
all weights begin as torch makes them; with Path-BN as above. Both have the same classifier.

Results are written after every run, and runs that are there already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pathconvert.errors import PathconvertError
from pathconvert.networks.preprocessing import Preprocessing
from pathconvert.training import GSGD
from pathconvert.training.data.augmentation import Transform
from pathconvert.training.data.batches import epoch_batches
from pathconvert.training.data.labelled import Data, open_data
from pathconvert.training.optimizer.choice import make_optimizer, make_schedule
from pathconvert.training.run.metrics import evaluate
from pathconvert.training.settings import Settings

from from_scratch_networks import begin, build, initialise, randomise, stack

SIZE = (3, 32, 32)
G_SGD: dict[str, Any] = {"optimizer": "gsgd", "anchor": "none", "start": "weight"}


@dataclass(frozen=True)
class Method:
    """One of the papers' methods: its settings, its rates, and whether its network begins with a
    skeleton.
    """

    settings: dict[str, Any]
    rates: tuple[float, ...]
    skeleton: bool = True


#: The rates are the papers' own, or from their grid 0.1, 0.2, 0.5, 1. The fifth tells start and
#: method apart.
METHODS = {
    "SGD+BN": Method({"optimizer": "sgd", "norm": "bn"}, (0.1,), skeleton=False),
    "G-SGD+BN": Method(G_SGD | {"norm": "bn", "decay": "basis_path_norm"}, (0.1, 0.5)),
    "G-SGD+BN(wnorm)": Method(G_SGD | {"norm": "bn", "weight_norm": True}, (0.1, 1.0)),
    "G-SGD+Path-BN": Method(G_SGD | {"norm": "path-bn", "decay": "basis_path_norm"}, (0.1, 0.5)),
    "SGD+BN, skeleton start": Method({"optimizer": "sgd", "norm": "bn"}, (0.1,)),
}
#: λ of Path-BN's skips (PBN-A F.1).
SKIP_SCALES = {"plainnet18": 1.0, "resnet18": 0.1}

# ---- training ------------------------------------------------------------------------------------


def run_once(
    network: str, method: Method, settings: Settings, data: Data, width: int, small: float
) -> dict[str, Any]:
    """Error in percent after the last step; None where training failed, with the reason."""
    begun = time.perf_counter()
    torch.manual_seed(settings.seed)
    model = build(network, width)
    if settings.optimizer == "gsgd":
        model = begin(model, settings.norm, small, SKIP_SCALES[network], SIZE)
    elif method.skeleton:
        initialise(model, small)
    else:
        for module in model.modules():
            randomise(module)
    optimizer = make_optimizer(model, settings, SIZE)
    losses: list[float] = []
    try:
        _train(model, optimizer, settings, data, losses)
        report = evaluate(
            model.eval(), _batches(data, settings, train=False), num_classes=len(data.classes)
        )
        found: dict[str, Any] = {"error": 100 * (1 - report.top1), "val_loss": report.loss}
    except PathconvertError as error:
        found = {"error": None, "failed": str(error)}
    tenth = max(1, (settings.steps or 0) // 10)
    found["train_loss"] = [
        round(statistics.mean(losses[i : i + tenth]), 4) for i in range(0, len(losses), tenth)
    ]
    if isinstance(optimizer, GSGD):
        found |= {
            "chains": sum(chains.count for chains in optimizer.chains),
            "shortened": optimizer.shortened(),
        }
    return found | {"seconds": round(time.perf_counter() - begun, 1)}


def _batches(data: Data, settings: Settings, *, train: bool, epoch: int = 0) -> Any:
    """The papers' images: values in [0, 1]; crop and flip in training."""
    return epoch_batches(
        data.train if train else data.val,
        Transform(Preprocessing.plain(SIZE), "crop-flip" if train else "none"),
        batch_size=settings.batch_size if train else 250,
        epoch=epoch,
        seed=settings.seed,
        shuffle=train,
        drop_last=train,
    )


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    data: Data,
    losses: list[float],
) -> None:
    """All steps, whose losses are appended to ``losses``.

    Raises:
        PathconvertError: a loss that is not finite.
    """
    assert settings.steps is not None
    schedule = make_schedule(optimizer, settings, settings.steps)
    model.train()
    epoch = 0
    while len(losses) < settings.steps:
        for images, labels in _batches(data, settings, train=True, epoch=epoch):
            loss = F.cross_entropy(model(images), labels)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise PathconvertError(f"the loss is {value} in step {len(losses) + 1}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(value)
            if len(losses) == settings.steps:
                return
        epoch += 1


def _key(network: str, name: str, rate: float, seed: int, options: argparse.Namespace) -> str:
    return (
        f"{network} | {name} | lr {rate:g} | seed {seed} | {options.steps} steps of"
        f" {options.batch_size} | width {options.width} | small {options.small:g} |"
        f" {options.data.partition(':')[0]}"
    )


def train_all(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Every network, method, rate and seed that ``results`` does not hold."""
    # seed 0 for everything first, so that a run that is cut short has something of everything
    for seed in range(options.seeds):
        wanted = [
            (network, name, rate)
            for network in options.networks
            for name in options.only
            for rate in options.rates or METHODS[name].rates
        ]
        for network, name, rate in wanted:
            key = _key(network, name, rate, seed, options)
            if key in results["runs"]:
                continue
            settings = Settings(
                lr=rate, seed=seed, steps=options.steps, batch_size=options.batch_size,
                momentum=0.0,
                weight_decay=1e-4, schedule="step", **METHODS[name].settings,
            )  # fmt: skip
            data = open_data(
                options.data,
                limit_train=options.steps * options.batch_size,
                limit_val=options.limit_val,
                seed=seed,
            )
            run = run_once(network, METHODS[name], settings, data, options.width, options.small)
            results["runs"][key] = run | {"val_images": len(data.val)}
            print(key, run, flush=True)
            write(options, results)


def training_table(options: argparse.Namespace, results: dict[str, Any]) -> Table:
    """A row for every method, with its best rate by mean error."""
    table = Table(
        title=(
            f"Error in % after {options.steps} steps of {options.batch_size}, width"
            f" {options.width}, from scratch"
        )
    )
    for column in (
        "network",
        "method",
        "rate",
        "error",
        "± standard error",
        "seeds",
        "chains shortened",
        "failed at",
    ):
        table.add_column(column)
    for network in options.networks:
        for name in options.only:
            by_rate = {
                rate: [
                    results["runs"].get(_key(network, name, rate, s, options))
                    for s in range(options.seeds)
                ]
                for rate in options.rates or METHODS[name].rates
            }
            by_rate = {rate: [run for run in runs if run] for rate, runs in by_rate.items()}
            failed = [
                f"{rate:g}"
                for rate, runs in by_rate.items()
                if any(run["error"] is None for run in runs)
            ]
            whole = {
                rate: runs for rate, runs in by_rate.items() if runs and f"{rate:g}" not in failed
            }
            row = ["", "", "", "", ""]
            if whole:
                means = {
                    rate: statistics.mean(run["error"] for run in runs)
                    for rate, runs in whole.items()
                }
                rate = min(means, key=means.__getitem__)
                runs = whole[rate]
                spread = (
                    statistics.stdev(run["error"] for run in runs) / len(runs) ** 0.5
                    if len(runs) > 1
                    else None
                )
                shown = "" if spread is None else f"{spread:.2f}"
                shortened = str(sum(run.get("shortened", 0) for run in runs))
                row = [f"{rate:g}", f"{means[rate]:.1f}", shown, str(len(runs)), shortened]
            table.add_row(network, name, *row, ", ".join(failed))
    return table


# ---- signals -------------------------------------------------------------------------------------


def signals(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, list[float]]:
    """σ: mean over a layer's channels of the standard deviation that its normalisation divides by;
    and |∂loss/∂z|, z the layer's output. One batch, training mode.
    """
    sigma: list[float] = []
    outputs: list[Tensor] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sigma.append(float(inputs[0].detach().var((0, 2, 3), correction=0).sqrt().mean()))

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(note)
        elif isinstance(module, nn.ReLU):
            module.register_forward_hook(keep)
    F.cross_entropy(model.train()(images), labels).backward()
    return {
        "sigma": sigma,
        "gradient": [float(z.grad.norm()) for z in outputs if z.grad is not None],
    }


def measure_signals(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Both stacks, unless ``results`` holds them already."""
    begun = time.perf_counter()
    size = (3, options.side, options.side)
    about = {
        "data": options.data.partition(":")[0],
        **{
            name: getattr(options, name)
            for name in ("depth", "channels", "side", "signals_batch", "small")
        },
    }
    if results.get("signals", {}).get("about") == about:
        return
    data = open_data(options.data, limit_train=options.signals_batch, limit_val=1)
    images, labels = next(
        iter(
            epoch_batches(
                data.train, Transform(Preprocessing.plain(size)), batch_size=options.signals_batch,
                epoch=0, seed=0, shuffle=False, drop_last=False,
            )
        )
    )  # fmt: skip
    torch.manual_seed(0)
    plain = stack(options.depth, options.channels)
    path = begin(stack(options.depth, options.channels), "path-bn", options.small, 1.0, size)
    path.get_submodule(str(len(plain) - 1)).load_state_dict(plain[-1].state_dict())
    measured = {
        name: signals(model, images, labels) for name, model in (("BN", plain), ("Path-BN", path))
    }
    results["signals"] = {
        "about": about,
        "seconds": round(time.perf_counter() - begun, 1),
        **measured,
    }
    write(options, results)


def plot_signals(found: dict[str, Any], file: Path) -> None:
    """PBN Fig. 4."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in ("BN", "Path-BN"):
        layers = range(1, len(found[name]["sigma"]) + 1)
        left.plot(layers, found[name]["sigma"], label=name)
        right.plot(layers, found[name]["gradient"], label=name)
    left.axhline(1.0, color="grey", linewidth=0.6)
    left.set(xlabel="layer", ylabel="standard deviation, mean", ylim=(0, None))
    right.set(xlabel="layer", ylabel="|∂loss/∂output|", yscale="log")
    left.legend()
    a = found["about"]
    images = f"{a['signals_batch']} images of {a['side']}×{a['side']} ({a['data']})"
    figure.suptitle(
        f"{a['depth']} layers, {a['channels']} channels, at initialisation; {images}",
        fontsize="medium",
    )
    figure.savefig(file, dpi=110)


def signals_table(found: dict[str, Any]) -> Table:
    depth = len(found["BN"]["sigma"])
    table = Table(title=f"Signals in {depth} layers at initialisation")
    table.add_column("layer")
    for name in ("BN", "Path-BN"):
        table.add_column(f"σ, {name}")
        table.add_column(f"gradient, {name}")
    for layer in sorted({1, 2, *range(10, depth, 10), depth}):
        values = [
            found[name][key][layer - 1]
            for name in ("BN", "Path-BN")
            for key in ("sigma", "gradient")
        ]
        table.add_row(str(layer), *(f"{value:.3g}" for value in values))
    return table


# ---- the command ---------------------------------------------------------------------------------


def write(options: argparse.Namespace, results: dict[str, Any]) -> None:
    if options.json:
        options.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = f"fashion-mnist:{os.environ.get('PATHCONVERT_DATA', '.')}"
    parser.add_argument(
        "--data", default=default, help="NAME:ROOT; else Fashion-MNIST in $PATHCONVERT_DATA."
    )
    parser.add_argument("--json", type=Path, help="Results; added to where it is there already.")
    parser.add_argument(
        "--networks", nargs="*", default=list(SKIP_SCALES), choices=list(SKIP_SCALES)
    )
    parser.add_argument(
        "--only", nargs="*", default=list(METHODS), choices=list(METHODS), metavar="METHOD"
    )
    parser.add_argument(
        "--width", type=int, default=16, help="Channels of the first stage (the papers: 64)."
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--rates", type=float, nargs="*", help="For every method; else each has its own."
    )
    parser.add_argument(
        "--small", type=float, default=1.0, help="Size of what is not skeleton, over torch's."
    )
    parser.add_argument("--limit-val", type=int, default=2000)
    parser.add_argument(
        "--signals", action="store_true", help="The second part, in place of training."
    )
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--side", type=int, default=16, help="Of the images (the papers: 32).")
    parser.add_argument("--signals-batch", type=int, default=32, help="Images (the papers: 128).")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    results: dict[str, Any] = {"runs": {}}
    if options.json and options.json.exists():
        results = json.loads(options.json.read_text())
    results["about"] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if options.signals:
        measure_signals(options, results)
        if options.json:
            plot_signals(
                results["signals"], options.json.with_name(f"{options.json.stem}_signals.png")
            )
        Console().print(signals_table(results["signals"]))
    else:
        train_all(options, results)
        Console().print(training_table(options, results))


if __name__ == "__main__":
    main()
