"""What a user says of a network's images and classes: ``--mean``, ``--std``, … and ``--labels``.

What is given overrides what is known of the network; what is not given stays as it is known. This
module does not import torch, so that wrong values are refused at once.
"""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathconvert.choices import Interpolation
from pathconvert.errors import DataError

if TYPE_CHECKING:
    from pathconvert.networks.preprocessing import Preprocessing

#: Sides of images are less than this.
SIDE_LIMIT = 2**16
#: What torchvision, Hugging Face, ``ImageFolder`` and timm call the names of classes in JSON files.
KEYS = ("categories", "id2label", "class_to_idx", "label_names", "labels")


@dataclass(frozen=True)
class ImageOptions:
    """How images are prepared and what classes are called, as far as a user said so.

    Attributes:
        mean, std: one value, or one per channel, for pixel values in [0, 1].
        size: (height, width) of the network's input, to which images are cropped.
        resize: the length of an image's shorter side before the crop, or (height, width). Where it
            is smaller than the crop, the image is padded with black, as torchvision does.
        interpolation: the interpolation of the resizing.
        labels: the names of the classes, in the order of the outputs.

    Raises:
        DataError: a value makes no sense, whatever the network.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, int] | None = None
    resize: int | tuple[int, int] | None = None
    interpolation: Interpolation | None = None
    labels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for option, values in (("--mean", self.mean), ("--std", self.std)):
            if not all(abs(value) < 1e6 for value in values or ()):
                shown = ",".join(f"{value:g}" for value in values or ())
                raise DataError(
                    f"{option} {shown} is out of range",
                    f"Give values for pixels in [0, 1], such as {option} 0.5",
                )
        if min(self.std or (1.0,)) <= 0:
            raise DataError(
                f"--std must be positive, not {min(self.std or ()):g}",
                "Give positive numbers, such as --std 0.25",
            )

    @staticmethod
    def parse(
        *,
        mean: str | None = None,
        std: str | None = None,
        size: str | None = None,
        resize: str | None = None,
        interpolation: Interpolation | None = None,
        labels: str | Path | None = None,
    ) -> ImageOptions:
        """Read the options' texts, and the file with the labels.

        Raises:
            DataError: a text is not what its option takes, or the file cannot be read.
        """
        return ImageOptions(
            _values(mean, "--mean"),
            _values(std, "--std"),
            _sides(size, "--size"),
            _side_or_sides(resize),
            interpolation,
            None if labels is None else read_labels(Path(labels)),
        )

    @property
    def normalises(self) -> bool:
        """Whether a mean or a standard deviation was given."""
        return self.mean is not None or self.std is not None

    @property
    def preparing(self) -> str | None:
        """The first option that was given of those that change a preprocessing; None without."""
        names = ("mean", "std", "resize", "interpolation")
        return next((f"--{name}" for name in names if getattr(self, name) is not None), None)

    def over(self, base: Preprocessing) -> Preprocessing:
        """A preprocessing at the input's size, with what was given in place of its own.

        Raises:
            DataError: ``mean`` or ``std`` has another number of values than ``base`` has channels.
        """
        channels = len(base.mean)
        return dataclasses.replace(
            base,
            resize=base.resize if self.resize is None else self.resize,
            mean=_per_channel(self.mean, "--mean", channels) or base.mean,
            std=_per_channel(self.std, "--std", channels) or base.std,
            interpolation=self.interpolation or base.interpolation,
        )

    def require_labels_for(self, outputs: int, name: str) -> None:
        """Refuse labels of another number than the outputs of the network ``name``.

        Raises:
            DataError: their number differs.
        """
        if self.labels is not None and len(self.labels) != outputs:
            raise DataError(
                f"--labels has {len(self.labels)} names, but {name} has {outputs} outputs",
                "Give one name per output, in the order of the outputs.",
            )


NOTHING_GIVEN = ImageOptions()


# ---- texts ---------------------------------------------------------------------------------------


def _values(text: str | None, option: str) -> tuple[float, ...] | None:
    """``0.5`` or ``0.485,0.456,0.406`` → one value, or one value per channel."""
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise DataError(
            f"{option} {text!r} is not a list of numbers",
            f"Give one number, or one per channel: {option} 0.5",
        ) from None


def _sides(text: str | None, option: str) -> tuple[int, int] | None:
    """``224`` or ``224x160`` → (height, width)."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.isdecimal() and 0 < int(p) < SIDE_LIMIT for p in parts):
        raise DataError(
            f"{option} {text!r} is not a size",
            f"Give height and width, or one number for both: {option} 224",
        )
    return int(parts[0]), int(parts[-1])


