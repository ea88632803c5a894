# SPDX-License-Identifier: Apache-2.0
"""How long submitting takes: from the call of the SDK until it returns.

What is started is waited for outside of that time. The bar is a paged job of 10,000 pages from
numpy indices; beside it stand other ways to say the same, batches, scatters, asyncio and gRPC.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

import transferd
import transferd.aio
from bench.pair import daemons
from bench.report import Row
from bench.stats import median, percentile, spread

from support.grpc_session import tenants

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from bench.topic import Run
    from transferd import Job

    from support.daemon import DaemonProcess

PAGES, PAGE_BYTES = 10_000, 1024
LIMIT_US = 100.0
CALLS, WARM_UP = 200, 10
MIB = 1 << 20
LENGTH = 16 * MIB
WAIT_S = 30.0
BATCH, BATCH_PAGES = 100, 100
MEMBERS, TARGETS = 56, 4096


def rows(run: Run) -> list[Row]:
    """Measures the bar, and its neighbours beside it."""
    pages = np.random.default_rng(1).permutation(PAGES)
    with daemons(1) as (daemon,):
        found = by_ring(run, daemon, pages)
        by_asyncio(run, daemon, pages)
    with daemons(1, tenants=tenants()) as (daemon,):
        by_rpc(run, daemon, pages)
    return found


def timed(call: Callable[[], Any], wait: Callable[[Any], None], count: int) -> list[float]:
    """Times calls, in microseconds, after some that warm up."""
    took = []
    for _ in range(WARM_UP + count):
        begin = time.perf_counter_ns()
        made = call()
        took.append((time.perf_counter_ns() - begin) / 1e3)
        wait(made)
    return took[WARM_UP:]


def wait_one(job: Job) -> None:
    """Waits for what a call has started."""
    job.wait(WAIT_S)


def wait_all(jobs: Sequence[Job]) -> None:
    """Waits for what a batch has started."""
    for job in jobs:
        job.wait(WAIT_S)


def by_ring(run: Run, daemon: DaemonProcess, pages: NDArray[np.int64]) -> list[Row]:
    """Measures what goes through shared memory, in turns."""
    with transferd.Client(daemon.socket) as far, transferd.Client(daemon.socket) as client:
        region, target = client.alloc(LENGTH), far.alloc(LENGTH)
        region.view[:] = target.view[:] = bytes(LENGTH)  # its pages are there
        dst = target.grant(imms=range(8)).descriptor
        client.warm(dst)

        def write_pages(value: Any) -> Callable[[], Job]:
            return lambda: client.write_pages(region, value, dst, value, PAGE_BYTES, imm=1)

        kinds = {str(kind.__name__): pages.astype(kind) for kind in (np.int32, np.int64)}
        by_kind: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(run.turns):
            for name, value in kinds.items():
                run.gate.wait()
                by_kind[name] += timed(write_pages(value), wait_one, run.scaled(CALLS))
        for name, value in others(pages):
            run.gate.wait()
            say(
                run,
                f"{PAGES:,} pages: {name}",
                timed(write_pages(value), wait_one, run.scaled(CALLS)),
            )
        batches(run, client, region, dst)
        scatters(run, client, region, target)
    worst = max(by_kind, key=lambda name: median(by_kind[name]))
    note = "; ".join(
        f"{name} p50 {median(took):.1f}, p99 {percentile(took, 99):.1f}"
        for name, took in by_kind.items()
    )
    bar = f"submitting a paged job of {PAGES:,} pages from numpy indices, median"
    return [Row(bar, median(by_kind[worst]), "µs", "<=", LIMIT_US, f"{note} µs")]


def others(pages: NDArray[np.int64]) -> Iterator[tuple[str, Any]]:
    """Lists other things that hold the same indices."""
    yield "numpy uint64", pages.astype(np.uint64)
    yield "numpy int64, every other", np.repeat(pages, 2)[::2]
    yield "array('q')", array("q", pages.tolist())
    yield "list", pages.tolist()
    yield "range", range(PAGES)


def batches(run: Run, client: transferd.Client, region: transferd.Region, dst: bytes) -> None:
    """Measures many jobs in one call."""
    index = np.random.default_rng(2).permutation(BATCH_PAGES).astype(np.int32)
    kinds: dict[str, Callable[[], Any]] = {
        f"WritePages of {BATCH_PAGES} pages": lambda: transferd.WritePages(
            src=region, src_pages=index, dst=dst, dst_pages=index, page_bytes=64, imm=1
        ),
        "Write": lambda: transferd.Write(src=region[0:64], dst=dst, imm=1),
    }
    for name, make in kinds.items():
        run.gate.wait()
        took = timed(
            partial(lambda make: client.submit([make() for _ in range(BATCH)]), make),
            wait_all,
            run.scaled(CALLS),
        )
        say(run, f"submit of {BATCH} x {name}, a job", [each / BATCH for each in took])


def scatters(
    run: Run, client: transferd.Client, region: transferd.Region, target: transferd.Region
) -> None:
    """Measures scatters whose targets are a list, and an array."""
    group = client.peer_group(
        [target.grant(i * 4096, 4096, imms=range(8)).descriptor for i in range(MEMBERS)]
    )
    for count in (MEMBERS, TARGETS):
        table = np.array([[i % MEMBERS, 64 * i, 0, 64] for i in range(count)])
        kinds = {"a list": [tuple(row) for row in table.tolist()], "an array": table}
        for name, targets in kinds.items():
            scatter = partial(client.scatter, region, targets, imm=1, group=group)
            run.gate.wait()
            took = timed(scatter, wait_one, run.scaled(CALLS))
            say(run, f"scatter to {count:,} targets in {name}", took)


def by_asyncio(run: Run, daemon: DaemonProcess, pages: NDArray[np.int64]) -> None:
    """Measures the asyncio twin."""

    async def measure() -> list[float]:
        took = []
        async with transferd.aio.Client(daemon.socket) as client:
            region = await client.alloc(LENGTH)
            grant = await region.grant(imms=range(8))
            await client.warm(grant.descriptor)
            for _ in range(WARM_UP + CALLS):
                begin = time.perf_counter_ns()
                job = await client.write_pages(
                    region, pages, grant.descriptor, pages, PAGE_BYTES, imm=1
                )
                took.append((time.perf_counter_ns() - begin) / 1e3)
                await job.wait(WAIT_S)
        return took[WARM_UP:]

    run.gate.wait()
    say(run, f"{PAGES:,} pages: numpy int64, by asyncio", asyncio.run(measure()))


def by_rpc(run: Run, daemon: DaemonProcess, pages: NDArray[np.int64]) -> None:
    """Measures a session without shared memory."""
    with (
        transferd.Client(daemon.socket) as far,
        transferd.Client(daemon.socket, shared_memory=False) as client,
    ):
        region, target = client.alloc(LENGTH), far.alloc(LENGTH)
        dst = target.grant(imms=range(8)).descriptor
        for name, part in (("1 page", [0]), (f"{PAGES:,} pages", pages)):
            write = partial(client.write_pages, region, part, dst, part, PAGE_BYTES, imm=1)
            run.gate.wait()
            say(run, f"{name} by gRPC", timed(write, wait_one, run.scaled(CALLS)))


def say(run: Run, what: str, took: Sequence[float]) -> None:
    """Puts what no bar asks for beside."""
    run.beside(
        f"submit, {what}: smallest / p50 / largest; p99",
        f"{spread(took, 1)}; {percentile(took, 99):.1f} µs",
    )
