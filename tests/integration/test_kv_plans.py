# SPDX-License-Identifier: Apache-2.0
"""Plans between KV caches, carried out: their writes and counts are those of the daemon."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest

from transferd.kv import Extent, Layout, assign, make_plan

from support.kv_caches import Cache, Content, Family, Kind, Style, full_table, lay_out, parts, where

if TYPE_CHECKING:
    import random

    from transferd import Client, Region

pytestmark = pytest.mark.slow

WAIT_S = 20.0
FAMILIES = (
    Family("full", (0, 1, 2), (Kind("k", 32, 4), Kind("v", 32, 4), Kind("scale", 4, 4, 4))),
    Family("window", (3, 4), (Kind("latent", 72, 1),), 9),
)
PREFILLER, DECODER = {"full": (4, 16), "window": (8, 8)}, {"full": (8, 8), "window": (4, 16)}
EXTENT = Extent(43, 16)
CUTS = [0, 17, 32, 43]


def in_memory_of(client: Client, layout: Layout, content: np.random.Generator) -> tuple:
    """Gives a cache memory that the client has registered."""
    regions = {name: client.alloc(length) for name, length in layout.regions.items()}
    memory = {name: region.numpy("uint8") for name, region in regions.items()}
    for array in memory.values():
        array[:] = content.integers(0, 256, len(array), dtype=np.uint8)
    return Cache(layout, memory, {}), regions


def test_two_ranks_fill_the_cache_of_one(
    sender: Client, receiver: Client, seeded: random.Random
) -> None:
    numbers = np.random.default_rng(seeded.getrandbits(32))
    content = Content.of(FAMILIES, EXTENT.tokens, numbers)
    layouts = [
        lay_out(FAMILIES, Style("PLHTC", joint=True), range(5), (n, 2), PREFILLER, 5)
        for n in (0, 1)
    ]
    layout = lay_out(FAMILIES, Style("LPTHC", apart=True), range(5), (0, 1), DECODER, 5)
    target, own_regions = in_memory_of(receiver, layout, numbers)
    own = {f.name: full_table(layout, f.name, EXTENT.tokens, numbers) for f in FAMILIES}
    grants = {name: region.grant(imms=range(8)) for name, region in own_regions.items()}
    descriptors = {name: grant.descriptor for name, grant in grants.items()}
    expected = np.zeros(5, dtype=np.int64)
    for source in assign(layouts, [layout], 0):
        cache, regions = in_memory_of(sender, layouts[source.rank], numbers)
        plan = make_plan(cache.layout, layout, source.wanted)
        expected += plan.counts(EXTENT)
        tables = {
            f.name: full_table(cache.layout, f.name, EXTENT.tokens, numbers) for f in FAMILIES
        }
        delivery = plan.delivery(EXTENT, own)
        for begin, end in itertools.pairwise(CUTS):
            content.put(cache, tables, range(begin, end))
            send(sender, delivery.chunk(begin, end, tables), regions, descriptors)
    for step, count in enumerate(expected.tolist()):
        receiver.counter(step).wait(count, timeout_s=WAIT_S)
        assert receiver.counter(step).value == count
    for group, component, layer in parts(layout):
        first = EXTENT.tokens - 9 if group.name == "window" else EXTENT.first_token
        view = target.view(group, component, layer)
        array = content.arrays[group.name, component.name, layer]
        for item in range(first // component.item_tokens, len(array)):
            page, slot = where(group, component, own[group.name], item)
            np.testing.assert_array_equal(view[page, slot], array[item])


def send(
    client: Client, chunk: tuple, regions: dict[str, Region], descriptors: dict[str, bytes]
) -> None:
    """Sends what a chunk completes, each step on an immediate of its own."""
    operations = [
        job.operation(regions, descriptors, imm=step)
        for step, jobs in enumerate(chunk)
        for job in jobs
    ]
    for job in client.submit(operations):
        job.wait(timeout_s=WAIT_S)
