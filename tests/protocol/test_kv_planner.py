# SPDX-License-Identifier: Apache-2.0
"""Any two engines' layouts: what the planner moves is what a plain re-layout in numpy gives."""

import contextlib
import itertools
import math
from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, event, given, reject, settings
from hypothesis import strategies as st

import transferd
from transferd.kv import Extent, Layout, PageTable, Slice, assign, make_plan, needed, wire
from transferd.kv.overlap import Box, find_overlap
from transferd.kv.v1 import layout_pb2

from support.kv_caches import (
    Cache,
    Content,
    Family,
    Kind,
    Style,
    full_table,
    lay_out,
    parts,
    room,
    where,
    write_pages,
)

pytestmark = pytest.mark.slow

MANY = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)


@dataclass(frozen=True)
class Engine:
    """One side: layouts of its ranks, and tokens of a page in each group."""

    layouts: tuple[Layout, ...]
    page_tokens: dict[str, int]


@dataclass(frozen=True)
class Case:
    """Two engines and a request."""

    families: tuple[Family, ...]
    prefiller: Engine
    decoder: Engine
    extent: Extent
    steps: int
    together: int
    cuts: tuple[int, ...]
    seed: int


styles = st.builds(
    Style,
    order=st.permutations("LPTHC").map("".join),
    joint=st.booleans(),
    beside=st.booleans(),
    apart=st.booleans(),
    backward=st.booleans(),
    padding=st.sampled_from([0, 0, 3, 16]),
)


@st.composite
def families_of(draw: st.DrawFn, layers: int, items: dict[str, int]) -> tuple[Family, ...]:
    """Draws groups; a layer may be in several."""
    found = []
    for name, most in items.items():
        heads = draw(st.integers(1, 4))
        kinds = [Kind("k", draw(st.sampled_from([1, 4, 8])), heads)]
        if draw(st.booleans()):
            kinds.append(Kind("v", kinds[0].head_bytes, heads))
        if draw(st.booleans()):
            kinds.append(Kind("latent", draw(st.integers(1, 9)), 1))
        if draw(st.booleans()):
            per = draw(st.sampled_from([n for n in range(1, most + 1) if most % n == 0]))
            kinds.append(Kind("scale", 2, draw(st.sampled_from([1, heads])), per))
        members = draw(st.sets(st.integers(0, layers - 1), min_size=1))
        window = draw(st.sampled_from([0, 0, 1, 5]))
        found.append(Family(name, tuple(sorted(members)), tuple(kinds), window))
    return tuple(found)


@st.composite
def engines(
    draw: st.DrawFn, families: tuple[Family, ...], layers: int, pages: dict[str, int], tokens: int
) -> Engine:
    """Draws pipeline stages and parts of the heads, and a style for each rank."""
    stages = draw(st.integers(1, min(layers, 3)))
    cuts = (
        sorted(draw(st.sets(st.integers(1, layers - 1), max_size=stages - 1))) if layers > 1 else []
    )
    bounds = list(itertools.pairwise([0, *cuts, layers]))
    # Ranks of which some hold the same, and whose heads may begin anywhere.
    sharing = draw(st.lists(st.integers(1, 5), min_size=1, max_size=2))
    shares = [(i, n) for n in sharing for i in range(n)]
    layouts = []
    for (first, end), share in itertools.product(bounds, shares):
        layouts.append(
            lay_out(
                families,
                draw(styles),
                range(first, end),
                share,
                room(families, pages, tokens),
                layers,
            )
        )
    return Engine(tuple(layouts), pages)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draws two engines of one model, and a request."""
    layers = draw(st.integers(1, 4))
    names = ["full", "window"][: draw(st.integers(1, 2))]
    sizes = {n: (draw(st.sampled_from(PAGES)), draw(st.sampled_from(PAGES))) for n in names}
    units = {n: math.gcd(*both) for n, both in sizes.items()}
    families = draw(families_of(layers, units))
    tokens = draw(st.integers(1, 40))
    whole = math.lcm(*units.values())
    first = whole * draw(st.integers(0, tokens // whole))
    return Case(
        families,
        draw(engines(families, layers, {n: one for n, (one, _) in sizes.items()}, tokens)),
        draw(engines(families, layers, {n: other for n, (_, other) in sizes.items()}, tokens)),
        Extent(tokens, first),
        draw(st.integers(1, layers)),
        draw(st.integers(1, layers)),
        tuple(sorted(draw(st.lists(st.integers(0, tokens), max_size=4)))),
        draw(st.integers(0, 1 << 32)),
    )


PAGES = [1, 2, 3, 4, 8, 12]


def part_table(table: PageTable, entries: range) -> PageTable:
    """Cuts a block table to what goes over the wire."""
    return PageTable(
        table.numbers[entries.start - table.first : entries.stop - table.first], entries.start
    )


@given(cases())
@MANY
def test_what_arrives_is_a_plain_relayout(case: Case) -> None:
    relay(case)


@pytest.mark.long
@given(cases())
@settings(MANY, max_examples=50)
def test_what_is_cut_arrives_as_well(case: Case) -> None:
    """Jobs, writes and indices are so small that most are cut."""
    with (
        mock.patch("transferd.kv.plan.JOB_PIECES_MAX", 3),
        mock.patch("transferd.kv.plan.TOGETHER_PIECES_MAX", 4),
        mock.patch("transferd.kv.plan.INDEX_MAX", 100),
        mock.patch("transferd.kv.planner.JOINED_PIECES_MAX", 2),
        mock.patch("transferd.kv.planner.INDEX_MAX", 100),
    ):
        try:
            relay(case)
        except transferd.InvalidRequest as error:
            if "common strides apart" not in str(error):
                raise
            reject()


def relay(case: Case) -> None:
    """Sends a request from one engine to the other, and compares what has arrived."""
    random = np.random.default_rng(case.seed)
    content = Content.of(case.families, case.extent.tokens, random)
    sources, tables = [], []
    for layout in case.prefiller.layouts:
        cache = Cache.of(layout, random)
        own = {
            f.name: full_table(layout, f.name, case.extent.tokens, random) for f in case.families
        }
        sources.append(cache)
        tables.append(own)
    event(f"{len(case.prefiller.layouts)} to {len(case.decoder.layouts)} ranks")
    for rank, layout in enumerate(case.decoder.layouts):
        target = Cache.of(layout, random)
        own = {
            f.name: full_table(layout, f.name, case.extent.tokens, random) for f in case.families
        }
        before = {name: memory.copy() for name, memory in target.memory.items()}
        for source in assign([c.layout for c in sources], case.decoder.layouts, rank):
            prefiller = sources[source.rank], tables[source.rank]
            for memory in prefiller[0].memory.values():  # nothing is computed yet
                memory[:] = random.integers(0, 256, len(memory), dtype=np.uint8)
            deliver(case, content, source.wanted, prefiller, (target, own))
        compare(case, content, target, own, before)


def deliver(
    case: Case,
    content: Content,
    wanted: tuple[Slice, ...],
    prefiller: tuple[Cache, dict[str, PageTable]],
    decoder: tuple[Cache, dict[str, PageTable]],
) -> None:
    """Computes and sends one rank's part, chunk by chunk, and compares the counts."""
    (cache, tables), (target, own) = prefiller, decoder
    layers = target.layout.layers
    steps = [layers[i : i + case.steps] for i in range(0, len(layers), case.steps)]
    plan = make_plan(cache.layout, target.layout, wanted, steps)
    entries = needed(target.layout, case.extent)
    sent = {name: part_table(own[name], of) for name, of in entries.items() if of}
    delivery = plan.delivery(case.extent, sent)
    stages = [*range(0, len(steps), case.together), len(steps)]
    counted = [0] * (len(stages) - 1)
    for begin, end in itertools.pairwise([0, *case.cuts, case.extent.tokens]):
        content.put(cache, tables, range(begin, end))
        sending = delivery.sending(begin, end, tables)
        for stage, (at, last) in enumerate(itertools.pairwise(stages)):
            while at < last:
                first, at = at, sending.together(at, last)
                for write in sending.writes(first, at):
                    pieces = write_pages(sending.job(write), cache, target)
                    assert pieces == len(write.pieces)
                    counted[stage] += pieces
    counts = plan.counts(case.extent)
    assert counted == [sum(counts[at:last]) for at, last in itertools.pairwise(stages)]


