"""Seconds per training step, G-SGD+Path-BN over SGD+BN, and where the difference goes.

Both take turns in one process; times are CUDA events, and all ratios are of one round. Memory is
what the allocator has given out at the highest during a step, less what was there before the
contender was made.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torchvision.models import resnet50

from cifar_resnet import CifarResNet
from gpu_parts.context import Context
from step_cost import FORMS, Contender, Workload, compare

#: Seconds that a compiled workload needs at least where its graphs are in the compiler's cache.
COMPILED_SECONDS = 15
#: Seconds per step of G-SGD over SGD's, as the papers report them, and what ours should stay below.
PAPERS, TO_REACH = 1.33, 1.05
KERNELS = 10


def workloads(context: Context) -> list[Workload]:
    """In order of value."""
    toy = functools.partial(CifarResNet, 1)
    sizes = context.size(
        [("resnet50", resnet50, 224, 128), ("resnet56", CifarResNet, 32, 128)],
        [("resnet8", toy, 32, 4)],
    )
    return [
        Workload(name, build, side, batch, 0.9, context.device, compiled)
        for compiled in (False, True)
        for name, build, side, batch in sizes
    ]


def prepare(context: Context) -> None:
    """Fill the compiler's cache on disk, so that the budget is not spent on compiling."""
    torch.backends.cudnn.benchmark = True
    for workload in workloads(context):
        for form in FORMS if workload.compiled else ():
            Contender(workload, form).step()
            gc.collect()


def measure(context: Context) -> None:
    """All workloads that the time allows; then the profiles."""
    torch.backends.cudnn.benchmark = True
    print(
        f"  a step of G-SGD+Path-BN ÷ SGD+BN; the papers: {PAPERS}, to reach: {TO_REACH} compiled",
        flush=True,
    )
    rows: list[dict[str, Any]] = []
    left_out = []
    for workload in workloads(context):
        if workload.compiled and context.seconds_left() < context.size(COMPILED_SECONDS, 0):
            left_out.append(
                f"{workload.network}, {workload.title()}: {context.seconds_left():.0f} s were left"
            )
            context.keep("left out", left_out)
            continue
        rows.append({})
        with _alone(workload) as (contenders, memory):
            row = {"network": workload.network, "batch": workload.batch, "how": workload.title()}
            rows[-1] |= (
                row
                | compare(contenders, context.size(12, 2), context.size(10, 2))
                | {"memory": memory}
            )
            context.keep("steps", rows)
            _print(rows[-1])
            rows[-1]["kernels"] = _kernels(contenders, context.size(5, 1))
            context.keep("steps", rows)
            _print_kernels(rows[-1]["kernels"])


@contextlib.contextmanager
def _alone(workload: Workload) -> Iterator[tuple[dict[str, Contender], float | None]]:
    """Both contenders, and the second's peak memory over the first's.

    Their memory is given back.
    """
    contenders, peaks = {}, []
    for form in FORMS:
        gpu = workload.device == "cuda"
        before = torch.cuda.memory_allocated() if gpu else 0
        contenders[form] = Contender(workload, form)
        contenders[form].step()  # makes gradients and the optimizer's buffers
        if gpu:
            torch.cuda.reset_peak_memory_stats()
            contenders[form].step()
            torch.cuda.synchronize()
            peaks.append(torch.cuda.max_memory_allocated() - before)
    yield contenders, peaks[1] / peaks[0] if peaks else None
    contenders.clear()
    gc.collect()
    if workload.device == "cuda":
        torch.cuda.empty_cache()


def _kernels(contenders: dict[str, Contender], steps: int) -> dict[str, list[dict[str, Any]]]:
    """The largest kernels that only one form has, by form: name, milliseconds per step, calls per
    step.
    """
    times = {form: _profiled(contender, steps) for form, contender in contenders.items()}
    found = {}
    for form, other in zip(FORMS, reversed(FORMS), strict=True):
        only = [one for name, one in times[form].items() if name not in times[other]]
        found[form] = sorted(only, key=lambda one: -one["ms"])[:KERNELS]
    return found


def _profiled(contender: Contender, steps: int) -> dict[str, dict[str, Any]]:
    gpu = contender.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        contender.turn(steps)
    kind = DeviceType.CUDA if gpu else DeviceType.CPU
    found = {}
    for event in profiler.key_averages():
        us = event.self_device_time_total if gpu else event.self_cpu_time_total
        if event.device_type == kind and us:
            row = {"name": event.key[:160], "ms": us / 1e3 / steps, "calls": event.count / steps}
            found[event.key] = row
    return found


def _print(row: dict[str, Any]) -> None:
    memory = "not measured" if row["memory"] is None else f"{row['memory']:.3f}"
    print(f"{row['network']}, batches of {row['batch']}, {row['how']}")
    print(
        f"  step {row['SGD+BN, ms']:.2f} ms; × {row['whole step']:.3f}"
        f" ({row['whole step, low']:.3f} to {row['whole step, high']:.3f}), of it Path-BN"
        f" {row['path-bn']:+.1%}, optimizer {row['optimizer']:+.1%}"
    )
    print(
        f"  optimizer {row['G-SGD, ms']:.3f} ms, × {row['optimizer alone']:.2f}; peak memory ×"
        f" {memory}",
        flush=True,
    )


def _print_kernels(kernels: dict[str, list[dict[str, Any]]]) -> None:
    for form, rows in kernels.items():
        print(f"  kernels of {form} alone: ms and calls per step")
        for row in rows:
            print(f"  {row['ms']:8.3f} {row['calls']:7.1f}  {row['name'][:60]}")
    print(end="", flush=True)
