# SPDX-License-Identifier: Apache-2.0
"""Streams and kernels on a real GPU: they wait for counts, bump watchers, run in graphs."""

from __future__ import annotations

from ctypes import c_uint64
from typing import TYPE_CHECKING

import pytest

import transferd
from transferd import JobStatus, Write

from support import tree
from support.waiting import WAIT_S, eventually

if TYPE_CHECKING:
    import random

    from transferd import Client

    from support.gpu import Gpu

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

MIB = 1 << 20
MAP = {"write", "map"}
OK, PENDING, CANCELLED = JobStatus.OK, JobStatus.PENDING, JobStatus.CANCELLED
HEADER = (tree.ROOT / "native/include/transferd/device.cuh").read_bytes()
KERNELS = (
    HEADER
    + b"""
using namespace transferd;
extern "C" __global__ void
fill_and_bump(unsigned *data, unsigned value, unsigned count, word *watcher)
{
    for (unsigned i = threadIdx.x; i < count; i += blockDim.x)
        data[i] = value;
    __syncthreads();
    if (!threadIdx.x)
        bump(watcher);
}
extern "C" __global__ void
wait_and_take(const word *gate, word target, const unsigned *data, unsigned *out)
{
    *out = is_faulted(wait(gate, target)) ? 0 : data[0];
}
"""
)


def test_armed_copies(gpu: Gpu, sender: Client, receiver: Client, seeded: random.Random) -> None:
    source, target = gpu.malloc(MIB), gpu.malloc(MIB)
    source.write(data := seeded.randbytes(MIB))
    target.clear()
    region = sender.register(source)
    grant = receiver.register(target).grant(rights=MAP, imms=range(4))
    with sender.watcher() as watcher:
        one = sender.arm(watcher, 1, Write(src=region, dst=grant.descriptor, imm=1))
        two = sender.arm(watcher, 2, Write(src=region, dst=grant.descriptor, imm=1))
        left = sender.arm(watcher, 9, Write(src=region, dst=grant.descriptor, imm=1))
        assert one.status is PENDING
        assert not any(target.read())
        watcher.bump()
        assert one.wait(WAIT_S) is OK
        assert target.read() == data
        assert two.cancel(WAIT_S) is CANCELLED
        target.clear()
    eventually(left.done, "its end")
    gpu.settle()  # nothing waits any more
    assert not any(target.read())


def test_a_kernel_starts_a_job_and_another_waits_for_it(
    gpu: Gpu, sender: Client, receiver: Client
) -> None:
    source, target, out = gpu.malloc(4096), gpu.malloc(4096), gpu.malloc(4096)
    for buffer in (source, target, out):
        buffer.clear()
    region = sender.register(source)
    grant = receiver.register(target).grant(rights=MAP, imms=range(4))
    fill, take = gpu.kernel(KERNELS, "fill_and_bump"), gpu.kernel(KERNELS, "wait_and_take")
    first, second = gpu.stream(), gpu.stream()
    with sender.watcher(device=True) as watcher:
        for value in range(1, 51):
            job = sender.arm(watcher, value, Write(src=region, dst=grant.descriptor, imm=1))
            gate = receiver.counter(1).device_ptr
            taking = (gate, value, target.address, out.address)
            gpu.launch(take, 1, 1, second, [c_uint64(number) for number in taking])
            filling = (source.address, value, 1024, watcher.device_ptr)
            gpu.launch(fill, 1, 256, first, [c_uint64(number) for number in filling])
            assert job.wait(WAIT_S) is OK
            gpu.wait(second)
            assert int.from_bytes(out.read(0, 4), "little") == value


@pytest.mark.parametrize("place", ["host", "gpu"])
def test_streams_wait_and_bump(gpu: Gpu, sender: Client, receiver: Client, place: str) -> None:
    if place == "gpu":
        region = sender.register(gpu.malloc(4096))
        grant = receiver.register(gpu.malloc(4096)).grant(rights=MAP, imms=range(4))
    else:
        region = sender.alloc(4096)
        grant = receiver.alloc(4096).grant(imms=range(4))
    bumps, waits = gpu.stream(), gpu.stream()
    with sender.watcher(device=True) as watcher:
        # A Client's first use of the device, before any stream waits for what it is to do.
        assert watcher.device_ptr
        assert receiver.counter(1).device_ptr
        for value in range(1, 21):
            job = sender.arm(watcher, value, Write(src=region[:], dst=grant.descriptor, imm=1))
            receiver.counter(1).cuda_wait(value, waits)
            assert not gpu.done(waits)
            watcher.cuda_bump(bumps)
            assert job.wait(WAIT_S) is OK
            gpu.wait(waits)
        assert watcher.value == 20


def test_in_a_graph(gpu: Gpu, sender: Client, receiver: Client) -> None:
    torch = pytest.importorskip("torch")
    region = sender.alloc(4096)
    grant = receiver.alloc(4096).grant(imms=range(4))
    graph = torch.cuda.CUDAGraph()
    with sender.watcher(device=True) as watcher:
        counter = receiver.counter(1)
        stream = torch.cuda.Stream()
        with sender.watcher(device=True) as warm:  # what is loaded on first use is not captured
            warm.cuda_bump(stream)
            counter.cuda_wait(0, stream)
            torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            watcher.cuda_bump(stream)
            counter.cuda_wait(1, stream)
        for value in range(1, 4):
            job = sender.arm(watcher, value, Write(src=region, dst=grant.descriptor, imm=1))
            graph.replay()
            assert job.wait(WAIT_S) is OK
        torch.cuda.synchronize()
        assert (watcher.value, counter.value) == (3, 3)


def test_a_job_is_not_captured(gpu: Gpu, sender: Client, receiver: Client) -> None:
    torch = pytest.importorskip("torch")
    source = sender.register(gpu.malloc(64))
    grant = receiver.register(gpu.malloc(64)).grant(rights=MAP, imms=range(4))
    stream = torch.cuda.Stream()
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        with pytest.raises(transferd.InvalidRequest, match="cuda_bump"):
            sender.write(source, grant.descriptor, imm=1, stream=stream)
        torch.zeros(1, device="cuda")


def test_a_session_that_ends_lets_its_streams_go(gpu: Gpu, receiver: Client) -> None:
    stream = gpu.stream()
    receiver.counter(3).cuda_wait(5, stream)
    assert not gpu.done(stream)
    receiver.close()
    gpu.wait(stream)
