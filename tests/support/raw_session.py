# SPDX-License-Identifier: Apache-2.0
"""A client that keeps no rule: it writes what it likes into the segment and onto the fd socket."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, Self

from transferd.native.client_half import ffi, lib
from transferd.v1 import attach_pb2, region_pb2, region_pb2_grpc

from support.waiting import WAIT_S

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    import grpc

    from support.daemon import DaemonProcess

PACKET_BYTES = 65_536


def connect(daemon: DaemonProcess, timeout_s: float = WAIT_S) -> socket.socket:
    """Connects to the fd socket of a daemon."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # A bound of the kernel's: with Python's own a full backlog is an error at once.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(timeout_s), 0))
    try:
        sock.connect(daemon.socket.removeprefix("unix://") + ".fd")
    except BaseException:
        sock.close()
        raise
    sock.settimeout(timeout_s)
    return sock


def ask(
    sock: socket.socket, request: attach_pb2.FdRequest, fds: Sequence[int] = ()
) -> tuple[attach_pb2.FdResponse, list[int]]:
    """Sends one request and reads the next packet."""
    socket.send_fds(sock, [request.SerializeToString()], list(fds))
    return read(sock)


def read(sock: socket.socket) -> tuple[attach_pb2.FdResponse, list[int]]:
    """Reads one packet; EOFError at the end of the connection."""
    data, fds, _, _ = socket.recv_fds(sock, PACKET_BYTES, 8)
    if not data:
        raise EOFError("the daemon closed the connection")
    return attach_pb2.FdResponse.FromString(data), fds


class RawSession:
    """A session whose segment is mapped bare; a context manager.

    Attributes:
        header: struct tfd_segment_header *.
        ring: struct tfd_ring *, the first.
        entries: struct tfd_entry *, of that ring.
        records: struct tfd_record *.
        counters: struct tfd_counter *.
        arena: char *.
        sock: Its fd socket.
        token: For gRPC calls.
    """

    def __init__(self, daemon: DaemonProcess, name: str = "raw") -> None:
        """Attaches."""
        self.sock = connect(daemon)
        attach = attach_pb2.AttachRequest(abi_version=int(lib.TFD_ABI_VERSION), name=name)
        response, fds = ask(self.sock, attach_pb2.FdRequest(request_id=1, attach=attach))
        assert response.WhichOneof("body") == "attach", response
        segment, self.doorbell, self._events = fds
        self.session_id = response.attach.session_id
        self.token = response.attach.token.hex()
        self._map = mmap.mmap(segment, os.fstat(segment).st_size)
        os.close(segment)
        ask(self.sock, attach_pb2.FdRequest(request_id=2, mapped=attach_pb2.MappedRequest()))
        base = ffi.cast("char *", ffi.from_buffer(self._map))
        self.header: Any = ffi.cast("struct tfd_segment_header *", base)
        self.ring: Any = ffi.cast("struct tfd_ring *", base + self.header.ring_offset)
        self.entries: Any = ffi.cast("struct tfd_entry *", self.ring + 1)
        self.records: Any = ffi.cast("struct tfd_record *", base + self.header.record_offset)
        self.counters: Any = ffi.cast("struct tfd_counter *", base + self.header.counter_offset)
        self.arena: Any = base + self.header.arena_offset
        self._base = base

    @property
    def metadata(self) -> list[tuple[str, str]]:
        """Of its gRPC calls."""
        return [("authorization", f"Bearer {self.token}")]

    def fill(self, data: bytes) -> None:
        """Overwrites the entries of the ring from the first on."""
        ffi.memmove(self.entries, data, len(data))

    def publish(self, tail: int) -> None:
        """Sets the tail of the ring, whatever it was, and rings the doorbell."""
        self.ring.tail = tail & 0xFFFFFFFF
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self.doorbell, b"\1")

    def submit(self, **fields: int) -> int:
        """Puts one entry on the ring in the right way, with any fields; returns its job id."""
        tail = int(self.ring.tail)
        entry = self.entries[tail & (self.header.ring_entries - 1)]
        ffi.memmove(ffi.addressof(entry), bytes(ffi.sizeof("struct tfd_entry")), 128)
        job_id = (tail + 1) << 16 | (tail % int(self.header.record_count))
        entry.job_id, entry.record = job_id, job_id & 0xFFFF
        for name, value in fields.items():
            setattr(entry, name, value)
        self.publish(tail + 1)
        return int(entry.job_id)

    def end_of(self, job_id: int) -> tuple[int, int] | None:
        """Status and detail of a job; None while it runs."""
        record = self.records[job_id & (int(self.header.record_count) - 1)]
        return (record.status, record.detail) if record.done_id == job_id else None

    def share(self, fd: int) -> attach_pb2.FdResponse:
        """Hands memory over."""
        request = attach_pb2.FdRequest(request_id=3, share_memory=attach_pb2.ShareMemoryRequest())
        return ask(self.sock, request, [fd])[0]

    def register(self, channel: grpc.Channel, fd: int) -> int:
        """Hands memory over and registers all of it; returns the region."""
        memory_id = self.share(fd).share_memory.memory_id
        request = region_pb2.RegisterRegionRequest(memory_id=memory_id)
        stub = region_pb2_grpc.RegionServiceStub(channel)
        region: int = stub.RegisterRegion(request, metadata=self.metadata, timeout=WAIT_S).region
        return region

    def ended(self) -> str:
        """Waits until the daemon has ended the session; returns the reason that it gave."""
        reason = ""
        with contextlib.suppress(EOFError, ConnectionResetError):
            while True:
                response, fds = read(self.sock)
                for fd in fds:
                    os.close(fd)
                if response.WhichOneof("body") == "session_ended":
                    assert response.session_ended.message
                    reason = response.session_ended.reason
        return reason

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.sock.close()
        os.close(self.doorbell)
        os.close(self._events)
        # The mapping goes with the last pointer into it.
        self.header = self.ring = self.entries = self.records = self.counters = None
        self.arena = self._base = None
