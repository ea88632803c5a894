# SPDX-License-Identifier: Apache-2.0
"""A daemon stands still in the midst of fences: transfers may end with that, and no rank."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import pytest

import transferd
from transferd.kv import KvFailed, Outcome

from support.daemon import stopped
from support.kv_engines import DecodeEngine, PrefillEngine, alone
from support.kv_process import COUNT, prompt_of
from support.waiting import eventually

if TYPE_CHECKING:
    from conftest import MakeDaemon

    from support.daemon import DaemonProcess

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(240)]

MANY = 64
ROUNDS_MAX = 10
ATTEMPTS_MAX = 5
LATE_S = 1.3  # more than timeouts.revoke, less than the other bounds
GIVEN_UP = "did not become quiet; ending the relation"


def one_round(
    daemon: DaemonProcess, prefiller: PrefillEngine, decoder: DecodeEngine, name: str
) -> None:
    """Cancels many transfers in their midst; the daemon stands still while it fences them."""
    requests = [f"{name} {number}".encode() for number in range(MANY)]
    prompt = prompt_of(1, 8)
    for request in requests:
        prefiller.begin(request, prompt)
    asked = [decoder.ask(request, prefiller.rank.address, prompt, 0) for request in requests]
    transfers = [transfer for transfer, _ in asked]
    eventually(lambda: prefiller.rank.transfers == MANY, "all requests are there")
    with prefiller.rank.step(dict.fromkeys(requests, 8)) as step:
        step.layer_done()
        for transfer in transfers:
            transfer.wait_layers(1, timeout_s=20)  # counts that a fence has to level
            transfer.cancel()
        eventually(lambda: any(transfer.done for transfer in transfers), "one is fenced")
        with stopped(daemon):
            begin = time.monotonic()
            eventually(lambda: time.monotonic() - begin > LATE_S, "no fence is in time")
    for transfer, pages in asked:
        with contextlib.suppress(KvFailed):
            transfer.wait(timeout_s=20)
        assert transfer.outcome in (Outcome.CANCELLED, Outcome.LOST), transfer
        decoder.give_back(pages)
    for request in requests:
        prefiller.rank.abort(request)
    while prefiller.pages:
        assert prefiller.collect(20)


def generates(prefiller: PrefillEngine, decoder: DecodeEngine) -> bool:
    """Asks again until a transfer is whole: the first ones may find out what was lost."""
    prompt = prompt_of(2, 60)
    for number in range(ATTEMPTS_MAX):
        request = b"next %d" % number
        decoder.rank.connect(prefiller.rank.address, timeout_s=30)
        transfer, pages = decoder.ask(request, prefiller.rank.address, prompt, COUNT)
        prefiller.prefill(request, prompt)
        with contextlib.suppress(KvFailed):
            transfer.wait(timeout_s=30)
            first = int.from_bytes(transfer.tail, "little")
            return decoder.generate(prompt, pages, first, COUNT) == alone(prompt, COUNT)
        decoder.give_back(pages)
    return False


def test_a_daemon_that_loses_itself_costs_no_decoder(make_daemon: MakeDaemon) -> None:
    """Its relation with itself is over then, by which counters are made level after fences."""
    daemon = make_daemon()
    with contextlib.ExitStack() as stack:
        near, far = (stack.enter_context(transferd.Client(daemon.socket)) for _ in range(2))
        prefiller, decoder = PrefillEngine(near), DecodeEngine(far, stages=4, slots=MANY)
        for engine in (prefiller, decoder):
            stack.callback(engine.close)
            stack.enter_context(engine.rank)
        for number in range(ROUNDS_MAX):
            one_round(daemon, prefiller, decoder, f"round {number}")
            if GIVEN_UP in daemon.log():
                break
        else:
            pytest.fail("the daemon has never stood still in the midst of a fence")
        assert generates(prefiller, decoder)
