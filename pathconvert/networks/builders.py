"""Build a network without weights: torchvision's, ``package.module:builder``, and ``timm/NAME``."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from pathconvert.errors import ArchitectureError, class_and_text, first_line
from pathconvert.networks import cifar, folded, heads, resizing

# ---- torchvision's networks ----------------------------------------------------------------------


#: Arguments of ours that change a network after its builder has made it.
CHANGES = (
    "batch_norm",
    "batch_norm_kept",
    "in_channels",
    "stem",
    "avgpool",
    "biases",
    "widths",
    "head",
    "head_at",
)


def build_torchvision(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a torchvision network without weights and without initialising its parameters.

    The networks of ``networks/cifar.py`` are built in the same way. Beside the arguments of the
    builder there are those that change the network afterwards:

    ===================  =========================================================================
    ``in_channels``      the number of channels of the input
    ``stem``             another first convolution (``networks/resizing.py`` has the notation)
    ``avgpool``          the side of the feature map that the classifier of a VGG or AlexNet
                         reads; ``concat`` for fastai's pooling in other networks
    ``biases``           layer → whether it has a bias
    ``widths``           layer → the sizes of its weight (:func:`resizing.set_widths`)
    ``head``             another classifier (``networks/heads.py`` has the notation)
    ``head_at``          the module that ``head`` replaces; by default the whole classifier
    ``batch_norm``       ``folded``: convolutions with a bias in place of BatchNorms
    ``batch_norm_kept``  BatchNorms that were not folded
    ===================  =========================================================================

    ``num_classes`` is also the number of outputs of a head that is given.

    Raises:
        ArchitectureError: torchvision does not accept the arguments, or the network cannot be
            changed as they say.
    """
    options = dict(arguments)
    changes = {key: options.pop(key) for key in CHANGES if key in options}
    frozen = options.pop("frozen_batch_norm", False)
    eps = options.pop("frozen_batch_norm_eps", 1e-5)
    builder = cifar.BUILDERS.get(name)
    if builder is None:
        builder = functools.partial(torchvision.models.get_model, name, weights=None)
        accepted = inspect.signature(torchvision.models.get_model_builder(name)).parameters
        if "weights_backbone" in accepted:
            options["weights_backbone"] = None
    try:
        with _uninitialised():
            model: nn.Module = builder(**options)
            _change(model, name, changes, options.get("num_classes"))
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise ArchitectureError(  # the arguments may come from a file
            f"torchvision cannot build {name} with {dict(arguments)}: {class_and_text(error)}",
            "Name the network with --arch.",
        ) from error
    if frozen:
        _freeze_batch_norm(model.get_submodule("backbone.body"), eps)
    return model.eval()


def _change(
    model: nn.Module, name: str, changes: Mapping[str, Any], num_classes: int | None
) -> None:
    """Change a stock network in place.

    Args:
        model: the network.
        name: of the network.
        changes: the arguments in ``CHANGES``.
        num_classes: the number of outputs of a new head; None for the number that it says.

    Raises:
        ArchitectureError: a change is not written in its notation, or the network does not have
            what it changes.
    """
    if "batch_norm" in changes:
        if changes["batch_norm"] != "folded":
            raise ValueError(f"batch_norm={changes['batch_norm']!r} is not 'folded'")
        folded.fold_structure(model, changes.get("batch_norm_kept", ()))
    if "in_channels" in changes:
        resizing.set_in_channels(model, changes["in_channels"])
    if "stem" in changes:
        resizing.set_stem(model, changes["stem"])
    if "avgpool" in changes:
        resizing.set_avgpool(model, changes["avgpool"])
    resizing.set_biases(model, changes.get("biases", {}))
    resizing.set_widths(model, changes.get("widths", {}))
    if "head" in changes:
        place = head_place(model, name, changes.get("head_at"))
        features = heads.features_of(model.get_submodule(place))
        if changes.get("avgpool") == "concat":
            features *= 2
        head = heads.parse(changes["head"])
        if num_classes is not None:
            head = heads.with_outputs(head, num_classes)
        resizing.replace(model, place, heads.build(head, features))


def classifier_of(model: nn.Module) -> str | None:
    """The module that computes a classifier's classes from features; None in other networks."""
    if hasattr(model, "backbone"):  # a segmentation network's classifier reads a feature map
        return None
    for place in ("fc", "classifier", "linear"):
        if isinstance(getattr(model, place, None), nn.Linear | nn.Sequential):
            return place
    return None


