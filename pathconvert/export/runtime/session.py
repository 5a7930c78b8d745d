"""A network that ONNX Runtime has loaded: what it takes, and running it.

ONNX Runtime's telemetry is switched off unless ``ORT_DISABLE_TELEMETRY`` says otherwise.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pathconvert.errors import CheckpointError, PathconvertError
from pathconvert.export.card import ModelCard
from pathconvert.export.runtime.diagnosis import runtime_line

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the import, which starts it
import onnxruntime as ort

__all__ = ["DTYPES", "RUNTIME_ERRORS", "Port", "Session", "ort", "shape_text"]

DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(double)": np.dtype(np.float64),
    "tensor(uint8)": np.dtype(np.uint8),
}


@dataclass(frozen=True)
class Port:
    """An input or output of a graph.

    Attributes:
        name: the graph's name for it.
        shape: a number or, where it is free, the dimension's name (None where it has none).
        kind: ONNX Runtime's name of its type, such as ``tensor(float)``.
    """

    name: str
    shape: tuple[int | str | None, ...]
    kind: str


@dataclass(frozen=True)
class _Captured:
    """What a CUDA graph was captured with: the input's place on the device, the binding, and the call that runs it."""

    input: Any
    binding: Any
    call: Callable[[], None]


@dataclass(frozen=True)
class Session:
    """A network that ONNX Runtime has loaded.

    Attributes:
        path: the file.
        device: cuda, tensorrt or cpu: where it runs.
        providers: those of the session, in order of preference.
        fallback: why ``auto`` took the CPU, or which heavy nodes a GPU leaves to it; None if all is as asked.
        nodes: nodes by provider, as they were assigned.
        card: what pathconvert recorded in the file; None in another tool's.
        inputs, outputs: the graph's.
        io_binding: whether :meth:`run` binds its inputs and outputs to the device.
        cuda_graph: whether runs are captured and replayed.
        inference: ONNX Runtime's own object.
    """

    path: Path
    device: str
    providers: tuple[str, ...]
    fallback: str | None
    nodes: dict[str, int]
    card: ModelCard | None
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    io_binding: bool
    cuda_graph: bool
    inference: Any
    _captured: dict[tuple[int, ...], _Captured] = field(default_factory=dict, repr=False, compare=False)

    @property
    def input_shape(self) -> tuple[int | str | None, ...]:
        """Of the only input.

        Raises:
            CheckpointError: the graph has several inputs, or none.
        """
        return self._input.shape

    @property
    def input_dtype(self) -> np.dtype[Any]:
        """Of the only input.

        Raises:
            CheckpointError: the graph has several inputs, or none, or one that holds no numbers of these kinds.
        """
        if self._input.kind not in DTYPES:
            raise CheckpointError(f"{self.path} takes a {self._input.kind} named {self._input.name}, no image")
        return DTYPES[self._input.kind]

    @property
    def _input(self) -> Port:
        if len(self.inputs) != 1:
            names = ", ".join(port.name for port in self.inputs) or "none"
            raise CheckpointError(
                f"{self.path} has {len(self.inputs)} inputs ({names}); a network of one input is needed",
                "Export it with its images as the only input.",
            )
        return self.inputs[0]

    def run(self, array: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        """All outputs for one batch.

        Raises:
            PathconvertError: the array does not fit the input, or ONNX Runtime fails (out of memory, for one).
        """
        if self.io_binding:
            binding, call = self._bound(array)
            call()
            return [np.asarray(value) for value in binding.copy_outputs_to_cpu()]
        feed = {self._input.name: self._fitting(array)}
        with self._failing():
            return [np.asarray(value) for value in self.inference.run(None, feed)]

    def runner(self, array: np.ndarray[Any, Any]) -> Callable[[], None]:
        """A function that runs ``array`` and returns when the outputs are computed; for timing.

        With ``io_binding`` the input is copied to the device now and the outputs stay there.

        Raises:
            PathconvertError: as :meth:`run`.
        """
        if self.io_binding:
            return self._bound(array)[1]
        feed = {self._input.name: self._fitting(array)}

        def call() -> None:
            with self._failing():
                self.inference.run(None, feed)

        return call

    def _bound(self, array: np.ndarray[Any, Any]) -> tuple[Any, Callable[[], None]]:
        """A binding of inputs and outputs on the device, and a call that runs it.

        A CUDA graph replays the addresses that it was captured with: one for every input shape is kept, and a new
        array of that shape is copied to its place.
        """
        fitting = self._fitting(array)
        kept = self._captured.get(fitting.shape) if self.cuda_graph else None
        if kept is not None:
            with self._failing():
                kept.input.update_inplace(fitting)
            return kept.binding, kept.call
        device = "cpu" if self.device == "cpu" else "cuda"
        binding, options = self.inference.io_binding(), ort.RunOptions()
        if self.cuda_graph:
            options.add_run_config_entry("gpu_graph_id", str(len(self._captured) + 1))
        with self._failing():
            value = ort.OrtValue.ortvalue_from_numpy(fitting, device, 0)
            binding.bind_ortvalue_input(self._input.name, value)
            for port in self.outputs:
                shape = _sized(port.shape, len(fitting)) if self.cuda_graph else None
                if shape is None:
                    binding.bind_output(port.name, device)
                else:
                    dtype = DTYPES[port.kind]
                    output = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, device, 0)
                    binding.bind_ortvalue_output(port.name, output)
            binding.synchronize_inputs()

        def call() -> None:
            with self._failing():
                self.inference.run_with_iobinding(binding, options)
                binding.synchronize_outputs()

        if self.cuda_graph:
            self._captured[fitting.shape] = _Captured(value, binding, call)
        return binding, call

    def _fitting(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The array in the input's dtype; refused where its shape does not fit."""
        shape = self.input_shape
        fits = len(shape) == array.ndim and all(
            not isinstance(want, int) or want == have for want, have in zip(shape, array.shape, strict=True)
        )
        if not fits:
            raise PathconvertError(
                f"{self.path} takes inputs of size {shape_text(shape)}, not {shape_text(array.shape)}",
                "Give inputs of that size, or export it for others (--dynamic-size, or without a fixed batch).",
            )
        dtype = self.input_dtype
        if (dtype == np.uint8) != (array.dtype == np.uint8):
            raise PathconvertError(f"{self.path} takes {dtype} values, not {array.dtype}")
        return np.ascontiguousarray(array, dtype)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except RUNTIME_ERRORS as error:
            tip = "A smaller batch may fit." if "alloc" in str(error).lower() else ""
            raise PathconvertError(
                f"{self.path}: ONNX Runtime failed on {self.device}: {runtime_line(error)}", tip
            ) from None


#: What ONNX Runtime raises: classes of its own per status, RuntimeError and ValueError.
RUNTIME_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(
        kind
        for kind in vars(ort.capi.onnxruntime_pybind11_state).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ),
)


def shape_text(shape: Sequence[int | str | None]) -> str:
    """``(None, 3, 224, 224)`` → ``?x3x224x224``."""
    return "x".join("?" if side is None else str(side) for side in shape)


def _sized(shape: tuple[int | str | None, ...], batch: int) -> tuple[int, ...] | None:
    """An output's shape for a batch size; None where more than its first dimension is free."""
    rest = [side for side in shape[1:] if isinstance(side, int)]
    return (batch, *rest) if shape and len(rest) == len(shape) - 1 else None
