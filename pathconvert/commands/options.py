"""The options that several commands share, so that each is worded once."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pathconvert import choices


class Process:
    """What holds for the whole process."""

    debug = False


def _set_debug(value: bool) -> None:
    Process.debug = Process.debug or value


Source = Annotated[
    str,
    typer.Argument(
        help="A .pt, .pth or .safetensors file, or a torchvision name such as resnet50."
    ),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="File to write (.safetensors, .pt or .pth).")
]
Arch = Annotated[
    str | None,
    typer.Option(
        help=(
            "Architecture: a torchvision name, MODULE:FUNCTION or timm/NAME, plus arguments that"
            " the weights do not reveal, as in NAME(KEY=VALUE) (default: recognised from the"
            " weights)."
        )
    ),
]
InputSize = Annotated[
    str | None,
    typer.Option(help="Size of one input, such as 3x32x32, if the architecture does not say."),
]
NumClasses = Annotated[
    int | None, typer.Option(help="Number of classes (default: read from the weights).", min=1)
]
Key = Annotated[
    str | None,
    typer.Option(help="Key of the checkpoint that holds the weights, such as model_ema."),
]
Images = Annotated[
    Path | None, typer.Option(help="Folder of images on which the networks are compared as well.")
]
Device = Annotated[
    choices.Device,
    typer.Option(help="Device to run on. auto uses a GPU if one works, and says if it does not."),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an existing output file.")]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object on stdout and everything else on stderr."),
]
TrustPickle = Annotated[
    bool,
    typer.Option(
        "--trust-pickle", help="Load a pickled module. This runs code that the file contains."
    ),
]
Debug = Annotated[bool, typer.Option("--debug", callback=_set_debug, help="Show tracebacks.")]


def with_debug(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with ``--debug`` as its last option.

    The option takes effect while the command line is parsed.
    """

    @functools.wraps(command)
    def run(*arguments: Any, debug: bool, **options: Any) -> None:
        del debug
        command(*arguments, **options)

    hints = typing.get_type_hints(command, include_extras=True) | {"debug": Debug}
    debug = inspect.Parameter(
        "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug
    )
    signature = inspect.signature(command, eval_str=True)
    signature = signature.replace(parameters=[*signature.parameters.values(), debug])
    vars(run).update(__signature__=signature, __annotations__=hints)
    return run
