# SPDX-License-Identifier: Apache-2.0
"""Prefillers and decoders in all combinations, whatever happens; strange letters."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import transferd
from transferd.kv import KvFailed, Outcome, fingerprint
from transferd.kv.address import unpack
from transferd.kv.protocol import fragments, messages

from support.kv_engines import TAIL, DecodeEngine, PrefillEngine
from support.waiting import eventually

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from support.daemon import DaemonProcess

pytestmark = pytest.mark.slow

ROUNDS, AT_ONCE = 25, 6
ENDS = ("good", "good", "cancelled early", "cancelled late", "aborted")


@pytest.fixture
def engines(
    shared_pair: tuple[DaemonProcess, DaemonProcess],
) -> Iterator[tuple[list[PrefillEngine], list[DecodeEngine]]]:
    """Gives two prefillers and two decoders, one of each at each daemon."""
    with contextlib.ExitStack() as stack:
        made: tuple[list[PrefillEngine], list[DecodeEngine]] = ([], [])
        for number, daemon in enumerate(shared_pair):
            client = stack.enter_context(transferd.Client(daemon.socket))
            made[0].append(PrefillEngine(client, name=f"p{number}"))
            made[1].append(DecodeEngine(client, name=f"d{number}", stages=3, slots=AT_ONCE))
        for prefiller, decoder in zip(*made, strict=True):
            for engine in (prefiller, decoder):
                stack.callback(engine.close)
            stack.enter_context(prefiller.rank)
            stack.enter_context(decoder.rank)
        yield made


class One:
    """A request: who serves it, how it is to end."""

    def __init__(
        self, name: bytes, prefiller: PrefillEngine, decoder: DecodeEngine, random: random.Random
    ) -> None:
        self.name, self.prefiller, self.decoder = name, prefiller, decoder
        self.prompt = [random.randrange(128) for _ in range(random.randrange(1, 60))]
        self.end = random.choice(ENDS)
        self.token = 0
        self.done = 0
        self.early = random.random() < 0.5
        if self.early:
            self.ask()
        prefiller.begin(name, self.prompt)
        if not self.early:
            self.ask()

    def ask(self) -> None:
        self.transfer, self.pages = self.decoder.ask(
            self.name, self.prefiller.rank.address, self.prompt, 0
        )

    def step(self, step: Any, tokens: int) -> None:
        """Computes a part; it may be taken back in the middle of it."""
        own = self.prefiller.pages[self.name]
        layers = iter(range(4))

        def layer_done(layer: int) -> None:
            step.layer_done()
            if next(layers) == 1 and self.end == "cancelled late":
                self.transfer.cancel()

        part = self.prompt[self.done : tokens]
        self.token = self.prefiller.model.forward(part, self.done, own, layer_done)
        self.done = tokens

    def check(self) -> None:
        """Sees to it that it has ended as it should, and the pages are free on both sides."""
        if self.end == "good":
            self.transfer.wait(timeout_s=20)
            assert int.from_bytes(self.transfer.tail, "little") == self.token
            whole, rest = divmod(len(self.prompt), self.decoder.config.page_tokens)
            own, theirs = self.prefiller.pages[self.name], self.pages
            for pages, tokens in ((whole, 8), (1, rest)):
                first = 0 if tokens == 8 else whole
                here = self.decoder.model.cache[:, :, theirs[first : first + pages], :tokens]
                there = self.prefiller.model.cache[:, :, own[first : first + pages], :tokens]
                assert np.array_equal(here, there)
        else:
            with contextlib.suppress(KvFailed):
                self.transfer.wait(timeout_s=20)
            outcome = self.transfer.outcome
            assert outcome in (Outcome.CANCELLED, Outcome.FAILED, Outcome.COMPLETE)
            # One that was cancelled before its Request had come would be held for the lease.
            self.prefiller.rank.abort(self.name)
        self.decoder.give_back(self.pages)


def test_whatever_happens_to_requests(
    engines: tuple[list[PrefillEngine], list[DecodeEngine]], seeded: random.Random
) -> None:
    prefillers, decoders = engines
    for round_number in range(ROUNDS):
        ones = [
            One(name, seeded.choice(prefillers), seeded.choice(decoders), seeded)
            for name in (b"%d.%d" % (round_number, i) for i in range(AT_ONCE))
        ]
        for one in ones:
            if one.end == "cancelled early":
                one.transfer.cancel()
        while any(one.done < len(one.prompt) for one in ones):
            one = seeded.choice([one for one in ones if one.done < len(one.prompt)])
            tokens = min(len(one.prompt), one.done + seeded.randrange(1, 30))
            if one.end == "aborted" and tokens == len(one.prompt):
                one.prefiller.rank.abort(one.name)
                one.done = tokens
                continue
            with one.prefiller.rank.step({one.name: tokens}) as step:
                one.step(step, tokens)
        for one in ones:
            if one.end != "aborted":
                one.prefiller.rank.finish(one.name, one.token.to_bytes(TAIL, "little"))
        for one in ones:
            one.check()
        for prefiller in prefillers:
            while prefiller.pages:
                assert prefiller.collect(20), "pages are not released"
    for prefiller, decoder in zip(prefillers, decoders, strict=True):
        assert len(prefiller.free) == len(decoder.free) == prefiller.config.pages
        assert prefiller.rank.statistics.malformed == decoder.rank.statistics.malformed == 0


def test_strange_letters_change_nothing(
    engines: tuple[list[PrefillEngine], list[DecodeEngine]],
    shared_pair: tuple[DaemonProcess, DaemonProcess],
    seeded: random.Random,
) -> None:
    (prefiller, _), (decoder, _) = engines
    (rank,) = unpack(prefiller.rank.address)
    with transferd.Client(shared_pair[1].socket) as stranger:
        mailbox = stranger.mailbox(slot_bytes=8192)
        for size in (1, 10, 100, 1000, 8192):
            stranger.send(rank.mailbox, seeded.randbytes(size)).wait(20)
        for number, layout in enumerate((b"", b"\xff" * 9, seeded.randbytes(500)), 1):
            me = os.urandom(16)
            hello = messages.Hello(
                decoder=me,
                epoch=number,
                token=os.urandom(16),
                mailbox=mailbox.descriptor,
                grants=(("cache", b"no descriptor"),),
                imm_first=0,
                imm_count=10,
                stages=2,
                fingerprint=fingerprint(prefiller.layout).encode(),
                layout=layout,
                timeout_ms=1000,
            )
            for letter in fragments.cut(messages.encode(hello), sender=me, number=number):
                stranger.send(rank.mailbox, letter).wait(20)
            answer = messages.decode(fragments.read(mailbox.receive(20)).payload)
            assert isinstance(answer, messages.Refused)
        eventually(lambda: prefiller.rank.statistics.malformed >= 5, "they were looked at")
    prompt = [1, 2, 3]
    transfer, _ = decoder.ask(b"r", prefiller.rank.address, prompt, 0)
    prefiller.prefill(b"r", prompt)
    transfer.wait(timeout_s=20)
