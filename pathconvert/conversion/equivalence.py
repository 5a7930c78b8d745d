"""Comparing the outputs of two networks, before and after a conversion.

The result is an :class:`EquivalenceReport`.

*Noise* is the error that the original network makes because of its dtype: max |a(x) − a₆₄(x)|,
where a₆₄ is the same network in float64, with every explicit cast in its forward one to float64
(``precision.py``), and at least one rounding of the largest output. For a network in float64, the
noise is that of its float32 copy times 2⁻²⁹, or, if its numbers leave float32's range, that of a
mixed network (below). The *noise ratio* is the other network's error against the same float64
reference, divided by the noise. A rescaled network rounds different numbers of the same relative
size, so its error is of the same order as the noise. It passes if the ratio is ≤ 4, which leaves
room for a maximum over few outputs.

A *mixed* network, whose tensors have several dtypes, runs in these dtypes where torch can run it so
(on inputs of one of them), and in a float32 copy where it cannot. The copy rounds far less than the
tensors themselves are rounded, which happens whenever a factor is not a power of two. The noise of
a mixed network is therefore the largest of its own error as above and of |a'(x) − a₆₄(x)| over
:data:`DRAWS` networks a' in float64, in each of which every number is moved by half a unit in the
last place of its own dtype, up or down by chance. Rounding moves a number by up to that half unit,
and by 0.58 of it in the root mean square, so that a rescaled network stays below the noise on
average, and the limit of 4 leaves the same room as above.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pathconvert.conversion.calls import Arguments, watched
from pathconvert.conversion.diagnosis import failing_module
from pathconvert.conversion.modules import (
    as_arguments,
    copied,
    mode_of,
    output_tensors,
    own_inputs,
)
from pathconvert.conversion.precision import (
    CastsTo,
    fits,
    in_dtype,
    input_dtypes,
    is_mixed,
    perturbed,
)
from pathconvert.errors import EquivalenceError, PathconvertError, first_line

#: Highest noise ratio that passes (see the module's docstring).
PASSING_NOISE_RATIO = 4.0
#: Number of perturbed networks that show a mixed network's noise. With one of them, a network with
#: a single output would fail by chance in 9 of 100 cases, with four in fewer than 1 of 1000.
DRAWS = 4

Result = TypeVar("Result")
Shapes = list[tuple[int, ...]]


@dataclass(frozen=True)
class EquivalenceReport:
    """How two networks' outputs compare, over all outputs and inputs.

    Attributes:
        max_abs: largest |a(x) − b(x)|.
        max_rel: ``max_abs`` divided by the largest |a₆₄(x)| of the same output.
        noise_ratio: error of b divided by the noise of a (see the module's docstring).
        bit_identical: whether all outputs are identical in every bit.
        outputs: number of output tensors that were compared.
    """

    max_abs: float
    max_rel: float
    noise_ratio: float
    bit_identical: bool
    outputs: int

    @property
    def passed(self) -> bool:
        """Whether the networks are the same function up to rounding."""
        return self.noise_ratio <= PASSING_NOISE_RATIO

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return asdict(self) | {"passed": self.passed}

    @staticmethod
    def worst(reports: Iterable[EquivalenceReport]) -> EquivalenceReport:
        """One report for all: the largest errors, and the number of outputs in total.

        Raises:
            EquivalenceError: there are no reports.
        """
        many = list(reports)
        if not many:
            raise EquivalenceError(
                "there is nothing to compare, because no part of the network has an output"
            )
        return EquivalenceReport(
            max_abs=max(r.max_abs for r in many),
            max_rel=max(r.max_rel for r in many),
            noise_ratio=max(r.noise_ratio for r in many),
            bit_identical=all(r.bit_identical for r in many),
            outputs=sum(r.outputs for r in many),
        )


def verify(
    model_a: nn.Module, model_b: nn.Module, inputs: Any, *, training: bool = False
) -> EquivalenceReport:
    """Compare two networks on ``inputs``.

    Args:
        model_a: the original network, whose dtype defines the noise; not changed.
        model_b: the other network; not changed.
        inputs: a tensor, or a tuple of positional arguments. Floating tensors are cast to the
            networks' dtype.
        training: compare in training mode, on copies (as running statistics change), with the same
            random seed.

    Raises:
        EquivalenceError: the outputs differ in number or shape, none is a floating-point tensor, or
            all are empty, so that nothing could be compared.
        PathconvertError: a network cannot run on the inputs.
    """
    report = _compared(model_a, model_b, inputs, training=training)
    if report is None:
        raise EquivalenceError(
            "there is nothing to compare, because all outputs of the networks are empty",
            "Give a batch of at least one input, with no side of size 0.",
        )
    return report


def _compared(
    model_a: nn.Module, model_b: nn.Module, inputs: Any, *, training: bool = False
) -> EquivalenceReport | None:
    """The comparison that :func:`verify` returns; None if all outputs are empty."""
    outputs_a = _outputs_or_refusal(model_a, inputs, training)
    outputs_b = _outputs_or_refusal(model_b, inputs, training)
    if _shapes(outputs_a) != _shapes(outputs_b):
        raise EquivalenceError(
            f"the outputs differ in shape: {_shapes(outputs_a)} and {_shapes(outputs_b)}"
        )
    if not outputs_a:
        raise EquivalenceError("the networks return no floating-point tensor to compare")
    if not any(output.numel() for output in outputs_a):
        return None
    reference = _outputs_or_refusal(model_a, inputs, training, torch.float64)
    _require_shapes(outputs_a, reference)
    noises = _noises(model_a, inputs, training, outputs_a, reference)
    return EquivalenceReport.worst(map(_compare, outputs_a, outputs_b, reference, noises))


def _outputs_or_refusal(
    model: nn.Module, inputs: Any, training: bool, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """:func:`forward_outputs`.

    Raises:
        PathconvertError: the network cannot run on the inputs; it names the layer that fails.
    """

    def run() -> list[Tensor]:
        return forward_outputs(model, inputs, training=training, dtype=dtype)

    try:
        return run()
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        layer = failing_module(model, run)
        where = f", in {layer}" if layer else ""
        wide = "" if dtype is None else f" in {str(dtype).removeprefix('torch.')}"
        raise PathconvertError(
            f"{type(model).__name__} cannot run{wide} on these inputs{where}: {first_line(error)}",
            "Give inputs that the network takes.",
        ) from error


def _shapes(outputs: list[Tensor]) -> Shapes:
    return [tuple(tensor.shape) for tensor in outputs]


def _require_shapes(outputs: list[Tensor], reference: list[Tensor]) -> None:
    """Check that the original's outputs have the same shapes when it rounds differently.

    Raises:
        EquivalenceError: they do not, so no noise can be measured.
    """
    if _shapes(outputs) != _shapes(reference):
        raise EquivalenceError(
            "the shapes of the original's own outputs depend on rounding: they are"
            f" {_shapes(outputs)}, but {_shapes(reference)} when it computes in float64",
            "Compare the parts of the network that compute scores, before any selection.",
        )


def _noises(
    model: nn.Module, inputs: Any, training: bool, outputs: list[Tensor], reference: list[Tensor]
) -> list[float]:
    """The noise of every output (see the module's docstring)."""
    if is_mixed(model):
        return _perturbed_noises(model, inputs, training, outputs, reference)
    kind, share = run_dtype(model), 1.0
    if kind == torch.float64:
        narrow = forward_outputs(model, inputs, training=training, dtype=torch.float32)
        _require_shapes(narrow, reference)
        finite = all(bool(output.isfinite().all()) for output in narrow)
        if not finite or not fits(model, torch.float32):
            return _perturbed_noises(model, inputs, training, outputs, reference)
        outputs = narrow
        share = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return [
        _largest_noise([share * _distance(output, exact)], torch.finfo(kind).eps, exact)
        for output, exact in zip(outputs, reference, strict=True)
    ]


def _perturbed_noises(
    model: nn.Module, inputs: Any, training: bool, outputs: list[Tensor], reference: list[Tensor]
) -> list[float]:
    """The noise of every output as that of a mixed network (see the module's docstring)."""
    errors = [[_distance(*pair)] for pair in zip(outputs, reference, strict=True)]
    for seed in range(DRAWS):
        moved = forward_outputs(
            perturbed(model, seed), inputs, training=training, dtype=torch.float64
        )
        _require_shapes(moved, reference)
        for found, output, exact in zip(errors, moved, reference, strict=True):
            found.append(_distance(output, exact))
    return [
        _largest_noise(found, torch.finfo(output.dtype).eps, exact)
        for found, output, exact in zip(errors, outputs, reference, strict=True)
    ]


def _distance(a: Tensor, b: Tensor) -> float:
    """max |a − b|, in float64; 0 if there are no elements."""
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def _largest_noise(errors: list[float], eps: float, exact: Tensor) -> float:
    """The largest of the finite errors, and at least one rounding of the largest output."""
    rounding = eps / 2 * float(exact.abs().max()) if exact.numel() else 0.0
    return max([error for error in errors if rounding < error < math.inf], default=rounding)


def _compare(a: Tensor, b: Tensor, reference: Tensor, noise: float) -> EquivalenceReport:
    """The report for one output tensor; ``reference`` is a₆₄(x)."""
    if not a.numel():
        return EquivalenceReport(
            max_abs=0.0, max_rel=0.0, noise_ratio=0.0, bit_identical=True, outputs=1
        )
    difference, error = _distance(a, b), _distance(b, reference)
    scale = float(reference.abs().max())
    return EquivalenceReport(
        max_abs=difference,
        max_rel=_quotient(difference, scale),
        noise_ratio=_quotient(error, noise),
        bit_identical=torch.equal(a, b),
        outputs=1,
    )


def _quotient(error: float, unit: float) -> float:
    """error / unit; 0 if there is no error, infinite if the quotient is not defined."""
    if error == 0:
        return 0.0
    quotient = error / unit if unit else math.inf
    return quotient if not math.isnan(quotient) else math.inf


def run_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that a network's inputs have: that of its first parameter.

    All parameters have this dtype, unless the network is mixed (see the module's docstring).
    """
    kinds = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(kinds, torch.float32)


@contextlib.contextmanager
def _runnable(model: nn.Module, training: bool, dtype: torch.dtype | None) -> Iterator[nn.Module]:
    """The network in evaluation or training mode and in ``dtype``, seeded.

    A copy where the original would change. None keeps the dtypes of the network.
    """
    if dtype is not None and (is_mixed(model) or dtype != run_dtype(model)):
        model = in_dtype(model, dtype)
    elif training:
        model = copied(model)
    casts = contextlib.nullcontext() if dtype is None else CastsTo(dtype)
    with mode_of(model, training=training), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        with casts:
            yield model


def _run(
    model: nn.Module,
    inputs: Any,
    use: Callable[[nn.Module, tuple[Any, ...]], Result],
    *,
    training: bool = False,
    dtype: torch.dtype | None = None,
) -> Result:
    """Call ``use`` with the network in ``dtype`` and its own copy of the arguments.

    With None, the network keeps its own dtypes. A mixed one is tried with inputs of each of them,
    and is run as a float32 copy if torch cannot run it so.
    """
    arguments = as_arguments(inputs)
    if dtype is None and is_mixed(model):
        for kind in input_dtypes(model, arguments):
            # torch raises RuntimeError where the dtypes of an operation's arguments do not fit
            with contextlib.suppress(RuntimeError), _runnable(model, training, None) as runnable:
                return use(runnable, own_inputs(arguments, kind))
        dtype = torch.float32
    with _runnable(model, training, dtype) as runnable:
        return use(runnable, own_inputs(arguments, dtype or run_dtype(model)))


def forward_outputs(
    model: nn.Module, inputs: Any, *, training: bool = False, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """All floating-point outputs of one forward in ``dtype`` (None: the network's own dtypes)."""

    def outputs(runnable: nn.Module, arguments: tuple[Any, ...]) -> list[Tensor]:
        return output_tensors(runnable(*arguments))

    found = _run(model, inputs, outputs, training=training, dtype=dtype)
    return [tensor for tensor in found if tensor.is_floating_point()]


# ---- part by part --------------------------------------------------------------------------------


def verify_conversion(
    original: nn.Module, converted: nn.Module, parts: tuple[str, ...], inputs: Any
) -> EquivalenceReport:
    """Call :func:`verify` for every converted part.

    Its inputs are those that the part receives in the original network.
    """
    if parts == ("",):
        return verify(original, converted, inputs)
    received = _part_inputs(original, parts, inputs)
    compared = (
        _compared(
            _WithKeywords(original.get_submodule(part)),
            _WithKeywords(converted.get_submodule(part)),
            call,
        )
        for part, calls in received.items()
        for call in calls
    )
    # a detector that finds no box calls its heads with empty batches
    return EquivalenceReport.worst(report for report in compared if report is not None)


class _WithKeywords(nn.Module):
    """A module whose keyword arguments are its second argument.

    As such they are copied and cast for every run, as the positional ones are.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.module(*args, **kwargs)


def _part_inputs(
    model: nn.Module, parts: tuple[str, ...], inputs: Any
) -> dict[str, list[Arguments]]:
    """The arguments of all calls of every part when ``model`` runs on ``inputs``."""

    def watch(runnable: nn.Module, arguments: tuple[Any, ...]) -> dict[str, list[Arguments]]:
        received: dict[str, list[Arguments]] = {}

        def note(part: str, call: Arguments) -> None:
            received.setdefault(part, []).append(own_inputs(call))

        with watched({part: runnable.get_submodule(part) for part in parts}, before=note):
            runnable(*arguments)
        return received

    return _run(model, inputs, watch)
