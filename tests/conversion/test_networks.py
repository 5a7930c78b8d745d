"""All networks of torchvision that are converted whole, and two of timm's, with random weights on
small inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conversions import COMBINATIONS, assert_close, assert_restored, draw
from sample_networks import CLASSES, narrow_classifier, network
from torch import nn

from pathconvert.conversion.equivalence import forward_outputs, verify
from pathconvert.conversion.groups import find_units
from pathconvert.conversion.reparameterize import Conversion, convert_traced, reparameterize
from pathconvert.conversion.tracing.parts import Traced, trace_network
from pathconvert.networks.architectures import Architecture, build, resolve

pytestmark = pytest.mark.usefixtures("free_memory")

#: Matching takes seconds on the 2048 channels of random numbers that the larger networks have: they
#: take ``max``.
MATCHED_PARAMETERS = 15_000_000
#: Every pivot rule in both scopes and both gauges: for two networks with wide layers, on which
#: matching takes seconds.
HALF_OF_THEM = [
    (scope, pivot, gauge)
    for scope, pivot, gauge in COMBINATIONS
    if (scope == "block") == (gauge == "unit")
]


@dataclass(frozen=True)
class Counts:
    """What a conversion should find.

    ``movable`` channels are those that are rescaled, held back by float32, or near-dead: before a
    depthwise one whose BatchNorm has γ = 1e-6, which is about the limit.
    """

    groups: int
    pinned: tuple[int, int]  # groups, scope block and network
    movable: tuple[int, int]  # channels, scope block and network
    # channels that no weight other than 0 reads: before depthwise ones whose BatchNorm has γ = 0
    dead: int = 0


@dataclass(frozen=True)
class Case:
    """A network, how it is built, its input [N, …] and what is expected."""

    name: str
    counts: Counts
    arguments: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = (2, 3, 64, 64)
    training_shape: tuple[int, ...] | None = None  # where training needs a larger input
    large: bool = False  # over 80 million parameters: float32, to stay under 4 GiB

    def __str__(self) -> str:
        return "-".join(
            [self.name, *(f"{k}={v}" for k, v in self.arguments.items() if k.startswith("aux"))]
        )

    def build(self) -> nn.Module:
        model = network(self.name, torch.float32 if self.large else torch.float64, **self.arguments)
        if self.name == "s3d":
            model.avgpool = nn.AvgPool3d(
                1
            )  # its window of 2x7x7 needs 13 frames of 209x209: seconds per forward
        return model


def residual(name: str, groups: int, inner: int, streams: int, **options: Any) -> Case:
    """A network with four residual streams of ``streams`` channels in total, which scope block does
    not scale.
    """
    return Case(name, Counts(groups, (5, 1), (inner, inner + streams)), **options)


def plain(
    name: str, groups: int, movable: int, *, pinned: int = 1, dead: int = 0, **options: Any
) -> Case:
    """A network without residual adds: both scopes find the same."""
    return Case(name, Counts(groups, (pinned, pinned), (movable, movable), dead), **options)


def mnasnet(name: str, inner: int, streams: int) -> Case:
    """Five residual streams, and 17 depthwise convolutions: no weight other than 0 reads a channel
    whose γ is 0.
    """
    return Case(name, Counts(43, (6, 1), (inner, inner + streams), 17))


def gated(name: str, groups: int, gates: int, inner: int, streams: int, **options: Any) -> Case:
    """RegNetY: four residual streams, and one pinned squeeze-excitation gate per block."""
    return Case(name, Counts(groups, (5 + gates, 1 + gates), (inner, inner + streams)), **options)


def video(name: str, groups: int, inner: int) -> Case:
    return residual(name, groups, inner, 960, shape=(2, 3, 4, 32, 32))


def headed(name: str, auxiliary: dict[str, Any], counts: Counts, **options: Any) -> Case:
    return Case(name, counts, auxiliary, **options)


INCEPTION = {
    "shape": (2, 3, 75, 75),
    "training_shape": (2, 3, 299, 299),
}  # the auxiliary head needs 299
HEADS, NO_HEADS = ({"aux_logits": on, "init_weights": False} for on in (True, False))

CASES = [
    plain("alexnet", 8, 9344),
    plain("vgg11", 11, 10944, large=True),
    plain("vgg13", 13, 11136, large=True),
    plain("vgg16", 16, 12416, large=True),
    plain("vgg19", 19, 13696, large=True),
    plain("vgg11_bn", 11, 10944, large=True),
    plain("vgg13_bn", 13, 11136, large=True),
    plain("vgg16_bn", 16, 12416, large=True),
    plain("vgg19_bn", 19, 13696, large=True),
    # inner: the stem and both convolutions of a bottleneck, or the first of a basic block; streams:
    # 64 … 512, times 4
    residual("resnet18", 13, 2 * (64 + 128 + 256 + 512), 960),
    residual("resnet34", 21, 3 * 64 + 4 * 128 + 6 * 256 + 3 * 512, 960),
    residual("resnet50", 38, 64 + 2 * (3 * 64 + 4 * 128 + 6 * 256 + 3 * 512), 3840),
    residual("resnet101", 72, 64 + 2 * (3 * 64 + 4 * 128 + 23 * 256 + 3 * 512), 3840),
    residual("resnet152", 106, 64 + 2 * (3 * 64 + 8 * 128 + 36 * 256 + 3 * 512), 3840),
    residual("resnext50_32x4d", 38, 64 + 4 * (3 * 64 + 4 * 128 + 6 * 256 + 3 * 512), 3840),
    residual(
        "resnext101_32x8d", 72, 64 + 8 * (3 * 64 + 4 * 128 + 23 * 256 + 3 * 512), 3840, large=True
    ),
    residual(
        "resnext101_64x4d", 72, 64 + 8 * (3 * 64 + 4 * 128 + 23 * 256 + 3 * 512), 3840, large=True
    ),
    residual("wide_resnet50_2", 38, 64 + 4 * (3 * 64 + 4 * 128 + 6 * 256 + 3 * 512), 3840),
    residual(
        "wide_resnet101_2", 72, 64 + 4 * (3 * 64 + 4 * 128 + 23 * 256 + 3 * 512), 3840, large=True
    ),
    plain("squeezenet1_0", 26, 2976),
    plain("squeezenet1_1", 26, 2944),
    # DenseNet: only BatchNorms read the stem's pooled features, and they normalise any factor away
    plain("densenet121", 122, 41760, pinned=2),
    plain("densenet161", 162, 109872, pinned=2),
    plain("densenet169", 170, 79136, pinned=2),
    plain("densenet201", 202, 114464, pinned=2),
    headed("googlenet", HEADS, Counts(64, (3, 3), (9584, 9584))),
    headed("googlenet", NO_HEADS, Counts(58, (1, 1), (7280, 7280))),
    headed("inception_v3", HEADS, Counts(98, (2, 2), (18112, 18112)), **INCEPTION),
    headed(
        "inception_v3",
        NO_HEADS,
        Counts(95, (1, 1), (17216, 17216)),
        shape=(2, 3, 139, 139),
    ),
    plain("shufflenet_v2_x0_5", 57, 3960, dead=16),
    plain("shufflenet_v2_x1_0", 57, 8074, dead=16),
    plain("shufflenet_v2_x1_5", 57, 11704, dead=16),
    plain("shufflenet_v2_x2_0", 57, 16842, dead=16),
    mnasnet("mnasnet0_5", 9575, 224),
    mnasnet("mnasnet0_75", 13807, 336),
    mnasnet("mnasnet1_0", 17551, 432),
    mnasnet("mnasnet1_3", 22567, 568),
    residual("regnet_x_400mf", 50, 12192, 32 + 64 + 160 + 400),
    residual("regnet_x_800mf", 38, 11680, 64 + 128 + 288 + 672),
    residual("regnet_x_1_6gf", 42, 13472, 72 + 168 + 408 + 912),
    residual("regnet_x_3_2gf", 56, 19712, 96 + 192 + 432 + 1008),
    residual("regnet_x_8gf", 52, 28192, 80 + 240 + 720 + 1920),
    residual("regnet_x_16gf", 50, 34592, 256 + 512 + 896 + 2048),
    residual("regnet_x_32gf", 52, 50768, 336 + 672 + 1344 + 2520, large=True),
    gated("regnet_y_400mf", 70, 16, 9488, 48 + 104 + 208 + 440),
    gated("regnet_y_800mf", 62, 14, 10248, 64 + 144 + 320 + 784),
    gated("regnet_y_1_6gf", 114, 27, 18502, 48 + 120 + 336 + 888),
    gated("regnet_y_3_2gf", 90, 21, 22666, 72 + 216 + 576 + 1512),
    gated("regnet_y_8gf", 74, 17, 29272, 224 + 448 + 896 + 2016),
    gated("regnet_y_16gf", 78, 18, 41620, 224 + 448 + 1232 + 3024, large=True),
    gated("regnet_y_32gf", 86, 20, 53922, 232 + 696 + 1392 + 3712, large=True),
    video("r3d_18", 13, 1920),
    video("mc3_18", 13, 1920),
    video("r2plus1d_18", 30, 9795),
    plain("s3d", 78, 10608, shape=(2, 3, 8, 64, 64)),
    headed("fcn_resnet50", {"aux_loss": True}, Counts(41, (6, 2), (8384, 12224))),
    headed("fcn_resnet50", {"aux_loss": False}, Counts(39, (5, 1), (8128, 11968))),
    headed("fcn_resnet101", {"aux_loss": True}, Counts(75, (6, 2), (17088, 20928))),
    headed("deeplabv3_resnet50", {"aux_loss": True}, Counts(47, (6, 2), (9664, 13504))),
    headed("deeplabv3_resnet50", {"aux_loss": False}, Counts(45, (5, 1), (9408, 13248))),
    headed("deeplabv3_resnet101", {"aux_loss": True}, Counts(81, (6, 2), (18368, 22208))),
]


def assert_counts(conversion: Conversion, expected: Counts, *, float32: bool) -> None:
    scope = ("block", "network").index(conversion.scope)
    counts = conversion.counts()
    held, near_dead = counts["channels_held_back"], counts["channels_near_dead"]
    assert (counts["groups"], counts["groups_pinned"]) == (expected.groups, expected.pinned[scope])
    assert (counts["channels_rescaled"] + held + near_dead, counts["channels_dead"]) == (
        expected.movable[scope],
        expected.dead,
    )
    assert near_dead <= expected.dead, "each depthwise layer has one such channel"
    assert counts["channels_circular"] == 0
    assert float32 or not held


def assert_stock(conversion: Conversion, original: nn.Module, case: Case) -> None:
    """Class, names, shapes and dtypes are those of the original, and a stock network can load the
    tensors.
    """
    assert type(conversion.model) is type(original)
    kinds = [
        [(name, tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()]
        for model in (conversion.model, original)
    ]
    assert kinds[0] == kinds[1]
    stock = build(Architecture(case.name, {"num_classes": CLASSES, **case.arguments}))
    stock.load_state_dict(conversion.model.state_dict(), strict=True, assign=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_converted(case: Case) -> None:
    original = case.build()
    inputs, training_inputs = draw(case.shape), draw(case.training_shape or case.shape)
    traced = trace_network(original, training_inputs)
    assert traced.parts == ("",)
    assert traced.left_alone == {}

    expected = forward_outputs(original, inputs)
    conversion = convert_traced(original, traced, "network", "max", "pow2")
    assert_counts(conversion, case.counts, float32=case.large)
    assert all(map(torch.equal, forward_outputs(conversion.model, inputs), expected))
    assert_stock(conversion, original, case)
    assert_restored(conversion, original)
    del conversion
    if case.large:  # in float32 no check is sharper than equal bits, and a forward takes seconds
        return

    small = sum(p.numel() for p in original.parameters()) < MATCHED_PARAMETERS
    conversion = convert_traced(original, traced, "block", "matching" if small else "max", "unit")
    assert_counts(conversion, case.counts, float32=case.large)
    assert_close(forward_outputs(conversion.model, inputs), expected)
    in_training = [
        forward_outputs(model, training_inputs, training=True)
        for model in (conversion.model, original)
    ]
    assert_close(*in_training)
    assert_restored(conversion, original)


@pytest.mark.parametrize(
    "name", ["resnet18", "densenet121", "shufflenet_v2_x0_5", "squeezenet1_1", "mc3_18"]
)
def test_noise(name: str) -> None:
    """In float32, :func:`verify` finds no more noise than the original has, in evaluation and in
    training mode.
    """
    case = next(case for case in CASES if str(case) == name)
    original, inputs = network(name), draw(case.shape)
    conversion = reparameterize(original, inputs)
    for training in (False, True):
        report = verify(original, conversion.model, inputs, training=training)
        assert report.passed, report
        assert report.max_abs > 0


def test_the_largest_is_traced() -> None:
    """regnet_y_128gf is only traced, as it has 645 million parameters.

    Its numbers are in benchmarks/convert.py.
    """
    model = build(Architecture("regnet_y_128gf", {"num_classes": CLASSES}))
    groups = find_units(trace_network(model, draw((2, 3, 64, 64))).trace).groups
    pinned = [group for group in groups if group.pinned_by]
    residual_streams = [group.size for group in groups if group.residual]
    assert (len(groups), len(pinned)) == (
        114,
        28,
    )  # 27 blocks: two units, one excitation and one gate each; the stem …
    assert residual_streams == [528, 1056, 2904, 7392]


def test_s3d_at_its_own_size() -> None:
    model = build(Architecture("s3d", {"num_classes": CLASSES}))
    groups = find_units(trace_network(model, draw((1, 3, 16, 224, 224))).trace).groups
    assert (len(groups), [group.name for group in groups if group.pinned_by]) == (
        78,
        ["classifier.1"],
    )


# ---- every combination ---------------------------------------------------------------------------


SMALLEST = [
    "alexnet", "vgg11", "vgg11_bn", "resnet18", "resnext50_32x4d", "squeezenet1_1", "densenet121",
    "googlenet-aux_logits=True", "inception_v3-aux_logits=True", "shufflenet_v2_x0_5",
    "mnasnet0_5", "regnet_x_400mf",
    "regnet_y_400mf", "mc3_18", "r2plus1d_18", "s3d", "fcn_resnet50-aux_loss=True",
]  # fmt: skip


@pytest.mark.parametrize("name", SMALLEST)
def test_every_combination(name: str) -> None:
    case = next(case for case in CASES if str(case) == name)
    torch.manual_seed(0)
    original = case.build().double()
    if name.startswith(("alexnet", "vgg")):
        original = narrow_classifier(original)
    inputs = draw((1, *case.shape[1:]))
    traced = trace_network(original, draw(case.training_shape or case.shape))
    expected = forward_outputs(original, inputs)
    for scope, pivot, gauge in (
        HALF_OF_THEM if name.startswith(("resnext", "fcn")) else COMBINATIONS
    ):
        conversion = convert_traced(original, traced, scope, pivot, gauge)
        outputs = forward_outputs(conversion.model, inputs)
        if gauge == "pow2":
            assert all(map(torch.equal, outputs, expected)), (scope, pivot)
        else:
            assert_close(outputs, expected)
            assert_pivots_are_one(conversion)
        assert_restored(conversion, original)


def assert_pivots_are_one(conversion: Conversion) -> None:
    """PBN Theorem 1, read off the converted network: every chosen effective weight is ±1, or ±2^e
    where it was recentred, and has kept its sign.
    """
    every_pivot = [pivot for group in conversion.groups for pivot in group.pivots]
    tensors = dict(conversion.model.named_buffers()) | dict(conversion.model.named_parameters())
    for layer in conversion.units.layers:
        hosted = [
            (pivot, pivot.sign * 2.0**exponent)
            for pivot, exponent in zip(every_pivot, conversion.exponents().tolist(), strict=True)
            if pivot is not None and pivot.parameter == layer.parameter
        ]
        if not hosted:
            continue
        weight = tensors[layer.parameter].detach()
        for size in weight.shape[2:]:
            weight = weight.select(2, size // 2)
        gains = torch.ones(len(layer.rows), dtype=torch.float64)
        for row, (index, channel) in enumerate(zip(layer.batch_norms, layer.channels, strict=True)):
            if index >= 0:
                call = conversion.units.batch_norms[index]
                var = tensors[call.var][channel] if call.var else 1.0
                gains[row] = tensors[call.weight][channel] / math.sqrt(var + call.eps)
        rows = torch.tensor([pivot.row for pivot, _ in hosted])
        columns = torch.tensor([pivot.column for pivot, _ in hosted]) % weight.shape[1]
        expected = torch.tensor([value for _, value in hosted], dtype=torch.float64)
        # 1e-12: a factor and its neighbour's are products of up to a hundred pivots, each rounded
        # once
        pivots = weight[rows, columns] * gains[rows]
        torch.testing.assert_close(pivots, expected, rtol=1e-12, atol=0)


# ---- reasons -------------------------------------------------------------------------------------


OUTPUT = "is a network output"
DENSENET = (
    "enters the BatchNorm features.denseblock1.denselayer1.norm1, which normalises any factor away"
)


@pytest.mark.parametrize("name", SMALLEST)
def test_no_channel_is_left_without_a_reason(name: str) -> None:
    """Scope network: only outputs and gates are pinned (and DenseNet's stem, whose factor has no
    effect).
    """
    case = next(case for case in CASES if str(case) == name)
    model = case.build()
    traced = trace_network(model, draw(case.training_shape or case.shape))
    reasons = {group.pinned_by for group in find_units(traced.trace).groups} - {None, OUTPUT}
    gates = {
        f"enters {path}.scale_activation (sigmoid), which is not homogeneous"
        for path, module in model.named_modules()
        if type(module).__name__ == "SqueezeExcitation"
    }
    assert reasons == (gates | ({DENSENET} if case.name.startswith("densenet") else set()))


# ---- timm ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet10t", "vovnet39a"])
def test_timm(name: str) -> None:
    pytest.importorskip("timm", reason="timm is not installed (pathconvert does not depend on it)")
    architecture = resolve(f"timm/{name}", None, num_classes=CLASSES)
    assert architecture.input_size is not None
    torch.manual_seed(0)
    model = build(architecture).double()
    traced: Traced = trace_network(model, draw((2, 3, 64, 64)))
    for scope, pivot, gauge in COMBINATIONS:
        conversion = convert_traced(model, traced, scope, pivot, gauge)
        assert conversion.counts()["channels_rescaled"] > 0
        assert_close(
            *(
                forward_outputs(network, draw((2, 3, 64, 64)))
                for network in (conversion.model, model)
            )
        )
        assert_restored(conversion, model)
