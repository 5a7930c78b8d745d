"""A network that ONNX Runtime has loaded: its inputs and outputs, and how to run it.

Every import of ``onnxruntime`` in the package goes through this module, as ``ort``, because its
telemetry has to be switched off before it is imported. It stays off unless the environment variable
``ORT_DISABLE_TELEMETRY`` is already set to another value.
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

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the import, which starts the telemetry
import onnxruntime as ort

__all__ = ["DTYPES", "RUNTIME_ERRORS", "Port", "Session", "ort", "session_options", "shape_text"]

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
        shape: one entry per dimension: its size if it is fixed, else its name, or None if it has no
            name.
        kind: ONNX Runtime's name of the type, such as ``tensor(float)``.
    """

    name: str
    shape: tuple[int | str | None, ...]
    kind: str


@dataclass(frozen=True)
class _Captured:
    """A captured CUDA graph.

    Attributes:
        input: the input's memory on the device, from which the graph reads.
        binding: the inputs and outputs that the graph was captured with.
        call: runs the graph.
    """

    input: Any
    binding: Any
    call: Callable[[], None]


@dataclass(frozen=True)
class Session:
    """A network that ONNX Runtime has loaded.

    Attributes:
        path: the file.
        device: where the network runs: cuda, tensorrt or cpu.
        providers: the execution providers of the session, in order of preference.
        fallback: why ``auto`` chose the CPU, or which heavy nodes run on the CPU beside a GPU; else
            None.
        nodes: execution provider → number of nodes that were assigned to it.
        card: what pathconvert recorded in the file; None if another tool wrote it.
        inputs, outputs: the inputs and outputs of the graph.
        io_binding: whether :meth:`run` binds its inputs and outputs to the device.
        cuda_graph: whether runs are captured as a CUDA graph and replayed.
        inference: the ``onnxruntime.InferenceSession``.
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
    _captured: dict[tuple[int, ...], _Captured] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def input_shape(self) -> tuple[int | str | None, ...]:
        """The shape of the graph's only input.

        Raises:
            CheckpointError: the graph does not have exactly one input.
        """
        return self._input.shape

    @property
    def input_dtype(self) -> np.dtype[Any]:
        """The dtype of the graph's only input.

        Raises:
            CheckpointError: the graph does not have exactly one input, or the input's type is not
                in :data:`DTYPES`.
        """
        if self._input.kind not in DTYPES:
            raise CheckpointError(
                f"{self.path} takes a {self._input.kind} named {self._input.name}, not images"
            )
        return DTYPES[self._input.kind]

    @property
    def _input(self) -> Port:
        if len(self.inputs) != 1:
            names = ", ".join(port.name for port in self.inputs) or "none"
            raise CheckpointError(
                f"{self.path} has {len(self.inputs)} inputs ({names}), but only one input is "
                "supported",
                "Export it with its images as the only input.",
            )
        return self.inputs[0]

    def run(self, array: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        """Return all outputs for one batch.

        Raises:
            PathconvertError: the array does not fit the input, or ONNX Runtime fails (for example,
                out of memory).
        """
        if self.io_binding:
            binding, call = self._bound(array)
            call()
            return [np.asarray(value) for value in binding.copy_outputs_to_cpu()]
        feed = {self._input.name: self._fitting(array)}
        with self._failing():
            return [np.asarray(value) for value in self.inference.run(None, feed)]

    def runner(self, array: np.ndarray[Any, Any]) -> Callable[[], None]:
        """Return a function to time: it runs ``array``, and returns once the outputs are there.

        With ``io_binding`` the input is copied to the device now, and the outputs stay on the
        device.

        Raises:
            PathconvertError: the array does not fit the input. The returned function raises it if
                ONNX Runtime fails.
        """
        if self.io_binding:
            return self._bound(array)[1]
        feed = {self._input.name: self._fitting(array)}

        def call() -> None:
            with self._failing():
                self.inference.run(None, feed)

        return call

    def _bound(self, array: np.ndarray[Any, Any]) -> tuple[Any, Callable[[], None]]:
        """Bind the inputs and outputs to memory on the device.

        A CUDA graph always reads and writes the addresses that it was captured with. One binding
        per input shape is therefore kept, and a new array of that shape is copied into its input.

        Returns:
            The binding, and a function that runs it.
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
                    output = ort.OrtValue.ortvalue_from_shape_and_type(
                        list(shape), dtype, device, 0
                    )
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
        """Convert the array to the input's dtype; refuse it if its shape does not fit."""
        shape = self.input_shape
        fits = len(shape) == array.ndim and all(
            not isinstance(want, int) or want == have
            for want, have in zip(shape, array.shape, strict=True)
        )
        if not fits:
            raise PathconvertError(
                f"{self.path} takes inputs of size {shape_text(shape)}, "
                f"not {shape_text(array.shape)}",
                "Give inputs of that size, or export the network again with --dynamic-size or "
                "--batch dynamic.",
            )
        dtype = self.input_dtype
        if (dtype == np.uint8) != (array.dtype == np.uint8):
            raise PathconvertError(f"{self.path} takes {dtype} values, not {array.dtype}")
        return np.ascontiguousarray(array, dtype)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Turn errors of ONNX Runtime into one-line errors that name the file and the device."""
        try:
            yield
        except RUNTIME_ERRORS as error:
            tip = "A smaller batch may fit." if "alloc" in str(error).lower() else ""
            raise PathconvertError(
                f"{self.path}: ONNX Runtime failed on {self.device}: {runtime_line(error)}", tip
            ) from None


#: What ONNX Runtime raises: one class of its own per status code, RuntimeError and ValueError.
RUNTIME_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(
        kind
        for kind in vars(ort.capi.onnxruntime_pybind11_state).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ),
)


def session_options(threads: int | None = None) -> Any:
    """The ``SessionOptions`` that all sessions of the package start from.

    Args:
        threads: number of CPU threads; None for ONNX Runtime's default of one per core.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are raised, so the log would only repeat them
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    return options


def shape_text(shape: Sequence[int | str | None]) -> str:
    """``(None, 3, 224, 224)`` → ``?x3x224x224``."""
    return "x".join("?" if side is None else str(side) for side in shape)


def _sized(shape: tuple[int | str | None, ...], batch: int) -> tuple[int, ...] | None:
    """The shape of an output at a batch size; None if another dimension than the first is free."""
    rest = [side for side in shape[1:] if isinstance(side, int)]
    return (batch, *rest) if shape and len(rest) == len(shape) - 1 else None
