"""Running a network in float64, and what a run shows: outputs, functions, normalizations.

Two runs are compared function by function, because a forward that takes another branch after
folding, such as ``if isinstance(layer, nn.BatchNorm2d)``, may still return the same numbers on the
example.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pathconvert.conversion.calls import function_name, running_modules, tensor_uses
from pathconvert.conversion.modules import as_arguments, mode_of, output_tensors, own_inputs
from pathconvert.conversion.remainder import NORMALIZATIONS
from pathconvert.conversion.tracing.signatures import bound_arguments
from pathconvert.errors import PathconvertError, TraceError, first_line

#: Largest error of a folded network in float64, relative to an output's largest value. Rounding
#: costs about 1e-15 per layer, so that even a network of a thousand layers stays below it.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class NormalizationCall:
    """One call of ``batch_norm`` with the network's own tensors.

    Attributes:
        module: path of the module whose forward calls it.
        mean, var, weight, bias: names of the tensors; None for one that the call lacks.
        eps: as it was given.
        training: whether the statistics of the batch are used.
    """

    module: str
    mean: str | None
    var: str | None
    weight: str | None
    bias: str | None
    eps: float
    training: bool


@dataclass
class Run:
    """What one run of a network showed.

    Attributes:
        outputs: its floating-point outputs.
        foreign: names of tensors that code outside of their own module uses, such as in
            ``F.conv2d(x, self.conv.weight)``.
        functions: path of a module, and the name of a torch function that its forward called, in
            order.
        normalizations: module that calls ``batch_norm`` itself, by path → its different calls.
    """

    outputs: list[Tensor] = field(default_factory=list)
    foreign: set[str] = field(default_factory=set)
    functions: list[tuple[str, str]] = field(default_factory=list)
    normalizations: dict[str, set[NormalizationCall]] = field(default_factory=dict)


class _Recorder(TorchFunctionMode):
    """Fills in the functions and normalizations of a :class:`Run`."""

    def __init__(self, model: nn.Module, stack: list[nn.Module], run: Run) -> None:
        super().__init__()
        self.stack, self.run = stack, run
        self.paths = {module: path for path, module in model.named_modules()}
        tensors = (*model.named_buffers(), *model.named_parameters())
        self.names = {id(tensor): name for name, tensor in tensors}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inner = (self.paths[module] for module in reversed(self.stack) if module in self.paths)
        path = next(inner, "")
        self.run.functions.append((path, function_name(func)))
        if func in NORMALIZATIONS:
            call = self._normalization(path, func, args, kwargs or {})
            self.run.normalizations.setdefault(path, set()).add(call)
        return func(*args, **(kwargs or {}))

    def _normalization(
        self, path: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> NormalizationCall:
        given = bound_arguments(func, "batch_norm", args, kwargs) or {}
        mean, var, weight, bias = (
            self.names.get(id(given.get(name)))
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        computed = {"weight": weight, "bias": bias}
        if any(name is None and given.get(key) is not None for key, name in computed.items()):
            mean = None  # without a name for γ or β, the call is as unusable as without statistics
        eps, training = float(given.get("eps", 1e-5)), bool(given.get("training", False))
        return NormalizationCall(path, mean, var, weight, bias, eps, training)


def run_observed(model: nn.Module, inputs: Any) -> Run:
    """Run a network on ``inputs`` in evaluation mode and in float64.

    Args:
        model: in float64; what its forward keeps as attributes is taken back.
        inputs: a tensor, or a tuple of positional arguments.

    Raises:
        TraceError: the network cannot be run in float64.
    """
    wide = own_inputs(as_arguments(inputs), torch.float64)
    run = Run()
    stack: list[nn.Module] = []
    try:
        with (
            mode_of(model, training=False),
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            tensor_uses(model) as uses,
            running_modules(stack),
            _Recorder(model, stack, run),
        ):
            torch.manual_seed(0)
            outputs = model(*wide)
        run.outputs = [out for out in output_tensors(outputs) if out.is_floating_point()]
    except PathconvertError:
        raise
    except Exception as error:  # a forward may raise anything
        raise TraceError(
            f"the network cannot be run in float64 on the example input: {first_line(error)}",
            "Make its forward compute in the dtype of its input.",
        ) from error
    run.foreign = {
        name
        for name, stacks in uses.items()
        if any(one[-1:] != (name.rpartition(".")[0],) for one in stacks)
    }
    return run


def require_finite(run: Run) -> None:
    """Check the outputs of the network before it is folded.

    Raises:
        PathconvertError: they are not finite.
    """
    if not all(bool(output.isfinite().all()) for output in run.outputs):
        raise PathconvertError(
            "the network's own outputs are not finite", "Check its weights for NaN and infinity."
        )


def is_same(before: Run, after: Run, folded: Collection[str]) -> bool:
    """Whether a network did the same as before, but for its folded BatchNorms.

    Args:
        before, after: the runs.
        folded: paths of the modules whose normalization was folded. Their own calls do not count,
            those of their children do.
    """
    functions = [[one for one in run.functions if one[0] not in folded] for run in (before, after)]
    if functions[0] != functions[1] or len(before.outputs) != len(after.outputs):
        return False
    for old, new in zip(before.outputs, after.outputs, strict=True):
        if old.shape != new.shape:
            return False
        largest = float(old.abs().max()) if old.numel() else 0.0
        error = float((old - new).abs().max()) if old.numel() else 0.0
        if not error <= TOLERANCE * largest:
            return False
    return True
