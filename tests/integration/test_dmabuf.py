# SPDX-License-Identifier: Apache-2.0
"""Memory of devices that NICs reach by dma-buf, on the doubles: verbs', and EFA's libfabric.

A memfd that the daemons and the doubles take for a dma-buf; what posts call it is mapped nowhere.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

import transferd
import transferd.aio
from transferd.native.client_half import lib
from transferd.native.names import Detail, JobStatus
from transferd.v1 import attach_pb2, types_pb2

from support.cuda_client import SIZE, CudaClient
from support.efaface import face_config
from support.fakecuda import DeviceBuffer, installed
from support.providers import SOFTVERBS
from support.tree import ROOT
from support.twins import Twins
from support.waiting import WAIT_S, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

RAILS = 2
OFFSET = 4112  # of the region, into the allocation
LENGTH = SIZE - OFFSET
RIGHTS = (types_pb2.RIGHT_WRITE, types_pb2.RIGHT_READ)
OK = (JobStatus.OK, 0)


def verbs() -> dict[str, Any]:
    """Builds the double of libibverbs; the configuration that takes it."""
    subprocess.run(["make", "-s", "-C", str(ROOT / "native"), "softverbs"], check=True)
    return {
        "provider": "verbs",
        "rails": ["soft0", "soft1"],
        "verbs": {"library": SOFTVERBS},
    }


def efa() -> dict[str, Any]:
    """Builds EFA's face; the configuration that takes it."""
    return face_config(RAILS)


NICS = {"verbs": verbs, "efa": efa}


@pytest.fixture(params=NICS)
def twins(request: pytest.FixtureRequest, short_tmp: Path) -> Iterator[Twins]:
    pair = Twins(short_tmp, NICS[request.param]())
    pair.environment["MEMFD_IS_DMABUF"] = "1"
    request.node.transferd_daemons = [pair, pair.second]
    with pair:
        yield pair


class End:
    """A client with device memory, registered from OFFSET on."""

    def __init__(self, daemon: Any) -> None:
        self.fd = os.memfd_create("dmabuf")
        os.ftruncate(self.fd, SIZE)
        self.client = CudaClient(daemon, "end")
        shared = self.client.share_cuda(
            self.fd, dmabuf=True, flush=attach_pb2.CUDA_FLUSH_NOT_NEEDED
        )
        self.region = self.client.registered(shared, offset_bytes=OFFSET)

    def run(self, **entry: Any) -> tuple[JobStatus, int]:
        job = self.client.submit(**entry)
        ended = eventually(lambda: self.client.end_of(job), "the job's end")
        assert ended is not None
        return JobStatus(ended[0]), ended[1]

    def fill(self, data: bytes) -> None:
        os.pwrite(self.fd, data, OFFSET)

    def holds(self) -> bytes:
        return os.pread(self.fd, LENGTH, OFFSET)

    def __enter__(self) -> End:
        self.client.__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        self.client.__exit__(None, None, None)
        os.close(self.fd)


def test_moves(twins: Twins) -> None:
    """Both ends are a device's: writes of all lengths, the shortest among them, and a read."""
    with End(twins) as near, End(twins.second) as far:
        assert (near.region.rails, far.region.rails) == (RAILS, RAILS)
        assert near.region.length_bytes == LENGTH
        granted = far.client.grant(far.region.region, RIGHTS)
        handle = near.client.open(granted.descriptor).handle
        counter = far.client.counters[granted.counter_slots[2]]
        data = os.urandom(LENGTH)
        near.fill(data)
        for count, length in enumerate((1, 33, 4096, 100_003, LENGTH), start=1):
            far.fill(bytes(LENGTH))
            ended = near.run(
                op=lib.TFD_OP_WRITE,
                src_region=near.region.region,
                dst_grant=handle,
                length=length,
                imm=2,
            )
            assert ended == OK
            eventually(lambda: counter.value == count, "the count")  # noqa: B023
            assert far.holds() == data[:length] + bytes(LENGTH - length)
        other = os.urandom(LENGTH)
        far.fill(other)
        ended = near.run(
            op=lib.TFD_OP_READ, src_region=near.region.region, dst_grant=handle, length=LENGTH
        )
        assert ended == OK
        assert near.holds() == other
        assert os.pread(far.fd, OFFSET, 0) == bytes(OFFSET)


