# SPDX-License-Identifier: Apache-2.0
"""A data plane that lives in memory: no NIC, no thread, every event on the event loop."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from transferd.daemon.peer import is_staged
from transferd.daemon.plane import (
    STATUS_OK,
    CounterState,
    Detail,
    Event,
    EventType,
    GroupOptions,
    JobEnd,
    JobInfo,
    MailboxInfo,
    OpenOptions,
    OpenPath,
    PlaneError,
    RailInfo,
    RailState,
    RegionKey,
    SessionFds,
    SessionOptions,
    SessionStat,
)

from support.fake_stages import FakeStages

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transferd.daemon.plane import Entry, Landed

PROTOCOL = "memory/1"


def rail(name: str = "m0", protocol: str = PROTOCOL, why: str = "") -> RailInfo:
    """Makes a rail that is up."""
    return RailInfo(
        name, "memory", protocol, 1 << 30, 0, 0, 0, 0, ordered=True, state=RailState.UP, why=why
    )


@dataclass(slots=True)
class FakeOpen:
    """A native open: refused is the detail that it was revoked with; fences are by number."""

    options: OpenOptions
    refused: Detail | None = None
    fences: dict[int, tuple[range, ...]] = field(default_factory=dict)


@dataclass(slots=True)
class FakeSession:
    """What a native session holds."""

    options: SessionOptions
    name_space: int
    watch_fd: int
    state: str = "open"
    opens: dict[int, FakeOpen] = field(default_factory=dict)
    regions: set[int] = field(default_factory=set)
    counters: dict[int, list[int]] = field(default_factory=dict)  # imm: value, faults, lost, seen
    ends: dict[int, JobEnd] = field(default_factory=dict)
    mailboxes: dict[int, list[bytes]] = field(default_factory=dict)


class FakePlane(FakeStages):
    """Implements transferd.daemon.plane.Plane.

    Attributes:
        busy_opens: Opens that stay busy after a revoke until :meth:`make_quiet`, and after a fence
            until :meth:`fence_quiet`.
        conns: Living connections: whether they are outgoing.
        closed: Connections that were closed, with their detail.
        unreached: Regions of device memory that no rail reaches, but staged ones.
        full: Rails that have no room for a connection.
        mute: Rails by which nobody answers: connections are made, and not proven.
    """

    def __init__(self, rails: Sequence[RailInfo] = ()) -> None:
        super().__init__()
        self.rails = list(rails) or [rail()]
        self.warnings: list[str] = []
        self.busy_opens: set[int] = set()
        self.unreached: set[int] = set()
        self.full: set[int] = set()
        self.sessions: dict[int, FakeSession] = {}
        self.conns: dict[int, bool] = {}
        self.closed: dict[int, int] = {}
        self.mute: set[int] = set()
        self.rail_of: dict[int, int] = {}
        self.far_landed: dict[int, Landed | None] = {}
        self.landed: Landed | None = None  # what closing a connection tells
        self.settled: list[int] = []
        self.watches: dict[int, tuple[bytes, bytes]] = {}
        self._handles = itertools.count(1)
        self._handler: Callable[[Event], None] | None = None

    # ---- events ----

    def set_handler(self, handler: Callable[[Event], None]) -> None:
        self._handler = handler

    def tell(self, kind: EventType, number: int, **values: int) -> None:
        """Sends an event, soon."""
        event = Event(
            type=kind,
            detail=values.get("detail", 0),
            id=number,
            imm=values.get("imm", 0),
            count=values.get("count", 0),
            session=values.get("session", 0),
            units=values.get("units", 0),
        )
        asyncio.get_running_loop().call_soon(self._deliver, event)

    def _deliver(self, event: Event) -> None:
        if self._handler is not None:
            self._handler(event)

    # ---- rails and sessions ----

    async def open_group(self, options: GroupOptions) -> int:
        return 0

    def rail_stats(self) -> list[RailInfo]:
        return self.rails

    async def session_open(self, options: SessionOptions) -> tuple[int, SessionFds]:
        await asyncio.sleep(0)
        handle = next(self._handles)
        watch = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.sessions[handle] = FakeSession(options, len(self.sessions) + 1, watch)
        fds = [os.memfd_create("segment"), os.eventfd(0), os.eventfd(0)]
        return handle, SessionFds(*fds)

    def _session(self, handle: int) -> FakeSession:
        if handle not in self.sessions:
            raise PlaneError(errno.ENOENT, "no such session")
        return self.sessions[handle]

    def session_sealed(self, session: int) -> None:
        self._session(session)

    def session_end(self, session: int, detail: int) -> None:
        self._session(session).state = "ending"
        self.tell(EventType.SESSION_QUIET, session)

    def session_ends_without_rest(self, session: int, detail: int) -> None:
        """In the place of session_end: jobs do not come to rest before a test says so."""
        self._session(session).state = "ending"

    async def session_close(self, session: int) -> None:
        await asyncio.sleep(0)
        if self._session(session).state != "ending":
            raise PlaneError(errno.EBUSY, "not quiet")
        os.close(self.sessions.pop(session).watch_fd)

    def session_name_space(self, session: int) -> int:
        return self._session(session).name_space

    def session_stat(self, session: int) -> SessionStat:
        self._session(session)
        return SessionStat(0, 0, 0, 0, 0)

    def session_watch_fd(self, session: int) -> int:
        return self._session(session).watch_fd

    def jobs(self, session: int, limit: int) -> list[JobInfo]:
        return []

    # ---- counters ----

    def counters_add(self, session: int, first: int, count: int) -> list[int]:
        counters = self._session(session).counters
        wanted = range(first, first + count)
        if len(counters) + sum(i not in counters for i in wanted) > (
            self._session(session).options.counter_count
        ):
            raise PlaneError(errno.ENOSPC, "no counters left")
        for imm in wanted:
            counters.setdefault(imm, [0, 0, 0, 0])
        return [list(counters).index(imm) for imm in wanted]

    def counter_slot(self, session: int, imm: int) -> int:
        counters = self._session(session).counters
        if imm not in counters:
            raise PlaneError(errno.ENOENT, "no counter")
        return list(counters).index(imm)

    def counters_fault(
        self, session: int, first: int, count: int, lost: int, units: int = 0, peer: int = 0
    ) -> None:
        counters = self._session(session).counters
        for imm in range(first, first + count):
            if imm in counters:
                counters[imm][1] += 1
                counters[imm][2] += lost
        os.eventfd_write(self._session(session).watch_fd, 1)

    def counters_settle(self, peer: int) -> None:
        self.settled.append(peer)

    def count(self, session: int, imm: int) -> None:
        """A write has landed."""
        self._session(session).counters[imm][0] += 1
        os.eventfd_write(self._session(session).watch_fd, 1)

    def counter_read(self, session: int, imm: int) -> CounterState:
        if imm not in self._session(session).counters:
            raise PlaneError(errno.ENOENT, "no counter")
        return CounterState(*self._session(session).counters[imm])

    # ---- regions ----

    async def region_add(
        self,
        session: int,
        fd: int,
        offset: int,
        length: int,
        *,
        writable: bool,
        address: int = 0,
        memory: int = 0,
    ) -> int:
        await asyncio.sleep(0)
        handle = next(self._handles)
        self._session(session).regions.add(handle)
        if address and fd < 0:
            self.unreached.add(handle)
        return handle

    def dmabuf_size(self, fd: int) -> int:
        """A memfd whose name says so is as good as a dma-buf."""
        if not os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:dmabuf"):
            raise PlaneError(errno.EINVAL, "no dma-buf")
        return os.fstat(fd).st_size

    async def region_remove(self, session: int, region: int) -> None:
        await asyncio.sleep(0)
        self._session(session).regions.remove(region)

    def region_keys(self, session: int, region: int) -> list[RegionKey]:
        if region not in self._session(session).regions:
            raise PlaneError(errno.ENOENT, "no such region")
        return [
            RegionKey(region * 100 + i, 0x1000)
            if region not in self.unreached or is_staged(rail.protocol)
            else RegionKey(0, 0)
            for i, rail in enumerate(self.rails)
        ]

    # ---- connections ----

    def rail_becomes(self, number: int, state: RailState) -> None:
        """A port loses its link, or gets it again; a device is removed. Connections break apart."""
        self.rails[number] = replace(self.rails[number], state=state)

    async def conn_open(self, rail: int, peer: int, *, outgoing: bool) -> tuple[int, bytes]:
        await asyncio.sleep(0)
        if self.rails[rail].state is not RailState.UP:
            number = errno.ENETDOWN if self.rails[rail].state is RailState.DOWN else errno.ENODEV
            raise PlaneError(number, f"rail {self.rails[rail].name} is not up")
        if rail in self.full:
            raise PlaneError(errno.ENOSPC, "no slot is left: raise gpu.staging_bytes")
        conn = next(self._handles)
        self.conns[conn] = outgoing
        self.rail_of[conn] = rail
        return conn, b"address of %d" % conn

    async def conn_start(self, conn: int, address: bytes) -> None:
        await asyncio.sleep(0)
        if conn not in self.conns:
            raise PlaneError(errno.ENOENT, "the connection was closed")

    async def conn_close(
        self, conn: int, detail: int, far_landed: Landed | None = None
    ) -> Landed | None:
        await asyncio.sleep(0)
        if self.conns.pop(conn, None) is not None:
            self.closed[conn] = detail
            self.far_landed[conn] = far_landed
        return self.landed

    # ---- opens ----

    def open_add(self, session: int, options: OpenOptions) -> int:
        for path in options.paths:
            if not self.conns.get(path.conn):
                raise PlaneError(errno.ENOENT, "no such outgoing connection")
        handle = next(self._handles)
        self._session(session).opens[handle] = FakeOpen(options)
        return handle

    def conn_probe(self, conn: int) -> None:
        if not self.conns.get(conn):
            raise PlaneError(errno.ENOENT, "no such outgoing connection")
        if self.rail_of[conn] not in self.mute:
            self.tell(EventType.CONN_PROVEN, conn)

    def open_path_set(self, session: int, open_handle: int, slot: int, path: OpenPath) -> None:
        opens = self._session(session).opens
        if open_handle not in opens:
            raise PlaneError(errno.ENOENT, "no such open")
        if not self.conns.get(path.conn):
            raise PlaneError(errno.ENOTCONN, "no such outgoing connection")
        paths = list(opens[open_handle].options.paths)
        if slot > len(paths):
            raise PlaneError(errno.EINVAL, "no such path")
        if slot < len(paths) and paths[slot].conn in self.conns:
            raise PlaneError(errno.EBUSY, "the path's connection is not closed")
        paths[slot : slot + 1] = [path]
        opens[open_handle].options = replace(opens[open_handle].options, paths=tuple(paths))

    def open_revoke(self, session: int, open_handle: int, detail: int) -> None:
        opens = self._session(session).opens
        if open_handle not in opens:
            raise PlaneError(errno.ENOENT, "no such open")
        opens[open_handle].refused = Detail(detail)
        if open_handle not in self.busy_opens:
            self.tell(EventType.OPEN_QUIET, open_handle, session=session)

    def make_quiet(self, session: int, open_handle: int) -> None:
        """The last byte of a busy open has landed."""
        self.busy_opens.discard(open_handle)
        self.tell(EventType.OPEN_QUIET, open_handle, session=session)

    def open_fence(
        self, session: int, open_handle: int, imms: Sequence[range], number: int
    ) -> None:
        opens = self._session(session).opens
        if open_handle not in opens:
            raise PlaneError(errno.ENOENT, "no such open")
        opens[open_handle].fences[number] = tuple(imms)
        if open_handle not in self.busy_opens:
            self.fence_quiet(session, open_handle, number)

    def fence_quiet(self, session: int, open_handle: int, number: int, detail: int = 0) -> None:
        """The last job of a fence is quiet."""
        self.tell(EventType.FENCE_QUIET, open_handle, session=session, count=number, detail=detail)

    def open_remove(self, session: int, open_handle: int) -> None:
        del self._session(session).opens[open_handle]

    # ---- mailboxes ----

    def mailbox_add(self, session: int, region: int, slots: int, slot_bytes: int) -> MailboxInfo:
        if region not in self._session(session).regions:
            raise PlaneError(errno.ENOENT, "no such region")
        number = next(self._handles)
        self._session(session).mailboxes[number] = []
        return MailboxInfo(number, 0, 0)

    def mailbox_remove(self, session: int, mailbox: int) -> None:
        if self._session(session).mailboxes.pop(mailbox, None) is None:
            raise PlaneError(errno.ENOENT, "no such mailbox")
        os.eventfd_write(self._session(session).watch_fd, 1)

    def mailbox_take(self, session: int, mailbox: int) -> bytes | None:
        messages = self._session(session).mailboxes[mailbox]
        return messages.pop(0) if messages else None

    def arrive(self, session: int, mailbox: int, message: bytes) -> None:
        """A message has come."""
        self._session(session).mailboxes[mailbox].append(message)
        os.eventfd_write(self._session(session).watch_fd, 1)

    # ---- jobs ----

    def submit(
        self, session: int, entries: Sequence[Entry], tables: bytes | bytearray = b""
    ) -> list[int]:
        ids = []
        for entry in entries:
            job_id = next(self._handles)
            end = JobEnd(job_id, STATUS_OK, 0, entry.length, 1, 2, 0x101)
            self._session(session).ends[job_id] = end
            ids.append(job_id)
        return ids

    def job_result(self, session: int, job_id: int) -> JobEnd | None:
        ends = self._session(session).ends
        if job_id not in ends:
            raise PlaneError(errno.ENOENT, "no such job")
        return ends[job_id]

    # ---- heartbeats and words ----

    def heartbeat_open(self, address: str, port: int, interval_ms: int, timeout_ms: int) -> None:
        """Nothing beats here."""

    def peer_watch(self, address: str, port: int, send: bytes, receive: bytes) -> int:
        watch = next(self._handles)
        self.watches[watch] = (send, receive)
        return watch

    def peer_unwatch(self, peer: int) -> None:
        self.watches.pop(peer, None)

    def detail_name(self, detail: int) -> str:
        return Detail(detail).name

    def detail_text(self, detail: int) -> str:
        return self.detail_name(detail).lower()

    def status_name(self, status: int) -> str:
        return str(status)

    async def aclose(self) -> None:
        """Nothing runs."""
