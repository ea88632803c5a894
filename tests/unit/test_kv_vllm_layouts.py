# SPDX-License-Identifier: Apache-2.0
"""Layouts of the tensors that vLLM hands a connector."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from transferd import kv
from transferd.client.errors import InvalidRequest
from transferd.kv.vllm.layouts import Rank, layer_number, layout_of

from support import vllm_shapes as shapes

if TYPE_CHECKING:
    from transferd.kv.vllm.layouts import Caches

RANK = Rank(model="tiny", packing="CPU_ATTN vec auto", layers_total=4, heads_total=2)


def config(*groups: shapes.CacheGroup, blocks: int = 16) -> shapes.CacheConfig:
    return shapes.CacheConfig(blocks, list(groups))


def one_group(caches: dict[str, shapes.Tensor], rank: Rank = RANK, **spec: Any) -> Caches:
    group = shapes.CacheGroup(list(caches), shapes.FullAttentionSpec(**spec))
    return layout_of(caches, config(group), rank)


def test_the_cpu_build() -> None:
    """All layers in one region; a head's block is one item, whatever is in it."""
    caches = shapes.cpu_caches(shapes.names(4))
    found = one_group(caches)
    (group,) = found.layout.groups
    (component,) = group.components
    item = 32 * 64 * 4
    assert found.layout.regions == {"cache0": 4 * 16 * 2 * item}
    assert found.storages == {"cache0": caches["model.layers.0.self_attn.attn"]}
    assert found.layers == tuple(shapes.names(4))
    assert (group.page_tokens, group.num_pages, group.layers) == (32, 16, (0, 1, 2, 3))
    assert (component.head_bytes, component.item_tokens) == (item, 32)
    assert (component.page_stride, component.head_stride) == (2 * item, item)
    assert [place.offset for place in component.places] == [n * 16 * 2 * item for n in range(4)]
    assert component.dtype == "float32 CPU_ATTN vec auto"
    assert found.pages(([5, 3],)) == {"0": [5, 3]}


def test_layers_side_by_side_in_a_block() -> None:
    """Strides across all layers: a block of all of them goes in one piece."""
    page, block = 2 * 32 * 64, 4 * 2 * 32 * 64
    storage = shapes.Storage(0x40, 16 * block * 4)
    caches = {
        name: shapes.Tensor((16, 2, 32, 64), (block, 32 * 64, 64, 1), storage, number * page)
        for number, name in enumerate(shapes.names(4))
    }
    layout = one_group(caches).layout
    (part,) = kv.assign([layout], [layout], 0)
    plan = kv.make_plan(layout, layout, part.wanted, ((0, 1, 2, 3),))
    assert plan.counts(kv.Extent(tokens=100)) == (4,)  # four blocks, a piece each


def test_gpu_tokens_can_be_told_apart() -> None:
    """On a GPU a state is an item; NHD and HND differ in strides."""
    storage = shapes.Storage(0x100000, 16 * 32 * 2 * 256 * 2)

    def tensor(*strides: int) -> dict[str, shapes.Tensor]:
        made = shapes.Tensor((16, 2, 32, 256), strides, storage, 0, "torch.bfloat16", "cuda:0")
        return {"model.layers.0.self_attn.attn": made}

    rank = replace(RANK, layers_total=1)
    nhd = one_group(tensor(16384, 256, 512, 1), rank).layout
    hnd = one_group(tensor(16384, 8192, 256, 1), rank).layout
    assert nhd.groups[0].components[0].item_tokens == 1
    assert nhd.groups[0].components[0].token_stride == 1024
    assert hnd.groups[0].components[0].head_stride == 16384
    assert not kv.differences(nhd, hnd)


def test_blocks_that_kernels_see_in_parts() -> None:
    caches = shapes.cpu_caches(shapes.names(1), blocks=32, block=16)
    rank = replace(RANK, layers_total=1)
    group = shapes.CacheGroup(list(caches), shapes.FullAttentionSpec(32))
    found = layout_of(caches, config(group), rank)
    assert (found.layout.groups[0].page_tokens, found.layout.groups[0].num_pages) == (16, 32)
    assert found.pages(([3, 0],)) == {"0": [6, 7, 0, 1]}


