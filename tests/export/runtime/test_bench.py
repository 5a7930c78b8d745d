"""Timing: the turns, the ratios, and which networks can be compared.

Speeds themselves are not tested.
"""

# ruff: noqa: ARG001 - fixtures are asked for what they do: `here` is the current folder

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from onnx import TensorProto
from onnx_files import needs_cuda_provider, save_linear
from sample_networks import network

from pathconvert.cli import run
from pathconvert.errors import PathconvertError, RuntimeUnavailable
from pathconvert.export.runtime import bench, engines
from pathconvert.export.runtime.bench import measure, quartiles, time_engines, turns_of
from pathconvert.export.runtime.engines import Engine

GPU = torch.cuda.is_available()
BUILDER = """
from torch import nn

def tiny(num_classes=5):
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *head)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with ``a.onnx`` and ``tiny.pt`` (built by ``builders:tiny``), which both take inputs
    of 3x4x4.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(bench, "TURN_SECONDS", 1e-4)
    save_linear(tmp_path / "a.onnx")
    (tmp_path / "builders.py").write_text(BUILDER)
    namespace: dict = {}
    exec(BUILDER, namespace)
    torch.manual_seed(0)
    torch.save(namespace["tiny"]().state_dict(), tmp_path / "tiny.pt")
    return tmp_path


TINY = [
    "--arch",
    "builders:tiny",
    "--input-size",
    "3x4x4",
    "--repeats",
    "3",
    "--threads",
    "1",
    "--device",
    "cpu",
]


class Clock:
    """A clock that only moves while a timed call runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bench, "time", clock)
    monkeypatch.setattr(bench, "TURN_SECONDS", 0.25)  # powers of two, so that nothing is rounded
    return clock


def worker(name: str, seconds: float, clock: Clock, calls: list[str]) -> Engine:
    """An engine that takes ``seconds`` per image, and notes that it was called."""

    def start(batch: np.ndarray):
        def call() -> None:
            calls.append(name)
            clock.now += seconds * len(batch)

        return call

    return Engine(
        name, "torch eager", "cpu", torch.nn.Identity(), (1,), None, run=np.abs, runner=start
    )


def test_everyone_has_a_turn_in_every_round(clock):
    calls: list[str] = []
    workers = [worker(name, bench.TURN_SECONDS, clock, calls) for name in "ab"]
    turns = turns_of([one.runner(np.zeros((1, 1))) for one in workers], rounds=6)
    assert [len(own) for own in turns] == [6, 6]
    warm = ["a"] * bench.WARM_UP + ["b"] * bench.WARM_UP
    assert calls[: len(warm)] == warm
    # every engine has an untimed and a timed call (one call fills a turn); the order varies
    rest = "".join(calls[len(warm) :])
    assert {rest[i : i + 4] for i in range(0, len(rest), 4)} == {"aabb", "bbaa"}
    assert len(rest) == 6 * 4


def test_a_quick_call_fills_its_turn(clock):
    calls: list[str] = []
    (turns,) = turns_of(
        [worker("a", bench.TURN_SECONDS / 8, clock, calls).runner(np.zeros((1, 1)))], rounds=1
    )
    assert turns == [bench.TURN_SECONDS / 8]
    assert len(calls) == bench.WARM_UP + 1 + 8


def test_ratios_are_of_one_round(clock):
    calls: list[str] = []
    workers = [worker("a", 0.25, clock, calls), worker("b", 0.5, clock, calls)]
    first, second = time_engines(workers, 2, (1,), rounds=3)
    assert (first.ratio, first.ratio_low, first.ratio_high) == (1, 1, 1)
    assert (second.ratio, second.ratio_low, second.ratio_high) == (2, 2, 2)
    assert (first.low_ms, first.median_ms, first.high_ms, first.fastest_ms, first.first_ms) == (
        500,
    ) * 5
    assert (first.throughput, second.throughput) == (4, 2)


def test_quartiles():
    assert quartiles([3.0]) == (3, 3, 3)
    assert quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2, 3, 4)


