# SPDX-License-Identifier: Apache-2.0
"""The operations with tables, and reading: paged writes, scatters, barriers; peer groups.

Each class is a member of a batch for :meth:`Client.submit`; the calls of the same names make one
of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transferd.client import errors
from transferd.client.indices import Pages, Rows, is_array, to_indices, to_rows
from transferd.client.job import (
    Imm,
    Write,
    to_copied,
    to_deadline_ns,
    to_imm,
    to_offset,
    to_priority,
)
from transferd.client.mailbox import Send
from transferd.client.plan import BasePlan
from transferd.client.session import (
    FLAG_CHECKSUM,
    FLAG_COUNT_JOB,
    FLAG_EXACT,
    LENGTH_MAX,
    OP_BARRIER,
    OP_READ,
    OP_SCATTER,
    OP_WRITE_PAGES,
    TARGETS_MAX,
    Request,
    Target,
    to_descriptor,
    to_handle,
)
from transferd.client.watcher import Armed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from transferd.client.memory import BaseRegion, RegionSlice
    from transferd.client.session import Session

COUNTS = {"page": 0, "job": FLAG_COUNT_JOB}


class PeerGroup:
    """Destinations in a fixed order, opened ahead: made by :meth:`Client.peer_group`.

    Attributes:
        descriptors: In their order.
    """

    __slots__ = ("descriptors",)

    def __init__(self, descriptors: Sequence[bytes]) -> None:
        """Takes the descriptors; opening them is the Client's."""
        if len(descriptors) > TARGETS_MAX:
            raise errors.InvalidRequest(
                f"a group has at most {TARGETS_MAX} members, not {len(descriptors)}"
            )
        self.descriptors = tuple(to_descriptor(d) for d in descriptors)

    def __len__(self) -> int:
        return len(self.descriptors)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.descriptors)

    def __getitem__(self, index: int) -> bytes:
        return self.descriptors[index]

    def __repr__(self) -> str:
        return f"<PeerGroup of {len(self)}>"


def open_group(session: Session, descriptors: Sequence[bytes]) -> PeerGroup:
    """Makes a group whose members are open."""
    if isinstance(descriptors, bytes | bytearray | memoryview):
        raise errors.InvalidRequest("descriptors are a list, as [descriptor], not one descriptor")
    group = PeerGroup(list(descriptors))
    session.open_many(group.descriptors)
    return group


@dataclass(frozen=True, slots=True, kw_only=True)
class WritePages:
    """A paged write of a batch; the fields are the arguments of :meth:`Client.write_pages`."""

    src: BaseRegion | RegionSlice
    src_pages: Any
    dst: bytes
    dst_pages: Any
    page_bytes: int
    imm: int
    src_stride: int | None = None
    dst_stride: int | None = None
    src_offset: int = 0
    dst_offset: int = 0
    count: str = "page"
    exact: bool = False
    checksum: bool = False
    priority: str = "bulk"
    deadline_s: float | None = None
    stream: Any = None

    def request(self) -> Request:
        """Checks the values and makes the request."""
        return pages_request(
            self.src,
            self.src_pages,
            self.dst,
            self.dst_pages,
            self.page_bytes,
            self.imm,
            (self.src_stride, self.dst_stride),
            (self.src_offset, self.dst_offset),
            self.count,
            (FLAG_EXACT if self.exact else 0) | (FLAG_CHECKSUM if self.checksum else 0),
            self.priority,
            self.deadline_s,
            self.stream,
        )


