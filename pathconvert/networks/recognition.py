"""Find the network that a set of tensors holds: under which prefix, and of which architecture.

The steps, each only where the one before finds nothing:

1. every view (``names.py``) whose tensors are exactly those of a network of the index;
2. the views that resemble one, with that network adjusted to them (``adjusting.py``);
3. a refusal that names the nearest network.

A view inside another one is not considered once the outer one is a network, as the ResNet inside a
detector is not what the file holds. Of several networks side by side the one that was trained is
taken before its slowly moving copy (``names.FOLLOWERS``); others are refused until ``--prefix``
names one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pathconvert.errors import ArchitectureError
from pathconvert.networks import architectures
from pathconvert.networks.adjusting import adjust
from pathconvert.networks.architectures import Architecture, Candidate
from pathconvert.networks.names import INERT, View, is_follower, shortened, views, without_wrappers
from pathconvert.networks.names_index import Match, layer_matches, matches, shapes_of

_RESEMBLES = 0.5  # share of tensors or layers from which on a view may be a changed network
_CANDIDATES = 4  # networks that a view is compared with: the ResNet-101s have the same names
_SIMILAR = 0.2  # share of tensors from which on a view is compared with a network


@dataclass(frozen=True, eq=False)
class Found:
    """The network that a set of tensors holds.

    Attributes:
        view: its tensors, and what else there is.
        architecture: how to build it.
        notes: how it differs from the stock network, one sentence each.
        others: the networks beside it: prefix → name.
    """

    view: View
    architecture: Architecture
    notes: tuple[str, ...] = ()
    others: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, eq=False)
class Reading:
    """A view, and the networks that have tensors, and layers, in common with it.

    ``compared`` keeps the comparisons, each of which builds a network.
    """

    view: View
    by_shape: list[Match]
    by_layer: list[Match]
    compared: dict[str, Candidate] = field(default_factory=dict)

    def compare(self, name: str, num_classes: int | None) -> Candidate:
        """The view compared with a network."""
        if name not in self.compared:
            (self.compared[name],) = architectures.candidates_for(
                self.view.tensors, num_classes=num_classes, names=[name]
            )
        return self.compared[name]

    @property
    def hits(self) -> tuple[int, int]:
        """The most tensors, and layers, in common with one network."""
        shapes, layers = (
            max((match.hits for match in found), default=0)
            for found in (self.by_shape, self.by_layer)
        )
        return shapes, layers

    @property
    def resembles(self) -> bool:
        """Whether the view may be a changed network: it has most tensors or layers of one."""
        return any(match.share >= _RESEMBLES for match in (*self.by_shape[:1], *self.by_layer[:1]))


def find(
    tensors: Mapping[str, Tensor],
    where: str,
    *,
    num_classes: int | None = None,
    prefix: str | None = None,
) -> Found:
    """The network that a state dict holds.

    Args:
        tensors: the state dict.
        where: the file and what was recognised so far, for messages.
        num_classes: the number of classes; overrides the number that the tensors show.
        prefix: take only tensors with this prefix.

    Raises:
        ArchitectureError: no network is recognised, or several are.
    """
    readings = [read(view) for view in views_of(tensors, prefix, where)]
    known, refusals = list(_exact(readings, num_classes, where)), list[ArchitectureError]()
    if not known:
        known, refusals = _adjusted(readings, num_classes, where)
    if known:
        found = choose_network(known, where)
        if prefix is None:
            _check_outside(found, tensors, where)
        return found
    if refusals:
        raise refusals[0]
    raise _unknown(readings, num_classes, where)


# ---- views ---------------------------------------------------------------------------------------


def views_of(tensors: Mapping[str, Tensor], prefix: str | None, where: str) -> list[View]:
    """Every way to read a state dict, as :func:`names.views` gives them.

    Args:
        tensors: the state dict.
        prefix: take only views with this prefix; None for all.
        where: the file, for the message.

    Raises:
        ArchitectureError: no name begins with ``prefix``.
    """
    found = views(tensors, prefix)
    if not found:
        starts = dict.fromkeys(
            without_wrappers(name).partition(".")[0] for name in tensors if "." in name
        )
        raise ArchitectureError(
            f"{where}: no name begins with the prefix {prefix!r}",
            f"The names begin with {shortened(list(starts), 8)}",
        )
    return found


def read(view: View) -> Reading:
    """Look up which networks of the index have tensors, and layers, in common with a view."""
    shapes = shapes_of(view.tensors)
    return Reading(view, matches(shapes), layer_matches(shapes))


def depth(view: View) -> int:
    """How many modules a view's network lies inside of."""
    return view.prefix.count(".")


