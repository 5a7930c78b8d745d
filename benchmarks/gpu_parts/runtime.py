"""Our exports on ONNX Runtime's GPU providers: proven there, and timed beside PyTorch and its own
export.

Of every network: the Path-BN form in fp32 and, with balanced ranges, in fp16; PyTorch's export of
the original. The files are made in the background while earlier parts run. A proof compares the
whole network as the GPU runs it with the original in float64; fp32 is proven without TF32, which
ONNX Runtime and PyTorch both use by default and which is what is timed.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pathconvert
from pathconvert.errors import PathconvertError
from pathconvert.export import export_onnx
from pathconvert.export.graph.verification import Differs, prove
from pathconvert.export.runtime.bench import time_engines
from pathconvert.export.runtime.engines import Engine, compiled, session_engine, torch_engine
from pathconvert.export.runtime.providers import open_session
from pathconvert.export.runtime.session import Session, ort
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.loading import LoadedNetwork, open_network

from convert import build, example_for
from export import CALIBRATION_IMAGES, export_theirs
from gpu_parts.context import Context, write_json

WEIGHTS = "squeezenet1_1.pth"
MADE = "runtime.json"
#: Building TensorRT's engines for one more batch size can take so long.
TENSORRT_SECONDS = 60
PRECISIONS = {"fp32": {}, "fp16": {"precision": "fp16", "gauge": "balanced"}}


def networks(context: Context) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Name, network and example: the real SqueezeNet where its weights are, and a ResNet-50 with
    random ones.
    """
    side = context.size(224, 64)
    path = context.file(WEIGHTS)
    model = build("squeezenet1_1") if path is None else open_network(path).model
    yield (
        "squeezenet1_1",
        model.float().eval(),
        example_for("squeezenet1_1", small=False)[..., :side, :side],
    )
    if not context.rehearse:
        yield "resnet50", build("resnet50"), example_for("resnet50", small=False)


def _loaded(name: str, model: nn.Module, example: Tensor) -> LoadedNetwork:
    architecture = Architecture(name, {}, tuple(example.shape[1:]), "classification")
    return LoadedNetwork(model, architecture, None, ())


def prepare(context: Context) -> None:
    """The files; no GPU is used, and two threads."""
    torch.set_num_threads(2)
    made: dict[str, Any] = {}
    for name, model, example in networks(context):
        theirs = context.work / f"{name}.theirs.onnx"
        made[theirs.name] = export_theirs(model, example, theirs)
        generator = torch.Generator().manual_seed(2)
        images = torch.randn(CALIBRATION_IMAGES, *example.shape[1:], generator=generator)
        entered = pathconvert.to_path_bn(model, example, calibration=images)
        for precision, options in PRECISIONS.items():
            file = context.work / f"{name}.{precision}.onnx"
            try:
                report = export_onnx(entered, file, example, **options)
                made[file.name] = {
                    "nodes": report.nodes,
                    "noise ratio": report.noise_ratio,
                    "error": report.max_error,
                }
            except PathconvertError as error:  # a refusal is a result
                made[file.name] = {"refused": str(error)}
            write_json(context.work / MADE, made)


def devices(context: Context) -> dict[str, str]:
    """Device → why it is left out, empty for those that ONNX Runtime of this machine was built
    for.
    """
    if context.rehearse:
        return {"cpu": ""}
    wanted = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
    have = ort.get_available_providers()
    without = f"onnxruntime {ort.__version__} was built without it"
    return {device: "" if name in have else without for device, name in wanted.items()}


def measure(context: Context) -> None:
    """Proofs first, then timings, then the compiler's; raises where a proof fails."""
    made = json.loads((context.work / MADE).read_text()) if (context.work / MADE).exists() else {}
    context.keep("files", made)
    every = list(networks(context))
    found = devices(context)
    usable = [device for device, why in found.items() if not why]
    without = {device: why for device, why in found.items() if why}
    context.keep("onnxruntime", {"version": ort.__version__, "left out": without})
    for device, why in without.items():
        print(f"  {device}: not measured, {why}")
    differing = _prove_all(context, every, usable)
    _time_all(context, every, usable)
    if differing:
        raise AssertionError(f"not proven: {', '.join(differing)}")


def _prove_all(
    context: Context, every: list[tuple[str, nn.Module, Tensor]], usable: list[str]
) -> list[str]:
    """Every file on every device; those that differ."""
    differing = []
    proofs: dict[str, Any] = {}
    for device in usable:
        for name, model, example in every:
            for precision in PRECISIONS:
                file = context.work / f"{name}.{precision}.onnx"
                for how in ({}, {"cuda_graph": True}) if device == "cuda" else ({},):
                    title = f"{file.name} on {device}{', CUDA graph' if how else ''}"
                    proofs[title] = _proven(file, device, precision, model, example, how)
                    context.keep("proofs", proofs)
                    differing += [title] if "differs" in proofs[title] else []
                    print(f"  {title}: {_shown(proofs[title])}", flush=True)
    return differing


