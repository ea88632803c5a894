# SPDX-License-Identifier: Apache-2.0
"""Page indices as users have them: numpy arrays, torch tensors, lists, buffers of int32 or int64.

No Python object is made per page, but for lists, which hold them already.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

from transferd.client import errors
from transferd.native.client_half import ffi, lib

# By the format and size of a buffer's items.
_SIGNED, _UNSIGNED = "ilq", "ILQ"
_FORMS = {
    (True, 4): int(lib.TFD_INDEX_I32),
    (True, 8): int(lib.TFD_INDEX_I64),
    (False, 4): int(lib.TFD_INDEX_U32),
    (False, 8): int(lib.TFD_INDEX_U64),
}
COUNT_MAX = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Indices:
    """Indices of pages.

    Attributes:
        view: The numbers; one dimension, contiguous.
        pointer: To them; keeps them alive.
        form: TFD_INDEX_*.
        count: How many.
    """

    view: memoryview
    pointer: Any
    form: int
    count: int


def _refuse(name: str, what: str) -> errors.InvalidRequest:
    return errors.InvalidRequest(
        f"{name} is a list, or an array of one dimension of int32 or int64, not {what}"
    )


def _as_buffer(name: str, value: Any) -> memoryview:
    if isinstance(value, list | tuple | range):
        try:
            return memoryview(array("q", value))
        except OverflowError:
            raise errors.InvalidRequest(f"{name} holds a number above 64 bits") from None
        except TypeError as error:
            raise _refuse(name, f"a {type(value).__name__} of something else ({error})") from None
    if hasattr(value, "data_ptr") and value.device.type != "cpu":
        raise errors.InvalidRequest(
            f"{name} is on {value.device}: pass {name}.cpu(), or a host array"
        )
    try:  # a tensor has no buffer of its own
        return memoryview(value.detach().numpy() if hasattr(value, "data_ptr") else value)
    except (TypeError, RuntimeError):  # bfloat16, sparse: numpy has no such thing
        raise _refuse(name, str(getattr(value, "dtype", type(value).__name__))) from None


def to_indices(name: str, value: Any) -> Indices:
    """Finds the numbers behind what a user gives; their values are checked natively.

    Raises:
        InvalidRequest: It is no array of indices.
    """
    view = _as_buffer(name, value)
    kind = view.format.removeprefix("@").removeprefix("=").removeprefix("<")
    form = _FORMS.get((kind in _SIGNED, view.itemsize)) if kind in _SIGNED + _UNSIGNED else None
    if form is None:
        raise _refuse(name, f"of items with the format {view.format!r}")
    if view.ndim != 1:
        raise _refuse(name, f"{view.ndim} dimensions")
    if len(view) > COUNT_MAX:
        raise errors.InvalidRequest(f"{name} has {len(view)} pages; a job has at most {COUNT_MAX}")
    if not view.c_contiguous:
        view = memoryview(view.tobytes()).cast(kind)  # type: ignore[call-overload]
    return Indices(view, ffi.from_buffer(view), form, len(view))