def is_inside(view: View, other: View) -> bool:
    """Whether a view shares tensors with another one."""
    names = set(other.original.values()) | {part for own in other.parts.values() for part in own}
    mine = [*view.original.values(), *(own[0] for own in view.parts.values())]
    return any(name in names for name in mine)


def differences_in(architecture: Architecture, view: View) -> list[str]:
    """How a view's tensors differ from a network's, one text per difference."""
    return architectures.differences_to(architectures.shape_model(architecture), view.tensors)


# ---- exact networks ------------------------------------------------------------------------------


def _exact(readings: Sequence[Reading], num_classes: int | None, where: str) -> Iterator[Found]:
    """Every view that is a network of the index, with the most tensors first."""
    seen: list[View] = []
    for reading in sorted(readings, key=lambda r: (-r.hits[0], depth(r.view))):
        best = reading.by_shape[0].share if reading.by_shape else 0.0
        if best <= _SIMILAR or any(is_inside(reading.view, view) for view in seen):
            continue
        names = _fitting_names(reading, num_classes)
        if len(names) > 1:
            known = ", ".join(one.architecture.name for one in names)
            raise ArchitectureError(
                f"{where}: these tensors fit several networks: {known}",
                f"Choose one, for example --arch {names[0].architecture.name}",
            )
        if names:
            seen.append(reading.view)
            yield Found(reading.view, names[0].architecture)


def _fitting_names(reading: Reading, num_classes: int | None) -> list[Candidate]:
    """The networks that have exactly a view's tensors: more than one only for twins."""
    exact: list[Candidate] = []
    share = 0.0
    for match in reading.by_shape[:_CANDIDATES]:
        if match.share < (share if exact else 0.8 * reading.by_shape[0].share):
            break
        candidate = reading.compare(match.name, num_classes)
        exact += [] if candidate.differences else [candidate]
        share = match.share
    return exact


def choose_network(found: Sequence[Found], where: str) -> Found:
    """The one network, or the one that was trained while the others followed it.

    Raises:
        ArchitectureError: there are several.
    """
    leaders = [one for one in found if not is_follower(one.view.prefix)] or list(found)
    first = leaders[0]
    if not all(_are_equal(first, one) for one in leaders[1:]):
        listed = ", ".join(f"{one.architecture.name} under {one.view.prefix!r}" for one in leaders)
        raise ArchitectureError(
            f"{where}: there are {len(leaders)} networks in it: {listed}",
            f"Choose one: --prefix {first.view.prefix}",
        )
    others = tuple((one.view.prefix, one.architecture.name) for one in found if one is not first)
    return Found(first.view, first.architecture, first.notes, others)


def _are_equal(a: Found, b: Found) -> bool:
    """Whether two networks have the same tensors: a Siamese pair that shares its weights."""
    if a.view.tensors.keys() != b.view.tensors.keys():
        return False
    return all(
        a.view.tensors[name].shape == b.view.tensors[name].shape
        and torch.equal(a.view.tensors[name], b.view.tensors[name])
        for name in a.view.tensors
    )


# ---- adjusted networks ---------------------------------------------------------------------------


def _adjusted(
    readings: Sequence[Reading], num_classes: int | None, where: str
) -> tuple[list[Found], list[ArchitectureError]]:
    """Every view that an adjusted network of the index has exactly, and the refusals of others."""
    found: list[Found] = []
    refusals: list[ArchitectureError] = []
    seen: list[Reading] = []
    asked: list[View] = []
    for reading in _resembling(readings):
        if any(_is_part(reading, other) for other in seen):
            continue
        if any(is_inside(reading.view, view) for view in asked):
            continue
        seen.append(reading)
        like = next((one for one in found if _has_shapes_of(reading.view, one.view)), None)
        if like is not None:
            found.append(Found(reading.view, like.architecture, like.notes))
            continue
        if refusals and is_follower(reading.view.prefix):
            continue
        try:
            found += _adjust(reading, num_classes)
        except ArchitectureError as error:
            refusals.append(located(error, reading.view, where))
            asked.append(reading.view)
    return found, refusals


