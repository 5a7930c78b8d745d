"""Comparing the outputs of two networks, before and after a conversion.

The result is an :class:`EquivalenceReport`.

*Noise* is the error that the original network makes because of its dtype: max |a(x) − a₆₄(x)|,
where a₆₄ is the same network in float64, and at least one rounding of the largest output. (For a
network in float64, the noise is that of its float32 copy times 2⁻²⁹.) The *noise ratio* is the
other network's error against the same float64 reference, divided by the noise. A rescaled network
rounds different numbers of the same relative size, so its error is of the same order as the noise.
It passes if the ratio is ≤ 4, which leaves room for a maximum over few outputs.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pathconvert.conversion.calls import Arguments, watched
from pathconvert.conversion.modules import (
    as_arguments,
    computed_tensors,
    mode_of,
    output_tensors,
    own_inputs,
)
from pathconvert.errors import EquivalenceError

#: Highest noise ratio that passes (see the module's docstring).
PASSING_NOISE_RATIO = 4.0


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
        """One report for all: the largest errors, and the number of outputs in total."""
        many = list(reports)
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
        EquivalenceError: the outputs differ in number or shape, or none is a floating-point tensor.
    """
    outputs_a = forward_outputs(model_a, inputs, training=training)
    outputs_b = forward_outputs(model_b, inputs, training=training)
    reference = outputs_a
    if run_dtype(model_a) != torch.float64:
        reference = forward_outputs(model_a, inputs, training=training, dtype=torch.float64)
    noises = _noises(model_a, inputs, training, outputs_a, reference)
    shapes = [[tuple(t.shape) for t in outputs] for outputs in (outputs_a, outputs_b)]
    if shapes[0] != shapes[1]:
        raise EquivalenceError(f"the outputs differ in shape: {shapes[0]} and {shapes[1]}")
    if not outputs_a:
        raise EquivalenceError("the networks return no floating-point tensor to compare")
    return EquivalenceReport.worst(map(_compare, outputs_a, outputs_b, reference, noises))


def _noises(
    model: nn.Module, inputs: Any, training: bool, outputs: list[Tensor], reference: list[Tensor]
) -> list[float]:
    """The noise of every output (see the module's docstring)."""
    kind, share = run_dtype(model), 1.0
    if kind == torch.float64:
        outputs = forward_outputs(model, inputs, training=training, dtype=torch.float32)
        share = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    noises = []
    for output, exact in zip(outputs, reference, strict=True):
        if not exact.numel():
            noises.append(0.0)
            continue
        noise = share * float((output.double() - exact.double()).abs().max())
        rounding = torch.finfo(kind).eps / 2 * float(exact.abs().max())
        noises.append(noise if rounding < noise < math.inf else rounding)
    return noises


def _compare(a: Tensor, b: Tensor, reference: Tensor, noise: float) -> EquivalenceReport:
    """The report for one output tensor; ``reference`` is a₆₄(x)."""
    if not a.numel():
        return EquivalenceReport(
            max_abs=0.0, max_rel=0.0, noise_ratio=0.0, bit_identical=True, outputs=1
        )
    difference = float((a.double() - b.double()).abs().max())
    error = float((b.double() - reference.double()).abs().max())
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
    """The dtype in which a network runs.

    It is that of its weights, or float32 if they have several.
    """
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return kinds.pop() if len(kinds) == 1 else torch.float32


@contextlib.contextmanager
def _runnable(
    model: nn.Module, training: bool, dtype: torch.dtype | None
) -> Iterator[tuple[nn.Module, torch.dtype]]:
    """The network in evaluation or training mode and in ``dtype``, seeded.

    A copy where the original would change.

    Yields:
        The network; and its dtype.
    """
    own = run_dtype(model)
    mixed = any(p.dtype != own for p in model.parameters() if p.is_floating_point())
    dtype = dtype or own
    if training or mixed or dtype != own:
        memo: dict[int, Any] = {}
        if not training:  # convert while copying, so that there is only one copy in memory
            tensors = [*model.parameters(), *model.buffers()]
            memo = {id(t): _cast(t, dtype) for t in tensors if t.is_floating_point()}
        model = copy.deepcopy(model, memo | computed_tensors(model)).to(dtype)
    with mode_of(model, training=training), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        yield model, dtype


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in ``dtype``; a parameter stays a parameter."""
    cast = tensor.detach().to(dtype)
    return (
        nn.Parameter(cast, requires_grad=tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else cast
    )


def forward_outputs(
    model: nn.Module, inputs: Any, *, training: bool = False, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """All floating-point outputs of one forward in ``dtype`` (None: the network's own dtype)."""
    with _runnable(model, training, dtype) as (runnable, kind):
        output = runnable(*own_inputs(as_arguments(inputs), kind))
    return [tensor for tensor in output_tensors(output) if tensor.is_floating_point()]


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
    return EquivalenceReport.worst(
        verify(
            _Bound(original.get_submodule(part), kwargs),
            _Bound(converted.get_submodule(part), kwargs),
            args,
        )
        for part, calls in received.items()
        for args, kwargs in calls
    )


class _Bound(nn.Module):
    """A module with fixed keyword arguments."""

    def __init__(self, module: nn.Module, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.module = module
        self.kwargs = kwargs

    def forward(self, *args: Any) -> Any:
        return self.module(*args, **self.kwargs)


def _part_inputs(
    model: nn.Module, parts: tuple[str, ...], inputs: Any
) -> dict[str, list[Arguments]]:
    """The arguments of all calls of every part when ``model`` runs on ``inputs``."""
    received: dict[str, list[Arguments]] = {}

    def note(part: str, call: Arguments) -> None:
        received.setdefault(part, []).append(call)

    modules = {part: model.get_submodule(part) for part in parts}
    with mode_of(model, training=False), torch.no_grad(), watched(modules, before=note):
        model(*as_arguments(own_inputs(inputs, run_dtype(model))))
    return received
