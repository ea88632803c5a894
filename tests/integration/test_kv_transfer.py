# SPDX-License-Identifier: Apache-2.0
"""A prefiller and a decoder over two daemons: tokens are those of a single engine."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

import transferd
from transferd import kv

from support.kv_engines import TAIL, DecodeEngine, PrefillEngine, alone

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from support.daemon import DaemonProcess

COUNT = 6


@pytest.fixture
def engines(
    shared_pair: tuple[DaemonProcess, DaemonProcess],
) -> Iterator[tuple[PrefillEngine, DecodeEngine]]:
    """Gives a prefiller at one daemon, a decoder at the other."""
    with contextlib.ExitStack() as stack:
        one, other = (stack.enter_context(transferd.Client(d.socket)) for d in shared_pair)
        prefiller, decoder = PrefillEngine(one), DecodeEngine(other, stages=4, slots=16)
        stack.callback(prefiller.close)
        stack.callback(decoder.close)
        stack.enter_context(prefiller.rank)
        stack.enter_context(decoder.rank)
        yield prefiller, decoder


def test_tokens_are_those_of_one_engine(
    engines: tuple[PrefillEngine, DecodeEngine], seeded: random.Random
) -> None:
    prefiller, decoder = engines
    for number, length in enumerate((1, 8, 37, 100)):
        prompt = [seeded.randrange(128) for _ in range(length)]
        request = b"request %d" % number
        if number % 2:  # asked for before it is computed, and after
            transfer, pages = decoder.ask(request, prefiller.rank.address, prompt, COUNT)
            prefiller.prefill(request, prompt)
        else:
            prefiller.prefill(request, prompt)
            transfer, pages = decoder.ask(request, prefiller.rank.address, prompt, COUNT)
        transfer.wait(timeout_s=20)
        first = int.from_bytes(transfer.tail, "little")
        assert len(transfer.tail) == TAIL
        assert decoder.generate(prompt, pages, first, COUNT) == alone(prompt, COUNT)
        assert prefiller.collect(20) == [(request, "read")]
        decoder.give_back(pages)
    assert [t.number for t in decoder.rank.poll()] == [1, 2, 3, 4]
    assert len(prefiller.free) == len(decoder.free) == prefiller.config.pages


def test_decoders_of_one_client_have_immediates_of_their_own(
    shared_pair: tuple[DaemonProcess, DaemonProcess],
) -> None:
    _, far = shared_pair
    with transferd.Client(far.socket) as client, contextlib.ExitStack() as stack:
        first = DecodeEngine(client, stages=4, slots=16)
        stack.callback(first.close)
        with first.rank:
            with pytest.raises(transferd.Conflict, match="first_imm=80") as caught:
                kv.Decoder(client, first.cache, stages=4, slots=1, first_imm=79)
            assert caught.value.reason == "IMMS"
            with kv.Decoder(client, first.cache, stages=4, slots=1, first_imm=80):
                pass
        with kv.Decoder(client, first.cache, stages=4, slots=1, first_imm=79):
            pass  # closed ones have none
