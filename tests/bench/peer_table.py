# SPDX-License-Identifier: Apache-2.0
"""What other libraries reach beside us, shape by shape: for a table, no bar asks for it."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING

from bench import peers, writes
from bench.pair import daemons, endpoints
from bench.random_pages import Shape
from bench.stats import median
from bench.turns import in_turn

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.pair import Endpoint
    from bench.report import Row
    from bench.topic import Run

KIB, MIB = 1 << 10, 1 << 20
WINDOWS = (1, 4)  # jobs in flight; the better counts
SET = 256 * MIB
TURNS = 3
OURS_TCP, OURS_LOCAL = "transferd tcp", "transferd within one daemon"
# shape: (jobs of ours, jobs of a peer)
SHAPES = {
    Shape(4 * KIB, 1, 16 * KIB): (2000, 500),
    Shape(64 * KIB, 1, 256 * KIB): (2000, 500),
    Shape(1 * MIB, 1, 4 * MIB): (500, 200),
    Shape(32 * MIB, 1, 128 * MIB): (16, 16),
    Shape(1 * KIB, 4096, 8 * MIB): (40, 4),
    Shape(1 * KIB, 4096, SET): (40, 4),
    Shape(8 * KIB, 4096, SET): (8, 4),
    Shape(64 * KIB, 1024, SET): (4, 4),
}
LATENCIES = 2  # so many shapes are also told in microseconds, one at a time


def rows(run: Run) -> list[Row]:
    """Measures all shapes with all libraries, in turn; each at the best of its ways."""
    with contextlib.ExitStack() as stack:
        pair = stack.enter_context(daemons(provider="tcp"))
        ours = {
            OURS_TCP: stack.enter_context(endpoints(pair, SET)),
            OURS_LOCAL: stack.enter_context(endpoints([pair[0], pair[0]], SET)),
        }
        others = stack.enter_context(
            peers.started(list(peers.PEERS), SET, lambda why: run.skip("peers beside us", why))
        )
        for number, (shape, (our_jobs, peer_jobs)) in enumerate(SHAPES.items()):
            measured: dict[tuple[str, int, int], Callable[[], float]] = {}
            usable = [
                (name, way, peer)
                for name, ways in others.items()
                for way, peer in enumerate(ways)
                if able(run, shape, name, peer)
            ]
            for window in WINDOWS:
                for name, (one, other) in ours.items():
                    flood = our_flood(one, other, shape, window, run.scaled(our_jobs))
                    measured[name, window, 0] = flood
                for name, way, peer in usable:
                    flood = functools.partial(peer.gbps, shape, window, peer_jobs)
                    measured[name, window, way] = flood
            turns = in_turn(run, measured, 1 if run.quick else TURNS)
            found = {key: median(values) for key, values in turns.items()}
            tell(run, shape, found, in_us=number < LATENCIES)
    return []


def our_flood(
    one: Endpoint, other: Endpoint, shape: Shape, window: int, jobs: int
) -> Callable[[], float]:
    """Binds a shape, once it has touched its memory."""
    if shape.pages == 1:
        return lambda: writes.flood_gbps(one, other, shape.page, window, jobs)[0]
    writes.prepare_pages(one, shape)
    writes.pages_gbps(one, other, shape, window, len(shape.tables()))
    return functools.partial(writes.pages_gbps, one, other, shape, window, jobs)


def able(run: Run, shape: Shape, name: str, peer: peers.Peer) -> bool:
    """Tells whether a peer does a shape at all; says why not."""
    try:
        peer.gbps(shape, 1, 1)
    except RuntimeError as error:
        run.skip(f"{shape.name}: {name}", str(error))
        return False
    return True


def tell(run: Run, shape: Shape, found: dict[tuple[str, int, int], float], *, in_us: bool) -> None:
    """Says a line for a shape, and one in microseconds."""
    reached: dict[str, float] = {}
    alone: dict[str, float] = {}
    for (name, window, _), gbps in found.items():
        reached[name] = max(gbps, reached.get(name, 0))
        if window == 1:
            alone[name] = max(gbps, alone.get(name, 0))
    if in_us:
        times = (f"{name} {shape.page * 8 / gbps / 1e3:.1f}" for name, gbps in alone.items())
        run.beside(f"{shape.name}, one at a time, µs", "; ".join(times))
    if shape.pages > 1:
        rates = (f"{name} {shape.millions(gbps):.2f}" for name, gbps in reached.items())
        run.beside(f"{shape.name}, M pages/s", "; ".join(rates))
    rates = (f"{name} {gbps:.1f}" for name, gbps in reached.items())
    run.beside(f"{shape.name}, Gbps", "; ".join(rates))
