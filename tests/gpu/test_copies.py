# SPDX-License-Identifier: Apache-2.0
"""Copies by streams on a real GPU: bytes of every alignment, processes, kinds of memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import transferd
from transferd import JobStatus, Write

from support import cuda_peer, pods
from support.waiting import WAIT_S, eventually

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from transferd import Client

    from support.daemon import DaemonProcess
    from support.gpu import Gpu

    Daemons = tuple[DaemonProcess, DaemonProcess]

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

MIB = 1 << 20
MAP = {"write", "map"}
OK = JobStatus.OK


def test_writes_of_every_alignment(
    gpu: Gpu, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    source, target = gpu.malloc(4 * MIB), gpu.malloc(4 * MIB)
    data = seeded.randbytes(4 * MIB)
    source.write(data)
    region, other = sender.register(source), receiver.register(target)
    grant = other.grant(rights=MAP, imms=range(4))
    sizes = [0, 1, 15, 16, 17, 2047, 2048, 2049, 4096, 65_535, MIB - 1, MIB, MIB + 5, 3 * MIB]
    for count, size in enumerate(sizes, start=1):
        src, dst = seeded.randrange(64), seeded.randrange(64)
        target.clear()
        job = sender.write(region[src : src + size], grant.descriptor, dst, imm=1)
        assert job.wait(WAIT_S) is OK
        receiver.counter(1).wait(count, WAIT_S)
        wanted = bytes(dst) + data[src : src + size]
        assert target.read(0, dst + size + 64) == wanted + bytes(64)
    assert str(job.path) == "cuda, 1 rail"


@pytest.mark.parametrize("page", [16, 100, 1000, 2048, 4096, 5001, 65_536])
def test_pages(
    gpu: Gpu, sender: Client, receiver: Client, seeded: random.Random, page: int
) -> None:
    count = min(1024, 8 * MIB // page)
    source, target = gpu.malloc(16 * MIB), gpu.malloc(16 * MIB)
    data = np.frombuffer(seeded.randbytes(16 * MIB), np.uint8)
    source.write(data.tobytes())
    target.clear()
    region, other = sender.register(source), receiver.register(target)
    grant = other.grant(rights=MAP, imms=range(4))
    stride = page + seeded.choice([0, 0, 1, 16])
    order = np.random.default_rng(seeded.randrange(1 << 30))
    src, dst = order.permutation(count), order.permutation(count)
    job = sender.write_pages(
        region, src, grant.descriptor, dst, page, imm=1, src_stride=stride, dst_stride=stride
    )
    assert job.wait(WAIT_S) is OK
    receiver.counter(1).wait(count, WAIT_S)
    wanted = np.zeros(16 * MIB, np.uint8)
    for a, b in zip(src, dst, strict=True):
        wanted[b * stride : b * stride + page] = data[a * stride : a * stride + page]
    assert target.read() == wanted.tobytes()


def test_scatter(gpu: Gpu, sender: Client, receiver: Client, seeded: random.Random) -> None:
    source, target = gpu.malloc(4 * MIB), gpu.malloc(4 * MIB)
    data = seeded.randbytes(4 * MIB)
    source.write(data)
    target.clear()
    other = receiver.register(target)
    grants = [other.grant(i * MIB, MIB, rights=MAP, imms=range(4)) for i in range(4)]
    group = sender.peer_group([grant.descriptor for grant in grants])
    rows = [
        (i % 4, seeded.randrange(MIB), 4096 * (i // 4), seeded.randrange(4096)) for i in range(256)
    ]
    job = sender.scatter(sender.register(source), np.array(rows), imm=2, group=group)
    assert job.wait(WAIT_S) is OK
    receiver.counter(2).wait(256, WAIT_S)
    landed = target.read()
    for member, src, dst, length in rows:
        at = member * MIB + dst
        assert landed[at : at + length] == data[src : src + length]


@pytest.mark.parametrize("kind", ["malloc", "vmm", "torch"])
def test_another_process(
    gpu: Gpu, sender: Client, shared_pair: Daemons, seeded: random.Random, kind: str
) -> None:
    if kind == "torch":
        pytest.importorskip("torch")
    length = 5 * MIB
    source = gpu.malloc(length)
    data = seeded.randbytes(length)
    source.write(data)
    region = sender.register(source)
    with cuda_peer.running(shared_pair[0].socket, kind, length) as peer:
        assert sender.write(region, peer.descriptor, imm=1).wait(WAIT_S) is OK
        assert peer.ask("wait", 1, 1) == 1
        assert peer.bytes_at(0, length) == data
        pages = list(range(1280))
        job = sender.write_pages(region, pages, peer.descriptor, pages[::-1], 4096, imm=2)
        assert job.wait(WAIT_S) is OK
        assert peer.ask("wait", 2, 1280) == 1280
        assert peer.bytes_at(0, 4096) == data[-4096:]
        assert peer.ask("revoke") == "OK"
        with pytest.raises(transferd.TransferdError, match="revoked"):
            sender.write(region, peer.descriptor, imm=1).wait(WAIT_S)


def test_namespaces_of_their_own(
    gpu: Gpu, sender: Client, shared_pair: Daemons, seeded: random.Random
) -> None:
    """Two processes that share nothing but the daemon's socket, and the GPU, as two pods do."""
    prefix, socket, length = pods.prefix(), shared_pair[0].socket, 5 * MIB
    data = seeded.randbytes(length)
    with (
        cuda_peer.running(socket, "vmm", length, prefix) as one,
        cuda_peer.running(socket, "vmm", length, prefix) as two,
    ):
        one.ask("fill", 0, data.hex())
        for writer, reader in ((one, two), (two, one)):
            assert writer.ask("write", reader.descriptor.hex()) == "cuda, 1 rail"
            assert reader.ask("wait", 1, 1) == 1
            assert reader.bytes_at(0, length) == data
        source = gpu.malloc(length)  # and by cudaMalloc here, into a pod
        source.clear()
        job = sender.write(sender.register(source), two.descriptor, imm=2)
        assert job.wait(WAIT_S) is OK
        assert not any(two.bytes_at(0, length))
        assert two.ask("revoke") == "OK"


