"""Networks that are ready to run: ``.onnx`` files in ONNX Runtime, and checkpoints in torch.

An :class:`Engine` is one network on one device. ``predict``, ``evaluate`` and ``bench`` open their
sources with :func:`open_engine`, and run all engines in the same way. What only image classifiers
have to fulfil is checked in ``image_classifier.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pathconvert.conversion.equivalence import run_dtype
from pathconvert.conversion.precision import CastsTo, is_mixed
from pathconvert.errors import CheckpointError, PathconvertError, RuntimeUnavailable, first_line
from pathconvert.export.card import ModelCard
from pathconvert.export.runtime.providers import open_session, require_device, require_size
from pathconvert.export.runtime.session import Session, shape_text
from pathconvert.networks import architectures
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.inputs import size_of
from pathconvert.networks.loading import LoadedNetwork, open_network
from pathconvert.networks.preprocessing import Preprocessing

Array = np.ndarray[Any, Any]
#: Runs a network on an input that was given before, and returns once the outputs are computed.
Call = Callable[[], object]
EngineKind = Literal["onnxruntime", "torch eager", "torch.compile"]


@dataclass(frozen=True)
class Engine:
    """A network that is ready to run on a device.

    Attributes:
        name: the file or network.
        kind: onnxruntime, torch eager or torch.compile.
        device: cuda, tensorrt or cpu.
        model: the session, or the network in torch.
        input_size: size of one input, without the batch dimension; None for sides that a graph
            leaves free.
        fixed_batch: the only batch size that it takes; None if it takes any.
        run: inputs [N, *input_size] → the first output, [N, classes] for a classifier. Inputs are
            uint8 if ``takes_pixels``, else float32; they are not changed.
        runner: the same inputs → a function to time, which runs the network on them.
        fallback: why ``auto`` chose the CPU, or which heavy nodes run on the CPU beside a GPU; else
            None.
        recorded_size: the input size in the file's card, if the graph leaves sides free.
        precision: dtype of the input of an ONNX file, or of the weights of a network in torch.
        takes_pixels: whether the inputs are uint8 values, which the graph normalises.
        architecture, preprocessing, labels: as recorded for the network; None if not recorded.
        gives_probabilities: whether the outputs are probabilities; None if it is not known.
        training: settings and results of the fine-tuning run that wrote a checkpoint; None for any
            other file.
    """

    name: str
    kind: EngineKind
    device: str
    model: Session | nn.Module
    input_size: tuple[int | None, ...]
    fixed_batch: int | None
    run: Callable[[Array], Array]
    runner: Callable[[Array], Call]
    fallback: str | None = None
    recorded_size: tuple[int | None, ...] | None = None
    precision: str = "float32"
    takes_pixels: bool = False
    architecture: Architecture | None = None
    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] | None = None
    gives_probabilities: bool | None = None
    training: dict[str, Any] | None = None

    @property
    def library(self) -> str:
        """``onnxruntime`` or ``torch``."""
        return self.kind if self.kind == "onnxruntime" else "torch"


def is_onnx(source: str | Path) -> bool:
    """Whether a source is an ONNX file by its suffix; others are checkpoints or names."""
    return Path(source).suffix.lower() == ".onnx"


def open_engine(
    source: str | Path,
    device: str = "auto",
    *,
    load: Callable[[str], LoadedNetwork] = open_network,
    open_file: Callable[[str | Path, str], Session] = open_session,
    own_dtype: bool = False,
) -> Engine:
    """Open an ``.onnx`` file in ONNX Runtime, and any other source in torch.

    Args:
        source: an ``.onnx`` file, a checkpoint of any form, or a torchvision name.
        device: auto, cuda, tensorrt (``.onnx`` files only) or cpu.
        load: opens a checkpoint.
        open_file: opens an ``.onnx`` file on a device.
        own_dtype: as in :func:`torch_engine`.

    Raises:
        CheckpointError: the file cannot be read, or does not have exactly one numeric input.
        RuntimeUnavailable: the device that was asked for cannot be used.
        PathconvertError: the input size of a checkpoint is not known.
    """
    if is_onnx(source):
        return session_engine(open_file(source, device))
    return torch_engine(str(source), load(str(source)), device, own_dtype=own_dtype)


# ---- ONNX Runtime --------------------------------------------------------------------------------


def session_engine(session: Session, name: str | None = None) -> Engine:
    """Make an engine from an ``.onnx`` file that is open.

    Args:
        session: the open file.
        name: the engine's name; default: the file's path.

    Raises:
        CheckpointError: the graph does not have exactly one input, or the input is not numeric.
    """
    batch, *rest = session.input_shape or (None,)
    size = tuple(side if isinstance(side, int) else None for side in rest)
    card = session.card or ModelCard()

    def runner(array: Array) -> Call:
        require_size(session, array.shape[1:])
        return session.runner(array)

    return Engine(
        name=name or str(session.path),
        kind="onnxruntime",
        device=session.device,
        model=session,
        input_size=size,
        fixed_batch=batch if isinstance(batch, int) else None,
        run=lambda array: session.run(array)[0],
        runner=runner,
        fallback=session.fallback,
        recorded_size=_recorded_size(card, size[0]) if None in size else None,
        precision=session.input_dtype.name,
        takes_pixels=session.input_dtype == np.uint8,
        architecture=card.architecture,
        preprocessing=card.preprocessing,
        labels=card.labels,
        gives_probabilities=True if card.softmax else _gives_probabilities(card.architecture),
    )


def _recorded_size(card: ModelCard, channels: int | None) -> tuple[int | None, ...] | None:
    """The input size in a card, without the batch dimension; None if the card has none."""
    if card.preprocessing and card.preprocessing.crop:
        return (channels, *card.preprocessing.crop)
    return card.architecture.input_size if card.architecture else None


def _gives_probabilities(architecture: Architecture | None) -> bool | None:
    """Whether a network ends in a softmax: False for torchvision's, None (unknown) for others."""
    return False if architecture and architectures.is_known(architecture.name) else None


