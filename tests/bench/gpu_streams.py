# SPDX-License-Identifier: Apache-2.0
"""A kernel bumps a watcher, an armed write runs, a stream of the receiver's goes on.

By the GPU's clock. Both sessions are in one process: two processes on one GPU take time slices. A
job is armed 0.2 ms before its kernel runs: what it takes to wake the worker up for a new job is no
part of the chain.
"""

from __future__ import annotations

import time
from ctypes import c_uint64
from typing import TYPE_CHECKING

from bench.gpu_world import WAIT_S, World, world
from bench.report import Row
from bench.stats import median, percentile
from transferd import Write

from support import tree

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.topic import Run
    from transferd import Grant, Region

HEADER = (tree.ROOT / "native/include/transferd/device.cuh").read_bytes()
KERNELS = (
    HEADER
    + b"""
static __device__ transferd::word now()
{
    transferd::word ns;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns)::"memory");
    return ns;
}
extern "C" __global__ void begin(transferd::word *watcher, transferd::word *at)
{
    *at = now();
    transferd::bump(watcher);
}
extern "C" __global__ void stop(transferd::word *at)
{
    *at = now();
}
"""
)
BYTES, ROUNDS, WARM_UP = 4096, 1000, 50
BARS_US = {"host": 15.0, "GPU": 25.0}
P99_RATIO = 2.0
AHEAD_S = 0.0002


def rows(run: Run) -> Iterator[Row]:
    """Measures the bars."""
    with world(1 << 20) as here:
        host = here.sender.alloc(BYTES)
        host_grant = here.receiver.alloc(BYTES).grant(imms=range(16))
        places = {"host": (host, host_grant, 3), "GPU": (here.region, here.grant, 4)}
        for place, (region, grant, imm) in places.items():
            times = chain_us(run, here, region, grant, imm)
            middle, tail = median(times), percentile(times, 99)
            what = f"kernel bumps, armed write of 4 KiB, stream released: {place} memory"
            note = f"p90 {percentile(times, 90):.1f}, p99 {tail:.1f}, most {max(times):.1f} us"
            yield Row(what, middle, "us", "<=", BARS_US[place], note)
            yield Row(f"{what}: p99 over p50", tail / middle, "x", "<=", P99_RATIO)


def chain_us(run: Run, here: World, region: Region, grant: Grant, imm: int) -> list[float]:
    """Runs the chain again and again."""
    gpu = here.gpu
    begin, stop = gpu.kernel(KERNELS, "begin"), gpu.kernel(KERNELS, "stop")
    bumps, waits = gpu.stream(), gpu.stream()
    stamps = gpu.malloc(16)
    counter = here.receiver.counter(imm)
    times = []
    with here.sender.watcher(device=True) as watcher:
        for value in range(1, run.scaled(ROUNDS) + WARM_UP + 1):
            job = here.sender.arm(
                watcher, value, Write(src=region[0:BYTES], dst=grant.descriptor, imm=imm)
            )
            counter.cuda_wait(value, waits)
            gpu.launch(stop, 1, 1, waits, [c_uint64(stamps.address + 8)])
            ready = time.perf_counter() + AHEAD_S
            while time.perf_counter() < ready:
                pass
            gpu.launch(begin, 1, 1, bumps, [c_uint64(watcher.device_ptr), c_uint64(stamps.address)])
            job.wait(WAIT_S)
            gpu.sync(waits)
            gpu.sync(bumps)
            raw = stamps.read()
            first, last = (int.from_bytes(raw[i : i + 8], "little") for i in (0, 8))
            times.append((last - first) / 1000)
    stamps.free()
    return times[WARM_UP:]
