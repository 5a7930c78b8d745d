"""The settings of a fine-tuning run and their defaults.

They are also the options of ``pathconvert finetune``. A run's folder keeps its settings as
``config.yaml``, in the format that ``--config`` reads. This module does not import torch, so that
``--help`` is quick.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from pathconvert.choices import (
    Anchor,
    Augmentation,
    Interpolation,
    MixedPrecision,
    Norm,
    OptimizerName,
    PivotRule,
    Schedule,
    Scope,
    Start,
    WeightDecay,
)
from pathconvert.errors import PathconvertError


class Settings(BaseModel):
    """The settings of a run.

    Where a setting is None, its value follows from the others, the network or the data. Values are
    checked however the settings are made: in Python, from a YAML file or by the command line.
    Numbers may be given as text (``"1e-3"``), texts as numbers or lists of them, and ``amp="off"``
    as False, because a YAML file may hold them so.

    Raises:
        PathconvertError: there is no such setting, a value has the wrong type or is out of range,
            or a setting would have no effect with the chosen optimizer.
    """

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, defer_build=True
    )

    # data
    data: str = Field(
        default="",
        description=(
            "Labelled images: a folder with train/ and val/, one folder of class folders, "
            "or NAME:ROOT (torchvision)."
        ),
    )
    val_fraction: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="Share of the images to hold out for validation where there is no val/ folder.",
    )
    limit_train: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Train on at most this many images, drawn evenly from the classes (default: all)."
        ),
    )
    limit_val: int | None = Field(
        default=None, ge=1, description="Validate on at most this many images (default: all)."
    )
    size: str | None = Field(
        default=None,
        description="Size to which images are cropped, such as 224 or 224x160 (default: the "
        "network's input size).",
    )
    resize: str | None = Field(
        default=None,
        description=(
            "Length of an image's shorter side before the crop, such as 256, or height and width, "
            "such as 256x320 (default: as the weights were trained)."
        ),
    )
    mean: str | None = Field(
        default=None,
        description=(
            "Mean of each channel, for pixels in [0, 1], such as 0.5 or 0.485,0.456,0.406 "
            "(default: as the weights were trained)."
        ),
    )
    std: str | None = Field(
        default=None,
        description=(
            "Standard deviation of each channel, given like --mean "
            "(default: as the weights were trained)."
        ),
    )
    interpolation: Interpolation | None = Field(
        default=None,
        description="How images are resized (default: as the weights were trained).",
    )
    labels: str = Field(
        default="",
        description=(
            "File with the names of the classes, one per line or as JSON, in the order of the "
            "outputs (default: the names in the data)."
        ),
    )
    augment: Augmentation = Field(
        default="auto",
        description=(
            "Random augmentation of training images; auto is crop-flip up to 64 pixels "
            "and resized-crop above."
        ),
    )
    workers: int | None = Field(
        default=None,
        ge=0,
        description=(
            "Processes that read images; 0 reads in the main process "
            "(default: 0 on the CPU, 4 on a GPU)."
        ),
    )
    # the network
    norm: Norm = Field(
        default="path-bn",
        description="Train with Path-BN layers, or keep the network's BatchNorm layers.",
    )
    pivot: PivotRule | None = Field(
        default=None,
        description="How to choose pivots when a plain network is converted (default: matching).",
    )
    scope: Scope | None = Field(
        default=None,
        description=(
            "Which units to scale when a plain network is converted; network takes "
            "residual streams too (default: block)."
        ),
    )
    skip_scale: float | None = Field(
        default=None,
        gt=0,
        description=(
            "λ, the factor of the pivots in Path-BN layers (default: the source's own, or 1)."
        ),
    )
    calibration_images: int = Field(
        default=512,
        ge=1,
        description="Training images from which the statistics of new Path-BN layers are computed.",
    )
    num_classes: int | None = Field(
        default=None,
        ge=1,
        description="Outputs of the classifier (default: the number of classes in the data).",
    )
    new_head: bool = Field(
        default=False,
        description="Start from a new classifier even if the number of classes is the same.",
    )
    freeze_backbone: bool = Field(default=False, description="Train only the classifier.")
    # the optimizer
    optimizer: OptimizerName = Field(
        default="gsgd",
        description="G-SGD (SGD in path space), SGD, or Path-SGD (for small networks only).",
    )
    lr: float = Field(
        default=0.01,
        gt=0,
        description="Learning rate at the start of the schedule, after the warm-up.",
    )
    ordinary_lr: float | None = Field(
        default=None,
        gt=0,
        description="Learning rate of parameters that lie on no chain (default: --lr).",
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Momentum of the optimizer.")
    weight_decay: float = Field(
        default=0.0, ge=0, description="Weight decay, applied to path coordinates with G-SGD."
    )
    decay: WeightDecay = Field(
        default="l2",
        description=(
            "Where weight decay pulls the values of chains: l2 to 0, basis_path_norm to ±1."
        ),
    )
    anchor: Literal[Anchor, "none"] = Field(
        default="balanced",
        description=(
            "Constants that G-SGD divides path coordinates by: each chain's first size "
            "(initial), the sizes of all units too (balanced), or none (as in the papers)."
        ),
    )
    start: Start = Field(
        default="bn",
        description=(
            "The parameter that holds a chain's coordinate: γ of a BatchNorm, or a weight "
            "(as in the papers)."
        ),
    )
    weight_norm: bool = Field(
        default=False,
        description=(
            "Multiply G-SGD's gradients by the norm of each unit's weights (the papers' wnorm)."
        ),
    )
    clip: float | None = Field(
        default=None,
        gt=0,
        description="Clip the norm of the gradient to this value (default: no clipping).",
    )
    accumulate: int = Field(
        default=1,
        ge=1,
        description="Number of batches whose gradients are averaged for one step.",
    )
    # the schedule
    epochs: int = Field(default=10, ge=1, description="Number of passes over the training images.")
    steps: int | None = Field(
        default=None, ge=1, description="Number of steps to train for; overrides --epochs."
    )
    batch_size: int = Field(default=64, ge=1, description="Images per batch, over all processes.")
    schedule: Schedule = Field(
        default="cosine",
        description=(
            "Learning rate schedule; step multiplies the rate by 0.1 at one half and "
            "three quarters of the run."
        ),
    )
    warmup_steps: int = Field(
        default=0,
        ge=0,
        description="Number of steps over which the learning rate rises to --lr.",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Label smoothing: the share of each label that is spread over all classes.",
    )
    mixup: float = Field(default=0.0, ge=0, description="Parameter α of mixup; 0 turns mixup off.")
    ema: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description=(
            "Keep a moving average of the weights with this decay, and validate and save "
            "the average."
        ),
    )
    # the machine
    amp: MixedPrecision = Field(default="off", description="Mixed precision.")
    channels_last: bool = Field(
        default=False,
        description="Use the channels-last memory format, which is often faster on GPUs.",
    )
    compile: bool = Field(default=False, description="Compile the network with torch.compile.")
    checkpoint_minutes: float = Field(
        default=10.0, gt=0, description="Minutes between checkpoints within an epoch."
    )
    seed: int = Field(default=0, ge=0, description="Random seed.")

    @field_validator("*", mode="before")
    @classmethod
    def _number_from_text(cls, value: Any, info: ValidationInfo) -> Any:
        """The number that a text means: YAML 1.1 reads ``1e-3`` as text."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, str) and float in (annotation, *get_args(annotation)):
            with suppress(ValueError):
                return float(value)
        return value

    @field_validator("data", "size", "resize", "mean", "std", mode="before")
    @classmethod
    def _text_from_numbers(cls, value: Any) -> Any:
        """The text that numbers mean, as in ``size: 32`` and ``mean: [0.5, 0.5, 0.5]``."""
        if isinstance(value, list | tuple):
            return ",".join(map(str, value))
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        return value

    @field_validator("amp", mode="before")
    @classmethod
    def _off_from_false(cls, value: Any) -> Any:
        """The word ``off``, which YAML 1.1 reads as False."""
        return "off" if value is False else value

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_in_one_line(cls, values: Any, check: ModelWrapValidatorHandler[Self]) -> Self:
        """Turn pydantic's error into a PathconvertError about the first setting that is wrong."""
        try:
            return check(values)
        except ValidationError as error:
            raise _refusal(error.errors()[0]) from error

    @model_validator(mode="after")
    def _require_effect(self) -> Self:
        """Refuse settings that have no effect with the chosen optimizer."""
        if self.optimizer == "gsgd":
            return self
        unused = dict.fromkeys(
            ("ordinary_lr", "anchor", "start", "decay", "weight_norm"), "--optimizer gsgd"
        )
        if self.norm == "bn":  # these train the network without converting it
            unused |= dict.fromkeys(("pivot", "scope"), "a network that gets converted")
        for name, field in type(self).model_fields.items():
            if name in unused and getattr(self, name) != field.default:
                raise PathconvertError(
                    f"{flag(name)} has no effect with --optimizer {self.optimizer} "
                    f"--norm {self.norm}: it needs {unused[name]}",
                    "Leave it out, or choose another --optimizer or --norm.",
                )
        return self

    def to_yaml(self) -> str:
        """All settings, in the format of ``config.yaml``."""
        import yaml

        text: str = yaml.safe_dump(self.model_dump(), sort_keys=False)
        return text

    @staticmethod
    def from_file(path: Path, flags: Mapping[str, Any]) -> Settings:
        """Read settings from a YAML file.

        Args:
            path: the file.
            flags: settings from the command line, which override those of the file.

        Raises:
            PathconvertError: the file cannot be read, is not a mapping, names an unknown setting,
                or holds a value that :class:`Settings` refuses.
        """
        import yaml

        try:
            stored = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise PathconvertError(f"{path} cannot be read as settings: {reason}") from error
        if not isinstance(stored, dict):
            raise PathconvertError(
                f"{path} is not a list of settings", "Write one setting per line, such as lr: 0.05"
            )
        stored = {str(name).replace("-", "_"): value for name, value in stored.items()}
        unknown = sorted(stored.keys() - Settings.model_fields.keys())
        if unknown:
            raise _unknown_setting(unknown[0], f"{path}: ")
        return Settings(**(stored | dict(flags)))