# ---- torch ---------------------------------------------------------------------------------------


def torch_engine(
    name: str, network: LoadedNetwork, device: str = "auto", *, own_dtype: bool = False
) -> Engine:
    """Make an engine from a checkpoint that is loaded.

    Args:
        name: the file or network.
        network: its model is moved to the device and converted to the dtype.
        device: auto, cuda or cpu.
        own_dtype: run in the dtype of the weights on a GPU. Otherwise, and always on the CPU, where
            half precision is slow, the network runs in float32.

    Raises:
        RuntimeUnavailable: the device that was asked for cannot be used.
        PathconvertError: the network's input size is not known.
    """
    size = size_of(network.architecture)
    where, fallback = torch_device(name, device)
    model = network.model.eval().to(where)
    if where == "cpu" or not own_dtype:
        model = _Casting(model).float() if is_mixed(model) else model.float()
    calls = _TorchCalls(name, model, where, run_dtype(model))
    return Engine(
        name=name,
        kind="torch eager",
        device=where,
        model=model,
        input_size=size,
        fixed_batch=None,
        run=calls.run,
        runner=calls.runner,
        fallback=fallback,
        precision=str(run_dtype(model)).removeprefix("torch."),
        architecture=network.architecture,
        preprocessing=network.preprocessing,
        labels=network.labels,
        gives_probabilities=_gives_probabilities(network.architecture),
        training=network.training,
    )