def pages_request(
    src: BaseRegion | RegionSlice,
    src_pages: Any,
    dst: bytes,
    dst_pages: Any,
    page_bytes: int,
    imm: int,
    strides: tuple[int | None, int | None],
    offsets: tuple[int, int],
    count: str,
    flags: int,
    priority: str,
    deadline_s: float | None,
    stream: Any,
) -> Request:
    """Checks the values of a paged write, makes its request; pairs are of source, destination."""
    handle = to_handle("src", src)
    if not isinstance(page_bytes, int) or not 1 <= page_bytes <= LENGTH_MAX:
        raise errors.InvalidRequest(
            f"page_bytes is a number of bytes from 1 to 2^40, not {page_bytes!r}"
        )
    if count not in COUNTS:
        raise errors.InvalidRequest(f'count is "page" or "job", not {count!r}')
    from_pages = to_indices("src_pages", src_pages)
    to_pages = to_indices("dst_pages", dst_pages)
    if from_pages.count != to_pages.count:
        raise errors.InvalidRequest(
            f"src_pages and dst_pages are as many: not {from_pages.count} and {to_pages.count}"
        )
    src_offset = to_offset("src_offset", offsets[0])
    if src_offset > src.length:
        raise errors.InvalidRequest(
            f"src_offset {src_offset} is past the {src.length} bytes", reason="SOURCE_BOUNDS"
        )
    return Request(
        OP_WRITE_PAGES,
        to_priority(priority),
        to_imm(imm),
        handle,
        src.start + src_offset,
        to_descriptor(dst),
        to_offset("dst_offset", offsets[1]),
        page_bytes,
        to_deadline_ns(deadline_s),
        COUNTS[count] | flags,
        Pages(
            from_pages,
            to_pages,
            _stride("src_stride", strides[0], page_bytes),
            _stride("dst_stride", strides[1], page_bytes),
            src.start + src.length,
        ),
        source=src.source,
        stream=to_copied(src, stream),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scatter:
    """A scatter of a batch; the fields are the arguments of :meth:`Client.scatter`."""

    src: BaseRegion | RegionSlice
    targets: Any
    imm: int
    group: PeerGroup | None = None
    checksum: bool = False
    priority: str = "bulk"
    deadline_s: float | None = None
    stream: Any = None

    def request(self) -> Request:
        """Checks the values and makes the request."""
        handle = to_handle("src", self.src)
        targets, rows = None, None
        if is_array(self.targets):
            rows = self._rows()
        else:
            listed = list(self.targets)
            _check_targets(len(listed))
            targets = tuple(self._target(i, target) for i, target in enumerate(listed))
        return Request(
            OP_SCATTER,
            to_priority(self.priority),
            to_imm(self.imm),
            handle,
            0,
            b"",
            0,
            0,
            to_deadline_ns(self.deadline_s),
            FLAG_CHECKSUM if self.checksum else 0,
            targets=targets,
            rows=rows,
            source=self.src.source,
            stream=to_copied(self.src, self.stream),
        )

    def _rows(self) -> Rows:
        """Takes an array of targets; its numbers are checked natively."""
        numbers = to_rows("targets", self.targets)
        _check_targets(numbers.count)
        if self.group is None:
            raise errors.InvalidRequest("targets are an array of indices, but there is no group=")
        src = self.src
        return Rows(numbers, self.group.descriptors, src.start, src.start + src.length)

    def _target(self, i: int, target: tuple[bytes | int, int, int, int]) -> Target:
        try:
            where, src_offset, dst_offset, length = target
        except (TypeError, ValueError):
            raise errors.InvalidRequest(
                f"targets[{i}] is (descriptor or index into the group, src_offset, dst_offset, "
                f"length), not {target!r}"
            ) from None
        src = self.src
        dst = where if type(where) is bytes else self._member(i, where)
        if not (
            type(src_offset) is type(dst_offset) is type(length) is int
            and 0 <= src_offset <= src.length - length
            and 0 <= dst_offset < 1 << 64
            and 0 <= length <= LENGTH_MAX
        ):
            self._refuse(i, src_offset, dst_offset, length)
        return dst, src.start + src_offset, dst_offset, length

    def _refuse(self, i: int, src_offset: int, dst_offset: int, length: int) -> None:
        """Says what is wrong with a target."""
        to_offset(f"src_offset of targets[{i}]", src_offset)
        to_offset(f"dst_offset of targets[{i}]", dst_offset)
        if to_offset(f"length of targets[{i}]", length) > LENGTH_MAX:
            raise errors.InvalidRequest(f"length of targets[{i}] is at most 2^40, not {length}")
        if src_offset + length > self.src.length:
            raise errors.InvalidRequest(
                f"targets[{i}]: {src_offset} + {length} is past the {self.src.length} bytes",
                reason="SOURCE_BOUNDS",
            )

    def _member(self, i: int, where: bytes | int) -> bytes:
        if not isinstance(where, int):
            return to_descriptor(where)
        if self.group is None:
            raise errors.InvalidRequest(f"targets[{i}] is an index, but there is no group=")
        if not 0 <= where < len(self.group):
            raise errors.InvalidRequest(
                f"targets[{i}]: the group has members 0 to {len(self.group) - 1}, not {where}"
            )
        return self.group[where]


@dataclass(frozen=True, slots=True, kw_only=True)
class Barrier:
    """A barrier of a batch; the fields are the arguments of :meth:`Client.barrier`."""

    group: PeerGroup | Sequence[bytes]
    imm: int
    priority: str = "bulk"
    deadline_s: float | None = None

    def request(self) -> Request:
        """Checks the values and makes the request."""
        if isinstance(self.group, bytes | bytearray | memoryview):
            raise errors.InvalidRequest(
                "group is a PeerGroup or a list of descriptors; for one alone there is imm()"
            )
        members = (
            self.group.descriptors
            if isinstance(self.group, PeerGroup)
            else [to_descriptor(d) for d in self.group]
        )
        _check_targets(len(members))
        return Request(
            OP_BARRIER,
            to_priority(self.priority),
            to_imm(self.imm),
            0,
            0,
            b"",
            0,
            0,
            to_deadline_ns(self.deadline_s),
            targets=tuple((d, 0, 0, 0) for d in members),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """A read of a batch; the fields are the arguments of :meth:`Client.read`."""

    src: bytes
    dst: BaseRegion | RegionSlice
    src_offset: int = 0
    priority: str = "bulk"
    deadline_s: float | None = None
    stream: Any = None

    def request(self) -> Request:
        """Checks the values and makes the request."""
        dst = self.dst
        handle = to_handle("dst", dst)
        if dst.source is not None:
            dst.source.read_into()
        return Request(
            OP_READ,
            to_priority(self.priority),
            0,
            handle,
            dst.start,
            to_descriptor(self.src),
            to_offset("src_offset", self.src_offset),
            dst.length,
            to_deadline_ns(self.deadline_s),
            source=dst.source,
            stream=to_copied(dst, self.stream, "dst"),
        )


Operation = Write | Imm | WritePages | Scatter | Barrier | Read | Send | Armed | BasePlan


def to_requests(jobs: Iterable[Operation]) -> list[Request]:
    """Checks the jobs of a batch and makes their requests."""
    if isinstance(jobs, Operation):
        raise errors.InvalidRequest(f"jobs are a list, as [{type(jobs).__name__}(…)], not one job")
    try:
        return [job.request() for job in jobs]
    except AttributeError as error:
        if error.name != "request":
            raise
        raise errors.InvalidRequest(
            "jobs are Write, Imm, WritePages, Scatter, Barrier, Read, Send, Armed or a plan, not "
            f"{type(error.obj).__name__}"
        ) from None


def _stride(name: str, value: int | None, page_bytes: int) -> int:
    return page_bytes if value is None else to_offset(name, value)


def _check_targets(count: int) -> None:
    if count > TARGETS_MAX:
        raise errors.InvalidRequest(f"one job has at most {TARGETS_MAX} targets, not {count}")
