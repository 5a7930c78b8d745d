"""Path-BN form: entering it, leaving it, and its effect on training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from path_bn_networks import (
    GEOMETRIES,
    draw,
    error,
    geometry,
    layers,
    output,
    randomised,
    resnet_and_images,
    with_statistics_of,
)
from reference.path_bn import path_bn
from sample_networks import narrow_classifier, network
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pathconvert
from pathconvert.errors import RecordError
from pathconvert.path_bn.layer import PathBN

COMBINATIONS = [
    (scope, pivot, gauge)
    for scope in ("block", "network")
    for pivot in ("matching", "max", "diagonal")
    for gauge in ("unit", "pow2")
]


@pytest.mark.parametrize("pivot", ["matching", "max", "diagonal"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_geometry_keeps_the_function_both_ways(name: str, pivot: str) -> None:
    model, x = geometry(name)
    model = with_statistics_of(model, x)
    conversion = pathconvert.reparameterize(model, x, pivot=pivot)
    m = pathconvert.to_path_bn(conversion, x, calibration=x)
    assert list(layers(m)) == ["3"]
    assert error(output(m, x), output(model, x)) < 1e-10
    assert error(output(m, x, training=True), output(model, x, training=True)) < 1e-10
    left = pathconvert.leave_path_bn(m)
    assert error(output(left, x), output(model, x)) < 1e-10
    assert {k: v.shape for k, v in left.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    assert error(output(pathconvert.restore(left, conversion.record), x), output(model, x)) < 1e-10


@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name != "no bias"])
def test_without_batch_norm(name: str) -> None:
    """Path-BN for layers without BatchNorm; leaving folds it into weight and bias."""
    model, x = geometry(name, bn=False)
    model = with_statistics_of(model, x)
    m = pathconvert.to_path_bn(model, x, calibration=x)
    assert list(layers(m)) == ["3"]
    assert error(output(m, x), output(model, x)) < 1e-10
    assert error(output(m, x, training=True), output(m, x)) < 1e-10
    var = layers(m)["3"].bn.running_var  # 0 for a row that has only a pivot
    assert (
        var[var > 0].log2().abs() <= 1 + 1e-9
    ).all()  # near 1, so that eps is small compared to it
    with torch.no_grad():
        for module in layers(m).values():  # as training does
            module.bn.bias.add_(draw(len(module.bn.bias)))
            module.bn.weight.mul_(1.5)
    left = pathconvert.leave_path_bn(m)
    assert list(left.state_dict()) == list(model.state_dict())
    assert error(output(left, x), output(m, x)) < 1e-10


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name not in ("same", "3d")])
def test_against_the_formula(name: str, training: bool) -> None:
    """PBN eq. 8-10 literally, in both modes, with λ other than 1."""
    model, x = geometry(name)
    m = pathconvert.to_path_bn(model, x, calibration=x, skip_scale=0.3)
    module = m[3].train(training)
    z = draw(2, 6, *(7,) * (module.weight.dim() - 2), seed=3)
    conv = GEOMETRIES[name]
    with torch.no_grad():
        assert error(copy.deepcopy(module)(z), path_bn(z, module, conv, training)) < 1e-10


@pytest.mark.parametrize(("scope", "pivot", "gauge"), COMBINATIONS)
@pytest.mark.parametrize("skip_scale", [1.0, 0.1])
def test_every_combination(scope: str, pivot: str, gauge: str, skip_scale: float) -> None:
    """ResNet-18 with positive, negative, tiny and zero γ."""
    model, x = network("resnet18", torch.float64), draw(2, 3, 64, 64)
    conversion = pathconvert.reparameterize(model, x, scope, pivot, gauge)
    m = pathconvert.to_path_bn(conversion, x, skip_scale=skip_scale)
    count = {"block": 8, "network": 11}[scope]
    assert len(layers(m)) == count
    assert error(output(m, x), output(model, x)) < 1e-10
    left = pathconvert.leave_path_bn(m)
    assert error(output(left, x), output(model, x)) < 1e-10
    assert error(output(pathconvert.restore(m, m.path_record), x), output(model, x)) < 1e-10
    if gauge == "unit":
        values = torch.cat([module.pivot_value for module in layers(m).values()])
        powers = values.abs().log2()
        assert torch.equal(powers, powers.round())  # ±1, or where factors are recentred, ±2^k
        assert pivot == "diagonal" or set(values.tolist()) == {1.0, -1.0}


NETWORKS = {
    "alexnet": 6, "vgg11_bn": 9, "squeezenet1_1": 16, "densenet121": 119, "googlenet": 29,
    "inception_v3": 59,
    "shufflenet_v2_x0_5": 52, "mnasnet0_5": 36, "regnet_x_400mf": 45, "regnet_y_400mf": 49,
    "r3d_18": 8,
    "fcn_resnet50": 33, "resnext50_32x4d": 33,
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    """All families, with calibration images.

    DenseNet's second convolutions have neither BatchNorm nor bias.
    """
    size = {"inception_v3": (75, 75), "r3d_18": (4, 32, 32), "vgg11_bn": (32, 32)}.get(
        name, (64, 64)
    )
    # its auxiliary head needs 299 pixels
    arguments = {"aux_logits": False} if name == "inception_v3" else {}
    model, x = network(name, torch.float64, **arguments), draw(2, 3, *size)
    if name in ("alexnet", "vgg11_bn"):
        model = narrow_classifier(model)
    m = pathconvert.to_path_bn(pathconvert.reparameterize(model, x, pivot="max"), x, calibration=x)
    assert len(layers(m)) == NETWORKS[name], m.path_record["path_bn"]["left"]
    assert error(output(m, x), output(model, x)) < 1e-10
    with torch.no_grad():
        for module in layers(m).values():  # what training changes
            module.bn.bias.add_(0.1)
    left = pathconvert.leave_path_bn(m)
    assert list(left.state_dict()) == list(model.state_dict())
    assert error(output(left, x), output(m, x)) < 1e-10


@pytest.mark.parametrize(
    ("name", "scope", "pivot", "count"),
    [
        ("squeezenet1_1", "network", "diagonal", 16), ("googlenet", "block", "diagonal", 29),
        ("shufflenet_v2_x0_5", "network", "matching", 52),
        ("mnasnet0_5", "network", "diagonal", 41),
        ("regnet_y_400mf", "network", "matching", 52), ("r3d_18", "network", "diagonal", 11),
    ],
)  # fmt: skip
def test_networks_in_other_modes(name: str, scope: str, pivot: str, count: int) -> None:
    model, x = (
        network(name, torch.float64),
        draw(2, 3, *((4, 32, 32) if name == "r3d_18" else (64, 64))),
    )
    m = pathconvert.to_path_bn(
        pathconvert.reparameterize(model, x, scope, pivot), x, calibration=x, skip_scale=0.1
    )
    assert len(layers(m)) == count
    assert error(output(m, x), output(model, x)) < 1e-10
    assert error(output(pathconvert.leave_path_bn(m), x), output(model, x)) < 1e-10


# ---- what Path-BN is for -------------------------------------------------------------------------


@pytest.fixture
def resnet() -> tuple[nn.Module, Tensor]:
    return resnet_and_images()


@pytest.mark.parametrize("factor", [1e-2, 3.0, 1e3])
def test_the_trained_weights_scale_is_free(resnet: tuple[nn.Module, Tensor], factor: float) -> None:
    """PBN Proposition 2: u → c u does not change the training-mode output, except through
    BatchNorm's eps.
    """
    model, x = resnet
    m = pathconvert.to_path_bn(model, x, calibration=x)
    before = output(m, x, training=True)
    with torch.no_grad():
        for module in layers(m).values():
            module.bn.eps = 1e-30
            module.weight.mul_(factor)
    without_eps = output(m, x, training=True)
    assert error(without_eps, before) < 1e-3
    with torch.no_grad():
        for module in layers(m).values():
            module.weight.div_(factor)
    assert error(output(m, x, training=True), without_eps) < 1e-9


def test_pivots_stay_zero_and_receive_no_gradient(resnet: tuple[nn.Module, Tensor]) -> None:
    model, x = resnet
    m = pathconvert.to_path_bn(model, x, calibration=x).train()
    optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        m(x).square().mean().backward()
        optimizer.step()
    for name, module in layers(m).items():
        places = (module.pivot_row, module.pivot_column, 1, 1)
        assert not module.weight[places].any(), name
        assert not module.weight.grad[places].any(), name
        assert module.weight.grad.abs().sum() > 0
        assert set(module.pivot_value.tolist()) <= {1.0, -1.0}
    left = pathconvert.leave_path_bn(m)
    assert error(output(left, x), output(m, x)) < 1e-10


def test_training_loss_agrees_with_the_original(resnet: tuple[nn.Module, Tensor]) -> None:
    model, x = resnet
    target = torch.arange(8) % 7
    m = pathconvert.to_path_bn(model, x, calibration=x)
    losses = [F.cross_entropy(output(one, x, training=True), target) for one in (model, m)]
    assert error(losses[1], losses[0]) < 1e-8


@pytest.mark.parametrize("kind", ["straight", "gather", "scatter"])
def test_gradients(kind: str) -> None:
    """torch's gradcheck, through batch statistics and every kind of skip."""
    conv = nn.Conv2d(3, 3, 3, padding=1, stride=2, bias=False).double()
    rows = {"straight": [0, 1, 2], "gather": [0, 2], "scatter": [1, 1, 2]}[kind]
    columns = {"straight": [0, 1, 2], "gather": [1, 0], "scatter": [0, 1, 2]}[kind]
    values = torch.tensor([1.0, -1.0, 1.0])[: len(rows)]
    values = values.abs() if kind == "straight" else values
    module = PathBN(
        conv, nn.BatchNorm2d(3).double(), torch.tensor(rows), torch.tensor(columns), values, 0.5
    )
    assert module._skip_kind == kind
    x = draw(2, 3, 3, 3).requires_grad_()

    def call(x: Tensor, weight: Tensor, gamma: Tensor) -> Tensor:
        changed = {"weight": weight, "bn.weight": gamma}
        result: Tensor = torch.func.functional_call(module, changed, (x,))
        return result

    weight = draw(*module.weight.shape, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(call, (x, weight, draw(3, seed=5).requires_grad_()))


class Operations(TorchDispatchMode):
    """Records what is computed; views do not count as computation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return result


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("kind", "extra"), [("straight", ["add"]), ("gather", ["index_select", "add"])]
)
def test_what_the_skip_costs(kind: str, extra: list[str], stride: int) -> None:
    """Besides the convolution and its BatchNorm, an identity skip costs one addition, at any
    stride.
    """
    conv = nn.Conv2d(4, 4, 3, stride=stride, padding=1, bias=False)
    rows = torch.arange(4)
    m = PathBN(
        conv,
        nn.BatchNorm2d(4),
        rows,
        rows if kind == "straight" else rows.flip(0),
        torch.ones(4),
        1.0,
    )
    m, x = m.eval(), torch.randn(2, 4, 8, 8)
    with torch.no_grad(), Operations() as seen:
        m(x)
    own = (
        "convolution",
        "native_batch_norm",
        "cudnn_batch_norm",
        "_native_batch_norm_legit_no_training",
    )
    of_the_weight = (
        "new_zeros",
        "zeros",
        "index_put",
        "_index_put_impl_",
        "empty_like",
        "clone",
        "fill_",
        "empty",
    )
    assert [name for name in seen.names if name not in own + of_the_weight] == extra, seen.names


# ---- the rest of PyTorch -------------------------------------------------------------------------


@pytest.fixture
def small() -> tuple[nn.Module, Tensor]:
    """Path-BN with a gather and with a scatter, float32."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 6),
        nn.ReLU(),
        nn.Linear(6, 3),
    )  # fmt: skip
    x = draw(4, 3, 10, 10)
    return pathconvert.to_path_bn(randomised(model), x, calibration=x).float(), x.float()


