"""Move pretrained ReLU networks into path space and back, exactly.

The names below are imported when first used: ``import pathconvert`` alone loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pathconvert.version import __version__

if TYPE_CHECKING:
    from pathconvert import export
    from pathconvert.convert import Conversion, Pivot, ScaleGroup, reparameterize, restore
    from pathconvert.entering import to_path_bn
    from pathconvert.equivalence import EquivalenceReport, verify
    from pathconvert.files import load, save
    from pathconvert.path_bn import PathBN, leave_path_bn

_HOMES = {
    "convert": ("Conversion", "Pivot", "ScaleGroup", "reparameterize", "restore"),
    "files": ("load", "save"),
    "equivalence": ("EquivalenceReport", "verify"),
    "entering": ("to_path_bn",),
    "path_bn": ("PathBN", "leave_path_bn"),
}
_SUBPACKAGES = ("export",)

__all__ = [
    "Conversion",
    "EquivalenceReport",
    "PathBN",
    "Pivot",
    "ScaleGroup",
    "__version__",
    "export",
    "leave_path_bn",
    "load",
    "reparameterize",
    "restore",
    "save",
    "to_path_bn",
    "verify",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"pathconvert.{home}"), name)
            globals()[name] = value
            return value
    if name in _SUBPACKAGES:
        return importlib.import_module(f"pathconvert.{name}")
    raise AttributeError(f"module 'pathconvert' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
