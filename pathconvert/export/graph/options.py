"""The options of an export, checked before any work, and whether an input and images fit them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from pathconvert.choices import ExportGauge, Precision
from pathconvert.errors import PathconvertError
from pathconvert.export.card import ModelCard
from pathconvert.networks.preprocessing import Preprocessing

OPSETS = range(18, 25)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The options of :func:`~pathconvert.export.graph.export.export_onnx`, which describes them.

    ``preprocessing`` and ``softmax`` are its ``with_preprocessing`` and ``with_softmax``. The words
    of ``precision`` and ``io_dtype`` are those of ``choices.Precision``, and the words of ``gauge``
    those of ``choices.ExportGauge``.

    Raises:
        PathconvertError: the opset, the precision, the type of inputs and outputs, or the gauge is
            not offered.
    """

    opset: int = 20
    precision: str = "fp32"
    dynamic_batch: bool = True
    dynamic_size: bool = False
    preprocessing: Preprocessing | None = None
    softmax: bool = False
    card: ModelCard | None = None
    images: Tensor | None = None
    io_dtype: str = "fp32"
    auxiliary: bool = False
    gauge: str = "keep"

    def __post_init__(self) -> None:
        """Refuse what is not offered, so that options that exist can be used."""
        if self.opset not in OPSETS:
            raise PathconvertError(
                f"opset {self.opset} is not offered: "
                f"pathconvert writes {OPSETS[0]} to {OPSETS[-1]}",
                "Use the default, --opset 20; the exporter cannot write opsets below 18.",
            )
        precisions, gauges = get_args(Precision), get_args(ExportGauge)
        if self.precision not in precisions:
            brain = "bf" in self.precision
            name = "bf16" if brain else repr(self.precision)
            reason = ": the exporter writes invalid files for it" if brain else ""
            raise PathconvertError(
                f"precision {name} is not offered{reason}",
                f"Choose one of {', '.join(precisions)}.",
            )
        only_fp32 = self.precision != "fp16"
        if self.io_dtype not in precisions or (self.io_dtype == "fp16" and only_fp32):
            raise PathconvertError(
                f"inputs and outputs in {self.io_dtype!r} are not offered "
                f"with precision {self.precision}",
                "Use --io-dtype fp32.",
            )
        if self.gauge not in gauges:
            raise PathconvertError(
                f"gauge {self.gauge!r} is not offered for an export",
                f"Choose one of {', '.join(gauges)}.",
            )

    def filled_card(self) -> ModelCard:
        """The model card with what the options say: precision, softmax and preprocessing."""
        return dataclasses.replace(
            self.card or ModelCard(preprocessing=self.preprocessing),
            precision=self.precision,
            softmax=self.softmax,
            preprocessing_in_graph=self.preprocessing is not None,
        )


def check_inputs(example_input: Any, options: ExportOptions) -> None:
    """Check that the input can be preprocessed, and that the images fit it.

    Args:
        example_input: an input, [N, …]. What is not a tensor is refused where the network runs.
        options: with the preprocessing, and the images to compare on.

    Raises:
        PathconvertError: preprocessing was asked for, but the input is not a batch of images; or
            there are no images, or they have another size than the input.
    """
    preprocessed = options.preprocessing is not None and isinstance(example_input, Tensor)
    if preprocessed and example_input.dim() != 4:
        size = "×".join(map(str, example_input.shape))
        raise PathconvertError(
            f"an input of size {size} is not a batch of images, so it cannot be preprocessed",
            "Leave --with-preprocessing out.",
        )
    images = options.images
    if images is None:
        return
    fits = options.dynamic_size or images.shape[1:] == example_input.shape[1:]
    if not len(images) or not fits:
        given, wanted = ("×".join(map(str, t.shape)) for t in (images, example_input))
        raise PathconvertError(
            f"images of size {given} do not fit an input of size {wanted}",
            "Give at least one image, and images of the input's size.",
        )
