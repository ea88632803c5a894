# SPDX-License-Identifier: Apache-2.0
"""GPU memory on real daemons, with a driver of host memory: how clients end, and what waits."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

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


@pytest.fixture
def sender(cuda: FakeCuda, shared_pair: Daemons) -> Iterator[Client]:
    with transferd.Client(shared_pair[0].socket, name="sender") as made:
        yield made


@pytest.fixture
def receiver(cuda: FakeCuda, shared_pair: Daemons) -> Iterator[Client]:
    with transferd.Client(shared_pair[0].socket, name="receiver") as made:
        yield made


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
