"""Frozen and synchronised BatchNorms, BatchNorms without a module, and networks in parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from path_bn_networks import draw, error, layers, output
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

import pathconvert
from pathconvert.conversion.frozen import CONSTANTS, is_frozen
from pathconvert.conversion.record import record_of
from pathconvert.errors import PathconvertError
from pathconvert.path_bn.form import insert_path_bn
from pathconvert.path_bn.normalizations import SyncRemainder, can_be_split, split
from pathconvert.training.optimizer.gsgd import GSGD
from pathconvert.training.optimizer.path_groups import path_parameter_groups

# float64 rounds by 1e-16 per operation; the largest of these networks has a few hundred
EXACT = 1e-10
IMAGES = draw(8, 3, 9, 9)


class FrozenActivated(nn.Module):
    """As timm's FrozenBatchNormAct2d: arithmetic with constants, then its children."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-5
        for name in CONSTANTS:
            self.register_buffer(name, torch.ones(channels))
        self.drop, self.act = nn.Dropout2d(0.1), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        names = ("weight", "bias", "running_mean", "running_var")
        gamma, beta, mean, var = (getattr(self, name).view(1, -1, 1, 1) for name in names)
        scale = gamma * (var + self.eps).rsqrt()
        return self.act(self.drop(x * scale + (beta - mean * scale)))


FROZEN = FrozenBatchNorm2d, FrozenActivated


class SyncActivated(nn.SyncBatchNorm):
    """As timm's SyncBatchNormAct."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class Net(nn.Sequential):
    """Three convolutions, each followed by a normalization of ``kind`` and ReLU; a classifier."""

    def __init__(self, kind: type[nn.Module], *, bias: bool = True) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3, bias=bias), kind(6), nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1, bias=bias), kind(6), nn.ReLU(),
            nn.Conv2d(6, 6, 1, bias=bias), kind(6), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
        )  # fmt: skip


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """float64, with every weight, constant and statistic away from 1 and 0."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.double().eval().state_dict(keep_vars=True).items():
        if "var" in name:
            tensor.uniform_(0.3, 2.0, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.5, generator=generator)
    return model


# ---- modules of the network ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*FROZEN, nn.SyncBatchNorm, SyncActivated])
def test_in_and_out_and_folded_are_equal(kind: type[nn.Module]) -> None:
    model = randomised(Net(kind))
    path_bn = pathconvert.to_path_bn(model, IMAGES, calibration=IMAGES)
    path = pathconvert.leave_path_bn(path_bn)
    restored = pathconvert.restore(path_bn, path_bn.path_record)
    folded = [pathconvert.export.fold(one, IMAGES) for one in (model, path_bn)]
    assert list(layers(path_bn)) == ["3", "6"]
    assert type(restored[4]) is type(path[4]) is kind
    assert list(restored.state_dict()) == list(model.state_dict())
    for made in (path_bn, path, restored, *folded):
        assert error(output(made, IMAGES), output(model, IMAGES)) <= EXACT
    assert [pathconvert.export.unfolded(one) for one in folded] == [(), ()]


@pytest.mark.parametrize("kind", [*FROZEN, SyncActivated])
def test_a_stock_network_takes_the_form_that_a_record_names(kind: type[nn.Module]) -> None:
    path_bn = pathconvert.to_path_bn(randomised(Net(kind)), IMAGES, calibration=IMAGES)
    built = insert_path_bn(Net(kind).double().eval(), record_of(path_bn))
    built.load_state_dict(path_bn.state_dict())
    assert torch.equal(output(built, IMAGES), output(path_bn, IMAGES))


@pytest.mark.parametrize("calibration", [None, IMAGES], ids=["estimated", "images"])
def test_a_frozen_batch_norm_stays_frozen(calibration: Tensor | None) -> None:
    model = randomised(Net(FrozenBatchNorm2d, bias=False))
    path_bn = pathconvert.to_path_bn(model, IMAGES, calibration=calibration)
    assert list(layers(path_bn)) == ["3", "6"]
    assert not any(".bn." in name for name, _ in path_bn.named_parameters())
    trained = output(path_bn, IMAGES, training=True)
    assert error(trained, output(model, IMAGES)) <= EXACT
    optimizer = GSGD(path_parameter_groups(path_bn.train()), lr=1e-3)
    before = path_bn[3].weight.detach().clone()
    path_bn(IMAGES).square().mean().backward()
    optimizer.step()
    assert not torch.equal(path_bn[3].weight, before)
    restored = pathconvert.restore(path_bn, path_bn.path_record)
    for name in (f"{layer}.{constant}" for layer in (1, 4, 7) for constant in CONSTANTS):
        expected = model.get_buffer(name)
        assert torch.allclose(restored.get_buffer(name), expected, rtol=EXACT, atol=EXACT), name


