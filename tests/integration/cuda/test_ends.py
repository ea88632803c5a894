# SPDX-License-Identifier: Apache-2.0
"""GPU memory on real daemons, with a driver of host memory: how clients end, and what waits."""

from __future__ import annotations

import gc
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

import transferd
from transferd import Write
from transferd.native.names import JobStatus

from support import fakekernels
from support.cuda_memory import granted, memory
from support.waiting import WAIT_S, eventually

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from transferd import Client

    from support.daemon import DaemonProcess
    from support.fakecuda import FakeCuda

    Daemons = tuple[DaemonProcess, DaemonProcess]

pytestmark = pytest.mark.slow

OK, PENDING = JobStatus.OK, JobStatus.PENDING


def test_closing_waits_for_streams(
    cuda: FakeCuda, receiver: Client, shared_pair: Daemons, seeded: random.Random
) -> None:
    _, _, grant = granted(receiver, cuda)
    with transferd.Client(shared_pair[0].socket) as client:
        region = client.register(memory(cuda, seeded))
        watcher = client.watcher()
        job = client.arm(watcher, 1, Write(src=region[0:64], dst=grant.descriptor, imm=1))
        assert len(cuda.registered) == 2
    assert len(cuda.registered) == 1
    with pytest.raises(transferd.Unavailable):
        job.wait(WAIT_S)
    with pytest.raises(transferd.Unavailable):
        client.write(region[0:64], grant.descriptor, imm=1)


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_a_fence_waits_for_the_stream_of_what_it_ends(
    cuda: FakeCuda,
    sender: Client,
    receiver: Client,
    seeded: random.Random,
    background: ThreadPoolExecutor,
) -> None:
    source = memory(cuda, seeded)
    region = sender.register(source)
    target, _, grant = granted(receiver, cuda)
    sender.write(region[0:1], grant.descriptor, imm=2).wait(WAIT_S)
    cuda.held.clear()
    job = sender.write(region[0:64], grant.descriptor, imm=1)
    other = sender.write(region[64:128], grant.descriptor, 64, imm=2)
    fencing = background.submit(grant.fence, [1])
    with pytest.raises(TimeoutError):
        fencing.result(0.1)
    assert receiver.counter(1).faults == 0
    cuda.held.set()
    fencing.result(WAIT_S)
    assert target.view[0:64] == source.view[0:64]  # what it wrote was there when that answered
    with pytest.raises(transferd.JobFailed, match="owner fenced"):
        job.wait(WAIT_S)
    assert other.wait(WAIT_S) is OK
    assert (receiver.counter(1).value, receiver.counter(1).lost) == (0, 1)


def test_a_fence_says_when_a_stream_may_be_writing_yet(
    cuda: FakeCuda, sender: Client, receiver: Client
) -> None:
    region = sender.register(memory(cuda))
    _, _, grant = granted(receiver, cuda)
    sender.write(region[0:1], grant.descriptor, imm=2).wait(WAIT_S)
    cuda.held.clear()
    job = sender.write(region[0:64], grant.descriptor, imm=1)
    with pytest.raises(transferd.Conflict) as caught:
        grant.fence([1])
    assert caught.value.reason == "STILL_COPIED"
    assert not job.done()
    cuda.held.set()
    with pytest.raises(transferd.JobFailed, match="owner fenced"):
        job.wait(WAIT_S)
    grant.fence([1])
    host = receiver.alloc(4096).grant(imms=range(2))  # nobody was cut off for it
    assert sender.write(sender.alloc(4096), host.descriptor, imm=1).wait(WAIT_S) is OK


