# SPDX-License-Identifier: Apache-2.0
"""A model on a GPU: prefilled by a captured graph whose pages go meanwhile; decoded elsewhere."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest

import transferd

if TYPE_CHECKING:
    from support.daemon import DaemonProcess

    Daemons = tuple[DaemonProcess, DaemonProcess]

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

graph: Any = pytest.importorskip("support.kv_graph", reason="torch is not installed")
llama: Any = pytest.importorskip("support.kv_llama")
REQUESTS, TOKENS, COUNT = 4, 256, 12


@pytest.mark.parametrize("device", [0, 1])
def test_tokens_behind_pages_that_went_while_a_graph_ran(
    gpu: Any, sender: transferd.Client, shared_pair: Daemons, device: int
) -> None:
    """Several steps of one graph, each into other pages, on the same GPU and on a second one."""
    if gpu.driver.device_count() <= device:
        pytest.skip("this machine has one GPU, or CUDA_VISIBLE_DEVICES shows one")
    shape = llama.LlamaShape(
        layers=8, hidden=1024, heads=16, kv_heads=4, head_dim=64, mlp=2816, pages=256
    )
    places = [graph.Cuda(device), graph.Cuda(0)]  # the last one is current
    there = graph.Decodes(places[0], shape, REQUESTS, TOKENS)
    here = graph.Prefills(places[1], shape, REQUESTS, TOKENS)
    assert there.model.checksum() == here.model.checksum()
    with contextlib.ExitStack() as stack:
        receiver = stack.enter_context(transferd.Client(shared_pair[0].socket, counters=256))
        pushed = stack.enter_context(contextlib.closing(graph.PushedPrefills(here, sender)))
        there.attach(receiver)
        stack.callback(there.rank.close)
        there.rank.connect(pushed.rank.address, timeout_s=10)
        for number in range(6):
            ids = [f"{number} {n}" for n in range(REQUESTS)]
            pushed.begin(ids)
            transfers = there.ask(ids, pushed.rank.address)
            pushed.step(ids)
            tokens = pushed.finish(ids)
            assert there.first(transfers) == tokens
            assert there.digests() == here.digests()
            assert there.generate(tokens, COUNT) == here.generate(tokens, COUNT)
            pushed.release(ids)
