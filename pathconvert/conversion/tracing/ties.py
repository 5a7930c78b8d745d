"""Tensors of a network that share memory: one parameter under several names, or views of one.

Tying by the same ``nn.Parameter`` object is not the only way: ``b.weight.data = a.weight.data`` and
``set_`` give two objects the same memory, and slices of one flat buffer may overlap. What is
written to one of them appears in the other, also when a state dict is loaded into the network's
class.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def first_names(model: nn.Module) -> dict[str, str]:
    """Parameter or buffer → the first one that has exactly the same memory, which may be itself."""
    first: dict[tuple[object, ...], str] = {}
    return {name: first.setdefault(_place(tensor), name) for name, tensor in _every_tensor(model)}


def overlaps(model: nn.Module) -> dict[str, str]:
    """Parameter or buffer → another one that shares a part of its memory, but not all of it."""
    found: dict[str, str] = {}
    by_storage: dict[int, list[tuple[int, int, str, tuple[object, ...]]]] = {}
    for name, tensor in _every_tensor(model):
        if tensor.numel() and tensor.layout is torch.strided:
            start, stop = _extent(tensor)
            storage = tensor.untyped_storage()._cdata
            by_storage.setdefault(storage, []).append((start, stop, name, _place(tensor)))
    for entries in by_storage.values():
        entries.sort(key=lambda entry: entry[:2])
        for i, (_, stop, name, place) in enumerate(entries):
            for other_start, _, other, other_place in entries[i + 1 :]:
                if other_start >= stop:
                    break
                if place != other_place:
                    found.setdefault(name, other)
                    found.setdefault(other, name)
    return found


def _every_tensor(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers under all of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _place(tensor: Tensor) -> tuple[object, ...]:
    """What two tensors have in common that are the same numbers in the same memory."""
    if tensor.layout is not torch.strided or not tensor.numel():
        return (id(tensor),)
    storage = tensor.untyped_storage()._cdata
    return (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte in its storage that a tensor uses, and the one after its last."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    first = int(tensor.storage_offset())
    last = first + sum(int((size - 1) * stride) for size, stride in sides)
    return first * tensor.element_size(), (last + 1) * tensor.element_size()
