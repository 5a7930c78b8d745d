"""Fold and export to ONNX.

The names below are imported when first used: ``import pathconvert.export`` alone loads neither torch nor onnx.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathconvert.export.folding import fold, unfolded
    from pathconvert.export.gauge import balanced
    from pathconvert.export.metadata import ModelCard, read_card, write_card
    from pathconvert.export.onnx_export import ExportReport, export_onnx
    from pathconvert.preprocessing import Preprocessing

_HOMES = {
    "export.folding": ("fold", "unfolded"),
    "export.gauge": ("balanced",),
    "export.metadata": ("ModelCard", "read_card", "write_card"),
    "export.onnx_export": ("ExportReport", "export_onnx"),
    "preprocessing": ("Preprocessing",),
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
            value = getattr(importlib.import_module(f"pathconvert.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'pathconvert.export' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
