"""Real trained networks, from the folder that PATHCONVERT_DATA names (its README says what they
are).
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pathconvert.conversion.equivalence import forward_outputs, verify
from pathconvert.conversion.reparameterize import Conversion, convert_traced
from pathconvert.conversion.tracing.parts import Traced, trace_network
from pathconvert.export.graph.balancing import _largest_results, balanced
from pathconvert.export.graph.folding import fold
from pathconvert.export.graph.loaded import export_network
from pathconvert.export.runtime.predict import predict
from pathconvert.export.runtime.providers import open_session
from pathconvert.networks import checked
from pathconvert.networks.images import folder_images
from pathconvert.networks.inputs import load_images, random_input
from pathconvert.networks.loading import LoadedNetwork, load, open_network
from pathconvert.networks.saving import save
from pathconvert.path_bn.entering import to_path_bn
from pathconvert.path_bn.restoring import restore
from pathconvert.training.run.begin import begin
from pathconvert.training.settings import Settings

DATA = os.environ.get("PATHCONVERT_DATA")
pytestmark = pytest.mark.skipif(
    DATA is None,
    reason=(
        "PATHCONVERT_DATA names no folder with weights/ and images/: real weights are not tested"
    ),
)
COMBINATIONS = [
    (scope, pivot, gauge)
    for scope in ("block", "network")
    for pivot in ("matching", "max", "diagonal")
    for gauge in ("unit", "pow2")
]


@dataclass(frozen=True)
class Real:
    """A trained network, its trace, and labelled images as it takes them."""

    network: LoadedNetwork
    traced: Traced
    images: Tensor
    labels: Tensor

    def convert(self, scope: str, pivot: str, gauge: str) -> Conversion:
        return convert_traced(self.network.model, self.traced, scope, pivot, gauge)


def weights(name: str) -> Path:
    assert DATA is not None
    return Path(DATA).resolve() / "weights" / name


def prepare(network: LoadedNetwork, folder: str) -> Real:
    assert DATA is not None
    paths = folder_images(Path(DATA).resolve() / "images" / folder)
    labels = torch.tensor([int(path.stem.rpartition("_")[2]) for path in paths])
    traced = trace_network(network.model, random_input(network.architecture))
    return Real(
        network, traced, load_images(paths, network.architecture, network.preprocessing), labels
    )


@pytest.fixture(scope="module")
def squeezenet() -> Real:
    return prepare(open_network(weights("squeezenet1_1.pth")), "imagenet20")


@pytest.fixture(scope="module")
def builder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the module that builds the CIFAR-10 network, as the data's README gives it."""
    assert DATA is not None
    text = (Path(DATA) / "README.md").read_text()
    folder = tmp_path_factory.mktemp("builder")
    (folder / "cifar_network.py").write_text(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0])
    return folder


@pytest.fixture(scope="module")
def resnet56(builder_folder: Path) -> Real:
    sys.path.insert(0, str(builder_folder))
    network = open_network(
        weights("resnet56_cifar10.pth"), arch="cifar_network:CifarResNet", input_size=(3, 32, 32)
    )
    return prepare(network, "cifar10_20")


@pytest.fixture
def real(request: pytest.FixtureRequest) -> Real:
    found: Real = request.getfixturevalue(request.param)
    return found


both = pytest.mark.parametrize("real", ["squeezenet", "resnet56"], indirect=True)


def test_squeezenet_is_recognised(squeezenet: Real) -> None:
    architecture = squeezenet.network.architecture
    assert (architecture.name, architecture.arguments) == ("squeezenet1_1", {"num_classes": 1000})
    assert architecture.input_size == (3, 224, 224)


@pytest.mark.parametrize(
    ("real", "correct"), [("squeezenet", 14), ("resnet56", 19)], indirect=["real"]
)
def test_the_images_fit_the_weights(real: Real, correct: int) -> None:
    """Of 20: what the published accuracies let expect. Else the tests below would compare noise."""
    assert (
        int((forward_outputs(real.network.model, real.images)[0].argmax(1) == real.labels).sum())
        == correct
    )


@both
def test_all_twelve_combinations(real: Real) -> None:
    original = real.network.model
    state = original.state_dict()
    expected = forward_outputs(original, real.images)[0]
    reference = forward_outputs(original, real.images, dtype=torch.float64)[0]
    noise = float((expected - reference).abs().max())
    ratios = []
    for scope, pivot, gauge in COMBINATIONS:
        conversion = real.convert(scope, pivot, gauge)
        output = forward_outputs(conversion.model, real.images)[0]
        ratios.append(float((output - reference).abs().max()) / noise)
        assert torch.equal(output.argmax(1), expected.argmax(1)), (scope, pivot, gauge)
        restored = restore(conversion.model, conversion.record).state_dict()
        for name, tensor in state.items():
            if gauge == "pow2":
                assert torch.equal(restored[name], tensor), name
            elif tensor.is_floating_point():
                steps = (restored[name].view(torch.int32) - tensor.view(torch.int32)).abs()
                assert int(steps.max()) <= 2, name
        if gauge == "pow2":
            assert torch.equal(output, expected), (scope, pivot)
    assert max(ratios) <= 4, ratios
    assert float(np.median(ratios)) <= 2, ratios


