"""From path or Path-BN form back to the original."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pathconvert.conversion.modules import unwrapped
from pathconvert.conversion.record import Record
from pathconvert.conversion.rescale import rescale
from pathconvert.path_bn.form import has_path_bn, leave_path_bn


def restore(model: nn.Module, record: Record | Mapping[str, Any]) -> nn.Module:
    """Undo a conversion: a copy of ``model`` without the factors of ``record``.

    Args:
        model: the converted network in path or Path-BN form, which may be fine-tuned; not changed.
        record: :attr:`Conversion.record`, or the ``path_record`` of a network in Path-BN form; as
            JSON or read already.

    Raises:
        RecordError: the record has another format version, is damaged, or does not fit the
            network's tensors.
    """
    model, record = unwrapped(model), Record.read(record)
    if has_path_bn(model):
        model = leave_path_bn(model)
    tensors: dict[str, Tensor] = dict(model.named_buffers()) | dict(model.named_parameters())
    record.require_fit({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    restored = rescale(model, record.slots, record.scales, inverse=True)
    vars(restored).pop("path_record", None)  # the original has no record either
    return restored
