"""fx GraphModules convert as other networks; lazy and TorchScript modules are refused."""

import pytest
import torch
from path_bn_networks import draw, layers, randomised
from torch import fx, nn
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

import pathconvert
from pathconvert.conversion.equivalence import forward_outputs
from pathconvert.conversion.modules import copied, mode_of
from pathconvert.errors import TraceError

# float64 rounds by 1e-16 per operation; these networks have about a hundred
EXACT = 1e-10
IMAGES = draw(2, 3, 48, 48)


def extractor():
    """Two outputs of a ResNet, with one graph for training and one for evaluation."""
    return randomised(create_feature_extractor(resnet18().eval(), ["layer2", "fc"]))


def graph():
    """A ResNet as one graph."""
    return randomised(fx.symbolic_trace(resnet18().eval()))


def largest_error(a, b):
    pairs = zip(forward_outputs(a, IMAGES), forward_outputs(b, IMAGES), strict=True)
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)


@pytest.mark.parametrize("make", [extractor, graph])
def test_a_graph_module_goes_into_every_form_and_back(make):
    model = make()
    conversion = pathconvert.reparameterize(model, IMAGES)
    path_bn = pathconvert.to_path_bn(conversion, IMAGES, calibration=IMAGES)
    assert layers(path_bn)
    path = pathconvert.leave_path_bn(path_bn)
    restored = pathconvert.restore(path_bn, conversion.record)
    for made in (conversion.model, path_bn, path, restored):
        assert not made.training
        assert largest_error(made, model) <= EXACT
    for form, made in (("path", conversion.model), ("path-bn", path_bn), ("path", path)):
        assert made.path_record["form"] == form
    assert list(path.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("make", [extractor, graph])
def test_a_graph_module_folds_in_every_form(make):
    model = make()
    path_bn = pathconvert.to_path_bn(model, IMAGES, calibration=IMAGES)
    for one in (model, path_bn):
        folded = pathconvert.export.fold(one, IMAGES)
        assert largest_error(folded, model) <= EXACT
        assert not pathconvert.export.unfolded(folded)


def test_a_copy_keeps_the_record_the_mode_and_the_hooks():
    for training in (False, True):
        model = nn.Sequential(extractor())
        model[0].train(training)
        model[0].path_record = {"form": "path"}
        model[0].register_forward_hook(lambda _, __, result: {"fc": result["fc"] + 1})
        twin = copied(model)
        assert twin[0].path_record == {"form": "path"}
        assert twin[0].path_record is not model[0].path_record
        modes = [[module.training for module in one.modules()] for one in (model, twin)]
        assert modes[0] == modes[1]
        assert twin[0].graph is getattr(twin[0], "train_graph" if training else "eval_graph")
        with mode_of(model, training=False), mode_of(twin, training=False):
            assert torch.equal(model(IMAGES)["fc"], twin(IMAGES)["fc"])


def test_a_mode_changes_the_graph_and_is_taken_back():
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return nn.functional.dropout(self.fc(x), 0.5, self.training)

    model = create_feature_extractor(Drops(), ["dropout"])
    for training in (True, False):
        model.train(training)
        with mode_of(model, training=not training):
            assert (model(torch.ones(8, 4))["dropout"] == 0).any() == (not training)
        assert model.training == training
        assert (model(torch.ones(8, 4))["dropout"] == 0).any() == training


# ---- what cannot be read -------------------------------------------------------------------------


class Net(nn.Module):
    """A network with a child in the middle."""

    def __init__(self, child):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.child, self.last = child, nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.last(self.child(self.norm(self.first(x)).relu()))


STEPS = {
    "reparameterize": lambda model: pathconvert.reparameterize(model, IMAGES.float()),
    "to_path_bn": lambda model: pathconvert.to_path_bn(model, IMAGES.float()),
    "fold": lambda model: pathconvert.export.fold(model, IMAGES.float()),
    "export": lambda model: pathconvert.export.export_onnx(model, "x.onnx", IMAGES.float()),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_lazy_module_that_has_not_run_is_refused(step, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for child, kind, name in (
        (nn.LazyConv2d(4, 1), "LazyConv2d", "weight"),
        (nn.LazyBatchNorm2d(), "LazyBatchNorm2d", "weight"),
    ):
        with pytest.raises(TraceError) as refusal:
            STEPS[step](Net(child).eval())
        assert str(refusal.value) == (
            f"child ({kind}) is a lazy module that has not run yet, so that its {name} has no shape"
        )
        assert "Run the network once" in refusal.value.tip


def scripted():
    return torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval())


def traced():
    return torch.jit.trace(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), torch.ones(1, 4, 8, 8))


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("step", ["to_path_bn", "fold", "export"])
@pytest.mark.parametrize("make", [scripted, traced])
def test_a_torchscript_module_is_refused_by_its_name(step, make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TraceError) as refusal:
        STEPS[step](Net(make()).eval())
    assert str(refusal.value) == (
        "child is a TorchScript module, whose compiled forward cannot be watched"
    )


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_conversion_leaves_a_torchscript_module_alone():
    model = Net(scripted()).eval()
    conversion = pathconvert.reparameterize(model, IMAGES.float())
    assert pathconvert.verify(model, conversion.model, IMAGES.float()).passed
    before, after = model.child.state_dict(), conversion.model.child.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
