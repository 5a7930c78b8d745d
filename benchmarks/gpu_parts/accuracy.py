"""Error after fine-tuning at real length: ResNet-56, CIFAR-10 → Fashion-MNIST, five methods, paired
by seed.

All images lie on the GPU, and so do their order and their random crops and flips, which follow from
the seed alone: all methods see the same images in the same order. A whole step (images, forward,
backward, optimizer, rate) is captured in a CUDA graph, and the runs of a round are replayed in
turns on streams of their own, since one run alone leaves most of the GPU idle. On the CPU the same
steps run one by one.

The rounds: every method at its first rate with seed 0, then at its other rates, then with the other
seeds at the rate that did best with seed 0. A round that the time does not allow is left out.
Errors are those of the last step. The rate is chosen on the same test images, and seed 0 counts in
the mean: this favours every method alike, but it makes the means a little too good, so the
differences that are paired by seed are the ones to read.
"""

from __future__ import annotations

import copy
import functools
import gzip
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as VF

import pathconvert
from pathconvert.training import GSGD, path_parameter_groups

from cifar_resnet import CifarResNet
from gpu_parts.context import Context

SIDE, PADDING = 32, 4
WEIGHTS = "resnet56_cifar10.pth"
FILES = {"train": "train", "test": "t10k"}
WARM_UP = 3


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        form: ``plain``, ``path`` or ``path-bn``.
        optimizer: parameters and rate → the optimizer; the rate is a tensor on their device.
        rates: four; the first is where it did best on the CPU or is usual.
    """

    form: str
    optimizer: Callable[[nn.Module, Tensor], torch.optim.Optimizer]
    rates: tuple[float, float, float, float]


def _sgd(model: nn.Module, rate: Tensor) -> torch.optim.Optimizer:
    # fused: the only form of torch's SGD that reads its rate on the GPU
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, fused=True)


def _adamw(model: nn.Module, rate: Tensor) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(), lr=rate, weight_decay=0.01, capturable=rate.is_cuda
    )


def _gsgd(model: nn.Module, rate: Tensor) -> torch.optim.Optimizer:
    return GSGD(
        path_parameter_groups(model), lr=rate, momentum=0.9, anchor="balanced", foreach=True
    )


METHODS = {
    "SGD+BN": Method("plain", _sgd, (0.03, 0.1, 0.01, 0.3)),
    "AdamW+BN": Method("plain", _adamw, (0.003, 0.001, 0.01, 0.0003)),
    "SGD+Path-BN": Method("path-bn", _sgd, (0.03, 0.01, 0.1, 0.003)),
    "G-SGD+BN": Method("path", _gsgd, (0.03, 0.01, 0.1, 0.003)),
    "G-SGD+Path-BN": Method("path-bn", _gsgd, (0.03, 0.1, 0.01, 0.3)),
}
BASELINE = "SGD+BN"


# ---- images --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """uint8 [N, side, side] and int64 labels [N], on the device."""

    pixels: Tensor
    labels: Tensor


def load_images(context: Context, part: str) -> Images:
    """Fashion-MNIST at 32 × 32; in a rehearsal without the files, noise."""
    stem = FILES[part]
    found = [context.file(f"{stem}-{what}-ubyte.gz") for what in ("images-idx3", "labels-idx1")]
    if None in found:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (64, 28, 28), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 10, (64,), generator=generator)
    else:
        raw = [
            np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8) for path in found if path
        ]
        pixels = torch.from_numpy(raw[0][16:].copy()).view(-1, 28, 28)  # after the IDX headers
        labels = torch.from_numpy(raw[1][8:].astype(np.int64))
        pixels, labels = pixels[: context.size(None, 64)], labels[: context.size(None, 64)]
    # as finetune does, without normalisation
    resized = VF.resize(pixels[:, None], [SIDE, SIDE])[:, 0]
    return Images(resized.to(context.device), labels.to(context.device))


@dataclass(frozen=True)
class Course:
    """Which images every step takes, and how they are cropped and flipped.

    On the device, [steps, batch] each.
    """

    index: Tensor
    top: Tensor
    left: Tensor
    flip: Tensor

    @staticmethod
    def drawn(count: int, steps: int, batch: int, seed: int, device: str) -> Course:
        """Whole passes over ``count`` images in a new order each.

        An incomplete batch is left out.
        """
        generator = torch.Generator().manual_seed(seed)
        per_epoch = count // batch
        epochs = -(-steps // per_epoch)
        order = torch.cat(
            [torch.randperm(count, generator=generator)[: per_epoch * batch] for _ in range(epochs)]
        )
        shape = (steps, batch)
        draw = functools.partial(torch.randint, 0, generator=generator)
        parts = (
            order[: steps * batch].view(shape),
            *(draw(n, shape) for n in (2 * PADDING + 1, 2 * PADDING + 1, 2)),
        )
        return Course(*(part.to(device) for part in parts))


def crop_and_flip(padded: Tensor, index: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """float32 [batch, 3, side, side] in [0, 1]: what finetune's crop-flip does, by one read of the
    images.

    Args:
        padded: uint8 [N, side + 2 padding, side + 2 padding].
        index, top, left, flip: int64 [batch].
    """
    along = torch.arange(SIDE, device=padded.device)
    rows = top[:, None] + along
    columns = left[:, None] + torch.where(flip[:, None] == 1, SIDE - 1 - along, along)
    grey = padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]
    return to_input(grey)


def to_input(grey: Tensor) -> Tensor:
    """uint8 [batch, side, side] → float32 [batch, 3, side, side] in [0, 1]."""
    return (grey.float() / 255)[:, None].expand(-1, 3, -1, -1).contiguous()


# ---- a run ---------------------------------------------------------------------------------------


class Run:
    """One method at one rate with one seed.

    Args:
        model: trained in place; on the device.
        optimizer: as in :class:`Method`.
        rate: what the cosine begins with.
        padded: the training images, padded.
        labels: of them.
        course: of the seed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        rate: float,
        padded: Tensor,
        labels: Tensor,
        course: Course,
    ) -> None:
        self.model, self.padded, self.labels, self.course, self.base = (
            model.train(),
            padded,
            labels,
            course,
            rate,
        )
        self.steps = len(course.index)
        self.done = torch.zeros(1, dtype=torch.int64, device=padded.device)
        self.rate = torch.full((), rate, device=padded.device)
        self.optimizer: torch.optim.Optimizer = optimizer(model, self.rate)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream() if padded.is_cuda else None

    def step(self) -> None:
        """One step; all that changes from step to step is read from tensors."""
        c = self.course
        index, top, left, flip = (
            t.index_select(0, self.done)[0] for t in (c.index, c.top, c.left, c.flip)
        )
        self.rate.copy_((self.base / 2 * (1 + torch.cos(torch.pi * self.done / self.steps)))[0])
        self.optimizer.zero_grad(set_to_none=True)
        images = crop_and_flip(self.padded, index, top, left, flip)
        F.cross_entropy(self.model(images), self.labels[index]).backward()
        self.optimizer.step()
        self.done += 1

    def make_ready(self) -> None:
        """Make every buffer by some steps, put all back to the beginning and, on a GPU, capture a
        step.
        """
        before = copy.deepcopy(self.model.state_dict())
        if self.stream is None:
            self._warm_up(before)
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self._warm_up(before)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.step()

    def _warm_up(self, before: dict[str, Tensor]) -> None:
        for _ in range(min(WARM_UP, self.steps)):
            self.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.load_state_dict(before)  # in place
        self.done.zero_()
        for state in self.optimizer.state.values():
            for name, value in state.items():
                if name != "anchor":  # which G-SGD took at the first step, from these very weights
                    value.zero_()

    def advance(self) -> None:
        """Queue one step."""
        if self.graph is None:
            self.step()
            return
        with torch.cuda.stream(self.stream):
            self.graph.replay()


