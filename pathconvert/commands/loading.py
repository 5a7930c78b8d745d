"""From the names on a command line to networks, and to the file that will be written."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pathconvert.commands.console import note
from pathconvert.errors import ArchitectureError, PathconvertError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pathconvert.networks.image_options import ImageOptions
    from pathconvert.networks.loading import LoadedNetwork


@dataclass(frozen=True)
class Loader:
    """How sources are read. The attributes are the options of the same names."""

    arch: str | None = None
    input_size: str | None = None
    num_classes: int | None = None
    key: str | None = None
    trust_pickle: bool = False
    prefix: str | None = None

    @property
    def size(self) -> tuple[int, ...] | None:
        """The input size as numbers, or None if it was not given."""
        from pathconvert.networks.architectures import parse_input_size

        return parse_input_size(self.input_size) if self.input_size else None

    def refuse_for_onnx(self, sources: Sequence[str]) -> None:
        """Refuse the options that say how to read a checkpoint, if all sources are ONNX files.

        Raises:
            PathconvertError: all sources are ONNX files, and such an option was given.
        """
        if all(Path(source).suffix.lower() == ".onnx" for source in sources):
            for name in ("arch", "num_classes", "key", "trust_pickle", "prefix"):
                if getattr(self, name):
                    option = f"--{name.replace('_', '-')}"
                    raise PathconvertError(
                        f"{option} is for checkpoints, but {sources[0]} is an ONNX file",
                        f"Leave {option} out.",
                    )

    def open(self, source: str) -> LoadedNetwork:
        """Load a network, and note what was taken from the file and what was left out.

        Raises:
            PathconvertError: as :func:`~pathconvert.networks.loading.open_network`.
        """
        from pathconvert.networks.loading import open_network

        network = open_network(
            source,
            arch=self.arch,
            num_classes=self.num_classes,
            input_size=self.size,
            key=self.key,
            trust_pickle=self.trust_pickle,
            prefix=self.prefix,
        )
        for text in network.notes:
            note(f"{source}: {text}")
        if network.doubt:
            note(f"note: {source}: {network.doubt}")
        return network

    def open_prepared(self, source: str, given: ImageOptions) -> LoadedNetwork:
        """Load a network, with the user's options for its images in place of what is known of them.

        Raises:
            PathconvertError: the network cannot be loaded, or the options do not fit it.
        """
        from pathconvert.networks.prepared import prepared

        self.require_one_size(given)
        return prepared(self.open(source), given)

    def opener(self, given: ImageOptions) -> Callable[[str], LoadedNetwork]:
        """A function that loads a network at the size that was given, and notes what is assumed.

        It is for commands that open ONNX files as well, and apply the other options to both.

        Raises:
            PathconvertError: ``--size`` and ``--input-size`` contradict one another.
        """
        self.require_one_size(given)

        def load(source: str) -> LoadedNetwork:
            from pathconvert.networks.prepared import assumption_of, resized

            network = self.open(source)
            known = resized(network.architecture, given)
            network = dataclasses.replace(network, architecture=known)
            remark = assumption_of(network, given.over)
            if remark is not None:
                note(f"note: {remark}")
            return network

        return load

    def require_one_size(self, given: ImageOptions) -> None:
        """Refuse ``--size`` and ``--input-size`` that contradict one another.

        Raises:
            PathconvertError: they do.
        """
        if given.size is not None and self.size and self.size[1:] != given.size:
            height, width = given.size
            raise PathconvertError(
                f"--size {height}x{width} and --input-size {self.input_size} differ",
                "Give one of them.",
            )

    def open_pair(self, a: str, b: str) -> list[LoadedNetwork]:
        """Load two forms of one network.

        A plain checkpoint of a user's own class does not say how to build it. If only one of the
        two can be opened, its architecture is used for the other.

        Raises:
            ArchitectureError: neither can be opened.
            PathconvertError: as :meth:`open`.
        """
        opened: dict[str, LoadedNetwork] = {}
        refusals: list[ArchitectureError] = []
        for source in (a, b, a, b):
            if source in opened:
                continue
            known = next(iter(opened.values()), None) if refusals else None
            try:
                opened[source] = (self._like(known) if known else self).open(source)
            except ArchitectureError as error:
                refusals.append(error)
                if len(refusals) == 2 or self.arch:
                    raise refusals[0] from None
        return [opened[a], opened[b]]

    def _like(self, network: LoadedNetwork) -> Loader:
        """A loader for another form of ``network``, whose architecture it names."""
        known = network.architecture
        size = "x".join(map(str, known.input_size)) if known.input_size else None
        given = ", ".join(f"{key}={value!r}" for key, value in known.arguments.items())
        return dataclasses.replace(
            self,
            arch=f"{known.name}({given})" if given else known.name,
            input_size=self.input_size or size,
            num_classes=None,
        )


def default_output(source: str, ending: str) -> Path:
    """``a/resnet50.pt`` → ``a/resnet50`` with ``ending``.

    It is in the current folder if the source is not a file. The suffix of an earlier conversion is
    dropped: ``resnet50.path.safetensors`` becomes ``resnet50`` again.
    """
    from pathconvert.files.writing import SUFFIXES

    file = Path(source)
    stem = file.name.removesuffix(".gz").removesuffix(".zip")
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        stem = stem.removesuffix(suffix)
    left_behind = {".path.safetensors": (), ".path-bn.safetensors": (".path",)}.get(
        ending, (".path", ".path-bn")
    )
    for form in left_behind:
        stem = stem.removesuffix(form)
    return (file.parent if file.exists() else Path()) / f"{stem}{ending}"


def source_file(source: str) -> Path | None:
    """The file of the source, which must never be overwritten; None for a torchvision name."""
    file = Path(source)
    return file if file.exists() else None


def checked_output(source: str, output: Path | None, ending: str, force: bool) -> Path:
    """The path of the result, checked before any work is done.

    Args:
        source: what is converted.
        output: the path that was given; None for the source's with another ending.
        ending: such as ``path.safetensors``.
        force: replace a file that exists.

    Raises:
        OutputError: the path may not be written.
    """
    from pathconvert.files.writing import prepare_output

    path = output or default_output(source, f".{ending}")
    return prepare_output(path, force=force, source=source_file(source))