@pytest.mark.parametrize(
    ("real", "pivot", "smallest", "median"),
    [
        (
            "squeezenet",
            "diagonal",
            2.7e-6,
            0.044,
        ),  # docs/design.md says 0.043: without the channels held back it is
        ("squeezenet", "max", 1.3e-4, 0.22),
        ("squeezenet", "matching", 1.3e-4, 0.21),
        ("resnet56", "diagonal", 2.3e-4, 0.048),
        ("resnet56", "max", 7.0e-3, 0.24),
        ("resnet56", "matching", 2.6e-3, 0.18),
    ],
    indirect=["real"],
)
def test_pivot_magnitudes_are_the_measured_ones(
    real: Real, pivot: str, smallest: float, median: float
) -> None:
    """docs/design.md's table, scope block: all pivots, those of channels that float32 held back
    included.
    """
    value = np.abs(real.convert("block", pivot, "unit").pivots.value)
    value = value[value > 0]
    assert f"{value.min():.1e}" == f"{smallest:.1e}"
    assert f"{np.median(value):.2g}" == f"{median:.2g}"


@both
def test_only_diagonals_have_to_be_recentred(real: Real) -> None:
    """26 diagonals of 0.04 in a row make 1e-36, and those of a residual network 1e-13."""
    for pivot in ("matching", "max", "diagonal"):
        conversion = real.convert("network", pivot, "unit")
        counts = conversion.counts()
        assert counts["channels_held_back"] == counts["channels_near_dead"] == 0
        assert conversion.exponents().any() == (pivot == "diagonal")
        assert np.abs(np.log2(conversion.scales)).max() <= 40


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("gauge", ["unit", "pow2"])
def test_other_dtypes(real: Real, dtype: torch.dtype, gauge: str, tmp_path: Path) -> None:
    """A checkpoint in another dtype converts, is saved in that dtype, loads, and equals its
    source.
    """
    state = {
        k: v.to(dtype) if v.is_floating_point() else v
        for k, v in real.network.model.state_dict().items()
    }
    torch.save(state, tmp_path / "net.pt")
    own = real.network.architecture
    arch = {"arch": own.name, "input_size": own.input_size} if ":" in own.name else {}
    source = open_network(tmp_path / "net.pt", **arch)
    conversion = convert_traced(
        source.model, trace_network(source.model, random_input(own)), "block", "matching", gauge
    )
    assert conversion.counts()["channels_rescaled"] > 0
    checked.save_checked(conversion, source, tmp_path / "net.path.safetensors", force=False)
    written = open_network(tmp_path / "net.path.safetensors")
    assert {name: tensor.dtype for name, tensor in written.model.state_dict().items()} == {
        name: tensor.dtype for name, tensor in source.model.state_dict().items()
    }
    report = verify(source.model, written.model, real.images[:4])
    assert report.passed, report
    if gauge == "pow2":
        # In float16 arithmetic activations below 2^-14 / factor are subnormal and lose bits,
        # whatever the weights do.
        wider = torch.float32 if dtype == torch.float16 else dtype
        models = (source.model, written.model)
        assert all(
            map(
                torch.equal,
                *(forward_outputs(model, real.images[:4], dtype=wider) for model in models),
            )
        )
    restored = restore(written.model, written.record).state_dict()
    if gauge == "pow2":
        assert all(torch.equal(restored[name], tensor) for name, tensor in state.items())


@both
def test_saved_through_the_api(real: Real, tmp_path: Path) -> None:
    conversion = real.convert("network", "matching", "unit")
    save(conversion, tmp_path / "net.path.safetensors")
    own = real.network.architecture
    model, record = load(
        tmp_path / "net.path.safetensors", **({"arch": own.name} if ":" in own.name else {})
    )
    assert record == conversion.record
    assert all(
        map(torch.equal, model.state_dict().values(), conversion.model.state_dict().values())
    )


