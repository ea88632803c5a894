# SPDX-License-Identifier: Apache-2.0
"""A daemon inside the test's own process, for tests of the SDK alone.

Its sessions write to themselves: every descriptor is a grant of the same session, and a write is a
copy between two mappings. Tests make it misbehave: hold jobs back, fault counters, end sessions,
vanish.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import secrets
import socket
import struct
import threading
import time
from concurrent import futures
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from transferd.native.client_half import ffi, lib
from transferd.native.names import Detail, JobStatus
from transferd.v1 import (
    attach_pb2,
    region_pb2,
    region_pb2_grpc,
    transfer_pb2,
    transfer_pb2_grpc,
)

from support.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

HEADER_BYTES = ffi.sizeof("struct tfd_segment_header")
RING_BYTES = ffi.sizeof("struct tfd_ring")
ENTRY_BYTES = ffi.sizeof("struct tfd_entry")
WATCHER_BYTES = ffi.sizeof("struct tfd_watcher")
WATCHERS = 4
RECORD_BYTES = ffi.sizeof("struct tfd_record")
COUNTER_BYTES = ffi.sizeof("struct tfd_counter")
ARENA_BYTES = 4096

_libc = ctypes.CDLL(None, use_errno=True)
SYS_FUTEX = 202
FUTEX_WAKE = 1


@dataclass
class Grant:
    """A grant of the fake."""

    region: int
    offset: int
    length: int
    handle: int = 0
    revoked: bool = False


@dataclass
class Held:
    """A job that is not ended yet: its entry, copied."""

    record: int
    job_id: int
    imm: int
    length: int


@dataclass
class FakeSession:
    """One attached client."""

    number: int
    token: str
    sock: socket.socket
    entries: int
    records: int
    counters: int
    base: mmap.mmap = field(init=False)
    memory: dict[int, int] = field(default_factory=dict)
    regions: dict[int, mmap.mmap] = field(default_factory=dict)
    slots: dict[int, int] = field(default_factory=dict)
    handles: dict[int, bytes] = field(default_factory=dict)
    held: list[Held] = field(default_factory=list)
    detached: bool = False

    def lay_out(self) -> tuple[int, int, int]:
        """Makes segment, doorbell and events fd."""
        ring_bytes = RING_BYTES + self.entries * ENTRY_BYTES
        at = HEADER_BYTES + ring_bytes
        self.record_at = at
        at += self.records * RECORD_BYTES
        self.counter_at = at
        at += self.counters * COUNTER_BYTES
        self.watcher_at = at
        at += WATCHERS * WATCHER_BYTES
        size = at + ARENA_BYTES
        self.segment_fd = os.memfd_create("fake", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.segment_fd, size)
        fcntl.fcntl(self.segment_fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self.base = mmap.mmap(self.segment_fd, size)
        self._buffer = ffi.from_buffer(self.base, require_writable=True)
        h = ffi.cast("struct tfd_segment_header *", self._buffer)
        h.magic, h.abi_version, h.header_bytes = (
            lib.TFD_ABI_MAGIC,
            lib.TFD_ABI_VERSION,
            HEADER_BYTES,
        )
        h.segment_bytes, h.session_id, h.ring_count = size, self.number, 1
        h.ring_entries, h.record_count, h.counter_count = self.entries, self.records, self.counters
        h.ring_offset, h.ring_stride = HEADER_BYTES, ring_bytes
        h.record_offset, h.counter_offset = self.record_at, self.counter_at
        h.watcher_offset, h.watcher_count = self.watcher_at, WATCHERS
        h.arena_offset, h.arena_bytes, h.state = at, ARENA_BYTES, lib.TFD_SESSION_OPEN
        h.provider = b"fake"
        self.header = h
        self.ring = ffi.cast("struct tfd_ring *", self._buffer + HEADER_BYTES)
        self.entry = ffi.cast("struct tfd_entry *", self._buffer + HEADER_BYTES + RING_BYTES)
        self.record = ffi.cast("struct tfd_record *", self._buffer + self.record_at)
        self.counter = ffi.cast("struct tfd_counter *", self._buffer + self.counter_at)
        self.doorbell = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.event = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        return self.segment_fd, self.doorbell[1], self.event[0]

    def slot(self, imm: int) -> int:
        """Gives an immediate its counter."""
        slot = self.slots.setdefault(imm, len(self.slots))
        self.counter[slot].imm, self.counter[slot].in_use = imm, 1
        return slot

    def tell(self, word: Any, line: Any) -> None:
        """Wakes those who wait for a record or counter."""
        if line.waiters:
            line.event = (line.event + 1) & 0xFFFFFFFF
            address = int(ffi.cast("uintptr_t", ffi.addressof(line, "event")))
            _libc.syscall(SYS_FUTEX, ctypes.c_void_p(address), FUTEX_WAKE, 1 << 30, None, None, 0)
        if self.header.event_waiters:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                os.write(self.event[1], b"x")

    def count(self, imm: int) -> None:
        """Counts 1."""
        if imm in self.slots:
            counter = self.counter[self.slots[imm]]
            counter.value += 1
            self.tell(None, counter)

    def fault(self, imm: int, lost: int) -> None:
        """Faults a counter."""
        counter = self.counter[self.slots[imm]]
        counter.lost += lost
        counter.faults += 1
        self.tell(None, counter)

    def finish(self, job: Held, status: JobStatus, detail: Detail = Detail.NONE) -> None:
        """Ends a job."""
        record = self.record[job.record]
        record.status, record.detail = int(status), int(detail)
        record.bytes = job.length if status is JobStatus.OK else 0
        record.accepted_ns = record.posted_ns = record.ended_ns = time.monotonic_ns()
        record.path = lib.TFD_PATH_LIBFABRIC | 1 << lib.TFD_PATH_RAILS_SHIFT
        record.done_id = job.job_id
        self.tell(None, record)


class FakeDaemon(region_pb2_grpc.RegionServiceServicer, transfer_pb2_grpc.TransferServiceServicer):
    """The fake.

    ``hold``: immediates whose jobs are kept back; ``refuse``: ends by immediate; ``reopened``:
    handles that the next opens answer with; ``entries_taken``: a copy of each, by job.
    """

    def __init__(self, directory: Path, entries: int = 16, records: int = 32) -> None:
        self.path = str(directory / "fake.sock")
        self.address = f"unix://{self.path}"
        self.entries, self.records, self.counters = entries, records, 64
        self.hold: set[int] = set()
        self.refuse: dict[int, tuple[JobStatus, Detail]] = {}
        self.sessions: list[FakeSession] = []
        self.grants: dict[bytes, Grant] = {}
        self.opened = 0
        self.closed_handles: list[int] = []
        self.reopened: dict[bytes, int] = {}
        self.entries_taken: dict[int, Any] = {}
        self.calls: list[str] = []
        self.fenced: list[list[tuple[int, int]]] = []
        self.fence_ends: dict[int, str] = {}  # reasons, by grant
        self._next = 100
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(self.path + ".fd")
        self._listener.listen()
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        region_pb2_grpc.add_RegionServiceServicer_to_server(self, self._server)
        transfer_pb2_grpc.add_TransferServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(self.address)
        self._server.start()
        self._spawn(self._accept)

    def _spawn(self, target: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments)
        thread.start()
        self._threads.append(thread)

    # ---- fd socket ----

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while not self._stop.is_set():
                sock, _ = self._listener.accept()
                self._spawn(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        session: FakeSession | None = None
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(sock, 65536, 4)
            except OSError:
                break
            if not data:
                break
            request = attach_pb2.FdRequest.FromString(data)
            response = attach_pb2.FdResponse(request_id=request.request_id)
            send: list[int] = []
            match request.WhichOneof("body"):
                case "attach":
                    if request.attach.name == "refused":
                        response.error.reason, response.error.message = "ACCESS_DENIED", "not you"
                    else:
                        session = FakeSession(
                            len(self.sessions) + 1, secrets.token_hex(32), sock, self.entries,
                            self.records, self.counters,
                        )  # fmt: skip
                        send = list(session.lay_out())
                        response.attach.session_id = session.number
                        response.attach.token = bytes.fromhex(session.token)
                        self.sessions.append(session)
                        self._spawn(self._work, session)
                case "mapped":
                    response.mapped.SetInParent()
                case "share_memory":
                    assert session is not None
                    self._next += 1
                    session.memory[self._next] = fds[0]
                    response.share_memory.memory_id = self._next
                case "detach":
                    assert session is not None
                    session.detached = True
                    response.detach.SetInParent()
            with contextlib.suppress(OSError):
                socket.send_fds(sock, [response.SerializeToString()], send)
            for fd in send:
                os.close(fd)
        sock.close()

    # ---- worker ----

    def _work(self, session: FakeSession) -> None:
        while not self._stop.is_set():
            if not self._drain(session):
                time.sleep(0.0002)

    def _drain(self, session: FakeSession) -> bool:
        ring = session.ring
        with self._lock:
            if ring.head == ring.tail:
                return False
            entry = session.entry[ring.head & (session.entries - 1)]
            self._do(session, entry)
            ring.head = (ring.head + 1) & 0xFFFFFFFF
        return True

    def _do(self, session: FakeSession, entry: Any) -> None:
        job = Held(entry.record, entry.job_id, entry.imm, entry.length)
        copy = self.entries_taken[entry.job_id] = ffi.new("struct tfd_entry *")
        ffi.memmove(copy, ffi.addressof(entry), ENTRY_BYTES)
        if entry.op == lib.TFD_OP_ACKNOWLEDGE:
            counter = session.counter[session.slots[entry.imm]]
            counter.acknowledged = counter.faults
            session.finish(job, JobStatus.OK)
        elif entry.op == lib.TFD_OP_CANCEL:
            for held in [h for h in session.held if h.job_id == entry.argument]:
                session.held.remove(held)
                session.finish(held, JobStatus.CANCELLED)
            session.finish(job, JobStatus.OK)
        elif entry.imm in self.refuse:
            session.finish(job, *self.refuse[entry.imm])
        elif entry.imm in self.hold:
            session.held.append(job)
        else:
            self._land(session, entry)
            session.finish(job, JobStatus.OK)
            session.count(entry.imm)

    def _land(self, session: FakeSession, entry: Any) -> None:
        if entry.op != lib.TFD_OP_WRITE:
            return
        grant = self.grants[session.handles[entry.dst_grant]]
        at = grant.offset + entry.dst_offset
        data = session.regions[entry.src_region][entry.src_offset : entry.src_offset + entry.length]
        session.regions[grant.region][at : at + entry.length] = data

    def taken_entry(self, job_id: int) -> Any:
        """Waits until the entry of a job was taken from the ring; returns a copy of it."""
        eventually(lambda: job_id in self.entries_taken, "the entry is taken")
        return self.entries_taken[job_id]

    def table(self, entry: Any, size: int) -> bytes:
        """Reads a table of the first session's."""
        header = self.sessions[0].header
        at = header.arena_offset + entry.table_offset
        return bytes(self.sessions[0].base[at : at + size])

    def release(self) -> None:
        """Ends the held jobs, OK, and holds none back any more."""
        with self._lock:
            self.hold.clear()
            for session in self.sessions:
                held, session.held = session.held, []
                for job in held:
                    session.finish(job, JobStatus.OK)
                    session.count(job.imm)

    # ---- gRPC ----

    def _session(self, context: grpc.ServicerContext, call: str) -> FakeSession:
        self.calls.append(call)
        metadata = {key: str(value) for key, value in context.invocation_metadata()}
        token = metadata["authorization"].removeprefix("Bearer ")
        return next(s for s in self.sessions if s.token == token)

    def RegisterRegion(self, request: Any, context: grpc.ServicerContext) -> Any:
        session = self._session(context, "RegisterRegion")
        fd = session.memory.pop(request.memory_id)
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        self._next += 1
        session.regions[self._next] = mmap.mmap(fd, request.length_bytes)
        os.close(fd)
        return region_pb2.RegisterRegionResponse(
            region=self._next, length_bytes=request.length_bytes
        )

    def DeregisterRegion(self, request: Any, context: grpc.ServicerContext) -> Any:
        session = self._session(context, "DeregisterRegion")
        if session.regions.pop(request.region, None) is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such region")
        return region_pb2.DeregisterRegionResponse()

    def CreateGrant(self, request: Any, context: grpc.ServicerContext) -> Any:
        session = self._session(context, "CreateGrant")
        self._next += 1
        descriptor = b"fake" + struct.pack("<Q", self._next)
        self.grants[descriptor] = Grant(request.region, request.offset_bytes, request.length_bytes)
        imms = range(request.imm_first, request.imm_first + request.imm_count)
        return region_pb2.CreateGrantResponse(
            grant_id=self._next,
            descriptor=descriptor,
            counter_slots=[session.slot(imm) for imm in imms],
        )

    def RevokeGrant(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._session(context, "RevokeGrant")
        return region_pb2.RevokeGrantResponse()

    def FenceGrant(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._session(context, "FenceGrant")
        self.fenced.append([(part.first, part.count) for part in request.imms])
        return region_pb2.FenceGrantResponse()

    def FenceGrants(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._session(context, "FenceGrants")
        self.fenced += [[(part.first, part.count) for part in one.imms] for one in request.fences]
        ends = [self.fence_ends.get(one.grant_id, "") for one in request.fences]
        return region_pb2.FenceGrantsResponse(
            results=[region_pb2.FenceResult(reason=end, message=end and "why") for end in ends]
        )

    def OpenDescriptors(self, request: Any, context: grpc.ServicerContext) -> Any:
        session = self._session(context, "OpenDescriptors")
        opened = []
        for descriptor in request.descriptors:
            if descriptor not in self.grants:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not a descriptor")
            self._next += 1
            handle = self.reopened.pop(descriptor, self._next)
            session.handles[handle] = descriptor
            length = self.grants[descriptor].length
            opened.append(region_pb2.OpenedGrant(handle=handle, length_bytes=length))
        return region_pb2.OpenDescriptorsResponse(grants=opened)

    def CloseDescriptor(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._session(context, "CloseDescriptor")
        self.closed_handles.append(request.handle)
        return region_pb2.CloseDescriptorResponse()

    def GetCounter(self, request: Any, context: grpc.ServicerContext) -> Any:
        session = self._session(context, "GetCounter")
        slot = session.slot(request.imm)
        return transfer_pb2.GetCounterResponse(
            counter=transfer_pb2.CounterState(imm=request.imm, slot=slot)
        )

    # ---- its end ----

    def end_sessions(self, reason: str = "KICKED", message: str = "an operator ended it") -> None:
        """Ends all sessions as a daemon does: told first, closed next."""
        told = attach_pb2.FdResponse(
            session_ended=attach_pb2.SessionEnded(reason=reason, message=message)
        )
        for session in self.sessions:
            session.header.state = lib.TFD_SESSION_ENDED
            with contextlib.suppress(OSError):
                session.sock.send(told.SerializeToString())
                session.sock.shutdown(socket.SHUT_RDWR)

    def vanish(self) -> None:
        """Drops all connections without a word, as a killed daemon does."""
        for session in self.sessions:
            with contextlib.suppress(OSError):
                session.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stops everything."""
        self._stop.set()
        self.vanish()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._server.stop(0).wait()
        for thread in self._threads:
            thread.join(10)
        for session in self.sessions:
            for fd in (session.doorbell[0], session.event[1]):
                os.close(fd)
