# SPDX-License-Identifier: Apache-2.0
"""The kernels of client/cuda, as Python functions on host memory, for :mod:`support.fakecuda`."""

from __future__ import annotations

import ctypes
from ctypes import c_uint32, c_uint64


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


def bump(address: int, n: int) -> None:
    word(address).value += n