def test_a_bias_before_a_frozen_batch_norm_moves_into_its_mean() -> None:
    model = randomised(Net(FrozenBatchNorm2d))
    restored = pathconvert.restore(
        (path_bn := pathconvert.to_path_bn(model, IMAGES, calibration=IMAGES)), path_bn.path_record
    )
    assert error(restored[4].running_mean, model[4].running_mean - model[3].bias) <= EXACT
    assert not restored[3].bias.any()


def test_frozen_arithmetic_is_exact_in_scope_network() -> None:
    model = randomised(Net(FrozenActivated))
    conversion = pathconvert.reparameterize(model, IMAGES, scope="network")
    path_bn = pathconvert.to_path_bn(conversion, IMAGES, calibration=IMAGES)
    assert list(layers(path_bn)) == ["3", "6"]
    for made in (path_bn, pathconvert.leave_path_bn(path_bn)):
        assert error(output(made, IMAGES), output(model, IMAGES)) <= EXACT


class FrozenTrainable(FrozenActivated):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.scale = nn.Parameter(torch.ones(()))


class FrozenReversed(FrozenActivated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.relu(x))


class FrozenOtherEps(FrozenActivated):
    def forward(self, x: Tensor) -> Tensor:
        self.eps, eps = 0.1, self.eps
        result = super().forward(x)
        self.eps = eps
        return result


@pytest.mark.parametrize(
    ("kind", "frozen"),
    [
        (FrozenBatchNorm2d, True),
        (FrozenActivated, True),
        (FrozenTrainable, False),
        (FrozenReversed, False),
        (FrozenOtherEps, False),
        (nn.BatchNorm2d, False),
        (nn.Conv2d, False),
    ],
)
def test_frozen_is_what_computes_with_constants(kind: type[nn.Module], frozen: bool) -> None:
    module = nn.Conv2d(3, 3, 1) if kind is nn.Conv2d else kind(3)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert is_frozen(module) == frozen
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_torchscript_module_is_not_frozen() -> None:
    for script in (torch.jit.script, lambda one: torch.jit.trace(one, torch.ones(1, 3, 5, 5))):
        assert not is_frozen(script(FrozenBatchNorm2d(3).eval()))


def test_a_frozen_batch_norm_is_split_and_put_together() -> None:
    module, x = randomised(FrozenActivated(3)), draw(4, 3, 5, 5)
    normalization, rest = split(module)
    assert error(rest(normalization(x)), module(x)) <= EXACT
    assert list(rest.state_dict()) == ["act.weight"]
    again = rest.with_normalization(normalization)
    assert type(again) is FrozenActivated
    assert list(again.state_dict()) == list(module.state_dict())
    assert torch.equal(again(x), module(x))


def test_timms_modules_are_split() -> None:
    norm_act = pytest.importorskip("timm.layers.norm_act")
    frozen = randomised(norm_act.FrozenBatchNormAct2d(3))
    synchronised = randomised(norm_act.convert_sync_batchnorm(norm_act.BatchNormAct2d(3)))
    assert is_frozen(frozen)
    assert type(synchronised) is norm_act.SyncBatchNormAct
    x = draw(4, 3, 5, 5)
    for module in (frozen, synchronised):
        assert can_be_split(module, (4, 3, 5, 5))
        normalization, rest = split(module)
        assert error(rest(normalization(x)), module(x)) <= EXACT


# ---- several processes ---------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of one process, in which SyncBatchNorm takes no tensors on the CPU in training."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_synchronised_batch_norm_is_split_among_processes() -> None:
    module, x = SyncActivated(6).train(), draw(4, 6, 5, 5).float()
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
        module(x)
    assert can_be_split(module, (4, 6, 3, 3))
    normalization, rest = split(module)
    assert type(normalization) is nn.SyncBatchNorm
    assert isinstance(rest, SyncRemainder)
    assert torch.equal(rest(x), module.act(x))


# ---- BatchNorms without a module -----------------------------------------------------------------


