"""A folded network does what it did before, whatever its forward asks its BatchNorms."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sample_networks import randomise
from torch import nn

from pathconvert.conversion.bisection import working
from pathconvert.export.graph.folding import fold, unfolded

# float64 rounds by about 1e-16 per step, and the networks here have only a few steps
EXACT = 1e-10
MAPS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
OTHERS = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Net(nn.Module):
    """Three convolutions with BatchNorms; subclasses say how they are called."""

    def __init__(self):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.c2, self.b2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.c3, self.b3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        for i in (1, 2, 3):
            x = F.relu(getattr(self, f"b{i}")(getattr(self, f"c{i}")(x)))
        return x


class AsksForTheChannels(Net):
    def forward(self, x):
        return super().forward(x).reshape(-1, self.b2.num_features, 36).mean(2)


class AsksForEps(Net):
    def forward(self, x):
        return super().forward(x) / (x.std() + self.b1.eps)


class AsksForEpsIfThereIsOne(Net):
    def forward(self, x):
        return super().forward(x) + getattr(self.b3, "eps", 0.0)


class AsksForTheWeight(Net):
    def forward(self, x):
        return super().forward(x) if self.b2.weight is not None else x


class AsksForTheClass(Net):
    def forward(self, x):
        x = super().forward(x)
        return x * 2 if isinstance(self.b1, nn.BatchNorm2d) else x


class AsksForTheClassWithoutEffect(Net):
    """The other branch returns the same on every input of this size."""

    def forward(self, x):
        x = super().forward(x)
        return x if isinstance(self.b3, nn.BatchNorm2d) else x.clone()


class DispatchesOverItsChildren(Net):
    def forward(self, x):
        for child in self.children():
            x = F.relu(child(x)) if isinstance(child, nn.BatchNorm2d) else child(x)
        return x


class IteratesOverItsChildren(Net):
    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


class IteratesByType(Net):
    def forward(self, x):
        for layer, norm in zip(
            [m for m in self.children() if type(m) is nn.Conv2d],
            [m for m in self.children() if type(m) is nn.BatchNorm2d],
            strict=True,
        ):
            x = F.relu(norm(layer(x)))
        return x


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        (AsksForTheChannels, ("b2",)),
        (AsksForEps, ("b1",)),
        (AsksForEpsIfThereIsOne, ("b3",)),
        (AsksForTheWeight, ("b2",)),
        (AsksForTheClass, ("b1",)),
        (AsksForTheClassWithoutEffect, ("b3",)),
        (DispatchesOverItsChildren, ("b1", "b2", "b3")),
        (IteratesOverItsChildren, ()),
        (IteratesByType, ("b1", "b2", "b3")),
    ],
)
def test_what_the_forward_asks_for_is_kept(kind, left):
    model = randomise(kind()).double().eval()
    folded = fold(model, MAPS)
    assert unfolded(folded) == left
    with torch.no_grad():
        for x in (MAPS, OTHERS):
            expected, got = model(x), folded(x)
            assert float((expected - got).abs().max()) <= EXACT * float(expected.abs().max())


def test_what_the_forward_keeps_between_runs_does_not_count():
    class Caches(Net):
        grid = None

        def forward(self, x):
            if self.grid is None:
                self.grid = torch.linspace(0, 1, x.shape[-1])
            return super().forward(x * self.grid)

    model = randomise(Caches()).double().eval()
    assert unfolded(fold(model, MAPS)) == ()


def test_halving_finds_what_works_in_few_trials():
    trials = []

    def works(names):
        trials.append(names)
        return 13 not in names and not {2, 3} <= set(names)

    assert working(works, range(64)) == [n for n in range(64) if n not in (3, 13)]
    assert len(trials) <= 24


# ---- operations, not classes ---------------------------------------------------------------------


class Activated(nn.BatchNorm2d):
    def forward(self, x):
        return F.leaky_relu(super().forward(x), 0.1)


class WithChildren(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.PReLU()

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        y = F.batch_norm(
            x, mean, var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.act(self.drop(y))


class NotDerived(nn.Module):
    """A BatchNorm that is written anew, and scaled afterwards."""

    def __init__(self, channels):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.rand(channels)), nn.Parameter(torch.ones(4))
        self.slope = nn.Parameter(torch.rand(()))
        self.register_buffer("mean", torch.rand(channels))
        self.register_buffer("variance", torch.rand(channels) + 0.5)

    def forward(self, x):
        y = torch.batch_norm(
            x, self.gamma, self.beta, self.mean, self.variance, False, 0.1, 1e-3, False
        )
        return F.relu(y) * self.slope


class Block(nn.Module):
    """Normalises with its own tensors what its child made."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)
        self.register_buffer("mean", torch.rand(channels))
        self.register_buffer("var", torch.rand(channels) + 0.5)

    def forward(self, x):
        return F.relu(F.batch_norm(self.conv(F.relu(self.bn(x))), self.mean, self.var))


@pytest.mark.parametrize("kind", [Activated, WithChildren, NotDerived, Block])
def test_a_module_is_folded_if_its_operations_are(kind):
    layers = (nn.Conv2d(3, 4, 3), kind(4), nn.Conv2d(4, 4, 3, padding=1), kind(4))
    model = randomise(nn.Sequential(*layers)).double().eval()
    folded = fold(model, MAPS)
    functions = []

    class Functions(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            functions.append(func)
            return func(*args, **(kwargs or {}))

    with torch.no_grad():
        expected = model(OTHERS)
        with Functions():
            got = folded(OTHERS)
        again = copy.deepcopy(folded)(OTHERS)
    assert float((expected - got).abs().max()) <= EXACT * float(expected.abs().max())
    assert torch.equal(got, again)
    assert F.batch_norm not in functions
    assert torch.batch_norm not in functions
    assert unfolded(folded) == ()


def test_what_is_left_of_a_module_keeps_its_names_and_can_be_compiled():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), WithChildren(4), nn.ReLU()).eval()
    folded = fold(model, MAPS.float())
    assert list(folded.state_dict()) == ["0.weight", "0.bias", "1.act.weight"]
    compiled = torch.compile(folded, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(MAPS.float()), folded(MAPS.float()))
