"""Files written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pathconvert.errors import OutputError
from pathconvert.files.layout import Layout
from pathconvert.files.refusals import quote

#: Suffixes of checkpoints; the first is safetensors, the others are torch.save.
SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pth.tar")
#: The layout of files that have the network's own names and no keys.
BARE = Layout()
Checked = TypeVar("Checked")


def prepare_output(
    path: str | Path, *, force: bool, source: Path | None, suffixes: Sequence[str] = SUFFIXES
) -> Path:
    """Check, before any work, that ``path`` may be written.

    Args:
        path: the output.
        force: whether a file that exists may be replaced.
        source: the file that the output is made from, which is never overwritten; None without one.
        suffixes: those that the output may have; the first one is proposed.

    Returns:
        ``path``.

    Raises:
        OutputError: the suffix does not name a format; the path is the source itself or a
            directory; its folder is missing or not writable; or the file exists and ``force`` is
            False.
    """
    path = Path(path)
    if not path.name.lower().endswith(tuple(suffixes)):
        message = f"{path} has the suffix {quote(path.suffix)}; expected {', '.join(suffixes)}."
        example = f"{path.stem.strip('.') or 'network'}{suffixes[0]}"
        raise OutputError(message, f"Give a name that ends in {suffixes[0]}, such as {example}.")
    if source is not None and _same_file(path, source):
        raise OutputError(
            f"{path} is the source itself, which is never overwritten.",
            "Give another output with -o.",
        )
    if path.is_dir():
        raise OutputError(
            f"{path} is a directory; expected the name of a file.", "Give a file name inside it."
        )
    if not path.parent.is_dir():
        raise OutputError(
            f"The folder {path.parent} of the output {path} does not exist.", "Create it first."
        )
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"The folder {path.parent} of the output {path} is not writable.",
            "Give another output with -o.",
        )
    _check_existing(path, force=force)
    return path


def _check_existing(path: Path, *, force: bool) -> None:
    """Refuse an output that exists, or, with ``force``, one that is not a regular file."""
    if not os.path.lexists(path):
        return
    if path.exists() and not path.is_file():
        raise OutputError(
            f"{path} is not a regular file and will not be replaced.",
            "Give another output with -o.",
        )
    if not force:
        raise OutputError(
            f"{path} exists already.", "Pass --force to replace it, or give another output with -o."
        )


def _same_file(path: Path, source: Path) -> bool:
    """Whether two paths name the same file, whether or not it exists yet."""
    with contextlib.suppress(OSError):
        return path.samefile(source)
    return path.absolute() == Path(source).absolute()


def write_checkpoint(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: dict[str, Any] | None,
    *,
    layout: Layout = BARE,
    force: bool = False,
    source: Path | None = None,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint; ``path`` then has either the whole new file or what was there before.

    Args:
        path: the output; its suffix decides the format.
        tensors: the tensors by name.
        metadata: a JSON object to store beside them, or None.
        layout: the names and keys that they get in the file; by default, their own names and no
            key. A safetensors file has no keys.
        force: replace a file that exists.
        source: the file that the tensors came from, which is not overwritten.
        check: called with the temporary file before it is renamed; if it raises, that file is
            removed and the error propagates.

    Raises:
        OutputError: the path may not be written, the disk is full, or the system refuses; no file
            is left behind.
    """
    path = prepare_output(path, force=force, source=source)
    text, named = None if metadata is None else json.dumps(metadata), layout.named(tensors)

    def write(file: Path) -> None:
        if path.suffix.lower() == ".safetensors":
            _write_safetensors(file, named, text)
        else:
            _write_torch(file, named, text, layout)

    write_atomically(path, tensors, write, check or (lambda _: None), force=force)
    return path


def write_atomically(
    path: Path,
    tensors: Mapping[str, Tensor],
    write: Callable[[Path], object],
    check: Callable[[Path], Checked],
    *,
    force: bool,
) -> Checked:
    """Write a file; ``path`` then has either the whole new file or what was there before.

    Args:
        path: as :func:`prepare_output` returned it.
        tensors: what is written; the message about a full disk gives their size.
        write: writes the temporary file that it is given.
        check: called with the temporary file before it is renamed; if it raises, that file is
            removed and the error propagates.
        force: replace a file that exists.

    Returns:
        What ``check`` returns.

    Raises:
        OutputError: the disk is full, or the system refuses; no file is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _writing(path, tensors):
            write(temporary)
            _sync(temporary)
        checked = check(temporary)
        _check_existing(path, force=force)  # another process may have created it meanwhile
        with _writing(path, tensors):
            os.replace(temporary, path)
    except BaseException:  # an interrupt must not leave the temporary file behind either
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)
    return checked


def _write_safetensors(temporary: Path, tensors: Mapping[str, Tensor], text: str | None) -> None:
    metadata = {"format": "pt"} | ({} if text is None else {"pathconvert": text})
    seen: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        plain[name] = _compact(tensor) if tensor.data_ptr() not in seen else tensor.detach().clone()
        seen.add(tensor.data_ptr())  # the format does not allow tensors that share memory
    save_file(plain, temporary, metadata)
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)  # the library creates files that only their owner can read


def _write_torch(
    temporary: Path, tensors: Mapping[str, Tensor], text: str | None, layout: Layout
) -> None:
    """Write a state dict that a strict ``load_state_dict`` accepts, under the keys of ``layout``.

    It is read by ``load_state_dict(torch.load(file, weights_only=True), strict=True)`` if there are
    no keys.
    """
    state = OrderedDict((name, _compact(tensor)) for name, tensor in tensors.items())
    if text is not None:
        vars(state)["_metadata"] = OrderedDict(pathconvert={"json": text})
    with temporary.open("wb") as file:  # it raises the system's own error, torch's file does not
        torch.save(
            layout.wrapped(state),
            file,
            _use_new_zipfile_serialization=layout.container != "torch-legacy",
        )


def _compact(tensor: Tensor) -> Tensor:
    """The tensor in a storage of its own.

    Of a view into a larger storage, torch.save would write the whole storage.
    """
    tensor = tensor.detach().cpu().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


@contextlib.contextmanager
def _writing(path: Path, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Turn an error of the operating system into one that names the output.

    The error may be bare, or wrapped in one of torch's.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = _os_error(error)
        if cause is None:
            raise
        raise _output_error(path, tensors, cause) from error


def _os_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        # safetensors gives the number in its text only
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number:
            return OSError(int(number[1]), os.strerror(int(number[1])))
        error = error.__cause__ or error.__context__
    return error


def _output_error(path: Path, tensors: Mapping[str, Tensor], error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 1e6
        reason = "the file would be too large" if error.errno == errno.EFBIG else "disk full"
        how_much = f": {needed:.1f} MB needed" if tensors else ""
        return OutputError(
            f"{path} was not written: {reason}{how_much}.", "Free space, or write elsewhere."
        )
    reason = error.strerror or type(error).__name__
    return OutputError(f"{path} was not written: {reason}.", "Give another output with -o.")


def _sync(path: Path) -> None:
    """Flush a file, or the rename in a folder, to disk.

    It then survives a power cut, where the file system can do this.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
