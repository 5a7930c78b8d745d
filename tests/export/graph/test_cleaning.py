"""Cleaning and ordering of graphs: graphs inside nodes, functions, and weights of all names."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from pathconvert.errors import EquivalenceError
from pathconvert.export.graph.cleaning import clean, in_order
from pathconvert.export.graph.export import export_onnx
from pathconvert.version import __version__

SECRET = "/home/someone/net.py"
X = np.array([[1.0, -2.0, 3.0]], dtype=np.float32)


def vector(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3])


def branch(name: str, nodes: list[onnx.NodeProto], output: str) -> onnx.GraphProto:
    """A graph of an If, with a weight of its own that ``nodes`` may read as ``{name}_weight``."""
    weight = numpy_helper.from_array(np.full((1, 3), 2, dtype=np.float32), f"{name}_weight")
    return helper.make_graph(nodes, name, [], [vector(output)], [weight])


def unordered() -> onnx.ModelProto:
    """A graph in which every node that can stand before what it reads does so.

    y = Twice(2 · relu(x + network.bias)) if flag, else x. Only the then-branch of an If that is in
    the then-branch of another reads ``sum``.
    """
    inner = branch(
        "inner",
        [
            helper.make_node("Mul", ["relu", "inner_weight"], ["product"]),
            helper.make_node("Relu", ["sum"], ["relu"]),
        ],
        "product",
    )
    other = branch("other", [helper.make_node("Identity", ["x"], ["same"])], "same")
    middle = branch(
        "middle",
        [
            helper.make_node("Twice", ["chosen"], ["doubled"], domain="own"),
            helper.make_node("If", ["flag"], ["chosen"], then_branch=inner, else_branch=other),
        ],
        "doubled",
    )
    last = branch("last", [helper.make_node("Identity", ["x"], ["kept"])], "kept")
    nodes = [
        helper.make_node("Identity", ["result"], ["y"]),
        helper.make_node("If", ["flag"], ["result"], then_branch=middle, else_branch=last),
        helper.make_node("Add", ["x", "network.bias"], ["sum"]),
    ]
    bias = numpy_helper.from_array(np.ones((1, 3), dtype=np.float32), "network.bias")
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    graph = helper.make_graph(nodes, "main", [vector("x"), flag], [vector("y")], [bias])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    add = helper.make_node("Add", ["a", "a"], ["b"])
    twice = helper.make_function("own", "Twice", ["a"], ["b"], [add], opsets[:1])
    return helper.make_model(graph, functions=[twice], opset_imports=opsets, ir_version=10)


def mark(message) -> int:
    """Put the secret into every doc string and all metadata of a model; return into how many."""
    fields = message.DESCRIPTOR.fields_by_name
    count = 0
    for _, value in list(message.ListFields()):
        for one in value if hasattr(value, "__len__") and not isinstance(value, bytes) else [value]:
            count += mark(one) if hasattr(one, "DESCRIPTOR") else 0
    if "doc_string" in fields:
        message.doc_string = SECRET
        count += 1
    if "metadata_props" in fields:
        message.metadata_props.add(key="stack_trace", value=SECRET)
        count += 1
    return count


def graph_of(node: onnx.NodeProto, name: str) -> onnx.GraphProto:
    return next(attribute.g for attribute in node.attribute if attribute.name == name)


def cleaned(proto: onnx.ModelProto) -> onnx.ModelProto:
    model = ir.from_proto(proto)
    clean(model)
    return ir.to_proto(model)


def results(proto: onnx.ModelProto) -> list[np.ndarray]:
    """The outputs for both values of the flag."""
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return [session.run(None, {"x": X, "flag": np.array(flag)})[0] for flag in (True, False)]


def test_nodes_are_put_in_order_inside_nodes_too():
    with pytest.raises(onnx.checker.ValidationError, match="topologically sorted"):
        onnx.checker.check_model(unordered())
    proto = in_order(unordered())
    assert [node.op_type for node in proto.graph.node] == ["Add", "If", "Identity"]
    middle = graph_of(proto.graph.node[1], "then_branch")
    assert [node.op_type for node in middle.node] == ["If", "Twice"]
    inner = graph_of(middle.node[0], "then_branch")
    assert [node.op_type for node in inner.node] == ["Relu", "Mul"]
    when_true, when_false = results(proto)
    assert np.array_equal(when_true, 4 * np.maximum(X + 1, 0))
    assert np.array_equal(when_false, X)


def test_an_ordered_graph_stays_as_it_is():
    proto = in_order(unordered())
    assert in_order(proto).SerializeToString() == proto.SerializeToString()


def test_two_results_of_one_name_have_no_order():
    proto = unordered()
    proto.graph.node[0].output[0] = "sum"
    with pytest.raises(ir.serde.SerdeError):
        in_order(proto)


def test_metadata_and_doc_strings_are_removed_everywhere():
    proto = in_order(unordered())
    expected = results(proto)
    proto.graph.value_info.append(vector("sum"))
    # the model, 5 graphs, a function, 8 nodes and 4 attributes, beside inputs, outputs and weights
    marks = mark(proto)
    assert proto.SerializeToString().count(SECRET.encode()) == marks > 2 * (1 + 5 + 1 + 8) + 4
    clean_proto = cleaned(proto)
    data = clean_proto.SerializeToString()
    assert SECRET.encode() not in data
    assert b"stack_trace" not in data
    assert (clean_proto.producer_name, clean_proto.producer_version) == ("pathconvert", __version__)
    for got, wanted in zip(results(clean_proto), expected, strict=True):
        assert np.array_equal(got, wanted)


def test_a_graph_without_nodes_is_cleaned_too():
    """A branch may have its weight as its result."""
    proto = in_order(unordered())
    last = graph_of(proto.graph.node[1], "else_branch")
    del last.node[:]
    last.output[0].name = "last_weight"
    mark(last)
    assert SECRET.encode() not in cleaned(proto).SerializeToString()


def test_weights_lose_the_wrappers_prefix_where_the_name_is_free():
    names = ["network.bias", "network.x", "val_0", "network.relu", "network.0.weight"]
    proto = in_order(unordered())
    zeros = np.zeros((1, 3), dtype=np.float32)
    proto.graph.initializer.extend(numpy_helper.from_array(zeros, name) for name in names[1:])
    proto = cleaned(proto)
    # "x" is an input, and "relu" a result inside a branch of a branch
    left = ["bias", "network.x", "val_0", "network.relu", "0.weight"]
    assert [tensor.name for tensor in proto.graph.initializer] == left
    assert list(proto.graph.node[0].input) == ["x", "bias"]
    results(proto)


def test_types_of_weights_are_not_stated_twice():
    proto = in_order(unordered())
    proto.graph.value_info.extend([vector("network.bias"), vector("sum")])
    assert [info.name for info in cleaned(proto).graph.value_info] == ["sum"]


def test_a_weight_that_is_an_output_keeps_its_type():
    proto = in_order(unordered())
    proto.graph.output.append(vector("network.bias"))
    _, bias = cleaned(proto).graph.output
    assert bias.type == vector("bias").type


def test_an_invalid_float16_graph_is_refused(tmp_path):
    """The float16 converter casts a value that a Max and a Min read twice, under one name."""

    class Range(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            y = self.conv(x)
            return (torch.maximum(y, y.flip(1)) - torch.minimum(y, y.flip(1))).mean((2, 3))

    with pytest.raises(EquivalenceError) as caught:
        export_onnx(Range(), tmp_path / "x.onnx", torch.zeros(1, 3, 8, 8), precision="fp16")
    assert str(caught.value).startswith("the exported graph is invalid in float16: Output '")
    assert caught.value.tip == "Use --precision fp32."
    assert not list(tmp_path.iterdir())
