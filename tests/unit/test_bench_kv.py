# SPDX-License-Identifier: Apache-2.0
"""Helpers of the benchmarks of transferd.kv: pages that tell whose they are, sizes, times."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bench import kv_rates
from bench.kv_caches import BenchCache, CacheShape
from bench.kv_spans import Stopwatch

from transferd.client.ctl.bench.shapes import SHAPES
from transferd.kv import make_plan
from transferd.kv.assign import assign
from transferd.kv.pages import Extent

BLOCK = SHAPES["deepseek-r1-block"]
LAYER = SHAPES["deepseek-r1-layer"]
SMALL = CacheShape(layers=5, page_tokens=4, item_bytes=16, pages=6, block_layers=2)


class FakeClient:
    """Memory without a daemon."""

    def alloc(self, length: int) -> Any:
        memory = np.zeros(length, dtype=np.uint8)
        return SimpleNamespace(
            length=length, source=None, numpy=lambda dtype="uint8": memory.view(dtype)
        )


@pytest.fixture
def cache() -> BenchCache:
    client: Any = FakeClient()
    return BenchCache(client, SMALL)


def test_pages_tell_whose_they_are(cache: BenchCache) -> None:
    one, other = cache.take(9), cache.take(8)
    assert (len(one), len(other)) == (3, 2)
    assert not set(one.tolist()) & set(other.tolist())
    cache.fill(one, 1)
    cache.fill(other, 2)
    assert cache.holds(one, 1)
    assert cache.holds(other, 2)
    assert not cache.holds(one, 2)
    assert not cache.holds(one[::-1], 1)
    with pytest.raises(ValueError, match="2 pages are wanted, 1 are free"):
        cache.take(5)
    cache.give_back(one)
    assert cache.take(12).tolist() == one.tolist()


def test_a_single_wrong_byte_is_seen(cache: BenchCache) -> None:
    pages = cache.take(12)
    region: Any = cache.cache.regions["cache"]
    for layer in range(SMALL.layers):
        at = SMALL.place(layer).offset + int(pages[1]) * 2 * SMALL.page_bytes + 17
        cache.fill(pages, 3)
        region.numpy()[at] ^= 1
        assert not cache.holds(pages, 3), layer
        cache.paint(pages)
        assert cache.untouched(pages)
        region.numpy()[at] ^= 1
        assert not cache.untouched(pages), layer


@pytest.mark.parametrize("pages", [BLOCK, LAYER], ids=lambda pages: pages.name)
def test_a_piece_is_a_page_of_kvbench(pages: Any) -> None:
    shape = kv_rates.cache_shape(pages, 2)
    layout = shape.layout
    (source,) = assign([layout], [layout], 0)
    plan = make_plan(layout, layout, source.wanted, shape.steps)
    counts = plan.counts(Extent(pages.input_tokens, 0))
    assert counts == (40,) * len(shape.steps)
    assert {p.page_bytes for step in plan.patterns[:-1] for p in step} == {pages.page_bytes}
    moved = sum(p.page_bytes for step in plan.patterns for p in step) * 40
    assert moved == shape.request_bytes(pages.input_tokens)


def test_requests_are_scaled_to_memory() -> None:
    each = kv_rates.cache_shape(LAYER, 1).region_bytes
    for count in (1, 3):
        available = kv_rates.GUARD_BYTES + count * kv_rates.MEMORY_PARTS * each
        assert kv_rates.fitting(LAYER, available) == count
    assert kv_rates.fitting(LAYER, 1 << 50) == LAYER.requests
    with pytest.raises(MemoryError, match="deepseek-r1-layer needs"):
        kv_rates.fitting(LAYER, 1 << 30)


def test_a_stopwatch_sums_parts_and_undoes_itself() -> None:
    class Worker:
        def work(self, number: int) -> int:
            if number < 0:
                raise ValueError(number)
            return number + 1

    plain = Worker.work
    stopwatch = Stopwatch()
    stopwatch.watch(Worker, "work", "prep")
    assert Worker().work(1) == 2
    with pytest.raises(ValueError, match="-1"):
        Worker().work(-1)
    assert stopwatch.take()["prep"] > 0
    assert stopwatch.take() == {}
    stopwatch.stop()
    assert Worker.work is plain
