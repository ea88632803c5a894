# SPDX-License-Identifier: Apache-2.0
"""Prefillers and decoders killed in mid-transfer: the other side is free within the bound."""

from __future__ import annotations

import contextlib
import signal
import time
from typing import TYPE_CHECKING

import pytest

import transferd
from transferd.kv import KvFailed, Outcome

from support.kv_engines import DecodeEngine, PrefillEngine, alone
from support.kv_process import COUNT, KvProcess, prompt_of
from support.waiting import eventually

if TYPE_CHECKING:
    import random

    from conftest import MakeDaemon

    from support.daemon import DaemonProcess

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(240)]

BOUND_S = 5.0
LENGTH = 60


def one_killed(prefillers: Pair, decoder: DecodeEngine, other: PrefillEngine, number: int) -> None:
    """Kills a prefiller in the middle of a transfer; the request ends right by another one."""
    prompt = prompt_of(number, LENGTH)
    with KvProcess("prefiller", prefillers[0].socket) as process:
        transfer, pages = decoder.ask(
            b"first %d" % number, bytes.fromhex(process.first), prompt, COUNT
        )
        process.say(f"first-{number}", number, LENGTH, number % 4)
        again, more = decoder.ask(b"first-%d" % number, bytes.fromhex(process.first), prompt, COUNT)
        assert process.line() == "stopped"
        if number % 4:
            again.wait_layers(number % 4, timeout_s=20)
        begin = time.monotonic()
        process.kill()
        for ended in (transfer, again):
            with pytest.raises(KvFailed) as failed:
                ended.wait(timeout_s=60)
            assert failed.value.outcome in (Outcome.LOST, Outcome.FAILED)
        took = time.monotonic() - begin
        assert took < BOUND_S, f"{took:.1f} s"
    decoder.give_back(pages)
    decoder.give_back(more)
    request = b"again %d" % number
    transfer, pages = decoder.ask(request, other.rank.address, prompt, COUNT)
    other.prefill(request, prompt)
    transfer.wait(timeout_s=20)
    first = int.from_bytes(transfer.tail, "little")
    assert decoder.generate(prompt, pages, first, COUNT) == alone(prompt, COUNT)
    decoder.give_back(pages)
    other.collect(20)


def prefillers_killed(pair: Pair, times: int) -> None:
    with contextlib.ExitStack() as stack:
        near, far = (stack.enter_context(transferd.Client(d.socket)) for d in pair)
        other, decoder = PrefillEngine(near), DecodeEngine(far)
        for engine in (other, decoder):
            stack.callback(engine.close)
            stack.enter_context(engine.rank)
        for number in range(times):
            one_killed(pair, decoder, other, number)
        assert len(decoder.free) == decoder.config.pages


def test_prefiller_killed(shared_pair: Pair) -> None:
    prefillers_killed(shared_pair, 4)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_prefiller_killed_fifty_times(shared_pair: Pair) -> None:
    prefillers_killed(shared_pair, 50)


def test_prefiller_that_stands_still_is_lost_and_comes_back(shared_pair: Pair) -> None:
    near, far = shared_pair
    prompt = prompt_of(3, LENGTH)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(transferd.Client(far.socket))
        decoder = DecodeEngine(client)
        stack.callback(decoder.close)
        stack.enter_context(decoder.rank)
        process = stack.enter_context(KvProcess("prefiller", near.socket))
        address = bytes.fromhex(process.first)
        transfer, _ = decoder.ask(b"r", address, prompt, COUNT)
        process.say("r", 3, LENGTH, 2)
        assert process.line() == "stopped"
        transfer.wait_layers(2, timeout_s=20)
        process.process.send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        with pytest.raises(KvFailed) as failed:
            transfer.wait(timeout_s=60)
        assert failed.value.outcome is Outcome.LOST
        assert time.monotonic() - begin < BOUND_S
        process.process.send_signal(signal.SIGCONT)
        process.say("go on")
        decoder.rank.connect(address, timeout_s=30)
        process.say("again", 3, LENGTH, 4)
        transfer, pages = decoder.ask(b"again", address, prompt, COUNT)
        transfer.wait(timeout_s=30)
        first = int.from_bytes(transfer.tail, "little")
        assert decoder.generate(prompt, pages, first, COUNT) == alone(prompt, COUNT)