def head_place(model: nn.Module, name: str, place: str | None) -> str:
    """The module that another head replaces.

    Args:
        model: the stock network.
        name: of the network.
        place: the module that the user, or a file, names; None for the whole classifier.

    Raises:
        ArchitectureError: the network has no classifier, or ``place`` is not a module of it.
    """
    root = classifier_of(model)
    if root is None:
        raise ArchitectureError(
            f"{name} has no classifier that could be replaced",
            "Leave out head=, or name a builder of your own: --arch package.module:builder",
        )
    places = [module for module, _ in model.named_modules() if f"{module}.".startswith(f"{root}.")]
    if place is not None and place not in places:
        raise ArchitectureError(
            f"{name}: head_at={place} is not a part of its classifier",
            f"Choose one of {', '.join(places)}, or leave head_at out for {root}.",
        )
    return place or root


def _freeze_batch_norm(module: nn.Module, eps: float) -> None:
    """Replace BatchNorm2d by FrozenBatchNorm2d.

    torchvision does so for a detector's pretrained backbone.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm2d(child.num_features, eps=eps))
        else:
            _freeze_batch_norm(child, eps)


@contextlib.contextmanager
def _uninitialised() -> Iterator[None]:
    """Make every function of ``torch.nn.init`` that fills a tensor return it as it is.

    Parameters keep the memory that they were given, which is not even touched, so building takes
    milliseconds. The functions and the random state are put back at the end, also after an error.
    """

    def keep(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor

    fillers = {
        name: function
        for name, function in vars(nn.init).items()
        if name.endswith("_") and not name.startswith("_") and callable(function)
    }
    with torch.random.fork_rng(devices=[]):
        try:
            for name in fillers:
                setattr(nn.init, name, keep)
            yield
        finally:
            for name, function in fillers.items():
                setattr(nn.init, name, function)


# ---- package.module:builder ----------------------------------------------------------------------


def find_builder(name: str) -> Callable[..., Any]:
    """Import the function or class that ``package.module:builder`` names.

    Raises:
        ArchitectureError: the module cannot be imported, or has no such function or class.
    """
    module_name, _, attribute = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module can raise anything, or exit
        raise ArchitectureError(
            f"--arch {name}: importing {module_name} failed: {class_and_text(error)}",
            "Install the package, or change to its folder: modules in the current folder can be"
            " imported.",
        ) from error
    builder = getattr(module, attribute, None)
    if not callable(builder):
        there = [
            n
            for n, v in vars(module).items()
            if callable(v) and getattr(v, "__module__", "") == module_name
        ]
        raise ArchitectureError(
            f"--arch {name}: {module_name} has no function or class {attribute!r}",
            (
                f"It has {', '.join((difflib.get_close_matches(attribute, there) or there)[:5])}."
                if there
                else f"Look at {getattr(module, '__file__', module_name)}."
            ),
        )
    return cast(Callable[..., Any], builder)


def build_by_path(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The network that ``package.module:builder`` returns, in evaluation mode.

    Raises:
        ArchitectureError: the builder cannot be imported, fails, or does not return a module.
    """
    builder = find_builder(name)
    try:
        with torch.random.fork_rng(devices=[]):
            model = builder(**arguments)
    except (Exception, SystemExit) as error:  # a user's code can raise anything
        raise ArchitectureError(
            f"--arch {name}: building the network failed: {class_and_text(error)}",
            "The builder is called without arguments, or with num_classes where --num-classes is"
            " given.",
        ) from error
    if not isinstance(model, nn.Module):
        raise ArchitectureError(
            f"--arch {name} returned {type(model).__name__}, expected a torch.nn.Module",
            "Name a function or class that returns the network.",
        )
    return model.eval()


# ---- timm/NAME -----------------------------------------------------------------------------------


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ArchitectureError("timm is not installed", "pip install timm") from error


def build_timm(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The network that ``timm/NAME`` names, without weights, in evaluation mode.

    Args:
        name: ``timm/NAME``.
        arguments: of timm's builder; and ``deploy``, which is true for the form that timm's
            ``reparameterize_model`` makes (RepVGG, MobileOne).

    Raises:
        ArchitectureError: timm is not installed, or has no such network.
    """
    timm, options = _timm(), dict(arguments)
    deploy = options.pop("deploy", False)
    try:
        model: nn.Module = timm.create_model(
            name.removeprefix("timm/"), pretrained=False, **options
        )
    except RuntimeError as error:
        raise ArchitectureError(
            f"{name}: {first_line(error)}", "timm.list_models() names the networks that timm has."
        ) from error
    except (TypeError, ValueError) as error:
        raise ArchitectureError(
            f"timm cannot build {name} with {dict(arguments)}: {class_and_text(error)}",
            "Check the arguments in --arch.",
        ) from error
    model.eval()
    if deploy:
        importlib.import_module("timm.utils.model").reparameterize_model(model, inplace=True)
    return model


def timm_input_size(name: str) -> tuple[int, ...] | None:
    """The input size of ``timm/NAME`` without the batch dimension.

    None if timm does not know it.
    """
    config = getattr(build_timm(name, {}), "default_cfg", None) or {}
    size = config.get("input_size")
    return tuple(size) if size else None
