# SPDX-License-Identifier: Apache-2.0
"""Addresses of prefillers, and which of their ranks a decoder asks for what."""

from __future__ import annotations

import pytest

import transferd
from transferd.client.demo.kvengine import layout_of
from transferd.client.demo.llama import Config
from transferd.kv import Extent, join
from transferd.kv.address import Offer, Rank, pack, pack_offer, unpack, unpack_offer
from transferd.kv.sources import find_engine

LAYOUT = layout_of(Config())


def address(name: str = "p") -> bytes:
    return pack([Rank(name, b"b" * 16, b"mailbox of " + name.encode(), LAYOUT)])


def test_an_address_says_who_and_what() -> None:
    ranks = unpack(join([address("one"), address("two")]))
    assert [rank.name for rank in ranks] == ["one", "two"]
    assert ranks[1].mailbox == b"mailbox of two"
    assert ranks[0].layout == LAYOUT


@pytest.mark.parametrize("wrong", [b"", b"\xff\xff\xff", b"12"])
def test_other_bytes_are_no_address(wrong: bytes) -> None:
    with pytest.raises(transferd.InvalidRequest) as told:
        unpack(wrong)
    assert told.value.reason == "ADDRESS"


def test_a_rank_with_wrong_values_is_refused() -> None:
    with pytest.raises(transferd.InvalidRequest, match="boot"):
        Rank("p", b"short", b"m", LAYOUT)
    with pytest.raises(transferd.InvalidRequest, match="name"):
        Rank("", b"b" * 16, b"m", LAYOUT)


def test_an_offer_comes_back_as_it_was() -> None:
    steps = tuple((layer,) for layer in LAYOUT.layers)
    offer = Offer(LAYOUT, (), True, steps, 4096)
    assert unpack_offer(pack_offer(offer)) == offer
    with pytest.raises(transferd.InvalidRequest):
        unpack_offer(b"\xff")


def test_counts_are_of_all_ranks_and_by_stage() -> None:
    steps = tuple((layer,) for layer in LAYOUT.layers)
    engine = find_engine(address(), [LAYOUT], 0, steps, 1024)
    (source,) = engine.sources
    assert (source.readers, source.tail) == (1, True)
    assert engine.layers_by_stage(3) == (3, 6, 8)
    counts = engine.counts(Extent(40), 3, True)
    each = source.plan.counts(Extent(40))
    assert counts == (sum(each[:3]), sum(each[3:6]), sum(each[6:]), 1)
    assert engine.counts(Extent(40), 3, True) is counts


def test_ranks_that_hold_the_same_have_a_reader_each() -> None:
    steps = tuple((layer,) for layer in LAYOUT.layers)
    both = join([address("one"), address("two")])
    engines = [find_engine(both, [LAYOUT, LAYOUT], rank, steps, 0) for rank in (0, 1)]
    for engine in engines:
        for source in engine.sources:
            asked = sum(source.rank in [s.rank for s in other.sources] for other in engines)
            assert source.readers == asked


def test_ranks_of_which_nobody_wants_anything_are_told_so_once() -> None:
    steps = tuple((layer,) for layer in LAYOUT.layers)
    replicas = join([address(f"p{number}") for number in range(len(steps) * 2 + 1)])
    engines = [find_engine(replicas, [LAYOUT, LAYOUT], rank, steps, 0) for rank in (0, 1)]
    asked = {source.rank.name for engine in engines for source in engine.sources}
    told = [(source.rank.name, source.readers) for source in engines[0].idle]
    assert told == [(f"p{number}", 1) for number in range(17) if f"p{number}" not in asked]
    assert len(told) == 1
    assert engines[1].idle == ()
