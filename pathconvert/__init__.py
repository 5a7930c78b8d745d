"""Move pretrained ReLU networks into path space and back, exactly.

The names below are imported when first used: ``import pathconvert`` alone loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pathconvert.version import __version__

if TYPE_CHECKING:
    from pathconvert import export
    from pathconvert.conversion.equivalence import EquivalenceReport, verify
    from pathconvert.conversion.reparameterize import Conversion, reparameterize
    from pathconvert.conversion.scale_groups import Pivot, ScaleGroup
    from pathconvert.networks.loading import load
    from pathconvert.networks.saving import save
    from pathconvert.path_bn.entering import to_path_bn
    from pathconvert.path_bn.form import leave_path_bn
    from pathconvert.path_bn.layer import PathBN
    from pathconvert.path_bn.restoring import restore

_HOMES = {
    "conversion.equivalence": ("EquivalenceReport", "verify"),
    "conversion.reparameterize": ("Conversion", "reparameterize"),
    "conversion.scale_groups": ("Pivot", "ScaleGroup"),
    "networks.loading": ("load",),
    "networks.saving": ("save",),
    "path_bn.entering": ("to_path_bn",),
    "path_bn.form": ("leave_path_bn",),
    "path_bn.layer": ("PathBN",),
    "path_bn.restoring": ("restore",),
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
