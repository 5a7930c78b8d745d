"""Latency and throughput side by side: ONNX files on ONNX Runtime, checkpoints in PyTorch.

All contenders are loaded at once and take turns, in a new (seeded) order every round, so that a processor that slows
down slows all of them and nobody always runs after the same other.
A *turn* is one call that is not timed (the caches are the other's) and then as many as fill :data:`TURN_SECONDS`; its
result is their mean. Medians and quartiles are over turns. A ratio is the median over rounds of this contender's turn
over the first contender's turn of the same round, which drift does not reach.
"""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pathconvert.errors import PathconvertError
from pathconvert.export.runtime.contenders import Call, Contender, common_size, session_contender, torch_contender
from pathconvert.export.runtime.providers import open_session
from pathconvert.export.runtime.session import ort
from pathconvert.networks.loading import LoadedNetwork, open_network

BATCH_SIZES = (1, 8)
ROUNDS = 20
TURN_SECONDS = 0.02
WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """One contender at one batch size; milliseconds a batch.

    Attributes:
        source, engine, device: the contender.
        batch: images a call.
        median_ms, low_ms, high_ms: median and quartiles of the turns.
        fastest_ms: the best turn, which other programs disturb least.
        first_ms: the very first call, which allocates, tunes or compiles.
        throughput: images a second at the median.
        ratio, ratio_low, ratio_high: median and quartiles of this turn over the first contender's of the same round.
    """

    source: str
    engine: str
    device: str
    batch: int
    median_ms: float
    low_ms: float
    high_ms: float
    fastest_ms: float
    first_ms: float
    throughput: float
    ratio: float
    ratio_low: float
    ratio_high: float


@dataclass(frozen=True)
class BenchReport:
    """What :func:`measure` measured.

    Attributes:
        timings: by batch size, in the order of the sources.
        threads: of every contender on the CPU.
        rounds: turns of each contender.
        input_size: without the batch dimension.
        fallbacks: contender → why it runs on the CPU.
        versions: of torch and ONNX Runtime.
    """

    timings: tuple[Timing, ...]
    threads: int
    rounds: int
    input_size: tuple[int, ...]
    fallbacks: dict[str, str]
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return asdict(self)


def measure(
    sources: Sequence[str | Path],
    batch_sizes: Sequence[int] | None = None,
    *,
    device: str = "auto",
    threads: int | None = None,
    rounds: int = ROUNDS,
    compile: bool = False,
    io_binding: bool = False,
    cuda_graph: bool = False,
    input_size: tuple[int, ...] | None = None,
    load: Callable[[str], LoadedNetwork] | None = None,
) -> BenchReport:
    """Time ``.onnx`` files, checkpoints of any form and torchvision names against each other.

    Args:
        sources: the first one is what the ratios are over. A checkpoint runs in torch as it is.
        batch_sizes: default 1 and 8, or the one size that a file was exported for.
        device: auto, cuda, tensorrt (torch: cuda) or cpu.
        threads: on the CPU, of all contenders; default torch's number.
        rounds: turns of each contender.
        compile: time checkpoints under ``torch.compile`` too.
        io_binding: on a GPU, leave out the copies of inputs and outputs.
        cuda_graph: on a GPU, replay captured kernels (ONNX Runtime only).
        input_size: without the batch dimension, where a file leaves it free.
        load: opens a checkpoint; default :func:`pathconvert.networks.loading.open_network`.

    Raises:
        PathconvertError: inputs differ, a batch size does not fit, or a source cannot run; the message says which.
        RuntimeUnavailable: the device that was asked for is not there.
    """
    if rounds < 1 or not sources or any(size < 1 for size in batch_sizes or ()):
        raise PathconvertError("nothing to measure", "Give at least one source, one round and batch sizes from 1.")
    threads = threads or torch.get_num_threads()
    with torch_threads(threads):
        contenders = _contenders(sources, device, threads, compile, io_binding, cuda_graph, input_size, load)
        size = common_size(contenders, input_size)
        timings: list[Timing] = []
        for batch in _batches(contenders, batch_sizes):
            timings += time_contenders(contenders, batch, size, rounds)
    fallbacks = {f"{c.name} ({c.engine})": c.fallback for c in contenders if c.fallback}
    versions = {"torch": torch.__version__, "onnxruntime": ort.__version__}
    return BenchReport(tuple(timings), threads, rounds, size, fallbacks, versions)


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- timing ------------------------------------------------------------------------------------------------------