def test_a_device_cannot_be_mapped_from_another_host(twins: Twins) -> None:
    with End(twins) as near, End(twins.second) as far:
        granted = far.client.grant(far.region.region)
        handle = near.client.open(granted.descriptor).handle
        assert near.client.map(handle).error.reason == "MAP_OTHER_HOST"


@pytest.mark.parametrize(
    ("nics", "environment"),
    [("verbs", {"SOFTVERBS": "dmabuf=0"}), ("efa", {"EFAFACE_DMABUF": "95"})],
)
def test_nics_that_take_none(
    short_tmp: Path, request: pytest.FixtureRequest, nics: str, environment: dict[str, str]
) -> None:
    """The region is registered all the same, on no rail; a job on it says what there is to do."""
    pair = Twins(short_tmp, NICS[nics]())
    pair.environment.update({"MEMFD_IS_DMABUF": "1", **environment})
    request.node.transferd_daemons = [pair, pair.second]
    with pair, End(pair) as near, End(pair.second) as far:
        assert (near.region.rails, far.region.rails) == (0, 0)
        granted = far.client.grant(far.region.region, RIGHTS)
        ended = near.run(
            op=lib.TFD_OP_WRITE,
            src_region=near.region.region,
            dst_grant=near.client.open(granted.descriptor).handle,
            length=LENGTH,
            imm=2,
        )
        assert ended == (JobStatus.INVALID, Detail.DEVICE_MEMORY)


# ---- clients of the SDK, with a driver of host memory ----

NONE, OWNER, HOST, MEMOPS = 0, 100, 1, 2  # WRITES_ORDERING, FLUSH_WRITES_OPTIONS


@pytest.mark.parametrize("twins", ["verbs"], indirect=True)
@pytest.mark.parametrize(
    ("flush", "by"),
    [((NONE, HOST), "host"), ((NONE, MEMOPS), "stream"), ((OWNER, HOST | MEMOPS), "")],
)
def test_who_waits_flushes(
    twins: Twins, monkeypatch: pytest.MonkeyPatch, flush: tuple[int, int], by: str
) -> None:
    """A count of what a NIC wrote, and the end of what it read, by threads; by streams."""
    data = os.urandom(SIZE)
    with installed(monkeypatch, flush=flush, dmabufs=True) as cuda:
        target = DeviceBuffer(cuda, cuda.malloc(SIZE), SIZE)
        with (
            transferd.Client(twins.socket) as sender,
            transferd.Client(twins.second.socket) as receiver,
        ):
            source = sender.alloc(SIZE)
            source.view[:] = data
            region = receiver.register(target)
            assert not region.without_nics
            grant = region.grant(imms=range(3))
            job = sender.write(source, grant.descriptor, imm=1)
            assert job.wait(WAIT_S) is JobStatus.OK
            assert str(job.path).startswith("verbs")
            assert not cuda.flushes  # the sender's job tells the receiver nothing
            counter = receiver.counter(1)
            counter.wait(1, WAIT_S)
            assert cuda.flushes == ([(by, 0)] if by else [])
            assert bytes(target.view) == data
            stream = cuda.stream()
            counter.cuda_wait(2, stream)
            before = len(cuda.flushes)
            assert not cuda.done(stream)
            assert sender.write(source, grant.descriptor, imm=1).wait(WAIT_S) is JobStatus.OK
            eventually(lambda: cuda.done(stream), "the stream goes on")
            # By itself, or once a thread has: the stream waits for that one's word then.
            assert cuda.flushes[before:] == ([(by, 0)] if by else [])
            before = len(cuda.flushes)
            target.view[:] = bytes(SIZE)
            back = receiver.read(sender_grant(source), region)
            assert back.wait(WAIT_S) is JobStatus.OK
            assert cuda.flushes[before:] == ([(by, 0)] if by else [])
            assert bytes(target.view) == data


