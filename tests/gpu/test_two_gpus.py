# SPDX-License-Identifier: Apache-2.0
"""Two GPUs of one host: copies from one to the other, mappings, and which GPU is which."""

from __future__ import annotations

from ctypes import c_int, c_uint64
from typing import TYPE_CHECKING

import numpy as np
import pytest

from transferd import JobStatus, Write

from support import cuda_peer
from support.gpu import Gpu
from support.waiting import WAIT_S

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from transferd import Client

    from support.daemon import DaemonProcess

    Daemons = tuple[DaemonProcess, DaemonProcess]

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

MIB = 1 << 20
MAP = {"write", "map"}
OK = JobStatus.OK
KERNELS = b"""
extern "C" __global__ void add_one(unsigned *words, int count)
{
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
        words[i] += 1;
}
extern "C" __global__ void take(unsigned *to, const unsigned *from, int count)
{
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
        to[i] = from[i];
}
"""


@pytest.fixture(autouse=True)
def two(gpu: Gpu) -> None:
    if gpu.driver.device_count() < 2:
        pytest.skip("this machine has one GPU, or CUDA_VISIBLE_DEVICES shows one")


@pytest.fixture
def other(gpu: Gpu) -> Iterator[Gpu]:
    """The second GPU; the context of the first one is current in the test all the same."""
    try:
        made = Gpu(1)
    finally:
        gpu.enter()
    yield made
    gpu.enter()


@pytest.mark.parametrize("first", [0, 1])
def test_in_one_process(
    gpu: Gpu, other: Gpu, sender: Client, receiver: Client, seeded: random.Random, first: int
) -> None:
    """Either way; by a kernel, and by a copy of the driver's."""
    near, far = (gpu, other) if first == 0 else (other, gpu)
    near.enter()
    source = near.malloc(4 * MIB)
    source.write(data := seeded.randbytes(4 * MIB))
    region = sender.register(source)
    far.enter()
    target = far.malloc(4 * MIB)
    grant = receiver.register(target).grant(rights=MAP, imms=range(4))
    for count, size in enumerate((1, 4096, 4 * MIB), start=1):
        target.clear()
        job = sender.write(region[0:size], grant.descriptor, imm=1)
        assert job.wait(WAIT_S) is OK
        receiver.counter(1).wait(count, WAIT_S)
        assert target.read(0, size) == data[:size]
    assert str(job.path) == "cuda, 1 rail"


@pytest.mark.parametrize("kind", ["malloc", "vmm", "torch"])
def test_another_process(
    gpu: Gpu, sender: Client, shared_pair: Daemons, seeded: random.Random, kind: str
) -> None:
    """Its device 1 is written to from our device 0: contiguous, pages, armed."""
    if kind == "torch":
        pytest.importorskip("torch")
    length = 5 * MIB
    source = gpu.malloc(length)
    source.write(data := seeded.randbytes(length))
    region = sender.register(source)
    with cuda_peer.running(shared_pair[0].socket, kind, length, device=1) as peer:
        assert peer.ask("uuid") == gpu.driver.device_uuid(1).hex()
        assert sender.write(region, peer.descriptor, imm=1).wait(WAIT_S) is OK
        assert peer.ask("wait", 1, 1) == 1
        assert peer.bytes_at(0, length) == data
        pages = np.arange(1280)
        job = sender.write_pages(region, pages, peer.descriptor, pages[::-1], 4096, imm=2)
        assert job.wait(WAIT_S) is OK
        assert peer.ask("wait", 2, 1280) == 1280
        assert peer.bytes_at(0, 4096) == data[-4096:]
        with sender.watcher(device=True) as watcher:
            job = sender.arm(watcher, 1, Write(src=region[64:128], dst=peer.descriptor, imm=3))
            watcher.cuda_bump(gpu.stream())
            assert job.wait(WAIT_S) is OK
        assert peer.ask("wait", 3, 1) == 1
        assert peer.bytes_at(0, 64) == data[64:128]
        assert peer.ask("revoke") == "OK"


