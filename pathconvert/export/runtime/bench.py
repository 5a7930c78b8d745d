"""Compare latency and throughput: ONNX files in ONNX Runtime, checkpoints in PyTorch.

All contenders are loaded at once and take turns, in a new (seeded) order in every round. A processor that slows down
therefore slows all of them, and no contender always runs after the same other one.
A *turn* is one call that is not timed, because the caches still hold another contender's data, and then as many calls
as fill :data:`TURN_SECONDS`; its result is their mean. Medians and quartiles are over turns. For the ratio, every
turn is divided by the first contender's turn in the same round, which cancels slow drift; the ratio is the median over
rounds.
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
from pathconvert.export.runtime.session import Session, ort
from pathconvert.networks.loading import LoadedNetwork, open_network

BATCH_SIZES = (1, 8)
ROUNDS = 20
TURN_SECONDS = 0.02
WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """The timing of one contender at one batch size, in milliseconds per batch.

    Attributes:
        source, engine, device: the contender.
        batch: images per call.
        median_ms, low_ms, high_ms: median and quartiles of the turns.
        fastest_ms: the fastest turn, which other programs disturbed least.
        first_ms: the very first call, which allocates, tunes or compiles.
        throughput: images per second at the median.
        ratio, ratio_low, ratio_high: median and quartiles of a turn divided by the first contender's turn in the same
            round.
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
        timings: ordered by batch size, then as the sources.
        threads: number of threads of every contender on the CPU.
        rounds: number of turns of each contender.
        input_size: size of one input, without the batch dimension.
        fallbacks: contender → why it runs on the CPU.
        versions: the versions of torch and ONNX Runtime.
    """

    timings: tuple[Timing, ...]
    threads: int
    rounds: int
    input_size: tuple[int, ...]
    fallbacks: dict[str, str]
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
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
        sources: the networks; ratios are relative to the first one. A checkpoint runs in torch as it is.
        batch_sizes: default: 1 and 8, or the one batch size that a file was exported for.
        device: auto, cuda, tensorrt (torch then uses cuda) or cpu.
        threads: number of CPU threads of every contender; default: torch's own number.
        rounds: number of turns of each contender.
        compile: time checkpoints under ``torch.compile`` as well.
        io_binding: on a GPU, do not time the copies of inputs and outputs.
        cuda_graph: on a GPU, replay captured kernels (ONNX Runtime only).
        input_size: size of one input, without the batch dimension; needed if a file leaves it free.
        load: opens a checkpoint; default: :func:`pathconvert.networks.loading.open_network`.

    Raises:
        PathconvertError: there is nothing to measure, the sources take different inputs, a batch size does not fit, or
            a source cannot run.
        RuntimeUnavailable: the device that was asked for cannot be used.
    """
    if rounds < 1 or not sources or any(size < 1 for size in batch_sizes or ()):
        raise PathconvertError(
            "there is nothing to measure", "Give at least one source, one round, and batch sizes of 1 or more."
        )
    threads = threads or torch.get_num_threads()
    load = load or (lambda source: open_network(source, input_size=input_size))

    def open_file(path: str | Path) -> Session:
        return open_session(path, device, threads, cuda_graph=cuda_graph, io_binding=io_binding, take_turns=True)

    with torch_threads(threads):
        contenders = _contenders(sources, device, open_file, load, compile=compile)
        size = common_size(contenders, input_size)
        timings: list[Timing] = []
        for batch in _batches(contenders, batch_sizes):
            timings += time_contenders(contenders, batch, size, rounds)
    fallbacks = {f"{c.name} ({c.engine})": c.fallback for c in contenders if c.fallback}
    versions = {"torch": torch.__version__, "onnxruntime": ort.__version__}
    return BenchReport(
        timings=tuple(timings),
        threads=threads,
        rounds=rounds,
        input_size=size,
        fallbacks=fallbacks,
        versions=versions,
    )


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads."""
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
        call = contender.start(random_batch((batch, *size), pixels=contender.pixels))
        first.append(_seconds(call, 1))
        calls.append(call)
    turns = turns_of(calls, rounds)
    timings = []
    for contender, own, begun in zip(contenders, turns, first, strict=True):
        low, median, high = quartiles([1000 * seconds for seconds in own])
        ratio = quartiles([a / b for a, b in zip(own, turns[0], strict=True)])
        timings.append(
            Timing(
                source=contender.name,
                engine=contender.engine,
                device=contender.device,
                batch=batch,
                median_ms=median,
                low_ms=low,
                high_ms=high,
                fastest_ms=1000 * min(own),
                first_ms=1000 * begun,
                throughput=1000 * batch / median,
                ratio=ratio[1],
                ratio_low=ratio[0],
                ratio_high=ratio[2],
            )
        )
    return timings


def turns_of(calls: Sequence[Call], rounds: int) -> list[list[float]]:
    """Seconds per call, for every call and every round: [calls][rounds]."""
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
    """Mean seconds per call."""
    begun = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begun) / times


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the first quartile, the median and the third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def random_batch(shape: tuple[int, ...], *, pixels: bool) -> np.ndarray[Any, Any]:
    """Seeded standard normal noise in float32, or random uint8 pixels."""
    generator = np.random.default_rng(0)
    if pixels:
        return generator.integers(0, 256, shape, dtype=np.uint8)
    return generator.standard_normal(shape, dtype=np.float32)


# ---- what to time --------------------------------------------------------------------------------------------------


def _contenders(
    sources: Sequence[str | Path],
    device: str,
    open_file: Callable[[str | Path], Session],
    load: Callable[[str], LoadedNetwork],
    *,
    compile: bool,
) -> list[Contender]:
    """One contender per file, and two per checkpoint with ``compile``; in the order of the sources."""
    files = {
        i: session_contender(open_file(source))
        for i, source in enumerate(sources)
        if Path(source).suffix.lower() == ".onnx"
    }
    # a comparison across devices would mean nothing, so torch runs where the files run
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
        PathconvertError: a file was exported for another batch size.
    """
    fixed = [c for c in contenders if c.fixed_batch is not None]
    sizes = tuple(wanted) if wanted else ((int(fixed[0].fixed_batch or 1),) if fixed else BATCH_SIZES)
    for contender in fixed:
        for size in sizes:
            if size != contender.fixed_batch:
                raise PathconvertError(
                    f"{contender.name} only takes batches of {contender.fixed_batch}, not of {size}",
                    f"Give --batch {contender.fixed_batch}, or export the network with --batch dynamic.",
                )
    return sizes
