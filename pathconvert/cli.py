"""The command line: all commands of ``commands/``.

This is also the one place where errors become a line and a tip. Only this module and ``commands/``
import typer and rich.
"""

from __future__ import annotations

import io
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer

from pathconvert.commands import convert, deploy
from pathconvert.commands.console import note
from pathconvert.commands.demo import demo
from pathconvert.commands.evaluate import evaluate
from pathconvert.commands.finetune import finetune
from pathconvert.commands.options import Process, with_debug
from pathconvert.errors import PathconvertError
from pathconvert.version import __version__

INTERRUPTED = 130

app = typer.Typer(
    help="Move pretrained ReLU networks into path space and back, exactly.",
    epilog="Start with: pathconvert demo",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

#: The commands in the order of the help, each with the examples that end its own help.
COMMANDS: dict[Callable[..., None], str] = {
    convert.reparam: (
        "Examples:\n\n"
        "pathconvert reparam resnet50.pt --pivot max\n\n"
        "pathconvert reparam resnet50.pt --form path-bn --calibrate photos/"
    ),
    convert.restore: "Example: pathconvert restore resnet50.path.safetensors -o resnet50.pt",
    deploy.export: (
        "Examples:\n\n"
        "pathconvert export resnet50.pt -o resnet50.onnx\n\n"
        "pathconvert export resnet50.pt --precision fp16 --gauge balanced"
    ),
    convert.verify: "Example: pathconvert verify resnet50.pt resnet50.path.safetensors",
    convert.inspect: "Example: pathconvert inspect resnet50.pt",
    deploy.bench: "Example: pathconvert bench squeezenet.onnx squeezenet1_1.pth --batch 1,8",
    deploy.predict: "Example: pathconvert predict squeezenet.onnx photos/ --top 3",
    finetune: (
        "Examples:\n\n"
        "pathconvert finetune resnet50.path.safetensors --data flowers/\n\n"
        "pathconvert finetune --resume runs/resnet50-20261121-120000"
    ),
    evaluate: "Example: pathconvert evaluate resnet50.path.safetensors --data flowers/",
    convert.archs: "Example: pathconvert archs --json",
    demo: "Example: pathconvert demo --output-dir demo",
}
for command, example in COMMANDS.items():
    app.command(epilog=example)(with_debug(command))


def _version(value: bool) -> None:
    if value:
        typer.echo(f"pathconvert {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    del version


# ---- the error boundary --------------------------------------------------------------------------


def main() -> None:
    """Run the command line.

    Typed errors become a line and a tip, others a line that asks for a report.
    """
    for stream in (sys.stdout, sys.stderr):
        # a terminal that cannot show → or × shows ? instead
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(run(sys.argv[1:]))


def _terminated(number: int, _: object) -> None:
    """Exit on SIGTERM so that temporary files are removed."""
    sys.exit(128 + number)


def run(arguments: list[str]) -> int:
    """Run the command that ``arguments`` name.

    Returns:
        The exit code: 0 if the command succeeded, 1 if a check failed, 2 for wrong input or usage,
        130 if interrupted.
    """
    Process.debug = False
    try:
        app(arguments, prog_name="pathconvert")
    except SystemExit as done:
        if done.code == INTERRUPTED:  # typer turns Ctrl-C into this exit code
            note("interrupted")
        return done.code if isinstance(done.code, int) else 0
    except PathconvertError as error:
        return _explain(error, error.tip, error.exit_code)
    except KeyboardInterrupt:
        note("interrupted")
        return INTERRUPTED
    except Exception as error:
        error_line = (str(error).strip().splitlines() or [""])[0]
        unexpected = f"unexpected {type(error).__name__}: {error_line}"
        return _explain(unexpected, "run again with --debug and report what it prints", 2)
    return 0


def _explain(error: object, tip: str, code: int) -> int:
    """Print the error as one line and its tip as another.

    If --debug was given, the traceback comes first.
    """
    if Process.debug:
        traceback.print_exc()
    note(f"error: {' '.join(str(error).splitlines())}")
    if tip:
        note(f"tip: {' '.join(tip.splitlines())}")
    return code


if __name__ == "__main__":
    main()