class Functional(nn.Module):
    """A BatchNorm that the forward computes, between two that are modules, and a classifier.

    Args:
        own: whether it has statistics, γ and β, or normalises with those of the batch only.
    """

    def __init__(self, own: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.c2 = nn.Conv2d(6, 6, 3, padding=1, bias=bias)
        self.c3, self.n3 = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)
        self.gamma, self.beta = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))
        self.register_buffer("mean", torch.ones(6))
        self.register_buffer("var", torch.ones(6))
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        x = self.c2(F.relu(self.n1(self.c1(x))))
        if self.own:
            x = F.batch_norm(x, self.mean, self.var, self.gamma, self.beta, self.training)
        else:
            x = F.batch_norm(x, None, None, self.gamma, self.beta, training=True)
        return self.fc(F.relu(self.n3(self.c3(F.relu(x)))).mean((2, 3)))


CALLED = "is followed by a batch_norm that the forward of {} calls itself: make it a module of the"
CALLED += " network, nn.BatchNorm2d"


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("own", [True, False], ids=["own statistics", "of the batch"])
@pytest.mark.parametrize("inside", [False, True], ids=["root", "block"])
def test_a_functional_batch_norm_is_left_by_name(inside: bool, own: bool, bias: bool) -> None:
    network = Functional(own, bias)
    model = randomised(nn.Sequential(network) if inside else network)
    name, prefix = ("0 (Functional)", "0.") if inside else ("Functional", "")
    path_bn = pathconvert.to_path_bn(model, IMAGES, calibration=IMAGES)
    assert path_bn.path_record["path_bn"]["left"][f"{prefix}c2"] == CALLED.format(name)
    assert list(layers(path_bn)) == [f"{prefix}c3"]
    path, folded = pathconvert.leave_path_bn(path_bn), pathconvert.export.fold(model, IMAGES)
    for made in (path_bn, path, folded):
        assert error(output(made, IMAGES), output(model, IMAGES)) <= EXACT


class OnlyFunctional(nn.Module):
    """Its forward computes all of its BatchNorms, with tensors of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Linear(6, 4)
        for name in ("mean1", "var1", "mean2", "var2"):
            self.register_buffer(name, torch.ones(6))
        self.gamma1, self.beta1, self.gamma2, self.beta2 = (
            nn.Parameter(torch.ones(6)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        norm1 = self.mean1, self.var1, self.gamma1, self.beta1
        norm2 = self.mean2, self.var2, self.gamma2, self.beta2
        x = F.relu(F.batch_norm(self.c1(x), *norm1, self.training))
        x = F.relu(F.batch_norm(self.c2(x), *norm2, self.training))
        return self.fc(x.mean((2, 3)))


def test_a_root_with_several_functional_batch_norms_is_refused_by_name() -> None:
    """It took a form that could not be left again: the root has no ``running_mean``."""
    model = randomised(OnlyFunctional())
    with pytest.raises(PathconvertError) as caught:
        pathconvert.to_path_bn(model, IMAGES, calibration=IMAGES)
    assert f"c2: {CALLED.format('OnlyFunctional')}" in str(caught.value)
    folded = pathconvert.export.fold(model, IMAGES)
    assert error(output(folded, IMAGES), output(model, IMAGES)) <= EXACT


# ---- networks in parts ---------------------------------------------------------------------------


class InParts(nn.Module):
    """Its forward depends on numbers, so that only the network inside it is traced."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        y = self.network(x)
        return 2 * y if float(y.sum()) > 0 else y


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, *FROZEN, SyncActivated])
@pytest.mark.parametrize("outside", [True, False])
def test_parts_of_a_network_in_data_parallel(kind: type[nn.Module], outside: bool) -> None:
    network = randomised(Net(kind))
    parts = InParts(network if outside else nn.DataParallel(network)).double().eval()
    model = nn.DataParallel(parts) if outside else parts
    expected = output(parts, IMAGES)
    path_bn = pathconvert.to_path_bn(model, IMAGES, calibration=IMAGES)
    assert pathconvert.reparameterize(model, IMAGES).parts != ("",)
    assert len(layers(path_bn)) == 2
    restored = pathconvert.restore(path_bn, path_bn.path_record)
    assert list(restored.state_dict()) == list(parts.state_dict())
    for made in (path_bn, pathconvert.leave_path_bn(path_bn), restored):
        assert error(output(made, IMAGES), expected) <= EXACT
    folded = pathconvert.export.fold(model, IMAGES)
    assert error(output(folded, IMAGES), expected) <= EXACT
    assert len(pathconvert.export.unfolded(folded)) == 3  # other code may use a part's layers too
