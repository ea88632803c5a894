# SPDX-License-Identifier: Apache-2.0
"""The SDK through real daemons: bytes land, counts are exact, what is wrong is refused by name."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

import transferd
import transferd.aio
from transferd.client.session import JobPath, JobResult
from transferd.native.names import JobStatus

from support.daemon import provider_of_tests

if TYPE_CHECKING:
    from conftest import MakeDaemon

    from transferd import Client, Grant, Region

    from support.daemon import DaemonProcess

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = pytest.mark.slow

WAIT_S = 20.0
SIZES = (0, 1, 4095, 4096, 65_537, (3 << 20) + 1)


@pytest.fixture(params=["ring", "grpc"])
def shared_memory(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "ring")


def granted(client: Client, length: int, imms: range = range(16)) -> tuple[Region, Grant]:
    region = client.alloc(length)
    return region, region.grant(imms=imms)


def test_sizes_land_whole(request: pytest.FixtureRequest, sender: Client, receiver: Client) -> None:
    same = "same daemon" in request.node.name
    provider = "local" if same else provider_of_tests()
    total = sum(SIZES) + 64 * len(SIZES)
    source = sender.alloc(total)
    source.view[:] = os.urandom(total)
    target, grant = granted(receiver, total)
    offset = 0
    for number, size in enumerate(SIZES):
        job = sender.write(source[offset : offset + size], grant.descriptor, offset, imm=3)
        assert job.wait(WAIT_S) is JobStatus.OK
        receiver.counter(3).wait(number + 1, WAIT_S)
        got, wanted = target.view[offset : offset + size], source.view[offset : offset + size]
        assert got == wanted, size
        assert not any(target.view[offset + size : offset + size + 64]), size
        result = job.result
        assert result is not None
        assert (result.bytes, result.detail) == (size, "")
        assert result.path.provider == provider
        assert result.path.rails >= 1
        offset += size + 64
    assert receiver.counter(3).read() == (len(SIZES), 0, 0, 0)
    assert receiver.counter(4).value == 0


def test_counts_are_exact(sender: Client, receiver: Client) -> None:
    count = 2000 if sender.shared_memory else 200
    source = sender.alloc(1 << 16)
    target, grant = granted(receiver, 1 << 16)
    source.view[:] = os.urandom(1 << 16)
    jobs = sender.submit(
        [
            transferd.Write(
                src=source[i * 16 : i * 16 + 16], dst=grant.descriptor, dst_offset=i * 16, imm=i % 4
            )
            for i in range(count)
        ],
        timeout_s=WAIT_S,
    )
    jobs += [sender.imm(grant.descriptor, 5, priority="latency") for _ in range(50)]
    assert {job.wait(WAIT_S) for job in jobs} == {JobStatus.OK}
    for imm in range(4):
        receiver.counter(imm).wait(count // 4, WAIT_S)
    receiver.counter(5).wait(50, WAIT_S)
    assert [receiver.counter(imm).value for imm in (0, 1, 2, 3, 5)] == [count // 4] * 4 + [50]
    end = count * 16
    digests = [hashlib.sha256(view[:end]).digest() for view in (source.view, target.view)]
    assert digests[0] == digests[1]


def test_same_immediate_of_two_clients(shared_pair: Pair, sender: Client, receiver: Client) -> None:
    with transferd.Client(shared_pair[1].socket) as other:
        _, grant = granted(receiver, 4096)
        _, others = granted(other, 4096)
        sender.imm(grant.descriptor, 7).wait(WAIT_S)
        receiver.counter(7).wait(1, WAIT_S)
        assert other.counter(7).value == 0
        sender.imm(others.descriptor, 7).wait(WAIT_S)
        other.counter(7).wait(1, WAIT_S)
        assert receiver.counter(7).value == 1


@pytest.mark.parametrize(
    ("offset", "length", "imm", "detail"),
    [
        (1, 4096, 1, "DESTINATION_BOUNDS"),
        (4097, 0, 1, "DESTINATION_BOUNDS"),
        ((1 << 64) - 1, 2, 1, "DESTINATION_BOUNDS"),
        (0, 1, 16, "IMM_RANGE"),
        (0, 1, (1 << 20) - 1, "IMM_RANGE"),
    ],
)
def test_what_leaves_the_grant_is_refused(
    sender: Client, receiver: Client, offset: int, length: int, imm: int, detail: str
) -> None:
    source = sender.alloc(8192)
    target, grant = granted(receiver, 4096)
    job = sender.write(source[:length], grant.descriptor, offset, imm=imm)
    with pytest.raises(transferd.JobFailed) as caught:
        job.wait(WAIT_S)
    assert caught.value.detail == detail
    # Nothing else is harmed.
    assert sender.write(source[:1], grant.descriptor, imm=1).wait(WAIT_S) is JobStatus.OK
    receiver.counter(1).wait(1, WAIT_S)
    assert not any(target.view)


def test_descriptors_that_are_none(sender: Client, receiver: Client) -> None:
    source = sender.alloc(4096)
    _, grant = granted(receiver, 4096)
    good = grant.descriptor
    flipped = [bytes([*good[:i], good[i] ^ 1, *good[i + 1 :]]) for i in range(0, len(good), 7)]
    for bad in (b"", b"x", good[:-1], good + b"x", os.urandom(len(good)), *flipped):
        with pytest.raises(transferd.TransferdError) as caught:
            sender.write(source, bad, imm=1).wait(WAIT_S)
        assert not isinstance(caught.value, transferd.Internal), bad.hex()
    assert sender.write(source, good, imm=1).wait(WAIT_S) is JobStatus.OK


def test_revoked_and_expired(sender: Client, receiver: Client) -> None:
    source = sender.alloc(4096)
    target, grant = granted(receiver, 4096)
    assert sender.write(source, grant.descriptor, imm=1).wait(WAIT_S) is JobStatus.OK
    grant.revoke()
    with pytest.raises(transferd.TransferdError) as caught:
        sender.write(source, grant.descriptor, imm=1).wait(WAIT_S)
    assert "REVOKED" in caught.value.reason
    with pytest.raises(transferd.TransferdError) as caught:  # the handle is dropped by now
        sender.write(source, grant.descriptor, imm=1).wait(WAIT_S)
    assert "REVOKED" in caught.value.reason
    short = target.grant(imms=[2], expires_s=0.3)
    assert sender.write(source, short.descriptor, imm=2).wait(WAIT_S) is JobStatus.OK
    time.sleep(0.5)
    with pytest.raises(transferd.TransferdError) as caught:
        sender.write(source, short.descriptor, imm=2).wait(WAIT_S)
    assert "EXPIRED" in caught.value.reason


def test_grant_that_is_good_after_a_job_was_lost(sender: Client, receiver: Client) -> None:
    """One path of several broke: its job is lost, and the daemon answers with the same handle."""
    source = sender.alloc(4096)
    _, grant = granted(receiver, 4096)
    job = sender.write(source, grant.descriptor, imm=1)
    assert job.wait(WAIT_S) is JobStatus.OK
    session = sender._session
    handle = session.open(grant.descriptor)
    lost = JobResult(job.id, JobStatus.PEER_LOST, "CONNECTION", 0, JobPath("tcp", 1), 0)
    session.note_end(lost, grant.descriptor, handle)
    for _ in range(2):  # the second one goes by what the first has opened
        assert sender.write(source, grant.descriptor, imm=1).wait(WAIT_S) is JobStatus.OK
    assert session.open(grant.descriptor) == handle
    receiver.counter(1).wait(3, WAIT_S)


def test_closed_regions(sender: Client, receiver: Client) -> None:
    source = sender.alloc(4096)
    target, grant = granted(receiver, 4096)
    assert sender.write(source, grant.descriptor, imm=1).wait(WAIT_S) is JobStatus.OK
    target.close()
    with pytest.raises(transferd.TransferdError):
        sender.write(source, grant.descriptor, imm=1).wait(WAIT_S)
    source.close()
    with pytest.raises(transferd.InvalidRequest):
        sender.write(source, grant.descriptor, imm=1)


def test_cancel_and_deadline_end_jobs(sender: Client, receiver: Client) -> None:
    length = 64 << 20
    source = sender.alloc(length)
    _, grant = granted(receiver, length)
    sender.warm(grant.descriptor)
    jobs = [sender.write(source, grant.descriptor, imm=1) for _ in range(8)]
    ends = [job.cancel(WAIT_S) for job in reversed(jobs)]
    assert set(ends) <= {JobStatus.OK, JobStatus.CANCELLED}
    assert JobStatus.CANCELLED in ends
    jobs = [sender.write(source, grant.descriptor, imm=1, deadline_s=0.005) for _ in range(8)]
    ended = set()
    for job in jobs:
        with contextlib.suppress(transferd.JobFailed):
            job.wait(WAIT_S)
        ended.add(job.status)
    assert ended <= {JobStatus.OK, JobStatus.DEADLINE}
    assert JobStatus.DEADLINE in ended


def test_fault_of_a_cancelled_write_is_told_and_acknowledged(
    sender: Client, receiver: Client
) -> None:
    length = 64 << 20
    source = sender.alloc(length)
    _, grant = granted(receiver, length)
    sender.warm(grant.descriptor)
    jobs = [sender.write(source, grant.descriptor, imm=9) for _ in range(8)]
    assert JobStatus.CANCELLED in {job.cancel(WAIT_S) for job in reversed(jobs)}
    counter = receiver.counter(9)
    with pytest.raises(transferd.CounterFault):
        counter.wait(8, WAIT_S)
    done = sum(job.status is JobStatus.OK for job in jobs)
    # All losses are told in the end; then a retry on the same immediate works.
    deadline = time.monotonic() + WAIT_S
    while counter.lost < 8 - done and time.monotonic() < deadline:
        time.sleep(0.02)
    assert counter.lost == 8 - done
    counter.acknowledge()
    landed = counter.value
    for _ in range(2):
        assert sender.write(source[:1], grant.descriptor, imm=9).wait(WAIT_S) is JobStatus.OK
    counter.wait(landed + 2, WAIT_S)


def test_adopted_memory(shared_pair: Pair) -> None:
    with transferd.Client(shared_pair[0].socket) as a, transferd.Client(shared_pair[1].socket) as b:
        source = np.random.default_rng(1).random(8 << 20)
        target = np.zeros(8 << 20)
        address = target.ctypes.data
        sending, receiving = a.register(source), b.register(target)
        grant = receiving.grant(imms=[1])
        a.write(sending[8:], grant.descriptor, 8, imm=1).wait(WAIT_S)
        b.counter(1).wait(1, WAIT_S)
        assert target.ctypes.data == address
        assert target[0] == 0
        assert (target[1:] == source[1:]).all()


def test_adopted_memory_outlives_its_daemon(make_daemon: MakeDaemon) -> None:
    """A new session adopts it again, with all that is in it; one that lives keeps it."""
    daemon = make_daemon()
    memory = np.random.default_rng(2).random(8 << 20)
    expected, address = memory.copy(), memory.ctypes.data
    with transferd.Client(daemon.socket) as first:
        first.register(memory)
        with transferd.Client(daemon.socket) as other:
            with pytest.raises(transferd.InvalidRequest, match="shared already"):
                other.register(memory[:1000])
            with pytest.raises(transferd.InvalidRequest, match="shared already"):
                first.register(memory)
        daemon.kill()
        daemon.start()
        with transferd.Client(daemon.socket) as second:
            region = second.register(memory)
            assert memory.ctypes.data == address
            grant = region.grant(imms=[1])
            second.write(region[8:24], grant.descriptor, imm=1).wait(WAIT_S)
            second.counter(1).wait(1, WAIT_S)
    expected[0:2] = expected[1:3]
    assert (memory == expected).all()
    with transferd.Client(daemon.socket) as third:  # the second one was closed
        third.register(memory)
    assert (memory == expected).all()


def test_regions_come_and_go(shared_pair: Pair) -> None:
    with transferd.Client(shared_pair[0].socket) as client:
        for _ in range(1500):  # above the number of files that a session may share at once
            client.alloc(4096).close()


def test_asyncio(shared_pair: Pair, shared_memory: bool) -> None:
    async def main() -> None:
        async with (
            transferd.aio.Client(shared_pair[0].socket, shared_memory=shared_memory) as a,
            transferd.aio.Client(shared_pair[1].socket, shared_memory=shared_memory) as b,
        ):
            source, target = await a.alloc(1 << 20), await b.alloc(1 << 20)
            source.view[:] = os.urandom(1 << 20)
            grant = await target.grant(imms=range(4))
            await a.warm(grant.descriptor)
            jobs = await a.submit(
                [
                    transferd.Write(
                        src=source[i << 16 : (i + 1) << 16],
                        dst=grant.descriptor,
                        dst_offset=i << 16,
                        imm=1,
                    )
                    for i in range(16)
                ]
            )
            counter = await b.counter(1)
            await asyncio.gather(counter.wait(16, WAIT_S), *(job.wait(WAIT_S) for job in jobs))
            assert target.view == source.view
            called = asyncio.Event()
            job = await a.imm(grant.descriptor, 2)
            job.add_done_callback(lambda _: called.set())
            await asyncio.wait_for(called.wait(), WAIT_S)
            bad = await a.imm(grant.descriptor, 99)
            with pytest.raises(transferd.JobFailed):
                await bad
            await grant.revoke()

    asyncio.run(main())
