"""BatchNorms in modules that do more: Path-BN takes the normalization in, the rest stays."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from path_bn_networks import draw, error, layers, output, randomised, with_statistics_of
from torch import Tensor, nn

import pathconvert
from pathconvert.conversion.record import record_of
from pathconvert.conversion.remainder import Remainder, is_split_exactly
from pathconvert.path_bn.form import insert_path_bn
from pathconvert.training.optimizer.gsgd import GSGD
from pathconvert.training.optimizer.path_groups import path_parameter_groups

# float64 rounds by 1e-16 per operation; the largest of these networks has a few hundred
EXACT = 1e-10


class Activated(nn.BatchNorm2d):
    """A BatchNorm with a function behind it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class WithChildren(nn.BatchNorm2d):
    """As timm's BatchNormAct2d, with a buffer and parameters that are not the normalization's."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Dropout2d(0.0), nn.PReLU()
        self.register_buffer("sign", torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        y = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias,
            self.training, self.momentum, self.eps,
        )  # fmt: skip
        return self.act(self.drop(y)) * self.sign


class Net(nn.Sequential):
    """Three convolutions, each followed by a BatchNorm of ``kind``, and a classifier."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3), kind(6), nn.Conv2d(6, 6, 3, padding=1), kind(6),
            nn.Conv2d(6, 6, 1), kind(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
        )  # fmt: skip


IMAGES = draw(8, 3, 9, 9)


@pytest.mark.parametrize("kind", [Activated, WithChildren])
def test_in_and_out_are_equal_in_both_modes(kind: type[nn.Module]) -> None:
    model = with_statistics_of(randomised(Net(kind)), IMAGES)
    path_bn = pathconvert.to_path_bn(model, IMAGES, calibration=IMAGES)
    path = pathconvert.leave_path_bn(path_bn)
    restored = pathconvert.restore(path_bn, path_bn.path_record)
    assert list(layers(path_bn)) == ["2", "4"]
    assert isinstance(path_bn[3], Remainder)
    assert type(path[3]) is kind
    assert list(path.state_dict()) == list(model.state_dict())
    for made in (path_bn, path, restored):
        assert error(output(made, IMAGES), output(model, IMAGES)) <= EXACT
    trained = [output(one, IMAGES, training=True) for one in (path_bn, model)]
    assert error(*trained) <= EXACT


def test_the_rest_trains_moves_and_is_copied_as_a_part_of_the_network() -> None:
    model = randomised(Net(WithChildren))
    path_bn = pathconvert.to_path_bn(model, IMAGES, calibration=IMAGES)
    rest = path_bn[3]
    assert list(rest.state_dict()) == ["sign", "act.weight"]
    twin = pickle.loads(pickle.dumps(copy.deepcopy(path_bn)))
    with torch.no_grad():
        twin[3].act.weight.fill_(0.25)
        twin[3].sign.neg_()
    halved = twin.float()
    assert halved(IMAGES.float()).dtype == torch.float32
    assert float(rest.act.weight.detach()) != 0.25
    path = pathconvert.leave_path_bn(halved)
    assert float(path[3].act.weight.detach()) == 0.25
    assert bool((path[3].sign == -1).all())
    assert error(output(path, IMAGES).double(), output(halved, IMAGES).double()) <= 1e-4


def test_a_stock_network_takes_the_form_that_a_record_names() -> None:
    model = randomised(Net(WithChildren))
    path_bn = pathconvert.to_path_bn(model, IMAGES, calibration=IMAGES)
    built = insert_path_bn(Net(WithChildren).double().eval(), record_of(path_bn))
    built.load_state_dict(path_bn.state_dict())
    assert torch.equal(output(built, IMAGES), output(path_bn, IMAGES))
    path = pathconvert.leave_path_bn(built)
    assert error(output(path, IMAGES), output(model, IMAGES)) <= EXACT


