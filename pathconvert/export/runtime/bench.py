"""Compare latency and throughput: ONNX files in ONNX Runtime, checkpoints in PyTorch.

All engines are loaded at once and take turns, in a new (seeded) order in every round. A processor
that slows down therefore slows all of them, and no engine always runs after the same other one.
A *turn* is one call that is not timed, because the caches still hold another engine's data, and
then as many calls as fill :data:`TURN_SECONDS`; its result is their mean. Medians and quartiles are
over turns. For the ratio, every turn is divided by the first engine's turn in the same round, which
cancels slow drift; the ratio is the median over rounds.
"""

from __future__ import annotations

import contextlib
import functools
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
from pathconvert.export.runtime.engines import (
    Array,
    Call,
    Engine,
    compiled,
    is_onnx,
    open_engine,
)
from pathconvert.export.runtime.providers import open_session
from pathconvert.export.runtime.session import ort, shape_text
from pathconvert.networks.loading import LoadedNetwork, open_network

BATCH_SIZES = (1, 8)
ROUNDS = 20
TURN_SECONDS = 0.02
WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """The timing of one engine at one batch size, in milliseconds per batch.

    Attributes:
        source, engine, device: the engine's name, its kind and where it runs.
        batch: images per call.
        median_ms, low_ms, high_ms: median and quartiles of the turns.
        fastest_ms: the fastest turn, which other programs disturbed least.
        first_ms: the very first call, which allocates, tunes or compiles.
        throughput: images per second at the median.
        ratio, ratio_low, ratio_high: median and quartiles of a turn divided by the first engine's
            turn in the same round.
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
        threads: number of threads of every engine on the CPU.
        rounds: number of turns of each engine.
        input_size: size of one input, without the batch dimension.
        fallbacks: name and kind of an engine → why it runs on the CPU.
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
        sources: the networks; ratios are relative to the first one. A checkpoint runs in torch as
            it is.
        batch_sizes: default: 1 and 8, or the one batch size that a file was exported for.
        device: auto, cuda, tensorrt (torch then uses cuda) or cpu.
        threads: number of CPU threads of every engine; default: torch's own number.
        rounds: number of turns of each engine.
        compile: time checkpoints under ``torch.compile`` as well.
        io_binding: on a GPU, do not time the copies of inputs and outputs.
        cuda_graph: on a GPU, replay captured kernels (ONNX Runtime only).
        input_size: size of one input, without the batch dimension; needed if a file leaves it free.
        load: opens a checkpoint; default: :func:`pathconvert.networks.loading.open_network`.

    Raises:
        PathconvertError: there is nothing to measure, the sources take different inputs, a batch
            size does not fit, or a source cannot run.
        RuntimeUnavailable: the device that was asked for cannot be used.
    """
    if rounds < 1 or not sources or any(size < 1 for size in batch_sizes or ()):
        raise PathconvertError(
            "there is nothing to measure",
            "Give at least one source, one round, and batch sizes of 1 or more.",
        )
    threads = threads or torch.get_num_threads()
    open_one = functools.partial(
        open_engine,
        load=load or (lambda source: open_network(source, input_size=input_size)),
        open_file=functools.partial(
            open_session,
            threads=threads,
            cuda_graph=cuda_graph,
            io_binding=io_binding,
            take_turns=True,
        ),
        own_dtype=True,
    )
    with torch_threads(threads):
        engines = _engines(sources, device, open_one, compile=compile)
        size = common_size(engines, input_size)
        timings: list[Timing] = []
        for batch_size in _fitting_batch_sizes(engines, batch_sizes):
            timings += time_engines(engines, batch_size, size, rounds)
    fallbacks = {f"{one.name} ({one.kind})": one.fallback for one in engines if one.fallback}
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


# ---- timing --------------------------------------------------------------------------------------


