# SPDX-License-Identifier: Apache-2.0
"""Which prefiller rank sends a decoder rank what."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

import transferd
from transferd.kv import Layout, Slice, Source, assign

from support.kv_caches import Family, Kind, Style, lay_out

LATENT = (Kind("kv", 8, 1),)


def gqa(heads: int) -> tuple[Kind, ...]:
    return Kind("k", 2, heads), Kind("v", 2, heads)


def engine(
    kinds: tuple[Kind, ...],
    layers: int,
    ranks: int,
    stages: Sequence[range] | None = None,
    groups: dict[str, tuple[int, ...]] | None = None,
) -> list[Layout]:
    """Lays out an engine: stages by parts of the heads, or copies."""
    members = groups or {"full": tuple(range(layers))}
    families = [Family(name, of, kinds) for name, of in members.items()]
    pages = dict.fromkeys(members, (4, 2))
    return [
        lay_out(families, Style(), stage, (rank, ranks), pages, layers)
        for stage in stages or [range(layers)]
        for rank in range(ranks)
    ]


def everything(sources: Sequence[Source]) -> Counter[tuple[str, str, int, int]]:
    """Counts how often each head of each layer is sent."""
    return Counter(
        (part.group, part.component, layer, head)
        for source in sources
        for part in source.wanted
        for layer in part.layers
        for head in range(part.first_head, part.first_head + part.heads)
    )


def held(layout: Layout) -> set[tuple[str, str, int, int]]:
    return {
        (group.name, component.name, layer, head)
        for group in layout.groups
        for component in group.components
        for layer in group.layers
        for head in range(component.first_head, component.first_head + component.heads)
    }


def loads(prefillers: list[Layout], decoders: list[Layout]) -> tuple[list[int], list[int]]:
    """Tells what each prefiller rank sends when all decoder ranks ask, and how many each asks."""
    sent = [0] * len(prefillers)
    met = []
    for rank, layout in enumerate(decoders):
        sources = assign(prefillers, decoders, rank)
        counts = everything(sources)
        assert set(counts) == held(layout)
        assert set(counts.values()) == {1}
        met.append(len([source for source in sources if source.wanted]))
        for source in sources:
            sent[source.rank] += everything([source]).total()
    return sent, met


@pytest.mark.parametrize("holders", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("askers", [1, 2, 3, 4, 8])
def test_replicas_are_balanced(holders: int, askers: int) -> None:
    sent, met = loads(engine(LATENT, 61, holders), engine(LATENT, 61, askers))
    assert max(sent) - min(sent) <= 1
    assert met == [holders // math.gcd(holders, askers)] * askers


def test_replicas_of_heads_are_balanced() -> None:
    """4 heads on 8 ranks, asked by 4, 2, 8 or 16."""
    for askers in (2, 4, 8, 16):
        sent, _ = loads(engine(gqa(4), 12, 8), engine(gqa(4), 12, askers))
        assert max(sent) == min(sent)


def test_layers_of_two_groups_in_turn_are_balanced() -> None:
    groups = {"full": tuple(range(0, 12, 2)), "window": tuple(range(1, 12, 2))}
    sent, _ = loads(engine(LATENT, 12, 4, groups=groups), engine(LATENT, 12, 1, groups=groups))
    assert sent == [3, 3, 3, 3]


@pytest.mark.parametrize(("prefillers", "decoders"), [(1, 4), (4, 1), (2, 8), (8, 2), (3, 2)])
def test_heads_are_split_and_joined(prefillers: int, decoders: int) -> None:
    sent, met = loads(engine(gqa(24), 4, prefillers), engine(gqa(24), 4, decoders))
    assert len(set(sent)) == 1
    assert max(met) <= max(1, math.ceil(prefillers / decoders) + 1)


@pytest.mark.parametrize(
    ("prefillers", "decoders"),
    [
        ([range(7)], [range(3), range(3, 7)]),
        ([range(2), range(2, 7)], [range(7)]),
        ([range(2), range(2, 5), range(5, 7)], [range(3), range(3, 7)]),
    ],
)
def test_pipeline_stages_may_differ(prefillers: list[range], decoders: list[range]) -> None:
    loads(engine(gqa(4), 7, 2, prefillers), engine(gqa(4), 7, 4, decoders))


def test_heads_that_lie_apart_are_slices_of_their_own() -> None:
    """Rank 0 holds 3 heads, rank 1 the one in the middle: in its turn rank 0 sends the others."""
    (whole,) = engine(gqa(3), 2, 1)
    (middle,) = engine(gqa(3), 2, 1)
    group = middle.groups[0]
    one = tuple(replace(c, first_head=1, heads=1) for c in group.components)
    middle = replace(middle, groups=(replace(group, components=one),))
    sources = assign([whole, middle], [whole], 0)
    assert everything(sources) == Counter(held(whole))
    mine = {(p.first_head, p.heads, p.layers) for p in sources[0].wanted if p.component == "k"}
    assert mine == {(0, 3, (0,)), (0, 1, (1,)), (2, 1, (1,))}


def test_keys_and_values_take_the_same_turn() -> None:
    for source in assign(engine(gqa(1), 5, 3), engine(gqa(1), 5, 1), 0):
        keys, values = source.wanted
        assert isinstance(keys, Slice)
        assert keys.layers == values.layers


def test_what_nobody_holds_is_named() -> None:
    prefillers, decoders = engine(gqa(4), 4, 2), engine(gqa(4), 4, 1)
    with pytest.raises(
        transferd.InvalidRequest,
        match="heads 2 to 3 of k in layer 0 of group full are held by no prefiller rank",
    ):
        assign(prefillers[:1], decoders, 0)
    stages = engine(gqa(4), 4, 1, [range(2), range(2, 4)])
    with pytest.raises(transferd.InvalidRequest, match="k in layer 2 of group full are held by no"):
        assign(stages[:1], decoders, 0)
    with pytest.raises(
        transferd.InvalidRequest, match="heads_total of k: 2 at prefiller rank 1, 4"
    ):
        assign([engine(gqa(4), 4, 1)[0], engine(gqa(2), 4, 1)[0]], decoders, 0)


def test_one_source_sends_the_tail() -> None:
    prefillers = engine(LATENT, 6, 2, [range(3), range(3, 6)])
    decoders = engine(LATENT, 6, 2)
    for rank in range(2):
        tails = [source.rank for source in assign(prefillers, decoders, rank) if source.tail]
        assert tails == [2 + rank]  # the same that sends the last layers
    first, _ = engine(LATENT, 6, 1, [range(3), range(3, 6)])
    sources = assign(prefillers, [first], 0)
    assert [(s.rank, bool(s.wanted), s.tail) for s in sources] == [
        (0, True, False),
        (1, True, False),
        (2, False, True),
    ]
