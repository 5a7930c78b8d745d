"""Fold networks, and export them to ONNX.

The names below are imported when they are first used: ``import pathconvert.export`` alone loads
neither torch nor onnx.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# imported by the link at the root, it would define a second copy of every class
if __name__ != "pathconvert.export":
    raise ImportError(f"import it as pathconvert.export, not as {__name__}")

if TYPE_CHECKING:
    from pathconvert.export.card import ModelCard, read_card, write_card
    from pathconvert.export.graph.balancing import balanced
    from pathconvert.export.graph.export import ExportReport, export_onnx
    from pathconvert.export.graph.folding import fold, unfolded
    from pathconvert.networks.preprocessing import Preprocessing

_HOMES = {
    "export.graph.folding": ("fold", "unfolded"),
    "export.graph.balancing": ("balanced",),
    "export.card": ("ModelCard", "read_card", "write_card"),
    "export.graph.export": ("ExportReport", "export_onnx"),
    "networks.preprocessing": ("Preprocessing",),
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
