# SPDX-License-Identifier: Apache-2.0
"""Batches for the submit ring: entries, their tables, and what is wrong with a table.

The native code checks the tables and copies them into the arena; nothing here looks at single
pages.
"""

from __future__ import annotations

import errno
import time
from array import array
from typing import TYPE_CHECKING, Any, NamedTuple

from transferd.client import errors
from transferd.client.indices import ROW_NUMBERS
from transferd.client.session import LENGTH_MAX
from transferd.native.client_half import ffi, lib
from transferd.native.entry import ENTRY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transferd.client.indices import Rows
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
            pages, targets, data, trigger, rows, launch, _, _,
        ) = request  # fmt: skip
        table_count = request.table_count if pages or targets or data or rows else 0
        ENTRY.pack_into(
            buffer, index * ENTRY.size,
            op, flags | trigger.flags if trigger else flags, priority, 0, 0, 0, region, src_offset,
            handles[dst] if targets is None and rows is None else 0, dst_offset, length, imm,
            trigger.slot if trigger else 0,
            now + deadline_ns if deadline_ns else 0, 0, 0, table_count,
            launch.number if launch else 0,
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
    if request.rows is not None:
        return _fill_rows(table, request.rows, handles)
    assert request.targets is not None
    numbers: list[int] = []
    for dst, src_offset, dst_offset, length in request.targets:
        numbers += (handles[dst], src_offset, dst_offset, length)
    raw = ffi.from_buffer(array("Q", numbers))
    table.targets = ffi.cast("struct tfd_target *", raw)
    return raw


def _fill_rows(table: Any, rows: Rows, handles: Mapping[bytes, int]) -> Any:
    members = ffi.new("uint64_t[]", [handles[member] for member in rows.members])
    numbers = rows.numbers
    table.rows, table.src_form = numbers.pointer, numbers.form
    table.members, table.member_count = members, len(rows.members)
    table.src_start, table.src_end = rows.src_start, rows.src_end
    return rows, members


def check(requests: Sequence[Request]) -> None:
    """Checks the tables of jobs, as far as they are arrays, for a session without an arena.

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


def plan_refusal(request: Request, rc: int, table_limit: int) -> errors.TransferdError:
    """Makes the error for a plan that there is no room for."""
    if rc == -errno.ENOSPC:
        return errors.QuotaExceeded(
            "the session has all the plans that it may have: close some, or raise limits.plans of "
            "the daemon",
            reason="PLANS",
        )
    return errors.InvalidRequest(
        f"the table of a plan of {request.table_count or 1} entries is larger than the session's "
        f"arena of {table_limit} bytes: use several plans, or raise limits.arena of the daemon",
        reason="TABLE",
    )


def refusal(requests: Sequence[Request], fault: Any) -> errors.InvalidRequest:
    """Makes the error for a number that is out of range."""
    request = requests[fault.entry]
    where = f"jobs[{fault.entry}]." if len(requests) > 1 else ""
    if request.rows is not None:
        return _row_refusal(f"{where}targets", request.rows, fault)
    pages = request.pages
    assert pages is not None
    name, indices, what = (
        ("dst_pages", pages.dst, "the grant")
        if fault.side
        else ("src_pages", pages.src, "the region")
    )
    room = f"pages 0 to {fault.legal - 1}" if fault.legal else "no page"
    return errors.InvalidRequest(
        f"{where}{name}[{fault.position}] is {indices.view[fault.position]}: with these offsets, "
        f"strides and {request.length} bytes a page {what} has {room}",
        reason="DESTINATION_BOUNDS" if fault.side else "SOURCE_BOUNDS",
    )


def _row_refusal(name: str, rows: Rows, fault: Any) -> errors.InvalidRequest:
    i = fault.position
    member, src_offset, dst_offset, length = (rows.numbers.view[i, k] for k in range(ROW_NUMBERS))
    match fault.side:
        case 0:
            text = f"the group has members 0 to {fault.legal - 1}, not {member}"
        case 2:
            text = f"dst_offset is a number of bytes from 0 on, not {dst_offset}"
        case _ if src_offset < 0 or length < 0:
            text = f"src_offset and length are from 0 on, not {src_offset} and {length}"
        case 3 if length > LENGTH_MAX:
            text = f"length is at most 2^40, not {length}"
        case _:
            text = f"{src_offset} + {length} is past the {rows.src_end - rows.src_start} bytes"
    return errors.InvalidRequest(
        f"{name}[{i}]: {text}", reason="SOURCE_BOUNDS" if fault.side in (1, 3) else ""
    )
