"""Sessions: the choice of the device, the reasons for refusals, and the explanation of files that
do not load.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_files import CLASSES, needs_cuda_provider, save_linear

from pathconvert.errors import CheckpointError, PathconvertError, RuntimeUnavailable
from pathconvert.export.card import ModelCard
from pathconvert.export.runtime import providers
from pathconvert.export.runtime.providers import CPU, PROVIDERS, open_session
from pathconvert.export.runtime.session import shape_text
from pathconvert.networks.architectures import Architecture

GPU = torch.cuda.is_available()
without_gpu = pytest.mark.skipif(GPU, reason="asks for a GPU where there is none")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def images(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


# ---- sessions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("io_binding", [False, True])
def test_runs_on_the_cpu(here, io_binding):
    weight = save_linear(here / "a.onnx")
    session = open_session("a.onnx", "cpu", threads=1, io_binding=io_binding)
    assert (session.device, session.providers, session.fallback, session.card) == (
        "cpu",
        (CPU,),
        None,
        None,
    )
    assert session.input_shape == ("batch", 3, 4, 4)
    assert session.nodes == {CPU: sum(session.nodes.values())}
    for batch in (1, 3):
        x = images(batch, 3, 4, 4, seed=batch)
        (scores,) = session.run(x)
        # the tolerance of a sum of three products in float32
        np.testing.assert_allclose(scores, x.mean((2, 3)) @ weight, atol=1e-6)
        session.runner(x)()


def test_inputs_are_cast_to_the_graph(here):
    save_linear(here / "half.onnx", kind=TensorProto.FLOAT16)
    session = open_session("half.onnx", "cpu")
    assert session.input_dtype == np.float16
    assert session.run(images(2, 3, 4, 4))[0].shape == (2, CLASSES)


def test_options(here):
    save_linear(here / "a.onnx")
    session = open_session("a.onnx", "cpu", threads=2, optimize=False, take_turns=True)
    options = session.inference.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_card_is_read(here):
    card = ModelCard(
        Architecture("resnet18", {}, (3, 4, 4), "classification"), labels=tuple("abcde")
    )
    save_linear(here / "a.onnx", card=card)
    assert open_session("a.onnx", "cpu").card == card


def test_damaged_card_names_the_file(here):
    save_linear(here / "a.onnx")
    model = onnx.load("a.onnx")
    entry = model.metadata_props.add()
    entry.key, entry.value = "pathconvert", "{"
    onnx.save(model, "a.onnx")
    with pytest.raises(
        CheckpointError, match=r"^a\.onnx: the file has damaged pathconvert metadata"
    ):
        open_session("a.onnx", "cpu")


def test_telemetry_is_off_before_the_runtime_is_loaded():
    code = (
        "import os, pathconvert.export.runtime.session; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "1\n"


# ---- devices -------------------------------------------------------------------------------------


@without_gpu
@pytest.mark.parametrize(("device", "library"), [("cuda", "lib"), ("tensorrt", "libnvinfer")])
def test_a_device_that_was_asked_for_is_there_or_refused(here, device, library, capfd):
    save_linear(here / "a.onnx")
    with pytest.raises(RuntimeUnavailable) as refused:
        open_session("a.onnx", device)
    assert str(refused.value).startswith(f"ONNX Runtime cannot use {device}: the library {library}")
    assert str(refused.value).endswith("is missing")
    assert refused.value.tip
    assert capfd.readouterr() == ("", "")  # what ONNX Runtime prints is part of the error


@without_gpu
def test_auto_falls_back_and_says_why(here, capfd):
    save_linear(here / "a.onnx")
    session = open_session("a.onnx")
    assert session.device == "cpu"
    assert session.fallback
    assert session.fallback.startswith("CUDA: the library lib")
    assert capfd.readouterr() == ("", "")


def test_a_session_that_lost_its_provider_is_refused(here, monkeypatch):
    save_linear(here / "a.onnx")
    monkeypatch.setattr(
        providers.ort, "preload_dlls", lambda: print("Failed to load libodd.so.3: no such file")
    )
    load = providers._load
    monkeypatch.setattr(providers, "_load", lambda path, options, _: load(path, options, [CPU]))
    with pytest.raises(RuntimeUnavailable, match=r"cannot use cuda: Failed to load libodd.so.3"):
        open_session("a.onnx", "cuda")
    assert open_session("a.onnx").fallback == "CUDA: Failed to load libodd.so.3: no such file"


def test_a_build_without_the_provider(here, monkeypatch):
    save_linear(here / "a.onnx")
    monkeypatch.setattr(providers.ort, "get_available_providers", lambda: [CPU])
    with pytest.raises(
        RuntimeUnavailable, match=r"this build of ONNX Runtime \(.+\) has no CUDAExecutionProvider"
    ):
        open_session("a.onnx", "cuda")


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            "x with error: libcudnn.so.9: cannot open shared object file\n",
            "the library libcudnn.so.9 is missing",
        ),
        (
            'loading "x.dll" which depends on "cudnn64_9.dll" which is missing.',
            "the library cudnn64_9.dll is missing",
        ),
        (
            "a\nCUDA failure 100: no device is detected ; GPU=0",
            "CUDA failure 100: no device is detected",
        ),
        ("\x1b[1;31modd\x1b[m\nlines", "odd lines"),
        ("", "ONNX Runtime does not say why"),
    ],
)
def test_reasons_in_the_log(log, reason):
    assert providers._reason(log) == reason


class Part:
    """The nodes of a session that one provider runs, as ONNX Runtime describes them."""

    def __init__(self, provider: str, *operations: str) -> None:
        self.ep_name = provider
        self.nodes = operations

    def get_nodes(self):
        return [helper.make_node(operation, [], []) for operation in self.nodes]


class Assigned:
    """A session whose nodes are assigned as ``parts`` say."""

    def __init__(self, session: object, *parts: Part) -> None:
        self._session, self._parts = session, parts

    def get_provider_graph_assignment_info(self):
        return self._parts

    def __getattr__(self, name: str):
        return getattr(self._session, name)


def test_node_assignment_decides(here):
    save_linear(here / "a.onnx")
    made = open_session("a.onnx", "cpu").inference
    cuda = PROVIDERS["cuda"]
    part = Assigned(made, Part(cuda, "Relu", "Conv"), Part(CPU, "Conv", "Shape", "Conv"))
    session = providers._session(
        here / "a.onnx", "cuda", part, None, io_binding=False, cuda_graph=False
    )
    assert session.nodes == {cuda: 2, CPU: 3}
    assert session.fallback == "the CPU runs 2 heavy nodes: 2 Conv"
    with pytest.raises(RuntimeUnavailable, match="has no kernel for any node"):
        providers._session(
            here / "a.onnx",
            "cuda",
            Assigned(made, Part(CPU, "Conv")),
            None,
            io_binding=False,
            cuda_graph=False,
        )


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.usefixtures("here")
def test_what_the_gpu_providers_are_asked(monkeypatch, cuda_graph, tf32):
    """A dynamic batch needs cuDNN's heuristic: the exhaustive search would start again at every
    batch size.
    """
    asked = []

    def load(_, __, wanted):
        asked.append(wanted)
        raise providers._ProviderFailed("with error: libx.so: cannot open shared object")

    monkeypatch.setattr(providers, "_load", load)
    monkeypatch.setattr(providers.ort, "get_available_providers", lambda: list(PROVIDERS.values()))
    for device in ("cuda", "tensorrt"):
        with pytest.raises(providers._ProviderFailed):  # the second load is on the CPU
            open_session("a.onnx", device, cuda_graph=cuda_graph, tf32=tf32)
    flag = str(int(cuda_graph))
    asked_of_cuda = {
        "cudnn_conv_algo_search": "HEURISTIC",
        "enable_cuda_graph": flag,
        "use_tf32": str(int(tf32)),
    }
    cuda = (PROVIDERS["cuda"], asked_of_cuda)
    tensorrt = (PROVIDERS["tensorrt"], {"trt_cuda_graph_enable": flag})
    assert asked[0] == [cuda, CPU]
    assert asked[2] == [tensorrt, cuda, CPU]


def test_wrong_devices(here):
    save_linear(here / "a.onnx")
    with pytest.raises(RuntimeUnavailable, match="there is no device 'tpu'"):
        open_session("a.onnx", "tpu")
    with pytest.raises(RuntimeUnavailable, match="CUDA graphs need a GPU"):
        open_session("a.onnx", "cpu", cuda_graph=True)
    if not GPU:
        with pytest.raises(RuntimeUnavailable, match="CUDA graphs need a GPU: the library"):
            open_session("a.onnx", cuda_graph=True)


def test_a_captured_graph_sees_every_new_input(here):
    """A captured graph reads fixed addresses, so a second array of the same shape is copied over
    the first one.
    """
    weight = save_linear(here / "a.onnx")
    session = dataclasses.replace(open_session("a.onnx", "cpu"), io_binding=True, cuda_graph=True)
    bindings = []
    for batch in (1, 3, 1, 3):
        x = images(batch, 3, 4, 4, seed=len(bindings))
        bindings.append(session._bound(x)[0])
        (found,) = session.run(x)
        assert np.allclose(found, x.mean((2, 3)) @ weight, atol=1e-6)
    assert bindings[0] is bindings[2]
    assert bindings[1] is bindings[3]


@needs_cuda_provider
@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"io_binding": True}, {"cuda_graph": True}])
def test_runs_on_cuda(here, options):
    weight = save_linear(here / "a.onnx")
    session = open_session("a.onnx", "cuda", **options)
    assert session.nodes[PROVIDERS["cuda"]] > 0
    for batch in (1, 3, 1):
        x = images(batch, 3, 4, 4, seed=batch)
        # TensorFloat-32 keeps 10 bits of the mantissa
        np.testing.assert_allclose(session.run(x)[0], x.mean((2, 3)) @ weight, atol=1e-2)


# ---- files ---------------------------------------------------------------------------------------


def refusal(path: str, device: str = "cpu") -> str:
    with pytest.raises(CheckpointError) as refused:
        open_session(path, device)
    return str(refused.value)


def test_files_that_are_no_network(here):
    save_linear(here / "a.onnx")
    content = (here / "a.onnx").read_bytes()
    (here / "cut.onnx").write_bytes(content[: len(content) // 2])
    (here / "empty.onnx").write_bytes(b"")
    (here / "page.onnx").write_text("<!DOCTYPE html><html></html>")
    (here / "noise.onnx").write_bytes(bytes([255, 254, 0, 3]) * 50)
    (here / "folder.onnx").mkdir()
    torch.save({"a": torch.zeros(3)}, here / "weights.onnx")
    assert (
        refusal("cut.onnx")
        == refusal("cut.onnx", "auto")
        == "cut.onnx is a truncated or damaged ONNX file."
    )
    assert refusal("empty.onnx") == "empty.onnx is empty (0 bytes); expected an ONNX file."
    assert refusal("page.onnx").startswith("page.onnx is a web page (HTML)")
    assert refusal("noise.onnx").startswith("noise.onnx is unknown binary data")
    assert refusal("folder.onnx") == "folder.onnx is a directory; expected an ONNX file."
    assert refusal("weights.onnx") == "weights.onnx is a PyTorch checkpoint; expected an ONNX file."
    assert refusal("none.onnx") == "none.onnx does not exist; expected an ONNX file."


def test_a_damaged_file_is_blamed_before_the_device(here):
    save_linear(here / "a.onnx")
    (here / "cut.onnx").write_bytes((here / "a.onnx").read_bytes()[:200])
    if not GPU:
        with pytest.raises((CheckpointError, RuntimeUnavailable)):
            open_session("cut.onnx", "cuda")
    assert "truncated" in refusal("cut.onnx", "auto")


def test_files_from_the_future(here):
    save_linear(here / "opset.onnx", opset=99)
    save_linear(here / "format.onnx", ir_version=99)
    save_linear(here / "odd.onnx", operation="Frobnicate")
    assert "opset.onnx is written in opset 99; this ONNX Runtime knows opsets up to " in refusal(
        "opset.onnx"
    )
    assert "is written in ONNX's file format 99; this ONNX Runtime reads formats up to " in refusal(
        "format.onnx"
    )
    assert (
        refusal("odd.onnx")
        == "odd.onnx needs the operation acme:Frobnicate, which ONNX Runtime does not have."
    )


def test_weights_in_another_file_that_is_missing(here):
    save_linear(here / "a.onnx")
    model = onnx.load("a.onnx")
    del model.graph.initializer[:]
    model.graph.initializer.append(numpy_helper.from_array(images(3, CLASSES), "weight"))
    onnx.save(model, "b.onnx", save_as_external_data=True, location="b.onnx.data", size_threshold=0)
    assert open_session("b.onnx", "cpu").run(images(1, 3, 4, 4))
    (here / "b.onnx.data").unlink()
    assert refusal("b.onnx").startswith(
        "b.onnx keeps its weights in another file, which is missing or damaged"
    )


# ---- inputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 4), (3, 4, 4)])
def test_inputs_of_another_size(here, shape):
    save_linear(here / "a.onnx")
    session = open_session("a.onnx", "cpu")
    text = f"a.onnx takes inputs of size batchx3x4x4, not {shape_text(shape)}"
    with pytest.raises(PathconvertError, match=text):
        session.run(images(*shape))
    with pytest.raises(PathconvertError, match=text):
        session.runner(images(*shape))


def test_a_fixed_batch_and_uint8(here):
    save_linear(here / "a.onnx", (1, 3, 4, 4), kind=TensorProto.UINT8)
    session = open_session("a.onnx", "cpu")
    assert session.run(np.ones((1, 3, 4, 4), np.uint8))[0].shape == (1, CLASSES)
    with pytest.raises(PathconvertError, match="takes inputs of size 1x3x4x4, not 2x3x4x4"):
        session.run(np.ones((2, 3, 4, 4), np.uint8))
    with pytest.raises(PathconvertError, match="takes uint8 values, not float32"):
        session.run(images(1, 3, 4, 4))


def test_several_inputs_are_refused(here):
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "abc"]
    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["c"])], "g", ports[:2], ports[2:]
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
        here / "a.onnx",
    )
    with pytest.raises(CheckpointError, match=r"a\.onnx has 2 inputs \(a, b\)"):
        _ = open_session("a.onnx", "cpu").input_shape


def test_a_failing_run_is_one_line(here):
    node = helper.make_node("Reshape", ["input", "shape"], ["logits"])
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 4])
    taken = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [None, 3])
    shape = numpy_helper.from_array(np.array([-1, 3]), "shape")
    graph = helper.make_graph([node], "g", [given], [taken], [shape])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
        here / "a.onnx",
    )
    session = open_session("a.onnx", "cpu")
    assert session.run(images(3, 4))[0].shape == (4, 3)
    with pytest.raises(
        PathconvertError, match=r"^a\.onnx: ONNX Runtime failed on cpu: "
    ) as refused:
        session.run(images(1, 4))
    assert "\n" not in str(refused.value)
