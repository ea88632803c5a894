# SPDX-License-Identifier: Apache-2.0
"""From the jobs of a Submit to ring entries and their tables; errors name the field.

What can be told before anything is sent is checked here; the data plane checks all of it again.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

from transferd.daemon.errors import InvalidRequest
from transferd.daemon.plane import (
    IMM_COUNT,
    MAX_LENGTH,
    MAX_TARGETS,
    MESSAGE_BYTES_MAX,
    Entry,
    Flag,
    Op,
    Priority,
    Target,
)
from transferd.v1 import transfer_pb2 as pb
from transferd.v1 import types_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transferd.daemon.session import Session

DEADLINE_MAX_MS = 10 * 365 * 24 * 3600 * 1000
# Of all jobs of one request: what turning them into tables may take of the event loop.
PAGES_MAX = 131_072
TARGETS_MAX = 32_768
MAX_STRIDE = (1 << 64) - 1
_PRIORITIES = {
    types_pb2.PRIORITY_UNSPECIFIED: Priority.BULK,
    types_pb2.PRIORITY_BULK: Priority.BULK,
    types_pb2.PRIORITY_LATENCY: Priority.LATENCY,
}
_COUNT_FLAGS = {
    pb.PAGE_COUNT_UNSPECIFIED: 0,
    pb.PAGE_COUNT_PAGE: 0,
    pb.PAGE_COUNT_JOB: Flag.COUNT_JOB,
}
_INDEX_MAX = (1 << 32) - 1


def destinations(i: int, job: pb.Job) -> Sequence[bytes]:
    """Tells the descriptors of a job.

    Raises:
        InvalidRequest: It has no operation.
    """
    match job.WhichOneof("operation"):
        case "write":
            return (job.write.dst,)
        case "scatter":
            return [target.dst for target in job.scatter.targets]
        case "barrier":
            return job.barrier.dsts
        case "read":
            return (job.read.src,)
        case None:
            raise InvalidRequest(
                f"jobs[{i}].operation",
                "missing; give write, imm, write_pages, scatter, barrier, read or send",
            )
        case operation:
            return (getattr(job, operation).dst,)


def destination_field(i: int, job: pb.Job, k: int) -> str:
    """Names the field of a job's k-th descriptor, for errors."""
    operation = job.WhichOneof("operation")
    fields = {"scatter": f"targets[{k}].dst", "barrier": f"dsts[{k}]", "read": "src"}
    return f"jobs[{i}].{operation}.{fields.get(str(operation), 'dst')}"


def check_counts(jobs: Sequence[pb.Job]) -> None:
    """Bounds the tables of a request, before any work is done for it.

    Raises:
        InvalidRequest: Names the job that is too much.
    """
    pages = targets = 0
    for i, job in enumerate(jobs):
        operation = job.WhichOneof("operation")
        if operation == "write_pages":
            pages += len(job.write_pages.src_pages)
            if pages > PAGES_MAX:
                raise InvalidRequest(
                    f"jobs[{i}].write_pages.src_pages",
                    f"one request has at most {PAGES_MAX} pages; send several",
                )
        elif operation in ("scatter", "barrier"):
            field, count = (
                ("targets", len(job.scatter.targets))
                if operation == "scatter"
                else ("dsts", len(job.barrier.dsts))
            )
            targets += count
            if count > MAX_TARGETS or targets > TARGETS_MAX:
                raise InvalidRequest(
                    f"jobs[{i}].{operation}.{field}",
                    f"{count} of them; a job has at most {MAX_TARGETS}, a request {TARGETS_MAX}",
                )


