"""Everything that a fine-tuning run can be told, with its defaults; the options of ``pathconvert finetune``.

A run folder keeps the resolved settings as ``config.yaml``, the form that ``--config`` reads. This module imports no
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

#: Where the coordinates of chains live (``chains.py``).
Start = Literal["bn", "weight"]
#: What weight decay draws chains to (``gsgd.py``).
WeightDecay = Literal["l2", "basis_path_norm"]
#: What to vary in training images. ``auto``: crop-flip for inputs up to 64 pixels, resized-crop above.
Augmentation = Literal["auto", "none", "crop-flip", "resized-crop"]


def _option(default: Any, text: str, **limits: Any) -> Any:
    """A setting: its default, and what ``--help`` says; ``least`` and ``below`` bound it, ``above`` without it."""
    return field(default=default, metadata={"help": text, **limits})


@dataclass(frozen=True)
class Settings:
    """Settings of a run. Those that are None follow from the others, from the network or from the data."""

    # data
    data: str = _option("", "Labelled images: a folder with train/ and val/, or of class folders; or NAME:ROOT.")
    val_fraction: float = _option(0.1, "Of one folder of class folders, the share that is held out.", above=0, below=1)
    limit_train: int | None = _option(None, "Train on so many images, drawn evenly from the classes.", least=1)
    limit_val: int | None = _option(None, "Validate on so many.", least=1)
    size: str | None = _option(None, "Of the inputs, such as 224 or 224x320; else the network's.")
    mean: str | None = _option(None, "Of every channel in [0, 1], such as 0.5,0.5,0.5; else the weights' own.")
    std: str | None = _option(None, "Of every channel in [0, 1]; else the weights' own.")
    augment: Augmentation = _option("auto", "What chance does to images; auto: crop-flip up to 64 pixels.")
    workers: int | None = _option(None, "Processes that read images; else 0 on the CPU, 4 on a GPU.", least=0)
    # the network
    norm: Literal["path-bn", "bn"] = _option("path-bn", "Train with Path-BN layers, or with BatchNorm as it was.")
    pivot: Literal["matching", "max", "diagonal"] | None = _option(
        None, "Of a plain source's conversion; else matching."
    )
    scope: Literal["block", "network"] | None = _option(None, "Of a plain source's conversion; else block.")
    skip_scale: float | None = _option(None, "λ of Path-BN's skips; else the source's, or 1.", above=0)
    calibration_images: int = _option(512, "Training images that Path-BN's statistics come from.", least=1)
    num_classes: int | None = _option(None, "Of the classifier; else as many as the data has.", least=1)
    new_head: bool = _option(False, "Begin with a new classifier though the number of classes is the same.")
    freeze_backbone: bool = _option(False, "Train the classifier alone.")
    # the optimizer
    optimizer: Literal["gsgd", "sgd", "path-sgd"] = _option("gsgd", "G-SGD, SGD, or Path-SGD (small networks).")
    lr: float = _option(0.01, "Learning rate that the schedule begins with.", above=0)
    ordinary_lr: float | None = _option(None, "Of what is on no chain; else --lr.", above=0)
    momentum: float = _option(0.9, "Of the coordinates.", least=0, below=1)
    weight_decay: float = _option(0.0, "Of the coordinates.", least=0)
    decay: WeightDecay = _option("l2", "What weight decay draws chains to: 0, or 1 (basis_path_norm).")
    anchor: Literal["balanced", "initial", "none"] = _option(
        "balanced", "Coordinates in the units' own sizes, only of chains begin at ±1, or path-values as they are."
    )
    start: Start = _option("bn", "Where chains begin: γ of a BatchNorm, or a weight (the papers).")
    weight_norm: bool = _option(False, "G-SGD with gradients times the norm of a unit's weights (the papers' wnorm).")
    clip: float | None = _option(None, "Clip the gradient's norm.", above=0)
    accumulate: int = _option(1, "Batches whose gradients make one step.", least=1)
    # the schedule
    epochs: int = _option(10, "Passes over the training images.", least=1)
    steps: int | None = _option(None, "Steps, in place of epochs.", least=1)
    batch_size: int = _option(64, "Images a batch, over all processes.", least=1)
    schedule: Literal["cosine", "step", "constant"] = _option("cosine", "step: × 0.1 at one half and three quarters.")
    warmup_steps: int = _option(0, "Steps in which the rate rises to --lr.", least=0)
    label_smoothing: float = _option(0.0, "Share of the label that all classes get.", least=0, below=1)
    mixup: float = _option(0.0, "α of mixup; 0 is off.", least=0)
    ema: float | None = _option(
        None, "Keep an average of the weights with this decay, and validate it.", above=0, below=1
    )
    # the machine
    amp: Literal["off", "bf16", "fp16"] = _option("off", "Mixed precision.")
    channels_last: bool = _option(False, "Keep images channels last, which GPUs and bf16 like.")
    compile: bool = _option(False, "Compile the network (torch.compile).")
    checkpoint_minutes: float = _option(10.0, "Between checkpoints within an epoch.", above=0)
    seed: int = _option(0, "Of all chance.", least=0)

    def __post_init__(self) -> None:
        """Check types and ranges, and that nothing is set that the optimizer makes no use of.

        Raises:
            PathconvertError: a value that the setting does not take, or one that has no effect.
        """
        hints = typing.get_type_hints(Settings)
        for one in dataclasses.fields(self):
            _check(one.name, getattr(self, one.name), hints[one.name], one.metadata)
        if self.optimizer == "gsgd":
            return
        unused = dict.fromkeys(("ordinary_lr", "anchor", "start", "decay", "weight_norm"), "--optimizer gsgd")
        if self.norm == "bn":  # these train the network as it was
            unused |= dict.fromkeys(("pivot", "scope"), "a network that is converted")
        for one in dataclasses.fields(self):
            if one.name in unused and getattr(self, one.name) != one.default:
                raise PathconvertError(
                    f"--{one.name.replace('_', '-')} belongs to {unused[one.name]}",
                    f"Leave it out, or give another than --optimizer {self.optimizer} --norm {self.norm}.",
                )

    def to_yaml(self) -> str:
        import yaml

        text: str = yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)
        return text

    @staticmethod
    def from_file(path: Path, flags: dict[str, Any]) -> Settings:
        """Settings from a YAML file; ``flags`` win.

        Raises:
            PathconvertError: the file cannot be read, is no mapping, or names what is no setting.
        """
        import yaml

        try:
            stored = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise PathconvertError(f"{path} cannot be read as settings: {reason}") from error
        if not isinstance(stored, dict):
            raise PathconvertError(f"{path} is no list of settings", "One a line, such as lr: 0.05")
        known = {one.name for one in dataclasses.fields(Settings)}
        stored = {str(name).replace("-", "_"): value for name, value in stored.items()}
        unknown = sorted(set(stored) - known)
        if unknown:
            raise PathconvertError(
                f"{path}: there is no setting {unknown[0]!r}", f"There are {', '.join(sorted(known))}."
            )
        hints = typing.get_type_hints(Settings)
        return Settings(**({name: _from_yaml(value, hints[name]) for name, value in stored.items()} | flags))


def _from_yaml(value: Any, hint: Any) -> Any:
    """What is meant by YAML's ``1e-3`` (a text), ``off`` (False), ``32`` and ``[0.5, 0.5]`` where a text is wanted."""
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


def _check(name: str, value: Any, hint: Any, limits: typing.Mapping[str, Any]) -> None:
    flag = f"--{name.replace('_', '-')}"
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if value is None and types.NoneType in kinds:
        return
    choices = [choice for kind in kinds for choice in typing.get_args(kind)]
    if choices:
        if value not in choices:
            raise PathconvertError(f"{flag} {value} is none of {', '.join(choices)}")
        return
    wanted = next(kind for kind in kinds if kind is not types.NoneType)
    fits = isinstance(value, (int, float) if wanted is float else wanted) and (wanted is bool) == isinstance(
        value, bool
    )
    if not fits:
        raise PathconvertError(f"{flag} {value!r} is no {wanted.__name__}")
    if "least" in limits and not value >= limits["least"]:
        raise PathconvertError(f"{flag} {value} is less than {limits['least']}")
    if "above" in limits and not value > limits["above"]:
        raise PathconvertError(f"{flag} {value} has to be more than {limits['above']}")
    if "below" in limits and not value < limits["below"]:
        raise PathconvertError(f"{flag} {value} has to be less than {limits['below']}")