def _time_all(
    context: Context, every: list[tuple[str, nn.Module, Tensor]], usable: list[str]
) -> None:
    """Every network and batch size.

    Then the compiler's, which takes long to begin, as far as the time allows.
    """
    timings: dict[str, Any] = {}
    for compile in (False, True):
        for name, model, example in every:
            for batch in context.size((1, 8, 64), (1, 2)):
                if compile and context.seconds_left() < context.size(25, 15):
                    continue
                timed = _timed(context, name, model, example, batch, usable, compile=compile)
                timings.setdefault(f"{name}, batches of {batch}", {}).update(timed)
                context.keep("timings", timings)
                _print(f"{name}, batches of {batch}", timed)


# ---- proofs --------------------------------------------------------------------------------------


def _proven(
    file: Path, device: str, precision: str, model: nn.Module, example: Tensor, how: dict[str, bool]
) -> dict[str, Any]:
    """What was compared and the nodes by provider.

    Why not where the file or device cannot be used.
    """
    if not file.exists():
        return {"not measured": f"{file.name} was not made"}
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(batch, *example.shape[1:], generator=generator) for batch in (1, 2, 5)]
    try:
        session = open_session(file, device, tf32=False, io_binding=bool(how), **how)
    except PathconvertError as error:
        return {"not measured": str(error)}
    found: dict[str, Any] = {"nodes": session.nodes, "fallback": session.fallback}
    try:
        proof = prove(_runner(session), model, inputs, precision)
    except Differs as difference:
        return found | {"differs": str(difference)}
    return found | {
        "error": proof.max_error,
        "noise ratio": proof.noise_ratio if precision == "fp32" else None,
    }


def _runner(session: Session) -> Callable[[Tensor], list[Tensor]]:
    def run(x: Tensor) -> list[Tensor]:
        return [torch.from_numpy(np.asarray(output)).double() for output in session.run(x.numpy())]

    return run


def _shown(proof: dict[str, Any]) -> str:
    if "error" not in proof:
        return "; ".join(
            f"{key}: {proof[key]}" for key in ("not measured", "differs") if key in proof
        )
    noise = (
        "" if proof["noise ratio"] is None else f", {proof['noise ratio']:.2f} × float32's noise"
    )
    return f"error {proof['error']:.1e}{noise}; nodes {proof['nodes']}"


# ---- timings -------------------------------------------------------------------------------------


def _engines(
    context: Context,
    name: str,
    model: nn.Module,
    example: Tensor,
    usable: list[str],
    *,
    compile: bool,
) -> Iterator[Engine]:
    """The engines of one network, each named by how it runs; torch eager in fp32 comes first."""
    eager = torch_engine(name, _loaded(name, model, example), context.device, own_dtype=True)
    yield _renamed(eager, "fp32")
    if compile:
        yield _renamed(compiled(eager), "fp32")
        return
    if context.device == "cuda":
        narrow = _loaded(name, copy.deepcopy(model).half(), example)
        yield _renamed(torch_engine(name, narrow, context.device, own_dtype=True), "fp16")
    for device in usable:
        if device == "tensorrt" and context.seconds_left() < TENSORRT_SECONDS:
            print(f"  {name}, tensorrt: not measured, {context.seconds_left():.0f} s are left")
            continue
        for kind in ("theirs", *PRECISIONS):
            file = context.work / f"{name}.{kind}.onnx"
            ways = ({"io_binding": True}, {"cuda_graph": True}, {}) if device != "cpu" else ({},)
            for how in ways if file.exists() else ():
                if kind == "theirs" and how != ways[0]:
                    continue
                title = f"{kind}, {device}" + "".join(f", {word.replace('_', ' ')}" for word in how)
                try:
                    yield session_engine(open_session(file, device, take_turns=True, **how), title)
                except PathconvertError as error:
                    print(f"  {file.name}, {title}: not measured, {error}")


def _renamed(engine: Engine, precision: str) -> Engine:
    return dataclasses.replace(engine, name=f"{engine.kind}, {precision}")


def _timed(
    context: Context,
    name: str,
    model: nn.Module,
    example: Tensor,
    batch: int,
    usable: list[str],
    *,
    compile: bool,
) -> dict[str, Any]:
    """Milliseconds and images per second, by engine.

    Ratios are to torch eager in fp32 in the same round.
    """
    shape = (batch, *example.shape[1:])
    engines = []
    for engine in _engines(context, name, model, example, usable, compile=compile):
        try:
            engine.runner(np.zeros(shape, np.float32))()
        except PathconvertError as error:  # the others are measured
            print(f"  {name}, {engine.name}, batches of {batch}: not measured, {error}")
            continue
        engines.append(engine)
    rows = time_engines(engines, batch, shape[1:], context.size(10, 2)) if engines else []
    keys = ("median_ms", "low_ms", "high_ms", "throughput", "ratio")
    return {row.source: {key: round(getattr(row, key), 4) for key in keys} for row in rows}


def _print(title: str, timed: dict[str, Any]) -> None:
    print(title)
    for source, row in timed.items():
        if "median_ms" in row:
            print(
                f"  {source:38} {row['median_ms']:9.3f} ms {row['throughput']:9.0f} images/s  ×"
                f" {row['ratio']:.2f}"
            )
    print(end="", flush=True)
