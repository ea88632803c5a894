# SPDX-License-Identifier: Apache-2.0
"""A prefiller rank's pairs: who has presented itself, who is silent, what has ended.

A pair made anew has a token of its own, and a Request names it. So nothing that a decoder sent to
an earlier one is taken, and what has ended need be remembered only as long as its pair lives.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from transferd.kv.protocol import bounds, fragments, messages
from transferd.kv.protocol.actions import Close, Kind, Open, Send, SendKey
from transferd.kv.protocol.fragments import Partials
from transferd.kv.protocol.messages import (
    BadMessageError,
    Bye,
    Hello,
    Ping,
    Pong,
    Reason,
    Refused,
    Request,
    Welcome,
)
from transferd.kv.protocol.prefiller_tables import PAIR, PairEvent, PairState

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from transferd.kv.protocol.actions import Action, Statistics
    from transferd.kv.protocol.bounds import Settings
    from transferd.kv.protocol.fragments import Letter
    from transferd.kv.protocol.messages import Message
    from transferd.kv.protocol.timers import Timers


class RefusedError(ValueError):
    """A Hello is refused.

    Args:
        reason: For the decoder; a judge says FINGERPRINT.
        text: Names the difference, for people.
    """

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Terms:
    """What the requests of a decoder rank have to keep to.

    Attributes:
        pages: Pages that its cache has, of each group.
        tail_offset_max: The highest that fits.
    """

    pages: tuple[int, ...]
    tail_offset_max: int


Judge = Callable[[Hello], Terms]  # raises RefusedError


class Done(enum.Enum):
    """How a transfer ended that has not failed."""

    PUSHED = "pushed"
    CANCELLED = "cancelled"


@dataclass(slots=True, eq=False)
class Pair:
    """A decoder rank.

    Attributes:
        hello: What it has said.
        terms: What its requests have to keep to.
        token: By which it addresses us.
        low: The lowest transfer that it still has, as far as it has said.
        transfers: Numbers of those under way.
        ended: How those have ended that are not below ``low``.
        partials: Requests of which parts are missing.
    """

    number: int
    hello: Hello
    terms: Terms
    token: bytes
    partials: Partials
    state: PairState = PairState.OPEN
    low: int = 1
    transfers: set[int] = field(default_factory=set)
    ended: dict[int, Done | Reason] = field(default_factory=dict)
    why: str = ""

    def raise_low(self, low: int) -> None:
        """Forgets what the decoder will never ask for again; one that goes back is an old one."""
        if low <= self.low:
            return
        if low - self.low <= len(self.ended):
            for number in range(self.low, low):
                self.ended.pop(number, None)
        else:
            self.ended = {number: end for number, end in self.ended.items() if number >= low}
        self.low = low

    def is_new(self, number: int) -> bool:
        """Tells whether a transfer was never heard of, and may be."""
        return (
            self.low <= number < self.low + bounds.WINDOW
            and number not in self.ended
            and number not in self.transfers
        )


class Listener(Protocol):
    """The transfers, as pairs see them."""

    statistics: Statistics

    @property
    def now(self) -> float:
        """Time of the event that runs."""

    @property
    def draining(self) -> bool:
        """No new pairs, no new requests."""

    def take(self, pair: Pair, message: Message) -> bool:
        """Does what a message about a transfer says; False: it says nothing in this state."""

    def refuse(self, pair: Pair, number: int, reason: Reason, detail: str) -> None:
        """Ends a transfer that has not begun."""

    def pair_over(self, pair: Pair) -> None:
        """Its transfers have to stop; once it has none, it is gone."""

    def resend(self, pair: Pair, number: int) -> None:
        """Says again how a transfer has ended."""


class Pairs:
    """All pairs of a prefiller rank: by number, by token, by decoder."""

    def __init__(
        self,
        boot: bytes,
        judge: Judge,
        settings: Settings,
        token: Callable[[], bytes],
        timers: Timers,
        out: list[Action],
        listener: Listener,
    ) -> None:
        self._boot = boot
        self._judge = judge
        self._settings = settings
        self._token = token
        self._timers = timers
        self._out = out
        self._listener = listener
        self._pairs: dict[int, Pair] = {}
        self._by_token: dict[bytes, Pair] = {}
        self._by_decoder: dict[bytes, Pair] = {}
        self._hellos = Partials(settings.partials, settings.partial_bytes, settings.partial_s)
        self._next = 1

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._pairs.values())

    def get(self, number: int) -> Pair | None:
        """Finds a pair that is not gone."""
        return self._pairs.get(number)

    def partials(self) -> int:
        """Counts the messages of which parts are missing."""
        return len(self._hellos) + sum(len(pair.partials) for pair in self._pairs.values())

    # ---- messages ----

    def receive(self, data: bytes) -> None:
        """Takes a letter, whatever it is."""
        statistics = self._listener.statistics
        try:
            letter = fragments.read(data)
            if letter.sender:
                self._take_hello(letter)
                return
            pair = self._by_token.get(letter.to)
            if pair is None:
                statistics.strangers += 1
                return
            if not self._take_letter(pair, letter):
                statistics.unexpected += 1
        except BadMessageError:
            statistics.malformed += 1

    def _take_hello(self, letter: Letter) -> None:
        data: bytes | None = letter.payload
        if letter.count > 1:
            key = (letter.sender, letter.number)
            while not self._hellos.fits(key, letter) and self._hellos.drop_oldest():
                pass  # it will be said again
            data = self._hellos.add(self._listener.now, key, letter)
            self._wait_for_parts(0, self._hellos)
        if data is None:
            return
        message = messages.decode(data)
        if not isinstance(message, Hello) or message.decoder != letter.sender:
            raise BadMessageError("a letter for nobody holds a Hello of its sender")
        self._hello(message)

    def _take_letter(self, pair: Pair, letter: Letter) -> bool:
        data: bytes | None = letter.payload
        if letter.count > 1:
            if not pair.is_new(letter.number):
                self._heard(pair)
                return False  # said again, or late
            if not pair.partials.fits(letter.number, letter):
                text = "too many requests of which parts are missing"
                self._listener.refuse(pair, letter.number, Reason.BUSY, text)
                return False
            data = pair.partials.add(self._listener.now, letter.number, letter)
            self._wait_for_parts(pair.number, pair.partials)
        if data is None:
            self._heard(pair)
            return True
        message = messages.decode(data)
        if letter.count > 1 and not (
            isinstance(message, Request) and message.transfer == letter.number
        ):
            raise BadMessageError("several parts hold a Request of their number")
        self._heard(pair)
        match message:
            case Ping():
                pair.raise_low(message.low)
                self.send(pair, Pong(message.number, self._listener.draining))
            case Bye():
                self.close(pair, "the decoder has left")
            case _:
                return self._listener.take(pair, message)
        return True

    def _wait_for_parts(self, number: int, partials: Partials) -> None:
        due = partials.due()
        if due is None:
            self._timers.cancel(("parts", number))
        else:
            self._timers.set(("parts", number), due)

    def send(
        self, pair: Pair, message: Message, kind: Kind = Kind.OTHER, transfer: int = 0
    ) -> None:
        """Says something to a decoder, if it is to hear anything any more."""
        if pair.state is PairState.OPEN:
            key = SendKey(pair.number, 0, kind, transfer)
            self._send(pair.hello, message, key)

    def _send(self, hello: Hello, message: Message, key: SendKey) -> None:
        letters = fragments.cut(messages.encode(message), to=hello.token)
        self._out.append(Send(hello.mailbox, letters, key))

    # ---- the life of a pair ----

    def _hello(self, hello: Hello) -> None:
        known = self._by_decoder.get(hello.decoder)
        if known is not None:
            if hello == known.hello and PAIR.step(known, PairEvent.HELLO):
                self._heard(known)
                self.send(known, Welcome(known.token, self._boot))
                return
            if hello.epoch <= known.hello.epoch:
                self._listener.statistics.unexpected += 1
                return
            self.close(known, "the decoder has presented itself anew")
        try:
            terms = self._admit(hello)
        except RefusedError as error:
            refused = Refused(error.reason, messages.clip(str(error)))
            self._send(hello, refused, SendKey(0, 0, Kind.OTHER, 0))
            return
        self._open(hello, terms)

    def _admit(self, hello: Hello) -> Terms:
        if self._listener.draining:
            raise RefusedError(Reason.DRAINING, "this prefiller leaves")
        if len(self._pairs) >= self._settings.pairs:
            raise RefusedError(Reason.BUSY, f"{len(self._pairs)} decoder ranks are here")
        if hello.imm_count <= hello.stages:
            text = f"{hello.imm_count} immediates do not do for {hello.stages} stages and a tail"
            raise RefusedError(Reason.BAD_REQUEST, text)
        return self._judge(hello)

    def _open(self, hello: Hello, terms: Terms) -> None:
        settings = self._settings
        pair = Pair(
            number=self._next,
            hello=hello,
            terms=terms,
            token=self._token(),
            partials=Partials(settings.partials, settings.partial_bytes, settings.partial_s),
        )
        self._next += 1
        self._pairs[pair.number] = pair
        self._by_token[pair.token] = pair
        self._by_decoder[hello.decoder] = pair
        self._heard(pair)
        self._out.append(Open(pair.number, hello))
        self.send(pair, Welcome(pair.token, self._boot))

    def _heard(self, pair: Pair) -> None:
        silence = max(self._settings.timeout_s, pair.hello.timeout_ms / 1000)
        self._timers.set(("silent", pair.number), self._listener.now + silence)

    def close(self, pair: Pair, why: str) -> None:
        """Ends a pair: nothing is heard or said any more, its transfers stop."""
        if not PAIR.step(pair, PairEvent.OVER):
            return
        pair.why = why
        self._by_token.pop(pair.token, None)
        if self._by_decoder.get(pair.hello.decoder) is pair:
            del self._by_decoder[pair.hello.decoder]
        for kind in ("silent", "parts"):
            self._timers.cancel((kind, pair.number))
        pair.partials = Partials(0, 0, 0)
        pair.ended.clear()
        self._listener.pair_over(pair)
        self.leave_if_empty(pair)

    def leave_if_empty(self, pair: Pair) -> None:
        """Forgets a pair that is over, once nothing of it is under way."""
        if not pair.transfers and PAIR.step(pair, PairEvent.EMPTY):
            del self._pairs[pair.number]
            self._out.append(Close(pair.number, pair.why))

    def say_bye(self) -> None:
        """Tells all decoders that no new request is taken."""
        for pair in self._pairs.values():
            self.send(pair, Bye())

    def undelivered(self, key: SendKey, *, dead: bool) -> None:
        """A message may not have arrived."""
        pair = self._pairs.get(key.pair)
        if pair is None:
            return
        if dead:
            self.close(pair, "its mailbox is gone")
        elif key.kind is Kind.ANSWER and pair.state is PairState.OPEN:
            due = self._listener.now + self._settings.retry_s
            self._timers.set(("resend", pair.number, key.transfer), due)

    # ---- time ----

    def tick(self, key: tuple[Hashable, ...]) -> bool:
        """Does what is due of a pair; False: the key is not one's."""
        match key:
            case ("silent", int(number)):
                self.close(self._pairs[number], "nothing was heard of the decoder")
            case ("parts", 0):
                for _ in self._hellos.expire(self._listener.now):
                    pass  # it will be said again
                self._wait_for_parts(0, self._hellos)
            case ("parts", int(number)):
                self._parts_missing(self._pairs[number])
            case ("resend", int(number), int(transfer)):
                pair = self._pairs.get(number)
                if pair is not None and pair.state is PairState.OPEN:
                    self._listener.resend(pair, transfer)
            case _:
                return False
        return True

    def _parts_missing(self, pair: Pair) -> None:
        for number in pair.partials.expire(self._listener.now):
            assert isinstance(number, int)
            text = f"parts of the request did not come within {self._settings.partial_s:g} s"
            self._listener.refuse(pair, number, Reason.BAD_REQUEST, text)
        self._wait_for_parts(pair.number, pair.partials)
