# SPDX-License-Identifier: Apache-2.0
"""Clients that write garbage: into their ring, into their segment, onto the fd socket."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

import pytest

from transferd.native.client_half import ffi, lib
from transferd.native.names import Detail, JobStatus
from transferd.v1 import attach_pb2

from support.bystander import Bystander
from support.levels import Level, back_to, level
from support.raw_session import RawSession, ask, connect, read
from support.waiting import eventually

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from support.daemon import DaemonProcess

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

GARBAGE_ROUNDS = 20
FLOOD = 300


@pytest.fixture(scope="module")
def watched(shared_pair: Pair) -> Iterator[tuple[DaemonProcess, Bystander, Level]]:
    """Gives a daemon under a bystander's load, and what it holds so."""
    near, far = shared_pair
    with Bystander(near, far) as bystander:
        bystander.check()
        RawSession(near).__exit__(None, None, None)
        eventually(lambda: level(near).sessions == 1, "the first session is gone")
        yield near, bystander, level(near)


def test_random_entries(
    watched: tuple[DaemonProcess, Bystander, Level], seeded: random.Random
) -> None:
    daemon, bystander, before = watched
    for _ in range(GARBAGE_ROUNDS):
        with RawSession(daemon) as raw:
            count = seeded.randrange(1, 1 + int(raw.header.ring_entries))
            raw.fill(seeded.randbytes(count * ffi.sizeof("struct tfd_entry")))
            raw.publish(count)
            assert raw.ended() == "RING_BROKEN"
    bystander.check()
    back_to(daemon, before)


@pytest.mark.parametrize("tail", [1025, 4096, 1 << 31, 0xFFFFFFFF])
def test_index_far_ahead(watched: tuple[DaemonProcess, Bystander, Level], tail: int) -> None:
    daemon, bystander, before = watched
    with RawSession(daemon) as raw:
        assert raw.header.ring_entries == 1024
        raw.publish(tail)
        assert raw.ended() == "RING_BROKEN"
    bystander.check()
    back_to(daemon, before)


def test_index_that_goes_back(watched: tuple[DaemonProcess, Bystander, Level]) -> None:
    daemon, bystander, before = watched
    with RawSession(daemon) as raw:
        job = raw.submit(op=lib.TFD_OP_ACKNOWLEDGE, imm=5)
        assert eventually(lambda: raw.end_of(job), "an answer") == (
            JobStatus.INVALID, Detail.BAD_COUNTER,
        )  # fmt: skip
        raw.publish(0)
        assert raw.ended() == "RING_BROKEN"
    bystander.check()
    back_to(daemon, before)


def test_header_and_records_overwritten(
    watched: tuple[DaemonProcess, Bystander, Level], seeded: random.Random
) -> None:
    """What the daemon relies on is never read back from the segment."""
    daemon, bystander, before = watched
    for _ in range(GARBAGE_ROUNDS):
        with RawSession(daemon) as raw:
            entries, records = int(raw.header.ring_entries), int(raw.header.record_count)
            counters = int(raw.header.counter_count)
            for pointer, size in (
                (raw.header, ffi.sizeof("struct tfd_segment_header")),
                (raw.records, records * ffi.sizeof("struct tfd_record")),
                (raw.counters, counters * ffi.sizeof("struct tfd_counter")),
                (raw.entries, entries * ffi.sizeof("struct tfd_entry")),
            ):
                ffi.memmove(pointer, seeded.randbytes(size), size)
            raw.ring.head = seeded.getrandbits(32)
            raw.ring.need_wakeup = seeded.getrandbits(32)
            raw.publish(seeded.getrandbits(32))
            raw.ended()
    bystander.check()
    back_to(daemon, before)


def test_the_same_record_twice(watched: tuple[DaemonProcess, Bystander, Level]) -> None:
    """A record that a job in flight holds cannot be given to another."""
    daemon, bystander, before = watched
    with RawSession(daemon) as raw:
        raw.submit(op=lib.TFD_OP_WRITE, record=7)  # not the one that its id names
        assert raw.ended() == "RING_BROKEN"
    with RawSession(daemon) as raw:
        raw.submit(op=lib.TFD_OP_WRITE, job_id=0)
        assert raw.ended() == "RING_BROKEN"
    bystander.check()
    back_to(daemon, before)


