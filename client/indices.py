# SPDX-License-Identifier: Apache-2.0
"""Numbers as users have them: numpy arrays, tensors, buffers of 32 or 64 bits, lists.

Of indices of pages, and of the rows of a scatter. No Python object is made per number, but for
lists, which hold them already.
"""

from __future__ import annotations

import ctypes
import sys
from array import array
from dataclasses import dataclass
from typing import Any, NamedTuple

from transferd.client import errors
from transferd.native.client_half import ffi, lib

_WIDTHS = {"i": 4, "I": 4, "l": 8, "L": 8, "q": 8, "Q": 8}
_FORMS = {
    (True, 4): int(lib.TFD_INDEX_I32),
    (True, 8): int(lib.TFD_INDEX_I64),
    (False, 4): int(lib.TFD_INDEX_U32),
    (False, 8): int(lib.TFD_INDEX_U64),
}
# By the format of a buffer's items, and by its size: a long has 4 or 8 bytes. Their order is ours,
# which is the little-endian one on all hosts that we run on.
_FORM_OF = {
    (prefix + kind, size): form
    for prefix in ("", "@", "=", "<")
    for kind in _WIDTHS
    for (signed, size), form in _FORMS.items()
    if signed == kind.islower()
}
_CTYPES = {
    "<i4": ctypes.c_int32,
    "<i8": ctypes.c_int64,
    "<u4": ctypes.c_uint32,
    "<u8": ctypes.c_uint64,
}
COUNT_MAX = (1 << 32) - 1
ROW_NUMBERS = 4
_HOST = (1, 3)  # kDLCPU, kDLCUDAHost: memory that we can read


@dataclass(slots=True, eq=False)  # freezing it would double the cost of making one
class Indices:
    """Indices of pages, or rows of numbers one after the other.

    Attributes:
        view: The numbers; contiguous, and of a format whose items Python can read.
        pointer: To them.
        form: TFD_INDEX_*.
        count: How many; of rows, how many rows.
        owner: What was given; keeps them alive where the view does not.
    """

    view: memoryview
    pointer: Any
    form: int
    count: int
    owner: Any


class Pages(NamedTuple):
    """The table of a paged write.

    Attributes:
        src: Pages in the region.
        dst: Pages in the grant; as many.
        src_stride: Bytes from one page to the next.
        dst_stride: The same in the grant.
        src_end: Bytes into the region that no page may pass.
    """

    src: Indices
    dst: Indices
    src_stride: int
    dst_stride: int
    src_end: int


class Rows(NamedTuple):
    """The table of a scatter, as an array.

    Attributes:
        numbers: Rows of member, src_offset, dst_offset, length.
        members: Descriptors.
        src_start: Bytes into the region where their offsets count from.
        src_end: Bytes into the region that none may pass.
    """

    numbers: Indices
    members: tuple[bytes, ...]
    src_start: int
    src_end: int


class _Argument(NamedTuple):
    """What is read, for errors.

    Attributes:
        name: As the caller has it.
        ndim: 1: indices; 2: rows.
    """

    name: str
    ndim: int

    def refuse(self, what: str) -> errors.InvalidRequest:
        shape = "one dimension" if self.ndim == 1 else f"shape (n, {ROW_NUMBERS})"
        return errors.InvalidRequest(
            f"{self.name} is a list, or an array of {shape} of int32 or int64, not {what}"
        )

    def refuse_items(self, kind: str) -> errors.InvalidRequest:
        """Says what to do about items that are no indices."""
        code = kind.lstrip("@=<>!|")
        advice = ""
        if code in ("?", "b1"):
            advice = f": of a mask pass numpy.flatnonzero({self.name})"
        elif kind[:1] in (">", "!") and code[:1] in "iIlLqQu":
            advice = ", which is big-endian: convert it to int64"
        elif code[:1] in tuple("efdgbBhHiu"):
            advice = ": convert it to int64"
        return self.refuse(f"of items with the format {kind!r}{advice}")


def is_array(value: Any) -> bool:
    """Tells whether something is an array, to be read as a whole, and no list of things."""
    if isinstance(value, list | tuple):
        return False
    if any(hasattr(value, name) for name in ("__array_interface__", "__dlpack__", "data_ptr")):
        return True
    try:
        memoryview(value)
    except TypeError:
        return False
    return True


def _from_interface(asked: _Argument, value: Any) -> memoryview:
    """Reads ``__array_interface__`` (numpy's protocol, version 3) of what has no buffer."""
    about = value.__array_interface__
    shape, strides, data = about["shape"], about.get("strides"), about.get("data")
    item = _CTYPES.get(about["typestr"])
    if item is None:
        raise asked.refuse_items(about["typestr"])
    if not isinstance(data, tuple):
        raise asked.refuse("one whose __array_interface__ tells no address")
    kind: Any = item
    steps: list[int] = []
    for length in reversed(shape):
        steps.insert(0, ctypes.sizeof(kind))
        kind = kind * length
    if strides is not None and list(strides) != steps and ctypes.sizeof(kind):
        raise asked.refuse("with gaps between its items: pass a contiguous copy")
    return memoryview(kind.from_address(data[0]))


