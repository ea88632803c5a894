# SPDX-License-Identifier: Apache-2.0
"""Prefillers and decoders in all combinations, whatever happens; strange letters."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import numpy as np
import pytest

import transferd
from transferd.kv import KvFailed, Outcome, Settings, fingerprint
from transferd.kv.address import unpack
from transferd.kv.protocol import fragments, messages

from support.kv_engines import TAIL, DecodeEngine, PrefillEngine
from support.waiting import eventually

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from conftest import MakeDaemon

    from support.daemon import DaemonProcess

    Pair = tuple[DaemonProcess, DaemonProcess]
    Engines = tuple[list[PrefillEngine], list[DecodeEngine]]

pytestmark = pytest.mark.slow

AT_ONCE = 8
ENDS = ("good", "good", "cancelled early", "cancelled late", "aborted")
# Of whoever has an answer to wait for: a machine that stands still for seconds is no failure here.
PATIENCE_S = 30.0


@pytest.fixture
def patient(make_daemon: MakeDaemon) -> Pair:
    """Starts two daemons that do not lose one another when the machine stands still."""
    bounds = {"peer_call": PATIENCE_S, "revoke": PATIENCE_S, "quiet": PATIENCE_S}
    beat = {"interval": 0.5, "timeout": PATIENCE_S}
    return (
        make_daemon(timeouts=bounds, heartbeat=beat),
        make_daemon(timeouts=bounds, heartbeat=beat),
    )


@pytest.fixture
def engines(patient: Pair) -> Iterator[Engines]:
    """Gives two prefillers and two decoders, one of each at each daemon."""
    settings = Settings(
        timeout_s=PATIENCE_S, cancel_s=PATIENCE_S, lease_s=4 * PATIENCE_S, grace_s=PATIENCE_S
    )
    with contextlib.ExitStack() as stack:
        made: Engines = ([], [])
        for number, daemon in enumerate(patient):
            client = stack.enter_context(transferd.Client(daemon.socket))
            prefiller = PrefillEngine(client, name=f"p{number}", settings=settings)
            decoder = DecodeEngine(
                client, name=f"d{number}", stages=3, slots=AT_ONCE, settings=settings
            )
            made[0].append(prefiller)
            made[1].append(decoder)
            stack.callback(prefiller.close)
            stack.callback(decoder.close)
            stack.enter_context(prefiller.rank)
            stack.enter_context(decoder.rank)
        yield made


class One:
    """A request: who serves it, how it is to end."""

    def __init__(self, name: bytes, engines: Engines, random: random.Random) -> None:
        self.name = name
        self.prefiller, self.decoder = random.choice(engines[0]), random.choice(engines[1])
        self.prompt = [random.randrange(128) for _ in range(random.randrange(1, 60))]
        self.end = random.choice(ENDS)
        self.token = 0
        self.done = 0
        early = random.random() < 0.5
        if early:
            self.ask()
        self.prefiller.begin(name, self.prompt)
        if not early:
            self.ask()

    def ask(self) -> None:
        self.transfer, self.pages = self.decoder.ask(
            self.name, self.prefiller.rank.address, self.prompt, 0, deadline_s=4 * PATIENCE_S
        )

    def step(self, tokens: int) -> None:
        """Computes a part; the transfer may be taken back in the middle of it."""
        if self.end == "aborted" and tokens == len(self.prompt):
            self.prefiller.rank.abort(self.name)
        else:
            with self.prefiller.rank.step({self.name: tokens}) as step:

                def layer_done(layer: int) -> None:
                    step.layer_done()
                    if layer == 1 and self.end == "cancelled late":
                        self.transfer.cancel()

                self.token = self.prefiller.model.forward(
                    self.prompt[self.done : tokens],
                    self.done,
                    self.prefiller.pages[self.name],
                    layer_done,
                )
        self.done = tokens

    def check(self) -> None:
        """Sees to it that it has ended as it should, and the pages are free on both sides."""
        with contextlib.suppress(KvFailed):
            self.transfer.wait(timeout_s=2 * PATIENCE_S)
        if self.end == "good":
            assert self.transfer.outcome is Outcome.COMPLETE
            assert int.from_bytes(self.transfer.tail, "little") == self.token
            self._check_bytes()
        elif self.end == "aborted":
            assert self.transfer.outcome is Outcome.FAILED
        else:
            assert self.transfer.outcome is Outcome.CANCELLED
            # One that was cancelled before its Request had come would be held for the lease.
            self.prefiller.rank.abort(self.name)
        self.decoder.give_back(self.pages)

    def _check_bytes(self) -> None:
        whole, rest = divmod(len(self.prompt), self.decoder.config.page_tokens)
        own, theirs = self.prefiller.pages[self.name], self.pages
        for pages, tokens in ((slice(0, whole), 8), (slice(whole, whole + 1), rest)):
            here = self.decoder.model.cache[:, :, theirs[pages], :tokens]
            there = self.prefiller.model.cache[:, :, own[pages], :tokens]
            wrong = np.argwhere(here != there)
            assert not len(wrong), f"(layer, half, page, token, …) differ: {wrong[:8].tolist()}"

    def tell(self) -> str:
        """Says where it stands, for a failure."""
        transfer, rank = self.transfer, self.decoder.rank
        return (
            f"{transfer!r}, to end as {self.end}, {transfer.detail!r}, imm {transfer._imm}: "
            f"(value, faults) {rank._counts.read(transfer._imm, rank._stages + 1)}; "
            f"at the decoder {rank._core._transfers.get(transfer.number)}; "
            f"at the prefiller {self.prefiller.rank._core._prefills.get(self.name)}"
        )


def one_round(number: int, engines: Engines, seeded: random.Random) -> None:
    """Has some requests end in some ways."""
    names = [b"%d.%d" % (number, i) for i in range(AT_ONCE)]
    ones = [One(name, engines, seeded) for name in names]
    try:
        for one in ones:
            if one.end == "cancelled early":
                one.transfer.cancel()
        while computing := [one for one in ones if one.done < len(one.prompt)]:
            one = seeded.choice(computing)
            one.step(min(len(one.prompt), one.done + seeded.randrange(1, 30)))
        for one in ones:
            if one.end != "aborted":
                one.prefiller.rank.finish(one.name, one.token.to_bytes(TAIL, "little"))
        for one in ones:
            one.check()
        for prefiller in engines[0]:
            while prefiller.pages:
                assert prefiller.collect(2 * PATIENCE_S), f"not released: {prefiller.pages}"
    except BaseException as error:
        for one in ones:
            error.add_note(one.tell())
        raise


@pytest.mark.timeout(600)
@pytest.mark.parametrize("rounds", [40, pytest.param(1000, marks=pytest.mark.long)])
def test_whatever_happens_to_requests(engines: Engines, rounds: int, seeded: random.Random) -> None:
    for number in range(rounds):
        one_round(number, engines, seeded)
    for prefiller, decoder in zip(*engines, strict=True):
        assert len(prefiller.free) == len(decoder.free) == prefiller.config.pages
        assert prefiller.rank.statistics.malformed == decoder.rank.statistics.malformed == 0


def test_strange_letters_change_nothing(
    engines: Engines, patient: Pair, seeded: random.Random
) -> None:
    (prefiller, _), (decoder, _) = engines
    (rank,) = unpack(prefiller.rank.address)
    with transferd.Client(patient[1].socket) as stranger:
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
