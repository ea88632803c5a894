# SPDX-License-Identifier: Apache-2.0
"""Batches for the submit ring: entries, their tables, and what is wrong with a table.

The native code checks the tables and copies them into the arena; nothing here looks at single
pages.
"""

from __future__ import annotations

import time
from array import array
from typing import TYPE_CHECKING, Any, NamedTuple

from transferd.client import errors
from transferd.native.client_half import ffi, lib
from transferd.native.entry import ENTRY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transferd.client.session import Request

TARGET_BYTES = int(ffi.sizeof("struct tfd_target"))
PAGE_BYTES = int(ffi.sizeof("struct tfd_page"))
LINE = int(lib.TFD_LINE)
_UNKNOWN = (1 << 64) - 1


class Batch(NamedTuple):
    """What the native code takes.

    Attributes:
        entries: struct tfd_entry[].
        tables: struct tfd_client_table[]; NULL where no job has one.
        kept: What the tables point to.
    """

    entries: Any
    tables: Any
    kept: list[Any]


def table_size(request: Request) -> int:
    """Tells what a request's table takes of the arena."""
    if request.data is not None:
        each = 1
    else:
        each = PAGE_BYTES if request.pages is not None else TARGET_BYTES
    return -(-request.table_count * each // LINE) * LINE


def make(
    requests: Sequence[Request], handles: Mapping[bytes, int], lengths: Mapping[bytes, int]
) -> Batch:
    """Makes a batch.

    Args:
        requests: The jobs.
        handles: Of their destinations.
        lengths: Bytes of the grants, where they are known.
    """
    count = len(requests)
    entries = ffi.new("struct tfd_entry[]", count)
    buffer = ffi.buffer(entries)
    now = time.monotonic_ns()
    tables: Any = ffi.NULL
    kept: list[Any] = []
    for index, request in enumerate(requests):
        (
            op, priority, imm, region, src_offset, dst, dst_offset, length, deadline_ns, flags,
            pages, targets, data, trigger,
        ) = request  # fmt: skip
        table_count = request.table_count if pages or targets or data else 0
        ENTRY.pack_into(
            buffer, index * ENTRY.size,
            op, flags | trigger.flags if trigger else flags, priority, 0, 0, 0, region, src_offset,
            handles[dst] if targets is None else 0, dst_offset, length, imm,
            trigger.slot if trigger else 0,
            now + deadline_ns if deadline_ns else 0, 0, 0, table_count, 0,
            pages.src_stride if pages else 0, pages.dst_stride if pages else 0,
            trigger.value if trigger else 0,
        )  # fmt: skip
        if table_count:
            if tables == ffi.NULL:
                tables = ffi.new("struct tfd_client_table[]", count)
            kept.append(_fill(tables[index], request, handles, lengths))
    return Batch(entries, tables, kept)


def _fill(
    table: Any, request: Request, handles: Mapping[bytes, int], lengths: Mapping[bytes, int]
) -> Any:
    """Points a table to what it is made from; returns what has to be kept alive."""
    pages = request.pages
    if pages is not None:
        table.src, table.src_form = pages.src.pointer, pages.src.form
        table.dst, table.dst_form = pages.dst.pointer, pages.dst.form
        table.src_end = pages.src_end
        table.dst_end = lengths.get(request.dst, 0) or _UNKNOWN
        return pages
    if request.data is not None:
        raw = ffi.from_buffer(request.data)
        table.bytes = raw
        return raw
    assert request.targets is not None
    numbers: list[int] = []
    for dst, src_offset, dst_offset, length in request.targets:
        numbers += (handles[dst], src_offset, dst_offset, length)
    raw = ffi.from_buffer(array("Q", numbers))
    table.targets = ffi.cast("struct tfd_target *", raw)
    return raw


def check_pages(requests: Sequence[Request]) -> None:
    """Checks the sources of paged writes, for a session without an arena.

    Raises:
        InvalidRequest: Names the index.
    """
    handles = dict.fromkeys((d for r in requests for d in r.destinations), 0)
    batch = make(requests, handles, {})
    if batch.tables == ffi.NULL:
        return
    fault = ffi.new("struct tfd_table_fault *")
    if lib.tfd_client_tables_check(batch.entries, batch.tables, len(requests), fault):
        raise refusal(requests, fault)


def refusal(requests: Sequence[Request], fault: Any) -> errors.InvalidRequest:
    """Makes the error for an index that is out of range."""
    request = requests[fault.entry]
    pages = request.pages
    assert pages is not None
    name, indices, what = (
        ("dst_pages", pages.dst, "the grant")
        if fault.side
        else ("src_pages", pages.src, "the region")
    )
    if len(requests) > 1:
        name = f"jobs[{fault.entry}].{name}"
    room = f"pages 0 to {fault.legal - 1}" if fault.legal else "no page"
    return errors.InvalidRequest(
        f"{name}[{fault.position}] is {indices.view[fault.position]}: with these offsets, strides "
        f"and {request.length} bytes a page {what} has {room}",
        reason="DESTINATION_BOUNDS" if fault.side else "SOURCE_BOUNDS",
    )
