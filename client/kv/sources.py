# SPDX-License-Identifier: Apache-2.0
"""Which ranks of a prefiller serve a decoder rank with what, and what it waits for then."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from transferd.kv.address import Offer, Rank, pack_offer, unpack
from transferd.kv.assign import assign
from transferd.kv.planner import make_plan
from transferd.kv.push import stage_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transferd.kv.layout import Layout, Slice
    from transferd.kv.pages import Extent
    from transferd.kv.plan import Plan

COUNTS_KEPT = 4096


@dataclass(frozen=True, slots=True)
class Source:
    """One rank of a prefiller.

    Attributes:
        rank: Who it is.
        offer: What it is told that we want.
        plan: Of that.
        tail: Whether it sends the tail.
        readers: How many ranks of the decoder ask it; of an idle one, tell it.
    """

    rank: Rank
    offer: bytes
    plan: Plan
    tail: bool
    readers: int


@dataclass(slots=True)
class Engine:
    """A prefiller as one rank of a decoder sees it.

    Attributes:
        sources: Its ranks that serve this one.
        idle: Its ranks of which no rank of the decoder wants anything: its first rank tells them.
        steps: Layers that are sent together.
    """

    sources: tuple[Source, ...]
    idle: tuple[Source, ...]
    steps: tuple[tuple[int, ...], ...]
    _counts: dict[Extent, tuple[int, ...]] = field(default_factory=dict)

    def counts(self, extent: Extent, stages: int, tail: bool) -> tuple[int, ...]:
        """Tells what each stage and the tail will count.

        Raises:
            InvalidRequest: FIRST_TOKEN: it is within a page.
        """
        found = self._counts.get(extent)
        if found is None:
            sums = [0] * (stages + 1)
            for source in self.sources:
                for step, count in enumerate(source.plan.counts(extent)):
                    sums[stage_of(step, len(self.steps), stages)] += count
                sums[stages] += tail and source.tail
            found = tuple(sums)
            if len(self._counts) >= COUNTS_KEPT:
                self._counts.clear()
            self._counts[extent] = found
        return found

    def layers_by_stage(self, stages: int) -> tuple[int, ...]:
        """Tells how many layers are here once so many stages are, from the first on."""
        layers = [0] * stages
        for step, members in enumerate(self.steps):
            layers[stage_of(step, len(self.steps), stages)] += len(members)
        for stage in range(1, stages):
            layers[stage] += layers[stage - 1]
        return tuple(layers)


def find_engine(
    address: bytes,
    layouts: Sequence[Layout],
    rank: int,
    steps: tuple[tuple[int, ...], ...],
    tails_bytes: int,
) -> Engine:
    """Plans what the ranks of a prefiller send to a rank of a decoder.

    Args:
        address: Of the prefiller.
        layouts: Of all ranks of the decoder.
        rank: Which of them it is.
        steps: Layers that are sent together.
        tails_bytes: Of the region of tails.

    Raises:
        InvalidRequest: ADDRESS, FINGERPRINT, LAYOUT.
    """
    ranks = unpack(address)
    prefillers = [one.layout for one in ranks]
    tails = bool(layouts[rank].tail_bytes)
    asked = [
        [one for one in assign(prefillers, layouts, n) if one.wanted or (one.tail and tails)]
        for n in range(len(layouts))
    ]
    readers = Counter(one.rank for sources in asked for one in sources)

    def source(number: int, wanted: tuple[Slice, ...], *, tail: bool) -> Source:
        one = ranks[number]
        offer = Offer(layouts[rank], wanted, tail, steps, tails_bytes)
        plan = make_plan(one.layout, layouts[rank], wanted, steps)
        return Source(one, pack_offer(offer), plan, tail, readers[number] or 1)

    found = [source(one.rank, one.wanted, tail=one.tail and tails) for one in asked[rank]]
    idle = [source(n, (), tail=False) for n in range(len(ranks)) if rank == 0 and not readers[n]]
    return Engine(tuple(found), tuple(idle), steps)