def test_map_gives_the_memory(
    gpu: Gpu, sender: Client, shared_pair: Daemons, seeded: random.Random
) -> None:
    source = gpu.malloc(MIB)
    source.write(data := seeded.randbytes(MIB))
    with cuda_peer.running(shared_pair[0].socket, "malloc", MIB) as peer:
        with sender.map(peer.descriptor, device=0) as pointer:
            stream = gpu.stream()
            gpu.copy(pointer, source.address, MIB, stream)
            gpu.wait(stream)
            assert peer.ask("revoke") == "STILL_MAPPED"
        assert peer.bytes_at(0, MIB) == data
        assert peer.ask("revoke") == "OK"


def test_the_owner_is_killed(gpu: Gpu, sender: Client, shared_pair: Daemons) -> None:
    big = 1 << 30
    source = sender.register(gpu.malloc(MIB))
    before = gpu.free_bytes()
    with cuda_peer.running(shared_pair[0].socket, "malloc", big) as peer:
        assert sender.write(source, peer.descriptor, imm=1).wait(WAIT_S) is OK
        assert gpu.free_bytes() < before - big // 2
        peer.process.kill()
        eventually(lambda: gpu.free_bytes() > before - big // 2, "the memory is free again")


class Liar:
    """Host memory that says it is CUDA's."""

    def __init__(self) -> None:
        self.memory = np.zeros(64)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        about = {"shape": (64,), "typestr": "<f8", "version": 3}
        return {**about, "data": (self.memory.ctypes.data, False)}


def freed(gpu: Gpu) -> Any:
    buffer = gpu.malloc(8 * MIB)
    buffer.free()
    return buffer


def too_long(gpu: Gpu) -> Any:
    buffer = gpu.malloc(8 * MIB)
    buffer.length = 64 * MIB
    return buffer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (freed, "freed"),
        (lambda gpu: Liar(), "host memory"),
        (lambda gpu: gpu.pinned(4096), "pinned host memory"),
        (too_long, "allocation ends"),
    ],
    ids=["freed", "host", "pinned", "too-long"],
)
def test_memory_that_cannot_be_registered(
    gpu: Gpu, sender: Client, make: Callable[[Gpu], Any], message: str
) -> None:
    wrong = make(gpu)
    print("the driver says", gpu.driver.pointer(wrong.__cuda_array_interface__["data"][0]))
    with pytest.raises(transferd.InvalidRequest, match=message):
        sender.register(wrong)


def test_torch_and_cupy(gpu: Gpu, sender: Client, receiver: Client) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.arange(1 << 16, dtype=torch.float32, device="cuda")
    target = torch.zeros_like(tensor)
    torch.cuda.synchronize()
    grant = receiver.register(target).grant(rights=MAP, imms=range(4))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        tensor += 1
    job = sender.write(sender.register(tensor), grant.descriptor, imm=1, stream=stream)
    assert job.wait(WAIT_S) is OK
    receiver.counter(1).wait(1, WAIT_S)
    assert torch.equal(tensor, target)
    cupy = pytest.importorskip("cupy")
    array = cupy.full(1 << 16, 7, dtype=cupy.float32)
    cupy.cuda.Device().synchronize()
    job = sender.write(sender.register(array), grant.descriptor, imm=1)
    assert job.wait(WAIT_S) is OK
    assert bool((target == 7).all())


def test_many_jobs_of_two_priorities(
    gpu: Gpu, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    source, target = gpu.malloc(4 * MIB), gpu.malloc(4 * MIB)
    source.write(data := seeded.randbytes(4 * MIB))
    grant = receiver.register(target).grant(rights=MAP, imms=range(4))
    region = sender.register(source)
    jobs = [
        sender.write(
            region[4096 * i : 4096 * (i + 1)],
            grant.descriptor,
            4096 * i,
            imm=1,
            priority="latency" if i % 2 else "bulk",
        )
        for i in range(1024)
    ]
    receiver.counter(1).wait(1024, WAIT_S)
    assert target.read() == data
    assert {job.wait(WAIT_S) for job in jobs} == {OK}


def test_a_client_that_closes_with_copies_under_way(
    gpu: Gpu, receiver: Client, shared_pair: Daemons
) -> None:
    source, target = gpu.malloc(256 * MIB), gpu.malloc(256 * MIB)
    grant = receiver.register(target).grant(rights=MAP, imms=range(4))
    with transferd.Client(shared_pair[0].socket) as client:
        region = client.register(source)
        for _ in range(16):
            client.write(region, grant.descriptor, imm=1)
        watcher = client.watcher()
        client.arm(watcher, 1, Write(src=region[0:64], dst=grant.descriptor, imm=1))
    gpu.settle()
