"""Tensors and arrays that a pickle describes, made only if the file stores what they claim.

A pickle by torch contains no numbers of tensors, but *storages* by persistent id, and tensors as
views of them::

    _rebuild_tensor_v2(storage, offset, size, stride, ...)

Every index that such a view can reach has to lie in its storage. NumPy's pickles contain the
bytes themselves, whose number has to agree with shape and dtype.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pathconvert.files.unpickling import STANDARD, Constructor, Global, Object, UnpicklingRefused

Storage = torch.storage.TypedStorage

#: Elements of a tensor that repeats stored ones by a stride of 0, as ``expand`` makes them.
_MOST_REPEATED = 2**24

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}
_NUMPY_CODES = {
    *("f2", "f4", "f8", "c8", "c16", "b1"),
    *("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"),
}
_PLAIN_CLASSES = (
    "torch.Tensor",
    "torch._tensor.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
)


def storage_dtype(kind: object) -> torch.dtype:
    """The dtype of a storage, by the class that a pickle names for it.

    Raises:
        UnpicklingRefused: the class is not one of torch's.
    """
    name = kind.name if isinstance(kind, Global) else ""
    dtype = _STORAGE_DTYPES.get(name.rpartition(".")[2])
    if dtype is None or not name.startswith("torch."):
        raise UnpicklingRefused(f"a storage of the unknown kind {name[:80]!r}")
    return dtype


def typed_storage(data: torch.UntypedStorage, dtype: torch.dtype) -> Storage:
    """A storage as torch's own functions take it."""
    return Storage(wrap_storage=data, dtype=dtype, _internal=True)


def _naturals(values: object) -> tuple[int, ...]:
    """Sizes or strides.

    Raises:
        UnpicklingRefused: they are anything but numbers from 0 on.
    """
    given = tuple(values) if isinstance(values, (tuple, list)) else None
    if given is None or not all(type(v) is int and 0 <= v < 2**62 for v in given):
        raise UnpicklingRefused("the size or stride of a tensor is not a list of numbers from 0 on")
    return given


# ---- torch ---------------------------------------------------------------------------------------


def view(
    storage: object, offset: object, size: object, stride: object, dtype: torch.dtype | None = None
) -> Tensor:
    """The tensor that torch's ``_rebuild_tensor`` makes of a storage, after checking its bounds.

    Args:
        storage: what the pickle gives as the storage.
        offset: the position of the first element, counted in elements.
        size, stride: of the tensor, one number per dimension each.
        dtype: of the tensor; None for the storage's.

    Raises:
        UnpicklingRefused: the storage is missing, or the tensor is not in it.
    """
    if isinstance(storage, Object):
        raise UnpicklingRefused(storage.flaw or "its storage was not read")
    if not isinstance(storage, Storage):
        raise UnpicklingRefused("it is a tensor without a storage")
    sizes, strides, (start,) = _naturals(size), _naturals(stride), _naturals((offset,))
    if len(sizes) != len(strides) or len(sizes) > 64:
        raise UnpicklingRefused("its size and its stride have different lengths")
    dtype = dtype or storage.dtype
    data: torch.UntypedStorage = storage._untyped_storage
    stored = data.nbytes() // dtype.itemsize
    last = start + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    if 0 not in sizes and last >= stored:
        raise UnpicklingRefused(f"its shape is {list(sizes)}, larger than its stored data")
    if math.prod(sizes) > max(_MOST_REPEATED, stored):
        raise UnpicklingRefused(f"its shape is {list(sizes)}, far larger than its stored data")
    typed = storage if dtype == storage.dtype else typed_storage(data, dtype)
    made: Tensor = torch._utils._rebuild_tensor(typed, start, sizes, strides)
    return made


def _plain(*metadata: object) -> None:
    """Refuse a tensor whose values are not those in its storage."""
    for entry in metadata:
        if isinstance(entry, dict) and any(entry.values()):
            raise UnpicklingRefused("it is the conjugate or the negative of what is stored")


def _rebuild_v2(
    storage: object, offset: object, size: object, stride: object, *more: object
) -> Tensor:
    _plain(*more[2:])  # after requires_grad and the hooks
    return view(storage, offset, size, stride)


def _rebuild_v3(
    storage: object, offset: object, size: object, stride: object, *more: object
) -> Tensor:
    kind = more[2] if len(more) > 2 else None  # after requires_grad and the hooks
    named = kind.name.rpartition(".")[2] if isinstance(kind, Global) else ""
    dtype = getattr(torch, named, None)
    if not isinstance(dtype, torch.dtype):
        raise UnpicklingRefused("it is a tensor of an unknown dtype")
    _plain(*more[3:])
    return view(storage, offset, size, stride, dtype)


