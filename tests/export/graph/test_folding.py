"""Folding: in every difficult case it is exact in float64, or the BatchNorm is left as it is."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sample_networks import network, randomise
from torch import nn
from torchvision.models.video.resnet import Conv3DSimple
from torchvision.ops.misc import FrozenBatchNorm2d

import pathconvert.export
from pathconvert.errors import ArchitectureError, PathconvertError, TraceError
from pathconvert.export.graph.folding import fold, unfolded

# float64 rounds by about 1e-16 per step, and the networks here have only a few steps
EXACT = 1e-10
MAPS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def outputs(model, x):
    with torch.no_grad():
        return copy.deepcopy(model).double().eval()(x.double())


def folded_exactly(model, x, left=()):
    """Fold, compare in float64, and check which BatchNorms are left."""
    model = randomise(model).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = fold(model, x)
    expected, got = outputs(model, x), outputs(result, x)
    error = float((expected - got).abs().max() / expected.abs().max())
    assert error <= EXACT, error
    assert unfolded(result) == left
    assert not result.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    return result


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), (2, 3, 8, 8)),
        (nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), (2, 3, 8, 8)),
        (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, eps=1e-3), (2, 4, 8, 8)),
        (nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), (2, 6, 8, 8)),
        (
            nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2),
            nn.BatchNorm2d(6),
            (2, 4, 8, 8),
        ),
        (nn.ConvTranspose1d(3, 5, 4), nn.BatchNorm1d(5), (2, 3, 8)),
        (nn.Conv1d(3, 5, 3, padding="same"), nn.BatchNorm1d(5), (2, 3, 8)),
        (nn.Conv3d(3, 5, 3), nn.BatchNorm3d(5), (2, 3, 4, 5, 6)),
        (Conv3DSimple(3, 5), nn.BatchNorm3d(5), (2, 3, 4, 5, 6)),
        (nn.Linear(3, 5), nn.BatchNorm1d(5), (2, 3)),
        (nn.Conv2d(3, 6, 3), nn.SyncBatchNorm(6), (2, 3, 8, 8)),
        (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), (2, 3, 8, 8)),
        (nn.Conv2d(3, 6, 3), FrozenBatchNorm2d(6, eps=0.0), (2, 3, 8, 8)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_every_kind_of_layer_takes_the_batch_norm_after_it(layer, norm, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = nn.Sequential(layer, norm, nn.ReLU())
    result = folded_exactly(model, x)
    assert result[0].bias is not None
    assert isinstance(result[1], nn.Identity)


def test_gammas_that_are_negative_zero_and_tiny():
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([-1.5, 0.0, 1e-30, -1e-3]))
    result = fold(model, MAPS.float())
    assert not unfolded(result)
    assert torch.allclose(outputs(model, MAPS), outputs(result, MAPS), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "takes"),
    [
        (nn.Conv2d(3, 4, 3), True),
        (nn.Conv2d(3, 6, 1, groups=3, bias=False), True),
        (nn.Conv2d(3, 4, 3, padding="valid"), True),
        (nn.Conv2d(3, 4, 3, padding="valid", padding_mode="reflect"), False),
        (nn.Conv2d(3, 4, 3, padding=1), False),
        (nn.Conv2d(3, 4, 3, padding="same"), False),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), False),
        (nn.ConvTranspose2d(3, 4, 3), False),
    ],
)
def test_a_batch_norm_before_a_layer_folds_only_where_nothing_is_padded(layer, takes):
    folded_exactly(
        nn.Sequential(nn.BatchNorm2d(3), layer, nn.ReLU()), MAPS, () if takes else ("0",)
    )


def test_a_batch_norm_before_a_linear_layer():
    folded_exactly(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4)), MAPS[:, :, 0, 0])


def test_batch_norms_in_a_row_and_on_both_sides():
    folded_exactly(
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)),
        MAPS,
    )


def test_a_batch_norm_between_two_layers_that_could_take_it_folds_once():
    folded_exactly(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
        MAPS,
    )


def test_a_relu_between_keeps_both_batch_norms_but_the_one_after_the_layer():
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)
    )
    folded_exactly(model, MAPS, ("0", "4"))


class Net(nn.Module):
    """Two convolutions and two BatchNorms; subclasses say how they are called."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.n, self.m = nn.BatchNorm2d(3), nn.BatchNorm2d(3)


class LayerTwiceBothNormed(Net):
    def forward(self, x):
        return self.b(F.relu(self.n(self.a(F.relu(self.n(self.a(x)))))))


class LayerTwiceOnceNormed(Net):
    def forward(self, x):
        return self.b(F.relu(self.n(self.a(F.relu(self.a(x))))))


class LayerTwiceTwoNorms(Net):
    def forward(self, x):
        return self.m(self.a(F.relu(self.n(self.a(x)))))


