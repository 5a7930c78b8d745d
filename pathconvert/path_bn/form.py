"""Whole networks in Path-BN form: leaving it, and building it from a record."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pathconvert.conversion.modules import copied, unwrapped
from pathconvert.conversion.path_bn_record import RecordedLayer, path_bn_misfit
from pathconvert.conversion.record import Record, attach_record, record_of
from pathconvert.conversion.remainder import Remainder
from pathconvert.errors import RecordError
from pathconvert.path_bn.layer import BATCH_NORM_OF, PathBN, kind_of
from pathconvert.path_bn.normalizations import split


def has_path_bn(model: nn.Module) -> bool:
    """Whether any layer is in Path-BN form."""
    return any(isinstance(module, PathBN) for module in model.modules())


def leave_path_bn(model: nn.Module) -> nn.Module:
    """Return to the stock architecture and its tensor names; the same function in evaluation mode.

    A layer that had a BatchNorm keeps it. For a layer that had none, the BatchNorm of Path-BN is
    folded into weight and bias, or, if the layer has no bias, into the means of the BatchNorms that
    read it. The result is in path form.

    Args:
        model: a network that :func:`~pathconvert.path_bn.entering.to_path_bn` returned, trained or
            not; not changed.

    Raises:
        RecordError: ``model`` is not in Path-BN form.
    """
    model = unwrapped(model)
    record = record_of(model)
    if record.path_bn is None:
        raise RecordError(f"this {type(model).__name__} is in path form, not in Path-BN form")
    model = copied(model)
    attach_record(model, dataclasses.replace(record, form="path", path_bn=None))
    left_over = []
    for recorded in record.path_bn.layers:
        module = model.get_submodule(recorded.name)
        assert isinstance(module, PathBN)
        layer, bn, bias = module.to_layer(keep_batch_norm=recorded.bn is not None)
        replace(model, module, layer)
        if recorded.bn is not None and bn is not None:
            place = model.get_submodule(recorded.bn)
            if isinstance(place, Remainder):
                bn = place.with_normalization(bn)
            replace(model, place, bn)
        left_over.append((recorded, bias))
    for recorded, bias in left_over:
        for reader in recorded.readers:
            mean = model.get_submodule(reader.bn).running_mean
            assert isinstance(mean, Tensor)
            rows, channels = (torch.from_numpy(places) for places in (reader.rows, reader.channels))
            mean[channels.to(mean.device)] -= bias[rows.to(bias.device)].to(mean)
    return model


def insert_path_bn(model: nn.Module, record: Record) -> nn.Module:
    """Put the layers named in ``record`` into Path-BN form, with tensors that are yet to be loaded.

    Args:
        model: changed in place.
        record: the record of a network in Path-BN form.

    Returns:
        ``model``.

    Raises:
        RecordError: the record belongs to another network.
    """
    assert record.path_bn is not None
    try:
        for recorded in record.path_bn.layers:
            # three tensors: one under two names would count as tied when tensors are loaded
            rows, columns, values = (
                torch.zeros(recorded.pivots, dtype=torch.int64) for _ in range(3)
            )
            replace_layer(model, recorded, rows, columns, values, record.path_bn.skip_scale)
    except (AttributeError, AssertionError, TypeError, IndexError, RuntimeError) as error:
        raise path_bn_misfit(error) from error
    attach_record(model, record)
    return model


def replace_layer(
    model: nn.Module,
    recorded: RecordedLayer,
    rows: Tensor,
    columns: Tensor,
    values: Tensor,
    skip_scale: float,
) -> PathBN:
    """Put one layer into Path-BN form, with the BatchNorm that follows it or a new one.

    What that BatchNorm's module does besides normalising stays in its place.

    Args:
        model: changed in place.
        recorded: the layer's entry in the record.
        rows, columns, values, skip_scale: as for :class:`~pathconvert.path_bn.layer.PathBN`.
    """
    layer = model.get_submodule(recorded.name)
    if recorded.bn is not None:
        whole = model.get_submodule(recorded.bn)
        bn, rest = split(whole)
        replace(model, whole, rest)
    else:
        kind = kind_of(layer)
        assert kind is not None
        weight = layer.weight
        assert isinstance(weight, Tensor)
        bn = BATCH_NORM_OF[kind](len(weight), device=weight.device, dtype=weight.dtype)
        bn.train(layer.training).requires_grad_(weight.requires_grad)
    module = PathBN(layer, bn, rows, columns, values, skip_scale)
    replace(model, layer, module)
    return module


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in every place where ``old`` is registered."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old and parent is not new:
                parent._modules[name] = new


def index_tensor(indices: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
    """Indices as a tensor that does not share memory with the array."""
    return torch.from_numpy(np.ascontiguousarray(indices, dtype=np.int64).copy())
