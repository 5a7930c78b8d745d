"""torch's exporter and ONNX Runtime's float16 converter, without their side effects.

Left alone, they would write the weights to a second file, choose another opset than the one asked
for, print to stdout, store paths of this machine in the metadata of nodes, fix a dynamic axis with
only a log line, and place casts behind the nodes that read them. ``cleaning.py`` removes the paths
and puts the nodes in order.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from pathconvert.errors import EquivalenceError, PathconvertError, first_line
from pathconvert.export.graph.cleaning import clean, in_order


def to_onnx(
    exported: nn.Module, x: Tensor, axes: dict[int, str], opset: int, output_names: Sequence[str]
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Export a network to a graph without the exporter's metadata.

    Args:
        exported: a network that is wrapped as in ``wrapping.py``.
        x: an input, [N, …].
        axes: dimension of the input → the name of its dynamic axis.
        opset: the opset to ask for.
        output_names: names of the graph's outputs.

    Returns:
        The graph; and result of a node → path of the module that it came from.

    Raises:
        PathconvertError: the exporter fails.
    """
    if 0 in axes and len(x) == 1:
        x = torch.cat([x, x])  # the exporter may take a size of 1 for a constant
    try:
        with _quiet():
            program = torch.onnx.export(
                exported,
                (x,),
                dynamo=True,
                optimize=True,
                external_data=False,
                verbose=False,
                opset_version=opset,
                dynamic_shapes=(axes,) if axes else None,
                input_names=["input"],
                output_names=list(output_names),
            )
    except Exception as error:  # the exporter, dynamo and sympy have exception classes of their own
        why = " ".join(first_line(error).split())
        tip = "Run it again with --debug, and report the output."
        raise PathconvertError(
            f"{type(exported.network).__name__} cannot be exported: {why}",
            "Leave --dynamic-size out." if len(axes) > 1 else tip,
        ) from error
    assert program is not None
    layers = _layers(program.model)
    clean(program.model)
    return program.model_proto, layers


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discard the exporter's output, log lines and warnings."""
    names = ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _layers(model: ir.Model) -> dict[str, str]:
    """Result of a node → path of the module that it came from, as the exporter's metadata says."""
    layers = {}
    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]")
        with contextlib.suppress(ValueError):
            path = json.loads(scopes.replace("'", '"'))[-2:-1]
            layers.update({output.name or "": path[0] for output in node.outputs if path})
    return layers


def to_half(proto: onnx.ModelProto, io_dtype: str) -> onnx.ModelProto:
    """Convert weights and operators to float16.

    Weights whose magnitude is above 65504 or below 6e-8 are clipped; the proof shows whether that
    matters.

    Args:
        proto: a graph in float32; changed.
        io_dtype: the type of inputs and outputs: ``fp32`` or ``fp16``.

    Returns:
        A graph whose nodes stand in order.

    Raises:
        EquivalenceError: the converter made an invalid graph.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with _quiet():
        half: onnx.ModelProto = convert_float_to_float16(
            proto,
            min_positive_val=2.0**-24,
            max_finite_val=65504.0,
            keep_io_types=io_dtype == "fp32",
        )
    try:
        return in_order(half)
    except ir.serde.SerdeError as error:
        # for example, it casts a value twice under one name if a Min and a Max read it
        raise EquivalenceError(
            f"the exported graph is invalid in float16: {first_line(error)}",
            "Use --precision fp32.",
        ) from error


def assert_as_asked(proto: onnx.ModelProto, opset: int, axes: dict[int, str]) -> None:
    """Check the opset and the dynamic axes, because the exporter only logs that it wrote others.

    Raises:
        PathconvertError: the graph has another opset, or lacks a dynamic axis.
    """
    found = {entry.domain: entry.version for entry in proto.opset_import}
    if found != {"": opset}:
        raise PathconvertError(
            f"opset {opset} was asked for, but the exporter wrote {found}", "Use --opset 20."
        )
    (taken,) = proto.graph.input
    dims = taken.type.tensor_type.shape.dim
    written = {i: dim.dim_param for i, dim in enumerate(dims) if dim.dim_param}
    if written != axes:
        lost = ", ".join(name for i, name in axes.items() if written.get(i) != name)
        raise PathconvertError(
            f"the network cannot be exported with a dynamic {lost}: "
            "the exporter made it a fixed size",
            "Give a fixed batch size (--batch N), and leave --dynamic-size out.",
        )
