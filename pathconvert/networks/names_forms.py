"""Weights that a file stores in parts: pruned, weight-normalised, spectrally normalised.

Each form is recognised by the names that torch gives to the parts, and the weight that the network
multiplies with in evaluation mode is computed from them in float64 and rounded once to the dtype
of the parts. ``FORMS`` lists all of them.

Symbols: v is the direction of a weight, g its norm; u, v of a spectral norm are the singular
vectors that training left behind, and σ = uᵀ W v with W as a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Parts = tuple[Tensor, ...]


@dataclass(frozen=True)
class Form:
    """One way in which torch stores a weight in parts.

    Attributes:
        what: the form's name, for notes.
        ends: the ends of the parts' names, ``{}`` standing for the weight's own name (``weight``,
            ``bias``); the first one is what the form is recognised by.
        compute: the weight from the parts in float64; None if they are not such a form's.
    """

    what: str
    ends: tuple[str, ...]
    compute: Callable[..., Tensor | None]


@dataclass(frozen=True)
class Computed:
    """A state dict in which every weight is one tensor.

    Attributes:
        tensors: the state dict, in the file's order.
        parts: the name of a weight that was computed → the names of its parts in the file.
        sentence: what was computed, for a note; None if nothing was.
    """

    tensors: dict[str, Tensor]
    parts: dict[str, tuple[str, ...]]
    sentence: str | None


def _pruned(weight: Tensor, mask: Tensor) -> Tensor | None:
    return weight * mask if weight.shape == mask.shape else None


def _weight_norm(g: Tensor, v: Tensor) -> Tensor | None:
    """W = g · v / ‖v‖; the norm runs over the dimensions in which g has one element."""
    if g.ndim not in (0, v.ndim):
        return None
    over = [d for d in range(v.ndim) if g.ndim == 0 or g.shape[d] == 1]
    if any(g.ndim and g.shape[d] != v.shape[d] for d in range(v.ndim) if d not in over):
        return None
    weight: Tensor = g * v / torch.linalg.vector_norm(v, dim=over, keepdim=True)
    return weight


def _spectral_norm(weight: Tensor, u: Tensor, v: Tensor) -> Tensor | None:
    """W / σ, with W unfolded along the dimension whose size u has.

    Where two fit, the second is taken only if W v has the direction of u in it, as training makes
    it, and has it less in the first.
    """
    if u.ndim != 1 or v.ndim != 1 or weight.numel() != len(u) * len(v):
        return None
    found: list[tuple[float, Tensor]] = []
    for dim in range(min(2, weight.ndim)):  # 1 for transposed convolutions
        if weight.shape[dim] == len(u):
            product = weight.movedim(dim, 0).reshape(len(u), len(v)) @ v
            found.append((float(torch.dot(u, product) / product.norm()), torch.dot(u, product)))
    if not found:
        return None
    _, sigma = found[-1] if found[-1][0] > max(found[0][0], 0.5) else found[0]
    return weight / sigma


FORMS = (
    Form("masks of pruned weights multiplied in", ("{}_orig", "{}_mask"), _pruned),
    Form("weight norm computed", ("{}_g", "{}_v"), _weight_norm),
    Form(
        "weight norm computed",
        ("parametrizations.{}.original0", "parametrizations.{}.original1"),
        _weight_norm,
    ),
    Form("spectral norm computed", ("{}_orig", "{}_u", "{}_v"), _spectral_norm),
    Form(
        "spectral norm computed",
        (
            "parametrizations.{}.original",
            "parametrizations.{}.0._u",
            "parametrizations.{}.0._v",
        ),
        _spectral_norm,
    ),
)


def compute(tensors: Mapping[str, Tensor]) -> Computed:
    """Replace every weight that is stored in parts by the weight itself.

    Names whose parts are incomplete, or do not fit together, stay as they are.

    Args:
        tensors: a state dict; it is not changed.
    """
    replaced: dict[str, Tensor] = {}  # the name of a part → the weight that takes its place
    names: dict[str, str] = {}
    parts: dict[str, tuple[str, ...]] = {}
    said: dict[str, None] = {}
    for name in tensors:
        for form in FORMS:
            found = _match(name, form, tensors)
            if found is None:
                continue
            weight, own = found
            values = form.compute(*(tensors[part].double() for part in own))
            if values is None:
                continue
            replaced[name] = values.to(tensors[name].dtype)
            names[name], parts[weight] = weight, own
            said[form.what] = None
            break
    if not parts:
        return Computed(dict(tensors), {}, None)
    used = {part for own in parts.values() for part in own}
    complete = {
        names.get(name, name): replaced.get(name, tensor)
        for name, tensor in tensors.items()
        if name in names or name not in used
    }
    return Computed(complete, parts, " and ".join(said))


def _match(
    name: str, form: Form, tensors: Mapping[str, Tensor]
) -> tuple[str, tuple[str, ...]] | None:
    """The weight whose first part ``name`` is, and all its parts; None if it is not one."""
    before, after = form.ends[0].split("{}")
    if not name.endswith(after) or before not in name:
        return None
    start, _, leaf = name.removesuffix(after).rpartition(".")
    if before:
        start, _, here = start.rpartition(".")
        if f"{here}." != before:
            return None
    path = f"{start}." if start else ""
    own = tuple(path + end.format(leaf) for end in form.ends)
    if not leaf or f"{path}{leaf}" in tensors or not all(part in tensors for part in own):
        return None
    if not all(tensors[part].is_floating_point() for part in own[:1]):
        return None
    return f"{path}{leaf}", own
