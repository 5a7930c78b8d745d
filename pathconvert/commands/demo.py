"""The demo: every command in turn, on a network that is trained within seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pathconvert.commands.console import note
from pathconvert.errors import OutputError


def demo(
    context: typer.Context,
    output_dir: Annotated[Path, typer.Option(help="Folder for the demo's files.")] = Path("demo"),
) -> None:
    """Train a small ResNet on digits, then convert, fine-tune, export and time it."""
    from pathconvert.commands.digits import save_digits, save_turned_digits, train_digits
    from pathconvert.files.writing import prepare_output

    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"The folder {output_dir} cannot be made: {error.strerror}.",
            "Give another --output-dir.",
        ) from error
    source = prepare_output(output_dir / "digits_resnet18.pt", force=True, source=None)
    accuracy = train_digits(source, note)
    note(
        f"trained a torchvision resnet18 on digits: {accuracy:.1%} correct on held-out images,"
        f" saved as {source}"
    )
    digits = output_dir / "digits"
    turned = save_turned_digits(output_dir / "turned")
    for title, arguments in _lines(output_dir, source, digits, save_digits(digits, 64), turned):
        note(f"\n{title}: pathconvert {' '.join(arguments)}")
        context.find_root().command.main(arguments, standalone_mode=False)


def _lines(
    folder: Path, source: Path, digits: Path, images: list[Path], turned: Path
) -> list[tuple[str, list[str]]]:
    """The title of each command, and its arguments."""
    onnx, run = str(folder / "digits_resnet18.onnx"), str(folder / "run")
    path, restored, path_bn = (
        str(folder / f"digits_resnet18.{kind}")
        for kind in ("path.safetensors", "restored.pt", "path-bn.safetensors")
    )
    return [
        ("convert", ["reparam", str(source), "--input-size", "3x32x32", "--force", "-o", path]),
        (
            "verify",
            ["verify", str(source), path, "--input-size", "3x32x32", "--images", str(digits)],
        ),
        ("restore", ["restore", path, "--force", "-o", restored]),
        (
            "Path-BN",
            [
                "reparam",
                path,
                "--form",
                "path-bn",
                "--calibrate",
                str(digits),
                "--force",
                "-o",
                path_bn,
            ],
        ),
        ("digits turned by 90°, before", ["evaluate", path_bn, "--data", str(turned)]),
        (
            "fine-tune in path space",
            [
                "finetune",
                path_bn,
                "--data",
                str(turned),
                "--epochs",
                "3",
                "--output-dir",
                run,
                "--force",
            ],
        ),
        ("digits turned by 90°, after", ["evaluate", run, "--data", str(turned)]),
        ("export", ["export", path_bn, "--images", str(digits), "--force", "-o", onnx]),
        ("predict", ["predict", onnx, *map(str, images[:3]), "--top", "1"]),
        ("latency", ["bench", onnx, str(source), "--input-size", "3x32x32", "--batch", "1,8"]),
    ]
