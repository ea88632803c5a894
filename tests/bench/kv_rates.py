# SPDX-License-Identifier: Apache-2.0
"""kvbench's DeepSeek-R1 shapes through transferd.kv over tcp, and raw writes in the same turns."""

from __future__ import annotations

import contextlib
import itertools
import time
from typing import TYPE_CHECKING

import psutil

from bench import raw_provider
from bench.kv_caches import CacheShape
from bench.kv_pair import WAIT_S, decoder
from bench.kv_prefiller import PrefillerProcess
from bench.kv_spans import Stopwatch
from bench.pair import daemons
from bench.random_pages import Shape, size_name
from bench.report import Row
from bench.stats import median, spread
from bench.turns import best, in_turn, ratio_row
from transferd.client.ctl.bench.shapes import SHAPES
from transferd.kv import Decoder

if TYPE_CHECKING:
    from bench.kv_pair import BenchDecoder
    from bench.topic import Run
    from transferd.client.ctl.bench.shapes import Shape as Pages

MIB = 1 << 20
WINDOW = 4  # writes in flight over the bare socket
NAMES = ("deepseek-r1-block", "deepseek-r1-layer")
RATIO, OWN_PERCENT = 0.9, 2.0
MEMORY_PARTS = 12  # two caches, two raw pairs of as much, and room
GUARD_BYTES = 4 << 30


def rows(run: Run) -> list[Row]:
    """Measures pages by block and by layer."""
    return [row for name in NAMES for row in one_shape(run, SHAPES[name])]


def cache_shape(pages: Pages, requests: int) -> CacheShape:
    """Tells the cache of a rank that has so many requests of a shape of pages."""
    return CacheShape(
        layers=pages.layers,
        page_tokens=pages.page_tokens,
        item_bytes=pages.token_bytes,
        pages=requests * -(-pages.input_tokens // pages.page_tokens),
        block_layers=pages.block_layers,
    )


def fitting(pages: Pages, available: int) -> int:
    """Tells how many of a shape's requests fit into so many bytes of memory.

    Raises:
        MemoryError: Not even one.
    """
    each = cache_shape(pages, 1).region_bytes
    count = min(pages.requests, max(0, available - GUARD_BYTES) // MEMORY_PARTS // each)
    if not count:
        raise MemoryError(
            f"{pages.name} needs {MEMORY_PARTS * each + GUARD_BYTES >> 20} MiB, "
            f"{available >> 20} are available"
        )
    return count


def available_bytes() -> int:
    """Tells the memory that can be had without swapping."""
    available: int = psutil.virtual_memory().available
    return available


class Requests:
    """All requests of a shape at once, all of them computed before: only transferring is timed.

    Attributes:
        parts: For each time, the seconds of its parts.
    """

    def __init__(
        self, here: BenchDecoder, there: PrefillerProcess, pages: Pages, count: int
    ) -> None:
        """Connects."""
        self._here, self._there = here, there
        self._tokens, self._count = pages.input_tokens, count
        self._serial = itertools.count()
        self._stopwatch = Stopwatch()
        self._stopwatch.watch(Decoder, "request", "prep")
        self.parts: list[dict[str, float]] = []
        here.rank.connect(there.address, timeout_s=WAIT_S)
        there.ask("watch")
        self.seconds(fill=True)
        self.parts.clear()

    def seconds(self, fill: bool = False) -> float:
        """Moves all of them once."""
        turn = next(self._serial)
        ids = [f"{turn} {number}" for number in range(self._count)]
        self._there.ask("prefill", ids=ids, tokens=self._tokens, seed=0, fill=fill)
        self._there.ask("spans")
        self._stopwatch.take()
        cpu, begin = time.process_time(), time.perf_counter()
        asked = [self._here.ask(name, self._there.address, self._tokens) for name in ids]
        for transfer, _ in asked:
            transfer.wait(WAIT_S)
        took = time.perf_counter() - begin
        cpu = time.process_time() - cpu
        spans = self._there.ask("spans")
        prep = self._stopwatch.take()["prep"] + spans["prep"]
        self.parts.append(
            {"all": took, "prep": prep, "post": spans["post"], "cpu": cpu + spans["cpu"]}
        )
        for number, (_, pages) in enumerate(asked):
            if fill and not self._here.cache.holds(pages, number):
                raise AssertionError(f"request {number} has other bytes than were computed")
            self._here.cache.give_back(pages)
        return took

    def close(self) -> None:
        """Stops timing."""
        self._stopwatch.stop()


def one_shape(run: Run, pages: Pages) -> list[Row]:
    """Compares one shape with raw writes of 1 MiB over as many bytes."""
    count = fitting(pages, available_bytes())
    shape = cache_shape(pages, count)
    moved = count * shape.request_bytes(pages.input_tokens)
    pieces = count * shape.request_pages(pages.input_tokens) * len(shape.steps)
    name = f"{pages.name}: {pieces:,} pages of {size_name(pages.page_bytes)}"
    us = "transferd.kv"
    with contextlib.ExitStack() as stack:
        near, far = stack.enter_context(daemons(provider="tcp"))
        there = stack.enter_context(PrefillerProcess(near.socket, shape))
        here = stack.enter_context(decoder(far.socket, shape, slots=2 * count))
        requests = Requests(here, there, pages, count)
        stack.callback(requests.close)
        set_bytes = moved // MIB * MIB
        writes = set_bytes // MIB
        raw = {
            "raw provider, 1 MiB": raw_provider.segments(set_bytes, writes),
            "bare socket, 1 MiB": raw_provider.loop(
                "parts", Shape(MIB, 1, set_bytes), WINDOW, writes, MIB
            ),
        }
        measured = {name: stack.enter_context(flood).gbps for name, flood in raw.items()}
        found = in_turn(
            run,
            {**measured, us: lambda: moved * 8e-9 / requests.seconds()},
            run.turns,
        )
    for what, rates in found.items():
        run.beside(f"{pages.name}: {what}", f"{spread(rates)} Gbps")
    row = ratio_row(f"{name}: ratio to raw", found, us, best(found, list(raw)), RATIO)
    return [row, own_row(run, pages.name, count, requests.parts)]


def own_row(run: Run, name: str, count: int, parts: list[dict[str, float]]) -> Row:
    """Tells the share of preparing and posting."""
    shares = [100 * (each["prep"] + each["post"]) / each["all"] for each in parts]
    both = {what: [each[what] * 1e3 for each in parts] for what in ("all", "prep", "post", "cpu")}
    run.beside(f"{name}: {count} requests, prep", f"{spread(both['prep'])} ms")
    run.beside(f"{name}: post", f"{spread(both['post'])} ms")
    run.beside(f"{name}: from the first request to the last page", f"{spread(both['all'])} ms")
    run.beside(f"{name}: processor time of both ranks", f"{spread(both['cpu'])} ms")
    note = (
        f"prep {median(both['prep']):.2f}, post {median(both['post']):.2f} of "
        f"{median(both['all']):.0f} ms; {spread(shares)} %"
    )
    return Row(f"{name}: prep + post", median(shares), "%", "<=", OWN_PERCENT, note)
