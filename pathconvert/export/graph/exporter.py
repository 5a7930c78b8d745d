"""torch's exporter and the float16 converter, with their habits undone.

A file of weights beside the graph, an opset other than the one asked for, text on stdout, the exporting machine's paths
in the metadata of nodes, a dynamic axis lost with a log line, casts behind the nodes that read them.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
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
    exported: nn.Module, x: Tensor, axes: dict[int, str], opset: int, several: bool
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The graph without the exporter's metadata, and for every node's result the module that it came from."""
    if 0 in axes and len(x) == 1:
        x = torch.cat([x, x])  # a size of 1 may be taken for a constant
    try:
        with _quiet():
            program = torch.onnx.export(
                exported, (x,), dynamo=True, optimize=True, external_data=False, verbose=False, opset_version=opset,
                dynamic_shapes=(axes,) if axes else None, input_names=["input"],
                output_names=["out", "aux"] if several else ["logits"],
            )  # fmt: skip
    except Exception as error:  # the exporter, dynamo and sympy each have their own classes
        why = " ".join(first_line(error).split())
        tip = "Try it without --dynamic-size." if len(axes) > 1 else "Report it with --debug's output."
        raise PathconvertError(f"{type(exported.network).__name__} cannot be exported: {why}", tip) from error
    assert program is not None
    proto = program.model_proto
    layers = _layers(proto)
    _clean(proto)
    return proto, layers


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's text, log lines and warnings go nowhere."""
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
    """Result of a node → path of the module that it came from, by the exporter's metadata."""
    layers = {}
    for node in proto.graph.node:
        scopes = next((e.value for e in node.metadata_props if e.key == "pkg.torch.onnx.name_scopes"), "[]")
        with contextlib.suppress(ValueError):
            path = json.loads(scopes.replace("'", '"'))[-2:-1]
            layers.update({output: path[0] for output in node.output if path})
    return layers


def _clean(proto: onnx.ModelProto) -> None:
    """Remove metadata (it holds the paths of this machine), and the wrapper's name from the weights'."""
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
    """float16 weights and operators. Weights above 65504 or below 6e-8 are clipped; the proof decides on them."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with _quiet():
        half: onnx.ModelProto = convert_float_to_float16(
            proto, min_positive_val=2.0**-24, max_finite_val=65504.0, keep_io_types=io_dtype == "fp32"
        )
    _sort(half.graph)
    return half


def _sort(graph: onnx.GraphProto) -> None:
    """Put every node after those whose results it reads: the float16 converter appends its casts at the end."""
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
    """The names that a node reads, those that its subgraphs read included."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs) if attribute.type in GRAPH_ATTRIBUTES else ():
            for inner in graph.node:
                yield from _reads(inner)


def assert_as_asked(proto: onnx.ModelProto, opset: int, axes: dict[int, str]) -> None:
    """The exporter logs where it does not do what it was asked for: here it is an error."""
    found = {entry.domain: entry.version for entry in proto.opset_import}
    if found != {"": opset}:
        raise PathconvertError(f"opset {opset} was asked for, the exporter wrote {found}", "Ask for --opset 20.")
    (taken,) = proto.graph.input
    written = {i: d.dim_param for i, d in enumerate(taken.type.tensor_type.shape.dim) if d.dim_param}
    if written != axes:
        lost = ", ".join(name for i, name in axes.items() if written.get(i) != name)
        raise PathconvertError(
            f"the network does not take a dynamic {lost}: the exporter fixed it",
            "Fix it: --batch N, no --dynamic-size.",
        )
