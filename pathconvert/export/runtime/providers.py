"""Open ONNX Runtime sessions on a device, and explain why a device cannot be used.

When a provider does not load, ONNX Runtime only logs it and runs on the CPU. Here, a device that
was asked for is either used, or refused with the name of the missing library; only ``auto`` falls
back to the CPU, and the session says why. Whether a device works is read off the session and the
nodes that were assigned to it, because ``get_available_providers()`` only lists what the package
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import onnx

from pathconvert.choices import Device
from pathconvert.errors import CheckpointError, PathconvertError, RuntimeUnavailable
from pathconvert.export.card import read_card
from pathconvert.export.runtime.diagnosis import explain_load_failure
from pathconvert.export.runtime.session import RUNTIME_ERRORS, Port, Session, ort, session_options

DEVICES: tuple[str, ...] = get_args(Device)
CPU = "CPUExecutionProvider"
PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider", "cpu": CPU}
#: Operations that are expensive enough to need a GPU; cheap ones, which compute shapes, may stay on
#: the CPU.
HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul", "FusedConv")


def open_session(
    path: str | Path,
    device: str = "auto",
    threads: int | None = None,
    *,
    cuda_graph: bool = False,
    io_binding: bool = False,
    optimize: bool = True,
    take_turns: bool = False,
    tf32: bool = True,
) -> Session:
    """Load an ``.onnx`` file.

    Args:
        path: the file.
        device: auto (a GPU if one works, else the CPU), cuda, tensorrt or cpu.
        threads: number of CPU threads; None for ONNX Runtime's default of one per core.
        cuda_graph: capture the kernels once and replay them. Needs fixed shapes and all nodes on
            the GPU; implies ``io_binding``.
        io_binding: keep inputs and outputs on the device (see :meth:`Session.runner`).
        optimize: whether ONNX Runtime may optimise the graph; False runs it as it is written.
        take_turns: let idle threads sleep at once, so that they do not slow down other sessions
            that run in turn.
        tf32: whether CUDA may round the factors of float32 products to 10 bits, as ONNX Runtime
            does by default. A comparison with float32's own noise needs False.

    Raises:
        CheckpointError: the file is missing or damaged, is not an ONNX file, or is newer than this
            ONNX Runtime.
        RuntimeUnavailable: the device that was asked for cannot be used; the message names the
            reason.
    """
    path = Path(path)
    require_device(device)
    if cuda_graph and device == "cpu":
        raise RuntimeUnavailable(
            "CUDA graphs need a GPU, but the device is cpu", "Leave --cuda-graph out."
        )
    options = _options(threads, optimize=optimize, take_turns=take_turns)
    missing = ""
    if device != "cpu":
        chosen = "cuda" if device == "auto" else device
        made, missing = _on_gpu(path, chosen, options, cuda_graph=cuda_graph, tf32=tf32)
        if made is not None:
            return _session(
                path, chosen, made, None, io_binding=io_binding or cuda_graph, cuda_graph=cuda_graph
            )
        if device != "auto":
            raise _unavailable(chosen, missing)
        if cuda_graph:
            raise RuntimeUnavailable(
                f"CUDA graphs need a GPU: {missing}", "Leave --cuda-graph out."
            )
    made, _ = _load(path, options, [CPU])
    fallback = f"CUDA: {missing}" if missing else None
    return _session(path, "cpu", made, fallback, io_binding=io_binding, cuda_graph=False)


def require_device(device: str) -> None:
    """Refuse a word that names no device.

    Raises:
        RuntimeUnavailable: it is not in :data:`DEVICES`, which the tip lists.
    """
    if device not in DEVICES:
        raise RuntimeUnavailable(
            f"there is no device {device!r}", f"Devices: {', '.join(DEVICES)}."
        )


def require_size(session: Session, size: tuple[int, ...]) -> None:
    """Refuse an input so small that a feature map would be empty.

    A kernel would divide by zero and end the process.

    Args:
        session: the network; its file is read again.
        size: size of one input, without the batch dimension. It is not checked if the graph fixes
            all sides.

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
    too_small = PathconvertError(
        f"{session.path} does not take inputs as small as {text}", "Give a larger --input-size."
    )
    try:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise too_small from error
    for info in (*inferred.graph.value_info, *inferred.graph.output):
        if any(
            dim.HasField("dim_value") and dim.dim_value <= 0
            for dim in info.type.tensor_type.shape.dim
        ):
            raise too_small


