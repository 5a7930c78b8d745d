"""ONNX Runtime sessions on a named device, and what to say when there is none.

ONNX Runtime only logs that a provider did not load, and runs on the CPU. Here a device that was asked for is there or
is refused with the library that it misses; only ``auto`` falls back, and says so. Whether a device is there is read off
the session that was made and the nodes that were assigned to it: ``get_available_providers()`` lists what the package
was built with.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import onnx

from pathconvert.errors import CheckpointError, PathconvertError, RuntimeUnavailable
from pathconvert.export.card import read_card
from pathconvert.export.runtime.diagnosis import explain_load_failure
from pathconvert.export.runtime.session import RUNTIME_ERRORS, Port, Session, ort

Device = Literal["auto", "cuda", "tensorrt", "cpu"]
DEVICES: tuple[str, ...] = get_args(Device)
CPU = "CPUExecutionProvider"
PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider", "cpu": CPU}
#: Operations whose work is worth a GPU; the CPU keeps those that compute shapes.
HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul", "FusedConv")


def open_session(
    path: str | Path,
    device: str = "auto",
    threads: int | None = None,
    cuda_graph: bool = False,
    io_binding: bool = False,
    *,
    optimize: bool = True,
    take_turns: bool = False,
    tf32: bool = True,
) -> Session:
    """Load an ``.onnx`` file.

    Args:
        path: the file.
        device: auto (a GPU if one works, else the CPU), cuda, tensorrt or cpu.
        threads: for the CPU; None for ONNX Runtime's choice, one a core.
        cuda_graph: capture the kernels once and replay them; fixed shapes, all nodes on the GPU, implies io_binding.
        io_binding: keep inputs and outputs on the device (see :meth:`Session.runner`).
        optimize: False runs the graph as it is written.
        take_turns: idle threads sleep at once, so that other sessions measured in turn have the processor.
        tf32: whether CUDA may round the factors of float32 products to 10 bits, as ONNX Runtime does by default. A
            comparison with float32's own noise needs False.

    Raises:
        CheckpointError: the file is missing, damaged, no ONNX file, or newer than this ONNX Runtime.
        RuntimeUnavailable: the device that was asked for cannot be used; the message names what it misses.
    """
    path = Path(path)
    if device not in DEVICES:
        raise RuntimeUnavailable(f"there is no device {device!r}", f"Devices: {', '.join(DEVICES)}.")
    if cuda_graph and device == "cpu":
        raise RuntimeUnavailable("CUDA graphs need a GPU; the device asked for is cpu", "Leave --cuda-graph out.")
    options = _options(threads, optimize, take_turns)
    missing = ""
    if device != "cpu":
        chosen = "cuda" if device == "auto" else device
        made, missing = _on_gpu(path, chosen, options, cuda_graph=cuda_graph, tf32=tf32)
        if made is not None:
            return _session(path, chosen, made, None, io_binding or cuda_graph, cuda_graph)
        if device != "auto":
            raise _unavailable(chosen, missing)
        if cuda_graph:
            raise RuntimeUnavailable(f"CUDA graphs need a GPU: {missing}", "Leave --cuda-graph out.")
    made, _ = _load(path, options, [CPU])
    fallback = f"CUDA: {missing}" if missing else None
    return _session(path, "cpu", made, fallback, io_binding, cuda_graph=False)


def require_size(session: Session, size: tuple[int, ...]) -> None:
    """Refuse an input that leaves nothing of a feature map: a kernel would divide by zero and end the process.

    Args:
        session: its file is read again.
        size: of one input, without the batch dimension; looked at where the graph leaves sides free.

    Raises:
        PathconvertError: a feature map would be empty.
    """
    if all(isinstance(side, int) for side in session.input_shape[1:]):
        return
    model = onnx.load(str(session.path), load_external_data=False)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    for dim, side in zip(dims, (1, *size), strict=True):
        dim.dim_value = side
    del model.graph.value_info[:]
    text = "×".join(map(str, size))
    too_small = PathconvertError(f"{session.path} takes no input as small as {text}", "Give a larger --input-size.")
    try:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise too_small from error
    for info in (*inferred.graph.value_info, *inferred.graph.output):
        if any(dim.HasField("dim_value") and dim.dim_value <= 0 for dim in info.type.tensor_type.shape.dim):
            raise too_small


def _options(threads: int | None, optimize: bool, take_turns: bool) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are raised; the log would say them twice
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if take_turns:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _on_gpu(path: Path, device: str, options: Any, *, cuda_graph: bool, tf32: bool) -> tuple[Any | None, str]:
    """A session on the GPU, or None and the reason why there is none."""
    if PROVIDERS[device] not in ort.get_available_providers():
        return None, f"this build of ONNX Runtime ({ort.__version__}) has no {PROVIDERS[device]}"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        ort.preload_dlls()
    asked = {
        "cudnn_conv_algo_search": "HEURISTIC",
        "enable_cuda_graph": str(int(cuda_graph)),
        "use_tf32": str(int(tf32)),
    }
    cuda = (PROVIDERS["cuda"], asked)
    tensorrt = (PROVIDERS["tensorrt"], {"trt_cuda_graph_enable": str(int(cuda_graph))})
    wanted = [cuda] if device == "cuda" else [tensorrt, cuda]
    try:
        made, log = _load(path, options, [*wanted, CPU])
    except _ProviderFailed as error:
        _load(path, options, [CPU])  # refuses the file where the file is at fault
        return None, _reason(f"{error} {printed.getvalue()}")
    if PROVIDERS[device] not in made.get_providers():
        return None, _reason(f"{log} {printed.getvalue()}")
    return made, ""


class _ProviderFailed(Exception):
    """ONNX Runtime failed with a GPU provider; whether the file is at fault shows on the CPU."""


def _load(path: Path, options: Any, providers: list[Any]) -> tuple[Any, str]:
    """A session, and what ONNX Runtime logged while it was made."""
    with _stderr_held() as log:
        try:
            return ort.InferenceSession(str(path), options, providers=providers, enable_fallback=False), log.text()
        except RUNTIME_ERRORS as error:
            if providers != [CPU]:
                raise _ProviderFailed(f"{log.text()} {error}") from None
            raise explain_load_failure(path, error) from None


def _reason(log: str) -> str:
    """The missing library in ONNX Runtime's log, or else what the log says."""
    library = re.search(r"with error: (lib\S+?): cannot open shared object", log)
    if library:
        return f"the library {library[1]} is missing"
    windows = re.search(r'depends on "(\S+?)" which is missing', log)
    if windows:
        return f"the library {windows[1]} is missing"
    if "install TensorRT libraries" in log:
        return "the library libnvinfer.so is missing"
    known = re.search(r"(CUDA failure \d+: [^;\n]*|CUDNN failure [^;\n]*|Failed to [^\n]*)", log)
    text = known[1] if known else " ".join(re.sub(r"\x1b\[[0-9;]*m", "", log).split())
    return text.strip()[:300] or "ONNX Runtime gives no reason"


