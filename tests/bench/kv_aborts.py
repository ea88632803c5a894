# SPDX-License-Identifier: Apache-2.0
"""Requests aborted in mid-transfer, whose pages are used again at once: no byte comes late."""

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
from transferd.kv import KvFailed

if TYPE_CHECKING:
    from bench.kv_pair import BenchDecoder
    from bench.topic import Run

ABORTS = 200
SHAPE = CacheShape(layers=16, page_tokens=16, item_bytes=1024, pages=512)
TOKENS = 4096  # 64 MiB: some 12 ms over loopback
LATER_TOKENS = 256


def rows(run: Run) -> list[Row]:
    """Aborts, from either side in turn, what is on its way."""
    wanted = run.scaled(ABORTS)
    with contextlib.ExitStack() as stack:
        near, far = stack.enter_context(daemons(provider="tcp"))
        there = stack.enter_context(PrefillerProcess(near.socket, SHAPE))
        here = stack.enter_context(decoder(far.socket, SHAPE, stages=8, slots=8))
        here.rank.connect(there.address, timeout_s=WAIT_S)
        good, met, made = abort_many(here, there, wanted)
    return [
        Row(
            "aborted in mid-transfer, pages used again at once: canaries intact",
            float(good),
            "",
            ">=",
            wanted,
            f"{met} were met in mid-transfer, of {made} made; half by the decoder",
        )
    ]


def abort_many(here: BenchDecoder, there: PrefillerProcess, wanted: int) -> tuple[int, int, int]:
    """Aborts until enough were met in mid-transfer.

    Returns:
        How many of those that were met left no late byte; how many were met; how many there were.
    """
    chance = random.Random(11)
    good = met = number = 0
    while met < wanted and number < 3 * wanted:
        name = f"abort {number}"
        there.ask("prefill", ids=[name], tokens=TOKENS, seed=number)
        transfer, pages = here.ask(name, there.address, TOKENS)
        transfer.wait_layers(1, WAIT_S)
        time.sleep(chance.uniform(0, 0.006))
        if met % 2:
            transfer.cancel()
        else:
            there.tell("abort", name=name)
        with contextlib.suppress(KvFailed):
            transfer.wait(WAIT_S)
        here.cache.paint(pages)
        caught = transfer.outcome is not None and transfer.outcome.name != "COMPLETE"
        if not met % 2:
            there.answer()
        # What is pushed later, by the same connection, has come: so would have what is late.
        fine = later(here, there, f"later {number}", number)
        fine &= here.cache.untouched(pages)
        here.cache.give_back(pages)
        met += caught
        good += caught and fine
        number += 1
        if not fine:
            break
    return good, met, number


def later(here: BenchDecoder, there: PrefillerProcess, name: str, seed: int) -> bool:
    """Moves a small request into other pages; tells whether its bytes are right."""
    there.ask("prefill", ids=[name], tokens=LATER_TOKENS, seed=seed)
    transfer, pages = here.ask(name, there.address, LATER_TOKENS)
    transfer.wait(WAIT_S)
    right = here.cache.holds(pages, seed)
    here.cache.give_back(pages)
    return right
