# SPDX-License-Identifier: Apache-2.0
"""What a request in flight costs in the cores: 2,000 of them, at either side."""

from __future__ import annotations

import gc
import tracemalloc
from typing import TYPE_CHECKING

import pytest

from transferd.kv.protocol import actions as act
from transferd.kv.protocol.bounds import Settings
from transferd.kv.protocol.decoder import DecoderCore
from transferd.kv.protocol.decoder_pairs import Identity
from transferd.kv.protocol.decoder_transfer import Wanted
from transferd.kv.protocol.messages import Welcome
from transferd.kv.protocol.prefiller import PrefillerCore
from transferd.kv.protocol.prefiller_pairs import Terms

from support.kvcores import GRANTS, Decoder, of, pages, said, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.slow

REQUESTS = 2000
BYTES_MAX = 8192
STAGES = 8
INDICES = pages(*range(256))  # 4,096 tokens in pages of 16
SETTINGS = Settings(timeout_s=600.0)


def cost(run: Callable[[], None]) -> float:
    """Tells the bytes that stay allocated, for each request."""
    gc.collect()
    tracemalloc.start()
    try:
        run()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] / REQUESTS
    finally:
        tracemalloc.stop()


def decoder() -> DecoderCore:
    identity = Identity(b"D" * 16, b"mailbox", range(REQUESTS * (STAGES + 1)), STAGES, b"print")
    core = DecoderCore(identity, (1000,), token=tokens(), settings=SETTINGS)
    return core


def wanted(i: int) -> Wanted:
    """A request with its own copy of everything, as engines make it."""
    return Wanted(
        request_id=b"cmpl-%028d" % i,
        tokens=4096,
        groups=(bytes(bytearray(INDICES)),),
        counts=tuple(256 for _ in range(STAGES + 1)),
        deadline_s=600.0,
    )


def ready(core: DecoderCore) -> list[bytes]:
    """Makes a pair READY; gives its Hello's letters."""
    core.add(0.0, "P", b"mailbox")
    (hello,) = of(act.Send, core.granted(0.0, 1, 1, GRANTS))
    return list(hello.letters)


def test_decoder() -> None:
    core = decoder()
    ready(core)
    helper = Decoder()
    helper.core, helper.tokens = core, {1: (2).to_bytes(16, "big")}
    helper.hear(1, Welcome(b"P" * 16, b"B" * 16))

    def run() -> None:
        for i in range(REQUESTS):
            core.start(0.0, [1], wanted(i))

    each = cost(run)
    print(f"{each:.0f} bytes a request, {len(INDICES)} of them its page indices")
    assert len(core) == REQUESTS
    assert each <= BYTES_MAX


def test_prefiller() -> None:
    there = decoder()
    core = PrefillerCore(
        b"B" * 16, lambda hello: Terms((1000,), 0), token=tokens(), settings=SETTINGS
    )
    for letter in ready(there):
        made = core.receive(0.0, letter)
    (send,) = of(act.Send, made)
    there.receive(0.0, send.letters[0])
    letters = [
        send.letters
        for i in range(REQUESTS)
        for send in of(act.Send, there.start(0.0, [1], wanted(i)))
    ]
    assert len(said([send])) == 1

    def run() -> None:
        for i, request in enumerate(letters):
            for letter in request:
                core.receive(0.0, letter)
            request_id = b"cmpl-%028d" % i
            core.prefill(0.0, request_id)
            core.computed(0.0, request_id, 2048)

    each = cost(run)
    print(f"{each:.0f} bytes a request, {len(INDICES)} of them its page indices")
    assert (len(core), core.prefills) == (REQUESTS, REQUESTS)
    assert each <= BYTES_MAX