@pytest.mark.parametrize("kind", ["malloc", "vmm"])
def test_kernels_over_a_mapping(
    gpu: Gpu, sender: Client, shared_pair: Daemons, seeded: random.Random, kind: str
) -> None:
    """A kernel on our device 0 reads and writes what map() gives of another's device 1."""
    length = 3 * MIB
    data = np.frombuffer(seeded.randbytes(length), np.uint32)
    out = gpu.malloc(length)
    stream = gpu.stream()
    with cuda_peer.running(shared_pair[0].socket, kind, length, device=1) as peer:
        peer.ask("fill", 0, data.tobytes().hex())
        with sender.map(peer.descriptor, device=0) as pointer:
            assert (pointer.device, pointer.length) == (0, length)
            words = c_int(length // 4)
            for name, arguments in (
                ("add_one", [c_uint64(pointer), words]),
                ("take", [c_uint64(out.address), c_uint64(pointer), words]),
            ):
                gpu.launch(gpu.kernel(KERNELS, name), 256, 256, stream, arguments)
            gpu.wait(stream)
        wanted = (data + np.uint32(1)).tobytes()
        assert out.read() == wanted
        assert peer.bytes_at(0, length) == wanted
        assert peer.ask("revoke") == "OK"


@pytest.mark.parametrize("visible", ["1", "1,0"])
@pytest.mark.parametrize("kind", ["malloc", "vmm"])
def test_devices_go_by_uuid(
    gpu: Gpu, sender: Client, shared_pair: Daemons, seeded: random.Random, kind: str, visible: str
) -> None:
    """What the other process calls its device 0 is our device 1."""
    length = 3 * MIB
    source = gpu.malloc(length)
    source.write(data := seeded.randbytes(length))
    with cuda_peer.running(shared_pair[0].socket, kind, length, visible=visible) as peer:
        assert peer.ask("uuid") == gpu.driver.device_uuid(1).hex()
        job = sender.write(sender.register(source), peer.descriptor, imm=1)
        assert job.wait(WAIT_S) is OK
        assert str(job.path) == "cuda, 1 rail"
        assert peer.ask("wait", 1, 1) == 1
        assert peer.bytes_at(0, length) == data


def test_a_sender_that_counts_devices_otherwise(
    gpu: Gpu, receiver: Client, shared_pair: Daemons, seeded: random.Random
) -> None:
    target = gpu.malloc(MIB)
    grant = receiver.register(target).grant(rights=MAP, imms=range(4))
    with cuda_peer.running(shared_pair[0].socket, "malloc", MIB, visible="1,0") as peer:
        data = seeded.randbytes(MIB)
        peer.ask("fill", 0, data.hex())
        assert peer.ask("write", grant.descriptor.hex()) == "cuda, 1 rail"
        receiver.counter(1).wait(1, WAIT_S)
        assert target.read() == data


@pytest.mark.parametrize(("kind", "said"), [("malloc", "GPU_NOT_VISIBLE"), ("vmm", "cuda, 1 rail")])
def test_a_gpu_that_the_sender_does_not_see(
    gpu: Gpu, receiver: Client, shared_pair: Daemons, seeded: random.Random, kind: str, said: str
) -> None:
    """An IPC handle is of no use there; the driver maps chunks all the same."""
    target = gpu.malloc(MIB) if kind == "malloc" else gpu.vmm(1)[0:MIB]
    target.clear()
    grant = receiver.register(target).grant(rights=MAP, imms=range(4))
    data = seeded.randbytes(MIB)
    with cuda_peer.running(shared_pair[0].socket, "malloc", MIB, visible="1") as peer:
        peer.ask("fill", 0, data.hex())
        assert peer.ask("write", grant.descriptor.hex()) == said
    assert target.read() == (data if kind == "vmm" else bytes(MIB))