def test_deepcopy_and_state_dict(small: tuple[nn.Module, Tensor]) -> None:
    m, x = small
    twin = copy.deepcopy(m)
    assert torch.equal(twin(x), m(x))
    other = pathconvert.to_path_bn(pathconvert.leave_path_bn(m), x, calibration=x)
    other.load_state_dict(m.state_dict())
    assert torch.equal(other(x), m(x))


def test_sync_batch_norm_and_channels_last(small: tuple[nn.Module, Tensor]) -> None:
    m, x = small
    expected = m(x)
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(m))
    assert all(
        isinstance(module.bn, nn.SyncBatchNorm)
        for name, module in layers(sync).items()
        if name != "10"
    )
    assert torch.equal(pathconvert.leave_path_bn(sync.eval())(x), pathconvert.leave_path_bn(m)(x))
    last = copy.deepcopy(m).to(memory_format=torch.channels_last)
    # float32, another summation order
    assert error(last(x.to(memory_format=torch.channels_last)), expected) < 1e-5
    last.train()(x).sum().backward()


def test_autocast(small: tuple[nn.Module, Tensor]) -> None:
    m, x = small
    with torch.autocast("cpu", torch.bfloat16):
        assert error(m(x).float(), m.float()(x)) < 0.05  # bfloat16 rounds by 2^-9, a few times
        m.train()(x).float().sum().backward()