def _rebuild_parameter(data: object, *_: object) -> object:
    """The parameter's tensor. Hooks, and attributes that a program has set, are left out."""
    return data


def _rebuild_from_type(make: object, kind: object, args: object, *_: object) -> object:
    """A tensor that carries attributes. Subclasses may mean something else by their numbers."""
    name = kind.name if isinstance(kind, Global) else ""
    if name not in _PLAIN_CLASSES:
        raise UnpicklingRefused(f"it is a tensor of the class {name[:80]}")
    constructor = TORCH.get(make.name) if isinstance(make, Global) else None
    if constructor is None or not isinstance(args, tuple):
        raise UnpicklingRefused("it is a tensor of an unknown form")
    return constructor(*args)


def _size(values: object = ()) -> tuple[int, ...]:
    return _naturals(values)


TORCH: Mapping[str, Constructor] = {
    "torch._utils._rebuild_tensor": view,
    "torch._utils._rebuild_tensor_v2": _rebuild_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type": _rebuild_from_type,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.tensor._rebuild_from_type": _rebuild_from_type,  # the module's name before torch 1.9
    "torch.Size": _size,
}


# ---- NumPy ---------------------------------------------------------------------------------------


class Dtype(Object):
    """A NumPy dtype under construction: its code, such as ``f4``, and its byte order."""

    __slots__ = ("order",)

    def __init__(self, *args: object) -> None:
        super().__init__("numpy.dtype", args)
        self.order: Literal["<", ">", "="] = "="

    def build(self, state: object) -> None:
        """Take over the byte order, which is the second item of the state."""
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order in ("<", ">"):
            self.order = order

    def made(self) -> np.dtype[Any]:
        """The dtype.

        Raises:
            UnpicklingRefused: it is not a plain number's.
        """
        code = self.args[0] if self.args else None
        if isinstance(code, str) and code.lstrip("<>=|") in _NUMPY_CODES:
            return np.dtype(code.lstrip("<>=|")).newbyteorder(self.order)
        raise UnpicklingRefused("it is an array of something else than numbers")


class Array(Object):
    """A NumPy array under construction.

    Attributes:
        value: the array; None while it has no content, or if it is not one of numbers.
    """

    __slots__ = ("value",)

    def __init__(self) -> None:
        super().__init__("numpy.ndarray")
        self.value: np.ndarray[Any, Any] | None = None

    def build(self, state: object) -> None:
        """Take over ``(version, shape, dtype, is_fortran, bytes)``."""
        fields = state[-4:] if isinstance(state, tuple) and len(state) in (4, 5) else None
        if fields is None:
            self.flaw = "it is an array of an unknown form"
            return
        shape, dtype, fortran, data = fields
        try:
            self.value = _array(data, dtype, shape, "F" if fortran else "C")
        except UnpicklingRefused as error:
            self.flaw = str(error)


def _array(data: object, dtype: object, shape: object, order: object) -> np.ndarray[Any, Any]:
    """An array of exactly the bytes that are given, which are not copied."""
    if isinstance(data, str):  # Python 2 wrote bytes as text
        data = data.encode("latin1")
    if not isinstance(dtype, Dtype) or not isinstance(data, (bytes, bytearray)):
        raise UnpicklingRefused("it is an array of something else than numbers")
    sizes, kind = _naturals(shape), dtype.made()
    if math.prod(sizes) * kind.itemsize != len(data) or len(sizes) > 32:
        raise UnpicklingRefused(f"its shape {list(sizes)} does not agree with its stored data")
    return np.ndarray(sizes, kind, data, order="F" if order == "F" else "C")


def _from_buffer(data: object, dtype: object, shape: object, order: object) -> Array:
    """NumPy's ``_frombuffer``, of pickles of protocol 5."""
    made = Array()
    made.value = _array(data, dtype, shape, order)
    return made


def _scalar(dtype: object, data: object = b"") -> object:
    """A number of NumPy's, as one of Python's."""
    return _array(data, dtype, (), "C").item()


ARRAYS: Mapping[str, Constructor] = {
    "numpy.dtype": Dtype,
    "numpy.core.multiarray._reconstruct": lambda *_: Array(),
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _from_buffer,
}

#: The allow-list: every global that makes a value, and what makes it here.
ALLOWED: Mapping[str, Constructor] = {**STANDARD, **TORCH, **ARRAYS}


def as_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """An array of numbers as a tensor in memory of its own."""
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