@torch.no_grad()
def error_of(model: nn.Module, images: Images, batch: int = 1000) -> float:
    """Top-1 error in percent."""
    model.eval()
    pairs = zip(images.pixels.split(batch), images.labels.split(batch), strict=True)
    wrong = sum(
        int((model(to_input(pixels)).argmax(1) != labels).sum()) for pixels, labels in pairs
    )
    return 100 * wrong / len(images.labels)


# ---- the forms -----------------------------------------------------------------------------------


def forms(context: Context, train: Images) -> dict[str, nn.Module]:
    """The network in each form, on the device.

    Path-BN's statistics from 512 training images, as finetune has them.
    """
    torch.manual_seed(0)
    model = CifarResNet(context.size(9, 1))
    path = context.file(WEIGHTS)
    if path is not None and not context.rehearse:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    images = to_input(train.pixels[:512].cpu())
    conversion = pathconvert.reparameterize(model.eval(), images[:2])
    entered = pathconvert.to_path_bn(conversion, images[:2], images.split(32), begin="evaluation")
    return {
        name: form.to(context.device)
        for name, form in (("plain", model), ("path", conversion.model), ("path-bn", entered))
    }


# ---- the rounds ----------------------------------------------------------------------------------


def key_of(name: str, rate: float, seed: int) -> str:
    """As the results name a run."""
    return f"{name} | lr {rate:g} | seed {seed}"


