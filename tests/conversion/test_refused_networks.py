"""Networks of torchvision that are refused whole and converted in part, with random weights."""

from __future__ import annotations

import pytest
import torch
from conversions import assert_close, assert_restored, draw, image
from sample_networks import network

from pathconvert.conversion.equivalence import forward_outputs
from pathconvert.conversion.reparameterize import convert_traced
from pathconvert.conversion.tracing.parts import trace_network
from pathconvert.errors import RefusedNetwork

pytestmark = pytest.mark.usefixtures("free_memory")

REFUSED = {
    "mobilenet_v2": ("features.0.2 is ReLU6", "MobileNetV2"),
    "mobilenet_v3_small": ("features.0.2 is Hardswish", "MobileNetV3"),
    "mobilenet_v3_large": ("features.0.2 is Hardswish", "MobileNetV3"),
    "efficientnet_b0": ("features.0.2 is SiLU", "EfficientNet"),
    "efficientnet_v2_s": ("features.0.2 is SiLU", "EfficientNet"),
    "convnext_tiny": ("features.1.0.block.4 is GELU", "ConvNeXt"),
    "swin_t": ("features.1.0.mlp.1 is GELU", "SwinTransformer"),
    "swin_v2_t": ("features.1.0.mlp.1 is GELU", "SwinTransformer"),
    "vit_b_16": ("encoder.layers.encoder_layer_0.mlp.1 is GELU", "VisionTransformer"),
    "maxvit_t": ("stem.0.2 is GELU", "MaxVit"),
    "mvit_v1_b": ("blocks.0.mlp.1 is GELU", "MViT"),
    "mvit_v2_s": ("blocks.0.mlp.1 is GELU", "MViT"),
    "lraspp_mobilenet_v3_large": ("backbone.0.2 is Hardswish", "LRASPP"),
    "deeplabv3_mobilenet_v3_large": ("backbone.0.2 is Hardswish", "DeepLabV3"),
    "ssdlite320_mobilenet_v3_large": ("backbone.features.0.0.2 is Hardswish", "SSD"),
}
QUICK = (
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "convnext_tiny",
    "lraspp_mobilenet_v3_large",
)
INPUTS = {"mvit_v1_b": (1, 3, 16, 224, 224), "mvit_v2_s": (1, 3, 16, 224, 224),
    "vit_b_16": (1, 3, 224, 224),
          "maxvit_t": (1, 3, 224, 224)}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_converted_in_part(name: str) -> None:
    quick = name in QUICK
    model = network(name, torch.float64 if quick else torch.float32)
    inputs = image() if name.startswith("ssd") else draw(INPUTS.get(name, (1, 3, 64, 64)))
    traced = trace_network(model, inputs)
    with pytest.raises(RefusedNetwork) as caught:
        convert_traced(model, traced, "block", "matching", "unit")
    offender, kind = REFUSED[name]
    assert (
        str(caught.value)
        == f"{offender}, which is not positively homogeneous: {kind} cannot be moved to path space"
        " as a whole"
    )
    assert (
        caught.value.tip
        == "--partial (partial=True) pins what enters such an activation and converts the rest"
    )

    conversion = convert_traced(model, traced, "block", "max", "unit", partial=True)
    # EfficientNetV2-S has SiLU or a residual add after every layer, so no unit is free
    assert (conversion.counts()["channels_rescaled"] > 0) == (name != "efficientnet_v2_s")
    if quick:
        assert_close(forward_outputs(conversion.model, inputs), forward_outputs(model, inputs))
        assert_restored(conversion, model)
