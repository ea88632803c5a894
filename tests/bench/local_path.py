# SPDX-License-Identifier: Apache-2.0
"""Writes between two clients of one daemon, beside one thread's memcpy and NIXL over UCX's cma.

The same sizes, kind of memory (memfds whose pages have been touched on both sides) and working set;
in turn, as all that is compared.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import cffi

from bench import build, peers, writes
from bench.pair import daemons, endpoints
from bench.random_pages import Shape
from bench.stats import median, spread
from bench.turns import best, in_turn, ratio_row

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.report import Row
    from bench.topic import Run

KIB, MIB = 1 << 10, 1 << 20
SIZE, WINDOW, COUNT = 32 * MIB, 4, 32
SET = SIZE * WINDOW
WRITE = Shape(SIZE, 1, SET)
OVER_MEMCPY, OVER_PEER = 0.9, 1.0
# Beside the bars: writes of other sizes, and pages, with so many jobs in a run.
WRITES = {64 * KIB: 4000, MIB: 1000}
PAGES = {
    Shape(KIB, 4096, 8 * MIB): 400,
    Shape(KIB, 4096, SET): 200,
    Shape(8 * KIB, 4096, SET): 50,
    Shape(64 * KIB, 1024, SET): 25,
}
PINGS = 3000

_ffi = cffi.FFI()
_ffi.cdef("""
    void *copy_map(uint64_t length);
    uint64_t copy_run(void *to, const void *from, uint64_t size, uint64_t slots, uint64_t count);
""")


def rows(run: Run) -> list[Row]:
    """Measures the bars, with the daemon as it is configured by default."""
    us, them = "one daemon, SDK", "memcpy, one thread"
    build.ping()  # before two processes want it at once
    with daemons(1) as (daemon,), endpoints([daemon, daemon], SET) as (one, other):
        count = run.scaled(COUNT)
        _, path = writes.flood_gbps(one, other, SIZE, WINDOW, 2 * WINDOW)  # touches all of it
        measured = {
            us: lambda: writes.flood_gbps(one, other, SIZE, WINDOW, count)[0],
            them: memcpy(SIZE, count),
            f"{us}, one in flight": lambda: writes.flood_gbps(one, other, SIZE, 1, count)[0],
        }
        bar = "same daemon, 32 MiB: ratio to one thread's memcpy"
        peer_bar = f"same daemon, 32 MiB: times {peers.NIXL_CMA}"
        with contextlib.ExitStack() as stack:
            nixl = with_peers(run, stack, peer_bar, measured, count)
            found = in_turn(run, measured, run.turns)
        for name, all_of in found.items():
            run.beside(f"same daemon, 32 MiB: {name}", f"{spread(all_of)} Gbps ({path})")
        made = [ratio_row(bar, found, us, them, OVER_MEMCPY)]
        if nixl:
            made.append(ratio_row(peer_bar, found, us, best(found, nixl), OVER_PEER))
        beside(run, one, other)
    return made


def memcpy(size: int, count: int) -> Callable[[], float]:
    """Prepares memory, and copies it once so that it is there; gives Gbps."""
    library: Any = _ffi.dlopen(str(build.copy()))
    to, source = library.copy_map(SET), library.copy_map(SET)
    if _ffi.NULL in (to, source):
        raise MemoryError(f"no room for two times {SET} bytes")
    slots = SET // size
    library.copy_run(to, source, size, slots, slots)
    return lambda: count * size * 8 / float(library.copy_run(to, source, size, slots, count))


def with_peers(
    run: Run,
    stack: contextlib.ExitStack,
    bar: str,
    measured: dict[str, Callable[[], float]],
    count: int,
) -> list[str]:
    """Adds NIXL, where it is installed, in all ways to run it; gives their names."""
    names = []
    running = stack.enter_context(
        peers.started((peers.NIXL_CMA,), SET, lambda why: run.skip(bar, why))
    )
    for number, way in enumerate(running.get(peers.NIXL_CMA, [])):
        for window in (1, WINDOW):
            name = f"{peers.NIXL_CMA}, {'without' if number else 'with'} thread, {window} in flight"
            measured[name] = peer_writes(way, window, count)
            names.append(name)
    return names


def peer_writes(way: peers.Peer, window: int, count: int) -> Callable[[], float]:
    """Binds a peer to what it is to write."""
    return lambda: way.gbps(WRITE, window, count)


def beside(run: Run, one: Any, other: Any) -> None:
    """Measures what no bar asks for: other sizes, pages, the latency of 4 KiB."""
    for size, count in WRITES.items():
        run.gate.wait()
        found = [
            writes.flood_gbps(one, other, size, WINDOW, run.scaled(count))[0]
            for _ in range(run.turns)
        ]
        copied = memcpy(size, run.scaled(count))
        run.beside(
            f"same daemon, {size // KIB} KiB: SDK; memcpy",
            f"{spread(found)}; {median([copied() for _ in range(run.turns)]):.1f} Gbps",
        )
    for shape, count in PAGES.items():
        writes.prepare_pages(one, shape)
        writes.pages_gbps(one, other, shape, WINDOW, len(shape.tables()))
        run.gate.wait()
        jobs = run.scaled(count)
        found = [writes.pages_gbps(one, other, shape, WINDOW, jobs) for _ in range(run.turns)]
        pages = median(found) * 1e9 / 8 / shape.page / 1e6
        run.beside(f"same daemon, {shape.name}", f"{spread(found)} Gbps; {pages:.2f} M pages/s")
    for native in (False, True):
        run.gate.wait()
        pings = [
            writes.ping(one, other, 4 * KIB, run.scaled(PINGS), native=native)
            for _ in range(run.turns)
        ]
        run.beside(
            f"same daemon, 4 KiB to the receiver's counter, {'C' if native else 'SDK'}: p50; p99",
            f"{spread([ping.p50_us for ping in pings], 1)}; "
            f"{spread([ping.p99_us for ping in pings], 1)} µs",
        )
