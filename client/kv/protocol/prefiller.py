# SPDX-License-Identifier: Apache-2.0
"""The prefiller rank's half of the protocol. Sans-IO: events in, actions out.

Pairs live in :mod:`.prefiller_pairs`. A transfer finds its prefill by the request's id, whichever
of the two is there first. It pushes what is computed, in units of some tokens that each end once;
it has ended when no unit of it is under way, and only then is that said.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transferd.client.errors import Conflict, InvalidRequest, NotFound, QuotaExceeded
from transferd.kv.protocol import bounds, messages
from transferd.kv.protocol.actions import (
    Arrived,
    Drained,
    Kind,
    Over,
    Push,
    Release,
    Statistics,
    Stop,
    TransferKey,
)
from transferd.kv.protocol.bounds import Settings
from transferd.kv.protocol.declined import Declined
from transferd.kv.protocol.messages import (
    Ask,
    BadMessageError,
    Cancel,
    Cancelled,
    Decline,
    Failed,
    Pushed,
    Reason,
    Request,
)
from transferd.kv.protocol.prefiller_pairs import Done, Pairs
from transferd.kv.protocol.prefiller_tables import (
    PREFILL,
    TRANSFER,
    Event,
    PairState,
    PrefillEvent,
    PrefillState,
)
from transferd.kv.protocol.prefiller_transfer import Prefill, Transfer
from transferd.kv.protocol.timers import Timers

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from transferd.kv.protocol.actions import Action, SendKey
    from transferd.kv.protocol.messages import Message
    from transferd.kv.protocol.prefiller_pairs import Judge, Pair


class PrefillerCore:
    """The protocol of one prefiller rank.

    Time and events as for :class:`.decoder.DecoderCore`.

    Args:
        boot: 16 random bytes of this life.
        judge: Compares a decoder's Hello with this rank's layout; raises RefusedError, whatever
            is in it, and nothing else.
        token: Makes 16 random bytes.
        settings: Times and limits.

    Attributes:
        statistics: Counts of what was ignored.
    """

    def __init__(
        self,
        boot: bytes,
        judge: Judge,
        *,
        token: Callable[[], bytes],
        settings: Settings | None = None,
    ) -> None:
        if len(boot) != bounds.TOKEN_BYTES:
            raise InvalidRequest(f"boot has {bounds.TOKEN_BYTES} bytes, not {len(boot)}")
        self._settings = settings or Settings()
        self._now = float("-inf")
        self._out: list[Action] = []
        self._timers = Timers()
        self._transfers: dict[TransferKey, Transfer] = {}
        self._prefills: dict[bytes, Prefill] = {}
        self._waiting: dict[bytes, dict[TransferKey, Transfer]] = {}
        self._released: dict[bytes, Reason] = {}  # oldest first
        self._declined = Declined(self._settings.declined)
        self._draining = False
        self._drained = False
        self.statistics = Statistics()
        self._pairs = Pairs(boot, judge, self._settings, token, self._timers, self._out, self)

    # ---- what can be asked ----

    def __len__(self) -> int:
        """Counts the transfers that have not ended."""
        return len(self._transfers)

    @property
    def prefills(self) -> int:
        """How many prefills are not released."""
        return len(self._prefills)

    def pairs(self) -> dict[int, PairState]:
        """Tells the states of all pairs."""
        return {pair.number: pair.state for pair in self._pairs}

    def partials(self) -> int:
        """Counts the messages of which parts are missing."""
        return self._pairs.partials()

    def due(self) -> float | None:
        """Tells when :meth:`tick` has something to do; None: nothing is waited for."""
        return self._timers.next()

    def _enter(self, now: float) -> float:
        self._now = max(self._now, now)
        return self._now

    def _leave(self) -> list[Action]:
        if self._draining and not self._drained and not self._transfers and not self._prefills:
            self._drained = True
            self._out.append(Drained())
        actions = self._out.copy()
        self._out.clear()
        return actions

    # ---- mailbox ----

    def receive(self, now: float, data: bytes) -> list[Action]:
        """Takes a letter of the mailbox, whatever it is."""
        self._enter(now)
        self._pairs.receive(data)
        return self._leave()

    def undelivered(self, now: float, key: SendKey, *, dead: bool) -> list[Action]:
        """A message may not have arrived.

        Args:
            now: Monotonic time.
            key: Of its Send.
            dead: The mailbox is gone for good: its owner closed it, or has restarted.
        """
        self._enter(now)
        self._pairs.undelivered(key, dead=dead)
        return self._leave()

    def drain(self, now: float) -> list[Action]:
        """Takes no new requests; Drained says when nothing is left. Idempotent."""
        self._enter(now)
        if not self._draining:
            self._draining = True
            self._pairs.say_bye()
        return self._leave()

    # ---- the engine ----

    def prefill(self, now: float, request_id: bytes) -> list[Action]:
        """The engine begins to compute a request.

        Raises:
            InvalidRequest: The id is empty or too long.
            Conflict: PREFILL: there is one of that id.
            QuotaExceeded: PREFILLS.
        """
        self._enter(now)
        if not 1 <= len(request_id) <= bounds.REQUEST_ID_BYTES_MAX:
            raise InvalidRequest(
                f"request_id has 1 to {bounds.REQUEST_ID_BYTES_MAX} bytes, not {len(request_id)}"
            )
        if request_id in self._prefills:
            raise Conflict(f"there is a prefill {request_id!r} already", reason="PREFILL")
        if len(self._prefills) >= self._settings.prefills:
            raise QuotaExceeded(
                f"{len(self._prefills)} prefills are not released", reason="PREFILLS"
            )
        self._released.pop(request_id, None)
        prefill = Prefill(request_id, readers=self._declined.take(request_id))
        self._prefills[request_id] = prefill
        for transfer in self._waiting.pop(request_id, {}).values():
            self._attach(transfer, prefill)
        return self._leave()

    def _known(self, request_id: bytes) -> Prefill:
        prefill = self._prefills.get(request_id)
        if prefill is None:
            raise NotFound(f"there is no prefill {request_id!r}, or it is released")
        return prefill

    def computed(self, now: float, request_id: bytes, tokens: int) -> list[Action]:
        """The engine has computed tokens, or has started what computes them.

        Args:
            now: Monotonic time.
            request_id: Of which prefill.
            tokens: How many from the request's first one on; those that were told before included.

        Raises:
            NotFound: There is no such prefill.
            InvalidRequest: Fewer than before.
        """
        self._enter(now)
        prefill = self._known(request_id)
        if not prefill.computed <= tokens <= bounds.TOKENS_MAX:
            raise InvalidRequest(
                f"tokens only grow: {prefill.computed} were computed, now {tokens}; at most "
                f"{bounds.TOKENS_MAX}"
            )
        if PREFILL.step(prefill, PrefillEvent.COMPUTED):
            prefill.computed = tokens
            self._push_all(prefill)
        return self._leave()

    def finished(self, now: float, request_id: bytes) -> list[Action]:
        """The engine is through; the tail can be read.

        Raises:
            NotFound: There is no such prefill.
        """
        self._enter(now)
        prefill = self._known(request_id)
        if PREFILL.step(prefill, PrefillEvent.FINISHED):
            self._push_all(prefill)
            self._release_if_read(prefill)
        return self._leave()

    def aborted(self, now: float, request_id: bytes, detail: str) -> list[Action]:
        """The engine gives a prefill up; Release says when its pages are free. Idempotent."""
        self._enter(now)
        prefill = self._prefills.get(request_id)
        if prefill is not None and PREFILL.step(prefill, PrefillEvent.ABORTED):
            self._timers.cancel(("lease", request_id))
            for transfer in list(prefill.transfers.values()):
                self._stop(transfer, Reason.ABORTED, detail)
            self._release_if_read(prefill)
        return self._leave()

    def _push_all(self, prefill: Prefill) -> None:
        for transfer in list(prefill.transfers.values()):
            if TRANSFER.step(transfer, Event.MORE):
                self._push(transfer, prefill)

    def _push(self, transfer: Transfer, prefill: Prefill) -> None:
        """Pushes what is computed and not on its way."""
        request = transfer.request
        end = min(prefill.computed, request.end)
        tail = prefill.finished and not transfer.last
        if prefill.finished and prefill.computed < request.end:
            text = f"{prefill.computed} tokens were computed; {request.end} were wanted"
            self._stop(transfer, Reason.TOO_SHORT, text)
            return
        if end > transfer.done or tail:
            unit = transfer.next_unit
            transfer.next_unit += 1
            transfer.units.add(unit)
            begin = min(transfer.done, end)
            transfer.done = max(transfer.done, end)
            transfer.last = tail or transfer.last
            self._out.append(Push(transfer.key, unit, begin, end, tail))

    def _release_if_read(self, prefill: Prefill) -> None:
        """Releases a prefill that nobody reads; else sees to its lease."""
        if prefill.transfers:
            return
        if PREFILL.step(prefill, PrefillEvent.IDLE):
            self._release(prefill, Reason.ABORTED, "aborted")
        elif prefill.finished:
            if prefill.readers.through:
                PREFILL.step(prefill, PrefillEvent.READ)
                self._release(prefill, Reason.RELEASED, "read")
            else:
                due = self._now + self._settings.lease_s
                self._timers.set(("lease", prefill.request_id), due)

    def _release(self, prefill: Prefill, reason: Reason, why: str) -> None:
        self._timers.cancel(("lease", prefill.request_id))
        del self._prefills[prefill.request_id]
        if reason is Reason.ABORTED:  # it may be begun again
            for decoder in prefill.readers.read:
                self._declined.add(prefill.request_id, decoder, prefill.readers.wanted)
        self._released[prefill.request_id] = reason
        while len(self._released) > self._settings.released:
            del self._released[next(iter(self._released))]
        self._out.append(Release(prefill.request_id, why))

    # ---- pushes ----

    def pushed(self, now: float, key: TransferKey, unit: int) -> list[Action]:
        """All jobs of a push have ended well."""
        self._enter(now)
        transfer = self._unit_over(key, unit)
        if transfer is not None:
            self._end_if_idle(transfer)
        return self._leave()

    def push_failed(
        self, now: float, key: TransferKey, unit: int, detail: str, *, dead: bool
    ) -> list[Action]:
        """All jobs of a push have ended, and not all well.

        Args:
            now: Monotonic time.
            key: The transfer.
            unit: The push.
            detail: How, for people.
            dead: The grants are gone: revoked, or their owner has restarted.
        """
        self._enter(now)
        transfer = self._unit_over(key, unit)
        if transfer is not None:
            if dead:
                self._pairs.close(transfer.pair, f"its grants are gone: {detail}")
            else:
                self._stop(transfer, Reason.WRITE, detail)
            self._end_if_idle(transfer)
        return self._leave()

    def _unit_over(self, key: TransferKey, unit: int) -> Transfer | None:
        transfer = self._transfers.get(key)
        if transfer is None or unit not in transfer.units:
            return None
        transfer.units.remove(unit)
        return transfer

    def _stop(self, transfer: Transfer, end: Done | Reason, detail: str) -> None:
        """Begins the end of a transfer, unless it is ending."""
        if not TRANSFER.step(transfer, Event.STOP):
            return
        transfer.end = end
        transfer.detail = messages.clip(detail)
        self._timers.cancel(("deadline", transfer.key))
        if transfer.units:
            self._out.append(Stop(transfer.key))
        self._end_if_idle(transfer)

    def _end_if_idle(self, transfer: Transfer) -> None:
        if transfer.units:
            return
        if TRANSFER.step(transfer, Event.IDLE) or (
            transfer.last and TRANSFER.step(transfer, Event.WHOLE)
        ):
            self._end(transfer)

    def _end(self, transfer: Transfer) -> None:
        """A transfer has no job under way any more, and will have none."""
        pair, key = transfer.pair, transfer.key
        self._timers.cancel(("deadline", key))
        del self._transfers[key]
        pair.transfers.discard(key.transfer)
        self._out.append(Over(key, transfer.end.name))
        if transfer.asked:
            transfer.end = Done.CANCELLED
        self._remember(pair, key.transfer, transfer.end)
        if transfer.end is not Done.PUSHED:
            self._answer(pair, key.transfer, transfer.end, transfer.detail)
        self._detach(transfer)
        self._pairs.leave_if_empty(pair)

    def _detach(self, transfer: Transfer) -> None:
        request_id = transfer.request.request_id
        waiting = self._waiting.get(request_id)
        if waiting is not None and waiting.pop(transfer.key, None) is not None:
            if not waiting:
                del self._waiting[request_id]
            self._decline(transfer.pair, Decline(request_id, transfer.request.readers))
            return
        prefill = self._prefills.get(request_id)
        if prefill is not None and prefill.transfers.pop(transfer.key, None) is not None:
            prefill.readers.read.add(transfer.pair.hello.decoder)
            self._release_if_read(prefill)

    def _remember(self, pair: Pair, number: int, end: Done | Reason) -> None:
        if pair.state is PairState.OPEN and pair.low <= number < pair.low + bounds.WINDOW:
            pair.ended[number] = end

    def _answer(self, pair: Pair, number: int, end: Done | Reason, detail: str) -> None:
        message: Message
        if end is Done.PUSHED:
            message = Pushed(number)
        elif end is Done.CANCELLED:
            message = Cancelled(number)
        else:
            message = Failed(number, end, detail)
        self._pairs.send(pair, message, Kind.ANSWER, number)

    # ---- time ----

    def tick(self, now: float) -> list[Action]:
        """Does what is due."""
        for key in self._timers.due(self._enter(now)):
            assert isinstance(key, tuple)
            if not self._pairs.tick(key):
                self._due(*key)
        return self._leave()

    def _due(self, kind: Hashable, which: Hashable) -> None:
        if kind == "deadline" and isinstance(which, TransferKey):
            self._stop(self._transfers[which], Reason.DEADLINE, "the deadline has passed")
        elif kind == "lease" and isinstance(which, bytes):
            prefill = self._prefills[which]
            if PREFILL.step(prefill, PrefillEvent.LEASE):
                self._release(prefill, Reason.RELEASED, "lease")

    # ---- what the pairs tell (prefiller_pairs.Listener) ----

    @property
    def now(self) -> float:
        """Time of the event that runs."""
        return self._now

    @property
    def draining(self) -> bool:
        """No new pairs, no new requests."""
        return self._draining

    def take(self, pair: Pair, message: Message) -> bool:
        """Does what a message about a transfer says; False: it says nothing in this state."""
        match message:
            case Request():
                return self._request(pair, message)
            case Cancel():
                return self._cancel(pair, message.transfer)
            case Decline():
                self._decline(pair, message)
                return True
            case Ask() if message.transfer in pair.ended:
                self.resend(pair, message.transfer)
                return True
        return False

    def _request(self, pair: Pair, request: Request) -> bool:
        number = request.transfer
        pair.raise_low(request.low)
        live = self._transfers.get(TransferKey(pair.number, number))
        if live is not None:
            if live.request != request:
                self._stop(live, Reason.CONFLICT, "a second request of this number differs")
                return False
            return True
        if not pair.is_new(number):
            if pair.ended.get(number) is Done.CANCELLED:  # its Cancel may have overtaken it
                self._decline(pair, Decline(request.request_id, request.readers))
            return False
        refusal = self._refusal(pair, request)
        if refusal is not None:
            self.refuse(pair, number, *refusal)
            return False
        self._arrive(pair, request)
        return True

    def _refusal(self, pair: Pair, request: Request) -> tuple[Reason, str] | None:
        """Tells why a request is not taken; None: it is."""
        if self._draining:
            return Reason.DRAINING, "this prefiller leaves"
        if len(pair.transfers) >= self._settings.transfers:
            return Reason.BUSY, f"{len(pair.transfers)} transfers are under way"
        hello = pair.hello
        last = hello.imm_first + hello.imm_count - hello.stages - 1
        if not hello.imm_first <= request.imm <= last:
            text = f"imm is from {hello.imm_first} to {last}, not {request.imm}"
            return Reason.BAD_REQUEST, text
        if request.tail_offset > pair.terms.tail_offset_max:
            text = f"tail_offset is at most {pair.terms.tail_offset_max}, not {request.tail_offset}"
            return Reason.BAD_REQUEST, text
        try:
            messages.check_pages(request.groups, pair.terms.pages)
        except BadMessageError as error:
            return Reason.BAD_REQUEST, str(error)
        return self._prefill_refusal(pair, request.request_id)

    def _prefill_refusal(self, pair: Pair, request_id: bytes) -> tuple[Reason, str] | None:
        if request_id in self._released:
            return self._released[request_id], "its prefill is gone"
        prefill = self._prefills.get(request_id)
        if prefill is not None and prefill.state is PrefillState.ABORTED:
            return Reason.ABORTED, "its prefill is given up"
        others = prefill.transfers if prefill is not None else self._waiting.get(request_id, {})
        for key in others:
            if key.pair == pair.number:
                return Reason.DUPLICATE, f"transfer {key.transfer} is of the same request"
        return None

    def _arrive(self, pair: Pair, request: Request) -> None:
        key = TransferKey(pair.number, request.transfer)
        transfer = Transfer(key, pair, request, done=request.first_token)
        self._transfers[key] = transfer
        pair.transfers.add(key.transfer)
        self._timers.set(("deadline", key), self._now + request.deadline_ms / 1000)
        self._out.append(Arrived(key, request))
        prefill = self._prefills.get(request.request_id)
        if prefill is None:
            self._declined.discard(request.request_id, pair.hello.decoder)
            self._waiting.setdefault(request.request_id, {})[key] = transfer
        else:
            self._attach(transfer, prefill)

    def _attach(self, transfer: Transfer, prefill: Prefill) -> None:
        self._timers.cancel(("lease", prefill.request_id))
        prefill.transfers[transfer.key] = transfer
        readers = prefill.readers
        readers.wanted = max(readers.wanted, transfer.request.readers)
        readers.read.discard(transfer.pair.hello.decoder)
        TRANSFER.step(transfer, Event.PREFILL)
        self._push(transfer, prefill)

    def _decline(self, pair: Pair, decline: Decline) -> None:
        """Counts a decoder rank as one that has read."""
        prefill = self._prefills.get(decline.request_id)
        if prefill is None:
            if self._released.get(decline.request_id) is not Reason.RELEASED:
                self._declined.add(decline.request_id, pair.hello.decoder, decline.readers)
            return
        readers = prefill.readers
        readers.wanted = max(readers.wanted, decline.readers)
        readers.read.add(pair.hello.decoder)
        if readers.through:  # else its lease goes on
            self._release_if_read(prefill)

    def refuse(self, pair: Pair, number: int, reason: Reason, detail: str) -> None:
        """Ends a transfer that has not begun."""
        self._remember(pair, number, reason)
        self._answer(pair, number, reason, messages.clip(detail))

    def _cancel(self, pair: Pair, number: int) -> bool:
        transfer = self._transfers.get(TransferKey(pair.number, number))
        if transfer is not None:
            transfer.asked = True
            self._stop(transfer, Done.CANCELLED, "")
            return True
        if pair.is_new(number):  # its Request is still on its way, and comes too late
            pair.partials.drop(number)
            self._remember(pair, number, Done.CANCELLED)
        elif number not in pair.ended:
            return False
        self._answer(pair, number, Done.CANCELLED, "")
        return True

    def pair_over(self, pair: Pair) -> None:
        """Stops the transfers of a pair that is over."""
        for number in sorted(pair.transfers):
            transfer = self._transfers[TransferKey(pair.number, number)]
            self._stop(transfer, Done.CANCELLED, pair.why)

    def resend(self, pair: Pair, number: int) -> None:
        """Says again how a transfer has ended."""
        end = pair.ended.get(number)
        if end is not None:
            self._answer(pair, number, end, "")
