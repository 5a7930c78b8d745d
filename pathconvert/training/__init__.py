"""Fine-tuning in path space: G-SGD, its baselines, and the run that trains, evaluates and resumes.

The names below are imported when first used: ``import pathconvert.training`` alone loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "pathconvert.training":  # by the link at the root: its classes would be others than the package's
    raise ImportError(f"import it as pathconvert.training, not as {__name__}")

if TYPE_CHECKING:
    from pathconvert.training.optimizer.gsgd import GSGD, path_parameter_groups
    from pathconvert.training.optimizer.path_sgd import PathSGD

_HOMES = {"optimizer.gsgd": ("GSGD", "path_parameter_groups"), "optimizer.path_sgd": ("PathSGD",)}

__all__ = ["GSGD", "PathSGD", "path_parameter_groups"]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"pathconvert.training.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'pathconvert.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
