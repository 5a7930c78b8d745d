"""Which of a file's tensors are a network's, and what torchvision calls them.

Terms:
    wrapper: a module that only holds another one; its attribute's name (``module``, ``_orig_mod``)
        stands among the segments of every name inside it.
    prefix: the text before a network's names (``encoder_q.``); what lies outside of it is ignored.
    inert: what a training run keeps among the weights and the function does not read: counters
        of operations, loss functions, metrics, observers, MoCo's queue.
    view: one way to read the file: a prefix, perhaps another library's names, and the tensors.

A view never leaves out what could be a layer: within its prefix only inert names are ignored, and
``INERT`` lists all of them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pathconvert.files.refusals import one_line
from pathconvert.networks.names_forms import Computed, compute
from pathconvert.networks.names_index import COUNTER, modern_names
from pathconvert.networks.names_libraries import NAMINGS, Naming

#: Attributes under which wrappers hold the module that they wrap.
WRAPPERS = frozenset(
    {
        "module",  # DataParallel, DistributedDataParallel, AveragedModel, DeepSpeed
        "_orig_mod",  # torch.compile
        "_fsdp_wrapped_module",
        "_fpw_module",  # fairscale
        "_checkpoint_wrapped_module",  # activation checkpointing
        "_forward_module",  # Lightning Fabric
    }
)

_NOT_OF_A_LAYER = r"(?!(?:.*\.)?(?:weight|bias|running_mean|running_var)$).*"

#: Names that are ignored inside a network's prefix; each is listed in a note.
INERT = re.compile(
    r"(?:.*\.)?(?:total_ops|total_params)"  # thop
    r"|(?:.*\.)?_extra_state"
    r"|(?:.*\.)?n_averaged"  # AveragedModel
    r"|(?:.*\.)?(?:activation_post_process|weight_fake_quant|\w*fake_quant\w*|\w*observer\w*)(?:\..*)?"
    r"|(?:criterion|criteria|loss|losses|loss_\w+|\w+_loss|\w*_criterion)(?:\..*)?"
    r"|(?:metric|metrics|\w+_metrics?|(?:\w+_)?(?:acc|accuracy|auroc|f1|f1_score)|\w*confusion\w*)"
    rf"(?:\.{_NOT_OF_A_LAYER})?"
    r"|(?:queue\w*|\w+_queue(?:_ptr)?)"  # MoCo
    rf"|(?:normalizer|normalize|normalization|preprocess|input_norm)\.{_NOT_OF_A_LAYER}"
    r"|(?:best\w*|epoch\w*|step|global_step|iteration\w*|num_updates|decay)"
)

QUANTIZATION = re.compile(r".*(?:fake_quant|observer|activation_post_process)")
NORMALIZER = re.compile(r"(?:.*\.)?(?:normalizer|normalize|input_norm)\..*")

#: The segment of a prefix that names the slowly moving copy of a network that was trained.
FOLLOWERS = re.compile(
    r"encoder_k|\w*momentum\w*|target\w*|\w*teacher\w*|\w*ema|ema_\w+|\w*_k|averaged\w*|swa_\w+"
)


@dataclass(frozen=True, eq=False)
class View:
    """One way to read a set of tensors as a network's.

    Attributes:
        tensors: the network's tensors under the names that torchvision uses, in the file's order;
            counters are scalars of type int64.
        prefix: what was dropped from the names' beginning; empty if nothing was.
        renamed: what was renamed or computed, for a note; None if nothing was.
        original: new name → name in the file, for the tensors that were only renamed.
        stored: name in the file → tensor as the file has it, for the counters that were cast.
        parts: new name → names in the file, for the weights that were computed.
        outside: the names in the file that do not have the prefix.
        inert: the ignored names inside of the prefix.
        naming: which library's names these are; None for torchvision's own.
    """

    tensors: dict[str, Tensor] = field(repr=False)
    prefix: str = ""
    renamed: str | None = None
    original: dict[str, str] = field(default_factory=dict, repr=False)
    stored: dict[str, Tensor] = field(default_factory=dict, repr=False)
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    outside: tuple[str, ...] = ()
    inert: tuple[str, ...] = ()
    naming: Naming | None = None

    @property
    def ignored(self) -> tuple[str, ...]:
        """The names in the file that are left out."""
        return (*self.outside, *self.inert)


@dataclass(frozen=True, eq=False)
class _Source:
    """The file's tensors once wrappers are dropped and weights computed.

    ``names``: name without wrappers → the name in the file; for a computed weight its first part's.
    """

    tensors: dict[str, Tensor]
    names: dict[str, str]
    computed: Computed
    wrapped: bool


def views(tensors: Mapping[str, Tensor], prefix: str | None = None) -> list[View]:
    """Every way to read a set of tensors as a network's, the outermost prefix first.

    One view has the names that the file has, for networks that really hold a ``module``.

    Args:
        tensors: a state dict; it is not changed.
        prefix: take only views with this prefix (``encoder_q.``, also without the dot, and with or
            without wrappers); None for all.
    """
    source = _source(tensors)
    found: list[View] = []
    for start, names in _groups(source).items():
        if prefix is not None and not _is_prefix(prefix, start, source, names):
            continue
        found += _views_below(start, names, source)
    plain = [] if prefix is not None else [_plain(tensors)]
    if found and found[0].tensors.keys() == tensors.keys():
        return found
    return [*found, *plain] if source.wrapped else [*plain, *found]


def _plain(tensors: Mapping[str, Tensor]) -> View:
    """The tensors under the names that the file has."""
    counted = {name: _as_counter(name, tensor) for name, tensor in tensors.items()}
    return View(
        counted,
        original={name: name for name in tensors},
        stored={name: tensor for name, tensor in tensors.items() if counted[name] is not tensor},
    )


def without_wrappers(name: str) -> str:
    """``model.module.layer1._orig_mod.weight`` → ``model.layer1.weight``."""
    return ".".join(segment for segment in name.split(".") if segment not in WRAPPERS)


def _source(tensors: Mapping[str, Tensor]) -> _Source:
    names = {without_wrappers(name): name for name in tensors}
    if len(names) < len(tensors) or "" in names:  # two names would become one: keep them all
        names = {name: name for name in tensors}
    computed = compute({short: tensors[name] for short, name in names.items()})
    first = {weight: names[own[0]] for weight, own in computed.parts.items()}
    kept = {name: first.get(name) or names[name] for name in computed.tensors}
    return _Source(
        computed.tensors, kept, computed, any(short != name for short, name in names.items())
    )


def _groups(source: _Source) -> dict[str, list[str]]:
    """Every dotted prefix → the names that have it; the shortest prefixes first."""
    groups: dict[str, list[str]] = {"": list(source.tensors)}
    for name in source.tensors:
        place = name.find(".")
        while place >= 0:
            groups.setdefault(name[: place + 1], []).append(name)
            place = name.find(".", place + 1)
    return dict(sorted(groups.items(), key=lambda pair: pair[0].count(".")))


def _is_prefix(wanted: str, start: str, source: _Source, names: Collection[str]) -> bool:
    bare = "" if not wanted.strip(".") else f"{without_wrappers(wanted.strip('.'))}."
    if bare == ".":
        bare = ""
    shown = _shown_prefix(start, names, source)
    return start == bare or shown == f"{wanted.strip('.')}."


def _shown_prefix(start: str, names: Collection[str], source: _Source) -> str:
    """The prefix as the file writes it, with wrappers; without them if names differ in that."""
    ends = {
        source.names[name].removesuffix(name.removeprefix(start))
        for name in names
        if name not in source.computed.parts and source.names[name].endswith(name[len(start) :])
    }
    return ends.pop() if len(ends) == 1 else start


def _views_below(start: str, names: list[str], source: _Source) -> Iterator[View]:
    short = {name.removeprefix(start): name for name in names}
    for naming in (None, *NAMINGS):
        if naming is None:
            renamed = {name: name for name in short}
        elif naming.fits(short):
            renamed = {name: naming.rename(name) or name for name in short}
        else:
            continue
        chosen = {new: short[name] for name, new in renamed.items()}
        if len(chosen) == len(renamed):
            yield _view(start, chosen, names, source, naming)


def _view(
    start: str,
    chosen: Mapping[str, str],
    names: Collection[str],
    source: _Source,
    naming: Naming | None,
) -> View:
    """A view of the tensors ``chosen``: new name → name without wrappers."""
    inert = {new for new in chosen if INERT.fullmatch(new)}
    kept = {new: old for new, old in chosen.items() if new not in inert}
    tensors = {new: source.tensors[old] for new, old in kept.items()}
    modern = list(modern_names(tensors)) if _may_be_old(tensors) else list(tensors)
    view_tensors, original, parts = {}, {}, {}
    stored: dict[str, Tensor] = {}
    for new, (name, tensor) in zip(modern, tensors.items(), strict=True):
        in_file = source.names[kept[name]]
        if kept[name] in source.computed.parts:
            parts[new] = source.computed.parts[kept[name]]
        else:
            original[new] = in_file
        counter = _as_counter(new, tensor)
        if counter is not tensor:
            stored[in_file] = tensor
        view_tensors[new] = counter
    taken = {kept[name] for name in kept} | {chosen[new] for new in inert}
    return View(
        view_tensors,
        _shown_prefix(start, names, source) if start or source.wrapped else "",
        _sentence(naming, source.computed.sentence if parts else None),
        original,
        stored,
        parts,
        tuple(source.names[name] for name in source.tensors if name not in taken),
        tuple(source.names[chosen[new]] for new in chosen if new in inert),
        naming,
    )


def _may_be_old(tensors: Mapping[str, Tensor]) -> bool:
    """Whether there are names that ``modern_names`` might know by another name."""
    return any("denselayer" in name or "_blocks." in name or "head" in name for name in tensors)


def _as_counter(name: str, tensor: Tensor) -> Tensor:
    """A counter as BatchNorm has it: a scalar of type int64."""
    if not name.endswith(COUNTER) or tensor.numel() != 1:
        return tensor
    if tensor.ndim == 0 and tensor.dtype is torch.int64:
        return tensor
    return tensor.reshape(()).to(torch.int64)


def _sentence(naming: Naming | None, computed: str | None) -> str | None:
    parts = ([naming.what] if naming else []) + ([computed] if computed else [])
    return "; ".join(parts) or None


def shortened(names: Collection[str], limit: int = 4) -> str:
    """Names for a note: what lies under one segment is one entry, and the rest is counted."""
    common = _common_prefix(names)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name[len(common) :].partition(".")[0], []).append(name)
    texts = [own[0] if len(own) == 1 else f"{common}{start}.*" for start, own in groups.items()]
    more = len(texts) - limit
    return one_line(", ".join(texts[:limit]), 1000) + (f" and {more} more" if more > 0 else "")


def _common_prefix(names: Collection[str]) -> str:
    """The longest dotted prefix that all names have; empty for a single name."""
    first, *others = (name.split(".")[:-1] for name in names)
    common = len(first) if others else 0
    for segments in others:
        while segments[:common] != first[:common]:
            common -= 1
    return "".join(f"{segment}." for segment in first[:common])


@functools.cache
def is_follower(prefix: str) -> bool:
    """Whether a prefix names the copy of a trained network: MoCo's ``encoder_k``, a teacher."""
    return any(FOLLOWERS.fullmatch(segment) for segment in prefix.strip(".").split("."))
