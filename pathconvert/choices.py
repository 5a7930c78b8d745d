"""The words that options take, each list once.

The Python interface, the settings of a run and the command line share them. This module does not
import torch, so that ``--help`` is quick.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pathconvert.errors import PathconvertError

#: Which units a conversion scales (docs/design.md): ``block`` leaves residual streams alone.
Scope = Literal["block", "network"]
#: How a conversion chooses the pivots (``conversion/pivots.py``).
PivotRule = Literal["matching", "max", "diagonal"]
#: The factors of a conversion (``conversion/scales.py``).
Gauge = Literal["unit", "pow2"]
#: The forms that a conversion makes, and all forms that a network can have.
ConvertedForm = Literal["path", "path-bn"]
Form = Literal["plain", "path", "path-bn"]
#: The gauge of an exported file (``export/graph/balancing.py``).
ExportGauge = Literal["keep", "balanced"]
#: The types of numbers that an exported file computes with.
Precision = Literal["fp32", "fp16"]
#: Where ONNX Runtime runs a file (``export/runtime/providers.py``), and where torch trains.
Device = Literal["auto", "cuda", "tensorrt", "cpu"]
TrainingDevice = Literal["auto", "cuda", "cpu"]
#: Which normalization a network is trained with.
Norm = Literal["path-bn", "bn"]
#: The optimizers of a run.
OptimizerName = Literal["gsgd", "sgd", "path-sgd"]
#: Which kind of parameter holds the coordinate of a chain (``training/optimizer/chains.py``).
Start = Literal["bn", "weight"]
#: What G-SGD divides path coordinates by (``training/optimizer/gsgd.py``).
Anchor = Literal["balanced", "initial"]
#: Where weight decay pulls the values of chains (``training/optimizer/gsgd.py``).
WeightDecay = Literal["l2", "basis_path_norm"]
#: How an image is resized (``networks/preprocessing.py``), in Pillow's words.
Interpolation = Literal["nearest", "nearest-exact", "bilinear", "bicubic", "lanczos"]
#: Random augmentation of training images. ``auto`` is crop-flip for inputs up to 64 pixels,
#: resized-crop above.
Augmentation = Literal["auto", "none", "crop-flip", "resized-crop"]
#: How the learning rate changes in a run.
Schedule = Literal["cosine", "step", "constant"]
#: Mixed precision in training.
MixedPrecision = Literal["off", "bf16", "fp16"]


def require_choice(value: Any, choices: Any) -> None:
    """Refuse a value that is not among the words of one of these types.

    Raises:
        PathconvertError: the value is none of them; the message lists them.
    """
    if value not in get_args(choices):
        raise PathconvertError(f"{value!r} is not one of {', '.join(get_args(choices))}")
