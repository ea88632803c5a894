# SPDX-License-Identifier: Apache-2.0
"""A decoder rank's pairs: greeting, liveness, and the revoke that ends an epoch.

Each epoch has grants and a token of its own: what is late from an earlier one names a token that
nobody knows any more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from transferd.client.errors import Conflict, InvalidRequest, QuotaExceeded
from transferd.kv.protocol import bounds, fragments, messages
from transferd.kv.protocol.actions import (
    Kind,
    MakeGrants,
    PairEnd,
    PairGone,
    PairOver,
    PairReady,
    Revoke,
    Send,
    SendKey,
)
from transferd.kv.protocol.decoder_tables import PAIR, PairEvent, PairState
from transferd.kv.protocol.messages import (
    BadMessageError,
    Bye,
    Cancelled,
    Decline,
    Failed,
    Hello,
    Ping,
    Pong,
    Pushed,
    Refused,
    Welcome,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from transferd.kv.protocol.actions import Action, Statistics
    from transferd.kv.protocol.bounds import Settings
    from transferd.kv.protocol.messages import Message
    from transferd.kv.protocol.timers import Timers

TAKING: Final = frozenset({PairState.GRANTING, PairState.GREETING, PairState.READY})
ALIVE: Final = frozenset({PairState.READY, PairState.DRAINING})


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a decoder rank is, as its Hello says it.

    Attributes:
        decoder: 16 random bytes of this life.
        mailbox: Descriptor of its mailbox.
        imms: Immediates of its grants.
        stages: Immediates of a transfer, without the tail's.
        fingerprint: What both sides have to agree on.
        layout: Its layout, where pairs have none of their own.
    """

    decoder: bytes
    mailbox: bytes
    imms: range
    stages: int
    fingerprint: bytes
    layout: bytes = b""

    def hello(
        self,
        epoch: int,
        token: bytes,
        grants: tuple[tuple[str, bytes], ...],
        timeout_s: float,
        layout: bytes = b"",
    ) -> Hello:
        """Makes the Hello of an epoch."""
        return Hello(
            decoder=self.decoder,
            epoch=epoch,
            token=token,
            mailbox=self.mailbox,
            grants=grants,
            imm_first=self.imms.start,
            imm_count=len(self.imms),
            stages=self.stages,
            fingerprint=self.fingerprint,
            layout=layout or self.layout,
            timeout_ms=math.ceil(timeout_s * 1000),
        )


@dataclass(slots=True, eq=False)
class Pair:
    """A prefiller rank.

    Attributes:
        layout: This decoder's layout and what it wants of this prefiller rank.
        readers: How many decoder ranks ask this prefiller rank for each request.
        epoch: Number of its present grants; none is used twice by this decoder.
        token: By which it addresses us in this epoch; empty: it must not.
        far_token: By which we address it; empty before its Welcome.
        boot: Its life.
        grants: Region and descriptor of each grant.
        transfers: Numbers of those that it has a part of.
        declines: To be said when it is made; oldest first, by the request's id.
        again: After the revoke it is greeted anew.
        until: When greeting is given up.
        wait_s: Until the next Hello.
        pings: When those were sent that may still be answered, by number.
        heard: When the newest Ping that was answered was sent: both ways worked since.
    """

    number: int
    name: str
    mailbox: bytes
    epoch: int
    state: PairState = PairState.GRANTING
    token: bytes = b""
    far_token: bytes = b""
    boot: bytes = b""
    grants: tuple[tuple[str, bytes], ...] = ()
    transfers: set[int] = field(default_factory=set)
    declines: dict[bytes, Decline] = field(default_factory=dict)
    layout: bytes = b""
    readers: int = 1
    again: bool = True
    until: float = 0.0
    wait_s: float = 0.0
    pings: dict[int, float] = field(default_factory=dict)
    ping: int = 0
    heard: float = 0.0

    @property
    def leaves(self) -> bool:
        """Whether it will be gone once its grants are revoked."""
        return self.state is PairState.REVOKING and not self.again