class Entries:
    """Makes the entries of one request.

    Attributes:
        tables: What the entries' table_offset count from.
    """

    def __init__(self, session: Session, handles: dict[bytes, int], now_ns: int) -> None:
        """Takes what the jobs refer to.

        Args:
            session: Whose they are.
            handles: Of all their destinations, opened.
            now_ns: Monotonic time; deadlines count from it.
        """
        self._session = session
        self._handles = handles
        self._now_ns = now_ns
        self.tables = bytearray()

    def make(self, i: int, job: pb.Job) -> Entry:
        """Makes the entry of one job; InvalidRequest names the field."""
        operation = job.WhichOneof("operation")
        priority, deadline_ns = self._priority(i, job), self._deadline_ns(i, job)
        body = getattr(job, str(operation))
        imm = 0
        if operation not in ("read", "send"):
            imm = body.imm
            if imm >= IMM_COUNT:
                raise InvalidRequest(f"jobs[{i}].{operation}.imm", f"{imm} needs more than 20 bits")
        if operation == "write":  # the most frequent one, a thousand to a call
            return self._write(i, body, priority, imm, deadline_ns)
        entry: Entry = getattr(self, f"_{operation}")(f"jobs[{i}].{operation}", body)
        return entry._replace(priority=priority, imm=imm, deadline_ns=deadline_ns)

    @staticmethod
    def _priority(i: int, job: pb.Job) -> int:
        priority = _PRIORITIES.get(job.priority)
        if priority is None:
            raise InvalidRequest(f"jobs[{i}].priority", f"{job.priority} is no priority")
        return priority

    def _deadline_ns(self, i: int, job: pb.Job) -> int:
        ms = job.deadline_ms
        if ms > DEADLINE_MAX_MS:
            raise InvalidRequest(f"jobs[{i}].deadline_ms", f"{ms} is above {DEADLINE_MAX_MS}")
        return self._now_ns + ms * 1_000_000 if ms else 0

    def _imm(self, where: str, imm: pb.ImmJob) -> Entry:
        return Entry(Op.IMM, dst_grant=self._handles[imm.dst])

    def _write(
        self, i: int, write: pb.WriteJob, priority: int, imm: int, deadline_ns: int
    ) -> Entry:
        length = write.length_bytes
        if length > MAX_LENGTH:
            _length(f"jobs[{i}].write.length_bytes", length)
        return Entry(
            Op.WRITE,
            priority,
            write.src_region,
            write.src_offset_bytes,
            self._handles[write.dst],
            write.dst_offset_bytes,
            length,
            imm,
            deadline_ns,
            flags=_flags(write),
        )

    def _read(self, where: str, read: pb.ReadJob) -> Entry:
        return Entry(
            Op.READ,
            src_region=read.dst_region,
            src_offset=read.dst_offset_bytes,
            dst_grant=self._handles[read.src],
            dst_offset=read.src_offset_bytes,
            length=_length(f"{where}.length_bytes", read.length_bytes),
        )

    def _write_pages(self, where: str, pages: pb.WritePagesJob) -> Entry:
        count = len(pages.src_pages)
        size = pages.page_bytes
        flags = _COUNT_FLAGS.get(pages.count)
        if flags is None:
            raise InvalidRequest(f"{where}.count", f"{pages.count} is no way of counting pages")
        if not 1 <= size <= MAX_LENGTH:
            raise InvalidRequest(f"{where}.page_bytes", f"{size} is not 1 to 2^40")
        if len(pages.dst_pages) != count:
            raise InvalidRequest(
                f"{where}.dst_pages", f"{len(pages.dst_pages)} of them, and {count} src_pages"
            )
        src_stride = pages.src_stride_bytes if pages.HasField("src_stride_bytes") else size
        dst_stride = pages.dst_stride_bytes if pages.HasField("dst_stride_bytes") else size
        src, dst = array("I", pages.src_pages), array("I", pages.dst_pages)
        region = self._session.regions.get(pages.src_region)
        opened = self._session.opens.get(self._handles[pages.dst])
        keys = opened.grant.keys if opened is not None else None
        if region is not None:  # else the data plane refuses the job, as it does a write
            src_end = region.length
            _check_pages(
                f"{where}.src_pages", src, size, pages.src_offset_bytes, src_stride, src_end
            )
        if keys is not None:
            _check_pages(
                f"{where}.dst_pages", dst, size, pages.dst_offset_bytes, dst_stride, keys.length
            )
        table = array("I", bytes(8 * count))
        table[0::2], table[1::2] = src, dst
        return Entry(
            Op.WRITE_PAGES,
            src_region=pages.src_region,
            src_offset=pages.src_offset_bytes,
            dst_grant=self._handles[pages.dst],
            dst_offset=pages.dst_offset_bytes,
            length=size,
            flags=flags | _flags(pages),
            src_stride=src_stride,
            dst_stride=dst_stride,
            table_offset=self._add(table.tobytes()),
            table_count=count,
        )

    def _scatter(self, where: str, scatter: pb.ScatterJob) -> Entry:
        for k, target in enumerate(scatter.targets):
            _length(f"{where}.targets[{k}].length_bytes", target.length_bytes)
        return self._targets(
            Op.SCATTER,
            [
                Target(
                    self._handles[target.dst],
                    target.src_offset_bytes,
                    target.dst_offset_bytes,
                    target.length_bytes,
                )
                for target in scatter.targets
            ],
        )._replace(src_region=scatter.src_region, flags=Flag.CHECKSUM if scatter.checksum else 0)

    def _barrier(self, where: str, barrier: pb.BarrierJob) -> Entry:
        return self._targets(
            Op.BARRIER, [Target(self._handles[dst], 0, 0, 0) for dst in barrier.dsts]
        )

    def _send(self, where: str, send: pb.SendJob) -> Entry:
        if len(send.data) > MESSAGE_BYTES_MAX:
            raise InvalidRequest(
                f"{where}.data",
                f"{len(send.data)} bytes; a message has at most {MESSAGE_BYTES_MAX}",
            )
        padding = -len(send.data) % 8
        return Entry(
            Op.SEND,
            dst_grant=self._handles[send.dst],
            table_offset=self._add(send.data + bytes(padding)),
            table_count=len(send.data),
        )

    def _targets(self, op: Op, targets: list[Target]) -> Entry:
        packed = array("Q", [number for target in targets for number in target])
        return Entry(op, table_offset=self._add(packed.tobytes()), table_count=len(targets))

    def _add(self, table: bytes) -> int:
        """Appends a table; all are whole multiples of 8 bytes."""
        offset = len(self.tables)
        self.tables += table
        return offset


def _flags(body: pb.WriteJob | pb.WritePagesJob) -> int:
    return (Flag.EXACT if body.exact else 0) | (Flag.CHECKSUM if body.checksum else 0)


def _length(where: str, length: int) -> int:
    if length > MAX_LENGTH:
        raise InvalidRequest(where, f"{length} is above 2^40")
    return length


def _check_pages(
    where: str, pages: array[Any], size: int, offset: int, stride: int, end: int
) -> None:
    """Checks that no page leaves the `end` bytes that there are."""
    if not pages:
        return
    room = end - offset - size
    last = -1 if room < 0 else room // stride if stride else _INDEX_MAX
    if max(pages) <= last:
        return
    position, page = next((k, page) for k, page in enumerate(pages) if page > last)
    raise InvalidRequest(
        where,
        f"number {position} is page {page}, whose {size} bytes from {offset} + {page} * {stride} "
        f"on leave the {end} bytes that there are; "
        f"{f'the last page is {last}' if last >= 0 else 'none fits'}",
    )
