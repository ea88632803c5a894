# SPDX-License-Identifier: Apache-2.0
"""The torch Llama of benchmarks and GPU tests: what is read from its cache is what was computed."""

from __future__ import annotations

from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")
llama: Any = pytest.importorskip("support.kv_llama")

SHAPE = llama.LlamaShape(
    layers=3,
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    mlp=96,
    vocabulary=64,
    dtype="float32",
    pages=16,
    page_tokens=4,
)


def test_decoding_over_pages_equals_computing_all_at_once() -> None:
    model = llama.Llama(SHAPE, "cpu")
    tokens = torch.randint(SHAPE.vocabulary, (2, 20))
    cache = torch.zeros(SHAPE.cache_shape)
    order = torch.randperm(SHAPE.pages)
    tables = order[:10].reshape(2, 5)
    done: list[int] = []
    model.prefill(tokens[:, :12], cache, tables[:, :3].flatten(), lambda: done.append(len(done)))
    assert done == [0, 1, 2]
    for position in range(12, 20):
        hidden = model.decode(tokens[:, position], position, cache, tables)
    whole = model.prefill(tokens, torch.zeros_like(cache), torch.arange(10), lambda: None)
    assert torch.allclose(hidden, whole, atol=1e-4)
    assert not cache[:, order[10:]].any()  # the pages of nobody


def test_a_layout_describes_the_cache() -> None:
    layout = SHAPE.layout()
    cache = torch.arange(torch.Size(SHAPE.cache_shape).numel(), dtype=torch.float32)
    assert layout.regions == {"cache": cache.nbytes}
    cache = cache.reshape(SHAPE.cache_shape)
    (group,) = layout.groups
    for number, component in enumerate(group.components):
        for page, token, head in ((0, 0, 0), (5, 3, 1), (15, 1, 0)):
            offset = (
                component.places[2].offset
                + page * component.page_stride
                + token * component.token_stride
                + head * component.head_stride
            )
            assert cache[2, page, number, token, head, 0] == offset // 4
