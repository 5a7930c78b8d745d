"""Tiny ONNX files, made node by node."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pathconvert.export.card import ModelCard, write_card
from pathconvert.export.runtime.session import ort

CLASSES = 5

needs_cuda_provider = pytest.mark.skipif(
    "CUDAExecutionProvider" not in ort.get_available_providers(),
    reason="this ONNX Runtime was built without CUDA",
)


def save_linear(
    path: Path,
    shape: Sequence[int | str] = ("batch", 3, 4, 4),
    *,
    kind: int = TensorProto.FLOAT,
    card: ModelCard | None = None,
    operation: str = "",
    outputs: int = 1,
    softmax: bool = False,
    opset: int = 20,
    ir_version: int = 10,
) -> np.ndarray:
    """Channel means × a seeded matrix, [channels, CLASSES], which is returned.

    Args:
        path: the file.
        shape: of the input; NCHW.
        kind: of the input's elements.
        card: recorded in the file.
        operation: put between, from a domain that no runtime knows.
        outputs: how many times the scores are given.
        softmax: whether the graph ends with one.
        opset, ir_version: as claimed by the file.
    """
    weight = np.random.default_rng(0).standard_normal((shape[1], CLASSES)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["input"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("GlobalAveragePool", ["float"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["scores"]),
    ]
    if operation:
        nodes.append(helper.make_node(operation, ["scores"], ["odd"], domain="acme"))
    last = "odd" if operation else "scores"
    names = [f"logits{i or ''}" for i in range(outputs)]
    nodes += [
        helper.make_node("Softmax" if softmax else "Identity", [last], [name]) for name in names
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("input", kind, shape)],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [shape[0], CLASSES])
            for name in names
        ],
        [numpy_helper.from_array(weight, "weight")],
    )
    opsets = [
        helper.make_opsetid("", opset),
        *([helper.make_opsetid("acme", 1)] if operation else []),
    ]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)
    if card:
        write_card(model, card)
    onnx.save(model, path)
    return weight
