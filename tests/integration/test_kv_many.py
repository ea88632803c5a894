# SPDX-License-Identifier: Apache-2.0
"""Many requests in flight: what each costs, that one ends without the others, no thread for it."""

from __future__ import annotations

import contextlib
import gc
import threading
import tracemalloc
from typing import TYPE_CHECKING

import pytest

import transferd
from transferd.kv import KvFailed

from support.kv_engines import CONFIG, DecodeEngine, PrefillEngine, alone
from support.waiting import eventually

if TYPE_CHECKING:
    from support.daemon import DaemonProcess

pytestmark = pytest.mark.slow

MANY = 1000
BYTES_MAX = 8192  # of a request, at either side, outside the pages


def test_a_thousand_in_flight(shared_pair: tuple[DaemonProcess, DaemonProcess]) -> None:
    prompt = list(range(100))
    with contextlib.ExitStack() as stack:
        one, other = (stack.enter_context(transferd.Client(d.socket)) for d in shared_pair)
        prefiller = PrefillEngine(one)
        decoder = DecodeEngine(other, stages=2, slots=MANY)
        for engine in (prefiller, decoder):
            stack.callback(engine.close)
            stack.enter_context(engine.rank)
        address = prefiller.rank.address
        decoder.rank.connect(address, timeout_s=20)
        pages = list(range(13))
        threads = threading.active_count()
        gc.collect()
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        before = tracemalloc.get_traced_memory()[0]
        transfers = [
            decoder.rank.request(b"%d" % number, address, {"all": pages}, 100, deadline_s=600)
            for number in range(MANY)
        ]
        eventually(lambda: prefiller.rank.transfers == MANY, "all are there", timeout_s=60)
        gc.collect()
        each = (tracemalloc.get_traced_memory()[0] - before) / MANY
        assert each < 2 * BYTES_MAX, f"{each:.0f} bytes at both sides together"
        # Helpers are made as they are needed, the SDK's own thread at first use.
        assert threading.active_count() <= threads + 10
        with pytest.raises(transferd.QuotaExceeded, match="as many as slots"):
            decoder.rank.request(b"more", address, {"all": pages}, 100)
        transfers[500].cancel()
        with pytest.raises(KvFailed):
            transfers[500].wait(timeout_s=20)
        assert [transfer.number for transfer in decoder.rank.poll()] == [501]
        for transfer in transfers[1:]:
            transfer.cancel()
        prefiller.prefill(b"0", prompt)
        transfers[0].wait(timeout_s=60)
        for transfer in transfers[1:]:
            with contextlib.suppress(KvFailed):
                transfer.wait(timeout_s=60)
        assert len(decoder.rank.poll()) == MANY - 1
        assert decoder.rank.free_slots == MANY


def test_a_decoder_after_another_on_the_same_immediates(
    shared_pair: tuple[DaemonProcess, DaemonProcess],
) -> None:
    prompt = list(range(50))
    with contextlib.ExitStack() as stack:
        one, other = (stack.enter_context(transferd.Client(d.socket)) for d in shared_pair)
        prefiller = PrefillEngine(one)
        stack.callback(prefiller.close)
        stack.enter_context(prefiller.rank)
        for number in range(3):
            decoder = DecodeEngine(other, CONFIG, slots=2)
            stack.callback(decoder.close)
            with decoder.rank:
                for part in range(3):
                    request = b"%d of %d" % (part, number)
                    transfer, pages = decoder.ask(request, prefiller.rank.address, prompt, 2)
                    if part == 1:
                        prefiller.begin(request, prompt)
                        prefiller.chunk(request, prompt, 0, 20)
                        transfer.cancel()
                        with pytest.raises(KvFailed):
                            transfer.wait(timeout_s=20)
                        prefiller.rank.abort(request)
                    else:
                        token = prefiller.prefill(request, prompt)
                        transfer.wait(timeout_s=20)
                        assert decoder.generate(prompt, pages, token, 2) == alone(prompt, 2)
                    decoder.give_back(pages)
                    while request in prefiller.pages:
                        assert prefiller.collect(20)
