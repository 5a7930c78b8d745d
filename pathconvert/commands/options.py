"""The options that several commands share, so that each is worded once."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from pathconvert import choices
from pathconvert.networks.image_options import ImageOptions


class Process:
    """What holds for the whole process."""

    debug = False


def _set_debug(value: bool) -> None:
    Process.debug = Process.debug or value


Source = Annotated[
    str,
    typer.Argument(
        help="A checkpoint, a folder with one in it, or a torchvision name such as resnet50."
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
    typer.Option(help="Key of the weights in the file, such as model_ema, if it has several."),
]
Mean = Annotated[
    str | None,
    typer.Option(
        help="Mean of each channel, for pixels in [0, 1], such as 0.5 or 0.485,0.456,0.406"
        " (default: as the weights were trained)."
    ),
]
Std = Annotated[
    str | None,
    typer.Option(
        help="Standard deviation of each channel, given like --mean"
        " (default: as the weights were trained)."
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        help="Size to which images are cropped, such as 224 or 224x160"
        " (default: the network's input size)."
    ),
]
Resize = Annotated[
    str | None,
    typer.Option(
        help="Length of an image's shorter side before the crop, such as 256, or height and width,"
        " such as 256x320 (default: as the weights were trained)."
    ),
]
Interpolation = Annotated[
    choices.Interpolation | None,
    typer.Option(
        metavar="WORD",
        help=f"How images are resized: {', '.join(get_args(choices.Interpolation))}"
        " (default: as the weights were trained).",
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option(
        help="File with the names of the classes, one per line or as JSON, in the order of the"
        " outputs."
    ),
]
Prefix = Annotated[
    str | None,
    typer.Option(
        help="What the names of the network's tensors begin with in the file, such as backbone,"
        " if it holds several networks."
    ),
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
        "--trust-pickle",
        help="Take a pickled module itself, not only its tensors. This runs code that the file"
        " contains.",
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


#: The parameter of a command that :func:`with_image_options` replaces by options.
GIVEN = "given"
_IMAGE_OPTIONS: dict[str, Any] = {
    "mean": Mean,
    "std": Std,
    "size": Size,
    "resize": Resize,
    "interpolation": Interpolation,
    "labels": Labels,
}


def with_image_options(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with ``--mean``, ``--std``, … in place of its parameter ``given``.

    The command is called with the :class:`ImageOptions` that they make.
    """

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        texts = {name: options.pop(name, None) for name in _IMAGE_OPTIONS}
        command(*arguments, **options, **{GIVEN: ImageOptions.parse(**texts)})

    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        parameters += _image_parameters(parameter.kind) if parameter.name == GIVEN else [parameter]
    hints = {parameter.name: parameter.annotation for parameter in parameters}
    vars(run).update(__signature__=signature.replace(parameters=parameters), __annotations__=hints)
    return run


def _image_parameters(kind: Any) -> list[inspect.Parameter]:
    return [
        inspect.Parameter(name, kind, default=None, annotation=annotation)
        for name, annotation in _IMAGE_OPTIONS.items()
    ]
