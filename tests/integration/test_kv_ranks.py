# SPDX-License-Identifier: Apache-2.0
"""Engines of several ranks: heads, pipeline stages and replicas cut differently on both sides."""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import transferd
from transferd import kv

from support.kv_caches import (
    Cache,
    Content,
    Family,
    Kind,
    Style,
    full_table,
    lay_out,
    part_of,
    parts,
    where,
)

if TYPE_CHECKING:
    import random

    from transferd.kv import Layout

    from support.daemon import DaemonProcess

WAIT_S = 20.0
LAYERS = 6
PAGES = {"full": (8, 12), "window": (8, 12)}
HEADS = (Family("full", tuple(range(LAYERS)), (Kind("k", 32, 4), Kind("v", 32, 4))),)
HYBRID = (
    Family("full", (0, 2, 4), (Kind("k", 16, 4), Kind("v", 16, 4), Kind("scale", 4, 4, 4))),
    Family("window", (1, 3, 5), (Kind("k", 16, 4), Kind("v", 16, 4)), 9),
)
LATENT = (Family("full", tuple(range(LAYERS)), (Kind("latent", 72, 1),)),)
TOKENS, FIRST = 43, 16


def cut(families: tuple[Family, ...], style: Style, stages: int, shares: int) -> list[Layout]:
    """Makes an engine of some pipeline stages, each of some ranks."""
    layers = [
        range(*(first, first + n))
        for first, n in (part_of(LAYERS, i, stages) for i in range(stages))
    ]
    return [
        lay_out(families, style, members, (share, shares), PAGES, LAYERS)
        for members, share in itertools.product(layers, range(shares))
    ]


def memory_of(client: transferd.Client, layout: Layout) -> tuple[Cache, kv.Cache]:
    """Gives a rank a cache that its client has registered."""
    regions = {name: client.alloc(length) for name, length in layout.regions.items()}
    memory = {name: region.numpy("uint8") for name, region in regions.items()}
    return Cache(layout, memory, {}), kv.Cache(layout, regions)


NHD, HND = Style("LCPTH", joint=True), Style("PLHTC", apart=True)


@pytest.mark.parametrize(
    ("families", "prefiller", "decoder"),
    [
        pytest.param(HEADS, (1, 2), (1, 1), id="two parts into one"),
        pytest.param(HEADS, (1, 1), (1, 2), id="one into two parts"),
        pytest.param(HEADS, (2, 1), (1, 4), id="two stages into four parts"),
        pytest.param(HYBRID, (1, 2), (2, 1), id="parts into stages, with a window"),
        pytest.param(LATENT, (1, 2), (1, 2), id="replicas, in pairs"),
        pytest.param(LATENT, (1, 3), (1, 2), id="three replicas into two"),
        pytest.param(LATENT, (1, 8), (1, 1), id="more replicas than layers"),
    ],
)
def test_every_rank_has_what_it_holds(
    shared_pair: tuple[DaemonProcess, DaemonProcess],
    seeded: random.Random,
    families: tuple[Family, ...],
    prefiller: tuple[int, int],
    decoder: tuple[int, int],
) -> None:
    numbers = np.random.default_rng(seeded.getrandbits(32))
    content = Content.of(families, TOKENS, numbers)
    senders, receivers = cut(families, NHD, *prefiller), cut(families, HND, *decoder)
    with contextlib.ExitStack() as stack:
        sides: list[list[tuple[Cache, Any, dict[str, kv.PageTable]]]] = [[], []]
        for side, layouts in enumerate((senders, receivers)):
            for number, layout in enumerate(layouts):
                client = stack.enter_context(transferd.Client(shared_pair[side].socket))
                memory, cache = memory_of(client, layout)
                stack.callback(memory.memory.clear)
                rank: Any = (
                    kv.Decoder(
                        client, cache, f"d{number}", stages=2, slots=4, layouts=layouts, rank=number
                    )
                    if side
                    else kv.Prefiller(client, cache, f"p{number}")
                )
                stack.enter_context(rank)
                tables = {f.name: full_table(layout, f.name, TOKENS, numbers) for f in families}
                sides[side].append((memory, rank, tables))
        address = kv.join([rank.address for _, rank, _ in sides[0]])
        for request in (b"one", b"two"):
            for _, rank, tables in sides[0]:
                rank.begin(request, tables)
            transfers = [
                rank.request(request, address, tables, TOKENS, FIRST)
                for _, rank, tables in sides[1]
            ]
            for begin, end in itertools.pairwise([0, 17, 32, TOKENS]):
                for memory, rank, tables in sides[0]:
                    content.put(memory, tables, range(begin, end))
                    with rank.step({request: end}):
                        pass
            for _, rank, _ in sides[0]:
                rank.finish(request)
            for transfer in transfers:
                transfer.wait(timeout_s=WAIT_S)
            for memory, _, tables in sides[1]:
                check(memory, tables, content)
                for array in memory.memory.values():
                    array[:] = 0  # for the next one
            for _, rank, _ in sides[0]:
                assert rank.released(WAIT_S) == [(request, "read")]


def check(memory: Cache, tables: dict[str, kv.PageTable], content: Content) -> None:
    """Compares a rank's cache with what the request holds."""
    for group, component, layer in parts(memory.layout):
        first = max(FIRST, TOKENS - group.window_tokens) if group.window_tokens else FIRST
        view = memory.view(group, component, layer)
        array = content.arrays[group.name, component.name, layer]
        own = slice(component.first_head, component.first_head + component.heads)
        for item in range(first // component.item_tokens, len(array)):
            page, slot = where(group, component, tables[group.name], item)
            np.testing.assert_array_equal(view[page, slot], array[item, own])