def _unavailable(device: str, reason: str) -> RuntimeUnavailable:
    if "libcuda.so" in reason or "nvcuda" in reason:
        tip = "Install NVIDIA's driver, or run on --device cpu."
    elif "libnvinfer" in reason or "nvinfer" in reason:
        tip = "Install TensorRT and put its libraries on LD_LIBRARY_PATH, or take --device cuda."
    elif "missing" in reason:
        tip = "pip install 'onnxruntime-gpu[cuda,cudnn]' brings CUDA's libraries; or run on --device cpu."
    elif "this build" in reason:
        tip = "pip uninstall onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]'; or run on --device cpu."
    else:
        tip = "Run on --device cpu."
    return RuntimeUnavailable(f"ONNX Runtime cannot use {device}: {reason}", tip)


class _Held:
    """What was written to file descriptor 2 so far."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def text(self) -> str:
        self._file.seek(0)
        text: str = self._file.read().decode(errors="replace")
        return text


@contextlib.contextmanager
def _stderr_held() -> Iterator[_Held]:
    """Keep what C++ code writes to stderr; it is the only place where ONNX Runtime names a missing library."""
    with tempfile.TemporaryFile() as file:
        try:
            sys.stderr.flush()
            kept = os.dup(2)
        except (AttributeError, OSError):  # stderr is closed
            yield _Held(file)
            return
        try:
            os.dup2(file.fileno(), 2)
            yield _Held(file)
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _session(path: Path, device: str, made: Any, fallback: str | None, binding: bool, cuda_graph: bool) -> Session:
    nodes, left = _assignment(made)
    provider = PROVIDERS[device]
    gpu = {name for name in PROVIDERS.values() if name != CPU}
    if device != "cpu" and nodes and not gpu & set(nodes):
        raise RuntimeUnavailable(f"{provider} has no kernel for any node of {path}", "Run on --device cpu.")
    if device != "cpu" and left:
        fallback = f"the CPU runs {left.total()} heavy nodes: " + ", ".join(f"{n} {op}" for op, n in left.items())
    try:
        card = read_card(made.get_modelmeta().custom_metadata_map)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}", error.tip) from error
    ports = [
        tuple(Port(port.name, tuple(port.shape), port.type) for port in some)
        for some in (made.get_inputs(), made.get_outputs())
    ]
    providers = tuple(made.get_providers())
    return Session(
        path, device, providers, fallback, nodes, card, ports[0], ports[1], binding, cuda_graph, made
    )  # fmt: skip


def _assignment(made: Any) -> tuple[dict[str, int], Counter[str]]:
    """Nodes by provider, and the heavy operations among the CPU's."""
    nodes: Counter[str] = Counter()
    heavy: Counter[str] = Counter()
    for part in made.get_provider_graph_assignment_info():
        operations = [node.op_type for node in part.get_nodes()]
        nodes[part.ep_name] += len(operations)
        if part.ep_name == CPU:
            heavy.update(operation for operation in operations if operation in HEAVY)
    return dict(nodes), heavy
