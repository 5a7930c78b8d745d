"""The proof that an ``.onnx`` file computes what the network computes, before it takes its name.

ONNX Runtime's CPU provider runs the file; the reference is the network itself in float64. Let x be
an input, a₃₂(x) and a₆₄(x) the network's output in float32 and float64. The file passes if:

=====  =============================================================================================
fp32   error ≤ 8 · noise. *Noise* is the error of float32 in PyTorch: max |a₃₂(x) − a₆₄(x)| over all
       inputs together, but at least one rounding of the largest output. Folding and other kernels
       round different numbers of the same size; 8 leaves room for blocked and Winograd
       convolutions.
fp16   error ≤ 1e-2 · max(1, max |a₆₄(x)|), and the top-1 class is the same wherever its margin
       exceeds the error
=====  =============================================================================================

ONNX Runtime's CPU provider computes float16 graphs in float32, and may keep results between two
operators in float32, so it would not show an overflow that happens on a GPU. For fp16, the network
is therefore run in PyTorch as well, with every layer's result rounded to float16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pathconvert.conversion.calls import leaves, watched
from pathconvert.conversion.modules import copied, own_inputs
from pathconvert.errors import EquivalenceError, PathconvertError
from pathconvert.export.runtime.diagnosis import runtime_line
from pathconvert.export.runtime.session import ort, session_options

#: The highest ratio of a file's error to noise that passes for fp32.
FILE_NOISE_RATIO = 8.0
#: The highest error that passes for fp16, relative to max(1, largest output).
HALF_TOLERANCE = 1e-2
#: The relative error above which a layer is named as the one that differs.
LAYER_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}
#: Operators whose result is the result of one torch module.
LAYER_OPERATORS = {"Conv", "ConvTranspose", "Gemm", "BatchNormalization"}

#: One forward of a file or a network: an input, [N, …] → its outputs in float64.
Forward = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Proof:
    """The outcome of a comparison that passed.

    Attributes:
        max_error: the largest |file(x) − a₆₄(x)| over all outputs.
        noise_ratio: the largest ratio of error to noise (see the module's docstring).
        checked_shapes: the shapes of the inputs.
    """

    max_error: float
    noise_ratio: float
    checked_shapes: tuple[tuple[int, ...], ...]


def session(source: Path | bytes) -> Any:
    """Open an ONNX Runtime session on the CPU provider, with as many threads as torch has.

    Raises:
        PathconvertError: ONNX Runtime cannot load the model.
    """
    options = session_options(torch.get_num_threads())
    model = source if isinstance(source, bytes) else str(source)
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exception classes are private, one per status code
        raise PathconvertError(
            f"ONNX Runtime {ort.__version__} cannot load the graph: {runtime_line(error)}",
            "Try another --opset; 20 is the default.",
        ) from error


def runner(source: Path | bytes, names: Sequence[str] | None = None) -> Forward:
    """Return a function that runs a model on one input, [N, …], and returns its outputs in float64.

    Args:
        source: the file, or the serialised model.
        names: the outputs to return; None for all.

    Raises:
        PathconvertError: ONNX Runtime cannot load the model.
        EquivalenceError: raised by the returned function if ONNX Runtime cannot run the graph on
            its input.
    """
    loaded = session(source)
    (taken,) = loaded.get_inputs()
    kind = {"tensor(float16)": torch.float16, "tensor(uint8)": torch.uint8}.get(
        taken.type, torch.float32
    )

    def run(x: Tensor) -> list[Tensor]:
        try:
            outputs: list[NDArray[Any]] = loaded.run(names, {taken.name: x.to(kind).numpy()})
        except Exception as error:  # as above
            shape = "×".join(map(str, x.shape))
            sized = any(isinstance(side, str) for side in taken.shape[1:])
            raise EquivalenceError(
                f"ONNX Runtime cannot run the graph on an input of {shape}: {runtime_line(error)}",
                (
                    "Leave --dynamic-size out: an operation only works at one size, such as an "
                    "adaptive pooling to more than one pixel."
                    if sized
                    else ""
                ),
            ) from error
        return [torch.from_numpy(np.asarray(output)).double() for output in outputs]

    return run


def torch_runner(model: nn.Module, dtype: torch.dtype) -> Forward:
    """Return a function that runs a copy of ``model`` in ``dtype`` on one input, [N, …].

    The function returns the outputs in float64.
    """
    model = copied(model).to(dtype).eval()

    def run(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            outputs = model(own_inputs(x, dtype))
        return [t.double() for t in (outputs if isinstance(outputs, tuple) else (outputs,))]

    return run


def prove(file: Forward, original: nn.Module, inputs: Sequence[Tensor], precision: str) -> Proof:
    """Compare a file with the network that it came from.

    Args:
        file: :func:`runner` of the file, or another function to compare with the network.
        original: the network, in its own form and dtype; not changed.
        inputs: each [N, …].
        precision: ``fp32`` or ``fp16``.

    Raises:
        Differs: an output differs from the network's; the error carries the input.
        EquivalenceError: the network's own outputs are not finite, or all are empty.
    """
    exact, narrow = torch_runner(original, torch.float64), torch_runner(original, torch.float32)
    results = [(x, file(x), exact(x), narrow(x) if precision == "fp32" else None) for x in inputs]
    _require_usable([(reference, rounded) for _, _, reference, rounded in results])
    worst_error = worst_ratio = 0.0
    noises = _noises([(reference, rounded) for _, _, reference, rounded in results])
    for x, got, reference, _ in results:
        if [t.shape for t in got] != [t.shape for t in reference]:
            raise Differs(
                f"its outputs have the shapes {_shapes(got)}, "
                f"but the network's have {_shapes(reference)}",
                x,
            )
        for value, expected, noise in zip(got, reference, noises, strict=True):
            error = _largest(value - expected)
            worst_error = max(worst_error, error)
            worst_ratio = max(worst_ratio, error / noise if noise else 0.0)
            if precision == "fp32" and not error <= FILE_NOISE_RATIO * noise:
                raise Differs(f"the largest error is {error:.2e}, {_times(error, noise)}", x)
            if precision == "fp16":
                _check_half(value, expected, error, x)
    return Proof(worst_error, worst_ratio, tuple(dict.fromkeys(tuple(x.shape) for x in inputs)))


def _require_usable(results: list[tuple[list[Tensor], list[Tensor] | None]]) -> None:
    """Check that the network's own outputs, in float64 and float32, can be compared with a file's.

    Raises:
        EquivalenceError: they are not finite, or all are empty.
    """
    if not any(expected.numel() for reference, _ in results for expected in reference):
        raise EquivalenceError(
            "there is nothing to compare the file on, because all outputs of the network are empty",
            "Give an example input of at least one, with no side of size 0.",
        )
    for reference, rounded in results:
        for outputs, where in ((reference, ""), (rounded or [], " in float32")):
            if not all(bool(torch.isfinite(output).all()) for output in outputs):
                raise EquivalenceError(
                    f"the network's own outputs are not finite{where}",
                    "Check its weights for NaN, infinity and numbers that overflow.",
                )


def _times(error: float, noise: float) -> str:
    if not noise:
        return "but float32 itself causes no error here"
    return f"{error / noise:.0f} times float32's own noise"


class Differs(Exception):
    """An output differs from the network's on ``x``.

    ``export.py`` turns it into an error that names the layer.
    """

    def __init__(self, message: str, x: Tensor) -> None:
        super().__init__(message)
        self.x = x


def _noises(results: list[tuple[list[Tensor], list[Tensor] | None]]) -> list[float]:
    """The noise of every output over all inputs (see the module's docstring)."""
    noises = [0.0] * len(results[0][0])
    for reference, rounded in results:
        for i, exact in enumerate(reference):
            measured = _largest(rounded[i] - exact) if rounded is not None else 0.0
            rounding = torch.finfo(torch.float32).eps / 2 * _largest(exact)
            noises[i] = max(noises[i], rounding, measured if math.isfinite(measured) else 0.0)
    return noises


def _largest(tensor: Tensor) -> float:
    """max |t|; infinity if there is a NaN."""
    value = float(tensor.abs().max()) if tensor.numel() else 0.0
    return math.inf if math.isnan(value) else value


def _shapes(tensors: list[Tensor]) -> str:
    return ", ".join(str(list(t.shape)) for t in tensors)


def _check_half(value: Tensor, expected: Tensor, error: float, x: Tensor) -> None:
    """Check one output of a float16 file (see the module's docstring).

    Raises:
        Differs: the error is too large, or a top-1 class changed that should not.
    """
    limit = HALF_TOLERANCE * max(1.0, _largest(expected))
    if not error <= limit:
        raise Differs(f"the largest error is {error:.2e}, which is more than {limit:.2e}", x)
    if expected.dim() < 2 or expected.shape[1] < 2:
        return
    top = expected.topk(2, dim=1).values
    certain = top[:, 0] - top[:, 1] > error
    if bool((certain & (value.argmax(1) != expected.argmax(1))).any()):
        raise Differs("the top-1 class changes although its margin exceeds the error", x)


# ---- float16 in PyTorch --------------------------------------------------------------------------


def half_runner(exported: nn.Module, tip: str = "") -> Forward:
    """Return a function that runs a network as float16 would, on one input, [N, …].

    Its weights and every layer's result are rounded to float16; sums are computed in float32, as
    GPUs do. The function returns the outputs in float64.

    Args:
        exported: the network; not changed.
        tip: the tip of the error if a layer overflows.

    Raises:
        EquivalenceError: raised by the returned function if a layer's result exceeds float16's
            range.
    """
    model = copied(exported).float().eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()

    def note(name: str, result: Any) -> Tensor | None:
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return None
        rounded = result.half()
        if not bool(rounded.isfinite().all()):
            raise EquivalenceError(
                f"fp16 overflows in {layer_title(name)}: its largest result is "
                f"{_largest(result):.1e}, but float16 ends at 65504",
                tip,
            )
        return rounded.float()

    def run(x: Tensor) -> list[Tensor]:
        with torch.no_grad(), watched(leaves(model), after=note):
            outputs = model(x.half().float() if x.is_floating_point() else own_inputs(x))
        return [t.double() for t in (outputs if isinstance(outputs, tuple) else (outputs,))]

    return run


# ---- the first layer that differs ----------------------------------------------------------------

#: What the names of modules and weights begin with in the wrapped network (``wrapping.py``).
PREFIX = "network."


def layer_title(name: str) -> str:
    """The path of a module without the wrapper's prefix."""
    return name.removeprefix(PREFIX)


def first_difference(
    model: onnx.ModelProto,
    layers: Mapping[str, str],
    exported: nn.Module,
    x: Tensor,
    precision: str,
) -> str:
    """Say in words which layer is the first whose result in the file differs on ``x``.

    It is compared with the layer's result in the exported network.

    Args:
        model: the graph; not changed.
        layers: result of a node → path of the module that it came from.
        exported: the module that was exported, after folding.
        x: an input, [N, …].
        precision: ``fp32`` or ``fp16``, which decides above which relative error results differ.
    """
    made = {
        output
        for node in model.graph.node
        if node.op_type in LAYER_OPERATORS
        for output in node.output[:1]
    }
    names = [
        name
        for node in model.graph.node
        for name in node.output[:1]
        if name in made and name in layers
    ]
    expected = _module_results(exported, x)
    paths = [layers[name] for name in names]
    names = [
        n
        for n, path in zip(names, paths, strict=True)
        if paths.count(path) == len(expected.get(path, ()))
    ]
    if not names:
        return "no layer's result could be compared"
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    present = {output.name for output in probe.graph.output}
    probe.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in names if name not in present
    )
    for name, got in zip(names, runner(probe.SerializeToString(), names)(x), strict=True):
        reference = expected[layers[name]].pop(0)
        error = _largest(got - reference) if got.shape == reference.shape else math.inf
        if error > LAYER_TOLERANCE[precision] * _largest(reference):
            return f"the first layer that differs is {layer_title(layers[name])}"
    return (
        f"all {len(names)} layers agree, so the difference is in an operation between or after them"
    )


def _module_results(exported: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    """Leaf module → its results in float64, one per call."""
    model = copied(exported).double().eval()
    results: dict[str, list[Tensor]] = {}

    def note(name: str, result: Any) -> None:
        if isinstance(result, Tensor):  # the next module may change it in place
            results.setdefault(name, []).append(result.clone())

    with torch.no_grad(), watched(leaves(model), after=note):
        model(own_inputs(x, torch.float64))
    return results
