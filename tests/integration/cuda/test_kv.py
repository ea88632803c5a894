# SPDX-License-Identifier: Apache-2.0
"""KV caches in GPU memory: layers that kernels count, pushed by streams."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from support.cuda_memory import memory
from support.kv_engines import TAIL, DecodeEngine, PrefillEngine, alone
from support.waiting import eventually

if TYPE_CHECKING:
    import random

    from transferd import Client

    from support.fakecuda import FakeCuda

COUNT = 4


def test_layers_that_a_kernel_counts_are_pushed_as_it_does(
    cuda: FakeCuda, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    prompt = [seeded.randrange(128) for _ in range(40)]
    with contextlib.ExitStack() as stack:
        prefiller = PrefillEngine(sender, buffer=memory(cuda))
        decoder = DecodeEngine(receiver, buffer=memory(cuda), stages=4, slots=8)
        for engine in (prefiller, decoder):
            stack.callback(engine.close)
            stack.enter_context(engine.rank)
        stream = cuda.stream()
        address = prefiller.rank.address
        for number in range(3):
            request = b"r%d" % number
            transfer, pages = decoder.ask(request, address, prompt, COUNT)
            prefiller.begin(request, prompt)
            own = prefiller.pages[request]
            with prefiller.rank.step({request: 16}, device=True) as step:
                prefiller.model.forward(prompt[:16], 0, own)
                step.watcher.cuda_bump(stream, 4)
            with prefiller.rank.step({request: 40}, device=True) as step:
                token = prefiller.model.forward(prompt[16:], 16, own)
            assert not step.computed  # its kernels have not run
            for layer in range(4):
                assert transfer.layers == layer
                step.watcher.cuda_bump(stream)
                transfer.wait_layers(layer + 1, timeout_s=20)
                here = decoder.model.cache[layer, :, pages[:5]]
                assert np.array_equal(here, prefiller.model.cache[layer, :, own])
            assert step.computed
            prefiller.rank.finish(request, token.to_bytes(TAIL, "little"))
            transfer.wait(timeout_s=20)
            assert decoder.generate(prompt, pages, token, COUNT) == alone(prompt, COUNT)
            assert prefiller.collect(20) == [(request, "read")]
            decoder.give_back(pages)


def test_a_transfer_that_is_cancelled_while_kernels_run(
    cuda: FakeCuda, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    prompt = [seeded.randrange(128) for _ in range(40)]
    with contextlib.ExitStack() as stack:
        prefiller = PrefillEngine(sender, buffer=memory(cuda))
        decoder = DecodeEngine(receiver, buffer=memory(cuda), stages=4, slots=8)
        for engine in (prefiller, decoder):
            stack.callback(engine.close)
            stack.enter_context(engine.rank)
        stream = cuda.stream()
        prefiller.begin(b"r", prompt)
        transfer, pages = decoder.ask(b"r", prefiller.rank.address, prompt, 0)
        eventually(lambda: prefiller.rank.transfers == 1, "the request is there")
        with prefiller.rank.step({b"r": 40}, device=True) as step:
            prefiller.model.forward(prompt, 0, prefiller.pages[b"r"])
        step.watcher.cuda_bump(stream)
        transfer.wait_layers(1, timeout_s=20)
        transfer.cancel()
        eventually(lambda: transfer.done, "it has ended")
        decoder.model.cache[:, :, pages] = 7.0
        step.watcher.cuda_bump(stream, 3)
        prefiller.rank.finish(b"r", bytes(TAIL))
        assert prefiller.collect(20) == [(b"r", "read")]
        assert (decoder.model.cache[:, :, pages] == 7.0).all()


def test_more_layers_wait_than_streams_do(
    cuda: FakeCuda, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    """Streams of a device wait for 64 copies at once; what has no room goes when others have."""
    prompts = {b"r%d" % n: [seeded.randrange(128) for _ in range(8)] for n in range(24)}
    with contextlib.ExitStack() as stack:
        prefiller = PrefillEngine(sender, buffer=memory(cuda))
        decoder = DecodeEngine(receiver, buffer=memory(cuda), stages=4, slots=24)
        for engine in (prefiller, decoder):
            stack.callback(engine.close)
            stack.enter_context(engine.rank)
        stream = cuda.stream()
        asked = {}
        for request, prompt in prompts.items():
            prefiller.begin(request, prompt)
            asked[request] = decoder.ask(request, prefiller.rank.address, prompt, 0)
        eventually(lambda: prefiller.rank.transfers == len(prompts), "all requests are there")
        with prefiller.rank.step(dict.fromkeys(prompts, 8), device=True) as step:
            for request, prompt in prompts.items():
                prefiller.model.forward(prompt, 0, prefiller.pages[request])
        lanes = sender._session.gpu().lanes
        eventually(lambda: sum(lane.pending for lane in lanes.all()) == 64, "no stream takes more")
        for layer in range(4):
            step.watcher.cuda_bump(stream)
            for request, (transfer, pages) in asked.items():
                transfer.wait_layers(layer + 1, timeout_s=20)
                here = decoder.model.cache[layer, :, pages]
                assert np.array_equal(
                    here, prefiller.model.cache[layer, :, prefiller.pages[request]]
                )
