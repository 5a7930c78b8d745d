"""What is said about a file: which of its tensors are the network, and which are left out."""

from __future__ import annotations

from collections.abc import Sequence

from pathconvert.files.checkpoint import Checkpoint
from pathconvert.networks.adjusting import title
from pathconvert.networks.names import (
    NORMALIZER,
    QUANTIZATION,
    WRAPPERS,
    View,
    shortened,
    without_wrappers,
)
from pathconvert.networks.recognition import Found


def notes_on(found: Found, checkpoint: Checkpoint, key: str | None) -> list[str]:
    """Notes on how the tensors of a file became a network's; none for a plain state dict.

    Args:
        found: the network.
        checkpoint: the file.
        key: the key that the user asked for; None if the file's own order decided.
    """
    view, stripped = found.view, checkpoint.prefix
    notes = [_key(checkpoint, checkpoint.others if key is None else ()), _taken(found, stripped)]
    beside = tuple(prefix for prefix, _ in found.others)
    outside = [name for name in view.outside if not (beside and name.startswith(beside))]
    left = [*outside, *view.inert, *checkpoint.skipped]
    if left:
        notes.append(f"left out: {shortened(left)}{_consequence(left)}")
    changes = [view.renamed] if view.renamed else []
    if view.naming is None and _has_inner_wrappers(view):
        changes.append("names of wrappers inside it removed")
    changes += found.notes
    if changes:
        notes.append(f"read as {title(found.architecture)}: {'; '.join(changes)}")
    return [note for note in notes if note]


def _key(checkpoint: Checkpoint, others: Sequence[str]) -> str:
    """Which of several state dicts in a file was taken."""
    if checkpoint.key is None and not others:
        return ""
    where = f"under {checkpoint.key!r}" if checkpoint.key else "at the top"
    text = f"taking the weights {where}"
    if others:
        shown = ", ".join(repr(other) for other in others[:3])
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        text += f", not those under {shown}{more} (--key {others[0]})"
    return text


def _taken(found: Found, stripped: str) -> str:
    prefix = stripped + found.view.prefix
    if not prefix:
        return ""
    if not found.view.outside:
        return f"prefix {prefix!r} removed from every name"
    others = ", ".join(
        f"the {name} under {stripped + other!r} (--prefix {other})" for other, name in found.others
    )
    beside = f", not {others}" if others else ""
    return f"taking the {found.architecture.name} under {prefix!r}{beside}"


def _consequence(left: Sequence[str]) -> str:
    """What leaving some names out means for the network's outputs; empty if nothing."""
    if any(NORMALIZER.fullmatch(name) for name in left):
        return "; the network now takes inputs that are already normalised"
    if any(QUANTIZATION.match(name) for name in left):
        return "; the network now computes without the simulated quantization"
    return ""


def _has_inner_wrappers(view: View) -> bool:
    """Whether wrappers stood inside the network, and not only around it."""
    prefix = len([one for one in view.prefix.split(".") if one in WRAPPERS])
    return any(
        len(name.split(".")) - len(without_wrappers(name).split(".")) > prefix
        for name in view.original.values()
    )