class _Casting(nn.Module):
    """A network whose explicit casts go to the dtype of its input.

    A network of several dtypes casts between its layers, which have one dtype here.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input: Tensor) -> Any:
        """Inputs [N, …] → what the network returns."""
        with CastsTo(input.dtype):
            return self.network(input)


def compiled(engine: Engine) -> Engine:
    """The network of a torch engine under ``torch.compile``.

    It is compiled when it first runs on inputs of a new size. If compiling fails there, ``runner``
    raises PathconvertError.
    """
    model = engine.model
    assert isinstance(model, nn.Module)
    calls = _TorchCalls(
        engine.name, torch.compile(model), engine.device, run_dtype(model), compiled=True
    )
    return replace(engine, kind="torch.compile", run=calls.run, runner=calls.runner)


@dataclass(frozen=True)
class _TorchCalls:
    """How torch runs a network: the ``run`` and ``runner`` of an engine.

    Attributes:
        name: the network, for messages.
        forward: the network, or what ``torch.compile`` made of it.
        device, dtype: where and in which dtype it runs.
        compiled: whether ``torch.compile`` made ``forward``.
    """

    name: str
    forward: Callable[[Tensor], Any]
    device: str
    dtype: torch.dtype
    compiled: bool = False

    def run(self, array: Array) -> Array:
        """The network's output in float32.

        Raises:
            CheckpointError: the output is not a tensor.
        """
        output = self._output(self._input(array))
        if not isinstance(output, Tensor):
            raise CheckpointError(f"{self.name} gives a {type(output).__name__}, not class scores")
        scores: Array = output.float().cpu().numpy()
        return scores

    def runner(self, array: Array) -> Call:
        """Run the network once, and return a function that runs it again.

        The function runs it on one batch again and again. A network that changes its input in place
        would make more of it every time, and is given a copy, which is timed too.

        Raises:
            PathconvertError: the network cannot run on inputs of this size, or cannot be compiled.
        """
        batch, first = self._input(array), self._input(array)
        if self.compiled:
            self._compile(first)
        else:
            self._try(first)
        changes_input = not torch.equal(first, batch)

        def call() -> None:
            self._output(batch.clone() if changes_input else batch)
            if self.device == "cuda":
                torch.cuda.synchronize()

        return call

    def _input(self, array: Array) -> Tensor:
        # a copy, as a forward may change its input in place
        return torch.from_numpy(array).to(self.device, self.dtype, copy=True)

    def _output(self, batch: Tensor) -> Any:
        with torch.inference_mode():
            return self.forward(batch)

    def _try(self, batch: Tensor) -> None:
        try:
            self._output(batch)
        except (RuntimeError, ValueError) as error:
            size = shape_text(batch.shape[1:])
            raise PathconvertError(
                f"{self.name} cannot run on inputs of size {size}: {first_line(error)}",
                "Give another size with --input-size.",
            ) from error

    def _compile(self, batch: Tensor) -> None:
        try:
            self._output(batch)
        except RuntimeError as error:  # dynamo and inductor raise it, also without a C++ compiler
            why = first_line(error)[:200]
            raise PathconvertError(
                f"torch.compile fails on {self.name}: {why}", "Leave --compile out."
            ) from error


def torch_device(name: str, device: str) -> tuple[str, str | None]:
    """Choose where torch runs a network.

    Args:
        name: the network, for the message.
        device: auto (a GPU if torch finds one, else the CPU), cuda or cpu.

    Returns:
        ``cuda`` or ``cpu``; and why ``auto`` chose the CPU, or None if it did not.

    Raises:
        RuntimeUnavailable: torch does not run on such a device, or finds no GPU.
    """
    require_device(device)
    if device == "tensorrt":
        raise RuntimeUnavailable(
            f"tensorrt only runs .onnx files, and {name} is not one",
            "Export it first, or use --device cuda.",
        )
    if device != "cpu" and torch.cuda.is_available():
        return "cuda", None
    if device == "cuda":
        raise RuntimeUnavailable(
            f"{name} cannot run on cuda: torch finds no GPU here", "Run on --device cpu."
        )
    return "cpu", "torch finds no GPU" if device == "auto" else None
