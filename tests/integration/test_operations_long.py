# SPDX-License-Identifier: Apache-2.0
"""Lengths beyond 32 bits, up to 2^40 bytes: on the simulated fabric, which moves no bytes here.

Its work entries are real, and the memory is a file without pages.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from typing import TYPE_CHECKING

import pytest

import transferd
from transferd.native.names import Detail, JobStatus
from transferd.v1 import transfer_pb2 as pb
from transferd.v1 import types_pb2

from support.grpc_session import grpc_session, tenants

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import MakeDaemon

    from support.daemon import DaemonProcess

pytestmark = pytest.mark.slow

WAIT_S = 30.0
OK = JobStatus.OK
ODD = (1 << 32) + 3
MOST = 1 << 40


@pytest.fixture
def null(make_daemon: MakeDaemon) -> DaemonProcess:
    return make_daemon(provider="sim", rails=["lo"], fabric={"name": "move=0"}, tenants=tenants())


def test_every_operation(null: DaemonProcess) -> None:
    with transferd.Client(null.socket) as client:
        source, target = client.alloc(MOST), client.alloc(MOST)
        dst = target.grant(imms=range(4), rights={"read", "write"}).descriptor
        for job, size in (
            (client.write(source[:ODD], dst, imm=1), ODD),
            (client.write(source, dst, imm=1, exact=True), MOST),
            (client.write_pages(source, [1, 2], dst, [3, 0], ODD, imm=2), 2 * ODD),
            (client.scatter(source, [(dst, 0, 0, ODD), (dst, ODD, 1, ODD)], imm=3), 2 * ODD),
            (client.read(dst, source[:ODD]), ODD),
        ):
            assert job.wait(WAIT_S) is OK
            assert job.result is not None
            assert (job.result.bytes, job.result.path.provider) == (size, "sim")
        for imm in (1, 2, 3):
            client.counter(imm).wait(2, WAIT_S)
            assert client.counter(imm).read() == (2, 0, 0, 0)
        for late in (
            client.write(source, dst, 1, imm=1),
            client.write(source[:1], dst, MOST, imm=1),
            client.read(dst, source, 1),
        ):
            with pytest.raises(transferd.JobFailed) as caught:
                late.wait(WAIT_S)
            assert caught.value.detail == Detail.DESTINATION_BOUNDS.name
        with pytest.raises(transferd.InvalidRequest):
            client.alloc(MOST + 1)
        with pytest.raises(transferd.InvalidRequest, match=r"2\^40"):
            client.write_pages(source, [0], dst, [0], MOST + 1, imm=1)
        with pytest.raises(transferd.InvalidRequest, match=r"2\^40"):
            client.scatter(source, [(dst, 0, 0, MOST + 1)], imm=1)


@contextlib.contextmanager
def sparse(length: int) -> Iterator[str]:
    """Makes POSIX shared memory without pages; gives its name."""
    name = f"/tests-{secrets.token_hex(8)}"
    fd = os.open(f"/dev/shm{name}", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, length)
        yield name
    finally:
        os.close(fd)
        os.unlink(f"/dev/shm{name}")


def test_by_grpc(null: DaemonProcess) -> None:
    with (
        sparse(3 * ODD) as name,
        grpc_session(null) as session,
        transferd.Client(null.socket) as receiver,
    ):
        region = session.register(name)
        dst = receiver.alloc(3 * ODD).grant(imms=[1]).descriptor
        jobs = [
            pb.Job(write=pb.WriteJob(src_region=region, dst=dst, length_bytes=ODD, imm=1)),
            pb.Job(
                write_pages=pb.WritePagesJob(
                    src_region=region, dst=dst, page_bytes=ODD, src_pages=[2], dst_pages=[1], imm=1
                )
            ),
        ]
        request = pb.SubmitRequest(jobs=jobs)
        ends = session.wait(list(session.call("transfers.Submit", request).job_ids))
        assert [(end.status, end.bytes) for end in ends] == [(types_pb2.JOB_STATUS_OK, ODD)] * 2
        assert ends[0].path.provider == "sim"
        receiver.counter(1).wait(2, WAIT_S)
        assert receiver.counter(1).read() == (2, 0, 0, 0)
