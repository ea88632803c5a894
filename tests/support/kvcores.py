# SPDX-License-Identifier: Apache-2.0
"""One core of transferd.kv by itself: the test is the other side, and its own client."""

from __future__ import annotations

import itertools
from array import array
from typing import TYPE_CHECKING, Any, TypeVar

from transferd.kv.protocol import actions as act
from transferd.kv.protocol import fragments, messages
from transferd.kv.protocol.bounds import Settings
from transferd.kv.protocol.decoder import DecoderCore
from transferd.kv.protocol.decoder_pairs import Identity
from transferd.kv.protocol.decoder_transfer import Wanted
from transferd.kv.protocol.messages import Hello, Reason, Request, Welcome
from transferd.kv.protocol.prefiller import PrefillerCore
from transferd.kv.protocol.prefiller_pairs import RefusedError, Terms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from transferd.kv.protocol.messages import Message

A = TypeVar("A")

STAGES = 2
WIDTH = STAGES + 1
PAGES = 100
GRANTS = (("cache", b"grant"),)
FINGERPRINT = b"one model"


def tokens() -> Callable[[], bytes]:
    """Makes a maker of tokens that differ."""
    numbers = itertools.count(1)
    return lambda: next(numbers).to_bytes(16, "big")


def pages(*indices: int) -> bytes:
    return array("I", indices).tobytes()


def of(kind: type[A], actions: Iterable[act.Action]) -> list[A]:
    """Picks the actions of a kind."""
    return [action for action in actions if isinstance(action, kind)]


def said(actions: Iterable[act.Action]) -> list[Message]:
    """Reads what is sent, each message of one letter or several."""
    found = []
    for action in of(act.Send, actions):
        letters = [fragments.read(data) for data in action.letters]
        found.append(messages.decode(b"".join(letter.payload for letter in letters)))
    return found


class Decoder:
    """A decoder core, whose prefillers are the test."""

    def __init__(self, *, blocks: int = 2, settings: Settings | None = None) -> None:
        self.now = 100.0
        self.settings = settings or Settings()
        identity = Identity(
            decoder=b"D" * 16,
            mailbox=b"mailbox of D",
            imms=range(10, 10 + blocks * WIDTH),
            stages=STAGES,
            fingerprint=FINGERPRINT,
        )
        self.core = DecoderCore(identity, (PAGES,), token=tokens(), settings=self.settings)
        self.tokens: dict[int, bytes] = {}
        self.epochs: dict[int, int] = {}
        self.names = itertools.count(1)

    def add(self) -> int:
        made = self.core.add(self.now, f"P{next(self.names)}", b"mailbox of P")
        (grants,) = of(act.MakeGrants, made)
        self.epochs[grants.pair] = grants.epoch
        return grants.pair

    def greet(self) -> int:
        """Gives a pair that is GREETING."""
        pair = self.add()
        self.granted(pair)
        return pair

    def granted(self, pair: int) -> list[act.Action]:
        made = self.core.granted(self.now, pair, self.epochs[pair], GRANTS)
        hello = next(message for message in said(made) if isinstance(message, Hello))
        self.tokens[pair] = hello.token
        return made

    def ready(self) -> int:
        """Gives a pair that is READY."""
        pair = self.greet()
        self.hear(pair, Welcome(b"P" * 16, b"B" * 16))
        return pair

    def hear(self, pair: int, message: Message) -> list[act.Action]:
        """A prefiller says something."""
        (letter,) = fragments.cut(messages.encode(message), to=self.tokens[pair])
        return self.core.receive(self.now, letter)

    def start(self, *pairs: int, indices: tuple[int, ...] = (1, 2, 3), **other: Any) -> act.Started:
        made = self.core.start(self.now, pairs, wanted(indices, **other))
        (started,) = of(act.Started, made)
        return started

    def land(self, started: act.Started) -> list[act.Action]:
        """All counters reach their targets."""
        made = []
        for i, target in enumerate(started.targets):
            made += self.core.counted(self.now, started.imm + i, target)
        return made

    def fenced(self, fence: act.Fence, grown: int = 0) -> list[act.Action]:
        values = [base + grown for base in fence.bases]
        return self.core.fenced(self.now, fence.transfer, values)

    def revoked(self, pair: int) -> list[act.Action]:
        made = self.core.revoked(self.now, pair, self.epochs[pair])
        for grants in of(act.MakeGrants, made):
            self.epochs[grants.pair] = grants.epoch
        return made

    def wait(self, seconds: float) -> list[act.Action]:
        """Lets time pass, as the core wants to be called."""
        until = self.now + seconds
        made = []
        while (due := self.core.due()) is not None and due <= until:
            self.now = max(self.now, due)
            made += self.core.tick(self.now)
        self.now = until
        return made


