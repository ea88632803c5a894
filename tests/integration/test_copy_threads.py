# SPDX-License-Identifier: Apache-2.0
"""Transfers within a daemon whose helper threads copy."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import transferd
from transferd.native.names import JobStatus
from transferd.v1 import types_pb2

from support.canary import KINDS, Canary
from support.grpc_session import grpc_session, shm_file, tenants
from support.waiting import WAIT_S

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from support.daemon import DaemonProcess

pytestmark = pytest.mark.slow

THREADS = 2
KIB, MIB = 1 << 10, 1 << 20
LENGTH = 80 * MIB  # more than what is streamed
ROUNDS = 30


@pytest.fixture
def daemon(make_daemon: Callable[..., DaemonProcess]) -> DaemonProcess:
    return make_daemon(copy_threads=THREADS, tenants=tenants())


def helpers(daemon: DaemonProcess) -> list[Path]:
    """Finds the helpers' folders in /proc."""
    tasks = Path(f"/proc/{daemon.pid}/task").iterdir()
    return [task for task in tasks if (task / "comm").read_text().startswith("tfd-copy")]


def busy_ns(tasks: list[Path]) -> int:
    """Tells the processor time of threads so far."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)


def test_bytes_and_counts(daemon: DaemonProcess, seeded: random.Random) -> None:
    threads = helpers(daemon)
    assert len(threads) == THREADS
    with transferd.Client(daemon.socket) as sender, transferd.Client(daemon.socket) as receiver:
        source, target = sender.alloc(LENGTH), receiver.alloc(LENGTH)
        source.view[:] = seeded.randbytes(MIB) * (LENGTH // MIB)
        grant = target.grant(rights={"write", "read"}, imms=range(8))
        before = busy_ns(threads)
        sizes = [1, 128 * KIB - 1, 128 * KIB, 256 * KIB + 1, 3 * MIB + 5, 33 * MIB + 77, LENGTH]
        for number, size in enumerate(sizes, 1):
            at = LENGTH - size
            sender.write(source[:size], grant.descriptor, at, imm=1, checksum=size < MIB)
            receiver.counter(1).wait(number, WAIT_S)
            assert target.view[at:] == source.view[:size]
        assert busy_ns(threads) > before  # it was they who copied
        back = sender.alloc(LENGTH)
        assert sender.read(grant.descriptor, back).wait(WAIT_S) is JobStatus.OK
        assert back.view == target.view
        pages = np.array(seeded.sample(range(LENGTH // (80 * KIB)), 500))
        for size in (80 * KIB, 700):
            target.view[:] = bytes(LENGTH)
            job = sender.write_pages(
                source, pages, grant.descriptor, pages[::-1], size, imm=size % 7, exact=True,
                src_stride=80 * KIB, dst_stride=80 * KIB,
            )  # fmt: skip
            receiver.counter(size % 7).wait(len(pages) + (size % 7 == 1) * len(sizes), WAIT_S)
            assert job.wait(WAIT_S) is JobStatus.OK
            for here, there in zip(pages.tolist(), pages[::-1].tolist(), strict=True):
                wanted = source.view[here * 80 * KIB :][:size]
                assert target.view[there * 80 * KIB :][:size] == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_canary(daemon: DaemonProcess, kind: str) -> None:
    with (
        transferd.Client(daemon.socket) as sender,
        transferd.Client(daemon.socket) as receiver,
        Canary(kind, sender, receiver) as canary,
    ):
        canary.run(ROUNDS)
        assert canary.caught, "no fence met a job in flight"


def test_memory_that_is_taken_away(daemon: DaemonProcess) -> None:
    """A helper that meets a page that is gone goes on; the job tells, nobody else notices."""
    with transferd.Client(daemon.socket) as sender, transferd.Client(daemon.socket) as receiver:
        source, target = sender.alloc(LENGTH), receiver.alloc(LENGTH)
        source.view[:] = b"\x11" * LENGTH
        grant = target.grant(imms=range(4))
        with grpc_session(daemon) as taker, shm_file(LENGTH) as (name, fd):
            region = taker.register(name)
            os.ftruncate(fd, 0)
            (end,) = taker.wait(taker.write(region, grant.descriptor, LENGTH, 1))
            assert end.status == types_pb2.JOB_STATUS_LOCAL_ACCESS
        with grpc_session(daemon) as taker, shm_file(LENGTH) as (name, fd):
            theirs = taker.grant(taker.register(name)).descriptor
            sender.warm(theirs)
            os.ftruncate(fd, 0)
            job = sender.write(source, theirs, imm=1)
            with contextlib.suppress(transferd.JobFailed):  # its grants are revoked soon
                job.wait(WAIT_S)
            assert job.status in (JobStatus.OK, JobStatus.CANCELLED)
        assert sender.write(source, grant.descriptor, imm=2).wait(WAIT_S) is JobStatus.OK
        receiver.counter(2).wait(1, WAIT_S)
        assert target.view == source.view