def flag(name: str) -> str:
    """The option on the command line that gives a setting: ``batch_size`` → ``--batch-size``."""
    return f"--{name.replace('_', '-')}"


#: What is wrong with a value, by the type of pydantic's error.
_REASONS = {
    "float_type": "{value!r} is not a number",
    "int_type": "{value!r} is not a whole number",
    "bool_type": "{value!r} is not true or false",
    "string_type": "{value!r} is not text",
    "literal_error": "{word} is not one of {choices}",
    "finite_number": "must be a finite number, not {value}",
    "greater_than": "must be more than {gt:g}, not {value}",
    "greater_than_equal": "must be at least {ge:g}, not {value}",
    "less_than": "must be less than {lt:g}, not {value}",
}


def _refusal(error: ErrorDetails) -> PathconvertError:
    """The refusal that says in one line what pydantic found wrong with one setting."""
    name, value, context = str(error["loc"][0]), error["input"], error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        return _unknown_setting(name)
    word = value if isinstance(value, str) and re.fullmatch(r"\S+", value) else repr(value)
    choices = str(context.get("expected", "")).replace("'", "").replace(" or ", ", ")
    reason = _REASONS.get(error["type"], "{value!r} cannot be used: {message}").format(
        value=value, word=word, choices=choices, message=error["msg"], **context
    )
    return PathconvertError(" ".join(f"{flag(name)} {reason}".split()))


def _unknown_setting(name: str, where: str = "") -> PathconvertError:
    """The refusal of a setting that does not exist; ``where`` says where it was given."""
    known = ", ".join(sorted(Settings.model_fields))
    return PathconvertError(f"{where}there is no setting {name!r}", f"The settings are {known}.")
