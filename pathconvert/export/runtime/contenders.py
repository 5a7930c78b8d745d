"""One interface for everything that ``bench`` times: loaded ONNX files, and networks in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pathconvert.conversion.equivalence import run_dtype
from pathconvert.errors import PathconvertError, first_line
from pathconvert.export.runtime.classifiers import recorded_size, torch_device
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
        input_size: size of one input, without the batch dimension; None for every side that the graph leaves free.
        fixed_batch: the only batch size that it takes; None if it takes any.
        start: input batch → the function to time, which returns once the outputs are computed.
        recorded_size: the input size in the file's card, if the graph leaves sides free.
        fallback: why ``auto`` did not choose a GPU; None if it did, or if a device was asked for.
        pixels: whether it takes uint8 values.
        precision: dtype of the input of an ONNX file, or of the weights of a network in PyTorch.
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
    """Make a contender of a loaded ``.onnx`` file.

    Raises:
        CheckpointError: the graph does not have exactly one input, or the input does not hold numbers.
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


def torch_contender(name: str, network: LoadedNetwork, device: str, *, compile: bool = False) -> Contender:
    """Make a contender of a checkpoint: in its own dtype on a GPU, in float32 on the CPU.

    Args:
        name: the file or network.
        network: its model is moved to the device.
        device: auto, cuda, tensorrt (torch then uses cuda) or cpu.
        compile: whether to run it under ``torch.compile``.

    Raises:
        RuntimeUnavailable: a GPU was asked for, and torch finds none.
        PathconvertError: the network takes lists of images.
    """
    if network.architecture.task == "detection":
        raise PathconvertError(f"{name} takes lists of images, so batches cannot be measured", "Give a classifier.")
    where, fallback = torch_device(name, "cuda" if device == "tensorrt" else device)
    model = network.model.eval().to(where)
    model = model if where == "cuda" else model.float()
    runner = torch.compile(model) if compile else model
    start = _torch_starter(name, runner, where, run_dtype(model), compiled=compile)
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
    name: str, model: Any, device: str, dtype: torch.dtype, *, compiled: bool
) -> Callable[[np.ndarray[Any, Any]], Call]:
    """The ``start`` of a contender in PyTorch, which runs the network once before it returns the call to time."""

    def start(array: np.ndarray[Any, Any]) -> Call:
        batch = torch.from_numpy(array).to(device, dtype)
        if not compiled:
            try:
                with torch.inference_mode():
                    model(batch)
            except (RuntimeError, ValueError) as error:
                raise PathconvertError(
                    f"{name} cannot run on inputs of size {shape_text(array.shape[1:])}: {first_line(error)}",
                    "Give another size with --input-size.",
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
    """Run a network under ``torch.compile`` for the first time, which compiles it."""
    try:
        with torch.inference_mode():
            model(batch)
    except RuntimeError as error:  # dynamo and inductor raise it, also if there is no C++ compiler
        why = first_line(error)[:200]
        raise PathconvertError(f"torch.compile fails on {name}: {why}", "Leave --compile out.") from error


def common_size(contenders: Sequence[Contender], wanted: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Return the input size that all contenders take, without the batch dimension.

    Args:
        contenders: at least one.
        wanted: the size to use if graphs leave sides free.

    Raises:
        PathconvertError: the contenders take different sizes, or the size is not known.
    """
    known = [contender for contender in contenders if None not in contender.input_size]
    recorded = next((c.recorded_size for c in contenders if c.recorded_size), None)
    size: tuple[int | None, ...] | None = wanted or (known[0].input_size if known else recorded)
    if size is None:
        text = shape_text(contenders[0].input_size)
        raise PathconvertError(
            f"{contenders[0].name} takes inputs of any size ({text})", "Choose one with --input-size."
        )
    for contender in contenders:
        own = contender.input_size
        if len(own) != len(size) or any(a not in (None, b) for a, b in zip(own, size, strict=True)):
            first = known[0].name if known and wanted is None else "--input-size"
            raise PathconvertError(
                f"{contender.name} takes inputs of size {shape_text(own)}; {first} says {shape_text(size)}",
                "Measure networks that take the same input size, or give one that all of them take: --input-size.",
            )
    return tuple(int(side) for side in size if side is not None)
