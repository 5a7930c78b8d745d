"""Fold and export to ONNX.

The names below are imported when first used: ``import pathconvert.export`` alone loads neither torch nor onnx.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathconvert.export.folding import fold, unfolded
    from pathconvert.export.gauge import balanced
    from pathconvert.export.metadata import ModelCard, Preprocessing, read_card, write_card
    from pathconvert.export.onnx_export import ExportReport, export_onnx

_HOMES = {
    "folding": ("fold", "unfolded"),
    "gauge": ("balanced",),
    "metadata": ("ModelCard", "Preprocessing", "read_card", "write_card"),
    "onnx_export": ("ExportReport", "export_onnx"),
}

__all__ = [
    "ExportReport",
    "ModelCard",
    "Preprocessing",
    "balanced",
    "export_onnx",
    "fold",
    "read_card",
    "unfolded",
    "write_card",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"pathconvert.export.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'pathconvert.export' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
