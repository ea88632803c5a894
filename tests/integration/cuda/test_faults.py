# SPDX-License-Identifier: Apache-2.0
"""GPU memory that is not what its client says, and clients that go while copies run.

With a driver of host memory; what the real one says is in tests/gpu/test_faults.py. What is wrong
with memory that is to be registered: tests/unit/test_cuda_memory_of_clients.py, test_cuda_memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

import transferd
from transferd.client.cuda import driver as drivers
from transferd.client.cuda.driver import CudaError
from transferd.native.names import JobStatus
from transferd.v1 import attach_pb2

from support import cuda_peer
from support.cuda_client import SIZE, CudaClient
from support.cuda_memory import granted, memory
from support.fakecuda import DeviceBuffer, FakeCuda
from support.waiting import WAIT_S, eventually

if TYPE_CHECKING:
    import random

    from transferd import Client

    from support.daemon import DaemonProcess

    Daemons = tuple[DaemonProcess, DaemonProcess]

pytestmark = pytest.mark.slow

OK = JobStatus.OK
JOBS = 200


def copies(cuda: FakeCuda, sender: Client, receiver: Client, seeded: random.Random) -> None:
    """Proves that nobody else has noticed anything."""
    source = memory(cuda, seeded)
    target, _, grant = granted(receiver, cuda)
    job = sender.write(sender.register(source)[0:4096], grant.descriptor, imm=3)
    assert job.wait(WAIT_S) is OK
    assert target.view[0:4096] == source.view[0:4096]


def test_the_handle_of_a_freed_allocation(
    cuda: FakeCuda, sender: Client, receiver: Client, shared_pair: Daemons, seeded: random.Random
) -> None:
    region = sender.register(memory(cuda, seeded))
    with cuda_peer.running(shared_pair[0].socket) as peer:
        assert peer.ask("free") == "OK"
        for _ in range(2):
            with pytest.raises(CudaError, match="its owner freed it") as caught:
                sender.write(region[0:64], peer.descriptor, imm=1)
            assert caught.value.call == "cuIpcOpenMemHandle_v2"
        copies(cuda, sender, receiver, seeded)
        assert peer.ask("revoke") == "OK"  # nobody holds it


def test_a_handle_of_less_memory_than_was_registered(
    cuda: FakeCuda, sender: Client, receiver: Client, shared_pair: Daemons, seeded: random.Random
) -> None:
    """A copy past its end would cost the context of who writes."""
    region = sender.register(memory(cuda, seeded))
    with cuda_peer.running(shared_pair[0].socket, "fake-short") as peer:
        before = len(cuda.memory)
        for _ in range(2):
            with pytest.raises(transferd.Conflict, match="was registered with") as caught:
                sender.write(region[0:64], peer.descriptor, imm=1)
            assert caught.value.reason == "MEMORY_SHORTER"
        assert len(cuda.memory) == before, "nothing stays mapped"
        copies(cuda, sender, receiver, seeded)


def test_a_handle_of_the_callers_own_process(
    cuda: FakeCuda, sender: Client, shared_pair: Daemons, seeded: random.Random
) -> None:
    """Of an allocation of ours, said to be another's: CUDA opens it in other processes alone."""
    region = sender.register(memory(cuda, seeded))
    with cuda_peer.running(shared_pair[0].socket) as peer:
        cuda.fail("cuIpcOpenMemHandle_v2", drivers.INVALID_CONTEXT)  # what it says then
        with pytest.raises(CudaError, match="of this very process"):
            sender.write(region[0:64], peer.descriptor, imm=1)
        assert sender.write(region[0:64], peer.descriptor, imm=1).wait(WAIT_S) is OK


def test_a_gpu_that_nobody_sees(
    cuda: FakeCuda, sender: Client, receiver: Client, shared_pair: Daemons, seeded: random.Random
) -> None:
    """A UUID that is no GPU's of this process: of another one, or made up."""
    region = sender.register(memory(cuda, seeded))
    with cuda_peer.running(shared_pair[0].socket) as peer:
        assert peer.ask("uuid") == drivers.load().device_uuid(0).hex()
        sender._session.gpu()._uuids = {b"another" * 2 + b"!!": 0}
        with pytest.raises(transferd.Unavailable, match="CUDA_VISIBLE_DEVICES") as caught:
            sender.write(region[0:64], peer.descriptor, imm=1)
        assert caught.value.reason == "GPU_NOT_VISIBLE"
        copies(cuda, sender, receiver, seeded)  # of this process: no handle is needed


