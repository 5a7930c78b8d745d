"""Which tensors of a file are the network: wrappers, prefixes, what lies beside, how weights are
stored. Every file is loaded as a user's is, and computes what the network that was saved computes.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from state_dicts import assert_computes_the_same, file_refusal, loaded, trained, under
from torch import Tensor, nn

States = Callable[[nn.Module], dict[str, Tensor]]


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return trained("resnet18")


# ---- wrappers and prefixes -----------------------------------------------------------------------


class Holder(nn.Module):
    """A user's own module with a network in it."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model)


def averaged(model: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(model)


def inner_data_parallel(model: nn.Module) -> nn.Module:
    """``layer1.module.0.conv1.weight``, as people write who parallelise one part."""
    model = copy.deepcopy(model)
    model.layer1 = nn.DataParallel(model.layer1)
    return model


WRAPPED: list[tuple[str, States, list[str]]] = [
    ("plain", lambda m: m.state_dict(), []),
    (
        "data parallel",
        lambda m: nn.DataParallel(m).state_dict(),
        ["prefix 'module.' removed from every name"],
    ),
    (
        "compiled",
        lambda m: compiled(m).state_dict(),
        ["prefix '_orig_mod.' removed from every name"],
    ),
    (
        "compiled in Lightning",
        lambda m: Holder(model=compiled(m)).state_dict(),
        ["prefix 'model._orig_mod.' removed from every name"],
    ),
    (
        "averaged data parallel",
        lambda m: averaged(nn.DataParallel(m)).state_dict(),
        ["prefix 'module.module.' removed from every name", "left out: n_averaged"],
    ),
    (
        "data parallel inside",
        lambda m: inner_data_parallel(m).state_dict(),
        ["read as resnet18: names of wrappers inside it removed"],
    ),
    (
        "FSDP and activation checkpointing",
        lambda m: {
            name.replace("layer2.0.", "layer2.0._checkpoint_wrapped_module."): tensor
            for name, tensor in under("_fsdp_wrapped_module.", m.state_dict()).items()
        },
        [
            "prefix '_fsdp_wrapped_module.' removed from every name",
            "read as resnet18: names of wrappers inside it removed",
        ],
    ),
    (
        "SyncBatchNorm",
        lambda m: nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(m)).state_dict(),
        [],
    ),
    *(
        (prefix, lambda m, p=prefix: under(p, m.state_dict()), [f"prefix {prefix!r} removed"])
        for prefix in ("net.", "backbone.", "encoder.", "network.", "resnet.", "student.backbone.")
    ),
]


@pytest.mark.parametrize(("state", "notes"), [c[1:] for c in WRAPPED], ids=[c[0] for c in WRAPPED])
def test_wrappers_and_prefixes(tmp_path, resnet, state, notes):
    found = loaded(tmp_path, state(resnet))
    assert found.architecture.name == "resnet18"
    assert len(found.notes) == len(notes)
    for note, expected in zip(found.notes, notes, strict=True):
        assert expected in note
    assert_computes_the_same(found.model, resnet)


def test_the_original_names_are_kept(tmp_path, resnet):
    found = loaded(tmp_path, Holder(net=nn.DataParallel(resnet)).state_dict())
    assert found.view is not None
    assert found.view.original["layer1.0.conv1.weight"] == "net.module.layer1.0.conv1.weight"
    assert found.view.original.keys() == resnet.state_dict().keys()


# ---- what lies beside the network ----------------------------------------------------------------

BESIDE: dict[str, tuple[dict[str, Tensor], str]] = {
    "criterion": ({"criterion.weight": torch.ones(7)}, "left out: criterion.weight"),
    "thop": (
        {"total_ops": torch.zeros(1), "layer1.0.conv1.total_params": torch.zeros(1)},
        "left out: total_ops, layer1.0.conv1.total_params",
    ),
    "queue": (
        {"queue": torch.rand(128, 8), "queue_ptr": torch.zeros(1, dtype=torch.long)},
        "left out: queue, queue_ptr",
    ),
    "best": ({"best": torch.tensor(float("inf"))}, "left out: best"),
    "normalizer": (
        {"normalizer.new_mean": torch.rand(3, 1, 1), "normalizer.new_std": torch.rand(3, 1, 1)},
        "left out: normalizer.new_mean, normalizer.new_std; the network now takes"
        " inputs that are already normalised",
    ),
    "observers": (
        {
            "layer1.0.conv1.weight_fake_quant.scale": torch.ones(1),
            "layer1.0.conv1.weight_fake_quant.zero_point": torch.zeros(1, dtype=torch.int32),
            "conv1.activation_post_process.min_val": torch.tensor(float("inf")),
        },
        "left out: layer1.*, conv1.activation_post_process.min_val; the network now computes"
        " without the simulated quantization",
    ),
    "metrics": (
        {"train_acc.tp": torch.zeros(7, dtype=torch.long), "val_metrics.total": torch.zeros(1)},
        "left out: train_acc.tp, val_metrics.total",
    ),
}


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("what", BESIDE)
def test_what_the_function_does_not_read_is_left_out(tmp_path, resnet, what, prefix):
    beside, note = BESIDE[what]
    found = loaded(tmp_path, under(prefix, resnet.state_dict() | beside))
    assert found.notes[-1].replace(prefix, "") == note
    assert not found.view.outside
    assert_computes_the_same(found.model, resnet)


