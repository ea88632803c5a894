# SPDX-License-Identifier: Apache-2.0
"""GPU memory on real daemons, with a driver of host memory: what streams copy, and what ends it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import transferd
import transferd.aio
from transferd import Write, WritePages
from transferd.client.cuda.driver import CudaError
from transferd.native.names import JobStatus

from support import cuda_peer
from support.cuda_memory import LENGTH, MAP, granted, memory
from support.fakecuda import CHUNK, DeviceBuffer, FakeCuda
from support.waiting import WAIT_S, eventually

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from transferd import Client

    from support.daemon import DaemonProcess

    Daemons = tuple[DaemonProcess, DaemonProcess]

pytestmark = pytest.mark.slow

OK, CANCELLED, PENDING = JobStatus.OK, JobStatus.CANCELLED, JobStatus.PENDING
LARGE = 1 << 20  # from here on a write is one copy by the driver


def run_forked(call: Callable[[], int]) -> int:
    """Runs a call in a forked child; gives its status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads are what this is about
        pid = os.fork()
    if not pid:
        status = 1
        try:
            status = call()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("device", [0, 1], ids=["same-gpu", "other-gpu"])
@pytest.mark.parametrize("length", [0, 1, 4096, LARGE - 1, LARGE, LENGTH])
def test_a_write_is_copied_and_counted(
    cuda: FakeCuda,
    sender: Client,
    receiver: Client,
    seeded: random.Random,
    length: int,
    device: int,
) -> None:
    source = memory(cuda, seeded)
    target, _, grant = granted(receiver, cuda, device)
    job = sender.write(src=sender.register(source)[0:length], dst=grant.descriptor, imm=1)
    assert job.wait(WAIT_S) is OK
    assert str(job.path) == "cuda, 1 rail"
    assert job.result is not None
    assert job.result.bytes == length
    receiver.counter(1).wait(1, WAIT_S)
    assert target.view[:length] == source.view[:length]
    assert not any(target.view[length:])
    assert cuda.copied == (length >= LARGE)


@pytest.mark.parametrize("count", ["page", "job"])
def test_pages_of_a_part(
    cuda: FakeCuda, sender: Client, receiver: Client, seeded: random.Random, count: str
) -> None:
    source = memory(cuda, seeded)
    target, region, _ = granted(receiver, cuda)
    grant = region.grant(4096, 1 << 20, rights=MAP, imms=range(4))
    numbers = np.random.default_rng(seeded.randrange(1 << 30)).permutation(256)
    src_pages, dst_pages = numbers.astype(np.int64), numbers[::-1].astype(np.uint32)
    part = sender.register(source)[8192 : 8192 + (2 << 20)]
    job = sender.write_pages(
        part, src_pages, grant.descriptor, dst_pages, 1000, imm=2, src_stride=8192, src_offset=16,
        dst_stride=4000, dst_offset=96, count=count,
    )  # fmt: skip
    assert job.wait(WAIT_S) is OK
    receiver.counter(2).wait(256 if count == "page" else 1, WAIT_S)
    for src, dst in zip(src_pages.tolist(), dst_pages.tolist(), strict=True):
        at, to = 8192 + 16 + src * 8192, 4096 + 96 + dst * 4000
        assert target.view[to : to + 1000] == source.view[at : at + 1000]
    assert [name for name, _ in cuda.launches] == ["tfd_pages"]
    none = sender.write_pages(part, [], grant.descriptor, [], 1000, imm=2, count=count)
    assert none.wait(WAIT_S) is OK


@pytest.mark.parametrize("rows", [False, True], ids=["list", "array"])
def test_scatter_over_devices(
    cuda: FakeCuda, sender: Client, receiver: Client, seeded: random.Random, rows: bool
) -> None:
    source = memory(cuda, seeded)
    targets = [granted(receiver, cuda, device) for device in (0, 1)]
    region = sender.register(source)[4096:]
    group = sender.peer_group([grant.descriptor for _, _, grant in targets])
    wanted = [(i % 2, 100 * i, 64 * i, 50 + i) for i in range(40)]
    what: Any = np.array(wanted) if rows else wanted
    assert sender.scatter(region, what, imm=3, group=group).wait(WAIT_S) is OK
    receiver.counter(3).wait(40, WAIT_S)
    for i, src, dst, length in wanted:
        at = 4096 + src
        assert targets[i][0].view[dst : dst + length] == source.view[at : at + length]
    wanted[7] = (1, 0, LENGTH - 10, 11)
    what = np.array(wanted) if rows else wanted
    with pytest.raises(transferd.InvalidRequest, match="entry 7"):
        sender.scatter(region, what, imm=3, group=group)