def best_rate(runs: dict[str, Any], name: str) -> float:
    """The rate with the smallest error of seed 0."""
    return min(
        METHODS[name].rates,
        key=lambda rate: runs.get(key_of(name, rate, 0), {}).get("error", 100.0),
    )


def rounds(runs: dict[str, Any], seeds: int) -> Iterator[list[tuple[str, float, int]]]:
    """(method, rate, seed) of every round, in order of value."""
    for i in range(4):
        yield [(name, method.rates[i], 0) for name, method in METHODS.items()]
    for seed in range(1, seeds):
        yield [(name, best_rate(runs, name), seed) for name in METHODS]


def measure(context: Context) -> None:
    """As many rounds as the time allows, and their summary after each."""
    steps, batch, seeds = context.size((2000, 128, 5), (2, 8, 2))
    train, test = (load_images(context, part) for part in FILES)
    padded = F.pad(train.pixels, [PADDING] * 4)
    made = forms(context, train)
    about = {
        "steps": steps, "batch": batch, "training images": len(train.labels),
        "test images": len(test.labels),
        "before training": {name: error_of(copy.deepcopy(model), test) for name,
            model in made.items()},
    }  # fmt: skip
    context.keep("about", about)
    runs: dict[str, Any] = {}
    longest = 0.0
    for group in rounds(runs, seeds):
        if context.seconds_left() < 1.1 * longest:
            print(
                f"{context.seconds_left():.0f} s are left, and a round takes {longest:.0f} s:"
                " stopping here"
            )
            break
        begun = time.monotonic()
        courses = {
            seed: Course.drawn(len(padded), steps, batch, seed, context.device)
            for _, _, seed in group
        }
        going = {}
        for name, rate, seed in group:
            method = METHODS[name]
            model = copy.deepcopy(made[method.form])
            going[name, rate, seed] = Run(
                model, method.optimizer, rate, padded, train.labels, courses[seed]
            )
            going[name, rate, seed].make_ready()
        for _ in range(steps):
            for run in going.values():
                run.advance()
        if context.device == "cuda":
            torch.cuda.synchronize()
        longest = max(longest, time.monotonic() - begun)
        for (name, rate, seed), run in going.items():
            finite = all(bool(p.isfinite().all()) for p in run.model.parameters())
            runs[key_of(name, rate, seed)] = {
                "error": error_of(run.model, test),
                "diverged": not finite,
            }
        context.keep("runs", runs)
        context.keep("seconds per round", longest)
        context.keep("summary", summary(runs, seeds))
    _print(context.results["summary"], about)


def summary(runs: dict[str, Any], seeds: int) -> dict[str, Any]:
    """By method: best rate, errors by seed, mean, standard error, difference to the baseline, good
    rates.
    """
    found = {}
    for name, method in METHODS.items():
        rate = best_rate(runs, name)
        by_rate = {
            r: runs[key]["error"] for r in method.rates if (key := key_of(name, r, 0)) in runs
        }
        keys = {
            seed: (key_of(name, rate, seed), key_of(BASELINE, best_rate(runs, BASELINE), seed))
            for seed in range(seeds)
        }
        errors = [runs[mine]["error"] for mine, _ in keys.values() if mine in runs]
        paired = [
            runs[a]["error"] - runs[b]["error"] for a, b in keys.values() if a in runs and b in runs
        ]
        good = sorted(r for r, error in by_rate.items() if error <= min(by_rate.values()) + 1)
        found[name] = {
            "rate": rate, "errors": errors, "mean": statistics.mean(errors),
            "standard error": _standard_error(errors),
            "over the baseline": statistics.mean(paired),
            "its standard error": _standard_error(paired),
            "by rate": {f"{r:g}": by_rate[r] for r in sorted(by_rate)},
            "width of the good rates": good[-1] / good[0],
        }  # fmt: skip
    return found


def _standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def _print(found: dict[str, Any], about: dict[str, Any]) -> None:
    print(
        f"error in % on {about['test images']} images after {about['steps']} steps of"
        f" {about['batch']}"
    )
    print("method          rate   mean ± s.e.  seeds   over SGD+BN ± s.e.  good rates")
    for name, row in found.items():
        errors = f"{row['mean']:6.2f} {_plus_minus(row['standard error'])}"
        difference = f"{row['over the baseline']:+6.2f} {_plus_minus(row['its standard error'])}"
        width = f"× {row['width of the good rates']:.0f}"
        print(
            f"{name:14} {row['rate']:6g} {errors:>13} {len(row['errors']):6} {difference:>20} "
            f" {width:>10}"
        )


def _plus_minus(value: float | None) -> str:
    return "      " if value is None else f"± {value:.2f}"
