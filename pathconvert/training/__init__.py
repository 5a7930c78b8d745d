"""Fine-tuning in path space: G-SGD, its baselines, and the run that trains, evaluates and resumes.

The names below are imported when they are first used, so that ``import pathconvert.training`` does
not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# imported through the link at the root, which would make second classes
if __name__ != "pathconvert.training":
    raise ImportError(f"import it as pathconvert.training, not as {__name__}")

if TYPE_CHECKING:
    from pathconvert.training.optimizer.gsgd import GSGD
    from pathconvert.training.optimizer.path_groups import path_parameter_groups
    from pathconvert.training.optimizer.path_sgd import PathSGD

_HOMES = {
    "GSGD": "optimizer.gsgd",
    "PathSGD": "optimizer.path_sgd",
    "path_parameter_groups": "optimizer.path_groups",
}

__all__ = ["GSGD", "PathSGD", "path_parameter_groups"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pathconvert.training' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"pathconvert.training.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