def test_what_no_stream_may_copy_goes_by_the_daemon(
    cuda: FakeCuda, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    source = sender.register(memory(cuda, seeded))
    _, region, grant = granted(receiver, cuda)
    no_map = region.grant(rights={"write"}, imms=range(4))
    host = receiver.alloc(4096).grant(imms=range(4))
    for descriptor in (no_map.descriptor, host.descriptor):
        with pytest.raises(transferd.InvalidRequest, match="no path to GPU memory"):
            sender.write(source[0:64], descriptor, imm=1).wait(WAIT_S)
    with pytest.raises(transferd.InvalidRequest, match="past the"):
        sender.write(source, grant.descriptor, 1, imm=1)
    stream = cuda.stream()
    with pytest.raises(transferd.InvalidRequest, match="this is none"):
        sender.write(source[0:64], no_map.descriptor, imm=1, stream=stream)
    with pytest.raises(transferd.InvalidRequest, match="host memory"):
        sender.write(sender.alloc(64), grant.descriptor, imm=1, stream=stream)
    with pytest.raises(transferd.InvalidRequest, match="cannot read"):
        _ = source.view
    assert not cuda.launches


def test_a_batch_keeps_its_order_and_its_parts(
    cuda: FakeCuda, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    source = sender.register(memory(cuda, seeded))
    target, _, grant = granted(receiver, cuda)
    host = sender.alloc(4096)
    far = receiver.alloc(4096).grant(imms=range(8))
    jobs = sender.submit(
        [
            Write(src=host, dst=far.descriptor, imm=1),
            Write(src=source[0:64], dst=grant.descriptor, imm=1),
            WritePages(
                src=source, src_pages=[1], dst=grant.descriptor, dst_pages=[1], page_bytes=64, imm=1
            ),
            Write(src=host, dst=far.descriptor, imm=1),
        ]
    )
    assert [job.wait(WAIT_S) for job in jobs] == [OK] * 4
    assert [job.path.provider for job in jobs if job.path] == ["local", "cuda", "cuda", "local"]
    assert any(target.view[64:128])


def test_streams_of_the_callers(
    cuda: FakeCuda, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    source = sender.register(memory(cuda, seeded))
    _, _, grant = granted(receiver, cuda)

    class Stream:
        def __cuda_stream__(self) -> tuple[int, int]:
            return 0, number

    for _ in range(100):  # more than there are watchers
        number = cuda.stream()
        assert sender.write(source[0:64], grant.descriptor, imm=1, stream=Stream()).wait(WAIT_S)
    cuda.capturing.add(number)
    with pytest.raises(transferd.InvalidRequest, match="cuda_bump"):
        sender.write(source[0:64], grant.descriptor, imm=1, stream=number)
    with pytest.raises(transferd.InvalidRequest, match="another device"):
        sender.write(source[0:64], grant.descriptor, imm=1, stream=cuda.stream(1))
    with pytest.raises(transferd.InvalidRequest, match="CUstream"):
        sender.write(source[0:64], grant.descriptor, imm=1, stream="fast")


def test_armed_copies(
    cuda: FakeCuda, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    source = memory(cuda, seeded)
    region = sender.register(source)
    target, _, grant = granted(receiver, cuda)
    with sender.watcher() as watcher:
        later = sender.arm(watcher, 2, Write(src=region[0:64], dst=grant.descriptor, imm=1))
        sooner = sender.arm(
            watcher, 1, Write(src=region[64:128], dst=grant.descriptor, dst_offset=64, imm=1)
        )
        stopped = sender.arm(
            watcher, 3, Write(src=region[128:192], dst=grant.descriptor, dst_offset=128, imm=1)
        )
        watcher.bump()
        assert sooner.wait(WAIT_S) is OK
        assert (later.status, bytes(target.view[0:64])) == (PENDING, bytes(64))
        assert stopped.cancel(WAIT_S) is CANCELLED
        watcher.bump(2)
        assert later.wait(WAIT_S) is OK
        assert target.view[0:128] == source.view[0:128]
        kept = sender.arm(
            watcher, 9, Write(src=region[128:192], dst=grant.descriptor, dst_offset=128, imm=1)
        )
    eventually(kept.done, "its end")
    assert kept.status is CANCELLED
    assert not any(target.view[128:192])  # its stream has gone past it


def test_a_copy_waits_for_what_streams_can_compare(
    cuda: FakeCuda, sender: Client, receiver: Client
) -> None:
    region = sender.register(memory(cuda))
    _, _, grant = granted(receiver, cuda)
    with sender.watcher() as watcher:
        copy = Write(src=region[0:64], dst=grant.descriptor, imm=1)
        with pytest.raises(transferd.InvalidRequest, match=r"2\^63 - 1"):
            sender.arm(watcher, 1 << 63, copy)
        job = sender.arm(watcher, (1 << 63) - 1, copy)
    eventually(job.done, "its end")
    assert job.status is CANCELLED


def test_armed_copies_that_a_device_starts(
    cuda: FakeCuda, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    region = sender.register(memory(cuda, seeded))
    _, _, grant = granted(receiver, cuda)
    stream = cuda.stream()
    with sender.watcher(device=True) as watcher:
        job = sender.arm(watcher, 3, Write(src=region[0:64], dst=grant.descriptor, imm=1))
        receiver.counter(1).cuda_wait(1, stream)
        other = cuda.stream()
        watcher.cuda_bump(other)
        assert (job.status, cuda.done(stream)) == (PENDING, False)
        watcher.cuda_bump(other, 2)
        assert job.wait(WAIT_S) is OK
        eventually(lambda: cuda.done(stream), "the stream goes on")
        assert watcher.device_ptr - receiver.counter(1).device_ptr != 0
    with sender.watcher() as watcher, pytest.raises(transferd.InvalidRequest, match="device=True"):
        watcher.cuda_bump(stream)


def test_too_many_wait_for_different_words(
    cuda: FakeCuda, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    region = sender.register(memory(cuda, seeded))
    _, _, grant = granted(receiver, cuda)
    one = Write(src=region[0:64], dst=grant.descriptor, imm=1)
    watchers = [sender.watcher() for _ in range(5)]
    jobs = [sender.arm(watcher, 1, one) for watcher in watchers[:4]]
    with pytest.raises(transferd.QuotaExceeded, match="4 streams"):
        sender.arm(watchers[4], 1, one)
    watchers[0].bump()
    assert jobs[0].wait(WAIT_S) is OK
    jobs.append(sender.arm(watchers[4], 1, one))
    for watcher in watchers[1:]:
        watcher.bump()
    assert [job.wait(WAIT_S) for job in jobs] == [OK] * 5


def test_threads_arm_at_once(
    cuda: FakeCuda, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    region = sender.register(memory(cuda, seeded))
    _, _, grant = granted(receiver, cuda)
    watchers = [sender.watcher() for _ in range(4)]

    def arm(watcher: transferd.Watcher) -> list[transferd.Job]:
        one = Write(src=region[0:64], dst=grant.descriptor, imm=1)
        return [sender.arm(watcher, value, one) for value in range(1, 13)]

    with ThreadPoolExecutor(4) as pool:
        jobs = list(pool.map(arm, watchers))
    for watcher, armed in reversed(list(zip(watchers, jobs, strict=True))):
        watcher.bump(12)  # none waits for another's
        assert {job.wait(WAIT_S) for job in armed} == {OK}


def test_a_forked_child_has_nothing_of_it(
    cuda: FakeCuda, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    region = sender.register(memory(cuda, seeded))
    _, _, grant = granted(receiver, cuda)
    assert sender.write(region[0:64], grant.descriptor, imm=1).wait(WAIT_S) is OK

    def child() -> int:
        with pytest.raises(transferd.Unavailable, match="fork"):
            sender.write(region[0:64], grant.descriptor, imm=1)
        region.close()
        return 0

    assert run_forked(child) == 0
    assert sender.write(region[0:64], grant.descriptor, imm=1).wait(WAIT_S) is OK
    assert receiver.counter(1).value == 2


def test_a_cancelled_copy_is_quiet_before_its_end_is_told(
    cuda: FakeCuda, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    source = memory(cuda, seeded)
    region = sender.register(source)
    target, _, grant = granted(receiver, cuda)
    sender.write(region[0:1], grant.descriptor, imm=1).wait(WAIT_S)
    cuda.held.clear()
    job = sender.write(region[0:64], grant.descriptor, imm=1, deadline_s=0.05)
    with pytest.raises(transferd.CounterFault):
        receiver.counter(1).wait(2, WAIT_S)  # so the daemon has ended it
    assert not job.done()
    with pytest.raises(transferd.WaitTimeout):
        job.wait(0.05)
    cuda.held.set()
    with pytest.raises(transferd.JobFailed, match="DEADLINE"):
        job.wait(WAIT_S)
    assert target.view[0:64] == source.view[0:64]


def test_a_lost_context_ends_its_jobs_and_leaves_host_memory(
    cuda: FakeCuda, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    region = sender.register(memory(cuda, seeded))
    _, _, grant = granted(receiver, cuda)
    sender.write(region[0:1], grant.descriptor, imm=1).wait(WAIT_S)
    cuda.held.clear()
    job = sender.write(region[0:64], grant.descriptor, imm=1)
    cuda.break_context(0)
    cuda.held.set()
    with pytest.raises(transferd.JobFailed) as caught:
        job.wait(WAIT_S)
    assert caught.value.status == CANCELLED
    assert "700" in "".join(caught.value.__notes__)
    with pytest.raises((CudaError, transferd.Unavailable)):
        sender.write(region[0:64], grant.descriptor, imm=1)
    far = receiver.alloc(4096).grant(imms=range(8))
    assert sender.write(sender.alloc(4096), far.descriptor, imm=2).wait(WAIT_S) is OK


def test_a_refused_launch_is_an_error_and_no_more(
    cuda: FakeCuda, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    region = sender.register(memory(cuda, seeded))
    _, _, grant = granted(receiver, cuda)
    cuda.fail("cuLaunchKernel", 2)
    with pytest.raises(CudaError, match="no memory left"):
        sender.write(region[0:64], grant.descriptor, imm=1)
    receiver.counter(1).acknowledge()
    job = sender.write(region[0:64], grant.descriptor, imm=1)
    assert job.wait(WAIT_S) is OK


def test_many_in_flight(
    cuda: FakeCuda, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    region = sender.register(memory(cuda, seeded))
    _, _, grant = granted(receiver, cuda)
    jobs = [
        sender.write(
            region[64 * i : 64 * i + 64], grant.descriptor, 64 * i, imm=1,
            priority="latency" if i % 3 else "bulk",
        )
        for i in range(1000)
    ]  # fmt: skip
    receiver.counter(1).wait(1000, WAIT_S)
    assert {job.wait(WAIT_S) for job in jobs} == {OK}


def test_large_writes_take_turns(
    cuda: FakeCuda, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    source = memory(cuda, seeded)
    region = sender.register(source)
    target, _, grant = granted(receiver, cuda)
    lengths = [64, LARGE, LARGE, 64, LARGE]
    streams = []
    for length in lengths:
        assert sender.write(region[0:length], grant.descriptor, imm=1).wait(WAIT_S) is OK
        streams.append(len(cuda.streams))
    assert streams == [1, 2, 2, 2, 2]
    assert cuda.copied == 3
    assert target.view[0:LARGE] == source.view[0:LARGE]


def test_streams_without_a_watcher_left(
    cuda: FakeCuda, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    region = sender.register(memory(cuda, seeded))
    _, _, grant = granted(receiver, cuda)
    assert sender.write(region[0:64], grant.descriptor, imm=1).wait(WAIT_S) is OK
    with contextlib.ExitStack() as taken:
        with contextlib.suppress(transferd.QuotaExceeded):
            while True:
                taken.enter_context(sender.watcher())
        for _ in range(3):
            assert sender.write(region[0:LARGE], grant.descriptor, imm=1).wait(WAIT_S) is OK
    assert len(cuda.streams) == 1


def test_a_second_tensor_asks_nobody(cuda: FakeCuda, sender: Client) -> None:
    buffer = memory(cuda)
    first = sender.register(buffer)
    cuda.calls.clear()
    second = sender.register(DeviceBuffer(cuda, buffer.address + 4096, 4096))
    assert cuda.calls == ["cuPointerGetAttribute"]
    assert (second.handle, second.start, len(second)) == (first.handle, 4096, 4096)
    first.close()
    second.grant(rights=MAP)
    second.close()
    address = buffer.address
    cuda.free(address)
    with pytest.raises(transferd.InvalidRequest, match="freed"):
        sender.register(buffer)


def test_another_process(
    cuda: FakeCuda, sender: Client, shared_pair: Daemons, seeded: random.Random
) -> None:
    source = memory(cuda, seeded)
    region = sender.register(source)
    with cuda_peer.running(shared_pair[0].socket) as peer:
        job = sender.write(region[0:4096], peer.descriptor, 100, imm=1)
        assert job.wait(WAIT_S) is OK
        assert peer.ask("wait", 1, 1) == 1
        assert peer.bytes_at(100, 4096) == source.view[0:4096]
        with sender.map(peer.descriptor) as pointer:
            assert cuda.bytes_at(pointer, pointer.length)[100:4196] == source.view[0:4096]
            assert peer.ask("revoke") == "STILL_MAPPED"
        assert any(name == "cuIpcOpenMemHandle_v2" for name in cuda.calls)
        eventually(lambda: "cuIpcCloseMemHandle" in cuda.calls, "it is unmapped")
        assert peer.ask("revoke") == "OK"
        with pytest.raises(transferd.JobFailed, match="revoked"):
            sender.write(region[0:64], peer.descriptor, imm=1).wait(WAIT_S)
    assert len([m for m in cuda.memory.values() if m.imported]) == 0


def test_closing_a_region_that_is_still_mapped(
    cuda: FakeCuda, sender: Client, receiver: Client
) -> None:
    _, region, grant = granted(receiver, cuda)
    sender.register(memory(cuda))
    pointer = sender.map(grant.descriptor)
    with pytest.raises(transferd.Conflict) as caught:
        region.close()
    assert caught.value.reason == "STILL_MAPPED"
    pointer.close()
    region.close()
    with pytest.raises(transferd.InvalidRequest, match="closed"):
        region.grant(rights=MAP)
    with pytest.raises(transferd.AccessDenied, match="cannot be mapped"):
        sender.map(grant.descriptor)


def test_warming_up(
    cuda: FakeCuda, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    region = sender.register(memory(cuda, seeded))
    _, _, grant = granted(receiver, cuda)
    sender.warm(grant.descriptor)
    cuda.calls.clear()
    for length in (64, LENGTH, LENGTH):  # long ones take turns on two streams
        assert sender.write(region[0:length], grant.descriptor, imm=1).wait(WAIT_S) is OK
    assert set(cuda.calls) <= {
        "cuCtxGetCurrent", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuLaunchKernel",
        "cuMemcpyDtoDAsync_v2", "cuStreamWriteValue64_v2",
        "cuThreadExchangeStreamCaptureMode", "cuStreamQuery",
    }  # fmt: skip


def test_the_owner_is_killed(
    cuda: FakeCuda, sender: Client, shared_pair: Daemons, seeded: random.Random
) -> None:
    region = sender.register(memory(cuda, seeded))
    with cuda_peer.running(shared_pair[0].socket) as peer:
        assert sender.write(region[0:64], peer.descriptor, imm=1).wait(WAIT_S) is OK
        names = [m.name for m in cuda.memory.values() if m.imported]
        peer.process.kill()
        eventually(
            lambda: not any(m.imported for m in cuda.memory.values()), "its memory is unmapped"
        )
    for name in names:
        (Path("/dev/shm") / name).unlink()


def test_vmm_memory_is_exported_by_chunks(cuda: FakeCuda, sender: Client) -> None:
    base = cuda.vmm(3)
    # Its fds are none of NVIDIA's driver: the daemon refuses what it cannot know.
    with pytest.raises(transferd.InvalidRequest, match="chunk 0 is none"):
        sender.register(DeviceBuffer(cuda, base + CHUNK - 64, 128))
    assert cuda.calls.count("cuMemExportToShareableHandle") == 2


async def test_asyncio(
    cuda: FakeCuda, receiver: Client, shared_pair: Daemons, seeded: random.Random
) -> None:
    source = memory(cuda, seeded)
    target, _, grant = granted(receiver, cuda)
    async with transferd.aio.Client(shared_pair[0].socket) as client:
        region = await client.register(source)
        jobs = [
            await client.write(region[0:4096], grant.descriptor, imm=1),
            await client.write_pages(region, [2], grant.descriptor, [2], 4096, imm=1),
        ]
        async with asyncio.timeout(WAIT_S):
            assert [await job for job in jobs] == [OK, OK]
        pointer = await client.map(grant.descriptor)
        assert pointer == target.address
        pointer.close()
        await region.close()
    assert target.view[8192:12288] == source.view[8192:12288]