def wanted(indices: tuple[int, ...] = (1, 2, 3), **other: Any) -> Wanted:
    values: dict[str, Any] = {
        "request_id": b"request",
        "tokens": 48,
        "groups": (pages(*indices),),
        "counts": (3, 3, 1),
        "deadline_s": 20.0,
    }
    return Wanted(**(values | other))


def hello(**other: Any) -> Hello:
    values: dict[str, Any] = {
        "decoder": b"D" * 16,
        "epoch": 1,
        "token": b"T" * 16,
        "mailbox": b"mailbox of D",
        "grants": GRANTS,
        "imm_first": 10,
        "imm_count": 30,
        "stages": STAGES,
        "fingerprint": FINGERPRINT,
        "layout": b"",
        "timeout_ms": 3000,
    }
    return Hello(**(values | other))


def request(transfer: int = 1, **other: Any) -> Request:
    values: dict[str, Any] = {
        "transfer": transfer,
        "low": 1,
        "request_id": b"request",
        "first_token": 0,
        "tokens": 48,
        "groups": (pages(1, 2, 3),),
        "imm": 10,
        "tail_offset": 0,
        "deadline_ms": 20_000,
        "readers": 1,
    }
    return Request(**(values | other))


class Prefiller:
    """A prefiller core, whose decoders and engine are the test."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.now = 100.0
        self.settings = settings or Settings()
        self.core = PrefillerCore(b"B" * 16, self.judge, token=tokens(), settings=self.settings)
        self.tokens: dict[int, bytes] = {}

    @staticmethod
    def judge(hello: Hello) -> Terms:
        if hello.fingerprint != FINGERPRINT:
            raise RefusedError(Reason.FINGERPRINT, f"model: {hello.fingerprint!r}")
        return Terms((PAGES,), 1000)

    def greet(self, **other: Any) -> list[act.Action]:
        """A decoder says Hello."""
        said_by = hello(**other)
        letters = fragments.cut(
            messages.encode(said_by), sender=said_by.decoder, number=said_by.epoch
        )
        made = []
        for letter in letters:
            made += self.core.receive(self.now, letter)
        pairs = of(act.Open, made)
        for message in said(made):
            if pairs and isinstance(message, Welcome):
                self.tokens[pairs[0].pair] = message.token
        return made

    def open(self, **other: Any) -> int:
        """Gives a pair that is OPEN."""
        (opened,) = of(act.Open, self.greet(**other))
        return opened.pair

    def letters(self, pair: int, message: Message) -> tuple[bytes, ...]:
        number = message.transfer if isinstance(message, Request) else 0
        return fragments.cut(messages.encode(message), to=self.tokens[pair], number=number)

    def hear(self, pair: int, message: Message) -> list[act.Action]:
        """A decoder says something."""
        made = []
        for letter in self.letters(pair, message):
            made += self.core.receive(self.now, letter)
        return made

    def push(self, pair: int, number: int = 1) -> act.Push:
        """Gives a transfer that is PUSHING, 16 of 48 tokens."""
        self.core.prefill(self.now, b"request")
        self.core.computed(self.now, b"request", 16)
        (pushed,) = of(act.Push, self.hear(pair, request(number)))
        return pushed

    def pushed(self, unit: act.Push) -> list[act.Action]:
        return self.core.pushed(self.now, unit.key, unit.unit)

    def finish(self) -> list[act.Action]:
        """The engine computes the rest."""
        made = self.core.computed(self.now, b"request", 48)
        return made + self.core.finished(self.now, b"request")

    def wait(self, seconds: float) -> list[act.Action]:
        until = self.now + seconds
        made = []
        while (due := self.core.due()) is not None and due <= until:
            self.now = max(self.now, due)
            made += self.core.tick(self.now)
        self.now = until
        return made


def kinds(actions: Iterable[act.Action]) -> Iterator[str]:
    """Names actions, and messages by their own kind."""
    for action in actions:
        if isinstance(action, act.Send):
            yield from (type(message).__name__ for message in said([action]))
        else:
            yield type(action).__name__
