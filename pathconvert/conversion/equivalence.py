"""Before / after → :class:`EquivalenceReport`.

*Noise* is what the dtype costs the original: max |a(x) − a₆₄(x)|, with a₆₄ the same network in float64, and never less
than one rounding of the largest output. (A network that is float64 itself has the noise of its float32 copy, times
2⁻²⁹.) The *noise ratio* is the other network's error against that same float64
reference over the noise. A rescaled network rounds other numbers of the same relative size, so its error is of the
order of the noise; it passes at ≤ 4, which leaves room for the maximum over few outputs.
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
from torch.utils._pytree import tree_map_only

from pathconvert.conversion.trace import as_arguments, computed_tensors, mode_of, output_tensors
from pathconvert.errors import EquivalenceError

#: Highest noise ratio that passes (see the module's docstring).
PASSING_NOISE_RATIO = 4.0


@dataclass(frozen=True)
class EquivalenceReport:
    """How two networks' outputs compare, over all outputs and inputs.

    Attributes:
        max_abs: largest |a(x) − b(x)|.
        max_rel: ``max_abs`` over the largest |a₆₄(x)| of that output.
        noise_ratio: error of b over noise of a (see the module's docstring).
        bit_identical: whether every output is the same to the bit.
        outputs: number of output tensors compared.
    """

    max_abs: float
    max_rel: float
    noise_ratio: float
    bit_identical: bool
    outputs: int

    @property
    def passed(self) -> bool:
        return self.noise_ratio <= PASSING_NOISE_RATIO

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}

    @staticmethod
    def worst(reports: Iterable[EquivalenceReport]) -> EquivalenceReport:
        """The reports taken together."""
        many = list(reports)
        return EquivalenceReport(
            max(r.max_abs for r in many),
            max(r.max_rel for r in many),
            max(r.noise_ratio for r in many),
            all(r.bit_identical for r in many),
            sum(r.outputs for r in many),
        )


def verify(model_a: nn.Module, model_b: nn.Module, inputs: Any, *, training: bool = False) -> EquivalenceReport:
    """Compare two networks on ``inputs``.

    Args:
        model_a: the original; its dtype defines the noise. Not changed.
        model_b: the other one. Not changed.
        inputs: a tensor, or a tuple of positional arguments. Floating tensors are cast to the networks' dtype.
        training: compare in training mode (on copies, whose running statistics move), random layers seeded alike.

    Raises:
        EquivalenceError: the outputs' structures or shapes differ.
    """
    outputs_a = forward_outputs(model_a, inputs, training)
    outputs_b = forward_outputs(model_b, inputs, training)
    reference = (
        outputs_a if run_dtype(model_a) == torch.float64 else forward_outputs(model_a, inputs, training, torch.float64)
    )
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
        outputs = forward_outputs(model, inputs, training, torch.float32)
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
    """One output tensor."""
    if not a.numel():
        return EquivalenceReport(0.0, 0.0, 0.0, True, 1)
    difference = float((a.double() - b.double()).abs().max())
    error = float((b.double() - reference.double()).abs().max())
    scale = float(reference.abs().max())
    return EquivalenceReport(
        difference,
        _quotient(difference, scale),
        _quotient(error, noise),
        torch.equal(a, b),
        1,
    )


def _quotient(error: float, unit: float) -> float:
    """error / unit, infinite where that says nothing."""
    if error == 0:
        return 0.0
    quotient = error / unit if unit else math.inf
    return quotient if not math.isnan(quotient) else math.inf


def run_dtype(model: nn.Module) -> torch.dtype:
    """The dtype to run a network in: that of its weights, float32 where they are mixed."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return kinds.pop() if len(kinds) == 1 else torch.float32


@contextlib.contextmanager
def _runnable(model: nn.Module, training: bool, dtype: torch.dtype | None) -> Iterator[tuple[nn.Module, torch.dtype]]:
    """The network itself where nothing has to change, else a copy."""
    own = run_dtype(model)
    mixed = any(p.dtype != own for p in model.parameters() if p.is_floating_point())
    dtype = dtype or own
    if training or mixed or dtype != own:
        memo: dict[int, Any] = {}
        if not training:  # convert while copying, so that one copy is all there ever is
            tensors = [*model.parameters(), *model.buffers()]
            memo = {id(t): _cast(t, dtype) for t in tensors if t.is_floating_point()}
        model = copy.deepcopy(model, memo | computed_tensors(model)).to(dtype)
    with mode_of(model, training), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        yield model, dtype


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.detach().to(dtype)
    return nn.Parameter(cast, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cast


def forward_outputs(
    model: nn.Module, inputs: Any, training: bool = False, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """All floating-point outputs of one forward, in ``dtype`` (None: the network's own)."""
    with _runnable(model, training, dtype) as (runnable, kind):

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(kind) if tensor.is_floating_point() else tensor

        output = runnable(*tree_map_only(Tensor, cast, as_arguments(inputs)))
    return [tensor for tensor in output_tensors(output) if tensor.is_floating_point()]


# ---- part by part ---------------------------------------------------------------------------------------------


def verify_conversion(
    original: nn.Module, converted: nn.Module, parts: tuple[str, ...], inputs: Any
) -> EquivalenceReport:
    """:func:`verify` on every converted part, with the inputs that the original hands it."""
    if parts == ("",):
        return verify(original, converted, inputs)
    received = _part_inputs(original, parts, inputs)
    return EquivalenceReport.worst(
        verify(_Bound(original.get_submodule(part), kwargs), _Bound(converted.get_submodule(part), kwargs), args)
        for part, calls in received.items()
        for args, kwargs in calls
    )


class _Bound(nn.Module):
    """A module with keyword arguments fixed."""

    def __init__(self, module: nn.Module, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.module = module
        self.kwargs = kwargs

    def forward(self, *args: Any) -> Any:
        return self.module(*args, **self.kwargs)


def _part_inputs(model: nn.Module, parts: tuple[str, ...], inputs: Any) -> dict[str, list[Any]]:
    """What every part is called with when ``model`` runs on ``inputs``."""
    received: dict[str, list[Any]] = {}
    handles = []
    for part in parts:

        def note(_: nn.Module, args: Any, kwargs: Any, part: str = part) -> None:
            received.setdefault(part, []).append((args, kwargs))

        handles.append(model.get_submodule(part).register_forward_pre_hook(note, with_kwargs=True))
    dtype = run_dtype(model)
    cast = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)
    try:
        with mode_of(model, False), torch.no_grad():
            model(*as_arguments(cast))
    finally:
        for handle in handles:
            handle.remove()
    return received