def test_a_fence_does_not_wait_for_a_trigger(
    cuda: FakeCuda, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    source = memory(cuda, seeded)
    region = sender.register(source)
    target, _, grant = granted(receiver, cuda)
    others = [granted(receiver, cuda) for _ in range(2)]
    with sender.watcher(device=True) as watcher:
        job = sender.arm(watcher, 1, Write(src=region[0:64], dst=grant.descriptor, imm=1))
        places = [(g.descriptor, 0, 0, 64) for _, _, g in others]
        many = sender.arm(watcher, 1, transferd.Scatter(src=region, targets=places, imm=1))
        grant.fence([1])
        with pytest.raises(transferd.JobFailed, match="owner fenced"):
            job.wait(WAIT_S)
        others[0][2].fence([1])
        watcher.bump()
        with pytest.raises(transferd.JobFailed, match="owner fenced"):
            many.wait(WAIT_S)
        receiver.counter(1).acknowledge()
        again = sender.arm(watcher, 1, Write(src=region[0:64], dst=grant.descriptor, imm=2))
        assert again.wait(WAIT_S) is OK
        assert others[0][0].view[0:64] == bytes(64)
        assert others[1][0].view[0:64] == source.view[0:64] == target.view[0:64]


def test_a_dead_writer_s_copies_hold_nobody_up_for_long(
    cuda: FakeCuda, receiver: Client, shared_pair: Daemons
) -> None:
    _, _, grant = granted(receiver, cuda)
    with transferd.Client(shared_pair[0].socket) as client:
        region = client.register(memory(cuda))
        client.write(region[0:1], grant.descriptor, imm=2).wait(WAIT_S)
        cuda.held.clear()
        client.write(region[0:64], grant.descriptor, imm=1)
        ring: Any = client._session
        ring._socket._socket.shutdown(socket.SHUT_RDWR)  # as the kernel does it
        with pytest.raises(transferd.CounterFault):
            receiver.counter(1).wait(1, WAIT_S)
        cuda.held.set()


def test_what_waits_for_streams_is_done_ahead(
    cuda: FakeCuda, sender: Client, receiver: Client, shared_pair: Daemons
) -> None:
    _, _, grant = granted(receiver, cuda)
    region = sender.register(memory(cuda))
    stream = cuda.stream()
    with sender.watcher(device=True) as watcher, transferd.Client(shared_pair[0].socket) as other:
        job = sender.arm(watcher, 1, Write(src=region[0:64], dst=grant.descriptor, imm=1))
        assert receiver.counter(1).device_ptr
        assert watcher.device_ptr
        receiver.counter(1).cuda_wait(1, stream)
        other.register(memory(cuda))
        with other.watcher(device=True) as word:
            word.cuda_bump(cuda.stream())
            eventually(lambda: word.value == 1, "the kernel runs")
        assert job.status is PENDING
        watcher.bump()
        assert job.wait(WAIT_S) is OK
    assert cuda.calls.count("cuModuleLoadData") == 1
    assert "cuModuleUnload" not in cuda.calls


def test_closing_leaves_behind_what_the_stream_of_another_holds_up(
    cuda: FakeCuda,
    sender: Client,
    receiver: Client,
    shared_pair: Daemons,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("transferd.client.cuda.gpu.LEAVE_S", 0.05)
    _, _, grant = granted(receiver, cuda)
    region = sender.register(memory(cuda))
    with sender.watcher() as watcher:
        job = sender.arm(watcher, 1, Write(src=region[0:64], dst=grant.descriptor, imm=1))
        with transferd.Client(shared_pair[0].socket) as other:
            copy = other.write(other.register(memory(cuda)), grant.descriptor, imm=1)
            assert copy.wait(WAIT_S) is OK
            before = set(cuda.registered)
        gc.collect()
        assert set(cuda.registered) == before
        for address in before:
            assert fakekernels.word(address).value  # still mapped
        watcher.bump()
        assert job.wait(WAIT_S) is OK
    eventually(lambda: len(cuda.registered) == len(before) - 1, "it is unregistered")


def test_the_end_lets_waiting_streams_go(cuda: FakeCuda, shared_pair: Daemons) -> None:
    stream = cuda.stream()
    with transferd.Client(shared_pair[0].socket) as client:
        client.counter(3).cuda_wait(5, stream)
        assert not cuda.done(stream)
    eventually(lambda: cuda.done(stream), "the stream goes on")
    assert len(cuda.registered) == 1  # whatever looks at it later finds it


def test_without_a_driver_host_memory_works(
    shared_pair: Daemons, monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda
) -> None:
    def none() -> None:
        raise transferd.Unavailable("no driver", reason="NO_CUDA")

    buffer = memory(cuda)
    monkeypatch.setattr("transferd.client.cuda.driver.load", none)
    with transferd.Client(shared_pair[0].socket) as client:
        with pytest.raises(transferd.Unavailable, match="no driver"):
            client.register(buffer)
        grant = client.alloc(4096).grant(imms=range(2))
        assert client.write(client.alloc(4096), grant.descriptor, imm=1).wait(WAIT_S) is OK
    with (
        transferd.Client(shared_pair[0].socket, shared_memory=False) as client,
        pytest.raises(transferd.Conflict, match="Unix socket"),
    ):
        client.register(buffer)
