"""timm's ReLU networks with random weights: equal in float64 in both scopes, and counted.

Before the counts were kept, every free channel was scaled by a random factor, which changed no
output by more than 1e-14 of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conversions import RELATIVE, draw
from torch import Tensor, nn

import pathconvert
from pathconvert.conversion.groups import find_units
from pathconvert.conversion.rescale import rescale
from pathconvert.conversion.tracing.parts import trace_network

timm = pytest.importorskip("timm")

#: Name → channels rescaled in scope block, in scope network, and in all.
COUNTS: dict[str, tuple[int, int, int]] = {
    "cspresnet50": (12480, 14400, 15400),
    "darknet17": (1024, 3008, 4008),
    "densenet121": (41760, 41760, 42824),
    "densenetblur121d": (41824, 41824, 42888),
    "dla34": (3712, 5056, 6056),
    "dla46_c": (1920, 2624, 3624),
    "dpn68": (32548, 32548, 33558),
    "ecaresnet26t": (3960, 3964, 4972),
    "ese_vovnet19b_dw": (7808, 7808, 11368),
    "fbnetc_100": (20512, 20944, 21944),
    "gernet_s": (11725, 13021, 14021),
    "ghostnet_050": (6308, 6524, 9492),
    "hgnetv2_b0": (1629, 1630, 2661),
    "hrnet_w18_small": (4096, 6384, 7384),
    "inception_v4": (31584, 31584, 32584),
    "legacy_seresnet18": (2040, 3000, 5920),
    "legacy_xception": (40216, 42352, 43352),
    "mnasnet_small": (8032, 8176, 11672),
    "mobileone_s0": (0, 8480, 9480),
    "regnetx_002": (6560, 7160, 8160),
    "regnety_002": (7292, 7892, 12156),
    "repghostnet_050": (4892, 6844, 8832),
    "repvgg_a0": (0, 4496, 5496),
    "res2net50_14w_8s": (5062, 12598, 13598),
    "resnest14d": (2528, 6368, 9288),
    "resnet18": (1920, 2880, 3880),
    "resnetblur18": (1920, 2880, 3880),
    "resnetv2_18": (3904, 3904, 4904),
    "selecsls42": (9824, 9824, 10824),
    "semnasnet_050": (8678, 8894, 11958),
    "skresnet18": (2176, 3136, 7976),
    "tresnet_m": (11264, 14528, 19048),
    "vgg11_bn": (10944, 10944, 11944),
    "vovnet39a": (10208, 10208, 11208),
    "xception41": (3616, 3936, 4936),
    "xception41p": (3936, 3936, 5064),
}
#: Fewer and narrower blocks than the network's own, which take ten times as long: two strides, a
#: skip that is an identity, and the last block, which has no skip.
_XCEPTION_BLOCKS = [
    {"in_chs": 64, "out_chs": 128, "stride": 2},
    {"in_chs": 128, "out_chs": 128, "stride": 1},
    {"in_chs": 128, "out_chs": (128, 192, 192), "stride": 2},
    {"in_chs": 192, "out_chs": (256, 256, 320), "stride": 1, "no_skip": True},
]
SETTINGS: dict[str, dict[str, Any]] = {
    "xception41": {"block_cfg": _XCEPTION_BLOCKS},
    "xception41p": {"block_cfg": _XCEPTION_BLOCKS},
}
#: The side of the images where 64 pixels are too few.
SIDES = {"inception_v4": 96}


def network(name: str) -> nn.Module:
    """A network whose BatchNorms do something, in evaluation mode and float64."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, **SETTINGS.get(name, {})).double().eval()
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (layer.weight, 0.5, 1.5),
                (layer.bias, -0.2, 0.2),
                (layer.running_mean, -0.2, 0.2),
                (layer.running_var, 0.5, 1.5),
            ):
                if tensor is not None:
                    tensor.data.uniform_(low, high)
    return model


@torch.no_grad()
def difference(model: nn.Module, x: Tensor, expected: Tensor) -> float:
    return float((model(x) - expected).abs().max() / expected.abs().max())


def scaled_at_random(model: nn.Module, x: Tensor) -> nn.Module:
    """The network with a random factor on every free channel."""
    units = find_units(trace_network(model, x).trace)
    scales = np.ones(units.count)
    generator = np.random.default_rng(0)
    for group in units.groups:
        if group.pinned_by is None:
            factors = np.exp(generator.uniform(0.5, 2, group.size))
            scales[group.start : group.start + group.size] = factors
    return rescale(model, units.slots, scales)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.usefixtures("free_memory")
def test_equal_and_counted(name: str) -> None:
    model = network(name)
    side = SIDES.get(name, 64)
    x = draw((2, 3, side, side))
    with torch.no_grad():
        expected = model(x)
    assert difference(scaled_at_random(model, x), x, expected) <= RELATIVE[torch.float64]
    rescaled = []
    for scope in ("block", "network"):
        converted = pathconvert.reparameterize(model, x, scope=scope)
        assert difference(converted.model, x, expected) <= RELATIVE[torch.float64]
        rescaled.append(converted.counts()["channels_rescaled"])
    channels = sum(group.size for group in converted.groups)
    assert (*rescaled, channels) == COUNTS[name]
