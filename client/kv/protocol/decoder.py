# SPDX-License-Identifier: Apache-2.0
"""The decoder rank's half of the protocol. Sans-IO: events in, actions out.

Pairs live in :mod:`.decoder_pairs`. What a transfer waits for is known when it starts: each of its
immediates has a counter, and a target. An immediate is taken again, and pages are given back, when
all counters are at their targets, or after the fence.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from transferd.client.errors import Conflict, InvalidRequest, QuotaExceeded
from transferd.kv.protocol import bounds, messages
from transferd.kv.protocol.actions import (
    Acknowledge,
    Ended,
    Fence,
    Kind,
    Landed,
    Outcome,
    PairEnd,
    Started,
    Statistics,
)
from transferd.kv.protocol.bounds import Settings
from transferd.kv.protocol.decoder_pairs import ALIVE, TAKING, Identity, Pair, Pairs
from transferd.kv.protocol.decoder_tables import TRANSFER, Event, PairState, State
from transferd.kv.protocol.decoder_transfer import (
    PUSHED,
    QUIET,
    REVOKED,
    SENT,
    Transfer,
    Wanted,
)
from transferd.kv.protocol.messages import Ask, BadMessageError, Cancel, Decline, Request
from transferd.kv.protocol.timers import Timers

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from transferd.kv.protocol.actions import Action, SendKey


class DecoderCore:
    """The protocol of one decoder rank.

    All times are ``now``: seconds of one monotonic clock; one that goes back is taken for standing.
    Every method that is an event returns the actions that it leads to. :meth:`tick` has to be
    called when :meth:`due` says so; feed what mailboxes and counters have first.

    Args:
        identity: Who this is, as prefillers are told.
        pages: Pages that the cache has, of each group.
        token: Makes 16 random bytes.
        settings: Times and limits.
        bases: Values of the counters of all immediates, level; None: they are 0.

    Attributes:
        statistics: Counts of what was ignored.
    """

    def __init__(
        self,
        identity: Identity,
        pages: Sequence[int],
        *,
        token: Callable[[], bytes],
        settings: Settings | None = None,
        bases: Sequence[int] | None = None,
    ) -> None:
        self._settings = settings or Settings()
        self._width = identity.stages + 1
        self._first = identity.imms.start
        blocks = len(identity.imms) // self._width
        if not 1 <= identity.stages <= bounds.STAGES_MAX or not blocks:
            raise InvalidRequest(
                f"stages is from 1 to {bounds.STAGES_MAX}, and a transfer takes one immediate for "
                f"each and one for the tail: {len(identity.imms)} immediates do not do for "
                f"{identity.stages} stages"
            )
        self._pages = tuple(pages)
        self._now = float("-inf")
        self._out: list[Action] = []
        self._timers = Timers()
        self._bases = array("Q", bases or bytes(8 * blocks * self._width))
        self._free = deque(range(blocks))
        self._busy: list[Transfer | None] = [None] * blocks
        self._transfers: dict[int, Transfer] = {}  # ascending
        self._next = 1
        self._closing = False
        self.statistics = Statistics()
        self._pairs = Pairs(identity, self._settings, token, self._timers, self._out, self)

    # ---- what can be asked ----

    def __len__(self) -> int:
        """Counts the transfers that have not ended."""
        return len(self._transfers)

    @property
    def low(self) -> int:
        """The lowest transfer that has not ended."""
        return next(iter(self._transfers), self._next)

    @property
    def free_blocks(self) -> int:
        """How many more transfers can be started now."""
        return len(self._free)

    def pairs(self) -> dict[int, PairState]:
        """Tells the states of all pairs."""
        return {pair.number: pair.state for pair in self._pairs}

    def due(self) -> float | None:
        """Tells when :meth:`tick` has something to do; None: nothing is waited for."""
        return self._timers.next()

    def _enter(self, now: float) -> float:
        self._now = max(self._now, now)
        return self._now

    def _leave(self) -> list[Action]:
        actions = self._out.copy()
        self._out.clear()
        return actions

    # ---- pairs ----

    def add(
        self, now: float, name: str, mailbox: bytes, layout: bytes = b"", readers: int = 1
    ) -> list[Action]:
        """Begins a pair with a prefiller rank.

        Args:
            now: Monotonic time.
            name: For people, and to find it twice.
            mailbox: Descriptor of its mailbox.
            layout: This decoder's layout and what it wants of this rank; empty: the identity's.
            readers: How many decoder ranks ask this rank for each request, if more than
                :class:`.Wanted` says.

        Returns:
            First of all MakeGrants, with the pair's number.

        Raises:
            Conflict: There is a pair of that name (PAIR), or this decoder closes (CLOSING).
            QuotaExceeded: PAIRS.
        """
        self._enter(now)
        if self._closing:
            raise Conflict("this decoder closes and takes no new prefillers", reason="CLOSING")
        self._pairs.add(name, mailbox, layout, readers)
        return self._leave()

    def remove(self, now: float, pair: int) -> list[Action]:
        """Ends a pair for good; its transfers end as LOST. One that is unknown is gone already."""
        self._enter(now)
        self._pairs.remove(pair)
        return self._leave()

    def granted(
        self, now: float, pair: int, epoch: int, grants: tuple[tuple[str, bytes], ...]
    ) -> list[Action]:
        """Grants are made: region and descriptor of each. None: they could not be made."""
        self._pairs.granted(self._enter(now), pair, epoch, grants)
        return self._leave()

    def revoked(self, now: float, pair: int, epoch: int) -> list[Action]:
        """Grants are revoked: no byte can land by any of them."""
        self._enter(now)
        self._pairs.revoked(pair, epoch)
        return self._leave()

    def receive(self, now: float, data: bytes) -> list[Action]:
        """Takes a letter of the mailbox, whatever it is."""
        self._pairs.receive(self._enter(now), data)
        return self._leave()

    def undelivered(self, now: float, key: SendKey, *, dead: bool) -> list[Action]:
        """A message may not have arrived.

        Args:
            now: Monotonic time.
            key: Of its Send.
            dead: The mailbox is gone for good: its owner closed it, or has restarted.
        """
        self._pairs.undelivered(self._enter(now), key, dead=dead)
        return self._leave()

    def close(self, now: float) -> list[Action]:
        """Ends all transfers as CANCELLED, and all pairs; the last PairGone says it is done."""
        self._enter(now)
        self._closing = True
        for transfer in list(self._transfers.values()):
            self._end(transfer, Outcome.CANCELLED, "the decoder closes")
        for pair in list(self._pairs):
            self._pairs.remove(pair.number)
        return self._leave()

    # ---- transfers ----

    def start(self, now: float, pairs: Sequence[int], wanted: Wanted) -> list[Action]:
        """Begins a transfer.

        Args:
            now: Monotonic time.
            pairs: Prefiller ranks that have parts of it; they may still be greeted.
            wanted: What it is to bring.

        Returns:
            First of all Started, with its number.

        Raises:
            InvalidRequest: A value is wrong, a page out of range or listed twice.
            Conflict: PAIR: it is gone; DRAINING: it takes no requests.
            QuotaExceeded: IMMS: all are in use; WINDOW: one transfer lasts while too many came
                and went.
        """
        self._enter(now)
        chosen = self._chosen(pairs)
        request = self._request(wanted)
        if not self._free:
            raise QuotaExceeded(
                f"all {len(self._busy)} blocks of immediates are in use; wait for one",
                reason="IMMS",
            )
        transfer = self._begin(request, wanted.counts, chosen)
        for pair in chosen:
            pair.transfers.add(transfer.number)
            if pair.state is PairState.READY:
                self._ask_for(transfer, pair)
        self._timers.set(("deadline", transfer.number), self._now + wanted.deadline_s)
        return self._leave()

    def _chosen(self, pairs: Sequence[int]) -> list[Pair]:
        if not 1 <= len(pairs) <= bounds.PARTS_MAX or len(set(pairs)) != len(pairs):
            raise InvalidRequest(
                f"pairs are 1 to {bounds.PARTS_MAX} different numbers, not {list(pairs)!r}"
            )
        chosen = []
        for number in pairs:
            pair = self._pairs.get(number)
            if pair is None:
                raise Conflict(f"pair {number} is gone", reason="PAIR")
            if pair.state not in TAKING:
                raise Conflict(
                    f"pair {number} ({pair.name}) is {pair.state.value} and takes no requests",
                    reason="DRAINING" if pair.state is PairState.DRAINING else "PAIR",
                )
            chosen.append(pair)
        return chosen

    def _request(self, wanted: Wanted) -> Request:
        """Makes the request; without a free block with the immediate of none."""
        if self._next - self.low >= bounds.WINDOW:
            raise QuotaExceeded(
                f"transfer {self.low} has not ended while {bounds.WINDOW} began; wait for it",
                reason="WINDOW",
            )
        block = self._free[0] if self._free else 0
        imm = self._first + block * self._width
        return wanted.request(self._next, self.low, imm, self._width, self._pages)

    def _begin(self, request: Request, counts: Sequence[int], chosen: list[Pair]) -> Transfer:
        self._next += 1
        block = self._free.popleft()
        at = block * self._width
        bases = self._bases[at : at + self._width]
        transfer = Transfer(
            request=request,
            block=block,
            parts={pair.number: 0 for pair in chosen},
            targets=tuple(base + count for base, count in zip(bases, counts, strict=True)),
            left=self._width,
        )
        self._transfers[transfer.number] = transfer
        self._busy[block] = transfer
        self._out.append(Started(transfer.number, request.imm, transfer.targets))
        for stage, count in enumerate(counts):
            if not count:
                self._stage_is_here(transfer, stage)
        return transfer

    def _ask_for(self, transfer: Transfer, pair: Pair) -> None:
        """Sends the Request, for the first time or again."""
        transfer.parts[pair.number] |= SENT
        request = transfer.request
        if pair.readers > request.readers:
            request = replace(request, readers=pair.readers)
        self._pairs.send(pair, request, Kind.REQUEST, transfer.number)

    def decline(self, now: float, pair: int, request_id: bytes, readers: int = 1) -> list[Action]:
        """Tells a prefiller rank that a request of it is not wanted, and will not be.

        Args:
            now: Monotonic time.
            pair: Which; it may still be greeted. One that is unknown is gone already.
            request_id: By which it knows the prefill.
            readers: How many decoder ranks ask this prefiller rank for it, this one included.

        Raises:
            InvalidRequest: A value is wrong.
        """
        self._enter(now)
        decline = Decline(request_id, readers)
        try:
            messages.check_readers(decline)
        except BadMessageError as error:
            raise InvalidRequest(str(error)) from None
        self._pairs.decline(pair, decline)
        return self._leave()

    def cancel(self, now: float, transfer: int) -> list[Action]:
        """Takes a transfer back; Ended says when its pages are free. Idempotent."""
        self._enter(now)
        found = self._transfers.get(transfer)
        if found is not None:
            self._end(found, Outcome.CANCELLED, "")
        return self._leave()

    # ---- counters ----

    def counted(self, now: float, imm: int, value: int) -> list[Action]:
        """A counter has grown. Values that go back, or are nobody's, are ignored."""
        self._enter(now)
        block, stage = divmod(imm - self._first, self._width)
        transfer = self._busy[block] if 0 <= block < len(self._busy) else None
        if transfer is None or transfer.state is not State.ACTIVE:
            return self._leave()
        target = transfer.targets[stage]
        if value > target:
            self._end(
                transfer,
                Outcome.OVERRUN,
                f"immediate {imm}: {value - target} writes more than were asked for",
            )
        elif value == target and not transfer.landed >> stage & 1:
            self._stage_is_here(transfer, stage)
            if not transfer.left and TRANSFER.step(transfer, Event.WHOLE):
                self._forget(transfer, transfer.targets)
        return self._leave()

    def _stage_is_here(self, transfer: Transfer, stage: int) -> None:
        transfer.landed |= 1 << stage
        transfer.left -= 1
        self._out.append(Landed(transfer.number, stage))

    def faulted(self, now: float, imm: int) -> list[Action]:
        """A counter has a fault.

        It is no verdict: a prefiller that dies faults all immediates of its grants, also those of
        others. Its own failures a prefiller that lives tells by Failed, and one that is dead does
        not answer. What remains are counts that were lost here, which the prefillers are asked for.
        """
        self._enter(now)
        self._out.append(Acknowledge(imm))
        block = (imm - self._first) // self._width
        transfer = self._busy[block] if 0 <= block < len(self._busy) else None
        if transfer is not None and transfer.state is State.ACTIVE and not transfer.suspect:
            transfer.suspect = True
            self._inquire(transfer)
        return self._leave()

    def _inquire(self, transfer: Transfer) -> None:
        for number, flags in transfer.parts.items():
            pair = self._pairs.get(number)
            if pair is not None and pair.state in ALIVE and flags & (SENT | PUSHED) == SENT:
                self._pairs.send(pair, Ask(transfer.number), Kind.OTHER, transfer.number)
        self._timers.set(("ask", transfer.number), self._now + self._settings.heartbeat_s)

    # ---- the end of a transfer ----

    def _end(self, transfer: Transfer, outcome: Outcome, detail: str) -> None:
        """Stops a transfer, unless it is ending."""
        if not TRANSFER.step(transfer, Event.END):
            return
        transfer.outcome = outcome
        transfer.detail = messages.clip(detail)
        self._cancel_timers(transfer)
        for number, flags in transfer.parts.items():
            pair = self._pairs.get(number)
            if not flags & SENT or pair is None:
                transfer.parts[number] = flags | QUIET
                self._decline(transfer, pair)
            elif pair.state in ALIVE and not flags & QUIET:
                self._pairs.send(pair, Cancel(transfer.number), Kind.CANCEL, transfer.number)
        self._timers.set(("cancel", transfer.number), self._now + self._settings.cancel_s)
        self._fence_if_quiet(transfer)

    def _decline(self, transfer: Transfer, pair: Pair | None) -> None:
        """Has a prefiller that was never asked hear that it will not be."""
        if pair is not None:
            request = transfer.request
            readers = max(pair.readers, request.readers)
            self._pairs.decline(pair.number, Decline(request.request_id, readers))

    def _cancel_timers(self, transfer: Transfer) -> None:
        for kind in ("deadline", "ask", "grace", "cancel"):
            self._timers.cancel((kind, transfer.number))

    def _quiet(self, transfer: Transfer, pair: int) -> None:
        transfer.parts[pair] |= QUIET
        self._fence_if_quiet(transfer)

    def _fence_if_quiet(self, transfer: Transfer) -> None:
        if not all(flags & QUIET for flags in transfer.parts.values()):
            return
        if not TRANSFER.step(transfer, Event.QUIET):
            return
        self._timers.cancel(("cancel", transfer.number))
        at = transfer.block * self._width
        self._out.append(
            Fence(
                transfer=transfer.number,
                pairs=tuple(
                    number
                    for number, flags in transfer.parts.items()
                    if flags & (SENT | REVOKED) == SENT and self._pairs.has_grants(number)
                ),
                imm=transfer.request.imm,
                bases=tuple(self._bases[at : at + self._width]),
            )
        )

    def fenced(self, now: float, transfer: int, values: Sequence[int]) -> list[Action]:
        """The fence of a transfer is done.

        Args:
            now: Monotonic time.
            transfer: Which.
            values: Of its counters, level, from its first immediate on.

        Raises:
            InvalidRequest: They are not one for each, or one has gone back.
        """
        self._enter(now)
        found = self._transfers.get(transfer)
        if found is None or not TRANSFER.allows(found, Event.FENCED):
            return self._leave()
        at = found.block * self._width
        bases = self._bases[at : at + self._width]
        if len(values) != self._width or any(
            value < base for value, base in zip(values, bases, strict=True)
        ):
            raise InvalidRequest(
                f"values of the counters are {self._width} numbers not below {bases.tolist()}, "
                f"not {list(values)!r}"
            )
        TRANSFER.step(found, Event.FENCED)
        self._forget(found, values)
        return self._leave()

    def fence_failed(self, now: float, transfer: int, pair: int, detail: str) -> list[Action]:
        """The fence could not be done on the grants of a pair: they will be revoked instead."""
        self._enter(now)
        found = self._transfers.get(transfer)
        if found is None or pair not in found.parts or not TRANSFER.step(found, Event.UNFENCED):
            return self._leave()
        self._timers.set(("cancel", found.number), self._now + self._settings.cancel_s)
        if not found.parts[pair] & REVOKED and self._pairs.has_grants(pair):
            found.parts[pair] &= ~QUIET  # until they are revoked
            self._pairs.lose(pair, PairEnd.FENCE, detail)
        self._fence_if_quiet(found)
        return self._leave()

    def _forget(self, transfer: Transfer, values: Sequence[int]) -> None:
        """Gives immediates and pages back."""
        at = transfer.block * self._width
        self._bases[at : at + self._width] = array("Q", values)
        self._busy[transfer.block] = None
        self._free.append(transfer.block)
        self._cancel_timers(transfer)
        del self._transfers[transfer.number]
        self._out.append(Ended(transfer.number, transfer.outcome, transfer.detail))
        for number in transfer.parts:
            self._pairs.transfer_over(number, transfer.number)

    # ---- time ----

    def tick(self, now: float) -> list[Action]:
        """Does what is due."""
        for key in self._timers.due(self._enter(now)):
            assert isinstance(key, tuple)
            if self._pairs.tick(key):
                continue
            self._due(*key)
        return self._leave()

    def _due(self, kind: Hashable, number: int) -> None:
        transfer = self._transfers.get(number)
        if transfer is None:
            return
        if kind == "deadline":
            self._end(transfer, Outcome.DEADLINE, "")
        elif kind == "ask":
            self._inquire(transfer)
        elif kind == "grace":
            self._end(transfer, Outcome.FAULTED, "what was pushed has not been counted")
        elif TRANSFER.step(transfer, Event.LATE):
            for pair, flags in list(transfer.parts.items()):
                if not flags & QUIET:
                    self._pairs.lose(pair, PairEnd.CANCEL_LATE, f"transfer {number}")

    # ---- what the pairs tell (decoder_pairs.Listener) ----

    @property
    def now(self) -> float:
        """Time of the event that runs."""
        return self._now

    def pair_ready(self, pair: Pair) -> None:
        """Sends what has waited for the Welcome."""
        for number in sorted(pair.transfers):
            transfer = self._transfers[number]
            if transfer.state is State.ACTIVE:
                self._ask_for(transfer, pair)

    def pair_over(self, pair: Pair, why: PairEnd) -> None:
        """Ends the transfers of a pair that is lost."""
        for number in sorted(pair.transfers):
            self._end(self._transfers[number], Outcome.LOST, f"{pair.name}: {why.value}")

    def pair_revoked(self, pair: Pair) -> None:
        """No byte can land by the pair's grants."""
        for number in sorted(pair.transfers):
            self._transfers[number].parts[pair.number] |= REVOKED
            self._quiet(self._transfers[number], pair.number)

    def transfer_quiet(self, pair: Pair, number: int, failed: str | None) -> bool:
        """A prefiller writes nothing of a transfer any more; `failed`: because it ended it."""
        transfer = self._transfers.get(number)
        if transfer is None or pair.number not in transfer.parts:
            return False
        if failed is not None and transfer.state is State.ACTIVE:
            transfer.parts[pair.number] |= QUIET
            self._end(transfer, Outcome.FAILED, f"{pair.name}: {failed}")
            return True
        if transfer.state is not State.STOPPING:
            return False
        self._quiet(transfer, pair.number)
        return True

    def transfer_pushed(self, pair: Pair, number: int) -> bool:
        """A prefiller says that all of a transfer is acknowledged."""
        transfer = self._transfers.get(number)
        if transfer is None or pair.number not in transfer.parts or not transfer.suspect:
            return False
        transfer.parts[pair.number] |= PUSHED
        every = all(flags & PUSHED for flags in transfer.parts.values())
        key = ("grace", number)
        if every and transfer.state is State.ACTIVE and key not in self._timers:
            self._timers.set(key, self._now + self._settings.grace_s)
        return True

    def resend(self, pair: Pair, kind: Kind, number: int) -> None:
        """Says again what may not have arrived, if it still matters."""
        transfer = self._transfers.get(number)
        flags = transfer.parts.get(pair.number, 0) if transfer is not None else 0
        if transfer is None or not flags & SENT or flags & QUIET:
            return
        if kind is Kind.REQUEST and transfer.state is State.ACTIVE:
            self._ask_for(transfer, pair)
        elif kind is Kind.CANCEL and transfer.state is State.STOPPING:
            self._pairs.send(pair, Cancel(number), Kind.CANCEL, number)