@pytest.mark.parametrize(
    ("heads", "rank", "ranks", "total", "first"),
    [(2, 0, 1, 2, 0), (2, 3, 4, 8, 6), (1, 5, 8, 4, 2), (1, 7, 8, 1, 0)],
)
def test_heads_of_ranks(heads: int, rank: int, ranks: int, total: int, first: int) -> None:
    caches = shapes.cpu_caches(shapes.names(4), heads=heads)
    facts = replace(RANK, heads_total=total, tp_rank=rank, tp_size=ranks)
    (component,) = one_group(caches, facts).layout.groups[0].components
    assert (component.heads_total, component.first_head, component.heads) == (total, first, heads)


def test_a_latent_is_alike_on_all_ranks() -> None:
    caches = shapes.cpu_caches(shapes.names(4), heads=1)
    group = shapes.CacheGroup(list(caches), shapes.MLAAttentionSpec())
    facts = replace(RANK, heads_total=1, tp_rank=3, tp_size=8)
    (component,) = layout_of(caches, config(group), facts).layout.groups[0].components
    assert (component.heads_total, component.first_head, component.heads) == (1, 0, 1)


def test_hybrid_models_have_several_groups() -> None:
    caches = shapes.cpu_caches(shapes.names(4))
    full, window, other, none = shapes.names(4)
    found = layout_of(
        caches,
        config(
            shapes.CacheGroup([full], shapes.FullAttentionSpec()),
            shapes.CacheGroup([none], shapes.FullAttentionSpec(), enable_kv_transfer=False),
            shapes.CacheGroup([window], shapes.SlidingWindowSpec()),
            shapes.CacheGroup([other], shapes.SlidingWindowSpec(sliding_window=256)),
        ),
        RANK,
    )
    assert [group.window_tokens for group in found.layout.groups] == [0, 127, 255]
    assert [group.layers for group in found.layout.groups] == [(0,), (1,), (2,)]
    assert found.pages(([1], [2], [3], [4])) == {"0": [1], "2": [3], "3": [4]}
    assert found.layers == (full, window, other)


@pytest.mark.parametrize(
    ("name", "number"),
    [("model.layers.3.self_attn.attn", 3), ("layers.12.attn", 12), ("h.0.7.x", 0), ("a2.5", 5)],
)
def test_layers_are_numbered(name: str, number: int) -> None:
    assert layer_number(name) == number


def wrong() -> dict[str, tuple[Any, Any, str]]:
    four = shapes.cpu_caches(shapes.names(4))
    odd = dict(four)
    odd["model.layers.1.self_attn.attn"] = replace(odd["model.layers.1.self_attn.attn"], offset=0)
    odd["model.layers.1.self_attn.attn"].shape = (16, 2, 32, 32)
    gaps = shapes.cpu_caches(shapes.names(1))
    gaps["model.layers.0.self_attn.attn"].strides = (4096, 64, 128, 1)
    twice = shapes.cpu_caches(["decoder.1.self.attn", "decoder.1.cross.attn"])
    full = shapes.FullAttentionSpec()
    return {
        "kind": (four, shapes.CacheGroup(list(four), shapes.MambaSpec()), "MambaSpec"),
        "no number": ({"attn": 0}, shapes.CacheGroup(["attn"], full), "no number"),
        "missing": ({}, shapes.CacheGroup(shapes.names(1), full), "no tensor"),
        "twice": (twice, shapes.CacheGroup(list(twice), full), "two caches"),
        "shapes": (odd, shapes.CacheGroup(list(odd), full), "differ in shape"),
        "gaps": (gaps, shapes.CacheGroup(list(gaps), full), "packed as one"),
        "blocks": (
            shapes.cpu_caches(shapes.names(1), blocks=17),
            shapes.CacheGroup(shapes.names(1), full),
            "16 blocks of 32 tokens",
        ),
        "heads": (
            shapes.cpu_caches(shapes.names(1), heads=3),
            shapes.CacheGroup(shapes.names(1), full),
            "3 heads on each of 1 ranks",
        ),
    }


@pytest.mark.parametrize("which", sorted(wrong()))
def test_what_has_no_layout_is_named(which: str) -> None:
    caches, group, message = wrong()[which]
    with pytest.raises(InvalidRequest, match=message):
        layout_of(caches, config(group), RANK)
