"""Clean graphs and put their nodes in order: the passes of onnx_ir, and what no pass does.

torch's exporter stores paths of this machine in metadata and doc strings, and names weights as the
wrapped network does (``wrapping.py``). The float16 converter appends its casts after the nodes that
read them. Both functions reach the graphs inside nodes too, which are the branches of an If and the
body of a Loop, and the functions of the model.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from pathconvert.export.graph.verification import PREFIX
from pathconvert.version import __version__


def clean(model: ir.Model) -> None:
    """Remove metadata, doc strings and the wrapper's prefix; write pathconvert as the producer.

    Args:
        model: the exporter's model; changed in place. Its nodes, and the order of its nodes and
            weights, stay as they are.
    """
    model.producer_name, model.producer_version, model.doc_string = "pathconvert", __version__, None
    model.metadata_props.clear()
    common.ClearMetadataAndDocStringPass()(model)
    for graph in _graphs(model):
        _clear_graph(graph)
    _shorten_weight_names(model.graph)
    _drop_weight_types(model)


def in_order(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which every node stands after those whose results it reads.

    Nodes that do not depend on each other keep their order.

    Raises:
        onnx_ir.serde.SerdeError: two nodes have results of the same name.
        ValueError: nodes read each other's results in a circle.
    """
    model = ir.from_proto(proto)
    common.TopologicalSortPass()(model)
    _drop_weight_types(model)
    return ir.to_proto(model)


def _graphs(model: ir.Model) -> Iterator[ir.Graph | ir.Function]:
    """The graph of the model, its functions, and the graphs inside the nodes of these."""
    yield from model.graphs()
    for function in model.functions.values():
        yield function
        yield from function.subgraphs()


def _clear_graph(graph: ir.Graph | ir.Function) -> None:
    """Clear what the pass leaves: a graph without nodes, values, weights and attributes."""
    weights = list(graph.initializers.values()) if isinstance(graph, ir.Graph) else []
    results = [value for node in graph for value in node.outputs]
    for entry in (graph, *graph.inputs, *graph.outputs, *weights, *results):
        entry.doc_string = None
        entry.metadata_props.clear()
    for weight in weights:
        if weight.const_value is not None:
            _clear_tensor(weight.const_value)
    for node in graph:
        for attribute in node.attributes.values():
            attribute.doc_string = None


def _clear_tensor(tensor: ir.TensorProtocol) -> None:
    tensor.metadata_props.clear()
    if isinstance(tensor, ir.TensorProtoTensor):  # its doc string cannot be assigned
        tensor.raw.ClearField("doc_string")
        tensor.raw.ClearField("metadata_props")
    else:
        tensor.doc_string = None


def _shorten_weight_names(graph: ir.Graph) -> None:
    """Remove the wrapper's prefix from the names of weights, unless another value has the name."""
    taken = {value.name for node in graph.all_nodes() for value in node.outputs}
    for inner in (graph, *graph.subgraphs()):
        taken.update(value.name for value in inner.inputs)
        taken.update(inner.initializers)
    weights = dict(graph.initializers)
    graph.initializers.clear()  # renaming a weight inside would move it to the end
    for name, weight in weights.items():
        short = name.removeprefix(PREFIX)
        weight.name = name if short in taken else short
        graph.initializers.add(weight)


def _drop_weight_types(model: ir.Model) -> None:
    """Remove types and shapes of weights, which their tensors state, and so keep the file small."""
    for graph in model.graphs():
        for weight in graph.initializers.values():
            if not weight.is_graph_input() and not weight.is_graph_output():
                weight.type = weight.shape = None
