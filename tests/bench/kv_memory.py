# SPDX-License-Identifier: Apache-2.0
"""What many requests in flight take of host memory, outside of their pages.

That is the growth of what is resident and anonymous (RssAnon) of a rank's process and its daemon's:
caches are shared memory; so is a session's segment, which is as long from the first request on.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from typing import TYPE_CHECKING

from bench.kv_caches import CacheShape
from bench.kv_pair import WAIT_S, decoder
from bench.kv_prefiller import PrefillerProcess
from bench.pair import daemons
from bench.processes import anonymous_bytes
from bench.report import Row

from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.kv_pair import BenchDecoder
    from bench.topic import Run

    Look = Callable[[], int]

REQUESTS, WARM = 2000, 8
LIMIT_KIB = 8.0
STAGES = 8
TOKENS = 10_000
# Pages of DeepSeek-R1's 61 layers, but of 16 bytes each; 40 of them a request.
SHAPE = CacheShape(
    layers=61,
    page_tokens=256,
    item_bytes=16,
    item_tokens=256,
    pages=40 * (REQUESTS + WARM),
    tail_bytes=8,
)
COUNTERS = (REQUESTS + WARM) * (STAGES + 1) + 64


def rows(run: Run) -> list[Row]:
    """Measures the growth of the memory of both ranks and their daemons."""
    with contextlib.ExitStack() as stack:
        near, far = stack.enter_context(
            daemons(
                provider="tcp",
                limits={"counters": COUNTERS},
                tenants=[{"name": "default", "quotas": {"per_session_counters": COUNTERS}}],
            )
        )
        there = stack.enter_context(PrefillerProcess(near.socket, SHAPE))
        here = stack.enter_context(decoder(far.socket, SHAPE, stages=STAGES, slots=REQUESTS + WARM))
        here.rank.connect(there.address, timeout_s=WAIT_S)
        sides = {
            "prefiller": lambda: there.ask("state")["memory"] + anonymous_bytes(near.pid),
            "decoder": lambda: anonymous_bytes(os.getpid()) + anonymous_bytes(far.pid),
        }
        Many(here, there, WARM).run("warm", sides)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what other topics have left would hide what grows
        many = Many(here, there, REQUESTS)
        return [
            Row(
                f"{REQUESTS:,} requests in flight, 40 pages of 61 layers each: host memory of one, "
                f"{side}",
                max(each - found["before"] for each in found.values()) / REQUESTS / 1024,
                "KiB",
                "<=",
                LIMIT_KIB,
                "; ".join(
                    f"{when} {(each - found['before']) / REQUESTS / 1024:.2f}"
                    for when, each in found.items()
                    if when != "before"
                ),
            )
            for side, found in many.run("request", sides).items()
        ]


class Many:
    """Requests that are all in flight at once."""

    def __init__(self, here: BenchDecoder, there: PrefillerProcess, count: int) -> None:
        self._here, self._there, self._count = here, there, count

    def run(self, name: str, sides: dict[str, Look]) -> dict[str, dict[str, int]]:
        """Makes them, and looks at the memory on the way.

        Returns:
            For each side, its memory by what was reached.
        """
        here, there = self._here, self._there
        found: dict[str, dict[str, int]] = {side: {} for side in sides}

        def look(when: str) -> None:
            for side, of in sides.items():
                found[side][when] = of()

        look("before")
        ids = [f"{name} {number}" for number in range(self._count)]
        asked = [here.ask(each, there.address, TOKENS, deadline_s=600.0) for each in ids]
        self._wait_for("transfers", self._count)
        look("asked")
        there.ask("begin", ids=ids, tokens=TOKENS, seed=0, fill=False)
        there.ask("step", ids=ids, tokens=TOKENS, layers=0)
        look("being computed")
        there.ask("more", layers=SHAPE.layers // 2)
        for transfer, _ in asked:
            transfer.wait_layers(SHAPE.layers // 4, WAIT_S)
        look("half of the layers there")
        there.ask("rest")
        for transfer, pages in asked:
            transfer.wait(WAIT_S)
            here.cache.give_back(pages)
        self._wait_for("prefills", 0)
        return found

    def _wait_for(self, what: str, count: int) -> None:
        eventually(
            lambda: self._there.ask("state")[what] == count, f"{count} {what}", timeout_s=WAIT_S
        )