def _side_or_sides(text: str | None) -> int | tuple[int, int] | None:
    """``256`` → 256, the shorter side; ``256x320`` → (256, 320), height and width."""
    sides = _sides(text, "--resize")
    return sides[0] if sides and "x" not in (text or "").lower() else sides


def _per_channel(
    given: tuple[float, ...] | None, option: str, channels: int
) -> tuple[float, ...] | None:
    """One value per channel, from an option that gives one value or as many."""
    if given is None or len(given) == channels:
        return given
    if len(given) != 1:
        raise DataError(
            f"{option} has {len(given)} values for {channels} channels",
            f"Give one value, or {channels}.",
        )
    return given * channels


# ---- labels --------------------------------------------------------------------------------------


def read_labels(path: Path) -> tuple[str, ...]:
    """The names of classes in a file, in the order of the outputs.

    The file has one name per line; or is JSON (or Python's notation for it): a list of names, an
    object {index: name} or {name: index}, or an object that holds one of them under one of
    ``KEYS``. In place of a name there may be a list that ends with it, as in
    ``imagenet_class_index.json``.

    Raises:
        DataError: the file cannot be read, or is none of these.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise DataError(
            f"{path} cannot be read as labels: {reason}",
            "Give a file with one name per line, or a JSON list: --labels classes.txt",
        ) from error
    if not text.strip():
        raise _no_labels(path, "it is empty")
    stored = _parsed(text)
    if isinstance(stored, list | dict):
        return _names(stored, path)
    if path.suffix.lower() == ".json":
        raise _no_labels(path, "it is not a JSON list or object")
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if not all(lines):
        raise _no_labels(path, f"line {lines.index('') + 1} is empty")
    return tuple(lines)


def _parsed(text: str) -> Any:
    """The value that a text means as JSON or in Python; None if it means none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass  # it may be Python's notation, or lines
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None  # lines that begin so


def _names(stored: list[Any] | dict[Any, Any], path: Path) -> tuple[str, ...]:
    inner = next(
        (stored[key] for key in KEYS if isinstance(stored, dict) and key in stored), stored
    )
    if isinstance(inner, Mapping):
        inner = _in_order(inner, path)
    names = [_name(value) for value in inner] if isinstance(inner, Sequence) else []
    if not names or not all(names):
        raise _no_labels(path, "a name is missing or is not text")
    return tuple(map(str, names))


def _in_order(stored: Mapping[Any, Any], path: Path) -> list[Any]:
    """The names of {index: name} or {name: index}, by their indices."""
    if all(isinstance(index, int) for index in stored.values()):
        stored = {index: name for name, index in stored.items()}
    by_index = {int(key): name for key, name in stored.items() if str(key).isdecimal()}
    if sorted(by_index) != list(range(len(stored))):
        raise _no_labels(path, f"its indices are not 0 to {len(stored) - 1}")
    return [by_index[index] for index in range(len(stored))]


def _name(value: Any) -> str | None:
    """A name, or the last of a list; None for anything else."""
    last = value[-1] if isinstance(value, list | tuple) and value else value
    return last.strip() if isinstance(last, str) else None


def _no_labels(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path} does not give labels: {reason}",
        'Give one name per line, a JSON list, or a JSON object such as {"0": "cat", "1": "dog"}.',
    )
