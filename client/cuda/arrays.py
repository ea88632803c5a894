# SPDX-License-Identifier: Apache-2.0
"""GPU memory as users have it: torch tensors, cupy arrays, __cuda_array_interface__, DLPack."""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from transferd.client import errors

if TYPE_CHECKING:
    from collections.abc import Sequence

_DL_CUDA, _DL_CUDA_MANAGED = 2, 13
_DL_CAPSULE = b"dltensor"


class DeviceArray(NamedTuple):
    """Contiguous GPU memory of somebody's.

    Attributes:
        address: Of its first byte.
        length: Bytes.
        device: Ordinal; -1: not told.
        memory: What its user calls it by.
    """

    address: int
    length: int
    device: int
    memory: Any

    @property
    def what(self) -> str:
        """It, for people."""
        return _what(self.memory)


def _what(memory: Any) -> str:
    if hasattr(memory, "data_ptr"):
        return f"the tensor on {memory.device}"
    return f"the {type(memory).__name__}"


def device_array(memory: Any) -> DeviceArray | None:
    """Finds the GPU memory behind what a user gives. Imports nothing.

    Returns:
        Where it is; None: it does not say of itself that it lies in GPU memory.

    Raises:
        InvalidRequest: It is not contiguous, empty, read-only, or says contradictory things.
    """
    found = _find(memory)
    if found is None:
        return None
    if found.length <= 0:
        raise errors.InvalidRequest(f"{found.what} is empty")
    if not found.address:
        raise errors.InvalidRequest(f"{found.what} has no address: it was freed, or moved")
    return found


def _find(memory: Any) -> DeviceArray | None:
    kind = getattr(getattr(memory, "device", None), "type", None)
    if kind is not None and hasattr(memory, "data_ptr"):  # a tensor; those on the CPU have the rest
        return _tensor(memory) if kind == "cuda" else None
    if hasattr(memory, "__array_interface__"):
        return None
    try:  # torch raises from the attribute itself, for tensors of the CPU
        about = getattr(memory, "__cuda_array_interface__", None)
    except (AttributeError, TypeError, RuntimeError):
        return None
    if about is not None:
        return _interface(memory, about)
    try:
        on_device = int(memory.__dlpack_device__()[0]) in (_DL_CUDA, _DL_CUDA_MANAGED)
    except (AttributeError, TypeError, ValueError, BufferError, RuntimeError):
        return None
    return _dlpack(memory) if on_device else None


def _tensor(tensor: Any) -> DeviceArray:
    if not tensor.is_contiguous():
        raise errors.InvalidRequest("the tensor is not contiguous; register its base, or a copy")
    index = tensor.device.index
    return DeviceArray(
        int(tensor.data_ptr()),
        int(tensor.numel()) * int(tensor.element_size()),
        -1 if index is None else int(index),
        tensor,
    )


def _interface(memory: Any, about: Any) -> DeviceArray:
    """Reads the protocol that numba, cupy and others share (versions 2 and 3)."""
    try:
        item_bytes = length = int(about["typestr"][2:])
        for count in about["shape"]:
            length *= int(count)
        address, read_only = about["data"]
        strides = about.get("strides")
        if strides is not None and not _contiguous(about["shape"], strides, item_bytes):
            raise errors.InvalidRequest(
                f"{_what(memory)} is not contiguous; register its base, or a copy"
            )
        address = int(address or 0)
    except (KeyError, TypeError, ValueError) as error:
        raise errors.InvalidRequest(
            f"{_what(memory)} has a __cuda_array_interface__ that cannot be read ({error!r})"
        ) from None
    if read_only:
        raise errors.InvalidRequest(f"{_what(memory)} is read-only")
    return DeviceArray(address, length, -1, memory)


def _contiguous(shape: Sequence[int], strides: Sequence[int], item_bytes: int) -> bool:
    expected = item_bytes
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length > 1 and stride != expected:
            return False
        expected *= length
    return True


class _DLTensor(ctypes.Structure):
    """DLTensor of dlpack.h, the first member of a DLManagedTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def _dlpack(memory: Any) -> DeviceArray:
    """Reads a capsule without consuming it: its producer frees it when it is dropped."""
    try:
        capsule = memory.__dlpack__()
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        tensor = _DLTensor.from_address(get(capsule, _DL_CAPSULE))
    except (AttributeError, TypeError, ValueError, BufferError, RuntimeError) as error:
        raise errors.InvalidRequest(f"{_what(memory)} gives no DLPack capsule ({error})") from None
    if tensor.device_type not in (_DL_CUDA, _DL_CUDA_MANAGED):
        raise errors.InvalidRequest(
            f"{_what(memory)} is on a device of DLPack type {tensor.device_type}, which is not CUDA"
        )
    if tensor.bits * tensor.lanes % 8:
        raise errors.InvalidRequest(
            f"{_what(memory)} has items of {tensor.bits} bits, no whole bytes"
        )
    item_bytes = tensor.bits * tensor.lanes // 8
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    if tensor.strides:
        strides = tuple(tensor.strides[i] * item_bytes for i in range(tensor.ndim))
        if not _contiguous(shape, strides, item_bytes):
            raise errors.InvalidRequest(
                f"{_what(memory)} is not contiguous; register its base, or a copy"
            )
    address = int(tensor.data or 0)
    return DeviceArray(
        address + int(tensor.byte_offset) if address else 0,
        math.prod(shape) * item_bytes,
        int(tensor.device_id),
        memory,
    )