def _options(threads: int | None, *, optimize: bool, take_turns: bool) -> Any:
    options = session_options(threads)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if take_turns:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _on_gpu(
    path: Path, device: str, options: Any, *, cuda_graph: bool, tf32: bool
) -> tuple[Any | None, str]:
    """Open a session on the GPU.

    Returns:
        The session and an empty text; or None and the reason why the GPU cannot be used.
    """
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
        _load(path, options, [CPU])  # raises if the file is the cause
        return None, _reason(f"{error} {printed.getvalue()}")
    if PROVIDERS[device] not in made.get_providers():
        return None, _reason(f"{log} {printed.getvalue()}")
    return made, ""


class _ProviderFailed(Exception):
    """ONNX Runtime failed with a GPU provider.

    Loading on the CPU shows whether the file is the cause.
    """


def _load(path: Path, options: Any, providers: list[Any]) -> tuple[Any, str]:
    """Load a file.

    Returns:
        The session, and what ONNX Runtime logged while it was made.

    Raises:
        _ProviderFailed: ONNX Runtime failed with a provider other than the CPU's.
        CheckpointError: ONNX Runtime cannot load the file on the CPU.
    """
    with _stderr_held() as log:
        try:
            session = ort.InferenceSession(
                str(path), options, providers=providers, enable_fallback=False
            )
        except RUNTIME_ERRORS as error:
            if providers != [CPU]:
                raise _ProviderFailed(f"{log.text()} {error}") from None
            raise explain_load_failure(path, error) from None
        return session, log.text()


def _reason(log: str) -> str:
    """The missing library that ONNX Runtime's log names, or else what the log says."""
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
    return text.strip()[:300] or "ONNX Runtime does not say why"


def _unavailable(device: str, reason: str) -> RuntimeUnavailable:
    """The refusal of a device, with the tip that fits the reason."""
    if "libcuda.so" in reason or "nvcuda" in reason:
        tip = "Install NVIDIA's driver, or run on --device cpu."
    elif "libnvinfer" in reason or "nvinfer" in reason:
        tip = "Install TensorRT and put its libraries on LD_LIBRARY_PATH, or use --device cuda."
    elif "missing" in reason:
        tip = (
            "Install CUDA's libraries: pip install 'onnxruntime-gpu[cuda,cudnn]'; "
            "or run on --device cpu."
        )
    elif "this build" in reason:
        tip = (
            "Run pip uninstall onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]'; "
            "or run on --device cpu."
        )
    else:
        tip = "Run on --device cpu."
    return RuntimeUnavailable(f"ONNX Runtime cannot use {device}: {reason}", tip)


class _Held:
    """What has been written to file descriptor 2 so far."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def text(self) -> str:
        self._file.seek(0)
        text: str = self._file.read().decode(errors="replace")
        return text


@contextlib.contextmanager
def _stderr_held() -> Iterator[_Held]:
    """Capture what C++ code writes to stderr: ONNX Runtime names a missing library nowhere else."""
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


def _session(
    path: Path, device: str, made: Any, fallback: str | None, *, io_binding: bool, cuda_graph: bool
) -> Session:
    """Put a session together.

    Raises:
        RuntimeUnavailable: the GPU runs none of the nodes.
        CheckpointError: the file's card is damaged or too new.
    """
    nodes, left = _assignment(made)
    provider = PROVIDERS[device]
    gpu = {name for name in PROVIDERS.values() if name != CPU}
    if device != "cpu" and nodes and not gpu & set(nodes):
        raise RuntimeUnavailable(
            f"{provider} has no kernel for any node of {path}", "Run on --device cpu."
        )
    if device != "cpu" and left:
        counts = ", ".join(f"{count} {operation}" for operation, count in left.items())
        fallback = f"the CPU runs {left.total()} heavy nodes: {counts}"
    try:
        card = read_card(made.get_modelmeta().custom_metadata_map)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}", error.tip) from error
    return Session(
        path=path,
        device=device,
        providers=tuple(made.get_providers()),
        fallback=fallback,
        nodes=nodes,
        card=card,
        inputs=_ports(made.get_inputs()),
        outputs=_ports(made.get_outputs()),
        io_binding=io_binding,
        cuda_graph=cuda_graph,
        inference=made,
    )


def _ports(described: Sequence[Any]) -> tuple[Port, ...]:
    return tuple(Port(port.name, tuple(port.shape), port.type) for port in described)


def _assignment(made: Any) -> tuple[dict[str, int], Counter[str]]:
    """How the nodes of a session were assigned.

    Returns:
        Execution provider → number of nodes; and heavy operation → number of nodes that the CPU
        runs.
    """
    nodes: Counter[str] = Counter()
    heavy: Counter[str] = Counter()
    for part in made.get_provider_graph_assignment_info():
        operations = [node.op_type for node in part.get_nodes()]
        nodes[part.ep_name] += len(operations)
        if part.ep_name == CPU:
            heavy.update(operation for operation in operations if operation in HEAVY)
    return dict(nodes), heavy