def refused(sock: socket.socket) -> str:
    """Reads until the end; returns the reason of the refusal, if one was given."""
    reason = ""
    with contextlib.suppress(EOFError, ConnectionResetError, BrokenPipeError):
        while True:
            response, fds = read(sock)
            for fd in fds:
                os.close(fd)
            assert response.WhichOneof("body") == "error", response
            assert response.error.message
            reason = response.error.reason
    return reason


def test_fd_socket_garbage(
    watched: tuple[DaemonProcess, Bystander, Level], seeded: random.Random
) -> None:
    daemon, bystander, before = watched
    for number in range(FLOOD):
        with connect(daemon) as sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            data = seeded.randbytes(seeded.randrange(1, 6000))
            fds = [sock.fileno()] * seeded.randrange(0, 20) if number % 2 else []
            socket.send_fds(sock, [data], fds)
            if number % 3:
                # By chance some bytes are a message without a body; all are refused.
                assert refused(sock), data.hex()
    bystander.check()
    back_to(daemon, before)


def test_fd_socket_out_of_order(watched: tuple[DaemonProcess, Bystander, Level]) -> None:
    daemon, bystander, before = watched
    attach = attach_pb2.AttachRequest(abi_version=int(lib.TFD_ABI_VERSION))
    cases: list[tuple[attach_pb2.FdRequest, str]] = [
        (attach_pb2.FdRequest(request_id=1), "INVALID_REQUEST"),
        (attach_pb2.FdRequest(mapped=attach_pb2.MappedRequest()), "NOT_ATTACHED"),
        (attach_pb2.FdRequest(detach=attach_pb2.DetachRequest()), "NOT_ATTACHED"),
        (attach_pb2.FdRequest(share_memory=attach_pb2.ShareMemoryRequest()), "NOT_ATTACHED"),
        (
            attach_pb2.FdRequest(attach=attach_pb2.AttachRequest(abi_version=99)),
            "ABI_MISMATCH",
        ),
        (
            attach_pb2.FdRequest(
                attach=attach_pb2.AttachRequest(abi_version=1, record_count=1000)
            ),
            "INVALID_REQUEST",
        ),
        (
            attach_pb2.FdRequest(
                attach=attach_pb2.AttachRequest(abi_version=1, counter_count=1 << 30)
            ),
            "COUNTERS",
        ),
        (
            attach_pb2.FdRequest(attach=attach_pb2.AttachRequest(abi_version=1, name="n" * 65)),
            "INVALID_REQUEST",
        ),
    ]  # fmt: skip
    for request, reason in cases:
        with connect(daemon) as sock:
            sock.send(request.SerializeToString())
            assert refused(sock) == reason, request
    with connect(daemon) as sock:
        # Twice on one connection: refused, and the session that is there lives on.
        response, fds = ask(sock, attach_pb2.FdRequest(request_id=1, attach=attach))
        for fd in fds:
            os.close(fd)
        assert response.HasField("attach")
        response, _ = ask(sock, attach_pb2.FdRequest(request_id=2, attach=attach))
        assert response.error.reason == "ALREADY_ATTACHED"
        response, _ = ask(
            sock, attach_pb2.FdRequest(request_id=3, detach=attach_pb2.DetachRequest())
        )
        assert response.HasField("detach")
    bystander.check()
    back_to(daemon, before)


def test_client_that_does_not_read(watched: tuple[DaemonProcess, Bystander, Level]) -> None:
    """Answers that nobody takes do not pile up in the daemon; the connection ends instead."""
    daemon, bystander, before = watched
    with RawSession(daemon) as raw:
        request = attach_pb2.FdRequest(request_id=1, share_memory=attach_pb2.ShareMemoryRequest())
        raw.sock.settimeout(1.0)
        data = request.SerializeToString()
        with pytest.raises((TimeoutError, BrokenPipeError, ConnectionResetError)):  # noqa: PT012
            for _ in range(100_000):
                raw.sock.send(data)
    bystander.check()
    back_to(daemon, before)


def test_connections_that_say_nothing(watched: tuple[DaemonProcess, Bystander, Level]) -> None:
    """Strangers that only connect are bounded, and a client still gets in beside them."""
    daemon, bystander, before = watched
    with contextlib.ExitStack() as stack:
        for _ in range(FLOOD):
            stack.enter_context(connect(daemon))
        assert level(daemon).fds < before.fds + 100
        bystander.check()
    back_to(daemon, before)
    with RawSession(daemon) as raw:
        assert raw.session_id
    back_to(daemon, before)