@both
def test_checkpoint_to_onnx_runtime(real: Real, tmp_path: Path) -> None:
    """Checkpoint → path → Path-BN → ONNX → ONNX Runtime: top-1 stays on every image, in fp32 and
    fp16.
    """
    expected = forward_outputs(real.network.model, real.images)[0].argmax(1)
    m = to_path_bn(
        real.convert("block", "matching", "unit"), real.images[:1], calibration=real.images
    )
    equality = checked.save_checked(
        m, real.network, tmp_path / "net.path-bn.safetensors", force=False
    )
    assert equality.passed, equality
    own = real.network.architecture
    arch = {"arch": own.name, "input_size": own.input_size} if ":" in own.name else {}
    network = open_network(tmp_path / "net.path-bn.safetensors", **arch)
    assert network.form == "path-bn"
    # path space has channels of any scale
    for precision, gauge in (
        ("fp32", "keep"),
        ("fp16", "balanced"),
    ):
        path = tmp_path / f"{precision}.onnx"
        report, card = export_network(network, path, precision=precision, gauge=gauge)
        assert (card.form, report.batch_norms_left) == ("path-bn", 0)
        (output,) = open_session(path, "cpu").run(real.images.numpy())
        assert output.argmax(1).tolist() == expected.tolist(), precision


@both
def test_the_balanced_gauge_on_a_real_network(real: Real) -> None:
    """Path space has channels of any scale.

    Balanced, they lie closer, and float32's outputs stay to the bit.
    """
    folded = fold(real.convert("network", "matching", "unit").model, real.images[:1]).float()
    even = balanced(folded, real.images[:1], real.images)
    with torch.no_grad():
        assert torch.equal(even(real.images), folded(real.images))
    spread = [_spread(model, real.images) for model in (folded, even)]
    assert spread[1] < spread[0] / 4, spread
    assert spread[1] <= 16, spread


def _spread(model: torch.nn.Module, images: Tensor) -> float:
    """Binades between the 5th and the 95th percentile of the channels' largest |results|."""
    peaks = torch.cat(list(_largest_results(model, (images,)).values()))
    low, high = torch.quantile(peaks[peaks > 0], torch.tensor([0.05, 0.95], dtype=peaks.dtype))
    return float((high / low).log2())


@both
def test_every_form_predicts_the_same(real: Real, tmp_path: Path) -> None:
    """`predict` on the checkpoint, its Path-BN file and the .onnx made of that: same class for
    every image.
    """
    own = real.network.architecture
    arch = {"arch": own.name, "input_size": own.input_size} if ":" in own.name else {}
    m = to_path_bn(
        real.convert("block", "matching", "unit"), real.images[:1], calibration=real.images
    )
    checked.save_checked(m, real.network, tmp_path / "net.path-bn.safetensors", force=False)
    export_network(
        open_network(tmp_path / "net.path-bn.safetensors", **arch), tmp_path / "net.onnx"
    )
    assert real.network.checkpoint is not None
    folder = Path(DATA or "") / "images" / ("cifar10_20" if arch else "imagenet20")

    def classes(path: Path) -> list[int]:
        report = predict(path, [folder], 1, "cpu", load=lambda source: open_network(source, **arch))
        return [prediction.classes[0].index for prediction in report.predictions]

    files = (
        real.network.checkpoint.path,
        tmp_path / "net.path-bn.safetensors",
        tmp_path / "net.onnx",
    )
    found = [classes(path) for path in files]
    assert len(found[0]) == 20
    assert found[0] == found[1] == found[2]


def test_path_bn_trains_as_batch_norm_does(resnet56: Real) -> None:
    """Training-mode loss on the calibration images: within 1 %, though the running statistics are
    of 50 000 others.
    """
    model = resnet56.network.model
    m = to_path_bn(model, resnet56.images, calibration=resnet56.images)
    outputs = [forward_outputs(one, resnet56.images, training=True)[0] for one in (model, m)]
    losses = [
        float(torch.nn.functional.cross_entropy(output, resnet56.labels)) for output in outputs
    ]
    assert abs(losses[1] / losses[0] - 1) < 0.01, losses


def test_fine_tuning_on_other_images(resnet56: Real, tmp_path: Path) -> None:
    """CIFAR-10's network on Fashion-MNIST: it knows nothing of it at first, and much after twenty
    steps.
    """
    settings = Settings(
        data=f"fashion-mnist:{DATA}",
        steps=20,
        batch_size=32,
        limit_train=640,
        limit_val=200,
        calibration_images=64,
    )
    run = begin(resnet56.network, settings, tmp_path / "run", device="cpu")
    before = run.validate()
    assert before.top1 < 0.3
    result = run.train()
    assert result.best["val_top1"] > before.top1 + 0.2
    assert result.shortened == 0
    report, _ = export_network(open_network(tmp_path / "run"), tmp_path / "m.onnx")
    assert report.noise_ratio < 8
