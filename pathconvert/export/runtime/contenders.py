"""What ``bench`` times: a loaded ONNX file, or a network in PyTorch, behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pathconvert.conversion.equivalence import run_dtype
from pathconvert.errors import PathconvertError, RuntimeUnavailable, first_line
from pathconvert.export.runtime.classifiers import recorded_size
from pathconvert.export.runtime.providers import require_size
from pathconvert.export.runtime.session import Session, shape_text
from pathconvert.networks.inputs import size_of
from pathconvert.networks.loading import LoadedNetwork

Call = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """One thing to time.

    Attributes:
        name: the file or network.
        engine: onnxruntime, torch eager or torch.compile.
        device: where it runs.
        input_size: without the batch dimension; a side is None where the graph leaves it free.
        fixed_batch: the only batch size that it takes; None for any.
        start: input batch → the call to time, which returns when the outputs are computed.
        recorded_size: the size that the file's card names, where the graph leaves sides free.
        fallback: why it does not run where ``auto`` looked first.
        pixels: whether it takes uint8 values.
        precision: dtype of the input, or of the network's weights.
    """

    name: str
    engine: str
    device: str
    input_size: tuple[int | None, ...]
    fixed_batch: int | None
    start: Callable[[np.ndarray[Any, Any]], Call]
    recorded_size: tuple[int | None, ...] | None = None
    fallback: str | None = None
    pixels: bool = False
    precision: str = "float32"


def session_contender(session: Session, name: str | None = None) -> Contender:
    """A loaded ``.onnx`` file as a contender.

    Raises:
        CheckpointError: it has several inputs, or one that holds no numbers.
    """
    batch, *rest = session.input_shape or (None,)
    own = tuple(side if isinstance(side, int) else None for side in rest)

    def start(array: np.ndarray[Any, Any]) -> Call:
        require_size(session, array.shape[1:])
        return session.runner(array)

    return Contender(
        name=name or str(session.path),
        engine="onnxruntime",
        device=session.device,
        input_size=own,
        recorded_size=recorded_size(session, own[0]) if None in own else None,
        fixed_batch=batch if isinstance(batch, int) else None,
        start=start,
        fallback=session.fallback,
        pixels=session.input_dtype == np.uint8,
        precision=session.input_dtype.name,
    )


def torch_contender(name: str, network: LoadedNetwork, device: str, compile: bool = False) -> Contender:
    """A checkpoint as a contender: in its own dtype on a GPU, in float32 on the CPU.

    Raises:
        RuntimeUnavailable: a GPU was asked for, and torch has none.
        PathconvertError: the network takes lists of images.
    """
    if network.architecture.task == "detection":
        raise PathconvertError(f"{name} takes lists of images: there is no batch to measure", "Give a classifier.")
    cuda = torch.cuda.is_available()
    if device in ("cuda", "tensorrt") and not cuda:
        raise RuntimeUnavailable(f"torch cannot use a GPU here, so {name} cannot run on {device}", "Use --device cpu.")
    where = "cuda" if cuda and device != "cpu" else "cpu"
    fallback = "torch finds no GPU" if device == "auto" and not cuda else None
    model = network.model.eval().to(where)
    model = model if where == "cuda" else model.float()
    start = _torch_starter(name, torch.compile(model) if compile else model, where, run_dtype(model), compile)
    return Contender(
        name=name,
        engine="torch.compile" if compile else "torch eager",
        device=where,
        input_size=size_of(network.architecture),
        fixed_batch=None,
        start=start,
        fallback=fallback,
        precision=str(run_dtype(model)).removeprefix("torch."),
    )


def _torch_starter(
    name: str, model: Any, device: str, dtype: torch.dtype, compiled: bool
) -> Callable[[np.ndarray[Any, Any]], Call]:
    def start(array: np.ndarray[Any, Any]) -> Call:
        batch = torch.from_numpy(array).to(device, dtype)
        if not compiled:
            try:
                with torch.inference_mode():
                    model(batch)
            except (RuntimeError, ValueError) as error:
                raise PathconvertError(
                    f"{name} cannot run on an input of {shape_text(array.shape[1:])}: {first_line(error)}",
                    "Give --input-size.",
                ) from error

        def call() -> None:
            with torch.inference_mode():
                model(batch)
            if device == "cuda":
                torch.cuda.synchronize()

        if compiled:
            _compile_now(name, model, batch)
        return call

    return start


def _compile_now(name: str, model: nn.Module, batch: torch.Tensor) -> None:
    try:
        with torch.inference_mode():
            model(batch)
    except RuntimeError as error:  # what dynamo and inductor raise, a missing C++ compiler included
        why = first_line(error)[:200]
        raise PathconvertError(f"torch.compile fails on {name}: {why}", "Leave --compile out.") from error


def common_size(contenders: Sequence[Contender], wanted: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The input size that all contenders take.

    Args:
        contenders: at least one.
        wanted: decides where sides are free.

    Raises:
        PathconvertError: there is none, or nothing tells it.
    """
    known = [contender for contender in contenders if None not in contender.input_size]
    recorded = next((c.recorded_size for c in contenders if c.recorded_size), None)
    size: tuple[int | None, ...] | None = wanted or (known[0].input_size if known else recorded)
    if size is None:
        text = shape_text(contenders[0].input_size)
        raise PathconvertError(f"{contenders[0].name} takes inputs of any size ({text})", "Say which: --input-size.")
    for contender in contenders:
        own = contender.input_size
        if len(own) != len(size) or any(a not in (None, b) for a, b in zip(own, size, strict=True)):
            first = known[0].name if known and wanted is None else "--input-size"
            raise PathconvertError(
                f"{contender.name} takes inputs of size {shape_text(own)}; {first} says {shape_text(size)}",
                "Measure networks of one input size, or give --input-size.",
            )
    return tuple(int(side) for side in size if side is not None)
