"""Fold BatchNorms into the layers next to them, for evaluation only.

In evaluation mode, a BatchNorm computes z ↦ a·z + b in every channel, with a = γ/√(var + eps)
and b = β − a·mean. For a layer with weight W and bias c:

================  ==================================================================================
BatchNorm after   a·(W x + c) + b = (a W) x + (a c + b): scales rows of W, in every layer, with any
                  padding
BatchNorm before  W (a x + b) + c = (W a) x + (W b + c): scales columns of W. Only in layers that do
                  not pad, because padding adds 0 to x, where −b/a would be needed after folding
================  ==================================================================================

A BatchNorm is folded if, in *every* call of the two, the layer's result goes into the BatchNorm
only, channel by channel, and if nothing else uses the parameters of both. The operations decide,
not the classes: of a module that does more than to normalise, such as timm's ``BatchNormAct2d``,
the rest stays in its place (``conversion/remainder.py``). Other BatchNorms are left as they are.

The folded network runs on the example, and has to call the same functions and return the same
outputs as before. A BatchNorm without which it does not, because the forward asks it for its
``num_features`` or whether it is an ``nn.BatchNorm2d``, is left as it is, too.

*Every* call means every call on the example input: a forward that does something else with other
arguments, or on inputs of another rank, is only folded correctly for the example's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pathconvert.conversion.bisection import working
from pathconvert.conversion.equivalence import run_dtype
from pathconvert.conversion.modules import (
    as_arguments,
    copied,
    meta_inputs,
    refuse_unreadable,
    unwrapped,
)
from pathconvert.conversion.tracing.parts import TrainingModeError, trace_network
from pathconvert.conversion.tracing.rules import rule_of
from pathconvert.conversion.tracing.trace import Trace
from pathconvert.conversion.tracing.tracer import Tracer, run
from pathconvert.errors import ArchitectureError, PathconvertError, TraceError
from pathconvert.export.graph.foldable import Folder, is_batch_norm
from pathconvert.export.graph.observing import Run, is_same, require_finite, run_observed
from pathconvert.networks import architectures


def fold(model: nn.Module, example_input: Any = None) -> nn.Module:
    """Return a copy of ``model`` in evaluation mode, with its BatchNorms folded.

    Every one is folded that can be (see the module's docstring). A Path-BN network is taken out of
    that form first. Folded BatchNorms become ``nn.Identity``, or what their module does besides
    normalising, and their layers get a bias. The arithmetic is in float64, and is checked there by
    running both networks; the weights are then cast back to their own dtype.

    Args:
        model: not changed.
        example_input: a tensor, or a tuple of the forward's positional arguments; None if the
            network is one of torchvision's, whose input size is known.

    Raises:
        ArchitectureError: ``example_input`` is None, but the network is not one of torchvision's.
        TraceError: the forward cannot be traced, or cannot be run in float64; or the network has
            TorchScript modules, or lazy modules that have not run yet.
        PathconvertError: a folded weight does not fit the network's dtype, or the network's outputs
            are not finite.
    """
    model = unwrapped(model)
    refuse_unreadable(model, scripted=True)
    wide = _widened(model)
    inputs = example_for(wide) if example_input is None else example_input
    trace = _trace(wide, inputs)
    if trace is not None:
        wide = _folded(wide, lambda: _widened(model), trace, inputs)
    return _in_dtypes_of(wide, model)


def _widened(model: nn.Module) -> nn.Module:
    """A copy in path form, evaluation mode and float64."""
    from pathconvert.path_bn.form import has_path_bn, leave_path_bn

    wide = copied(model).double()
    return (leave_path_bn(wide) if has_path_bn(wide) else wide).double().eval()


def unfolded(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the BatchNorms in ``model``.

    In a folded network, those that could not be folded. What a forward normalises without a module
    for it, with ``F.batch_norm`` and tensors of its own, has no name and is not among them.
    """
    return tuple(name for name, module in model.named_modules() if is_batch_norm(module))


def example_for(model: nn.Module) -> Tensor:
    """Return a random input, [2, …], of the size that a torchvision network takes.

    Raises:
        ArchitectureError: the network is not one of torchvision's.
    """
    try:
        size = architectures.recognise(model.state_dict()).input_size
    except ArchitectureError as error:
        message = (
            f"{type(model).__name__} is not a torchvision network, so the size of its input is not"
            " known"
        )
        raise ArchitectureError(
            message, "Pass example_input, a tensor such as torch.zeros(1, 3, 224, 224)."
        ) from error
    assert size is not None
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(0))


def _trace(model: nn.Module, inputs: Any) -> Trace | None:
    """The trace of the whole network.

    None if only parts can be traced, because other code may use their layers too.
    """
    # the input may be too small for an auxiliary head, which does not run in evaluation mode
    try:
        traced = trace_network(model, inputs)
    except TrainingModeError:
        trace, arguments = Trace(), meta_inputs(as_arguments(inputs), run_dtype(model))
        run(Tracer(model, trace, rule_of), model, arguments, {}, training=False)
        return trace
    return traced.trace if traced.parts == ("",) else None


def _folded(
    wide: nn.Module, again: Callable[[], nn.Module], trace: Trace, inputs: Any
) -> nn.Module:
    """Fold every BatchNorm without which the network still does the same.

    Args:
        wide: the network in evaluation mode and float64; may be changed.
        again: makes another copy of it.
        trace: of the network.
        inputs: the example.
    """
    before = run_observed(wide, inputs)
    taken = Folder(wide, trace, before).fold()
    if not taken:
        return wide
    require_finite(before)
    if _does_the_same(wide, before, taken, inputs):
        return wide

    def works(names: list[str]) -> bool:
        candidate = again()
        found = Folder(candidate, trace, before).fold(names)
        return _does_the_same(candidate, before, found, inputs)

    names = working(works, taken)
    result = again()
    Folder(result, trace, before).fold(names)
    return result


def _does_the_same(folded: nn.Module, before: Run, taken: list[str], inputs: Any) -> bool:
    """Whether the folded network runs as it did before."""
    try:
        after = run_observed(folded, inputs)
    except TraceError:
        return False
    return is_same(before, after, taken)


def _in_dtypes_of(folded: nn.Module, model: nn.Module) -> nn.Module:
    """Cast every tensor of ``folded`` to the dtype that it has in ``model``.

    Raises:
        PathconvertError: a weight is finite, but not in that dtype.
    """
    dtypes = {
        name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    usual = run_dtype(model)
    for name, tensor in (*folded.named_parameters(), *folded.named_buffers()):
        if not tensor.is_floating_point():
            continue
        cast = tensor.detach().to(dtypes.get(name, usual))
        if bool(tensor.isfinite().all()) and not bool(cast.isfinite().all()):
            raise PathconvertError(
                f"{name} does not fit {str(cast.dtype).removeprefix('torch.')} once its BatchNorm"
                " is folded in",
                "Fold the network in float32: fold(model.float()).",
            )
        tensor.data = cast
    return folded
