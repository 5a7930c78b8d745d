"""Fine-tuning in path space: G-SGD, its baselines, and the run that trains, evaluates and resumes."""

from pathconvert.training.gsgd import GSGD, path_parameter_groups

__all__ = ["GSGD", "path_parameter_groups"]