class Separate(nn.Sequential):
    """What :class:`Parametric` does, in two modules."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.BatchNorm2d(channels), nn.PReLU())


class Parametric(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


def test_training_is_the_same_as_with_two_modules() -> None:
    derived, separate = randomised(Net(Parametric)), randomised(Net(Separate))
    for one, two in zip(derived, separate, strict=True):
        if isinstance(one, Parametric):
            two[1].load_state_dict(one.act.state_dict())
            two[0].load_state_dict(one.state_dict(), strict=False)
        else:
            two.load_state_dict(one.state_dict())
    losses = []
    for model in (derived, separate):
        path_bn = pathconvert.to_path_bn(model, IMAGES, calibration=IMAGES).train()
        optimizer = GSGD(path_parameter_groups(path_bn), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            loss = path_bn(IMAGES).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[:3] == pytest.approx(losses[3:], rel=EXACT)


class Reversed(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.relu(x))


class ReadsGamma(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight.view(1, -1, 1, 1)


class AddsItsInput(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class OnlyEvaluates(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps
        )


@pytest.mark.parametrize(
    ("kind", "splits"),
    [
        (nn.BatchNorm2d, True),
        (Activated, True),
        (WithChildren, True),
        (Reversed, False),
        (ReadsGamma, False),
        (AddsItsInput, False),
        (OnlyEvaluates, False),
        (nn.Identity, False),
    ],
)
def test_a_module_splits_only_where_the_parts_are_the_whole(kind, splits: bool) -> None:
    module = nn.Identity() if kind is nn.Identity else randomised(kind(3))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert is_split_exactly(module, (4, 3, 5, 5)) == splits
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


class Asks(nn.Module):
    """Asks one of its BatchNorms for its channels, and one convolution for its class."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.ModuleList([nn.Conv2d(3, 6, 1), *(nn.Conv2d(6, 6, 1) for _ in range(4))])
        self.b = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(5))
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.c, self.b, strict=True):
            x = F.relu(norm(layer(x)))
        x = x.reshape(-1, self.b[2].num_features, 81).mean(2)
        return self.last(x if isinstance(self.c[3], nn.Conv2d) else 2 * x)


def test_layers_whose_forward_asks_for_more_are_left() -> None:
    model = randomised(Asks())
    path_bn = pathconvert.to_path_bn(model, IMAGES, calibration=IMAGES)
    assert list(layers(path_bn)) == ["c.1", "c.4"]
    asked = "is asked by the forward for what a layer in Path-BN form does not have"
    left = path_bn.path_record["path_bn"]["left"]
    assert [name for name, why in left.items() if why == asked] == ["c.2", "c.3"]
    assert error(output(path_bn, IMAGES), output(model, IMAGES)) <= EXACT


# ---- timm ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [("regnetx_002", 27), ("skresnet18", 8)],
)
def test_timms_networks_take_path_bn_and_fold(name: str, count: int) -> None:
    timm = pytest.importorskip("timm")
    model = randomised_as_trained(timm.create_model(name))
    images = draw(2, 3, 64, 64)
    path_bn = pathconvert.to_path_bn(model, images, calibration=images)
    assert len(layers(path_bn)) == count
    path = pathconvert.leave_path_bn(path_bn)
    folded = pathconvert.export.fold(path_bn, images)
    for made in (path_bn, path, folded):
        assert error(output(made, images), output(model, images)) <= EXACT
    assert pathconvert.export.unfolded(folded) == ()
    assert list(path.state_dict()) == list(model.state_dict())


@torch.no_grad()
def randomised_as_trained(model: nn.Module) -> nn.Module:
    """float64, with every γ, β and statistic away from 1 and 0, and activations that stay small."""
    generator = torch.Generator().manual_seed(0)
    for module in model.double().eval().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5, generator=generator)
            module.bias.normal_(0, 0.2, generator=generator)
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def test_timms_networks_are_saved_and_loaded_in_path_bn_form(tmp_path) -> None:
    timm = pytest.importorskip("timm")
    model = randomised_as_trained(timm.create_model("regnetx_002")).float()
    images = draw(2, 3, 64, 64).float()
    path_bn = pathconvert.to_path_bn(model, images, calibration=images)
    path = pathconvert.save(path_bn, tmp_path / "network.safetensors")
    loaded, record = pathconvert.load(path, arch="timm/regnetx_002")
    assert record == path_bn.path_record
    assert torch.equal(output(loaded, images), output(path_bn, images))
    assert pathconvert.export.unfolded(pathconvert.export.fold(loaded, images)) == ()