def time_engines(
    engines: Sequence[Engine], batch_size: int, size: tuple[int, ...], rounds: int
) -> list[Timing]:
    """Time all engines at one batch size (see the module's docstring).

    Args:
        engines: at least one; the ratios are relative to the first one.
        batch_size: inputs per call.
        size: size of one input, without the batch dimension.
        rounds: number of turns of each engine.

    Returns:
        One timing per engine, in their order.

    Raises:
        PathconvertError: an engine cannot run on these inputs.
    """
    calls, first = [], []
    for engine in engines:
        call = engine.runner(random_batch((batch_size, *size), pixels=engine.takes_pixels))
        first.append(_seconds(call, 1))
        calls.append(call)
    turns = turns_of(calls, rounds)
    timings = []
    for engine, own, begun in zip(engines, turns, first, strict=True):
        low, median, high = quartiles([1000 * seconds for seconds in own])
        ratio = quartiles([a / b for a, b in zip(own, turns[0], strict=True)])
        timings.append(
            Timing(
                source=engine.name,
                engine=engine.kind,
                device=engine.device,
                batch=batch_size,
                median_ms=median,
                low_ms=low,
                high_ms=high,
                fastest_ms=1000 * min(own),
                first_ms=1000 * begun,
                throughput=1000 * batch_size / median,
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


def random_batch(shape: tuple[int, ...], *, pixels: bool) -> Array:
    """Seeded standard normal noise in float32, or random uint8 pixels."""
    generator = np.random.default_rng(0)
    if pixels:
        return generator.integers(0, 256, shape, dtype=np.uint8)
    return generator.standard_normal(shape, dtype=np.float32)


# ---- what to time --------------------------------------------------------------------------------


def _engines(
    sources: Sequence[str | Path],
    device: str,
    open_one: Callable[[str | Path, str], Engine],
    *,
    compile: bool,
) -> list[Engine]:
    """One engine per file, and two per checkpoint with ``compile``; in the order of the sources.

    Raises:
        PathconvertError: a network takes lists of images.
    """
    files = {i: open_one(path, device) for i, path in enumerate(sources) if is_onnx(path)}
    # a comparison across devices would mean nothing, so torch runs where the files run
    on_cpu = device == "auto" and any(file.device == "cpu" for file in files.values())
    follow = "cpu" if on_cpu else "cuda" if device == "tensorrt" else device
    engines = []
    for i, source in enumerate(sources):
        if i in files:
            engines.append(files[i])
            continue
        engine = open_one(source, follow)
        if engine.architecture and engine.architecture.task == "detection":
            raise PathconvertError(
                f"{source} takes lists of images, so batches cannot be measured",
                "Give a classifier.",
            )
        engines += [engine, compiled(engine)] if compile else [engine]
    return engines


def common_size(
    engines: Sequence[Engine], wanted: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """Return the input size that all engines take, without the batch dimension.

    Args:
        engines: at least one.
        wanted: the size to use if graphs leave sides free.

    Raises:
        PathconvertError: the engines take different sizes, or the size is not known.
    """
    known = [engine for engine in engines if None not in engine.input_size]
    recorded = next((engine.recorded_size for engine in engines if engine.recorded_size), None)
    size: tuple[int | None, ...] | None = wanted or (known[0].input_size if known else recorded)
    if size is None:
        text = shape_text(engines[0].input_size)
        raise PathconvertError(
            f"{engines[0].name} takes inputs of any size ({text})", "Choose one with --input-size."
        )
    for engine in engines:
        own = engine.input_size
        if len(own) != len(size) or any(a not in (None, b) for a, b in zip(own, size, strict=True)):
            first = known[0].name if known and wanted is None else "--input-size"
            raise PathconvertError(
                f"{engine.name} takes inputs of size {shape_text(own)}; "
                f"{first} says {shape_text(size)}",
                "Measure networks that take the same input size, or give one that all of them "
                "take: --input-size.",
            )
    return tuple(int(side) for side in size if side is not None)


def _fitting_batch_sizes(
    engines: Sequence[Engine], wanted: Sequence[int] | None
) -> tuple[int, ...]:
    """The batch sizes to measure: the wanted ones, the one that a file takes, or the default ones.

    Raises:
        PathconvertError: a file was exported for another batch size.
    """
    fixed = {engine.name: engine.fixed_batch for engine in engines if engine.fixed_batch}
    batch_sizes = tuple(wanted or list(fixed.values())[:1] or BATCH_SIZES)
    for name, only in fixed.items():
        for batch_size in batch_sizes:
            if batch_size != only:
                raise PathconvertError(
                    f"{name} only takes batches of {only}, not of {batch_size}",
                    f"Give --batch {only}, or export the network with --batch dynamic.",
                )
    return batch_sizes
