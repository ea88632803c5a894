# SPDX-License-Identifier: Apache-2.0
"""Copies between two client processes, beside a plain copy in one process; the smallest write."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING

from bench.gpu_world import GIB, KIB, MIB, WAIT_S, World, world
from bench.report import Row
from bench.stats import median, percentile, spread
from bench.turns import in_turn, ratio_row

from support import cuda_peer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.topic import Run

    from support.gpu import Buffer, Gpu

# bytes: (jobs in a run, share of the plain copy)
SIZES = {GIB: (8, 0.95), 32 * MIB: (64, 0.85)}
WINDOW = 8
SMALL, SMALL_US, PINGS, WARM_UP = 4 * KIB, 20.0, 2000, 200


def rows(run: Run) -> Iterator[Row]:
    """Measures the bars."""
    with world(GIB) as here:
        with cuda_peer.running(here.socket, "malloc", GIB) as peer:
            plain = here.gpu.malloc(GIB)
            for size, (count, share) in SIZES.items():
                us, them = "SDK, two processes", "plain copy, one process"
                measured: dict[str, Callable[[], float]] = {
                    us: functools.partial(flood, here, peer.descriptor, size, count),
                    them: plain_copies(here.gpu, here.source, plain, size, count),
                }
                if size <= 32 * MIB:
                    measured |= {
                        f"plain copies with a word each, {n} streams": word_copies(
                            here.gpu, here.source, plain, size, count, n
                        )
                        for n in (1, 2)
                    }
                for measure in measured.values():
                    measure()
                found = in_turn(run, measured, run.turns)
                what = f"{size // MIB:,} MiB between two processes, same GPU"
                for name, values in found.items():
                    run.beside(f"{what}: {name}", f"{spread(values, 0)} Gbps")
                yield ratio_row(f"{what}: ratio to a plain copy", found, us, them, share)
            plain.free()
        yield small(run, here)


def flood(here: World, descriptor: bytes, size: int, count: int) -> float:
    """Writes from here to the peer, several in flight; gives Gbps."""
    jobs = []
    part = here.region[0:size]
    begin = time.perf_counter()
    for i in range(count):
        jobs.append(here.sender.write(part, descriptor, imm=1))
        if i >= WINDOW:
            jobs[i - WINDOW].wait(WAIT_S)
    for job in jobs[-WINDOW:]:
        job.wait(WAIT_S)
    return size * count * 8 / (time.perf_counter() - begin) / 1e9


def plain_copies(
    gpu: Gpu, source: Buffer, target: Buffer, size: int, count: int
) -> Callable[[], float]:
    """The same by cuMemcpyDtoDAsync on one stream."""
    stream = gpu.stream()

    def measure() -> float:
        begin = time.perf_counter()
        for _ in range(count):
            gpu.copy(target.address, source.address, size, stream)
        gpu.sync(stream)
        return size * count * 8 / (time.perf_counter() - begin) / 1e9

    return measure


def word_copies(
    gpu: Gpu, source: Buffer, target: Buffer, size: int, count: int, streams: int
) -> Callable[[], float]:
    """The same with a store of a word after each, as a job has it, on streams in turn."""
    taken = [gpu.stream() for _ in range(streams)]
    words = gpu.pinned(8 * streams)

    def measure() -> float:
        begin = time.perf_counter()
        for i in range(count):
            stream = taken[i % streams]
            gpu.copy(target.address, source.address, size, stream)
            gpu.word(words.address + 8 * (i % streams), i, stream)
        for stream in taken:
            gpu.sync(stream)
        return size * count * 8 / (time.perf_counter() - begin) / 1e9

    return measure


def small(run: Run, here: World) -> Row:
    """From the call that submits to the receiver's counter, both clients in this process."""
    counter = here.receiver.counter(2)
    part = here.region[0:SMALL]
    times, submits = [], []
    for i in range(1, run.scaled(PINGS) + WARM_UP + 1):
        begin = time.perf_counter()
        job = here.sender.write(part, here.grant.descriptor, imm=2, priority="latency")
        told = time.perf_counter()
        counter.wait(i, WAIT_S)
        times.append((time.perf_counter() - begin) * 1e6)
        submits.append((told - begin) * 1e6)
        job.wait(WAIT_S)
    times, submits = times[WARM_UP:], submits[WARM_UP:]
    note = f"p99 {percentile(times, 99):.1f}; of it the call {median(submits):.1f}"
    return Row("4 KiB, submit to the receiver's counter", median(times), "us", "<=", SMALL_US, note)