def _from_tensor(asked: _Argument, value: Any) -> memoryview:
    """Reads what other libraries have in place of a buffer: torch's tensors, DLPack."""
    if hasattr(value, "data_ptr"):
        if value.device.type != "cpu":
            raise errors.InvalidRequest(
                f"{asked.name} is on {value.device}: pass {asked.name}.cpu(), or a host array"
            )
        try:
            return memoryview(value.detach().numpy())
        except (TypeError, RuntimeError):  # bfloat16, sparse: numpy has no such thing
            raise asked.refuse(str(getattr(value, "dtype", type(value).__name__))) from None
    if hasattr(value, "__array_interface__"):
        return _from_interface(asked, value)
    if not hasattr(value, "__dlpack__"):
        raise asked.refuse(str(getattr(value, "dtype", type(value).__name__)))
    device = value.__dlpack_device__()
    if device[0] not in _HOST:
        raise errors.InvalidRequest(
            f"{asked.name} is on a device (DLPack type {int(device[0])}): pass a copy on the host"
        )
    try:
        import numpy as np

        return memoryview(np.from_dlpack(value))  # type: ignore[arg-type]
    except ImportError:
        raise errors.InvalidRequest(
            f"{asked.name} is a {type(value).__name__}, which offers DLPack alone: install numpy, "
            "which reads that, or pass a buffer"
        ) from None
    except (TypeError, RuntimeError, BufferError) as error:
        raise asked.refuse(f"a {type(value).__name__} ({error})") from None


def _as_buffer(asked: _Argument, value: Any) -> memoryview:
    if isinstance(value, list | tuple | range):
        try:
            # Of a list an array is made faster than of a range.
            return memoryview(array("q", list(value) if isinstance(value, range) else value))
        except OverflowError:
            raise errors.InvalidRequest(f"{asked.name} holds a number above 64 bits") from None
        except TypeError as error:
            raise asked.refuse(f"a {type(value).__name__} of something else ({error})") from None
    if hasattr(value, "compressed"):  # of numpy.ma, whose buffer holds what is masked, too
        raise asked.refuse(f"a masked array: pass {asked.name}.compressed()")
    try:
        return memoryview(value)
    except (TypeError, BufferError, ValueError):  # has none; or numpy has no format for its items
        return _from_tensor(asked, value)


def _read(asked: _Argument, value: Any) -> tuple[memoryview, int]:
    """Finds the numbers, contiguous, and their form."""
    view = _as_buffer(asked, value)
    form = _FORM_OF.get((view.format, view.itemsize))
    if form is None:
        raise asked.refuse_items(view.format)
    if view.ndim != asked.ndim:
        hint = f": pass {asked.name}.ravel()" if view.ndim > asked.ndim == 1 else ""
        raise asked.refuse(f"{view.ndim} dimensions{hint}")
    shape = view.shape
    if not view.c_contiguous:
        numpy = sys.modules.get("numpy")  # who has an array with gaps has most likely loaded it
        view = memoryview(view.tobytes() if numpy is None else numpy.ascontiguousarray(view))
    code = view.format.lstrip("@=<")
    if code != view.format or view.shape != shape:
        view = (
            view.cast("B").cast(code, shape)  # type: ignore[call-overload]
            if view.nbytes
            else memoryview(array(code))
        )
    return view, form


def plain_indices(value: Any) -> tuple[memoryview, int] | None:
    """Finds the numbers, and their form, of what has them in a buffer just so; None: ask others."""
    if isinstance(value, list) or hasattr(value, "compressed"):
        return None
    try:
        view = memoryview(value)
    except (TypeError, BufferError, ValueError):
        return None
    form = _FORM_OF.get((view.format, view.itemsize))
    if form is None or view.ndim != 1 or not view.c_contiguous or len(view) > COUNT_MAX:
        return None
    return view, form


def to_indices(name: str, value: Any) -> Indices:
    """Finds the numbers behind what a user gives; their values are checked natively.

    Raises:
        InvalidRequest: It is no array of indices.
    """
    view, form = _read(_Argument(name, 1), value)
    if len(view) > COUNT_MAX:
        raise errors.InvalidRequest(f"{name} has {len(view)} pages; a job has at most {COUNT_MAX}")
    return Indices(view, ffi.from_buffer(view), form, len(view), value)


def to_rows(name: str, value: Any) -> Indices:
    """Finds the rows of four numbers behind an array; their values are checked natively.

    Raises:
        InvalidRequest: It is no array of shape (n, 4).
    """
    view, form = _read(_Argument(name, 2), value)
    shape = view.shape or ()
    if view.nbytes and shape[1] != ROW_NUMBERS:
        raise errors.InvalidRequest(
            f"{name} is an array of shape (n, 4): member, src_offset, dst_offset, length; not "
            f"{shape}"
        )
    return Indices(view, ffi.from_buffer(view), form, len(view), value)
