"""Fine-tuning in path space: G-SGD, its baselines, and the run that trains, evaluates and resumes."""

from pathconvert.training.gsgd import GSGD, path_parameter_groups
from pathconvert.training.path_sgd import PathSGD

__all__ = ["GSGD", "PathSGD", "path_parameter_groups"]