def test_memory_of_another_process_is_that_ones_to_share(
    cuda: FakeCuda, sender: Client, shared_pair: Daemons
) -> None:
    with cuda_peer.running(shared_pair[0].socket) as peer, sender.map(peer.descriptor) as pointer:
        mapped = DeviceBuffer(cuda, int(pointer), pointer.length)
        with pytest.raises(transferd.InvalidRequest, match="that one registers it") as caught:
            sender.register(mapped)
        assert caught.value.reason == "NOT_SHAREABLE"


@pytest.mark.parametrize("kind", ["memfd", "pipe", "file"])
def test_an_fd_that_is_no_dmabuf(shared_pair: Daemons, kind: str) -> None:
    """With the daemon's own look at it; the session goes on."""
    fds = [os.memfd_create("dmabuf")] if kind == "memfd" else list(os.pipe())
    if kind == "file":
        fds = [os.open(__file__, os.O_RDONLY)]
    if kind == "memfd":
        os.ftruncate(fds[0], SIZE)
    with CudaClient(shared_pair[0]) as client:
        told = client.share_cuda(fds[0], dmabuf=True, flush=attach_pb2.CUDA_FLUSH_NOT_NEEDED)
        assert told.error.reason == "INVALID_REQUEST"
        assert "not a dma-buf; export it by cuMemGetHandleForAddressRange" in told.error.message
        assert client.share_cuda().share_memory.size_bytes == SIZE
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("how", ["killed", "exits"])
def test_a_writer_that_is_gone_while_its_copies_run(
    cuda: FakeCuda, sender: Client, receiver: Client, shared_pair: Daemons, seeded: random.Random,
    how: str,
) -> None:  # fmt: skip
    """Who waits is told, or all of them were through; nothing is left of it at the daemon."""
    _, _, grant = granted(receiver, cuda)
    counter = receiver.counter(1)
    before = shared_pair[0].status().sessions
    with cuda_peer.running(shared_pair[0].socket) as peer:
        assert peer.ask("flood", grant.descriptor.hex(), JOBS) == JOBS
        if how == "killed":
            peer.process.kill()
        else:
            peer.tell("exit")
        peer.process.wait(WAIT_S)
    with contextlib.suppress(transferd.CounterFault):
        counter.wait(JOBS, WAIT_S)
    seen = counter.read()
    assert seen.value == JOBS or seen.faults
    assert seen.value + seen.lost <= JOBS
    counter.acknowledge()
    eventually(lambda: shared_pair[0].status().sessions <= before, "its session is over")
    copies(cuda, sender, receiver, seeded)
    grant.revoke()  # nobody holds it any more


@pytest.mark.parametrize(("version", "reason"), [(0, "NO_CUDA"), (11_080, "CUDA_TOO_OLD")])
def test_a_driver_that_is_missing_or_too_old(
    shared_pair: Daemons, monkeypatch: pytest.MonkeyPatch, version: int, reason: str
) -> None:
    """GPU memory is refused, each time with what to do; host memory works before and after."""
    about = {"shape": (64,), "typestr": "|u1", "data": (1 << 40, False), "version": 3}
    fake = FakeCuda()
    fake.version = version
    monkeypatch.setattr(drivers, "_loaded", [])
    monkeypatch.setattr(drivers, "LIBRARY", "libnone.so.1")
    if version:
        monkeypatch.setattr(ctypes, "CDLL", lambda name: fake)
    with transferd.Client(shared_pair[0].socket) as client:
        for _ in range(2):
            with pytest.raises(transferd.Unavailable, match="host memory works") as caught:
                client.register(SimpleNamespace(__cuda_array_interface__=about))
            assert caught.value.reason == reason
            grant = client.alloc(4096).grant(imms=range(2))
            assert client.write(client.alloc(4096), grant.descriptor, imm=1).wait(WAIT_S) is OK
    fake.close()