def sender_grant(source: transferd.Region) -> bytes:
    """A descriptor that may be read."""
    return source.grant(rights={"read"}).descriptor


@pytest.mark.parametrize("twins", ["verbs"], indirect=True)
def test_streams_that_wait_for_a_thread(twins: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault lets them through, until it is acknowledged; so does the session's end."""
    with installed(monkeypatch, flush=(NONE, HOST), dmabufs=True) as cuda:
        target = DeviceBuffer(cuda, cuda.malloc(SIZE), SIZE)
        first, second = cuda.stream(), cuda.stream()
        with (
            transferd.Client(twins.socket) as sender,
            transferd.Client(twins.second.socket) as receiver,
        ):
            grant = receiver.register(target).grant(imms=range(3))
            counter = receiver.counter(1)
            counter.cuda_wait(1, first)
            with transferd.Client(twins.socket) as gone:
                watcher = gone.watcher()
                write = transferd.Write(src=gone.alloc(64), dst=grant.descriptor, imm=1)
                gone.arm(watcher, 1, write)  # which never starts: lost with its session
            eventually(lambda: counter.faults == 1, "the loss is told")
            eventually(lambda: cuda.done(first), "the stream is let through")
            counter.acknowledge()
            counter.cuda_wait(1, second)
            assert not cuda.done(second)
            source = sender.alloc(SIZE)
            assert sender.write(source, grant.descriptor, imm=1).wait(WAIT_S) is JobStatus.OK
            eventually(lambda: cuda.done(second), "and this one by the count")
            counter.cuda_wait(9, first)
            assert not cuda.done(first)
        eventually(lambda: cuda.done(first), "the end lets it through")


@pytest.mark.parametrize("twins", ["verbs"], indirect=True)
async def test_asyncio_flushes(twins: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(monkeypatch, flush=(NONE, HOST), dmabufs=True) as cuda:
        target = DeviceBuffer(cuda, cuda.malloc(SIZE), SIZE)
        async with (
            transferd.aio.Client(twins.socket) as sender,
            transferd.aio.Client(twins.second.socket) as receiver,
        ):
            source = await sender.alloc(SIZE)
            region = await receiver.register(target)
            grant = await region.grant(imms=range(3))
            await (await sender.write(source, grant.descriptor, imm=1))
            counter = await receiver.counter(1)
            await counter.wait(1, WAIT_S)
            assert cuda.flushes == [("host", 0)]
            stream = cuda.stream()
            counter.cuda_wait(2, stream)
            await (await sender.write(source, grant.descriptor, imm=1))
            await asyncio.to_thread(eventually, lambda: cuda.done(stream), "the stream goes on")
            assert cuda.flushes[1:] == [("host", 0)] * 2  # of what was counted, and of the next


@pytest.mark.parametrize("twins", ["verbs"], indirect=True)
def test_a_device_that_cannot_be_flushed(twins: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registration says so, and a job from another host has no path, rather than a stale one."""
    with installed(monkeypatch, flush=(NONE, 0), dmabufs=True) as cuda:
        target = DeviceBuffer(cuda, cuda.malloc(SIZE), SIZE)
        with (
            transferd.Client(twins.socket) as sender,
            transferd.Client(twins.second.socket) as receiver,
        ):
            region = receiver.register(target)
            assert "neither orders" in region.without_nics
            grant = region.grant(imms=range(3))
            job = sender.write(sender.alloc(SIZE), grant.descriptor, imm=1)
            with pytest.raises(transferd.JobFailed, match="GPU memory"):
                job.wait(WAIT_S)