def test_decoder_killed(shared_pair: Pair, seeded: random.Random) -> None:
    near, far = shared_pair
    prompt = prompt_of(5, LENGTH)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(transferd.Client(near.socket))
        prefiller = PrefillEngine(client)
        stack.callback(prefiller.close)
        stack.enter_context(prefiller.rank)
        for number in range(4):
            request = b"r%d" % number
            with KvProcess("decoder", far.socket, prefiller.rank.address.hex()) as process:
                process.say(request.decode(), 5, LENGTH)
                assert process.line() == "asked"
                eventually(lambda: prefiller.rank.transfers == 1, "the request is there")
                prefiller.begin(request, prompt)
                with prefiller.rank.step({request: LENGTH}) as step:
                    step.layer_done()
                    begin = time.monotonic()
                    process.kill()
                    eventually(lambda: not prefiller.rank.transfers, "the transfer has ended")
                    assert time.monotonic() - begin < BOUND_S
                prefiller.rank.finish(request, bytes(4))
                assert prefiller.collect(20) == [(request, "read")]
        with KvProcess("decoder", far.socket, prefiller.rank.address.hex()) as process:
            process.say("last", 5, LENGTH)
            assert process.line() == "asked"
            prefiller.prefill(b"last", prompt)
            assert [int(word) for word in process.line().split()] == alone(prompt, COUNT)


def test_daemon_of_the_prefiller_killed(make_daemon: MakeDaemon) -> None:
    near, far = make_daemon(), make_daemon()
    prompt = prompt_of(7, LENGTH)
    with contextlib.ExitStack() as stack:
        receiver = stack.enter_context(transferd.Client(far.socket))
        decoder = DecodeEngine(receiver)
        stack.callback(decoder.close)
        stack.enter_context(decoder.rank)
        sender = stack.enter_context(transferd.Client(near.socket))
        prefiller = PrefillEngine(sender)
        stack.callback(prefiller.close)
        stack.enter_context(prefiller.rank)
        transfer, pages = decoder.ask(b"r", prefiller.rank.address, prompt, COUNT)
        eventually(lambda: prefiller.rank.transfers == 1, "the request is there")
        prefiller.begin(b"r", prompt)
        step = prefiller.rank.step({b"r": LENGTH})
        step.layer_done()
        transfer.wait_layers(1, timeout_s=20)
        near.kill()
        with pytest.raises(KvFailed) as failed:
            transfer.wait(timeout_s=60)
        assert failed.value.outcome in (Outcome.LOST, Outcome.FAILED)
        assert prefiller.rank.released(20)[0][0] == b"r"  # with its session all is over
        with pytest.raises(transferd.Unavailable):
            prefiller.rank.begin(b"more", {"all": [1]})
        decoder.give_back(pages)
        near.restart()
        again = stack.enter_context(transferd.Client(near.socket))
        other = PrefillEngine(again)
        stack.callback(other.close)
        stack.enter_context(other.rank)
        transfer, pages = decoder.ask(b"r2", other.rank.address, prompt, COUNT)
        other.prefill(b"r2", prompt)
        transfer.wait(timeout_s=30)
        first = int.from_bytes(transfer.tail, "little")
        assert decoder.generate(prompt, pages, first, COUNT) == alone(prompt, COUNT)


def test_daemon_of_the_decoder_killed(make_daemon: MakeDaemon) -> None:
    near, far = make_daemon(), make_daemon()
    prompt = prompt_of(7, LENGTH)
    with contextlib.ExitStack() as stack:
        sender = stack.enter_context(transferd.Client(near.socket))
        prefiller = PrefillEngine(sender)
        stack.callback(prefiller.close)
        stack.enter_context(prefiller.rank)
        receiver = stack.enter_context(transferd.Client(far.socket))
        decoder = DecodeEngine(receiver)
        stack.callback(decoder.close)
        stack.enter_context(decoder.rank)
        transfer, _ = decoder.ask(b"r", prefiller.rank.address, prompt, COUNT)
        eventually(lambda: prefiller.rank.transfers == 1, "the request is there")
        prefiller.begin(b"r", prompt)
        with prefiller.rank.step({b"r": LENGTH}) as step:
            step.layer_done()
            far.kill()
            with pytest.raises(KvFailed) as failed:
                transfer.wait(timeout_s=60)
            assert failed.value.outcome is Outcome.LOST
            assert decoder.rank.poll() == [transfer]
            with pytest.raises(transferd.Unavailable):
                decoder.ask(b"more", prefiller.rank.address, prompt, COUNT)
        prefiller.rank.finish(b"r", bytes(4))
        assert prefiller.collect(60) == [(b"r", "read")]