class Listener(Protocol):
    """The transfers, as pairs see them."""

    statistics: Statistics

    @property
    def now(self) -> float:
        """Time of the event that runs."""

    @property
    def low(self) -> int:
        """The lowest transfer that has not ended."""

    def pair_ready(self, pair: Pair) -> None:
        """Requests may go out."""

    def pair_over(self, pair: Pair, why: PairEnd) -> None:
        """It is lost; its grants are going to be revoked."""

    def pair_revoked(self, pair: Pair) -> None:
        """No byte can land by its grants."""

    def transfer_quiet(self, pair: Pair, number: int, failed: str | None) -> bool:
        """It writes nothing of a transfer any more; False: nobody waits for that."""

    def transfer_pushed(self, pair: Pair, number: int) -> bool:
        """It says that all of a transfer is acknowledged; False: nobody asked."""

    def resend(self, pair: Pair, kind: Kind, number: int) -> None:
        """Says again what may not have arrived."""


class Pairs:
    """All pairs of a decoder rank, by number and by token. Numbers are never used twice."""

    def __init__(
        self,
        identity: Identity,
        settings: Settings,
        token: Callable[[], bytes],
        timers: Timers,
        out: list[Action],
        listener: Listener,
    ) -> None:
        try:
            hello = identity.hello(1, token(), (("region", b"descriptor"),), settings.timeout_s)
            messages.decode(messages.encode(hello))
        except (BadMessageError, ValueError) as error:
            raise InvalidRequest(f"what a Hello would say is wrong: {error}") from None
        self._identity = identity
        self._settings = settings
        self._token = token
        self._timers = timers
        self._out = out
        self._listener = listener
        self._pairs: dict[int, Pair] = {}
        self._by_token: dict[bytes, Pair] = {}
        self._next = 1
        self._epoch = 0

    def _next_epoch(self) -> int:
        """Gives a number above all others: of two Hellos, a prefiller keeps the later one."""
        self._epoch += 1
        return self._epoch

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._pairs.values())

    def get(self, number: int) -> Pair | None:
        """Finds a pair that is not gone."""
        return self._pairs.get(number)

    def has_grants(self, number: int) -> bool:
        """Tells whether bytes can land by the grants of a pair."""
        pair = self._pairs.get(number)
        return pair is not None and pair.state in ALIVE

    # ---- beginning ----

    def add(self, name: str, mailbox: bytes, layout: bytes, readers: int) -> None:
        """Begins a pair.

        Raises:
            Conflict: PAIR: there is one of that name.
            QuotaExceeded: PAIRS.
            InvalidRequest: The mailbox is no descriptor.
        """
        if any(pair.name == name and not pair.leaves for pair in self._pairs.values()):
            raise Conflict(f"there is a pair {name!r} already; remove it first", reason="PAIR")
        if len(self._pairs) >= self._settings.pairs:
            raise QuotaExceeded(f"there are {len(self._pairs)} pairs; remove one", reason="PAIRS")
        if not 1 <= len(mailbox) <= bounds.DESCRIPTOR_BYTES_MAX:
            raise InvalidRequest(f"a mailbox's descriptor has no {len(mailbox)} bytes")
        pair = Pair(self._next, name, mailbox, self._next_epoch(), layout=layout, readers=readers)
        self._next += 1
        self._pairs[pair.number] = pair
        self._out.append(MakeGrants(pair.number, pair.epoch))

    def granted(
        self, now: float, number: int, epoch: int, grants: tuple[tuple[str, bytes], ...]
    ) -> None:
        """Grants are made; none: they could not be."""
        pair = self._pairs.get(number)
        if pair is None or pair.epoch != epoch or pair.state is not PairState.GRANTING:
            return
        if not grants:
            pair.again = False
            self.lose(number, PairEnd.GRANTS, "grants could not be made")
            return
        pair.grants = grants
        pair.token = self._token()
        try:
            messages.decode(messages.encode(self._hello(pair)))
            self._hello_letters(pair)
        except BadMessageError as error:
            pair.again = False
            self.lose(number, PairEnd.GRANTS, f"a Hello cannot say them: {error}")
            return
        PAIR.step(pair, PairEvent.GRANTED)
        self._by_token[pair.token] = pair
        pair.until = now + self._settings.hello_timeout_s
        pair.wait_s = self._settings.hello_s
        self._greet(pair)

    def _hello(self, pair: Pair) -> Hello:
        return self._identity.hello(
            pair.epoch, pair.token, pair.grants, self._settings.timeout_s, pair.layout
        )

    def _hello_letters(self, pair: Pair) -> tuple[bytes, ...]:
        data = messages.encode(self._hello(pair))
        return fragments.cut(data, sender=self._identity.decoder, number=pair.epoch)

    def _greet(self, pair: Pair) -> None:
        key = SendKey(pair.number, pair.epoch, Kind.HELLO, 0)
        self._out.append(Send(pair.mailbox, self._hello_letters(pair), key))
        self._timers.set(("hello", pair.number), self._listener.now + pair.wait_s)
        pair.wait_s = min(2 * pair.wait_s, self._settings.timeout_s)

    def send(
        self, pair: Pair, message: Message, kind: Kind = Kind.OTHER, transfer: int = 0
    ) -> None:
        """Sends a message to a prefiller that has said Welcome."""
        letters = fragments.cut(messages.encode(message), to=pair.far_token, number=transfer)
        key = SendKey(pair.number, pair.epoch, kind, transfer)
        self._out.append(Send(pair.mailbox, letters, key))

    def decline(self, number: int, decline: Decline) -> None:
        """Tells a prefiller that a request is not wanted, once it has said Welcome."""
        pair = self._pairs.get(number)
        if pair is None or pair.leaves:
            return
        if pair.state in ALIVE:
            self._say_decline(pair, decline)
            return
        pair.declines[decline.request_id] = decline
        if len(pair.declines) > self._settings.declined:
            del pair.declines[next(iter(pair.declines))]

    def _say_decline(self, pair: Pair, decline: Decline) -> None:
        letters = fragments.cut(messages.encode(decline), to=pair.far_token)
        key = SendKey(pair.number, pair.epoch, Kind.DECLINE, 0, decline)
        self._out.append(Send(pair.mailbox, letters, key))

    def _ping(self, pair: Pair) -> None:
        """Sends the next Ping, or takes the silence for what it is."""
        now = self._listener.now
        silent_at = pair.heard + self._settings.timeout_s
        if now >= silent_at:
            text = f"no answer for {now - pair.heard:.1f} s"
            self.lose(pair.number, PairEnd.SILENT, text)
            return
        pair.ping += 1
        pair.pings[pair.ping] = now
        self.send(pair, Ping(pair.ping, self._listener.low))
        due = min(now + self._settings.heartbeat_s, silent_at)
        self._timers.set(("ping", pair.number), due)

    # ---- ending ----

    def remove(self, number: int) -> None:
        """Ends a pair for good."""
        pair = self._pairs.get(number)
        if pair is None:
            return
        pair.again = False
        self.lose(number, PairEnd.REMOVED, "")

    def lose(
        self, number: int, why: PairEnd, detail: str, event: PairEvent = PairEvent.LOST
    ) -> None:
        """Ends an epoch: nothing is heard any more, grants are revoked, transfers end."""
        pair = self._pairs.get(number)
        if pair is None or not PAIR.allows(pair, event):
            return
        pair.again = pair.again and pair.state is not PairState.DRAINING
        if pair.far_token and (why in (PairEnd.REMOVED, PairEnd.DRAINED)):
            self.send(pair, Bye())
        PAIR.step(pair, event)
        self._by_token.pop(pair.token, None)
        pair.token = pair.far_token = pair.boot = b""
        pair.grants = ()
        pair.pings.clear()
        for kind in ("hello", "ping"):
            self._timers.cancel((kind, number))
        self._out.append(PairOver(number, why, detail, pair.again))
        self._out.append(Revoke(number, pair.epoch))
        self._listener.pair_over(pair, why)

    def revoked(self, number: int, epoch: int) -> None:
        """Grants of an epoch are revoked."""
        pair = self._pairs.get(number)
        if pair is None or pair.epoch != epoch:
            return
        if not PAIR.step(pair, PairEvent.REVOKED_AGAIN if pair.again else PairEvent.REVOKED):
            return
        self._listener.pair_revoked(pair)
        if pair.again:
            pair.epoch = self._next_epoch()
            self._out.append(MakeGrants(number, pair.epoch))
        else:
            del self._pairs[number]
            self._out.append(PairGone(number))

    def transfer_over(self, number: int, transfer: int) -> None:
        """A transfer has ended."""
        pair = self._pairs.get(number)
        if pair is not None:
            pair.transfers.discard(transfer)
            self._leave_if_empty(pair)

    def _leave_if_empty(self, pair: Pair) -> None:
        if not pair.transfers:
            self.lose(pair.number, PairEnd.DRAINED, "", PairEvent.EMPTY)

    # ---- messages ----

    def receive(self, now: float, data: bytes) -> None:
        """Takes a letter."""
        statistics = self._listener.statistics
        try:
            letter = fragments.read(data)
            pair = self._by_token.get(letter.to)
            if pair is None:
                statistics.strangers += 1
                return
            if letter.count > 1:
                raise BadMessageError("no answer has several parts")
            message = messages.decode(letter.payload)
        except BadMessageError:
            statistics.malformed += 1
            return
        if not self._take(now, pair, message):
            statistics.unexpected += 1

    def _take(self, now: float, pair: Pair, message: Message) -> bool:
        """Does what a message says; False: it says nothing in this state."""
        match message:
            case Welcome():
                return self._welcome(now, pair, message)
            case Refused() if pair.state is PairState.GREETING:
                pair.again = False
                detail = f"{message.reason.name}: {message.detail}"
                self.lose(pair.number, PairEnd.REFUSED, detail)
            case Pong() if message.number in pair.pings:
                self._pong(pair, message)
            case Bye():
                return self._bye(pair)
            case Cancelled() if pair.state in ALIVE:
                return self._listener.transfer_quiet(pair, message.transfer, None)
            case Failed() if pair.state in ALIVE:
                text = f"{message.reason.name}: {message.detail}"
                return self._listener.transfer_quiet(pair, message.transfer, text)
            case Pushed() if pair.state in ALIVE:
                return self._listener.transfer_pushed(pair, message.transfer)
            case _:
                return False
        return True

    def _welcome(self, now: float, pair: Pair, message: Welcome) -> bool:
        if PAIR.step(pair, PairEvent.WELCOME):
            pair.far_token = message.token
            pair.boot = message.boot
            pair.heard = now
            self._timers.cancel(("hello", pair.number))
            self._out.append(PairReady(pair.number))
            self._ping(pair)
            self._listener.pair_ready(pair)
            for decline in pair.declines.values():
                self._say_decline(pair, decline)
            pair.declines.clear()
            return True
        if (message.token, message.boot) != (pair.far_token, pair.boot):
            # It has made the pair anew out of a late Hello, and knows nothing of our transfers.
            self.lose(pair.number, PairEnd.RESTARTED, "it has made the pair anew")
        return True

    def _pong(self, pair: Pair, message: Pong) -> None:
        pair.heard = max(pair.heard, pair.pings[message.number])
        for number in [n for n in pair.pings if n <= message.number]:
            del pair.pings[number]
        if message.draining:
            self._bye(pair)

    def _bye(self, pair: Pair) -> bool:
        if pair.state is PairState.GREETING:
            pair.again = False
            self.lose(pair.number, PairEnd.DRAINED, "", PairEvent.BYE)
        elif PAIR.step(pair, PairEvent.BYE):
            self._leave_if_empty(pair)
        return True

    def undelivered(self, now: float, key: SendKey, *, dead: bool) -> None:
        """A message may not have arrived."""
        pair = self._pairs.get(key.pair)
        if pair is None or pair.epoch != key.epoch or pair.state is PairState.REVOKING:
            return
        if dead:
            pair.again = False
            self.lose(pair.number, PairEnd.DEAD, "its mailbox is gone")
        elif key.kind in (Kind.REQUEST, Kind.CANCEL, Kind.DECLINE):
            self._timers.set(("resend", *key), now + self._settings.retry_s)

    # ---- time ----

    def tick(self, key: tuple[Hashable, ...]) -> bool:
        """Does what is due of a pair; False: the key is a transfer's."""
        match key:
            case ("hello", int(number)):
                pair = self._pairs[number]
                if self._listener.now >= pair.until:
                    pair.again = False
                    self.lose(number, PairEnd.UNREACHABLE, "no answer to any Hello")
                else:
                    self._greet(pair)
            case ("ping", int(number)):
                self._ping(self._pairs[number])
            case ("resend", int(number), int(epoch), Kind() as kind, int(transfer), decline):
                found = self._pairs.get(number)
                if found is None or found.epoch != epoch or found.state not in ALIVE:
                    return True
                if isinstance(decline, Decline):
                    self._say_decline(found, decline)
                else:
                    self._listener.resend(found, kind, transfer)
            case _:
                return False
        return True
