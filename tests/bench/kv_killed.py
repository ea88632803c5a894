# SPDX-License-Identifier: Apache-2.0
"""Prefillers killed in mid-transfer: requests go to another one, and end with the right bytes."""

from __future__ import annotations

import contextlib
import random
import time
from typing import TYPE_CHECKING

from bench.kv_caches import CacheShape
from bench.kv_pair import WAIT_S, decoder
from bench.kv_prefiller import PrefillerProcess
from bench.pair import daemons
from bench.report import Row
from bench.stats import percentile, spread
from transferd.kv import KvFailed, Outcome

if TYPE_CHECKING:
    from bench.kv_pair import BenchDecoder
    from bench.topic import Run

ROUNDS, BOUND_S = 50, 5.0
# 16 MiB a request: four of them take some 15 ms over loopback, long enough to be met on their way.
SHAPE = CacheShape(layers=16, page_tokens=16, item_bytes=1024, pages=1024)
TOKENS, LAYERS = 1024, 5
FLYING, PARTLY = 4, 2  # requests that are computed, and whose first layers are


def rows(run: Run) -> list[Row]:
    """Kills a prefiller in each round while its requests are on their way."""
    rounds = run.scaled(ROUNDS)
    random_of = random.Random(7)
    took: list[float] = []
    right = met = 0
    with contextlib.ExitStack() as stack:
        near, far = stack.enter_context(daemons(provider="tcp"))
        here = stack.enter_context(decoder(far.socket, SHAPE, stages=8, slots=32))
        other = stack.enter_context(PrefillerProcess(near.socket, SHAPE))
        for number in range(rounds):
            with PrefillerProcess(near.socket, SHAPE) as victim:
                one = Round(here, victim, other, number)
                took += one.run(random_of.uniform(0, 0.01))
            right += one.right
            met += one.met
    run.beside(
        "from kill -9 until a request has ended by another prefiller",
        f"{spread(took)} s, p90 {percentile(took, 90):.2f} of {len(took)}",
    )
    name = "prefiller killed -9 in mid-transfer"
    return [
        Row(
            f"{name}: rounds in which every request ended with the right bytes",
            float(right),
            "",
            ">=",
            rounds,
            f"{met} of {rounds * (FLYING + PARTLY)} requests were met unfinished",
        ),
        Row(f"{name}: the slowest request ended within", max(took), "s", "<=", BOUND_S),
    ]


class Round:
    """One prefiller that dies.

    Attributes:
        right: Whether all bytes were right in the end.
        met: Requests that had not ended when it died.
    """

    def __init__(
        self, here: BenchDecoder, victim: PrefillerProcess, other: PrefillerProcess, number: int
    ) -> None:
        self._here, self._victim, self._other = here, victim, other
        self._seed = number * (FLYING + PARTLY)
        self._ids = [f"{number} {each}" for each in range(FLYING + PARTLY)]
        self.right = True
        self.met = 0

    def run(self, delay_s: float) -> list[float]:
        """Kills it so long after the first pages have come.

        Returns:
            For each request that was met, the seconds from the kill to its right end.
        """
        here, ids = self._here, self._ids
        here.rank.connect(self._victim.address, timeout_s=WAIT_S)
        flying, partly = ids[:FLYING], ids[FLYING:]
        self._victim.ask("prefill", ids=flying, tokens=TOKENS, seed=self._seed)
        self._victim.ask("begin", ids=partly, tokens=TOKENS, seed=self._seed + FLYING, fill=True)
        self._victim.ask("step", ids=partly, tokens=TOKENS, layers=LAYERS)
        asked = [here.ask(name, self._victim.address, TOKENS) for name in ids]
        asked[0][0].wait_layers(1, WAIT_S)
        time.sleep(delay_s)
        died = time.monotonic()
        self._victim.kill()
        again = {}
        for each, (transfer, pages) in enumerate(asked):
            try:
                transfer.wait(WAIT_S)
                self._judge(each, pages)
            except KvFailed as failed:
                if failed.outcome not in (Outcome.LOST, Outcome.FAILED):
                    raise
                self._other.ask("prefill", ids=[ids[each]], tokens=TOKENS, seed=self._seed + each)
                # The same pages again, at once: a late byte of the dead one would show in them.
                again[each] = (
                    here.ask_into(ids[each], self._other.address, TOKENS, pages),
                    pages,
                )
        self.met = len(again)
        ends = []
        for transfer, _ in again.values():
            transfer.wait(WAIT_S)
            ends.append(time.monotonic() - died)
        for each, (_, pages) in again.items():
            self._judge(each, pages)
        return ends

    def _judge(self, each: int, pages: object) -> None:
        self.right &= self._here.cache.holds(pages, self._seed + each)
        self._here.cache.give_back(pages)
