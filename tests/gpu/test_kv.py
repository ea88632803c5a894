# SPDX-License-Identifier: Apache-2.0
"""KV pages of a real GPU, pushed while a captured graph computes layer after layer."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from transferd import kv

from support.waiting import WAIT_S

if TYPE_CHECKING:
    from transferd import Client

    from support.gpu import Gpu

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

LAYERS, PAGES, PAGE_BYTES, PAGE_TOKENS = 16, 64, 65_536, 16


def layout() -> kv.Layout:
    """All layers in one tensor of shape (layers, pages, bytes)."""
    component = kv.Component(
        name="kv",
        dtype="bytes",
        head_bytes=PAGE_BYTES // PAGE_TOKENS,
        heads_total=1,
        first_head=0,
        heads=1,
        places=tuple(kv.Place("cache", layer * PAGES * PAGE_BYTES) for layer in range(LAYERS)),
        page_stride=PAGE_BYTES,
        token_stride=PAGE_BYTES // PAGE_TOKENS,
        head_stride=PAGE_BYTES // PAGE_TOKENS,
    )
    group = kv.Group(
        name="0",
        page_tokens=PAGE_TOKENS,
        num_pages=PAGES,
        layers=tuple(range(LAYERS)),
        components=(component,),
    )
    regions = {"cache": LAYERS * PAGES * PAGE_BYTES}
    return kv.Layout(model="m", layers_total=LAYERS, regions=regions, groups=(group,), tail_bytes=4)


def cache_of(torch: Any, client: Client) -> tuple[Any, kv.Cache]:
    tensor = torch.zeros((LAYERS, PAGES, PAGE_BYTES), dtype=torch.uint8, device="cuda")
    return tensor, kv.Cache(layout(), {"cache": client.register(tensor)})


def test_a_captured_graph_pushes_layer_by_layer(gpu: Gpu, sender: Client, receiver: Client) -> None:
    torch = pytest.importorskip("torch")
    source, from_cache = cache_of(torch, sender)
    target, to_cache = cache_of(torch, receiver)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    pages = torch.arange(0, PAGES, 2, device="cuda")
    content = torch.zeros(PAGE_BYTES, dtype=torch.uint8, device="cuda")
    with contextlib.ExitStack() as stack:
        prefiller = stack.enter_context(kv.Prefiller(sender, from_cache, "p"))
        decoder = stack.enter_context(kv.Decoder(receiver, to_cache, "d", stages=LAYERS, slots=4))
        decoder.connect(prefiller.address, timeout_s=WAIT_S)
        watcher = prefiller.watcher()
        with sender.watcher(device=True) as warm:  # what is loaded on first use is not captured
            warm.cuda_bump(stream)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for layer in range(LAYERS):
                source[layer, pages] = content + layer
                watcher.cuda_bump(stream)
        base = watcher.value
        assert base == 0  # capturing runs nothing
        for number in range(1, 11):
            request = b"%d" % number
            content.fill_(7 * number)
            torch.cuda.synchronize()
            mine = pages.cpu().numpy()
            theirs = mine[::-1] + 1
            prefiller.begin(request, {"0": mine})
            transfer = decoder.request(
                request, prefiller.address, {"0": theirs}, len(mine) * PAGE_TOKENS
            )
            with prefiller.step({request: len(mine) * PAGE_TOKENS}, device=True):
                graph.replay()
            for layer in range(LAYERS):
                transfer.wait_layers(layer + 1, timeout_s=WAIT_S)
                here = target[layer, torch.as_tensor(theirs.copy(), device="cuda")]
                assert bool((here == (7 * number + layer) % 256).all())
            prefiller.finish(request, bytes(4))
            transfer.wait(timeout_s=WAIT_S)
            assert prefiller.released(WAIT_S) == [(request, "read")]
            assert not bool(target[:, pages].any())
