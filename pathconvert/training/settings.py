"""The settings of a fine-tuning run and their defaults, which are also the options of ``pathconvert finetune``.

A run's folder keeps its settings as ``config.yaml``, in the format that ``--config`` reads. This module does not import
torch, so that ``--help`` is quick.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pathconvert.errors import PathconvertError

#: Which kind of parameter holds the coordinate of a chain (``optimizer/chains.py``).
Start = Literal["bn", "weight"]
#: Where weight decay pulls the values of chains (``optimizer/gsgd.py``).
WeightDecay = Literal["l2", "basis_path_norm"]
#: Random augmentation of training images. ``auto`` is crop-flip for inputs up to 64 pixels, resized-crop above.
Augmentation = Literal["auto", "none", "crop-flip", "resized-crop"]
#: What an error message calls a type.
_KINDS = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}


def _option(default: Any, text: str, **limits: Any) -> Any:
    """A setting, with its default and its help text.

    Args:
        default: the value where none is given.
        text: what ``--help`` says.
        limits: ``least``, the smallest allowed value; ``above`` and ``below``, which the value must not reach.
    """
    return field(default=default, metadata={"help": text, **limits})


@dataclass(frozen=True)
class Settings:
    """The settings of a run. Where one is None, its value follows from the others, the network or the data."""

    # data
    data: str = _option(
        "", "Labelled images: a folder with train/ and val/, one folder of class folders, or NAME:ROOT (torchvision)."
    )
    val_fraction: float = _option(
        0.1, "Share of the images to hold out for validation where there is no val/ folder.", above=0, below=1
    )
    limit_train: int | None = _option(
        None, "Train on at most this many images, drawn evenly from the classes (default: all).", least=1
    )
    limit_val: int | None = _option(None, "Validate on at most this many images (default: all).", least=1)
    size: str | None = _option(None, "Input size, such as 224 or 224x320 (default: the network's own).")
    mean: str | None = _option(
        None, "Mean per channel, for pixels in [0, 1], such as 0.5,0.5,0.5 (default: as the weights were trained)."
    )
    std: str | None = _option(
        None, "Standard deviation per channel, for pixels in [0, 1] (default: as the weights were trained)."
    )
    augment: Augmentation = _option(
        "auto", "Random augmentation of training images; auto is crop-flip up to 64 pixels and resized-crop above."
    )
    workers: int | None = _option(
        None, "Processes that read images; 0 reads in the main process (default: 0 on the CPU, 4 on a GPU).", least=0
    )
    # the network
    norm: Literal["path-bn", "bn"] = _option(
        "path-bn", "Train with Path-BN layers, or keep the network's BatchNorm layers."
    )
    pivot: Literal["matching", "max", "diagonal"] | None = _option(
        None, "How to choose pivots when a plain network is converted (default: matching)."
    )
    scope: Literal["block", "network"] | None = _option(
        None, "Which units to scale when a plain network is converted; network takes residual streams too "
        "(default: block).",
    )  # fmt: skip
    skip_scale: float | None = _option(
        None, "λ, the factor of the pivots in Path-BN layers (default: the source's own, or 1).", above=0
    )
    calibration_images: int = _option(
        512, "Training images from which the statistics of new Path-BN layers are computed.", least=1
    )
    num_classes: int | None = _option(
        None, "Outputs of the classifier (default: the number of classes in the data).", least=1
    )
    new_head: bool = _option(False, "Start from a new classifier even if the number of classes is the same.")
    freeze_backbone: bool = _option(False, "Train only the classifier.")
    # the optimizer
    optimizer: Literal["gsgd", "sgd", "path-sgd"] = _option(
        "gsgd", "G-SGD (SGD in path space), SGD, or Path-SGD (for small networks only)."
    )
    lr: float = _option(0.01, "Learning rate at the start of the schedule, after the warm-up.", above=0)
    ordinary_lr: float | None = _option(
        None, "Learning rate of parameters that lie on no chain (default: --lr).", above=0
    )
    momentum: float = _option(0.9, "Momentum of the optimizer.", least=0, below=1)
    weight_decay: float = _option(0.0, "Weight decay, applied to path coordinates with G-SGD.", least=0)
    decay: WeightDecay = _option("l2", "Where weight decay pulls the values of chains: l2 to 0, basis_path_norm to ±1.")
    anchor: Literal["balanced", "initial", "none"] = _option(
        "balanced",
        "Constants that G-SGD divides path coordinates by: each chain's first size (initial), the sizes of all units "
        "too (balanced), or none (as in the papers).",
    )
    start: Start = _option(
        "bn", "The parameter that holds a chain's coordinate: γ of a BatchNorm, or a weight (as in the papers)."
    )
    weight_norm: bool = _option(
        False, "Multiply G-SGD's gradients by the norm of each unit's weights (the papers' wnorm)."
    )
    clip: float | None = _option(None, "Clip the norm of the gradient to this value (default: no clipping).", above=0)
    accumulate: int = _option(1, "Number of batches whose gradients are averaged for one step.", least=1)
    # the schedule
    epochs: int = _option(10, "Number of passes over the training images.", least=1)
    steps: int | None = _option(None, "Number of steps to train for; overrides --epochs.", least=1)
    batch_size: int = _option(64, "Images per batch, over all processes.", least=1)
    schedule: Literal["cosine", "step", "constant"] = _option(
        "cosine", "Learning rate schedule; step multiplies the rate by 0.1 at one half and three quarters of the run."
    )
    warmup_steps: int = _option(0, "Number of steps over which the learning rate rises to --lr.", least=0)
    label_smoothing: float = _option(
        0.0, "Label smoothing: the share of each label that is spread over all classes.", least=0, below=1
    )
    mixup: float = _option(0.0, "Parameter α of mixup; 0 turns mixup off.", least=0)
    ema: float | None = _option(
        None, "Keep a moving average of the weights with this decay, and validate and save the average.",
        above=0, below=1,
    )  # fmt: skip
    # the machine
    amp: Literal["off", "bf16", "fp16"] = _option("off", "Mixed precision.")
    channels_last: bool = _option(False, "Use the channels-last memory format, which is often faster on GPUs.")
    compile: bool = _option(False, "Compile the network with torch.compile.")
    checkpoint_minutes: float = _option(10.0, "Minutes between checkpoints within an epoch.", above=0)
    seed: int = _option(0, "Random seed.", least=0)

    def __post_init__(self) -> None:
        """Check types and ranges, and refuse settings that have no effect with the chosen optimizer.

        Raises:
            PathconvertError: a value has the wrong type or is out of range, or the setting would have no effect.
        """
        hints = typing.get_type_hints(Settings)
        for one in dataclasses.fields(self):
            _check(one.name, getattr(self, one.name), hints[one.name], one.metadata)
        if self.optimizer == "gsgd":
            return
        unused = dict.fromkeys(("ordinary_lr", "anchor", "start", "decay", "weight_norm"), "--optimizer gsgd")
        if self.norm == "bn":  # these train the network without converting it
            unused |= dict.fromkeys(("pivot", "scope"), "a network that gets converted")
        for one in dataclasses.fields(self):
            if one.name in unused and getattr(self, one.name) != one.default:
                raise PathconvertError(
                    f"{_flag(one.name)} has no effect with --optimizer {self.optimizer} --norm {self.norm}: "
                    f"it needs {unused[one.name]}",
                    "Leave it out, or choose another --optimizer or --norm.",
                )

    def to_yaml(self) -> str:
        """All settings, in the format of ``config.yaml``."""
        import yaml

        text: str = yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)
        return text

    @staticmethod
    def from_file(path: Path, flags: dict[str, Any]) -> Settings:
        """Read settings from a YAML file.

        Args:
            path: the file.
            flags: settings from the command line, which override those of the file.

        Raises:
            PathconvertError: the file cannot be read, is not a mapping, names an unknown setting, or holds a value
                that :class:`Settings` refuses.
        """
        import yaml

        try:
            stored = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise PathconvertError(f"{path} cannot be read as settings: {reason}") from error
        if not isinstance(stored, dict):
            raise PathconvertError(f"{path} is not a list of settings", "Write one setting per line, such as lr: 0.05")
        known = {one.name for one in dataclasses.fields(Settings)}
        stored = {str(name).replace("-", "_"): value for name, value in stored.items()}
        unknown = sorted(set(stored) - known)
        if unknown:
            raise PathconvertError(
                f"{path}: there is no setting {unknown[0]!r}", f"The settings are {', '.join(sorted(known))}."
            )
        hints = typing.get_type_hints(Settings)
        return Settings(**({name: _from_yaml(value, hints[name]) for name, value in stored.items()} | flags))


def _from_yaml(value: Any, hint: Any) -> Any:
    """The value that a setting of type ``hint`` means.

    YAML 1.1 reads ``1e-3`` as a string and ``off`` as False; and ``size: 32`` or ``mean: [0.5, 0.5, 0.5]`` are natural
    ways to write settings that are strings.
    """
    kinds = (hint, *typing.get_args(hint))
    if isinstance(value, str) and float in kinds:
        with suppress(ValueError):
            return float(value)
    if value is False and "off" in kinds:
        return "off"
    if str in kinds:
        if isinstance(value, list):
            return ",".join(map(str, value))
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
    return value


def _flag(name: str) -> str:
    """The option on the command line that gives a setting."""
    return f"--{name.replace('_', '-')}"


def _check(name: str, value: Any, hint: Any, limits: typing.Mapping[str, Any]) -> None:
    """Refuse a value of another type than ``hint``, or outside of ``limits``.

    Raises:
        PathconvertError: the value is refused.
    """
    flag = _flag(name)
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if value is None and types.NoneType in kinds:
        return
    choices = [choice for kind in kinds for choice in typing.get_args(kind)]
    if choices:
        if value not in choices:
            raise PathconvertError(f"{flag} {value} is not one of {', '.join(choices)}")
        return
    wanted = next(kind for kind in kinds if kind is not types.NoneType)
    fits = isinstance(value, (int, float) if wanted is float else wanted) and (wanted is bool) == isinstance(
        value, bool
    )
    if not fits:
        raise PathconvertError(f"{flag} {value!r} is not {_KINDS[wanted]}")
    if "least" in limits and not value >= limits["least"]:
        raise PathconvertError(f"{flag} must be at least {limits['least']}, not {value}")
    if "above" in limits and not value > limits["above"]:
        raise PathconvertError(f"{flag} must be more than {limits['above']}, not {value}")
    if "below" in limits and not value < limits["below"]:
        raise PathconvertError(f"{flag} must be less than {limits['below']}, not {value}")