def test_a_file_and_a_checkpoint(here, capsys):
    before = torch.get_num_threads()
    assert run(["bench", "a.onnx", "tiny.pt", "--batch", "1,2", "--json", *TINY]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    places = [(t["source"], t["engine"], t["device"], t["batch"]) for t in result["timings"]]
    assert places == [
        (source, engine, "cpu", batch)
        for batch in (1, 2)
        for source, engine in (("a.onnx", "onnxruntime"), ("tiny.pt", "torch eager"))
    ]
    assert all(t["median_ms"] > 0 and t["ratio"] > 0 for t in result["timings"])
    assert (result["threads"], result["rounds"], result["input_size"]) == (1, 3, [3, 4, 4])
    assert result["fallbacks"] == {}
    assert printed.err == ""
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("ms", [(0.011, 0.012, 0.013), (1111.0, 2222.0, 3333.0)])
@pytest.mark.parametrize("columns", [20, 40, 60, 80, 200])
def test_the_table(here, capsys, monkeypatch, columns, ms):
    """The title is always one line, and no word or number is cut off on a narrow terminal."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(bench, "quartiles", lambda _: ms)
    assert run(["bench", "a.onnx", "tiny.pt", *TINY]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    wide = columns >= 80
    assert title == f"3x4x4, cpu, 1 threads, 3 turns: median{' (quartiles)' if wide else ''}"
    assert any("quartiles" in line for line in lines) == wide
    if columns >= 80:
        assert max(map(len, lines)) <= columns
    words = " ".join(lines).split()
    number = "0.0120" if ms[1] < 1 else "2222"
    assert [words.count(word) for word in ("onnxruntime", "torch", "eager", number)] == [2, 2, 2, 8]


def test_a_long_name_takes_the_quartiles_place(here, capsys):
    """In 80 columns, a file's name stays on one line."""
    name = "resnet50.path-bn.onnx"
    shutil.copy("a.onnx", name)
    assert run(["bench", name, "tiny.pt", *TINY]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(f" {name} " in line for line in lines) == 2
    assert "quartiles" not in " ".join(lines)
    assert lines[0] == "3x4x4, cpu, 1 threads, 3 turns: median"
    assert max(map(len, lines)) <= 80


def test_options_of_a_checkpoint(here, capsys):
    torch.save({"ema": torch.load("tiny.pt"), "model": {}}, "wrapped.pt")
    assert run(["bench", "wrapped.pt", "--key", "ema", "--num-classes", "5", *TINY, "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "wrapped.pt: taking the weights under 'ema'\n"
    assert {t["engine"] for t in json.loads(printed.out)["timings"]} == {"torch eager"}
    assert run(["bench", "a.onnx", "--key", "ema", "--device", "cpu"]) == 2
    assert (
        capsys.readouterr().err
        == "error: --key is for checkpoints, but a.onnx is an ONNX file\ntip: Leave --key out.\n"
    )


@pytest.mark.skipif(GPU, reason="asks for a GPU where there is none")
def test_without_a_gpu(here, capsys):
    assert run(["bench", "a.onnx", "--repeats", "2", "--json"]) == 0
    printed = capsys.readouterr()
    (fallback,) = json.loads(printed.out)["fallbacks"].values()
    assert fallback.startswith("CUDA: the library ")
    assert printed.err == f"note: a.onnx (onnxruntime) runs on the CPU: {fallback}\n"
    assert run(["bench", "a.onnx", "--device", "cuda"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ONNX Runtime cannot use cuda: the library ")
    with pytest.raises(
        RuntimeUnavailable, match="squeezenet1_1 cannot run on cuda: torch finds no GPU here"
    ):
        engines.torch_engine("squeezenet1_1", loaded("squeezenet1_1"), "cuda")


def loaded(name: str):
    """A torchvision network as ``open_network`` gives it, without its weights."""
    from pathconvert.networks.architectures import Architecture
    from pathconvert.networks.loading import LoadedNetwork

    return LoadedNetwork(
        network(name), Architecture(name, {}, (3, 64, 64), "classification"), None, ()
    )


def test_compile_adds_a_row(here, monkeypatch):
    # compiling takes longer than all tests here
    monkeypatch.setattr(engines.torch, "compile", lambda model: model)
    report = measure(
        ["sq"],
        [1],
        device="cpu",
        threads=1,
        rounds=1,
        compile=True,
        load=lambda _: loaded("squeezenet1_1"),
    )
    assert [t.engine for t in report.timings] == ["torch eager", "torch.compile"]


def test_a_compiler_that_fails(here, monkeypatch):
    def fail(_: torch.Tensor) -> None:
        raise RuntimeError("no C++ compiler\nand so on")

    monkeypatch.setattr(engines.torch, "compile", lambda _: fail)
    with pytest.raises(PathconvertError, match=r"^torch.compile fails on sq: no C\+\+ compiler$"):
        measure(
            ["sq"],
            [1],
            device="cpu",
            threads=1,
            rounds=1,
            compile=True,
            load=lambda _: loaded("squeezenet1_1"),
        )


def test_fixed_batches(here):
    save_linear(here / "two.onnx", (2, 3, 4, 4))
    report = measure(["two.onnx", "a.onnx"], device="cpu", threads=1, rounds=1)
    assert [t.batch for t in report.timings] == [2, 2]
    with pytest.raises(PathconvertError, match=r"two.onnx only takes batches of 2, not of 1"):
        measure(["a.onnx", "two.onnx"], [1], device="cpu")


def test_uint8_beside_float(here):
    save_linear(here / "bytes.onnx", kind=TensorProto.UINT8)
    assert (
        len(measure(["a.onnx", "bytes.onnx"], [1], device="cpu", threads=1, rounds=1).timings) == 2
    )


def test_free_sizes(here):
    save_linear(here / "free.onnx", ("batch", 3, "height", "width"))
    with pytest.raises(PathconvertError, match=r"^free.onnx takes inputs of any size \(3x\?x\?\)$"):
        measure(["free.onnx"], device="cpu")
    assert measure(["free.onnx"], [1], device="cpu", rounds=1, input_size=(3, 6, 6)).input_size == (
        3,
        6,
        6,
    )
    assert measure(["free.onnx", "a.onnx"], [1], device="cpu", rounds=1).input_size == (3, 4, 4)


def test_networks_of_other_sizes(here):
    save_linear(here / "b.onnx", ("batch", 3, 8, 8))
    with pytest.raises(
        PathconvertError, match=r"^b.onnx takes inputs of size 3x8x8; a.onnx says 3x4x4$"
    ):
        measure(["a.onnx", "b.onnx"], device="cpu")
    with pytest.raises(
        PathconvertError, match=r"^a.onnx takes inputs of size 3x4x4; --input-size says 3x8x8$"
    ):
        measure(["a.onnx", "b.onnx"], device="cpu", input_size=(3, 8, 8))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["a.onnx", "--batch", "x"], "error: 'x' is not a list of batch sizes"),
        (["a.onnx", "--batch", "0"], "error: '0' is not a list of batch sizes"),
        (
            ["none.onnx", "--device", "cpu"],
            "error: none.onnx does not exist; expected an ONNX file.",
        ),
        (
            ["tiny.pt", "--cuda-graph"],
            "error: --cuda-graph needs ONNX Runtime, and none of the networks is an .onnx file",
        ),
        (
            ["nosuchnet"],
            (
                "error: nosuchnet is neither a file here nor a torchvision network that pathconvert"
                " knows."
            ),
        ),
    ],
)
def test_refusals(here, arguments, line, capsys):
    assert run(["bench", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[0] == line


def test_help_has_an_example(capsys):
    assert run(["bench", "--help"]) == 0
    assert "Example: pathconvert bench" in " ".join(capsys.readouterr().out.split())


@needs_cuda_provider
@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"io_binding": True}, {"cuda_graph": True}])
def test_on_a_gpu(here, options):
    report = measure(
        ["a.onnx", "sq"],
        [1, 2],
        device="cuda",
        rounds=2,
        input_size=(3, 4, 4),
        load=lambda _: tiny(),
        **options,
    )
    assert {t.device for t in report.timings} == {"cuda"}
    assert not report.fallbacks


def tiny():
    from pathconvert.networks.loading import open_network

    return open_network("tiny.pt", arch="builders:tiny", input_size=(3, 4, 4))
