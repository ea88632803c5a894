# SPDX-License-Identifier: Apache-2.0
"""What nobody wants is given back at once, over two daemons: the lease is longer than any wait."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

import transferd
from transferd import kv

from support.kv_engines import DecodeEngine, PrefillEngine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.daemon import DaemonProcess

WAIT_S = 20.0  # the lease is 30 s
PROMPT = list(range(40))


@pytest.fixture
def engines(
    shared_pair: tuple[DaemonProcess, DaemonProcess],
) -> Iterator[tuple[PrefillEngine, DecodeEngine]]:
    """Gives a prefiller at one daemon, a decoder at the other, which has room for one request."""
    with contextlib.ExitStack() as stack:
        one, other = (stack.enter_context(transferd.Client(d.socket)) for d in shared_pair)
        prefiller, decoder = PrefillEngine(one), DecodeEngine(other, stages=2, slots=1)
        for engine in (prefiller, decoder):
            stack.callback(engine.close)
            stack.enter_context(engine.rank)
        yield prefiller, decoder


@pytest.mark.parametrize("begun", [False, True])
def test_declined_before_and_after_it_is_computed(
    engines: tuple[PrefillEngine, DecodeEngine], begun: bool
) -> None:
    prefiller, decoder = engines
    if begun:
        prefiller.prefill(b"request", PROMPT)
        decoder.rank.decline(b"request", prefiller.rank.address)  # which nobody has greeted yet
    else:
        decoder.rank.decline(b"request", prefiller.rank.address)
        prefiller.prefill(b"request", PROMPT)
    assert prefiller.collect(WAIT_S) == [(b"request", "read")]
    assert len(prefiller.free) == prefiller.config.pages


def test_no_room_for_it(engines: tuple[PrefillEngine, DecodeEngine]) -> None:
    prefiller, decoder = engines
    address = prefiller.rank.address
    transfer, _ = decoder.ask(b"first", address, PROMPT, 1)
    with pytest.raises(transferd.QuotaExceeded):
        decoder.ask(b"second", address, PROMPT, 1)
    decoder.rank.decline(b"second", address)
    prefiller.prefill(b"second", PROMPT)
    assert prefiller.collect(WAIT_S) == [(b"second", "read")]
    prefiller.prefill(b"first", PROMPT)
    transfer.wait(timeout_s=WAIT_S)
    assert prefiller.collect(WAIT_S) == [(b"first", "read")]


def test_cancelled_before_it_is_computed(engines: tuple[PrefillEngine, DecodeEngine]) -> None:
    prefiller, decoder = engines
    transfer, _ = decoder.ask(b"request", prefiller.rank.address, PROMPT, 1)
    transfer.cancel()
    with pytest.raises(kv.KvFailed):
        transfer.wait(timeout_s=WAIT_S)
    prefiller.prefill(b"request", PROMPT)
    assert prefiller.collect(WAIT_S) == [(b"request", "read")]


def test_bad_input(engines: tuple[PrefillEngine, DecodeEngine]) -> None:
    prefiller, decoder = engines
    with pytest.raises(transferd.InvalidRequest, match="request_id"):
        decoder.rank.decline(b"", prefiller.rank.address)
    with pytest.raises(transferd.InvalidRequest) as caught:
        decoder.rank.decline(b"request", b"nowhere")
    assert caught.value.reason == "ADDRESS"
    decoder.rank.close()
    with pytest.raises(transferd.Unavailable):
        decoder.rank.decline(b"request", prefiller.rank.address)