def test_compile_and_export(small: tuple[nn.Module, Tensor]) -> None:
    """There is no graph break (fullgraph raises at one).

    Only tracing is tested, so the compiler is left out.
    """
    m, x = small
    compiled = torch.compile(m.train(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), copy.deepcopy(m)(x))
    program = torch.export.export(m.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(x[:3]), m(x[:3]))


def test_half_precision(small: tuple[nn.Module, Tensor]) -> None:
    m, x = small
    assert error(copy.deepcopy(m).bfloat16()(x.bfloat16()).float(), m(x)) < 0.05


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_save_and_load(tmp_path: Any, suffix: str) -> None:
    model, x = network("resnet18"), draw(2, 3, 64, 64).float()
    m = pathconvert.to_path_bn(pathconvert.reparameterize(model, x, pivot="max"), x, skip_scale=0.1)
    path = pathconvert.save(m, tmp_path / f"net.path-bn.{suffix}")
    loaded, record = pathconvert.load(path)
    assert record["form"] == "path-bn"
    assert record == loaded.path_record
    assert torch.equal(loaded(x), m(x))
    assert torch.equal(copy.deepcopy(loaded).train()(x), copy.deepcopy(m).train()(x))
    restored = pathconvert.restore(loaded, record)
    report = pathconvert.verify(model, restored, x)
    assert report.passed, report


def test_a_newer_or_foreign_record_is_refused(tmp_path: Any) -> None:
    from command_line import change_metadata

    m = pathconvert.to_path_bn(network("resnet18"), draw(2, 3, 64, 64).float())
    path = pathconvert.save(m, tmp_path / "net.safetensors")
    change_metadata(path, lambda metadata: metadata["record"]["path_bn"].update(format_version=2))
    with pytest.raises(RecordError, match="the Path-BN record has format version 2"):
        pathconvert.load(path)
    change_metadata(
        path,
        lambda metadata: metadata["record"]["path_bn"].update(
            format_version=1, layers=[{"name": "x"}]
        ),
    )
    with pytest.raises(RecordError, match="the Path-BN record belongs to another network"):
        pathconvert.load(path)
