# SPDX-License-Identifier: Apache-2.0
"""Clients that take registered pages away: refused where possible, survived elsewhere."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
from typing import TYPE_CHECKING

import pytest

import transferd
from transferd.native.names import JobStatus
from transferd.v1 import admin_pb2, types_pb2

from support.bystander import Bystander
from support.grpc_session import grpc_session, shm_file
from support.levels import back_to, level
from support.raw_session import RawSession
from support.waiting import WAIT_S, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.daemon import DaemonProcess

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

LENGTH = 64 << 20
JOBS = 16
IMM = 1
FALLOC_FL_KEEP_SIZE = 1  # <linux/falloc.h>
FALLOC_FL_PUNCH_HOLE = 2

libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


def punch(fd: int, length: int = LENGTH) -> None:
    """Takes the pages of a file away; its size stays."""
    if libc.fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, 0, length):
        raise OSError(ctypes.get_errno(), "fallocate")


def truncate(fd: int) -> None:
    """Takes the pages away, and the size."""
    os.ftruncate(fd, 0)


@contextlib.contextmanager
def memfd(length: int, seals: int) -> Iterator[int]:
    fd = os.memfd_create("tests", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, length)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        yield fd
    finally:
        os.close(fd)


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_GROW])
def test_memfd_that_may_shrink_is_refused(shared_pair: Pair, seals: int) -> None:
    daemon, _ = shared_pair
    with RawSession(daemon) as raw, memfd(LENGTH, seals) as fd:
        error = raw.share(fd).error
        assert error.reason == "INVALID_REQUEST"
        assert "F_SEAL_SHRINK" in error.message


def test_what_is_no_memory_is_refused(shared_pair: Pair) -> None:
    daemon, _ = shared_pair
    read_end, write_end = os.pipe()
    on_disk = os.open(daemon.config_path, os.O_RDWR)
    directory = os.open("/tmp", os.O_RDONLY)
    null = os.open("/dev/null", os.O_RDWR)
    fds = [read_end, write_end, on_disk, directory, null]
    with RawSession(daemon) as raw:
        for fd in fds:
            assert raw.share(fd).error.reason == "INVALID_REQUEST"
        for fd in fds:
            os.close(fd)
        with memfd(4096, fcntl.F_SEAL_SHRINK) as fd:  # the session lives on
            assert raw.share(fd).share_memory.size_bytes == 4096


def test_sealed_memfd_cannot_be_taken_away(shared_pair: Pair) -> None:
    daemon, _ = shared_pair
    with (
        RawSession(daemon) as raw,
        memfd(LENGTH, fcntl.F_SEAL_SHRINK) as fd,
        daemon.channel() as channel,
    ):
        assert raw.register(channel, fd)
        with pytest.raises(OSError, match=os.strerror(errno.EPERM)):
            truncate(fd)
        punch(fd)  # only zeroes it: the pages come back when they are touched


@pytest.mark.parametrize("take", [truncate, punch])
def test_source_taken_away_in_mid_transfer(shared_pair: Pair, take: object) -> None:
    near, far = shared_pair
    with Bystander(near, far) as bystander, transferd.Client(far.socket) as receiver:
        grant = receiver.alloc(LENGTH).grant(imms=[IMM])
        bystander.check()
        before = level(near)
        with grpc_session(near) as sender, shm_file(LENGTH) as (name, fd):
            region = sender.register(name)
            jobs = sender.write(region, grant.descriptor, LENGTH, IMM, JOBS)
            take(fd)  # type: ignore[operator]
            ends = {end.status for end in sender.wait(jobs)}
            assert types_pb2.JOB_STATUS_PENDING not in ends
            if take is truncate:
                assert types_pb2.JOB_STATUS_OK not in ends or len(ends) > 1
                (late,) = sender.wait(sender.write(region, grant.descriptor, LENGTH, IMM))
                assert late.status != types_pb2.JOB_STATUS_OK
                # The receiver is not left to wait for what will never come.
                with pytest.raises(transferd.CounterFault):
                    receiver.counter(IMM).wait(JOBS + 1, WAIT_S)
            bystander.check()
        bystander.check()
        back_to(near, before)


@pytest.mark.parametrize("take", [truncate, punch])
def test_destination_taken_away_in_mid_transfer(shared_pair: Pair, take: object) -> None:
    near, far = shared_pair
    with Bystander(near, far) as bystander, transferd.Client(near.socket) as sender:
        source = sender.alloc(LENGTH)
        bystander.check()
        before = level(far)
        with grpc_session(far) as receiver, shm_file(LENGTH) as (name, fd):
            descriptor = receiver.grant(receiver.register(name)).descriptor
            sender.warm(descriptor)
            jobs = [sender.write(source, descriptor, imm=IMM) for _ in range(JOBS)]
            sender.imm(descriptor, IMM, priority="latency").wait(WAIT_S)
            take(fd)  # type: ignore[operator]
            for job in jobs:
                with contextlib.suppress(transferd.JobFailed):
                    job.wait(WAIT_S)
            assert all(job.status is not JobStatus.PENDING for job in jobs)
            if take is truncate:
                with pytest.raises(transferd.TransferdError):
                    sender.write(source, descriptor, imm=IMM).wait(WAIT_S)
                regions = receiver.call("admin.ListRegions", admin_pb2.ListRegionsRequest()).regions
                assert {r.state for r in regions if r.kind == "shm"} == {"BROKEN"}
            bystander.check()
        bystander.check()
        back_to(far, before)


def test_other_regions_of_the_same_session_go_on(shared_pair: Pair) -> None:
    near, far = shared_pair
    with grpc_session(near) as sender, shm_file(LENGTH) as lost, shm_file(4096) as kept:
        gone, good = sender.register(lost[0]), sender.register(kept[0])
        with transferd.Client(far.socket) as receiver:
            grant = receiver.alloc(LENGTH).grant(imms=range(4))
            jobs = sender.write(gone, grant.descriptor, LENGTH, IMM, 4)
            truncate(lost[1])
            sender.wait(jobs)

            def works() -> bool:
                (end,) = sender.wait(sender.write(good, grant.descriptor, 4096, 2))
                return bool(end.status == types_pb2.JOB_STATUS_OK)

            eventually(works, "its other region can be written from")
            receiver.counter(2).wait(1, WAIT_S)
