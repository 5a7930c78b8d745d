"""Networks that are not torchvision's: ``package.module:builder`` and ``timm/NAME``."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn

from pathconvert.errors import ArchitectureError


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def find_builder(name: str) -> Callable[..., Any]:
    """The function or class that ``package.module:builder`` names.

    Raises:
        ArchitectureError: it cannot be imported, or is not there.
    """
    module_name, _, attribute = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module can raise anything; scripts exit
        raise ArchitectureError(
            f"--arch {name}: importing {module_name} failed: {one_line(error)}",
            "The current folder is on the path; install the package, or change to its folder.",
        ) from error
    builder = getattr(module, attribute, None)
    if not callable(builder):
        there = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module_name]
        raise ArchitectureError(
            f"--arch {name}: {module_name} has no function or class {attribute!r}",
            f"It has {', '.join((difflib.get_close_matches(attribute, there) or there)[:5])}."
            if there
            else f"Look at {getattr(module, '__file__', module_name)}.",
        )
    return cast(Callable[..., Any], builder)


def build_by_path(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The network that ``package.module:builder`` returns, in evaluation mode.

    Raises:
        ArchitectureError: it cannot be built, or is no module.
    """
    builder = find_builder(name)
    try:
        with torch.random.fork_rng(devices=[]):
            model = builder(**arguments)
    except (Exception, SystemExit) as error:  # a user's code can raise anything
        raise ArchitectureError(
            f"--arch {name}: building the network failed: {one_line(error)}",
            "The builder is called without arguments, or with num_classes where --num-classes is given.",
        ) from error
    if not isinstance(model, nn.Module):
        raise ArchitectureError(
            f"--arch {name} returned {type(model).__name__}, expected a torch.nn.Module",
            "Name a function or class that returns the network.",
        )
    return model.eval()


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ArchitectureError("timm is not installed", "pip install timm") from error


def build_timm(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The network that ``timm/NAME`` names, without weights, in evaluation mode.

    Raises:
        ArchitectureError: timm is not installed, or has no such network.
    """
    timm = _timm()
    try:
        model: nn.Module = timm.create_model(name.removeprefix("timm/"), pretrained=False, **arguments)
    except RuntimeError as error:
        raise ArchitectureError(f"{name}: {error}", "timm.list_models() names the networks that timm has.") from error
    return model.eval()


def timm_input_size(name: str) -> tuple[int, ...] | None:
    """What ``timm/NAME`` takes, without the batch dimension; None where it does not tell."""
    config = getattr(build_timm(name, {}), "default_cfg", None) or {}
    size = config.get("input_size")
    return tuple(size) if size else None
