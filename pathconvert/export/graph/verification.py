"""The proof that an ``.onnx`` file computes what the network computes, before the file takes its name.

ONNX Runtime's CPU provider runs the file; the reference is the network itself in float64.

=====  ===========================================================================================================
fp32   error ≤ 8 · noise. *Noise* is what float32 costs PyTorch: max |a₃₂(x) − a₆₄(x)| over all inputs together,
       never less than one rounding of the largest output. Folding and other kernels round other numbers of the
       same size; 8 leaves room for blocked and Winograd convolutions.
fp16   error ≤ 1e-2 · max(1, max |a₆₄(x)|), and the same top-1 wherever its margin exceeds the error
=====  ===========================================================================================================

ONNX Runtime's CPU provider computes float16 graphs in float32 and may keep what lies between two operators wide, so
an overflow on a GPU would not show: for fp16 the network is run in PyTorch too, every layer's result rounded to half.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pathconvert.errors import EquivalenceError, PathconvertError
from pathconvert.export.runtime.diagnosis import runtime_line

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read once, by the import
import onnxruntime as ort

#: Highest ratio of error over noise that passes for fp32.
PASSING_NOISE_RATIO = 8.0
#: Highest error that passes for fp16, relative to max(1, largest output).
HALF_TOLERANCE = 1e-2
#: From what relative error on a layer is named as the one that differs.
LAYER_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}
#: Operators whose result is that of one torch module.
LAYER_OPERATORS = {"Conv", "ConvTranspose", "Gemm", "BatchNormalization"}

Run = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Proof:
    """What was compared.

    Attributes:
        max_error: largest |file(x) − a₆₄(x)| over all outputs.
        noise_ratio: largest error over noise (see the module's docstring).
        checked_shapes: of the inputs.
    """

    max_error: float
    noise_ratio: float
    checked_shapes: tuple[tuple[int, ...], ...]


def session(source: Path | bytes) -> Any:
    """An ONNX Runtime session on the CPU provider, with as many threads as torch has.

    Raises:
        PathconvertError: ONNX Runtime cannot load the model.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors are raised; this one prints them too
    model = source if isinstance(source, bytes) else str(source)
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exception classes are private, one for every status code
        raise PathconvertError(
            f"ONNX Runtime {ort.__version__} cannot load the graph: {runtime_line(error)}",
            "Try another --opset; 20 is the default.",
        ) from error


def runner(source: Path | bytes, names: Sequence[str] | None = None) -> Run:
    """A function that runs a model on one input, [N, …], and returns its outputs in float64."""
    loaded = session(source)
    (taken,) = loaded.get_inputs()
    kind = {"tensor(float16)": torch.float16, "tensor(uint8)": torch.uint8}.get(taken.type, torch.float32)

    def run(x: Tensor) -> list[Tensor]:
        try:
            outputs: list[NDArray[Any]] = loaded.run(names, {taken.name: x.to(kind).numpy()})
        except Exception as error:  # as above
            shape = "×".join(map(str, x.shape))
            sized = any(isinstance(side, str) for side in taken.shape[1:])
            raise EquivalenceError(
                f"ONNX Runtime cannot run the graph on an input of {shape}: {runtime_line(error)}",
                "Leave --dynamic-size out: an operation has one size alone, such as an adaptive pooling to more than "
                "one pixel."
                if sized
                else "",
            ) from error
        return [torch.from_numpy(np.asarray(output)).double() for output in outputs]

    return run


def torch_runner(model: nn.Module, dtype: torch.dtype) -> Run:
    """A function that runs a copy of ``model`` in ``dtype``; a tensor or tuple of tensors comes back in float64."""
    model = copy.deepcopy(model).to(dtype).eval()

    def run(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            outputs = model(x.to(dtype) if x.is_floating_point() else x)
        return [t.double() for t in (outputs if isinstance(outputs, tuple) else (outputs,))]

    return run


def prove(file: Run, original: nn.Module, inputs: Sequence[Tensor], precision: str) -> Proof:
    """Compare a file with the network that it came from.

    Args:
        file: :func:`runner` of the file, or any other function to hold against the network.
        original: the network, in its own form and dtype; not changed.
        inputs: each [N, …].
        precision: ``fp32`` or ``fp16``.

    Raises:
        Differs: an output is not the network's; it carries the input.
    """
    exact, narrow = torch_runner(original, torch.float64), torch_runner(original, torch.float32)
    results = [(x, file(x), exact(x), narrow(x) if precision == "fp32" else None) for x in inputs]
    for _, _, reference, _ in results:
        if not all(bool(torch.isfinite(expected).all()) for expected in reference):
            raise EquivalenceError("the network's own outputs are not finite", "Its weights hold NaN or infinity.")
    worst_error = worst_ratio = 0.0
    noises = _noises([(reference, rounded) for _, _, reference, rounded in results])
    for x, got, reference, _ in results:
        if [t.shape for t in got] != [t.shape for t in reference]:
            raise Differs(f"its outputs are {_shapes(got)}, the network's {_shapes(reference)}", x)
        for value, expected, noise in zip(got, reference, noises, strict=True):
            error = _largest(value - expected)
            worst_error, worst_ratio = max(worst_error, error), max(worst_ratio, error / noise if noise else 0.0)
            if precision == "fp32" and not error <= PASSING_NOISE_RATIO * noise:
                raise Differs(f"the largest error is {error:.2e}, {_times(error, noise)} float32's own noise", x)
            if precision == "fp16":
                _check_half(value, expected, error, x)
    return Proof(worst_error, worst_ratio, tuple(dict.fromkeys(tuple(x.shape) for x in inputs)))


def _times(error: float, noise: float) -> str:
    return f"{error / noise:.0f} times" if noise else "and there should be none:"


class Differs(Exception):
    """An output that is not the network's, on ``x``; becomes an EquivalenceError that names the layer."""

    def __init__(self, message: str, x: Tensor) -> None:
        super().__init__(message)
        self.x = x


def _noises(results: list[tuple[list[Tensor], list[Tensor] | None]]) -> list[float]:
    """Noise of every output over all inputs (see the module's docstring)."""
    noises = [0.0] * len(results[0][0])
    for reference, rounded in results:
        for i, exact in enumerate(reference):
            measured = _largest(rounded[i] - exact) if rounded is not None else 0.0
            rounding = torch.finfo(torch.float32).eps / 2 * _largest(exact)
            noises[i] = max(noises[i], rounding, measured if math.isfinite(measured) else 0.0)
    return noises


def _largest(tensor: Tensor) -> float:
    """max |t|; infinite for NaN."""
    value = float(tensor.abs().max()) if tensor.numel() else 0.0
    return math.inf if math.isnan(value) else value


def _shapes(tensors: list[Tensor]) -> str:
    return ", ".join(str(list(t.shape)) for t in tensors)


def _check_half(value: Tensor, expected: Tensor, error: float, x: Tensor) -> None:
    limit = HALF_TOLERANCE * max(1.0, _largest(expected))
    if not error <= limit:
        raise Differs(f"the largest error is {error:.2e}, more than {limit:.2e}", x)
    if expected.dim() < 2 or expected.shape[1] < 2:
        return
    top = expected.topk(2, dim=1).values
    certain = top[:, 0] - top[:, 1] > error
    if bool((certain & (value.argmax(1) != expected.argmax(1))).any()):
        raise Differs("the top-1 class changes where its margin exceeds the error", x)


# ---- float16 in PyTorch ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def hooked(model: nn.Module, note: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """``note`` gets every leaf module's name and result, and may replace it."""
    handles = []
    for name, module in model.named_modules():
        if next(module.children(), None) is None:

            def hook(_: nn.Module, __: Any, result: Any, name: str = name) -> Any:
                return note(name, result) if isinstance(result, Tensor) else None

            handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def half_runner(exported: nn.Module, tip: str = "") -> Run:
    """Runs a network with weights and every layer's result rounded to float16, sums in float32 as GPUs do.

    Args:
        exported: not changed.
        tip: what to do where it overflows.

    Raises (when run):
        EquivalenceError: a layer's result leaves float16's range.
    """
    model = copy.deepcopy(exported).float().eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()

    def note(name: str, result: Tensor) -> Tensor | None:
        if not result.is_floating_point():
            return None
        rounded = result.half()
        if not bool(rounded.isfinite().all()):
            raise EquivalenceError(
                f"fp16 overflows in {layer_title(name)}: its largest result is {_largest(result):.1e}, float16 ends "
                "at 65504",
                tip,
            )
        return rounded.float()

    def run(x: Tensor) -> list[Tensor]:
        with torch.no_grad(), hooked(model, note):
            outputs = model(x.half().float() if x.is_floating_point() else x)
        return [t.double() for t in (outputs if isinstance(outputs, tuple) else (outputs,))]

    return run


# ---- the first layer that differs ------------------------------------------------------------------------------

PREFIX = "network."


def layer_title(name: str) -> str:
    """A module's path in the exported network, without the wrapper's own name."""
    return name.removeprefix(PREFIX)


def first_difference(
    model: onnx.ModelProto, layers: Mapping[str, str], exported: nn.Module, x: Tensor, precision: str
) -> str:
    """Where a file and the network that was exported part, in words: the first layer whose result differs on ``x``.

    Args:
        model: the graph; not changed.
        layers: result of a node → path of the torch module that it came from.
        exported: the module that was exported (folded).
        x: an input, [N, …].
        precision: decides from what relative error on results differ.
    """
    made = {output for node in model.graph.node if node.op_type in LAYER_OPERATORS for output in node.output[:1]}
    names = [name for node in model.graph.node for name in node.output[:1] if name in made and name in layers]
    expected = _module_results(exported, x)
    paths = [layers[name] for name in names]
    names = [n for n, path in zip(names, paths, strict=True) if paths.count(path) == len(expected.get(path, ()))]
    if not names:
        return "no layer's result could be compared"
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    present = {output.name for output in probe.graph.output}
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    for name, got in zip(names, runner(probe.SerializeToString(), names)(x), strict=True):
        reference = expected[layers[name]].pop(0)
        error = _largest(got - reference) if got.shape == reference.shape else math.inf
        if error > LAYER_TOLERANCE[precision] * _largest(reference):
            return f"the first layer that differs is {layer_title(layers[name])}"
    return f"all {len(names)} layers agree, so the difference is in an operation between or after them"


def _module_results(exported: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    """Every leaf module's results in float64, call by call."""
    model = copy.deepcopy(exported).double().eval()
    results: dict[str, list[Tensor]] = {}

    def note(name: str, result: Tensor) -> None:
        results.setdefault(name, []).append(result.clone())  # what follows may change it in place

    with torch.no_grad(), hooked(model, note):
        model(x.double() if x.is_floating_point() else x)
    return results