def time_contenders(contenders: Sequence[Contender], batch: int, size: tuple[int, ...], rounds: int) -> list[Timing]:
    """Time all contenders at one batch size (see the module's docstring)."""
    calls, first = [], []
    for contender in contenders:
        call = contender.start(random_batch((batch, *size), contender.pixels))
        first.append(_seconds(call, 1))
        calls.append(call)
    turns = turns_of(calls, rounds)
    timings = []
    for contender, own, begun in zip(contenders, turns, first, strict=True):
        low, median, high = quartiles([1000 * seconds for seconds in own])
        ratio = quartiles([a / b for a, b in zip(own, turns[0], strict=True)])
        places = (contender.name, contender.engine, contender.device, batch)
        speed = (median, low, high, 1000 * min(own), 1000 * begun, 1000 * batch / median)
        timings.append(Timing(*places, *speed, ratio[1], ratio[0], ratio[2]))
    return timings


def turns_of(calls: Sequence[Call], rounds: int) -> list[list[float]]:
    """Seconds a call, for every call in turn and every round."""
    counts = []
    for call in calls:
        for _ in range(WARM_UP - 1):
            call()
        counts.append(max(1, math.ceil(TURN_SECONDS / max(_seconds(call, 1), 1e-6))))
    turns: list[list[float]] = [[] for _ in calls]
    chance = random.Random(0)
    for _ in range(rounds):
        for i in chance.sample(range(len(calls)), len(calls)):
            calls[i]()
            turns[i].append(_seconds(calls[i], counts[i]))
    return turns


def _seconds(call: Call, times: int) -> float:
    begun = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begun) / times


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def random_batch(shape: tuple[int, ...], pixels: bool) -> np.ndarray[Any, Any]:
    """Seeded standard normal noise in float32, or uint8 pixels."""
    generator = np.random.default_rng(0)
    if pixels:
        return generator.integers(0, 256, shape, dtype=np.uint8)
    return generator.standard_normal(shape, dtype=np.float32)


# ---- what to time --------------------------------------------------------------------------------------------------


def _contenders(
    sources: Sequence[str | Path],
    device: str,
    threads: int,
    compile: bool,
    io_binding: bool,
    cuda_graph: bool,
    input_size: tuple[int, ...] | None,
    load: Callable[[str], LoadedNetwork] | None,
) -> list[Contender]:
    """One for every file, two for a checkpoint with ``compile``; in the order of the sources."""
    load = load or (lambda source: open_network(source, input_size=input_size))
    files = {
        i: session_contender(
            open_session(source, device, threads, cuda_graph, io_binding, take_turns=True)
        )
        for i, source in enumerate(sources)
        if Path(source).suffix.lower() == ".onnx"
    }  # fmt: skip
    # a comparison across devices says nothing: torch follows the files
    follow = "cpu" if device == "auto" and any(c.device == "cpu" for c in files.values()) else device
    contenders = []
    for i, source in enumerate(sources):
        if i in files:
            contenders.append(files[i])
            continue
        network = load(str(source))
        contenders.append(torch_contender(str(source), network, follow))
        if compile:
            contenders.append(torch_contender(str(source), network, follow, compile=True))
    return contenders


def _batches(contenders: Sequence[Contender], wanted: Sequence[int] | None) -> tuple[int, ...]:
    """The batch sizes to measure.

    Raises:
        PathconvertError: a file was exported for another one.
    """
    fixed = [c for c in contenders if c.fixed_batch is not None]
    sizes = tuple(wanted) if wanted else ((int(fixed[0].fixed_batch or 1),) if fixed else BATCH_SIZES)
    for contender in fixed:
        for size in sizes:
            if size != contender.fixed_batch:
                raise PathconvertError(
                    f"{contender.name} takes batches of {contender.fixed_batch} alone, not of {size}",
                    f"Give --batch {contender.fixed_batch}, or export it with a free batch size.",
                )
    return sizes
