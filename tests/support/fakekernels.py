# SPDX-License-Identifier: Apache-2.0
"""The kernels of client/cuda, as Python functions on host memory, for :mod:`support.fakecuda`."""

from __future__ import annotations

import ctypes
from ctypes import c_uint32, c_uint64
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def word(address: int) -> c_uint64:
    """Looks at 64 bits of memory."""
    return c_uint64.from_address(address)


def _is_void(marks: int, value: int) -> bool:
    return bool(marks and c_uint32.from_address(marks + 4 * (value % 16)).value == value << 1 | 1)


def pages(
    src: int, dst: int, src_stride: int, dst_stride: int, size: int, table: int, count: int,
    chunk: int, marks: int, told: int, value: int, slot: int,
) -> None:  # fmt: skip
    rows = (c_uint32 * (2 * count)).from_address(table) if table else (0, 0)
    for i in range(0 if _is_void(marks, value) else count):
        ctypes.memmove(dst + rows[2 * i + 1] * dst_stride, src + rows[2 * i] * src_stride, size)
    word(told).value = value


def targets(
    src: int, table: int, places: int, count: int, chunk: int, marks: int, told: int, value: int,
    slot: int,
) -> None:  # fmt: skip
    numbers = (c_uint64 * (4 * count)).from_address(table)
    at = (c_uint64 * count).from_address(places)
    for i in range(0 if _is_void(marks, value) else count):
        _, src_offset, dst_offset, length = numbers[4 * i : 4 * i + 4]
        if at[i]:
            ctypes.memmove(at[i] + dst_offset, src + src_offset, length)
    word(told).value = value


HEAD = 64


def _rows(head: int, capacity: int, marks: int, value: int) -> int:
    count = c_uint32.from_address(head).value
    return 0 if count > capacity or _is_void(marks, value) else count


def plan_pages(
    src: int, dst: int, src_stride: int, dst_stride: int, size: int, head: int, capacity: int,
    src_legal: int, dst_legal: int, chunk: int, marks: int, told: int, value: int, slot: int,
) -> None:  # fmt: skip
    rows = (c_uint32 * (2 * capacity)).from_address(head + HEAD)
    for i in range(_rows(head, capacity, marks, value)):
        if rows[2 * i] < src_legal and rows[2 * i + 1] < dst_legal:
            to, start = dst + rows[2 * i + 1] * dst_stride, src + rows[2 * i] * src_stride
            ctypes.memmove(to, start, size)
    word(told).value = value


def plan_slices(
    src: int, src_bytes: int, head: int, places: int, capacity: int, chunk: int, marks: int,
    told: int, value: int, slot: int,
) -> None:  # fmt: skip
    numbers = (c_uint64 * (3 * capacity)).from_address(head + HEAD)
    at = (c_uint64 * (2 * capacity)).from_address(places)
    for i in range(_rows(head, capacity, marks, value)):
        src_offset, dst_offset, length = numbers[3 * i : 3 * i + 3]
        if src_offset + length <= src_bytes and dst_offset + length <= at[2 * i + 1]:
            ctypes.memmove(at[2 * i] + dst_offset, src + src_offset, length)
    word(told).value = value


def bump(address: int, n: int) -> None:
    word(address).value += n


# By name: the types of its parameters, and what it does.
KERNELS: dict[str, tuple[list[Any], Callable[..., None]]] = {
    "tfd_pages": ([*[c_uint64] * 6, c_uint32, *[c_uint64] * 4, c_uint32], pages),
    "tfd_targets": ([*[c_uint64] * 3, c_uint32, *[c_uint64] * 4, c_uint32], targets),
    "tfd_plan_pages": ([*[c_uint64] * 6, c_uint32, *[c_uint64] * 6, c_uint32], plan_pages),
    "tfd_plan_slices": ([*[c_uint64] * 4, c_uint32, *[c_uint64] * 4, c_uint32], plan_slices),
    "tfd_bump": ([c_uint64] * 2, bump),
}
