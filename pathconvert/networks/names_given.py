"""Find the tensors of a network that is known by name, wherever they lie in a state dict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from pathconvert.errors import ArchitectureError
from pathconvert.networks import architectures
from pathconvert.networks.adjusting import adjust
from pathconvert.networks.architectures import Architecture, described
from pathconvert.networks.builders import CHANGES
from pathconvert.networks.names import View, views
from pathconvert.networks.recognition import (
    Found,
    Reading,
    choose_network,
    depth,
    differences_in,
    fits,
    is_inside,
    located,
    read,
    views_of,
)

_TRIED = 6  # views that are compared with a named network; others have less in common with it


def find_named(
    arch: str,
    tensors: Mapping[str, Tensor],
    where: str,
    *,
    num_classes: int | None = None,
    input_size: tuple[int, ...] | None = None,
    prefix: str | None = None,
) -> Found:
    """The tensors of the network that ``--arch`` names, wherever they lie in a state dict.

    Args:
        arch: as for :func:`architectures.resolve`.
        tensors, where, num_classes, prefix: as for :func:`recognition.find`.
        input_size: the size of an input without the batch dimension; None for the usual one.

    Raises:
        ArchitectureError: there is no such network, or no tensors in the state dict are its.
    """
    name, given = architectures.called(arch)
    found = views_of(tensors, prefix, where)
    if not architectures.is_known(name):
        architecture = architectures.resolve(
            arch, None, num_classes=num_classes, input_size=input_size
        )
        return _fitting(architecture, found, where)
    readings = sorted((read(view) for view in found), key=lambda r: _order(r, name))
    exact: list[Found] = []
    for reading in readings[:_TRIED]:
        if any(is_inside(reading.view, other.view) for other in exact):
            continue
        architecture = architectures.resolve(
            arch, reading.view.tensors, num_classes=num_classes, input_size=input_size
        )
        if not given.keys() & set(CHANGES) and not differences_in(architecture, reading.view):
            exact.append(Found(reading.view, architecture))
    if exact:
        return choose_network(exact, where)
    return _named_and_adjusted(name, given, readings, where, num_classes, input_size)


def find_stored(
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    where: str,
    change: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Found:
    """The tensors of a network of known architecture, wherever they lie in a state dict.

    Args:
        architecture: the network.
        tensors, where: as for :func:`recognition.find`.
        change: turns the stock network into the form that the file is in.

    Raises:
        ArchitectureError: no tensors in the state dict are the network's.
    """
    return _fitting(architecture, views(tensors), where, change)


def _order(reading: Reading, name: str) -> tuple[int, int, int]:
    """Views that have most in common with a network first, of those the outermost."""
    by_shape, by_layer = (
        next((match.hits for match in found if match.name == name), 0)
        for found in (reading.by_shape, reading.by_layer)
    )
    return -by_layer, -by_shape, depth(reading.view)


def _named_and_adjusted(
    name: str,
    given: Mapping[str, object],
    readings: Sequence[Reading],
    where: str,
    num_classes: int | None,
    input_size: tuple[int, ...] | None,
) -> Found:
    """The network that ``--arch`` names, adjusted to the view that has most in common with it."""
    refusals: list[ArchitectureError] = []
    found: list[Found] = []
    for reading in readings[:_TRIED]:
        if not reading.resembles or any(is_inside(reading.view, one.view) for one in found):
            continue
        try:
            result = adjust(name, reading.view.tensors, num_classes, given=given)
        except ArchitectureError as error:
            refusals.append(located(error, reading.view, where))
            continue
        if result is not None and fits(result.architecture, reading.view, num_classes):
            known = result.architecture
            size = input_size or known.input_size
            architecture = Architecture(known.name, known.arguments, size, known.task)
            found.append(Found(reading.view, architecture, result.notes))
    if found:
        return choose_network(found, where)
    if refusals:
        raise refusals[0]
    best = readings[0].view
    architecture = architectures.resolve(name, best.tensors, num_classes=num_classes)
    raise _not_its(architecture, best, differences_in(architecture, best), where)


def _fitting(
    architecture: Architecture,
    found: Sequence[View],
    where: str,
    change: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Found:
    """The view that has exactly a network's tensors.

    Raises:
        ArchitectureError: no view has them, or several do.
    """
    model = change(architectures.build(architecture))
    exact: list[Found] = []
    fewest: tuple[View, list[str]] | None = None
    for view in found:
        if any(is_inside(view, one.view) for one in exact):
            continue
        differences = architectures.differences_to(model, view.tensors)
        if not differences:
            exact.append(Found(view, architecture))
        if fewest is None or len(differences) < len(fewest[1]):
            fewest = view, differences
    if exact:
        return choose_network(exact, where)
    assert fewest is not None
    raise _not_its(architecture, *fewest, where)


def _not_its(
    architecture: Architecture, view: View, differences: Sequence[str], where: str
) -> ArchitectureError:
    under = f", under {view.prefix!r}" if view.prefix else ""
    return ArchitectureError(
        f"{where}{under}: the tensors are not those of {described(architecture.name, differences)}",
        "Check --arch and --num-classes.",
    )