class NormOfTwoLayers(Net):
    def forward(self, x):
        return self.n(self.a(x)) + self.n(self.b(x))


class SecondConsumer(Net):
    def forward(self, x):
        y = self.a(x)
        return F.relu(self.n(y)) + y


class ResultReturnedToo(Net):
    def forward(self, x):
        y = self.a(x)
        return torch.cat([self.n(y), y], 1)


class WeightUsedElsewhere(Net):
    def forward(self, x):
        return F.relu(self.n(self.a(x))) * self.a.weight.sum()


class LayerNotCalledAsAModule(Net):
    def forward(self, x):
        return F.relu(self.n(F.conv2d(x, self.a.weight, None, 1, 1)))


class NormUsedElsewhere(Net):
    def forward(self, x):
        return self.n(self.a(x)) + self.n.running_mean.view(1, -1, 1, 1)


class InPlace(Net):
    def forward(self, x):
        y = self.a(x)
        z = y.view(y.shape)
        z.relu_()
        return self.n(y)


class Reshaped(Net):
    def forward(self, x):
        return self.n(self.a(x).transpose(2, 3))


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        (LayerTwiceBothNormed, ("m",)),
        (LayerTwiceOnceNormed, ("n", "m")),
        (LayerTwiceTwoNorms, ("n", "m")),
        (NormOfTwoLayers, ("n", "m")),
        (SecondConsumer, ("n", "m")),
        (ResultReturnedToo, ("n", "m")),
        (WeightUsedElsewhere, ("n", "m")),
        (LayerNotCalledAsAModule, ("n", "m")),
        (NormUsedElsewhere, ("n", "m")),
        (InPlace, ("n", "m")),
        (Reshaped, ("n", "m")),
    ],
)
def test_calls_in_unusual_ways(kind, left):
    folded_exactly(kind(), MAPS, left)


def test_a_batch_norm_along_another_dimension_than_the_layers_is_left():
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    folded_exactly(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), x, ("1",))


def test_shared_parametrized_hooked_and_subclassed_layers_are_left():
    def one():
        return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))

    shared = nn.Sequential(one(), one())
    shared[1][0].weight = shared[0][0].weight
    folded_exactly(shared, MAPS, ("0.1", "1.1"))

    parametrized = one()
    nn.utils.parametrizations.weight_norm(parametrized[0])
    folded_exactly(parametrized, MAPS, ("1",))

    hooked = one()
    hooked[0].register_forward_hook(lambda _, __, y: y + 1)
    folded_exactly(hooked, MAPS, ("1",))

    class Doubling(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    folded_exactly(nn.Sequential(Doubling(3, 3, 3), nn.BatchNorm2d(3)), MAPS, ("1",))

    class Squaring(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x * x)

    folded_exactly(nn.Sequential(nn.Conv2d(3, 3, 3), Squaring(3)), MAPS, ("1",))


def test_without_running_statistics_a_batch_norm_is_left():
    folded_exactly(
        nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)),
        MAPS,
        ("1",),
    )


def test_a_module_under_two_names_and_dtypes_stay():
    block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
    folded_exactly(nn.Sequential(block, block), MAPS, ("0.1",))
    half = fold(
        randomise(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))).half(), MAPS
    )
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}


def test_a_folded_weight_that_does_not_fit_the_dtype_is_refused():
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.0))).half()
    model[1].running_var.fill_(6e-8)
    model[1].weight.data.fill_(6e4)
    with pytest.raises(
        PathconvertError, match=r"^0\.weight does not fit float16 once its BatchNorm is folded in$"
    ):
        fold(model, MAPS)


@pytest.mark.parametrize(
    ("name", "left", "options"),
    [
        ("resnet18", 0, {}),
        ("densenet121", 62, {}),
        ("googlenet", 0, {"aux_logits": False}),
        ("shufflenet_v2_x0_5", 0, {}),
    ],
)
def test_torchvision_networks(name, left, options):
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = network(name, torch.float64, **options)
    result = fold(model, x)
    assert len(unfolded(result)) == left
    expected, got = outputs(model, x), outputs(result, x)
    assert float((expected - got).abs().max() / expected.abs().max()) <= EXACT


def test_the_example_comes_from_the_architecture_where_it_is_known():
    assert not unfolded(fold(network("resnet18")))
    with pytest.raises(ArchitectureError, match="the size of its input is not known") as caught:
        fold(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    assert caught.value.tip == "Pass example_input, a tensor such as torch.zeros(1, 3, 224, 224)."


def test_a_network_that_cannot_run_in_float64_is_refused():
    class Narrow(Net):
        def forward(self, x):
            return self.n(self.a(x.float()))

    with pytest.raises(
        TraceError, match=r"Input type .float. and bias type .double. should be the same"
    ):
        fold(Narrow(), MAPS)


def test_fold_is_public():
    assert pathconvert.export.fold is fold
