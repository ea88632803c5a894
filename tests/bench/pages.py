# SPDX-License-Identifier: Apache-2.0
"""Pages over tcp between two daemons, beside bare loops and NIXL in the same turns."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from bench import peers, raw_provider, writes
from bench.pair import daemons, endpoints
from bench.random_pages import Shape, size_name
from bench.stats import spread
from bench.turns import best, in_turn, ratio_row

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.pair import Endpoint
    from bench.report import Row
    from bench.topic import Run

KIB, MIB = 1 << 10, 1 << 20
WINDOW = 4  # jobs in flight, here, in the loops and in the peers
SET = 256 * MIB
SMALL = (Shape(1 * KIB, 4096, 8 * MIB), Shape(1 * KIB, 4096, SET))
SMALL_JOBS, PEER_JOBS = 150, 8
PACK_BUFFERS = (32 * KIB, 64 * KIB, 256 * KIB)
OVER_LOOP, OVER_PEER = 0.6, 8.0
# shape: (least ratio to the raw rate of writes of 1 MiB, jobs)
LARGE = {Shape(8 * KIB, 4096, SET): (0.8, 32), Shape(64 * KIB, 1024, SET): (0.9, 16)}
WRITE = Shape(1 * MIB, 1, SET)
WRITES = 1000


def rows(run: Run) -> list[Row]:
    """Measures pages of 1 KiB, which others pack, and of 8 and 64 KiB, which should not cost."""
    with daemons(provider="tcp") as pair, endpoints(pair, SET) as (one, other):
        found = [row for shape in SMALL for row in small_pages(run, one, other, shape)]
        return found + large_pages(run, one, other)


# ---- pages of 1 KiB ----


def small_pages(run: Run, one: Endpoint, other: Endpoint, shape: Shape) -> list[Row]:
    """Compares one shape with bare loops and with NIXL."""
    jobs = run.scaled(SMALL_JOBS)
    us = "daemons"
    loops, nixl = [], []
    with contextlib.ExitStack() as stack:
        measured = {us: daemons_pages(one, other, shape, jobs)}
        for size in PACK_BUFFERS:
            loops.append(name := f"pack loop, {size_name(size)}")
            flood = raw_provider.loop("pack", shape, WINDOW, jobs, size)
            measured[name] = stack.enter_context(flood).gbps
        parts = raw_provider.loop("parts", shape, WINDOW, jobs, MIB)
        measured["loop without copies"] = stack.enter_context(parts).gbps
        peer = f"{shape.name}: times {peers.NIXL_TCP}"
        running = stack.enter_context(
            peers.started((peers.NIXL_TCP,), SET, lambda why: run.skip(peer, why))
        )
        for number, way in enumerate(running.get(peers.NIXL_TCP, [])):
            nixl.append(name := f"{peers.NIXL_TCP}, {'without' if number else 'with'} thread")
            measured[name] = peer_pages(way, shape)
        found = in_turn(run, measured, run.turns)
    for name, all_of in found.items():
        rates = [shape.millions(gbps) for gbps in all_of]
        run.beside(f"{shape.name}: {name}", f"{spread(rates)} M pages/s")
    made = [
        ratio_row(f"{shape.name}: ratio to the bare loop", found, us, best(found, loops), OVER_LOOP)
    ]
    if nixl:
        made.append(ratio_row(peer, found, us, best(found, nixl), OVER_PEER))
    return made


def daemons_pages(one: Endpoint, other: Endpoint, shape: Shape, jobs: int) -> Callable[[], float]:
    """Prepares a shape, and runs it once so that its memory has been touched."""
    writes.prepare_pages(one, shape)
    writes.pages_gbps(one, other, shape, WINDOW, len(shape.tables()))
    return lambda: writes.pages_gbps(one, other, shape, WINDOW, jobs)


def peer_pages(way: peers.Peer, shape: Shape) -> Callable[[], float]:
    """Binds a peer to a shape."""
    return lambda: way.gbps(shape, WINDOW, PEER_JOBS)


# ---- pages of 8 and 64 KiB ----


def large_pages(run: Run, one: Endpoint, other: Endpoint) -> list[Row]:
    """Compares pages with raw writes of 1 MiB over as large a working set."""
    with contextlib.ExitStack() as stack:
        count = run.scaled(WRITES)
        provider = stack.enter_context(raw_provider.segments(SET, count))
        socket = stack.enter_context(raw_provider.loop("parts", WRITE, WINDOW, count, MIB))
        raw = {"raw provider, 1 MiB": provider.gbps, "bare socket, 1 MiB": socket.gbps}
        ours = {
            shape.name: daemons_pages(one, other, shape, run.scaled(jobs))
            for shape, (_, jobs) in LARGE.items()
        }
        found = in_turn(run, {**raw, **ours}, run.turns)
    for name, all_of in found.items():
        run.beside(name, f"{spread(all_of)} Gbps")
    theirs = best(found, list(raw))
    return [
        ratio_row(f"{shape.name}: ratio to raw 1 MiB", found, shape.name, theirs, least)
        for shape, (least, _) in LARGE.items()
    ]
