# SPDX-License-Identifier: Apache-2.0
"""How soon an abort of one request of many is answered, and that it disturbs no other."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import TYPE_CHECKING

from bench.kv_caches import CacheShape
from bench.kv_pair import WAIT_S, decoder
from bench.kv_prefiller import PrefillerProcess
from bench.pair import daemons
from bench.report import Row
from bench.stats import median, percentile
from transferd.kv import KvFailed

if TYPE_CHECKING:
    from bench.kv_pair import BenchDecoder
    from bench.topic import Run
    from transferd.kv import Transfer

ROUNDS, REQUESTS, ABORTED = 10, 64, 16  # half of the aborted by either side
SHAPE = CacheShape(layers=16, page_tokens=16, item_bytes=64, pages=2048, tail_bytes=4)
TOKENS, LAYERS = 256, 4
ANSWER_MS = 5.0


def rows(run: Run) -> list[Row]:
    """Measures a cache of one region, and one with a region for each layer."""
    apart = dataclasses.replace(SHAPE, apart=True)
    return [
        *of_shape(run, SHAPE, ""),
        *of_shape(run, apart, f", a region for each of {SHAPE.layers} layers"),
    ]


def of_shape(run: Run, shape: CacheShape, what: str) -> list[Row]:
    """Aborts requests of which some layers are there and the others are not computed yet."""
    took: dict[str, list[float]] = {"the decoder": [], "the prefiller": []}
    rounds = run.scaled(ROUNDS)
    undisturbed = 0
    with contextlib.ExitStack() as stack:
        near, far = stack.enter_context(daemons(provider="tcp"))
        there = stack.enter_context(PrefillerProcess(near.socket, shape))
        here = stack.enter_context(decoder(far.socket, shape, stages=8, slots=REQUESTS))
        here.rank.connect(there.address, timeout_s=WAIT_S)
        for number in range(rounds):
            run.gate.wait()
            undisturbed += one_round(here, there, number, took)
    others = rounds * (REQUESTS - ABORTED)
    name = f"abort of one of {REQUESTS}{what}"
    made = [
        Row(
            f"{name} by {who}: answered, idle",
            median(times),
            "ms",
            "<=",
            ANSWER_MS,
            f"p90 {percentile(times, 90):.2f}, largest {max(times):.2f} of {len(times)}",
        )
        for who, times in took.items()
    ]
    return [
        *made,
        Row(
            f"{name}: others that ended with the right bytes",
            float(undisturbed),
            "",
            ">=",
            others,
        ),
    ]


def one_round(
    here: BenchDecoder, there: PrefillerProcess, number: int, took: dict[str, list[float]]
) -> int:
    """Makes requests, aborts some one by one, lets the others end; tells how many ended right."""
    seed = number * REQUESTS
    ids = [f"{number} {each}" for each in range(REQUESTS)]
    there.ask("begin", ids=ids, tokens=TOKENS, seed=seed, fill=True)
    asked = [here.ask(name, there.address, TOKENS) for name in ids]
    there.ask("step", ids=ids, tokens=TOKENS, layers=LAYERS)
    for transfer, _ in asked:
        transfer.wait_layers(LAYERS, WAIT_S)
    for each in range(ABORTED):
        transfer, pages = asked[each]
        who = list(took)[each % 2]
        took[who].append(abort(transfer, there, ids[each], by_decoder=not each % 2) * 1e3)
        here.cache.paint(pages)
    there.ask("rest")
    right = 0
    for each, (transfer, pages) in enumerate(asked):
        if each >= ABORTED:
            transfer.wait(WAIT_S)
            right += here.cache.holds(pages, seed + each)
    for transfer, pages in asked[:ABORTED]:
        if not here.cache.untouched(pages):
            raise AssertionError(f"a byte came late: {transfer}")
    for _, pages in asked:
        here.cache.give_back(pages)
    return right


def abort(transfer: Transfer, there: PrefillerProcess, name: str, *, by_decoder: bool) -> float:
    """Aborts one; tells the seconds until its pages were free at the decoder."""
    if by_decoder:
        begin = time.monotonic()
        transfer.cancel()
    else:
        there.tell("abort", name=name)
    with contextlib.suppress(KvFailed):
        transfer.wait(WAIT_S)
    end = time.monotonic()
    if not by_decoder:
        begin = there.answer()["at"]
    return end - begin
