"""Whether the tensors of a file are usable weights, and their digest."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pathconvert.errors import CheckpointError
from pathconvert.files.refusals import AGAIN, quote

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

STATE_DICT_TIP = (
    "Give a file with the network's weights: torch.save(model.state_dict(), 'weights.pt')."
)
FLOAT_TIP = (
    "Give the checkpoint in float32, float16, bfloat16 or float64, from before quantization or"
    " conversion."
)


def check_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not finite floating-point weights.

    Counters are accepted: ``num_batches_tracked``, and scalars of type int64 or bool.

    Raises:
        CheckpointError: there are no tensors; a tensor is quantized, integer, complex or of 8 bits;
            it claims more elements than the file stores; or it has NaN or infinite values.
    """
    if not tensors:
        raise CheckpointError(f"{path} contains no tensors.", STATE_DICT_TIP)
    for name, tensor in tensors.items():
        _check_dtype(path, name, tensor)
        # A hostile file can repeat one number a trillion times through a stride of 0.
        if tensor.numel() > max(2**24, tensor.untyped_storage().nbytes() // tensor.element_size()):
            message = (
                f"{path} contains {quote(name)} of shape {list(tensor.shape)}, far larger than its"
                " stored data."
            )
            raise CheckpointError(message, AGAIN)
    bad = [name for name, tensor in tensors.items() if not _all_finite(tensor)]
    if bad:
        count = int((~torch.isfinite(tensors[bad[0]])).sum())
        message = (
            f"{path} has NaN or infinite weights: {count} of {tensors[bad[0]].numel()} values in"
            f" {quote(bad[0])}; {len(bad)} of {len(tensors)} tensors affected."
        )
        raise CheckpointError(
            message,
            "The training diverged, or values overflowed float16: give an earlier checkpoint.",
        )


def _check_dtype(path: Path, name: str, tensor: Tensor) -> None:
    if tensor.dtype in WEIGHT_DTYPES:
        return
    is_flag = tensor.ndim == 0 and tensor.dtype in (torch.int64, torch.bool)
    is_place = name.endswith((".pivot_row", ".pivot_column"))  # of a layer in Path-BN form
    counter = name.endswith("num_batches_tracked") or is_flag or is_place
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_floating_point() or tensor.is_complex():
        raise CheckpointError(
            f"{path} contains {quote(name)} in {dtype}, which is not supported.", FLOAT_TIP
        )
    if not counter:
        raise integer_weights(path, name, dtype)


def integer_weights(path: Path, name: object, dtype: str) -> CheckpointError:
    """The refusal of a file whose entry ``name`` is not floating-point."""
    message = (
        f"{path} is a quantized or integer checkpoint ({quote(name)} is {dtype}); expected"
        " floating-point weights."
    )
    return CheckpointError(message, FLOAT_TIP)


def _all_finite(tensor: Tensor) -> bool:
    """Whether all values are finite, in one pass without a copy.

    NaN and infinities show in the extrema.
    """
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    return all(bool(extremum.isfinite()) for extremum in torch.aminmax(tensor))


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, of names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order; copied only if they do not lie so in memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
