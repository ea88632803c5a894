# SPDX-License-Identifier: Apache-2.0
"""What is wrong with memory or handles, as the real driver tells it, and clients that go."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import pytest

import transferd
from transferd import JobStatus
from transferd.client.cuda import mapping
from transferd.client.cuda.driver import CudaError
from transferd.v1 import attach_pb2

from support import cuda_peer
from support.cuda_client import CudaClient
from support.waiting import WAIT_S, eventually

if TYPE_CHECKING:
    import random

    from transferd import Client

    from support.daemon import DaemonProcess
    from support.gpu import Gpu

    Daemons = tuple[DaemonProcess, DaemonProcess]

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

MIB = 1 << 20
MAP = {"write", "map"}
OK = JobStatus.OK
JOBS = 64


def copies(gpu: Gpu, sender: Client, receiver: Client, seeded: random.Random) -> None:
    """Proves that nobody else has noticed anything: no error stays with the context."""
    source, target = gpu.malloc(MIB), gpu.malloc(MIB)
    source.write(data := seeded.randbytes(MIB))
    grant = receiver.register(target).grant(rights=MAP, imms=range(4))
    assert sender.write(sender.register(source), grant.descriptor, imm=3).wait(WAIT_S) is OK
    assert target.read() == data


def test_the_handle_of_a_freed_allocation(
    gpu: Gpu, sender: Client, receiver: Client, shared_pair: Daemons, seeded: random.Random
) -> None:
    region = sender.register(gpu.malloc(MIB))
    with cuda_peer.running(shared_pair[0].socket, "malloc", 8 * MIB) as peer:
        assert peer.ask("free") == "OK"
        with pytest.raises(CudaError, match="cuIpcOpenMemHandle") as caught:
            sender.write(region, peer.descriptor, imm=1)
        print(caught.value)
        assert caught.value.result in mapping._OF_HANDLES
        copies(gpu, sender, receiver, seeded)


def test_handles_that_are_none(
    gpu: Gpu, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    """Made up; of an allocation of this process."""
    whole = gpu.driver.ipc_handle(gpu.malloc(MIB).address)
    for handle in (bytes(64), seeded.randbytes(64), whole[:32] + bytes(32), whole):
        with pytest.raises(CudaError) as caught:
            gpu.driver.ipc_open(handle)
        print(caught.value)
        assert caught.value.result in mapping._OF_HANDLES
    copies(gpu, sender, receiver, seeded)


@pytest.mark.parametrize("kind", ["malloc", "vmm"])
def test_memory_of_another_process_is_that_ones_to_share(
    gpu: Gpu, sender: Client, shared_pair: Daemons, kind: str
) -> None:
    with (
        cuda_peer.running(shared_pair[0].socket, kind, 2 * MIB) as peer,
        sender.map(peer.descriptor, device=0) as pointer,
    ):
        mapped = gpu.malloc(16)
        mapped.address, mapped.length = int(pointer), pointer.length
        with pytest.raises(transferd.InvalidRequest, match="that one registers it") as caught:
            sender.register(mapped)
        assert caught.value.reason == "NOT_SHAREABLE"


def test_a_dmabuf_of_the_driver(gpu: Gpu, shared_pair: Daemons) -> None:
    """The daemon takes it for one, and knows its size; it makes no other path known."""
    buffer = gpu.malloc(4 * MIB)
    fd = gpu.driver.dmabuf(buffer.address, buffer.length)
    about = {"base": buffer.address, "flush": attach_pb2.CUDA_FLUSH_NOT_NEEDED, "dmabuf": True}
    with CudaClient(shared_pair[0]) as client:
        told = client.share_cuda(fd, size_bytes=buffer.length, **about)
        assert told.share_memory.size_bytes == buffer.length
        assert client.registered(told).rails == 0  # there is no NIC
        told = client.share_cuda(fd, size_bytes=buffer.length + 1, **about)
        assert told.error.message.startswith("size_bytes")
    os.close(fd)


@pytest.mark.parametrize("how", ["killed", "exits"])
def test_a_writer_that_is_gone_while_its_copies_run(
    gpu: Gpu, sender: Client, receiver: Client, shared_pair: Daemons, seeded: random.Random,
    how: str,
) -> None:  # fmt: skip
    length = 256 * MIB
    target = gpu.malloc(length)
    grant = receiver.register(target).grant(rights=MAP, imms=range(4))
    counter = receiver.counter(1)
    with cuda_peer.running(shared_pair[0].socket, "malloc", length) as peer:
        assert peer.ask("flood", grant.descriptor.hex(), JOBS) == JOBS
        if how == "killed":
            peer.process.kill()
        else:
            peer.tell("exit")
        peer.process.wait(WAIT_S)
    with contextlib.suppress(transferd.CounterFault):
        counter.wait(JOBS, WAIT_S)
    seen = counter.read()
    print(seen)
    assert seen.value == JOBS or seen.faults
    assert seen.value + seen.lost <= JOBS
    counter.acknowledge()
    copies(gpu, sender, receiver, seeded)
    grant.revoke()
    target.clear()
    gpu.settle()
    eventually(lambda: target.read(0, 4096) == bytes(4096), "nobody writes into it")