def test_lightning_keeps_a_loss_and_metrics_beside_the_network(tmp_path, resnet):
    state = under("model.", resnet.state_dict()) | {
        "criterion.weight": torch.ones(7),
        "train_acc.confmat": torch.zeros(7, 7, dtype=torch.long),
    }
    found = loaded(tmp_path, {"state_dict": state, "epoch": 3})
    assert found.notes == (
        "taking the weights under 'state_dict'",
        "taking the resnet18 under 'model.'",
        "left out: criterion.weight, train_acc.confmat",
    )
    assert_computes_the_same(found.model, resnet)


@pytest.mark.parametrize(
    "extra",
    [
        {"layer1.0.gate.weight": torch.rand(64)},
        {"attention.weight": torch.rand(512, 512)},
        {"layer1.2.conv1.weight": torch.rand(64, 64, 3, 3)},
        {"temperature": torch.ones(1)},
        {"f1.weight": torch.rand(7, 7)},
        {"acc.0.weight": torch.rand(7, 7)},
        {"normalize.weight": torch.rand(3)},
        {"preprocess.conv.weight": torch.rand(3, 1, 1, 1)},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_what_could_be_a_layer_is_never_left_out(tmp_path, resnet, extra):
    message, tip = file_refusal(tmp_path, under("net.", resnet.state_dict() | extra))
    assert message == (
        "x.pt, under 'net.': no torchvision network has these tensors; the closest is resnet18"
        f" (1 difference): {next(iter(extra))} is extra"
    )
    assert "--arch package.module:builder" in tip


COUNTERS = {
    "of shape [1]": lambda counter: counter.reshape(1) + 5,
    "int32": lambda counter: counter.int() + 5,
    "float": lambda counter: counter.float() + 5,
    "missing": lambda _: None,
}


@pytest.mark.parametrize("kind", COUNTERS)
def test_counters_of_every_kind(tmp_path, resnet, kind):
    state = {
        name: COUNTERS[kind](tensor) if name.endswith("num_batches_tracked") else tensor
        for name, tensor in resnet.state_dict().items()
    }
    found = loaded(tmp_path, {n: t for n, t in state.items() if t is not None})
    assert found.notes == ()
    counter = found.model.bn1.num_batches_tracked
    assert (counter.dtype, counter.shape) == (torch.int64, ())
    assert counter == (0 if kind == "missing" else 5)
    stored = found.view.stored
    assert len(stored) == (0 if kind == "missing" else 20)
    assert all(torch.equal(stored[name], state[name]) for name in stored)
    assert_computes_the_same(found.model, resnet)


def test_only_the_tensors_that_are_used_are_judged(tmp_path, resnet):
    state = under("model.", resnet.state_dict())
    found = loaded(tmp_path, state | {"head.weight": torch.full((3, 512), torch.nan)})
    assert found.notes[-1] == "left out: head.weight"
    state["model.fc.bias"] = torch.tensor([0, 0, torch.nan, 0, 0, 0, 0])
    message, _ = file_refusal(tmp_path, state)
    assert message.startswith("x.pt has NaN or infinite weights: 1 of 7 values in 'fc.bias'")


# ---- several networks ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("taken", "follower"),
    [("encoder_q", "encoder_k"), ("student", "teacher"), ("online", "target"), ("net", "net_ema")],
)
def test_the_trained_network_is_taken_before_its_copy(tmp_path, resnet, taken, follower):
    other = trained("resnet18")
    nn.init.normal_(other.fc.weight)
    state = under(f"{follower}.", other.state_dict()) | under(f"{taken}.", resnet.state_dict())
    found = loaded(tmp_path, state | {"queue": torch.rand(4, 4)})
    assert found.notes == (
        f"taking the resnet18 under '{taken}.', not the resnet18 under '{follower}.' (--prefix"
        f" {follower}.)",
        "left out: queue",
    )
    assert_computes_the_same(found.model, resnet)
    assert_computes_the_same(loaded(tmp_path, state, prefix=f"{follower}.").model, other)


def test_two_networks_are_refused_until_a_prefix_names_one(tmp_path, resnet):
    squeezenet = trained("squeezenet1_1")
    state = under("a.", squeezenet.state_dict()) | under("b.module.", resnet.state_dict())
    message, tip = file_refusal(tmp_path, state)
    assert message == (
        "x.pt: there are 2 networks in it: resnet18 under 'b.module.', squeezenet1_1 under 'a.'"
    )
    assert tip == "Choose one: --prefix b.module."
    for prefix in ("b.module.", "b.", "b"):
        assert_computes_the_same(loaded(tmp_path, state, prefix=prefix).model, resnet)
    assert_computes_the_same(loaded(tmp_path, state, prefix="a").model, squeezenet)
    assert loaded(tmp_path, state, arch="squeezenet1_1").architecture.name == "squeezenet1_1"
    message, tip = file_refusal(tmp_path, state, prefix="c.")
    assert message == "x.pt: no name begins with the prefix 'c.'"
    assert tip == "The names begin with a, b"


def test_a_siamese_pair_that_shares_its_weights(tmp_path, resnet):
    found = loaded(tmp_path, Holder(left=resnet, right=resnet).state_dict())
    assert found.notes == (
        "taking the resnet18 under 'left.', not the resnet18 under 'right.' (--prefix right.)",
    )


def test_the_encoder_of_a_larger_network_is_not_taken_for_it(tmp_path, resnet):
    encoder = {n: t for n, t in resnet.state_dict().items() if not n.startswith("fc.")}
    state = under("encoder.", encoder) | {"decoder.0.weight": torch.rand(8, 512, 3, 3)}
    message, tip = file_refusal(tmp_path, state)
    assert message == (
        "x.pt: resnet18 is only a part of this network; there are convolutions beside it"
        " (decoder.0.weight)"
    )
    assert tip.startswith("To take that part alone: --prefix encoder. -- for the whole")
    found = loaded(tmp_path, state, prefix="encoder.")
    assert "left out: decoder.0.weight" in found.notes
    resnet = copy.deepcopy(resnet)
    resnet.fc = nn.Identity()
    assert_computes_the_same(found.model, resnet)


def test_a_whole_network_behind_another_convolution_is_not_taken_for_both(tmp_path, resnet):
    state = under("net.", resnet.state_dict()) | {"adapter.weight": torch.rand(3, 1, 1, 1)}
    message, tip = file_refusal(tmp_path, state)
    assert message.endswith("there are convolutions beside it (adapter.weight)")
    assert tip.startswith("To take that part alone: --prefix net. -- for the whole")
    assert_computes_the_same(loaded(tmp_path, state, prefix="net.").model, resnet)


def test_a_projection_head_beside_a_backbone_is_left_out(tmp_path, resnet):
    backbone = {n: t for n, t in resnet.state_dict().items() if not n.startswith("fc.")}
    state = under("backbone.", backbone) | {
        "projector.0.weight": torch.rand(128, 512),
        "projector.2.weight": torch.rand(64, 128),
    }
    found = loaded(tmp_path, state)
    assert found.notes[:2] == (
        "taking the resnet18 under 'backbone.'",
        "left out: projector.0.weight, projector.2.weight",
    )
    headless = copy.deepcopy(resnet)
    headless.fc = nn.Identity()
    assert_computes_the_same(found.model, headless)


# ---- refusals ------------------------------------------------------------------------------------


def test_nothing_in_the_file_resembles_a_network(tmp_path):
    state = {"state_dict": {"a.weight": torch.rand(3, 3), "b.0.bias": torch.rand(3)}}
    message, tip = file_refusal(tmp_path, state)
    assert message == (
        "x.pt (the weights under 'state_dict'): nothing in its 2 tensors resembles a torchvision"
        " network that pathconvert knows"
    )
    assert "--arch package.module:builder" in tip


def test_the_nearest_network_is_named(tmp_path, resnet):
    state = resnet.state_dict()
    del state["layer3.1.bn1.weight"], state["layer3.1.bn1.bias"]
    message, _ = file_refusal(tmp_path, {"model": under("module.", state)})
    assert message == (
        "x.pt (the weights under 'model', prefix 'module.' removed): no torchvision network has"
        " these tensors; the closest is resnet18 (2 differences): layer3.1.bn1.weight is missing;"
        " layer3.1.bn1.bias is missing"
    )


def test_a_named_network_that_is_not_there(tmp_path, resnet):
    message, tip = file_refusal(tmp_path, resnet.state_dict(), arch="resnet34")
    assert message.startswith("x.pt: the tensors are not those of resnet34 (")
    assert "--arch" in tip


def test_a_number_of_classes_that_the_file_does_not_have(tmp_path, resnet):
    message, _ = file_refusal(tmp_path, resnet.state_dict(), num_classes=9)
    assert message == (
        "x.pt: no torchvision network has these tensors; the closest is resnet18 (2 differences):"
        " fc.weight has shape [7, 512], expected [9, 512]; fc.bias has shape [7], expected [9]"
    )
    message, _ = file_refusal(tmp_path, resnet.state_dict(), num_classes=9, arch="resnet18")
    assert "fc.bias has shape [7], expected [9]" in message


def test_the_other_state_dicts_of_a_file_are_named(tmp_path, resnet):
    state = resnet.state_dict()
    content = {"state_dict": state, "state_dict_ema": {n: t + 0 for n, t in state.items()}}
    assert loaded(tmp_path, content).notes == (
        "taking the weights under 'state_dict', not those under 'state_dict_ema' (--key"
        " state_dict_ema)",
    )
    assert loaded(tmp_path, content, key="state_dict_ema").notes == (
        "taking the weights under 'state_dict_ema'",
    )
