"""Detectors of torchvision, converted part by part, with random weights on small images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conversions import assert_restored, image
from sample_networks import network
from torch import nn

from pathconvert.conversion.equivalence import forward_outputs, verify_conversion
from pathconvert.conversion.reparameterize import convert_traced, reparameterize
from pathconvert.conversion.tracing.parts import trace_network

pytestmark = pytest.mark.usefixtures("free_memory")

ROI = ("backbone", "rpn.head", "roi_heads.box_head", "roi_heads.box_predictor")
DETECTORS = {
    "fasterrcnn_resnet50_fpn": (ROI, 49, 14, 8896),
    "fasterrcnn_resnet50_fpn_v2": (ROI, 53, 14, 9152),
    "maskrcnn_resnet50_fpn": (
        (*ROI, "roi_heads.mask_head", "roi_heads.mask_predictor"),
        55,
        16,
        9920,
    ),
    "maskrcnn_resnet50_fpn_v2": (
        (*ROI, "roi_heads.mask_head", "roi_heads.mask_predictor"),
        59,
        16,
        10176,
    ),
    "keypointrcnn_resnet50_fpn": (
        (*ROI, "roi_heads.keypoint_head", "roi_heads.keypoint_predictor"),
        58,
        16,
        12480,
    ),
    "retinanet_resnet50_fpn": (("backbone", "head"), 53, 12, 9664),
    "retinanet_resnet50_fpn_v2": (("backbone", "head"), 61, 20, 9664),
    "fcos_resnet50_fpn": (("backbone", "head"), 62, 21, 9664),
    "ssd300_vgg16": (("backbone", "head"), 36, 19, 5376),
}


def detector(name: str, side: int = 64, **arguments: Any) -> nn.Module:
    """A detector for small images, with box offsets so small that random weights give some valid
    boxes.
    """
    model = network(name, **arguments)
    if not name.startswith("ssd"):
        model.transform.min_size, model.transform.max_size = (side,), side
    if hasattr(model, "roi_heads"):
        model.roi_heads.score_thresh, model.roi_heads.detections_per_img = 0.0, 4
        model.rpn._post_nms_top_n["testing"] = 8
        with torch.no_grad():
            model.rpn.head.bbox_pred.weight *= 1e-3
            model.roi_heads.box_predictor.bbox_pred.weight *= 1e-3
    return model


@pytest.mark.parametrize("frozen", [False, True], ids=["batchnorm", "frozen"])
@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_are_converted_part_by_part(name: str, frozen: bool) -> None:
    if frozen and name not in ("maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn"):
        pytest.skip("frozen backbones: one with two stages and one with one will do")
    model = detector(name, **({"frozen_batch_norm": True} if frozen else {}))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    traced = trace_network(model, image())
    conversion = convert_traced(model, traced, "block", "max", "unit")
    counts = conversion.counts()
    parts, groups, pinned, rescaled = DETECTORS[name]
    assert conversion.parts == parts
    assert conversion.left_alone == {}
    assert (counts["groups"], counts["groups_pinned"], counts["channels_rescaled"]) == (
        groups,
        pinned,
        rescaled,
    )
    report = verify_conversion(model, conversion.model, parts, image())
    if not report.passed:  # one image gives few outputs to measure noise on (networks/checked.py)
        report = verify_conversion(model, conversion.model, parts, [image()[0].flip(-1)])
    assert report.passed, report
    assert report.max_abs > 0
    assert_restored(conversion, model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    # the trace leaves no meta tensors in it
    assert all(not t.is_meta for t in forward_outputs(model, (image(),)))


def test_detectors_in_powers_of_two_detect_the_same() -> None:
    model = detector("keypointrcnn_resnet50_fpn")
    conversion = reparameterize(model, image(), scope="network", pivot="matching", gauge="pow2")
    outputs = [forward_outputs(network, (image(),)) for network in (model, conversion.model)]
    assert outputs[0][0].numel() > 0
    assert all(map(torch.equal, *outputs))
    assert_restored(conversion, model)


def test_detectors_without_a_box() -> None:
    """Heads that receive an empty batch are converted as parts too."""
    model = detector("maskrcnn_resnet50_fpn")
    model.roi_heads.score_thresh = 1.0
    conversion = reparameterize(model, image(), pivot="max")
    assert conversion.parts == DETECTORS["maskrcnn_resnet50_fpn"][0]
    assert conversion.counts()["channels_rescaled"] == DETECTORS["maskrcnn_resnet50_fpn"][3]
