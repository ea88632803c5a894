# SPDX-License-Identifier: Apache-2.0
"""A kernel bumps a watcher, an armed write runs, a stream of the receiver's goes on.

By the GPU's clock. Both sessions are in one process: two processes on one GPU take time slices. For
the bars a job is armed 0.2 ms before its kernel runs: what it takes to wake the worker up for a new
job is no part of the chain, and the worker polls. Told beside them: the kernel at once after the
arming, with the worker asleep then; and 1.3 s later, when it has stopped polling for the device and
looks once in a millisecond.
"""

from __future__ import annotations

import time
from ctypes import c_uint64
from typing import TYPE_CHECKING

from bench.gpu_world import WAIT_S, World, world
from bench.report import Row
from bench.stats import median, percentile, spread
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
IDLE_S = 0.005  # in which the worker falls asleep
LONG_S = 1.3  # it polls for jobs that wait for a device for 1 s (SPIN_POLLED_NS of core/worker.c)
LONG_ROUNDS = 12


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
            for name, idle, ahead, rounds in (
                ("armed at once before, worker asleep", IDLE_S, 0.0, run.scaled(ROUNDS // 5)),
                ("armed 1.3 s before", 0.0, LONG_S, run.scaled(LONG_ROUNDS)),
            ):
                others = chain_us(run, here, region, grant, imm, idle, ahead, rounds)
                run.beside(f"{place} memory, {name}, us", spread(others, 1))


def chain_us(
    run: Run,
    here: World,
    region: Region,
    grant: Grant,
    imm: int,
    idle_s: float = 0.0,
    ahead_s: float = AHEAD_S,
    rounds: int = 0,
) -> list[float]:
    """Runs the chain again and again.

    Args:
        run: The run.
        here: Where.
        region: What is written.
        grant: Where it is written.
        imm: Counts it.
        idle_s: How long nothing goes on before a job is armed.
        ahead_s: How long before its kernel a job is armed.
        rounds: How many are measured; 0: as many as bars take, after others to warm up.
    """
    gpu = here.gpu
    begin, stop = gpu.kernel(KERNELS, "begin"), gpu.kernel(KERNELS, "stop")
    bumps, waits = gpu.stream(), gpu.stream()
    stamps = gpu.malloc(16)
    counter = here.receiver.counter(imm)
    first_count = counter.value
    warm_up = 2 if rounds else WARM_UP
    times = []
    with here.sender.watcher(device=True) as watcher:
        for value in range(1, (rounds or run.scaled(ROUNDS)) + warm_up + 1):
            time.sleep(idle_s)
            job = here.sender.arm(
                watcher, value, Write(src=region[0:BYTES], dst=grant.descriptor, imm=imm)
            )
            counter.cuda_wait(first_count + value, waits)
            gpu.launch(stop, 1, 1, waits, [c_uint64(stamps.address + 8)])
            ready = time.perf_counter() + ahead_s
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
    return times[warm_up:]
