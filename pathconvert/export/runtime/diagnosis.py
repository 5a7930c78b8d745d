"""Explain why ONNX Runtime could not load a file."""

from __future__ import annotations

import re
from pathlib import Path

from pathconvert.errors import CheckpointError, first_line
from pathconvert.files import filetypes, refusals

EXPECTED = "expected an ONNX file"
ONNX = "an ONNX file"


def runtime_line(error: BaseException) -> str:
    """An error of ONNX Runtime in one line: no prefix, C++ signatures and source locations."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", first_line(error))
    return re.sub(r"/?\S*onnxruntime_src\S*:\d+ .*?\) (?=[A-Z])", "", text)[:300]


def check_is_onnx(path: Path) -> None:
    """Check by its content that a file is an ONNX file.

    Raises:
        CheckpointError: the file does not exist, or is something else, which the message names.
    """
    try:
        filetypes.recognise(path)
    except CheckpointError as error:
        what = str(error).removesuffix(".").removesuffix(f"; {refusals.EXPECTED}")
        if what == f"{path} is {ONNX}":
            return
        tip = "" if "checkpoint" in error.tip else error.tip
        raise CheckpointError(f"{what}; {EXPECTED}.", tip) from None
    raise CheckpointError(
        f"{path} is a PyTorch checkpoint; {EXPECTED}.",
        f"Export it first: pathconvert export {path}",
    )


def explain_load_failure(path: Path, error: Exception) -> CheckpointError:
    """The error to raise for a file that ONNX Runtime failed to load with ``error``.

    Raises:
        CheckpointError: the file is not an ONNX file.
    """
    check_is_onnx(path)
    text = str(error)
    if "parsing failed" in text:
        return CheckpointError(f"{path} is a truncated or damaged ONNX file.", refusals.AGAIN)
    if "IR version" in text or "Opset" in text or "opset" in text:
        return _too_new(path, text)
    operation = re.search(r"(\S+?)\(-?\d+\) is not a registered function/op", text)
    if operation:
        name = operation[1].lstrip(":")
        return CheckpointError(
            f"{path} needs the operation {name}, which ONNX Runtime does not have.",
            "Export the network with standard ONNX operations only.",
        )
    if "external data" in text.lower() or "External data" in text:
        return CheckpointError(
            f"{path} keeps its weights in another file, which is missing or damaged: "
            f"{runtime_line(error)}",
            "Put that file beside it under its original name (often .onnx.data), or export to a "
            "single file.",
        )
    return CheckpointError(
        f"{path} cannot be loaded by ONNX Runtime: {runtime_line(error)}",
        "Export the network again.",
    )


def _too_new(path: Path, text: str) -> CheckpointError:
    """The refusal of a file whose opset or format is too new for this ONNX Runtime.

    Args:
        path: the file.
        text: the error that ONNX Runtime raised.
    """
    opset = re.search(r"[Oo]pset (\d+) is under development.*?till opset (\d+)", text, re.DOTALL)
    version = re.search(r"IR version: (\d+), max supported IR version: (\d+)", text)
    if opset:
        what = f"opset {opset[1]}; this ONNX Runtime knows opsets up to {opset[2]}"
    elif version:
        what = (
            f"ONNX's file format {version[1]}; this ONNX Runtime reads formats up to {version[2]}"
        )
    else:
        what = f"an opset that this ONNX Runtime does not support: {text.splitlines()[0][-200:]}"
    return CheckpointError(
        f"{path} is written in {what}.",
        "Update onnxruntime, or export the network with a lower --opset.",
    )
