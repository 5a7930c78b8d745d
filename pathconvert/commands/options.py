"""Options that several commands share, so that none is worded twice."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Scope(StrEnum):
    block = "block"
    network = "network"


class PivotChoice(StrEnum):
    matching = "matching"
    max = "max"
    diagonal = "diagonal"


class Form(StrEnum):
    path = "path"
    path_bn = "path-bn"


class GaugeChoice(StrEnum):
    unit = "unit"
    pow2 = "pow2"


class ExportGauge(StrEnum):
    keep = "keep"
    balanced = "balanced"


class DeviceChoice(StrEnum):
    auto = "auto"
    cuda = "cuda"
    tensorrt = "tensorrt"
    cpu = "cpu"


class Settings:
    """What holds for the whole process."""

    debug = False


def _set_debug(value: bool) -> None:
    Settings.debug = Settings.debug or value


Source = Annotated[str, typer.Argument(help="A .pt, .pth or .safetensors file, or a torchvision name (resnet50).")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="The file to write: .safetensors, .pt or .pth.")]
Arch = Annotated[
    str | None,
    typer.Option(
        help="A torchvision name, with what no tensor tells: googlenet(transform_input=True); package.module:builder; "
        "timm/NAME. Else recognised."
    ),
]
InputSize = Annotated[str | None, typer.Option(help="Such as 3x32x32, where the architecture does not tell.")]
NumClasses = Annotated[int | None, typer.Option(help="Overrides the number that the tensors show.", min=1)]
Key = Annotated[str | None, typer.Option(help="The wrapper key to take, such as model_ema.")]
Images = Annotated[Path | None, typer.Option(help="Compare on the images of this folder too.")]
Device = Annotated[DeviceChoice, typer.Option(help="auto takes a GPU if one works, and says when it does not.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, all else on stderr.")]
TrustPickle = Annotated[bool, typer.Option("--trust-pickle", help="Load a pickled module, which runs its code.")]
Debug = Annotated[bool, typer.Option("--debug", callback=_set_debug, help="Show tracebacks.")]


def with_debug(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with a last option ``--debug``, which takes effect while the line is read."""

    @functools.wraps(command)
    def run(*arguments: Any, debug: bool, **options: Any) -> None:
        del debug
        command(*arguments, **options)

    hints = typing.get_type_hints(command, include_extras=True) | {"debug": Debug}
    debug = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
    signature = inspect.signature(command, eval_str=True)
    signature = signature.replace(parameters=[*signature.parameters.values(), debug])
    vars(run).update(__signature__=signature, __annotations__=hints)
    return run