def _is_part(reading: Reading, other: Reading) -> bool:
    """Whether a view only repeats some of the tensors that another one explains better."""
    explains_more = other.hits[0] > reading.hits[0] or other.hits[1] > reading.hits[1]
    same = other.view.prefix == reading.view.prefix
    return (explains_more or same) and is_inside(reading.view, other.view)


def _has_shapes_of(view: View, other: View) -> bool:
    """Whether two views have the same names and shapes, as MoCo's two encoders have."""
    return shapes_of(view.tensors) == shapes_of(other.tensors)


def _adjust(reading: Reading, num_classes: int | None) -> list[Found]:
    """The first candidate that can be adjusted to a view; none if no candidate can."""
    for candidate in _candidates(reading, num_classes):
        result = adjust(candidate.architecture.name, reading.view.tensors, num_classes)
        if result is not None and fits(result.architecture, reading.view, num_classes):
            return [Found(reading.view, result.architecture, result.notes)]
    return []


def fits(architecture: Architecture, view: View, num_classes: int | None) -> bool:
    """Whether an adjusted network has exactly a view's tensors, and the classes asked for."""
    if num_classes is not None:
        head = architectures.index()[architecture.name]["head"][0].rpartition(".")[0]
        if head in architecture.arguments.get("widths", {}):
            return False  # the file has another number of classes
    return not differences_in(architecture, view)


def _resembling(readings: Sequence[Reading]) -> list[Reading]:
    """The views that are a changed network's, those with most layers first."""
    return sorted(
        (reading for reading in readings if reading.resembles),
        key=lambda r: (-r.hits[1], -r.hits[0], is_follower(r.view.prefix), depth(r.view)),
    )


def _candidates(reading: Reading, num_classes: int | None) -> list[Candidate]:
    """The networks whose names a view has, those with the fewest differences first."""
    names: dict[str, None] = {}
    for found in (reading.by_shape, reading.by_layer):
        best = found[0].share if found else 0.0
        names |= dict.fromkeys([m.name for m in found if m.share >= 0.9 * best][:_CANDIDATES])
    candidates = [reading.compare(name, num_classes) for name in names]
    return sorted(candidates, key=lambda one: len(one.differences))


def located(error: ArchitectureError, view: View, where: str) -> ArchitectureError:
    """A refusal of the tensors alone, with the file and the prefix."""
    under = f", under {view.prefix!r}" if view.prefix else ""
    return ArchitectureError(f"{where}{under}: {error}", error.tip)


def _check_outside(found: Found, tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse a part of a network whose other parts have convolutions: a decoder, a neck.

    Raises:
        ArchitectureError: convolutions outside of the view would be left out.
    """
    known = tuple(prefix for prefix, _ in found.others)
    rest = [
        name
        for name in found.view.outside
        if tensors[name].ndim > 2
        and not (known and name.startswith(known))
        and not INERT.fullmatch(without_wrappers(name))
    ]
    if rest:
        raise ArchitectureError(
            f"{where}: {found.architecture.name} is only a part of this network; there are"
            f" convolutions beside it ({shortened(rest)})",
            f"To take that part alone: --prefix {found.view.prefix or '.'} -- for the whole"
            " network: --arch package.module:builder",
        )


# ---- refusals ------------------------------------------------------------------------------------


def _unknown(readings: Sequence[Reading], num_classes: int | None, where: str) -> ArchitectureError:
    """Nothing in the file is a network that is known: name the nearest."""
    own = "For a network of your own: --arch package.module:builder"
    count = max(len(reading.view.tensors) for reading in readings)
    best = max(readings, key=lambda r: (r.hits[0], r.hits[1], -depth(r.view)))
    similar = best.resembles or any(match.share > _SIMILAR for match in best.by_shape)
    if not similar:
        return ArchitectureError(
            f"{where}: nothing in its {count} tensors resembles a torchvision network that"
            " pathconvert knows",
            "Name the network: --arch package.module:builder, a function or class that builds it.",
        )
    closest, *others = _candidates(best, num_classes)
    under = f", under {best.view.prefix!r}" if best.view.prefix else ""
    names = ", ".join(one.architecture.name for one in others[:2]) or "none"
    return ArchitectureError(
        f"{where}{under}: no torchvision network has these tensors; the closest is"
        f" {closest.described}",
        f"Other close networks: {names}. {own}",
    )
