# SPDX-License-Identifier: Apache-2.0
"""The data plane behind cffi: the typed face of core.h.

The only daemon module that imports transferd.native.

Calls that may take long (registration, connections, freeing) run on one small executor. They are
never abandoned: a coroutine that is cancelled in the middle waits for the thread to come back, so
that no handle is lost between the two. The others hand a command to the worker and return in
microseconds.
"""

from __future__ import annotations

import asyncio
import errno
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from transferd.daemon.plane import (
    CounterState,
    Event,
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
from transferd.daemon.stagecalls import StageCalls
from transferd.native.daemon_half import ffi, lib
from transferd.native.entry import ENTRY

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transferd.daemon.plane import Entry, Landed, VerbsOptions

T = TypeVar("T")

THREADS = 4  # registrations and connections in parallel; each waits, none computes
EVENT_BATCH = 256
JOBS_MAX = 65_536
ENTRY_BATCH = 4096  # the most jobs of one Submit
ENTRY_BYTES = ffi.sizeof("struct tfd_entry")
MESSAGE_BYTES = int(lib.TFD_MESSAGE_BYTES_MAX)


def _text(field: Any) -> str:
    """Reads a NUL-terminated char array."""
    return bytes(ffi.string(field)).decode("utf-8", "replace")


def _fill(field: Any, text: str, what: str) -> None:
    """Writes text into a char array; too long is refused."""
    raw = text.encode()
    if len(raw) >= len(field):
        raise PlaneError(
            errno.ENAMETOOLONG, f"{what} {text!r} is longer than {len(field) - 1} bytes"
        )
    ffi.memmove(field, raw + b"\0", len(raw) + 1)


def _check(rc: int, what: str, error: Any = None) -> None:
    """Raises PlaneError for -errno, with the native sentence where there is one."""
    if rc >= 0:
        return
    text = _text(error.text) if error is not None else ""
    raise PlaneError(-rc, text or f"{what}: {os.strerror(-rc)}")


def fill_verbs(native: Any, options: VerbsOptions) -> None:
    """Writes a struct tfd_verbs_options."""
    native.port = options.port
    native.gid_given = options.gid_index is not None
    native.gid_index = options.gid_index or 0
    native.link_local = options.link_local
    native.pkey = options.pkey
    native.service_level = options.service_level
    native.bulk_service_level = options.bulk_service_level
    native.traffic_class = options.traffic_class
    native.mtu = options.mtu
    native.timeout = options.timeout
    native.retries = options.retries
    native.plain_posts = options.plain_posts


class DataPlane(StageCalls):
    """One native core. Made by :meth:`open`, ended by :meth:`aclose`."""

    _ffi, _lib, _check = ffi, lib, staticmethod(_check)

    def __init__(self, core: Any) -> None:
        self._core = core
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="control")
        self._handler: Callable[[Event], None] | None = None
        self._events = ffi.new("struct tfd_event[]", EVENT_BATCH)
        self._group = 0
        self._closed = False
        self._entries = ffi.new("struct tfd_entry[]", ENTRY_BATCH)
        self._message = ffi.new("uint8_t[]", MESSAGE_BYTES)  # one thread, no await while in use
        self.rails: list[RailInfo] = []
        self.warnings: list[str] = []

    @classmethod
    def open(
        cls,
        *,
        daemon_id: bytes,
        boot_epoch: bytes,
        spin_us: int,
        busy: bool,
        max_sessions: int,
        copy_s: float = 0.5,
    ) -> DataPlane:
        """Starts a core.

        Args:
            daemon_id: 16 bytes.
            boot_epoch: 16 bytes.
            spin_us: How long an idle worker polls before it sleeps.
            busy: Workers never sleep.
            max_sessions: At most 511.
            copy_s: How long what has failed waits for its client's stream.

        Returns:
            The running core.

        Raises:
            PlaneError: It could not start.
        """
        options = ffi.new("struct tfd_core_options *")
        ffi.memmove(options.daemon_id, daemon_id, 16)
        ffi.memmove(options.boot_epoch, boot_epoch, 16)
        options.spin_us = spin_us
        options.busy = busy
        options.max_sessions = max_sessions
        options.copy_ns = int(copy_s * 1e9)
        out = ffi.new("struct tfd_core **")
        error = ffi.new("struct tfd_error *")
        _check(lib.tfd_core_open(options, out, error), "starting the data plane", error)
        return cls(out[0])

    # ---- running ----

    async def _run(self, call: Callable[[], T]) -> T:
        """Runs a blocking call to its end on the executor, also when the caller is cancelled."""
        future = asyncio.get_running_loop().run_in_executor(self._executor, call)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            # The thread owns native memory of ours; come back only when it has.
            while not future.done():
                await asyncio.wait([future])
            raise

    def set_handler(self, handler: Callable[[Event], None]) -> None:
        """Tells who gets the events; called from the running event loop."""
        self._handler = handler
        fd = lib.tfd_core_event_fd(self._core)
        asyncio.get_running_loop().add_reader(fd, self._drain)

    def _drain(self) -> None:
        """Hands one batch of events on; the fd stays readable while there are more."""
        count = lib.tfd_core_events(self._core, self._events, EVENT_BATCH)
        handler = self._handler
        for i in range(count):
            event = self._events[i]
            if handler is not None:
                handler(
                    Event(
                        event.type,
                        event.detail,
                        event.id,
                        event.imm,
                        event.count,
                        event.session,
                        event.units,
                    )
                )

    async def aclose(self) -> None:
        """Stops all threads and frees everything; idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._handler is not None:
            asyncio.get_running_loop().remove_reader(lib.tfd_core_event_fd(self._core))
        await self._run(lambda: lib.tfd_core_close(self._core))
        self._core = ffi.NULL
        self._executor.shutdown()

    # ---- rails ----

    async def open_group(self, options: GroupOptions) -> int:
        """Opens the domain group that sessions use from now on."""
        native = ffi.new("struct tfd_group_options *")
        _fill(native.provider, options.provider, "provider")
        _fill(native.fabric, options.fabric, "fabric")
        _fill(native.library, options.library, "path of the library")
        for i, rail in enumerate(options.rails):
            _fill(native.rails[i], rail, "rail")
        native.rail_count = len(options.rails)
        native.with_local = options.with_local
        native.segment_bytes = options.segment_bytes
        native.window_bytes = options.window_bytes
        native.copy_threads = options.copy_threads
        native.staging_bytes = options.staging_bytes
        fill_verbs(native.verbs, options.verbs)
        group = ffi.new("uint32_t *")
        error = ffi.new("struct tfd_error *")
        rc = await self._run(lambda: lib.tfd_group_open(self._core, native, group, error))
        _check(rc, "opening the NICs", error)
        self._group = group[0]
        self.rails = self.rail_stats()
        return self._group

    def rail_stats(self) -> list[RailInfo]:
        """Reads the rails of the group with their counts."""
        count = ffi.new("uint32_t *")
        _check(lib.tfd_group_rail_count(self._core, self._group, count), "counting rails")
        info = ffi.new("struct tfd_rail_info *")
        rails = []
        for i in range(count[0]):
            _check(lib.tfd_group_rail(self._core, self._group, i, info), "reading a rail")
            rails.append(
                RailInfo(
                    name=_text(info.name),
                    provider=_text(info.provider),
                    protocol=_text(info.protocol),
                    max_message_bytes=info.max_message_bytes,
                    bytes_sent=info.bytes_sent,
                    writes_sent=info.writes_sent,
                    imms_received=info.imms_received,
                    errors=info.errors,
                    ordered=info.ordered != 0,
                    state=RailState(info.state),
                    credit_stalls=info.credit_stalls,
                    credit_floods=info.credit_floods,
                    why=_text(info.why),
                )
            )
        return rails

    # ---- sessions ----

    async def session_open(self, options: SessionOptions) -> tuple[int, SessionFds]:
        """Makes a session; the fds are the caller's to close."""
        native = ffi.new("struct tfd_session_options *")
        native.group = options.group
        native.ring_entries = options.ring_entries
        native.record_count = options.record_count
        native.counter_count = options.counter_count
        native.watcher_count = options.watcher_count
        native.plan_count = options.plan_count
        native.arena_bytes = options.arena_bytes
        native.session_id = options.session_id
        native.weight = options.weight
        handle = ffi.new("uint64_t *")
        fds = ffi.new("struct tfd_session_fds *")
        error = ffi.new("struct tfd_error *")
        rc = await self._run(lambda: lib.tfd_session_open(self._core, native, handle, fds, error))
        _check(rc, "opening a session", error)
        return handle[0], SessionFds(fds.segment_fd, fds.doorbell_fd, fds.event_fd)

    def session_sealed(self, session: int) -> None:
        """The client has mapped the segment."""
        _check(lib.tfd_session_sealed(self._core, session), "sealing a segment")

    def session_end(self, session: int, detail: int) -> None:
        """Stops a session; SESSION_QUIET follows."""
        _check(lib.tfd_session_end(self._core, session, detail), "ending a session")

    async def session_close(self, session: int) -> None:
        """Frees a quiet session."""
        rc = await self._run(lambda: lib.tfd_session_close(self._core, session))
        _check(rc, "closing a session")

    def session_name_space(self, session: int) -> int:
        """Its name space on the wire."""
        out = ffi.new("uint32_t *")
        _check(lib.tfd_session_name_space(self._core, session, out), "reading a name space")
        return int(out[0])

    def session_stat(self, session: int) -> SessionStat:
        """Its counts."""
        out = ffi.new("struct tfd_session_info *")
        _check(lib.tfd_session_stat(self._core, session, out), "reading a session")
        return SessionStat(
            out.jobs_ended, out.jobs_failed, out.jobs_in_flight, out.bytes_sent, out.imms_received
        )

    def session_watch_fd(self, session: int) -> int:
        """The eventfd that tells of ended jobs and counts; the core's."""
        fd = lib.tfd_session_watch_fd(self._core, session)
        _check(fd, "watching a session")
        return int(fd)

    def jobs(self, session: int, limit: int) -> list[JobInfo]:
        """Jobs in flight of a session, at most `limit`."""
        limit = min(limit, JOBS_MAX)
        array = ffi.new("struct tfd_job_info[]", limit)
        count = ffi.new("uint32_t *")
        _check(lib.tfd_jobs_list(self._core, session, array, limit, count), "listing jobs")
        return [
            JobInfo(
                session=job.session,
                job_id=job.job_id,
                open=job.open,
                length=job.length,
                acknowledged=job.acknowledged,
                age_ns=job.age_ns,
                op=job.op,
                imm=job.imm,
                status=job.status,
                priority=job.priority,
            )
            for job in (array[i] for i in range(count[0]))
        ]

    # ---- counters ----

    def counters_add(self, session: int, first: int, count: int) -> list[int]:
        """Gives counters to immediates; returns their slots."""
        slots = ffi.new("uint32_t[]", max(count, 1))
        rc = lib.tfd_counters_add(self._core, session, first, count, slots)
        _check(rc, "adding counters")
        return list(slots[0:count])

    def counter_slot(self, session: int, imm: int) -> int:
        """The slot of an immediate's counter; ENOENT if it has none."""
        slot = ffi.new("uint32_t *")
        _check(lib.tfd_counter_slot(self._core, session, imm, slot), "finding a counter")
        return int(slot[0])

    def counters_fault(
        self, session: int, first: int, count: int, lost: int, units: int = 0, peer: int = 0
    ) -> None:
        """Faults counters; `units` eighths that `peer` has landed are taken out of the sum."""
        rc = lib.tfd_counters_fault(self._core, session, first, count, lost, units, peer)
        _check(rc, "faulting counters")

    def counters_settle(self, peer: int) -> None:
        """Takes parts of writes that a lost peer has not completed out of all counts."""
        _check(lib.tfd_counters_settle(self._core, peer), "settling counters")

    def counter_read(self, session: int, imm: int) -> CounterState:
        """Reads a counter."""
        out = ffi.new("struct tfd_counter_state *")
        _check(lib.tfd_counter_read(self._core, session, imm, out), "reading a counter")
        return CounterState(out.value, out.faults, out.lost, out.acknowledged)

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
        """Registers memory; `fd` stays the caller's. `address` not 0: a device's, -1: no fd."""
        native = ffi.new("struct tfd_region_options *")
        native.fd = fd
        native.writable = writable
        native.offset = offset
        native.length = length
        native.address = address
        native.device = address != 0
        native.memory, native.memory_offset = memory, offset
        region = ffi.new("uint64_t *")
        error = ffi.new("struct tfd_error *")
        rc = await self._run(lambda: lib.tfd_region_add(self._core, session, native, region, error))
        _check(rc, "registering memory", error)
        return int(region[0])

    async def region_remove(self, session: int, region: int) -> None:
        """Deregisters memory; EBUSY while its session's jobs read it."""
        rc = await self._run(lambda: lib.tfd_region_remove(self._core, session, region))
        _check(rc, "deregistering memory")

    def dmabuf_size(self, fd: int) -> int:
        """Tells the size of a dma-buf; PlaneError: the fd is none."""
        size = ffi.new("uint64_t *")
        _check(lib.tfd_dmabuf_size(fd, size), "looking at a dma-buf")
        return int(size[0])

    def region_keys(self, session: int, region: int) -> list[RegionKey]:
        """One key for each rail."""
        count = len(self.rails)
        keys = ffi.new("struct tfd_region_key[]", count)
        _check(lib.tfd_region_keys(self._core, session, region, keys, count), "reading keys")
        return [RegionKey(keys[i].key, keys[i].address) for i in range(count)]

    # ---- connections ----

    async def conn_open(self, rail: int, peer: int, *, outgoing: bool) -> tuple[int, bytes]:
        """Makes half a connection."""
        conn = ffi.new("uint64_t *")
        address = ffi.new("uint8_t[]", lib.TFD_ADDRESS_MAX)
        size = ffi.new("size_t *", lib.TFD_ADDRESS_MAX)
        error = ffi.new("struct tfd_error *")
        rc = await self._run(
            lambda: lib.tfd_conn_open(
                self._core, self._group, rail, outgoing, peer, conn, address, size, error
            )
        )
        _check(rc, "opening a connection", error)
        return int(conn[0]), bytes(ffi.buffer(address, size[0]))

    async def conn_start(self, conn: int, address: bytes) -> None:
        """Joins it to the other half."""
        error = ffi.new("struct tfd_error *")
        rc = await self._run(
            lambda: lib.tfd_conn_start(self._core, conn, address, len(address), error)
        )
        _check(rc, "starting a connection", error)

    async def conn_close(
        self, conn: int, detail: int, far_landed: Landed | None = None
    ) -> Landed | None:
        """Destroys it; nothing of it is in flight afterwards. No error if it is gone."""
        landed = ffi.new("struct tfd_landed *")
        far = ffi.NULL
        if far_landed is not None:
            far = ffi.new("struct tfd_landed *")
            far.channels = len(far_landed)
            far.imms[0 : far.channels] = far_landed
        rc = await self._close(lambda: lib.tfd_conn_close(self._core, conn, detail, far, landed))
        if rc != -errno.ENOENT:
            _check(rc, "closing a connection")
        return tuple(landed.imms[0 : landed.channels]) or None

    # ---- opens ----

    def open_add(self, session: int, options: OpenOptions) -> int:
        """Lets a session use a grant."""
        native = ffi.new("struct tfd_open_options *")
        for i, path in enumerate(options.paths):
            native.paths[i].conn = path.conn
            native.paths[i].key = path.key
            native.paths[i].address = path.address
        native.path_count = len(options.paths)
        native.rights = options.rights
        native.length = options.length
        native.imm_first = options.imm_first
        native.imm_count = options.imm_count
        native.name_space = options.name_space
        native.expires_ns = options.expires_ns
        native.device, native.unreached = options.device, options.unreached
        out = ffi.new("uint64_t *")
        _check(lib.tfd_open_add(self._core, session, native, out), "opening a grant")
        return int(out[0])

    def conn_probe(self, conn: int) -> None:
        """Has the far side answer by a new connection; CONN_PROVEN or CONN_LOST follows."""
        _check(lib.tfd_conn_probe(self._core, conn), "probing a connection")

    def open_path_set(self, session: int, open_handle: int, slot: int, path: OpenPath) -> None:
        """Gives an open a path: in place of one whose connection is closed, or one more."""
        native = ffi.new("struct tfd_open_path *")
        native.conn, native.key, native.address = path.conn, path.key, path.address
        rc = lib.tfd_open_path_set(self._core, session, open_handle, slot, native)
        _check(rc, "giving an open a path")

    def open_revoke(self, session: int, open_handle: int, detail: int) -> None:
        """Stops it; OPEN_QUIET follows."""
        rc = lib.tfd_open_revoke(self._core, session, open_handle, detail)
        _check(rc, "revoking an open")

    def open_fence(
        self, session: int, open_handle: int, imms: Sequence[range], number: int
    ) -> None:
        """Stops what was submitted on these imms; FENCE_QUIET follows."""
        count = len(imms)
        ranges = ffi.new("struct tfd_imm_range[]", count)
        for i, part in enumerate(imms):
            ranges[i].first, ranges[i].count = part.start, len(part)
        rc = lib.tfd_open_fence(self._core, session, open_handle, ranges, count, number)
        _check(rc, "fencing an open")

    def open_remove(self, session: int, open_handle: int) -> None:
        """Forgets a quiet one."""
        _check(lib.tfd_open_remove(self._core, session, open_handle), "forgetting an open")

    # ---- mailboxes ----

    def mailbox_add(self, session: int, region: int, slots: int, slot_bytes: int) -> MailboxInfo:
        """Makes a mailbox at the beginning of a region."""
        native = ffi.new("struct tfd_mailbox_options *")
        native.region = region
        native.slots = slots
        native.slot_bytes = slot_bytes
        out = ffi.new("struct tfd_mailbox_info *")
        error = ffi.new("struct tfd_error *")
        rc = lib.tfd_mailbox_add(self._core, session, native, out, error)
        _check(rc, "making a mailbox", error)
        return MailboxInfo(out.mailbox, out.counter, out.first)

    def mailbox_remove(self, session: int, mailbox: int) -> None:
        """Ends it; ENOENT if it is gone."""
        _check(lib.tfd_mailbox_remove(self._core, session, mailbox), "ending a mailbox")

    def mailbox_take(self, session: int, mailbox: int) -> bytes | None:
        """Takes the oldest message; None: there is none; ENOENT: no such mailbox."""
        size = ffi.new("size_t *", MESSAGE_BYTES)
        rc = lib.tfd_mailbox_take(self._core, session, mailbox, self._message, size)
        if rc == -errno.EAGAIN:
            return None
        _check(rc, "receiving")
        return bytes(ffi.buffer(self._message, size[0]))

    # ---- jobs by gRPC ----

    def submit(
        self, session: int, entries: Sequence[Entry], tables: bytes | bytearray = b""
    ) -> list[int]:
        """Submits jobs, all or none, in one native call.

        Raises:
            PlaneError: EAGAIN: the ring is full.
        """
        array = self._entries  # one thread, no await between filling and submitting
        count = len(entries)
        size = ENTRY_BYTES * count
        buffer = ffi.buffer(array, size)
        for i, entry in enumerate(entries):
            ENTRY.pack_into(
                buffer, i * ENTRY_BYTES,
                entry.op, entry.flags, entry.priority, 0, 0, 0,
                entry.src_region, entry.src_offset, entry.dst_grant, entry.dst_offset,
                entry.length, entry.imm, 0, entry.deadline_ns, entry.argument,
                entry.table_offset, entry.table_count, 0, entry.src_stride, entry.dst_stride, 0,
            )  # fmt: skip
        data = ffi.from_buffer(tables) if tables else ffi.NULL
        rc = lib.tfd_jobs_submit(self._core, session, array, count, data, len(tables))
        _check(rc, "submitting jobs")
        return [array[i].job_id for i in range(count)]

    def job_result(self, session: int, job_id: int) -> JobEnd | None:
        """How a job ended; None while it runs; ENOENT if unknown."""
        out = ffi.new("struct tfd_job_end *")
        rc = lib.tfd_job_result(self._core, session, job_id, out)
        if rc == -errno.EAGAIN:
            return None
        _check(rc, "reading a job")
        return JobEnd(
            out.job_id, out.status, out.detail, out.bytes, out.accepted_ns, out.ended_ns, out.path
        )

    # ---- heartbeats ----

    def heartbeat_open(self, address: str, port: int, interval_ms: int, timeout_ms: int) -> None:
        """Starts the heartbeat thread on a UDP port."""
        native = ffi.new("struct tfd_heartbeat_options *")
        _fill(native.address, address, "heartbeat address")
        native.port = port
        native.interval_ms = interval_ms
        native.timeout_ms = timeout_ms
        error = ffi.new("struct tfd_error *")
        _check(lib.tfd_heartbeat_open(self._core, native, error), "starting heartbeats", error)

    def peer_watch(self, address: str, port: int, send: bytes, receive: bytes) -> int:
        """Starts heartbeats with a peer."""
        peer = ffi.new("uint64_t *")
        error = ffi.new("struct tfd_error *")
        rc = lib.tfd_peer_watch(self._core, address.encode(), port, send, receive, peer, error)
        _check(rc, "watching a peer", error)
        return int(peer[0])

    def peer_unwatch(self, peer: int) -> None:
        """Stops them. No error if they are stopped."""
        rc = lib.tfd_peer_unwatch(self._core, peer)
        if rc != -errno.ENOENT:
            _check(rc, "unwatching a peer")

    # ---- words ----

    def detail_name(self, detail: int) -> str:
        """UPPER_SNAKE word of a detail."""
        return _text(lib.tfd_detail_name(detail))

    def detail_text(self, detail: int) -> str:
        """One sentence for a detail."""
        return _text(lib.tfd_detail_text(detail))

    def status_name(self, status: int) -> str:
        """UPPER_SNAKE word of a job's status."""
        return _text(lib.tfd_job_status_name(status))
