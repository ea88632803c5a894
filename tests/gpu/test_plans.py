# SPDX-License-Identifier: Apache-2.0
"""Plans and reads by streams on a real GPU: tables that kernels fill, graphs; fences of kernels."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from ctypes import c_uint64
from typing import TYPE_CHECKING

import numpy as np
import pytest

import transferd
from transferd import JobStatus, Read, Scatter, Write, WritePages

from support import tree
from support.waiting import WAIT_S

if TYPE_CHECKING:
    import random

    from transferd import Client

    from support.gpu import Gpu

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

MIB, PAGE = 1 << 20, 4096
MAP = {"write", "map"}
OK, PENDING = JobStatus.OK, JobStatus.PENDING
HEADER = (tree.ROOT / "native/include/transferd/device.cuh").read_bytes()
KERNELS = (
    HEADER
    + b"""
using namespace transferd;
extern "C" __global__ void
choose_pages(plan_table *table, unsigned *step, unsigned count, word *watcher)
{
    const unsigned first = *step * count;
    if (threadIdx.x < count)
        pages(table)[threadIdx.x] =
            plan_page{ first + threadIdx.x, first + count - 1 - threadIdx.x };
    __syncthreads();
    if (!threadIdx.x) {
        table->count = count;
        ++*step;
        bump(watcher);
    }
}
extern "C" __global__ void
choose_slice(plan_table *table, word src, word dst, word length, word *watcher)
{
    *slices(table) = plan_slice{ src, dst, length };
    table->count = 1;
    bump(watcher);
}
extern "C" __global__ void spin(const volatile word *until)
{
    while (!*until)
        ;
}
"""
)


@pytest.mark.parametrize("length", [0, 1, 5001, MIB, 3 * MIB])
def test_a_write_again_and_again(
    gpu: Gpu, sender: Client, receiver: Client, seeded: random.Random, length: int
) -> None:
    source, target = gpu.malloc(4 * MIB), gpu.malloc(4 * MIB)
    source.write(data := seeded.randbytes(4 * MIB))
    grant = receiver.register(target).grant(rights=MAP, imms=range(4))
    write = Write(src=sender.register(source)[7 : 7 + length], dst=grant.descriptor, imm=1)
    with sender.plan(write) as plan:
        for count in range(1, 6):
            target.clear()
            assert plan.launch().wait(WAIT_S) is OK
            assert receiver.counter(1).value == count
            assert target.read(0, length + 64) == data[7 : 7 + length] + bytes(64)


def test_slices_of_any_length(
    gpu: Gpu, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    size = 16 * MIB
    source, target = gpu.malloc(size), gpu.malloc(size)
    source.write(data := seeded.randbytes(size))
    grant = receiver.register(target).grant(rights=MAP, imms=range(4))
    group = sender.peer_group([grant.descriptor])
    rows = np.array([(0, 0, 0, MIB)] * 16)
    scatter = Scatter(src=sender.register(source), targets=rows, imm=1, group=group)
    with sender.plan(scatter, table=True) as plan:
        table = np.asarray(plan.table)
        for lengths in ([MIB] * 16, [0, 1, 15, 16, 17, 16_384, 16_385, 999_999], [12 * MIB]):
            target.clear()
            wanted = bytearray(size)
            at = 0
            for i, length in enumerate(lengths):
                src = seeded.randrange(size - length + 1)
                table[i] = (src, at, length)
                wanted[at : at + length] = data[src : src + length]
                at += length
            plan.count = len(lengths)
            assert plan.launch().wait(WAIT_S) is OK
            assert target.read() == bytes(wanted)
        table[0] = (0, size - 10, 11)
        plan.count = 1
        with pytest.raises(transferd.JobFailed, match="INVALID"):
            plan.launch().wait(WAIT_S)
        assert target.read() == bytes(wanted)
    gpu.settle()  # no wrong address was made of it


def test_a_kernel_says_which_pages_in_a_graph(
    gpu: Gpu, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    torch = pytest.importorskip("torch")
    steps, count = 8, 64
    source, target = gpu.malloc(steps * count * PAGE), gpu.malloc(steps * count * PAGE)
    source.write(data := seeded.randbytes(steps * count * PAGE))
    target.clear()
    step = gpu.malloc(4096)
    step.clear()
    grant = receiver.register(target).grant(rights=MAP, imms=range(4))
    pages = WritePages(
        src=sender.register(source), src_pages=np.arange(count), dst=grant.descriptor,
        dst_pages=np.arange(count), page_bytes=PAGE, imm=1, count="job",
    )  # fmt: skip
    choose = gpu.kernel(KERNELS, "choose_pages")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with sender.plan(pages) as plan, sender.watcher(device=True) as watcher:
        arguments = [plan.device_ptr, step.address, count, watcher.device_ptr]
        counter = receiver.counter(1)
        with sender.watcher(device=True) as warm:  # what is loaded on first use is not captured
            warm.cuda_bump(stream)
            counter.cuda_wait(0, stream)
            torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            gpu.launch(
                choose, 1, 64, stream.cuda_stream, [c_uint64(number) for number in arguments]
            )
        for value in range(1, steps + 1):
            # The table is the next one's only when this one has ended.
            job = sender.arm(watcher, value, plan)
            assert job.status is PENDING
            graph.replay()
            assert job.wait(WAIT_S) is OK
        torch.cuda.synchronize()
        assert (watcher.value, counter.value) == (steps, steps)
    landed = target.read()
    for i in range(steps * count):
        first = i // count * count
        src = first + count - 1 - i % count
        assert landed[i * PAGE : (i + 1) * PAGE] == data[src * PAGE : (src + 1) * PAGE]


def test_a_kernel_says_which_bytes(
    gpu: Gpu, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    source, target = gpu.malloc(MIB), gpu.malloc(MIB)
    source.write(data := seeded.randbytes(MIB))
    target.clear()
    grant = receiver.register(target).grant(rights=MAP, imms=range(4))
    write = Write(src=sender.register(source), dst=grant.descriptor, imm=1)
    choose, stream = gpu.kernel(KERNELS, "choose_slice"), gpu.stream()
    with sender.plan(write, table=True) as plan, sender.watcher(device=True) as watcher:
        pointers = plan.device_ptr, watcher.device_ptr
        at = 0
        for value in range(1, 31):
            length = seeded.randrange(20_000)
            src = seeded.randrange(MIB - length)
            job = sender.arm(watcher, value, plan)
            numbers = (pointers[0], src, at, length, pointers[1])
            gpu.launch(choose, 1, 1, stream, [c_uint64(number) for number in numbers])
            assert job.wait(WAIT_S) is OK
            assert target.read(at, length) == data[src : src + length]
            at += length


@pytest.mark.parametrize("length", [0, 1, 5001, MIB, 3 * MIB])
def test_reads(
    gpu: Gpu, sender: Client, receiver: Client, seeded: random.Random, length: int
) -> None:
    far, near = gpu.malloc(4 * MIB), gpu.malloc(4 * MIB)
    far.write(data := seeded.randbytes(4 * MIB))
    near.clear()
    grant = receiver.register(far).grant(rights={"read", "map"})
    region = sender.register(near)
    job = sender.read(grant.descriptor, region[3 : 3 + length], 11)
    assert job.wait(WAIT_S) is OK
    assert near.read(0, length + 67) == bytes(3) + data[11 : 11 + length] + bytes(64)
    with sender.watcher() as watcher:
        near.clear()
        armed = sender.arm(
            watcher, 1, Read(src=grant.descriptor, dst=region[0:length], src_offset=64)
        )
        assert armed.status is PENDING
        assert not any(near.read(0, length + 1))
        watcher.bump()
        assert armed.wait(WAIT_S) is OK
        assert near.read(0, length) == data[64 : 64 + length]


def test_a_fence_waits_for_the_kernel_that_copies(
    gpu: Gpu, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    source, target, word = gpu.malloc(MIB), gpu.malloc(MIB), gpu.pinned(8)
    source.write(data := seeded.randbytes(MIB))
    target.clear()
    region = sender.register(source)
    grant = receiver.register(target).grant(rights=MAP, imms=range(4))
    spin, stream = gpu.kernel(KERNELS, "spin"), gpu.stream()
    assert sender.write(region[0:1], grant.descriptor, imm=2, stream=stream).wait(WAIT_S) is OK
    until = c_uint64.from_address(word.address)
    with ThreadPoolExecutor(1) as pool:
        try:
            until.value = 0
            gpu.launch(spin, 1, 1, stream, [c_uint64(word.address)])
            job = sender.write(region[0:4096], grant.descriptor, imm=1, stream=stream)
            fencing = pool.submit(grant.fence, [1])
            with pytest.raises(TimeoutError):
                fencing.result(0.1)
            until.value = 1
            fencing.result(WAIT_S)
            assert target.read(0, 4096) == data[0:4096]
            with pytest.raises(transferd.JobFailed, match="owner fenced"):
                job.wait(WAIT_S)
            until.value = 0
            gpu.launch(spin, 1, 1, stream, [c_uint64(word.address)])
            job = sender.write(region[0:4096], grant.descriptor, imm=1, stream=stream)
            with pytest.raises(transferd.Conflict) as caught:
                grant.fence([1])
            assert caught.value.reason == "STILL_COPIED"
        finally:
            until.value = 1
    with pytest.raises(transferd.JobFailed, match="owner fenced"):
        job.wait(WAIT_S)