def compare(
    case: Case,
    content: Content,
    target: Cache,
    own: dict[str, PageTable],
    before: dict[str, np.ndarray],
) -> None:
    """Compares a decoder rank's memory with what it should hold, byte by byte."""
    may_change = {name: np.zeros(len(memory), bool) for name, memory in target.memory.items()}
    marks = Cache(target.layout, may_change, may_change)
    tokens, first = case.extent.tokens, case.extent.first_token
    for group, component, layer in parts(target.layout):
        unit = math.gcd(*(e.page_tokens[group.name] for e in (case.prefiller, case.decoder)))
        begin = max(first, tokens - group.window_tokens) if group.window_tokens else first
        array = content.arrays[group.name, component.name, layer]
        heads = slice(component.first_head, component.first_head + component.heads)
        view, mark = target.view(group, component, layer), marks.view(group, component, layer)
        items = range(begin // unit * unit, -(-tokens // unit) * unit, component.item_tokens)
        for token in items if begin < tokens else ():
            item = token // component.item_tokens
            page, slot = where(group, component, own[group.name], item)
            assert page is not None
            mark[page, slot] = True
            if token < tokens and token + component.item_tokens > begin:
                np.testing.assert_array_equal(view[page, slot], array[item, heads])
    for name, allowed in may_change.items():
        np.testing.assert_array_equal(target.memory[name][~allowed], before[name][~allowed])
        np.testing.assert_array_equal(target.written[name], allowed.astype(np.uint8))


axes = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 24)), max_size=3).map(tuple)
boxes = st.builds(Box, st.integers(0, 30), st.integers(1, 4), axes)


def bytes_of(box: Box) -> list[int]:
    steps = [[i * stride for i in range(count)] for count, stride in box.axes]
    return [box.start + sum(at) + i for at in itertools.product(*steps) for i in range(box.size)]


@given(st.lists(boxes, min_size=1, max_size=4))
@settings(max_examples=500, deadline=None)
def test_no_overlap_is_missed(found: list[Box]) -> None:
    whole = [box for box in found if box.is_nested()]
    assert all(len(set(bytes_of(box))) == len(bytes_of(box)) for box in whole)
    if find_overlap([(box, str(i)) for i, box in enumerate(whole)]) is None:
        everything = [byte for box in whole for byte in bytes_of(box)]
        assert len(set(everything)) == len(everything)


@given(cases(), st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_messages_of_a_peer(case: Case, data: st.DataObject) -> None:
    """Layouts go over the wire as they are; damaged ones are refused or plan as any other."""
    own, theirs = case.prefiller.layouts[0], case.decoder.layouts[0]
    raw = wire.layout_to_proto(theirs).SerializeToString()
    assert wire.layout_from_proto(layout_pb2.Layout.FromString(raw)) == theirs
    damaged = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    message = layout_pb2.Layout()
    try:
        message.ParseFromString(bytes(damaged))
    except DecodeError:
        return
    with contextlib.suppress(transferd.InvalidRequest):
        make_plan(own, wire.layout_from_proto(message)).counts(case.extent)
