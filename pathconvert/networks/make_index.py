"""Write ``architectures.json`` anew: ``python -m pathconvert.networks.make_index``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torchvision
from torch import nn

from pathconvert.networks import cifar
from pathconvert.networks.builders import build_torchvision
from pathconvert.networks.names_index import (
    INDEX_VERSION,
    codes_of,
    layer_codes_of,
    shapes_of,
)

_UNSUPPORTED = {
    "mobilenet_v2": "ReLU6 is not positively homogeneous",
    "mobilenet_v3": "Hardswish is not positively homogeneous",
    "mobilenet_v3_large": "Hardswish is not positively homogeneous",
    "ssdlite320": "Hardswish is not positively homogeneous",
    "mobilenet": "Hardswish is not positively homogeneous",
    "efficientnet": "SiLU is not positively homogeneous",
    "convnext": "GELU is not positively homogeneous",
    "swin": "GELU is not positively homogeneous",
    "vit": "GELU is not positively homogeneous",
    "maxvit": "GELU is not positively homogeneous",
    "mvit": "GELU is not positively homogeneous",
}
_IMAGE_SIDES = {"inception_v3": 299, "ssd300_vgg16": 300}
_AUXILIARY = ("aux_logits", "aux_loss")


def _reason(name: str) -> str:
    """Why a torchvision network is not supported; empty if it is."""
    return next((why for part, why in _UNSUPPORTED.items() if part in name), "")


def _task(builder: Callable[..., nn.Module]) -> str:
    known = ("segmentation", "detection", "video")
    return next((task for task in known if f".{task}." in builder.__module__), "classification")


def _input_size(name: str, task: str) -> tuple[int, ...]:
    if task == "video":
        side = (
            224
            if name in ("s3d", "mvit_v1_b", "mvit_v2_s", "swin3d_t", "swin3d_s", "swin3d_b")
            else 112
        )
        return (3, 16, side, side)
    side = _IMAGE_SIDES.get(name, 320 if task == "detection" else 224)
    return (3, side, side)


def _names() -> list[str]:
    """torchvision's networks without quantized versions and optical flow, and those of ours."""
    return [
        name
        for name in torchvision.models.list_models()
        if not name.startswith(("quantized_", "raft_"))
    ] + list(cifar.BUILDERS)


def describe(name: str) -> dict[str, Any]:
    """The index entry of a network, found by building it with two different numbers of classes."""
    own = cifar.BUILDERS.get(name)
    builder = own or torchvision.models.get_model_builder(name)
    auxiliary = next((argument for argument in _AUXILIARY if _takes(builder, argument)), None)
    arguments: dict[str, Any] = {auxiliary: True} if auxiliary else {}
    if _takes(builder, "init_weights"):
        arguments["init_weights"] = False
    task = "classification" if own else _task(builder)
    few, many = (
        shapes_of(build_torchvision(name, arguments | {"num_classes": n}).state_dict())
        for n in (7, 11)
    )
    prefixes: list[str] = []
    if auxiliary:
        without = shapes_of(
            build_torchvision(name, arguments | {auxiliary: False, "num_classes": 7}).state_dict()
        )
        prefixes = sorted({key.split(".")[0] + "." for key in few.keys() - without.keys()})
    main = [key for key in few if not key.startswith(tuple(prefixes))]
    head = next(
        (key, dim)
        for key in main
        for dim in range(len(few[key]))
        if few[key][dim] != many[key][dim]
    )
    slope, rest = divmod(many[head[0]][head[1]] - few[head[0]][head[1]], 4)
    assert rest == 0, name
    entry = {
        "task": task,
        "input_size": (3, 32, 32) if own else _input_size(name, task),
        "arguments": {k: v for k, v in arguments.items() if k != auxiliary},
        "head": [*head, slope, few[head[0]][head[1]] - 7 * slope],
        "reason": _reason(name),
        "codes": "".join(sorted(codes_of(few))),
        "layers": "".join(sorted(layer_codes_of(few))),
    }
    if auxiliary:
        entry["auxiliary"] = [auxiliary, prefixes]
    return entry


def _takes(builder: Callable[..., nn.Module], argument: str) -> bool:
    """Whether a torchvision builder, or the class that it builds, accepts an argument."""
    parameters = inspect.signature(builder).parameters
    if argument in parameters:
        return True
    name = getattr(builder, "__name__", "")
    return argument in ("aux_logits", "init_weights") and name in ("googlenet", "inception_v3")


def write_index(path: Path) -> None:
    """Write the index of the torchvision that is installed to ``path``."""
    networks = {name: describe(name) for name in _names()}
    content = {
        "version": INDEX_VERSION,
        "torchvision": torchvision.__version__,
        "networks": networks,
    }
    path.write_text(json.dumps(content, indent=0) + "\n")


if __name__ == "__main__":
    write_index(Path(__file__).with_name("architectures.json"))
