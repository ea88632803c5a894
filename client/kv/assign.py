# SPDX-License-Identifier: Apache-2.0
"""Which prefiller rank sends a decoder rank what."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, NamedTuple

from transferd.kv.fingerprint import check_alike
from transferd.kv.layout import Slice, refuse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transferd.kv.layout import Component, Group, Layout

    Heads = tuple[int, int]  # the first, and the one behind the last
    Ranks = tuple[int, ...]


class Source(NamedTuple):
    """A prefiller rank that a decoder rank gets something from.

    Attributes:
        rank: Of the prefiller.
        wanted: What it sends; empty where it only sends the tail.
        tail: Whether it sends the tail.
    """

    rank: int
    wanted: tuple[Slice, ...]
    tail: bool


def assign(
    prefillers: Sequence[Layout], decoders: Sequence[Layout], rank: int
) -> tuple[Source, ...]:
    """Finds who sends what to one decoder rank: everything that it holds, once.

    Ranks of prefillers that hold the same heads of the same layers take turns, by layer, so that
    when all decoder ranks ask, each of them sends as much as the others, to as few decoder ranks as
    that allows.

    Args:
        prefillers: Layouts of all ranks of the prefiller.
        decoders: Layouts of all ranks of the decoder; they tell who holds the same as this one.
        rank: Of the decoder.

    Returns:
        By rank. One of them, that holds the model's last layer, sends the tail.

    Raises:
        InvalidRequest: FINGERPRINT; or LAYOUT: something is held by no prefiller rank.
    """
    wanted = decoders[rank]
    for number, layout in enumerate(prefillers):
        check_alike(layout, wanted, (f"at prefiller rank {number}", "at the decoder"))
    deal = _Deal(prefillers, decoders, rank)
    for group in wanted.groups:
        for layer in group.layers:
            deal.layer(group, layer)
    slices = deal.slices()
    tail = _tail_rank(prefillers, slices)
    return tuple(
        Source(number, tuple(slices.get(number, ())), number == tail)
        for number in sorted({*slices, tail})
    )


def _tail_rank(prefillers: Sequence[Layout], slices: dict[int, list[Slice]]) -> int:
    """Takes one that holds the last layer; one that sends something anyway, if there is any."""
    last = max((layout.layers[-1:] for layout in prefillers), default=())
    having = [number for number, layout in enumerate(prefillers) if layout.layers[-1:] == last]
    if not having or not last:
        refuse("no prefiller rank holds any layer")
    return min(having, key=lambda number: (number not in slices, number))


class _Share(NamedTuple):
    """Heads of a component whose holders take turns.

    Attributes:
        heads: The heads.
        holders: Ranks of the prefiller.
        fellows: How many decoder ranks need them.
        number: Which of those this one is.
    """

    heads: Heads
    holders: Ranks
    fellows: int
    number: int

    def of(self, turn: int) -> int:
        """Takes the holder whose turn it is.

        All (layer, decoder rank) pairs that need the same are numbered, layer by layer, and dealt
        out in that order, so holders differ by one at most. A decoder rank meets
        n / gcd(n, fellows) of n holders.
        """
        return self.holders[(turn * self.fellows + self.number) % len(self.holders)]


class _Deal:
    """Deals work among ranks that hold the same."""

    def __init__(self, prefillers: Sequence[Layout], decoders: Sequence[Layout], rank: int) -> None:
        self.prefillers = prefillers
        self.decoders = decoders
        self.rank = rank
        self.turns: Counter[Ranks] = Counter()
        self.shares: dict[tuple[str, str, Ranks, Ranks], list[_Share]] = {}
        self.heads: defaultdict[tuple[int, str, str, int], list[Heads]] = defaultdict(list)
        self.held: dict[int, dict[str, frozenset[int]]] = {
            id(layout): {g.name: frozenset(g.layers) for g in layout.groups}
            for layout in (*prefillers, *decoders)
        }

    def layer(self, group: Group, layer: int) -> None:
        """Deals one layer of a group: all its components in the same turn."""
        sources = self._having(self.prefillers, group, layer)
        fellows = self._having(self.decoders, group, layer)
        met: set[Ranks] = set()
        for component in group.components:
            key = (group.name, component.name, sources, fellows)
            shares = self.shares.get(key)
            if shares is None:
                shares = self.shares[key] = self._shares(component, group, sources, fellows)
            for share in shares:
                if not share.holders:
                    refuse(
                        f"heads {share.heads[0]} to {share.heads[1] - 1} of {component.name} in "
                        f"layer {layer} of group {group.name} are held by no prefiller rank"
                    )
                met.add(share.holders)
                number = share.of(self.turns[share.holders])
                self._give((number, group.name, component.name, layer), share.heads)
        self.turns.update(met)

    def _shares(
        self, component: Component, group: Group, sources: Ranks, fellows: Ranks
    ) -> list[_Share]:
        """Cuts the heads that are needed where what a prefiller rank holds begins or ends."""
        held = {n: _heads(self.prefillers[n], group, component) for n in sources}
        others = {n: _heads(self.decoders[n], group, component) for n in fellows}
        first, end = component.first_head, component.first_head + component.heads
        inner = {head for heads in held.values() for head in heads if first < head < end}
        cuts = sorted({first, end, *inner})
        shares = []
        for heads in itertools.pairwise(cuts):
            holders = tuple(n for n in sources if _covers(held[n], heads))
            same = [n for n in fellows if _meets(others[n], heads)]
            shares.append(_Share(heads, holders, len(same), same.index(self.rank)))
        return shares

    def _give(self, whom: tuple[int, str, str, int], heads: Heads) -> None:
        """Notes heads, as one with those before them where they follow each other."""
        given = self.heads[whom]
        if given and given[-1][1] == heads[0]:
            given[-1] = (given[-1][0], heads[1])
        else:
            given.append(heads)

    def slices(self) -> dict[int, list[Slice]]:
        """Puts layers of the same heads together, by rank."""
        layers: defaultdict[tuple[int, str, str, Heads], list[int]] = defaultdict(list)
        for (number, group, component, layer), given in self.heads.items():
            for heads in given:
                layers[number, group, component, heads].append(layer)
        found: defaultdict[int, list[Slice]] = defaultdict(list)
        for (number, group, component, (first, end)), numbers in layers.items():
            found[number].append(
                Slice(
                    group=group,
                    component=component,
                    first_head=first,
                    heads=end - first,
                    layers=tuple(sorted(numbers)),
                )
            )
        return dict(found)

    def _having(self, layouts: Sequence[Layout], group: Group, layer: int) -> Ranks:
        return tuple(
            number
            for number, layout in enumerate(layouts)
            if layer in self.held[id(layout)].get(group.name, ())
        )


def _heads(layout: Layout, group: Group, component: Component) -> Heads:
    there = layout.group(group.name)
    found = there.component(component.name) if there is not None else None
    assert found is not None  # the fingerprints are equal
    return found.first_head, found.first_head + found.heads


def _covers(held: Heads, heads: Heads) -> bool:
    return held[0] <= heads[0] and heads[1] <= held[1]


def _meets(held: Heads, heads: Heads) -> bool:
    return held[0] < heads[1] and heads[0] < held[1]
