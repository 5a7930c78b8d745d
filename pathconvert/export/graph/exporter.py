"""torch's exporter and ONNX Runtime's float16 converter, without their side effects.

Left alone, they would write the weights to a second file, choose another opset than the one asked for, print to
stdout, store paths of this machine in the metadata of nodes, fix a dynamic axis with only a log line, and place casts
behind the nodes that read them.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from pathconvert.errors import PathconvertError, first_line
from pathconvert.export.graph.verification import PREFIX
from pathconvert.version import __version__

#: Kinds of attributes that hold graphs: the branches of an If, the body of a Loop.
GRAPH_ATTRIBUTES = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


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
                exported, (x,), dynamo=True, optimize=True, external_data=False, verbose=False, opset_version=opset,
                dynamic_shapes=(axes,) if axes else None, input_names=["input"],
                output_names=list(output_names),
            )  # fmt: skip
    except Exception as error:  # the exporter, dynamo and sympy each have exception classes of their own
        why = " ".join(first_line(error).split())
        tip = "Leave --dynamic-size out." if len(axes) > 1 else "Run it again with --debug, and report the output."
        raise PathconvertError(f"{type(exported.network).__name__} cannot be exported: {why}", tip) from error
    assert program is not None
    proto = program.model_proto
    layers = _layers(proto)
    _clean(proto)
    return proto, layers


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discard the exporter's output, log lines and warnings."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")]
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


def _layers(proto: onnx.ModelProto) -> dict[str, str]:
    """Result of a node → path of the module that it came from, as the exporter's metadata says."""
    layers = {}
    for node in proto.graph.node:
        scopes = next((e.value for e in node.metadata_props if e.key == "pkg.torch.onnx.name_scopes"), "[]")
        with contextlib.suppress(ValueError):
            path = json.loads(scopes.replace("'", '"'))[-2:-1]
            layers.update({output: path[0] for output in node.output if path})
    return layers


def _clean(proto: onnx.ModelProto) -> None:
    """Remove metadata, which holds paths of this machine, and the wrapper's prefix from the names of weights."""
    proto.producer_name, proto.producer_version, proto.doc_string = "pathconvert", __version__, ""
    del proto.metadata_props[:]
    graph = proto.graph
    weights = {tensor.name for tensor in graph.initializer}
    taken = {port.name for port in (*graph.input, *graph.output)} | {name for n in graph.node for name in n.output}
    taken |= weights
    renamed = {name: short for name in weights if (short := name.removeprefix(PREFIX)) != name and short not in taken}
    kept = [info for info in proto.graph.value_info if info.name not in weights]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    _clean_graph(proto.graph, renamed)
    for tensor in proto.graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for function in proto.functions:
        _clean_nodes(function.node, {})
        function.doc_string = ""
        del function.metadata_props[:]


def _clean_graph(graph: onnx.GraphProto, renamed: dict[str, str]) -> None:
    for entry in (graph, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        entry.doc_string = ""
        del entry.metadata_props[:]
    _clean_nodes(graph.node, renamed)


def _clean_nodes(nodes: Any, renamed: dict[str, str]) -> None:
    for node in nodes:
        node.doc_string = ""
        del node.metadata_props[:]
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        for attribute in node.attribute:
            attribute.doc_string = ""
            for graph in (attribute.g, *attribute.graphs) if attribute.type in GRAPH_ATTRIBUTES else ():
                _clean_graph(graph, renamed)


def to_half(proto: onnx.ModelProto, io_dtype: str) -> onnx.ModelProto:
    """Convert weights and operators to float16.

    Weights whose magnitude is above 65504 or below 6e-8 are clipped; the proof shows whether that matters.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with _quiet():
        half: onnx.ModelProto = convert_float_to_float16(
            proto, min_positive_val=2.0**-24, max_finite_val=65504.0, keep_io_types=io_dtype == "fp32"
        )
    _sort(half.graph)
    return half


def _sort(graph: onnx.GraphProto) -> None:
    """Put every node after those whose results it reads, because the float16 converter appends its casts at the end."""
    nodes = list(graph.node)
    made_by = {name: i for i, node in enumerate(nodes) for name in node.output}
    order: dict[int, None] = {}
    pending = list(range(len(nodes)))[::-1]
    while pending:
        needed = [made_by[name] for name in _reads(nodes[pending[-1]]) if name in made_by]
        missing = [i for i in needed if i not in order]
        if missing:
            pending += missing
        else:
            order.setdefault(pending.pop())
    del graph.node[:]
    graph.node.extend(nodes[i] for i in order)


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """The names that a node reads, including those that its subgraphs read."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs) if attribute.type in GRAPH_ATTRIBUTES else ():
            for inner in graph.node:
                yield from _reads(inner)


def assert_as_asked(proto: onnx.ModelProto, opset: int, axes: dict[int, str]) -> None:
    """Check the opset and the dynamic axes, because the exporter only logs that it wrote others.

    Raises:
        PathconvertError: the graph has another opset, or lacks a dynamic axis.
    """
    found = {entry.domain: entry.version for entry in proto.opset_import}
    if found != {"": opset}:
        raise PathconvertError(f"opset {opset} was asked for, but the exporter wrote {found}", "Use --opset 20.")
    (taken,) = proto.graph.input
    written = {i: d.dim_param for i, d in enumerate(taken.type.tensor_type.shape.dim) if d.dim_param}
    if written != axes:
        lost = ", ".join(name for i, name in axes.items() if written.get(i) != name)
        raise PathconvertError(
            f"the network cannot be exported with a dynamic {lost}: the exporter made it a fixed size",
            "Give a fixed batch size (--batch N), and leave --dynamic-size out.",
        )
