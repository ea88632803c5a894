# SPDX-License-Identifier: Apache-2.0
"""Plans of GPU memory, and reads, on real daemons with a driver of host memory: a stream copies."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import transferd
import transferd.aio
from transferd import Read, Scatter, Write, WritePages
from transferd.client import errors
from transferd.native.names import JobStatus

from support.cuda_memory import LENGTH, MAP, granted, memory
from support.waiting import WAIT_S

if TYPE_CHECKING:
    import random

    from transferd import Client

    from support.daemon import DaemonProcess
    from support.fakecuda import DeviceBuffer, FakeCuda

    Daemons = tuple[DaemonProcess, DaemonProcess]

pytestmark = pytest.mark.slow

OK, PENDING, CANCELLED = JobStatus.OK, JobStatus.PENDING, JobStatus.CANCELLED
LARGE = 1 << 20
HEAD_BYTES = 64


@pytest.fixture
def source(cuda: FakeCuda, seeded: random.Random) -> DeviceBuffer:
    return memory(cuda, seeded)


def names(cuda: FakeCuda) -> list[str]:
    """The kernels that were launched."""
    return [name for name, _ in cuda.launches]


@pytest.mark.parametrize("length", [0, 64, LARGE])
def test_a_plan_is_launched_again_and_again(
    cuda: FakeCuda, sender: Client, receiver: Client, source: DeviceBuffer, length: int
) -> None:
    target, _, grant = granted(receiver, cuda)
    write = Write(src=sender.register(source)[64 : 64 + length], dst=grant.descriptor, imm=1)
    with sender.plan(write) as plan:
        for count in range(1, 4):
            target.view[:] = bytes(LENGTH)
            job = plan.launch()
            assert job.wait(WAIT_S) is OK
            assert str(job.path).startswith("cuda")
            assert receiver.counter(1).value == count
            assert target.view[0:length] == source.view[64 : 64 + length]
        with pytest.raises(transferd.InvalidRequest, match="table=True"):
            assert plan.device_ptr
    assert cuda.copied == (3 if length == LARGE else 0)


def test_the_rows_of_a_write_are_read_by_the_stream(
    cuda: FakeCuda, sender: Client, receiver: Client, source: DeviceBuffer
) -> None:
    target, _, grant = granted(receiver, cuda)
    region = sender.register(source)
    write = Write(src=region[4096:8192], dst=grant.descriptor, imm=1)
    with sender.plan(write, table=True) as plan:
        assert plan.table is not None
        for row in ((0, 0, 4096), (96, 8000, 100), (4000, LENGTH - 96, 96)):
            plan.table[0, 0], plan.table[0, 1], plan.table[0, 2] = row
            job = plan.launch()
            assert job.wait(WAIT_S) is OK
            at, to, size = row
            assert target.view[to : to + size] == source.view[4096 + at : 4096 + at + size]
        plan.count = 0
        assert plan.launch().wait(WAIT_S) is OK
        assert receiver.counter(1).value == 3
        plan.count = 1
        before = bytes(target.view)
        for row in ((4095, 0, 2), (0, LENGTH, 1), (1 << 63, 0, 1), (0, 0, 1 << 63)):
            plan.table[0, 0], plan.table[0, 1], plan.table[0, 2] = row
            with pytest.raises(transferd.JobFailed, match="INVALID"):
                plan.launch().wait(WAIT_S)
        assert bytes(target.view) == before  # what no daemon has looked at yet is not copied
    assert set(names(cuda)) == {"tfd_plan_slices"}


def test_pages_of_a_plan(
    cuda: FakeCuda, sender: Client, receiver: Client, source: DeviceBuffer
) -> None:
    target, _, grant = granted(receiver, cuda)
    pages = WritePages(
        src=sender.register(source), src_pages=np.arange(8), dst=grant.descriptor,
        dst_pages=np.arange(8), page_bytes=4096, imm=1, src_offset=16,
    )  # fmt: skip
    with sender.plan(pages) as plan:
        rows = np.asarray(plan.table)
        rows[:] = [(3, 7), (5, 1), (2, 2), *[(1023, 1023)] * 5]
        plan.count = 3
        assert plan.launch().wait(WAIT_S) is OK
        assert receiver.counter(1).value == 3
        for src, dst in ((3, 7), (5, 1), (2, 2)):
            at = 16 + 4096 * src
            assert target.view[4096 * dst : 4096 * dst + 4096] == source.view[at : at + 4096]
        plan.count = 4  # the fourth ends 16 bytes behind its region
        with pytest.raises(transferd.JobFailed, match="INVALID"):
            plan.launch().wait(WAIT_S)
        assert not any(target.view[4096 * 1023 :])
    assert set(names(cuda)) == {"tfd_plan_pages"}


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("rows", [False, True], ids=["list", "array"])
def test_a_scatter_of_a_plan(
    cuda: FakeCuda, sender: Client, receiver: Client, source: DeviceBuffer, rows: bool, table: bool
) -> None:
    targets = [granted(receiver, cuda, device) for device in (0, 1)]
    region = sender.register(source)
    group = sender.peer_group([grant.descriptor for _, _, grant in targets])
    places: Any = np.array([(1, 0, 64, 100), (0, 4096, 0, 5000), (1, 64, 4096, 64)])
    if not rows:
        places = [(group[m], src, dst, size) for m, src, dst, size in places.tolist()]
    scatter = Scatter(src=region, targets=places, imm=2, group=group if rows else None)
    with sender.plan(scatter, table=table) as plan:
        del places
        for count in (1, 2):
            assert plan.launch().wait(WAIT_S) is OK
            assert receiver.counter(2).value == 3 * count
        assert targets[1][0].view[64:164] == source.view[0:100]
        assert targets[0][0].view[0:5000] == source.view[4096:9096]
        assert targets[1][0].view[4096:4160] == source.view[64:128]
        if table:
            assert plan.table is not None
            plan.table[1, 1], plan.count = 100, 2
            assert plan.launch().wait(WAIT_S) is OK
            assert targets[0][0].view[100:5100] == source.view[4096:9096]
        else:
            assert plan.table is None
    assert set(names(cuda)) == {"tfd_plan_slices"}


def test_a_kernel_fills_the_table_and_launches(
    cuda: FakeCuda, sender: Client, receiver: Client, source: DeviceBuffer
) -> None:
    """As in a graph that is replayed: every bump starts the next launch that was armed."""
    target, _, grant = granted(receiver, cuda)
    pages = WritePages(
        src=sender.register(source), src_pages=range(4), dst=grant.descriptor, dst_pages=range(4),
        page_bytes=64, imm=1, count="job",
    )  # fmt: skip
    stream = cuda.stream()
    with sender.plan(pages) as plan, sender.watcher(device=True) as watcher:
        address = plan.device_ptr
        assert watcher.device_ptr
        head = ctypes.c_uint32.from_address(address)
        rows = (ctypes.c_uint32 * 8).from_address(address + HEAD_BYTES)
        jobs = [sender.arm(watcher, value, plan) for value in range(1, 5)]
        for step, job in enumerate(jobs):
            assert job.status is PENDING

            def fill(step: int = step) -> None:
                head.value = 2
                rows[0:4] = [step, 3 - step, step + 4, step + 8]

            cuda._enqueue(stream, fill)
            watcher.cuda_bump(stream)
            assert job.wait(WAIT_S) is OK
            assert str(job.path).startswith("cuda")
            for src, dst in ((step, 3 - step), (step + 4, step + 8)):
                assert (
                    target.view[64 * dst : 64 * dst + 64] == source.view[64 * src : 64 * src + 64]
                )
        assert receiver.counter(1).value == 4


def test_an_armed_launch_that_is_cancelled_copies_nothing(
    cuda: FakeCuda, sender: Client, receiver: Client, source: DeviceBuffer
) -> None:
    target, _, grant = granted(receiver, cuda)
    write = Write(src=sender.register(source)[0:64], dst=grant.descriptor, imm=1)
    with sender.plan(write, table=True) as plan, sender.watcher(device=True) as watcher:
        one, two = (sender.arm(watcher, value, plan) for value in (1, 2))
        assert one.cancel(WAIT_S) is CANCELLED
        watcher.cuda_bump(cuda.stream(), 1)
        assert two.status is PENDING
        grant.fence([1])
        with pytest.raises(transferd.JobFailed, match="owner fenced"):
            two.wait(WAIT_S)
    assert not any(target.view[0:64])


def test_a_plan_by_a_stream_of_the_caller(
    cuda: FakeCuda, sender: Client, receiver: Client, source: DeviceBuffer
) -> None:
    target, _, grant = granted(receiver, cuda)
    region, stream = sender.register(source), cuda.stream()
    with sender.plan(Write(src=region[0:64], dst=grant.descriptor, imm=1, stream=stream)) as plan:
        ran = []
        cuda._enqueue(stream, lambda: ran.append(bytes(target.view[0:64])))
        assert plan.launch().wait(WAIT_S) is OK
        assert ran == [bytes(64)]
    host = receiver.alloc(4096).grant(imms=range(2))
    with pytest.raises(transferd.InvalidRequest, match="stream="):
        sender.plan(Write(src=region[0:64], dst=host.descriptor, imm=1, stream=stream))


def test_a_plan_in_a_batch(
    cuda: FakeCuda, sender: Client, receiver: Client, source: DeviceBuffer
) -> None:
    _, _, grant = granted(receiver, cuda)
    region = sender.register(source)
    with sender.plan(Write(src=region[0:64], dst=grant.descriptor, imm=1)) as plan:
        jobs = sender.submit([plan, transferd.Imm(dst=grant.descriptor, imm=2), plan])
        assert {job.wait(WAIT_S) for job in jobs} == {OK}
        assert (receiver.counter(1).value, receiver.counter(2).value) == (2, 1)


def test_what_no_stream_may_copy_is_kept_for_the_daemon(
    cuda: FakeCuda, sender: Client, receiver: Client, source: DeviceBuffer
) -> None:
    """And says so when it is made: nothing here reaches GPU memory but a stream."""
    region = sender.register(source)
    _, far, _ = granted(receiver, cuda)
    unmapped = far.grant(imms=range(2))
    for job in (
        Write(src=region[0:64], dst=unmapped.descriptor, imm=1),
        WritePages(
            src=region, src_pages=[0], dst=unmapped.descriptor, dst_pages=[0], page_bytes=64, imm=1
        ),
    ):
        with pytest.raises(transferd.JobFailed, match="grant map"):
            sender.plan(job)


def test_the_owner_takes_a_plan_s_memory_back(
    cuda: FakeCuda, sender: Client, receiver: Client, source: DeviceBuffer
) -> None:
    _, _, grant = granted(receiver, cuda)
    with sender.plan(Write(src=sender.register(source)[0:64], dst=grant.descriptor, imm=1)) as plan:
        assert plan.launch().wait(WAIT_S) is OK
        grant.revoke()
        for _ in range(2):
            with pytest.raises(transferd.Conflict) as caught:
                plan.launch()
            assert caught.value.reason == "GRANT_REVOKED"


# ---- reads ----


@pytest.mark.parametrize("device", [0, 1], ids=["same-gpu", "other-gpu"])
@pytest.mark.parametrize("length", [0, 1, 4096, LARGE, LENGTH])
def test_a_read_is_copied(
    cuda: FakeCuda,
    sender: Client,
    receiver: Client,
    seeded: random.Random,
    source: DeviceBuffer,
    length: int,
    device: int,
) -> None:
    far, region, _ = granted(receiver, cuda, device)
    far.view[:] = seeded.randbytes(LENGTH)
    grant = region.grant(rights={"read", "map"})
    here = sender.register(source)
    start = min(96, LENGTH - length)
    job = sender.read(grant.descriptor, here[start : start + length], src_offset=0)
    assert job.wait(WAIT_S) is OK
    assert str(job.path).startswith("cuda") == bool(length)
    assert source.view[start : start + length] == far.view[0:length]
    with pytest.raises(transferd.InvalidRequest, match="past the"):
        sender.read(grant.descriptor, here[0:64], src_offset=LENGTH - 63)


def test_reads_that_wait_and_are_kept(
    cuda: FakeCuda, sender: Client, receiver: Client, seeded: random.Random, source: DeviceBuffer
) -> None:
    far, region, _ = granted(receiver, cuda)
    far.view[:] = seeded.randbytes(LENGTH)
    grant = region.grant(rights={"read", "map"})
    read = Read(src=grant.descriptor, dst=sender.register(source)[0:64], src_offset=128)
    with sender.watcher(device=True) as watcher, sender.plan(read) as plan:
        job = sender.arm(watcher, 1, read)
        before = bytes(source.view[0:64])
        assert job.status is PENDING
        watcher.cuda_bump(cuda.stream())
        assert job.wait(WAIT_S) is OK
        assert before != source.view[0:64] == far.view[128:192]
        far.view[128:192] = bytes(64)
        assert plan.launch().wait(WAIT_S) is OK
        assert not any(source.view[0:64])
        stream = cuda.stream()
        by_stream = sender.read(grant.descriptor, sender.register(source)[0:64], 192, stream=stream)
        assert by_stream.wait(WAIT_S) is OK
        assert source.view[0:64] == far.view[192:256]


def test_reads_need_both_rights(
    cuda: FakeCuda, sender: Client, receiver: Client, source: DeviceBuffer
) -> None:
    _, region, _ = granted(receiver, cuda)
    here = sender.register(source)
    only_map, only_read = region.grant(rights=MAP), region.grant(rights={"read"})
    with pytest.raises(errors.JobDenied):
        sender.read(only_map.descriptor, here[0:64]).wait(WAIT_S)
    with pytest.raises(transferd.JobFailed, match="grant map"):
        sender.read(only_read.descriptor, here[0:64]).wait(WAIT_S)
    with pytest.raises(transferd.InvalidRequest, match="dst is host memory"):
        sender.read(only_map.descriptor, sender.alloc(64), stream=cuda.stream())


async def test_asyncio(cuda: FakeCuda, shared_pair: Daemons, seeded: random.Random) -> None:
    async with (
        transferd.aio.Client(shared_pair[0].socket) as here,
        transferd.aio.Client(shared_pair[0].socket) as there,
    ):
        source, target = memory(cuda, seeded), memory(cuda)
        far = await there.register(target)
        grant = await far.grant(rights={"write", "read", "map"}, imms=range(2))
        region = await here.register(source)
        write = Write(src=region[0:64], dst=grant.descriptor, imm=1)
        async with await here.plan(write) as plan:
            job = await plan.launch()
            assert await job.wait(WAIT_S) is OK
        assert target.view[0:64] == source.view[0:64]
        job = await here.read(grant.descriptor, region[64:128], 0)
        assert await job.wait(WAIT_S) is OK
        assert source.view[64:128] == source.view[0:64]
