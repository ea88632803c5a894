# SPDX-License-Identifier: Apache-2.0
"""Transfers that are cancelled, refused, late: pages are free then, nothing lands in them."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import transferd
from transferd.kv import KvFailed, Outcome, Settings

from support.kv_engines import CONFIG, DecodeEngine, PrefillEngine, alone
from support.waiting import eventually

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

    from support.daemon import DaemonProcess

    Pair = tuple[PrefillEngine, DecodeEngine]

CANARY = 0x5A


@pytest.fixture
def clients(
    shared_pair: tuple[DaemonProcess, DaemonProcess],
) -> Iterator[tuple[transferd.Client, transferd.Client]]:
    """Gives a client of each daemon."""
    with contextlib.ExitStack() as stack:
        one, other = (stack.enter_context(transferd.Client(d.socket)) for d in shared_pair)
        yield one, other


@pytest.fixture
def engines(
    clients: tuple[transferd.Client, transferd.Client],
) -> Iterator[Callable[..., Pair]]:
    """Makes a prefiller at one daemon, a decoder at the other."""
    with contextlib.ExitStack() as stack:

        def make(settings: Settings | None = None, **options: Any) -> Pair:
            prefiller = PrefillEngine(clients[0], settings=settings)
            decoder = DecodeEngine(clients[1], settings=settings, **{"slots": 8, **options})
            stack.callback(prefiller.close)
            stack.callback(decoder.close)
            stack.enter_context(prefiller.rank)
            stack.enter_context(decoder.rank)
            return prefiller, decoder

        yield make


def prompt_of(seeded: random.Random, length: int) -> list[int]:
    return [seeded.randrange(CONFIG.vocabulary) for _ in range(length)]


def paint(decoder: DecodeEngine, pages: Any) -> None:
    """Fills pages with canaries."""
    decoder.model.cache.view(np.uint8)[:, :, pages] = CANARY


def untouched(decoder: DecodeEngine, pages: Any) -> bool:
    return bool((decoder.model.cache.view(np.uint8)[:, :, pages] == CANARY).all())


def behind(prefiller: PrefillEngine, decoder: DecodeEngine, request: bytes) -> None:
    """Has a short request go the same way: what was submitted before has landed by then."""
    prompt = [1, 2, 3]
    transfer, pages = decoder.ask(request, prefiller.rank.address, prompt, 0)
    prefiller.prefill(request, prompt)
    transfer.wait(timeout_s=20)
    decoder.give_back(pages)
    while request in prefiller.pages:
        assert prefiller.collect(20)


def test_first_layers_are_usable_before_the_last(
    engines: Callable[..., Pair], seeded: random.Random
) -> None:
    prefiller, decoder = engines(stages=4)
    prompt = prompt_of(seeded, 40)
    transfer, pages = decoder.ask(b"r", prefiller.rank.address, prompt, 2)
    prefiller.begin(b"r", prompt)
    with prefiller.rank.step({b"r": 40}) as step:

        def layer_done(layer: int) -> None:
            step.layer_done()
            transfer.wait_layers(layer + 1, timeout_s=20)
            here = decoder.model.cache[: layer + 1, :, pages[:5]]
            there = prefiller.model.cache[: layer + 1, :, prefiller.pages[b"r"]]
            assert np.array_equal(here, there)
            assert not transfer.done

        token = prefiller.model.forward(prompt, 0, prefiller.pages[b"r"], layer_done)
    prefiller.rank.finish(b"r", token.to_bytes(4, "little"))
    transfer.wait(timeout_s=20)
    assert transfer.layers == 4


def test_a_cancelled_transfer_frees_its_pages_at_once(
    engines: Callable[..., Pair], seeded: random.Random
) -> None:
    prefiller, decoder = engines()
    prompt = prompt_of(seeded, 100)
    prefiller.begin(b"r", prompt)
    transfer, pages = decoder.ask(b"r", prefiller.rank.address, prompt, 2)
    prefiller.chunk(b"r", prompt, 0, 50)
    eventually(lambda: prefiller.rank.transfers == 1, "the request is there")
    transfer.cancel()
    with pytest.raises(KvFailed) as failed:
        transfer.wait(timeout_s=20)
    assert failed.value.outcome is Outcome.CANCELLED
    paint(decoder, pages)
    prefiller.chunk(b"r", prompt, 50, 100)
    prefiller.rank.finish(b"r", bytes(4))
    assert prefiller.collect(20) == [(b"r", "read")]
    assert untouched(decoder, pages)


def test_200_aborts_in_mid_transfer_leave_canaries_intact(
    engines: Callable[..., Pair], seeded: random.Random
) -> None:
    prefiller, decoder = engines(slots=4)
    prompt = prompt_of(seeded, 96)
    address = prefiller.rank.address
    decoder.rank.connect(address, timeout_s=20)
    outcomes = set()
    for number in range(200):
        request = b"abort %d" % number
        prefiller.begin(request, prompt)
        transfer, pages = decoder.ask(request, address, prompt, 0)
        with prefiller.rank.step({request: 96}) as step:
            for _ in range(seeded.randrange(1, 4)):
                step.layer_done()
            if number % 2:
                transfer.cancel()
            else:
                prefiller.rank.abort(request, "preempted")
            with contextlib.suppress(KvFailed):
                transfer.wait(timeout_s=20)
            assert transfer.outcome is not None
            outcomes.add(transfer.outcome)
            paint(decoder, pages)
        if number % 2:
            prefiller.rank.finish(request, bytes(4))
        behind(prefiller, decoder, b"behind %d" % number)
        assert untouched(decoder, pages), transfer
        decoder.give_back(pages)  # the next one has the same
    assert outcomes == {Outcome.CANCELLED, Outcome.FAILED}
    transfer, pages = decoder.ask(b"good", address, prompt, 3)
    prefiller.prefill(b"good", prompt)
    transfer.wait(timeout_s=20)
    first = int.from_bytes(transfer.tail, "little")
    assert decoder.generate(prompt, pages, first, 3) == alone(prompt, 3)


def test_an_aborted_prefill_ends_its_transfer(
    engines: Callable[..., Pair], seeded: random.Random
) -> None:
    prefiller, decoder = engines()
    prompt = prompt_of(seeded, 30)
    prefiller.begin(b"r", prompt)
    transfer, _ = decoder.ask(b"r", prefiller.rank.address, prompt, 0)
    prefiller.rank.abort(b"r", "no memory")
    with pytest.raises(KvFailed, match="ABORTED"):
        transfer.wait(timeout_s=20)
    assert prefiller.collect(20) == [(b"r", "aborted")]


def test_a_second_transfer_of_a_request_is_refused(
    engines: Callable[..., Pair], seeded: random.Random
) -> None:
    prefiller, decoder = engines()
    prompt = prompt_of(seeded, 30)
    first, pages = decoder.ask(b"r", prefiller.rank.address, prompt, 2)
    eventually(lambda: prefiller.rank.transfers == 1, "the request is there")
    second, _ = decoder.ask(b"r", prefiller.rank.address, prompt, 2)
    with pytest.raises(KvFailed, match="DUPLICATE"):
        second.wait(timeout_s=20)
    token = prefiller.prefill(b"r", prompt)
    first.wait(timeout_s=20)
    assert decoder.generate(prompt, pages, token, 2) == alone(prompt, 2)
    assert prefiller.collect(20) == [(b"r", "read")]
    late, _ = decoder.ask(b"r", prefiller.rank.address, prompt, 2)
    with pytest.raises(KvFailed, match="RELEASED"):
        late.wait(timeout_s=20)


def test_a_step_that_raises_gives_its_requests_up(
    engines: Callable[..., Pair], seeded: random.Random
) -> None:
    prefiller, decoder = engines()
    prompt = prompt_of(seeded, 30)
    prefiller.begin(b"r", prompt)
    transfer, pages = decoder.ask(b"r", prefiller.rank.address, prompt, 0)
    eventually(lambda: prefiller.rank.transfers == 1, "the request is there")

    def forward() -> None:
        with prefiller.rank.step({b"r": 30}) as step:
            step.layer_done()
            raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="device is gone"):
        forward()
    with pytest.raises(KvFailed, match="a step has failed"):
        transfer.wait(timeout_s=20)
    paint(decoder, pages)
    assert prefiller.collect(20) == [(b"r", "aborted")]
    prefiller.prefill(b"next", prompt)  # steps go on
    other, _ = decoder.ask(b"next", prefiller.rank.address, prompt, 0)
    other.wait(timeout_s=20)
    assert untouched(decoder, pages)


def test_a_deadline_ends_a_transfer_that_nobody_computes(
    engines: Callable[..., Pair], seeded: random.Random
) -> None:
    prefiller, decoder = engines()
    transfer, _ = decoder.ask(
        b"never", prefiller.rank.address, prompt_of(seeded, 9), 0, deadline_s=0.2
    )
    with pytest.raises(KvFailed) as failed:
        transfer.wait(timeout_s=20)
    assert failed.value.outcome in (Outcome.DEADLINE, Outcome.FAILED)


def test_a_prefill_that_nobody_reads_is_released_by_its_lease(
    engines: Callable[..., Pair], seeded: random.Random
) -> None:
    prefiller, _ = engines(Settings(lease_s=0.2))
    prefiller.prefill(b"r", prompt_of(seeded, 9))
    assert prefiller.collect(20) == [(b"r", "lease")]


def test_what_is_wrong_with_a_request_is_told(
    engines: Callable[..., Pair], seeded: random.Random
) -> None:
    prefiller, decoder = engines(slots=2)
    address = prefiller.rank.address
    pages = decoder.take(40)
    for words, arguments in (
        (
            "pages of group all have entries 0 to 4, needed are 0 to 5",
            (b"r", address, {"all": pages}, 41),
        ),
        ("is listed twice", (b"r", address, {"all": [1, 1]}, 16)),
        ("page 128 is out of range", (b"r", address, {"all": [128]}, 8)),
        ("groups that the layout does not have", (b"r", address, {"other": [1]}, 8)),
        ("tokens is a number", (b"r", address, {"all": pages}, 0)),
        ("an address is", (b"r", b"\xff\xff", {"all": pages}, 8)),
        ("within a page", (b"r", address, {"all": pages}, 16, 3)),
    ):
        with pytest.raises(transferd.InvalidRequest, match=words):
            decoder.rank.request(*arguments)
    running = [decoder.ask(b"%d" % i, address, prompt_of(seeded, 4), 0)[0] for i in range(2)]
    with pytest.raises(transferd.QuotaExceeded, match="more slots"):
        decoder.ask(b"third", address, prompt_of(seeded, 4), 0)
    for transfer in running:
        transfer.cancel()
    with pytest.raises(transferd.NotFound):
        prefiller.rank.finish(b"unknown", bytes(4))
    prefiller.begin(b"r", [1, 2])
    with pytest.raises(transferd.InvalidRequest, match="a tail has 4 bytes"):
        prefiller.rank.finish(b"r", b"")


def test_what_a_session_has_no_room_for_is_told(
    clients: tuple[transferd.Client, transferd.Client],
    shared_pair: tuple[DaemonProcess, DaemonProcess],
) -> None:
    with pytest.raises(transferd.QuotaExceeded, match="attach with a larger counter_count"):
        DecodeEngine(clients[1], slots=2000)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kv-d")]
    DecodeEngine(clients[1], slots=2).rank.close()
    with (
        transferd.Client(shared_pair[0].socket, shared_memory=False) as remote,
        pytest.raises(transferd.Conflict) as told,
    ):
        PrefillEngine(remote)
    assert told.value.reason == "NO_SHARED_MEMORY"


def test_another_model_is_refused_by_its_difference(
    clients: tuple[transferd.Client, transferd.Client],
) -> None:
    from dataclasses import replace

    with contextlib.ExitStack() as stack:
        prefiller = PrefillEngine(clients[0], replace(CONFIG, seed=7))
        decoder = DecodeEngine(clients[1])
        for engine in (prefiller, decoder):
            stack.callback(engine.close)
            stack.enter_context(engine.rank)
        with pytest.raises(transferd.InvalidRequest, match="llama, seed 7 at prefiller") as told:
            decoder.rank.connect(prefiller.rank.address)
        assert told.value.reason == "FINGERPRINT"


def test_a_drained_prefiller_ends_what_it_has(
    engines: Callable[..., Pair], seeded: random.Random
) -> None:
    prefiller, decoder = engines()
    prompt = prompt_of(seeded, 30)
    prefiller.begin(b"r", prompt)
    transfer, pages = decoder.ask(b"r", prefiller.rank.address, prompt, 2)
    prefiller.chunk(b"r", prompt, 0, 10)
    eventually(lambda: prefiller.rank.transfers == 1, "the request is there")
    assert not prefiller.rank.drain()
    token = prefiller.chunk(b"r", prompt, 10, 30)
    prefiller.rank.finish(b"r", token.to_bytes(4, "little"))
    transfer.wait(timeout_s=20)
    assert decoder.generate(prompt, pages, token, 2) == alone(prompt, 2)
    assert prefiller.rank.drain(timeout_s=20)
    with pytest.raises((KvFailed, transferd.Conflict)):
        decoder.ask(b"late", prefiller.rank.address, prompt, 2)[0].wait(timeout_s=20)


def test_an_idle_pair_sleeps(engines: Callable[..., Pair]) -> None:
    prefiller, decoder = engines()
    decoder.rank.connect(prefiller.rank.address, timeout_s=20)
    begin, cpu = time.monotonic(), time.process_time()
    eventually(lambda: time.monotonic() - begin > 2, "two seconds have passed")
    # Two heartbeats and looks of the SDK; a pump that polls would take all of it. `eventually`
    # itself looks a hundred times a second.
    assert time.process_time() - cpu < 0.5
