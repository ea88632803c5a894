# SPDX-License-Identifier: Apache-2.0
"""A decoder rank: asks prefillers for pages, and knows by its counters when they are there."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from transferd.client import errors
from transferd.client.closing import Closing
from transferd.client.counter import acknowledge_soon
from transferd.kv.claims import claim, give_back
from transferd.kv.counts import Counts
from transferd.kv.fingerprint import fingerprint
from transferd.kv.grants import Grants
from transferd.kv.layout import refuse
from transferd.kv.pages import Extent, PageTable, needed, to_numbers
from transferd.kv.protocol import actions as act
from transferd.kv.protocol.actions import Outcome
from transferd.kv.protocol.bounds import Settings
from transferd.kv.protocol.decoder import DecoderCore
from transferd.kv.protocol.decoder_pairs import Identity
from transferd.kv.protocol.decoder_transfer import Wanted
from transferd.kv.pump import CLOSE_S, Kind, Pump
from transferd.kv.router.policy import Load
from transferd.kv.sources import Engine, find_engine
from transferd.kv.transfer import KvFailed, Transfer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transferd.client.client import Client
    from transferd.kv.cache import Cache
    from transferd.kv.layout import Layout
    from transferd.kv.protocol.actions import Action
    from transferd.kv.sources import Source

SLOTS_DEFAULT = 256
STAGES_DEFAULT = 8
ENGINES_MAX = 256  # whose plans are kept

__all__ = ["Decoder", "KvFailed", "Transfer"]


@dataclass(slots=True)
class _Pair:
    """A prefiller rank as the core has it."""

    number: int
    ready: bool = False
    over: str = ""


class Decoder(Closing):
    """One rank of a decoder. A context manager; usable from several threads.

    Attributes:
        news: Notified when layers have landed, transfers have ended, pairs are made or lost.
        boot: 16 random bytes of this life.
    """

    def __init__(
        self,
        client: Client,
        cache: Cache,
        name: str = "decoder",
        *,
        stages: int = STAGES_DEFAULT,
        slots: int = SLOTS_DEFAULT,
        first_imm: int = 0,
        layouts: Sequence[Layout] | None = None,
        rank: int = 0,
        steps: Sequence[Sequence[int]] | None = None,
        settings: Settings | None = None,
    ) -> None:
        """Begins; nothing is granted before a prefiller is known.

        Args:
            client: Of this process; by the daemon's Unix socket.
            cache: Of this rank.
            name: For people.
            stages: Parts of the layers that can be waited for one by one; fewer where there are
                fewer steps.
            slots: Transfers at once. Each takes ``stages`` + 1 counters of the session.
            first_imm: The first of ``slots`` * (``stages`` + 1) immediates, which are this
                decoder's alone.
            layouts: Of all ranks of this decoder, in their order; None: it is the only one.
            rank: Which of them this is.
            steps: Layers that are sent together; None: each alone.
            settings: Times and limits of the protocol.

        Raises:
            InvalidRequest: A value is wrong.
            Conflict: NO_SHARED_MEMORY. IMMS: another decoder of this Client has some of them.
            QuotaExceeded: COUNTERS: limits.counters of the daemon (and quotas.per_session_counters)
                has to be slots * (stages + 1) and more.
        """
        self._settings = settings or Settings()
        self._layouts = tuple(layouts) if layouts is not None else (cache.layout,)
        if not 0 <= rank < len(self._layouts) or self._layouts[rank] != cache.layout:
            refuse(f"layouts[{rank}] is this rank's, but the cache has another layout")
        self._rank = rank
        self._cache = cache
        self._steps = (
            tuple(tuple(step) for step in steps)
            if steps is not None
            else tuple((layer,) for layer in cache.layout.layers)
        )
        self._stages = max(1, min(stages, len(self._steps)))
        self.boot = os.urandom(16)
        imms = range(first_imm, first_imm + slots * (self._stages + 1))
        with contextlib.ExitStack() as undo:
            claim(client, imms)
            undo.callback(give_back, client, imms)
            self._pump = pump = Pump(
                client, name, self._settings, Kind(self._turn, self._do, self._failed)
            )
            undo.callback(pump.shut)
            self._open(client, imms, slots)
            undo.pop_all()
        pump.begin()

    def _open(self, client: Client, imms: range, slots: int) -> None:
        """Makes what takes room at the daemon."""
        pump, cache = self._pump, self._cache
        self.news = threading.Condition(pump.lock)
        tails = self._make_tails(client, slots)
        self._grants = Grants(pump, cache, tails, imms)
        self._counts = Counts(pump.session, imms)
        bases = self._grants.level(self._counts, imms.start, [0] * len(imms), [0] * len(imms))
        self._identity = Identity(
            decoder=self.boot,
            mailbox=pump.mailbox.descriptor,
            imms=imms,
            stages=self._stages,
            fingerprint=fingerprint(cache.layout).encode(),
        )
        self._core = pump.core = DecoderCore(
            self._identity,
            [group.num_pages for group in cache.layout.groups],
            token=lambda: os.urandom(16),
            settings=self._settings,
            bases=bases,
        )
        self._engines: dict[bytes, Engine] = {}
        self._pairs: dict[tuple[bytes, bytes], _Pair] = {}
        self._by_number: dict[int, _Pair] = {}
        self._transfers: dict[int, Transfer] = {}
        self._ended: deque[Transfer] = deque()
        self._closed = False

    def _make_tails(self, client: Client, slots: int) -> Any:
        size = self._cache.layout.tail_bytes
        self._tail_slots: deque[int] = deque()
        if not size:
            return None
        tails = self._cache.tails or client.alloc(size * slots, name="kv tails")
        self._tail_slots.extend(range(min(slots, tails.length // size)))
        return tails

    # ---- what engines call ----

    def connect(self, address: bytes, timeout_s: float | None = None) -> None:
        """Greets a prefiller ahead of the first request.

        Args:
            address: Of ``Prefiller.address``, or of ``kv.join``.
            timeout_s: Waits so long until it has answered; None: does not wait.

        Raises:
            InvalidRequest: ADDRESS, FINGERPRINT, LAYOUT: it does not fit; the message says in what.
            Conflict: It refuses; the message says why.
            WaitTimeout: It has not answered in time.
        """
        with self._pump.lock:
            engine = self._engine(address)
            pairs = self._connect(engine.sources)
            self._connect(engine.idle)
        self._pump.kick()
        if timeout_s is None:
            return
        end = time.monotonic() + timeout_s
        with self.news:
            while not all(pair.ready for pair in pairs):
                self._pump.check()
                over = next((pair.over for pair in pairs if pair.over), "")
                if over:
                    raise errors.Conflict(f"the prefiller does not take us: {over}", reason="PAIR")
                left = end - time.monotonic()
                if left <= 0:
                    raise errors.WaitTimeout(f"no answer of the prefiller within {timeout_s:g} s")
                self.news.wait(left)

    def request(
        self,
        request_id: bytes,
        address: bytes,
        pages: Mapping[str, Any],
        tokens: int,
        first_token: int = 0,
        deadline_s: float = 30.0,
    ) -> Transfer:
        """Asks a prefiller for the pages of a request. Does not wait.

        Args:
            request_id: As the prefiller's engine calls it; a new one for each attempt.
            address: Of the prefiller.
            pages: For each group, the block table of the request: indices from token 0 on, or a
                :class:`PageTable`. They are the transfer's until it has ended.
            tokens: Of the request, from its beginning, that are to be here in the end.
            first_token: Those before it are here already.
            deadline_s: All of it is here by then, or it ends as DEADLINE.

        Raises:
            InvalidRequest: A value is wrong; the message names it.
            Conflict: PAIR, DRAINING: the prefiller takes no requests.
            QuotaExceeded: IMMS: ``slots`` transfers are under way; PAIRS, WINDOW.
            Unavailable: The daemon, or this decoder, is gone.
        """
        extent = Extent(tokens, first_token)
        with self._pump.lock:
            self._pump.check()
            engine = self._engine(address)
            counts = engine.counts(extent, self._stages, self._cache.layout.tail_bytes > 0)
            groups = self._groups(extent, pages)
            if not self._core.free_blocks:
                raise errors.QuotaExceeded(
                    f"{len(self._transfers)} transfers are under way, as many as slots; wait for "
                    "one, or give this decoder more slots",
                    reason="IMMS",
                )
            if self._cache.layout.tail_bytes and not self._tail_slots:
                raise errors.QuotaExceeded(
                    "all slots of the region of tails are in use; wait for a transfer, or give the "
                    "cache a longer one",
                    reason="TAILS",
                )
            pairs = self._connect(engine.sources)
            idle = self._connect(engine.idle)
            slot = self._tail_slots[0] if self._tail_slots else 0
            wanted = Wanted(
                request_id=request_id,
                tokens=tokens - first_token,
                first_token=first_token,
                groups=groups,
                counts=counts,
                deadline_s=deadline_s,
                tail_offset=slot * self._cache.layout.tail_bytes,
            )
            numbers = [pair.number for pair in pairs]
            made = self._core.start(time.monotonic(), numbers, wanted)
            transfer = self._begin(made, request_id, slot, engine)
            self._pump.feed(made)
            self._decline(request_id, engine.idle, idle)
        self._pump.kick()
        return transfer

    def decline(self, request_id: bytes, address: bytes) -> None:
        """Tells a prefiller that this rank will not ask for a request; it may release its pages.

        Does not wait. A prefiller that is lost before it has heard of it keeps them for its
        ``lease_s``.

        Args:
            request_id: As the prefiller's engine calls it, which need not have begun it.
            address: Of the prefiller.

        Raises:
            InvalidRequest: A value is wrong; the message names it.
            QuotaExceeded: PAIRS.
            Unavailable: The daemon, or this decoder, is gone.
        """
        with self._pump.lock:
            self._pump.check()
            engine = self._engine(address)
            sources = engine.sources + engine.idle
            self._decline(request_id, sources, self._connect(sources))
        self._pump.kick()

    def poll(self) -> list[Transfer]:
        """Takes the transfers that have ended since the last call. Never waits."""
        with self._pump.lock:
            ended = list(self._ended)
            self._ended.clear()
            return ended

    def load(self, running: int = 0, free_pages: int = 1) -> Load:
        """Tells the router how much there is to do: requests that generate, or wait for pages."""
        return Load(running + len(self._transfers), free_pages)

    def __len__(self) -> int:
        """Counts the transfers under way."""
        return len(self._transfers)

    @property
    def free_slots(self) -> int:
        """How many more transfers can be begun now."""
        return self._core.free_blocks

    @property
    def over(self) -> bool:
        """Whether it is closed, or its daemon gone: it takes no transfers any more."""
        return self._pump.over

    @property
    def statistics(self) -> act.Statistics:
        """What was ignored of what came."""
        return self._core.statistics

    def close(self) -> None:
        """Cancels all transfers, takes all grants back, leaves. Idempotent."""
        with self._pump.lock:
            if self._closed:
                return
            self._closed = True
            with contextlib.suppress(errors.TransferdError):
                self._pump.enter(self._core.close)
            end = time.monotonic() + CLOSE_S
            while self._core.pairs() and time.monotonic() < end:
                try:
                    self._pump.check()
                except errors.TransferdError:
                    break
                self.news.wait(end - time.monotonic())
        self._pump.shut()
        self._grants.close()
        give_back(self._pump.client, self._counts.imms)

    # ---- prefillers ----

    def _engine(self, address: bytes) -> Engine:
        """Finds how a prefiller serves this rank."""
        self._pump.check()
        engine = self._engines.get(address)
        if engine is None:
            while len(self._engines) >= ENGINES_MAX:
                del self._engines[next(iter(self._engines))]
            engine = self._engines[address] = find_engine(
                address, self._layouts, self._rank, self._steps, self._grants.tails_bytes
            )
        return engine

    def _connect(self, sources: Sequence[Source]) -> list[_Pair]:
        """Finds the pairs with a prefiller's ranks, making those that are missing."""
        found = []
        for source in sources:
            key = (source.rank.boot, source.offer)
            pair = self._pairs.get(key)
            if pair is None:
                rank = source.rank
                made = self._core.add(
                    time.monotonic(),
                    f"{rank.name} {rank.boot.hex()[:8]}",
                    rank.mailbox,
                    source.offer,
                    source.readers,
                )
                first = made[0]
                assert isinstance(first, act.MakeGrants)
                pair = self._pairs[key] = self._by_number[first.pair] = _Pair(first.pair)
                self._pump.feed(made)
            found.append(pair)
        return found

    def _decline(self, request_id: bytes, sources: Sequence[Source], pairs: list[_Pair]) -> None:
        for source, pair in zip(sources, pairs, strict=True):
            self._pump.feed(
                self._core.decline(time.monotonic(), pair.number, request_id, source.readers)
            )

    # ---- transfers ----

    def _groups(self, extent: Extent, pages: Mapping[str, Any]) -> tuple[bytes, ...]:
        """Cuts the block tables to what is needed."""
        layout = self._cache.layout
        unknown = set(pages) - {group.name for group in layout.groups}
        if unknown:
            refuse(f"pages are of groups that the layout does not have: {sorted(unknown)}", "PAGES")
        groups = []
        for name, entries in needed(layout, extent).items():
            table = pages.get(name, ())
            first, numbers = (
                (table.first, table.numbers)
                if isinstance(table, PageTable)
                else (0, to_numbers(table))
            )
            if entries and (entries.start < first or entries.stop > first + len(numbers)):
                refuse(
                    f"pages of group {name} have entries {first} to "
                    f"{first + len(numbers) - 1}, needed are {entries.start} to {entries.stop - 1}",
                    "PAGES",
                )
            part = numbers[entries.start - first : entries.stop - first] if entries else ()
            groups.append(np.asarray(part, dtype="<u4").tobytes())
        return tuple(groups)

    def _begin(self, made: list[Action], request_id: bytes, slot: int, engine: Engine) -> Transfer:
        started = made[0]
        assert isinstance(started, act.Started)
        transfer = Transfer(self, request_id, slot)
        transfer.number = started.transfer
        transfer._imm = started.imm
        transfer._stages = engine.layers_by_stage(self._stages)
        if self._tail_slots:
            self._tail_slots.popleft()
        self._transfers[started.transfer] = transfer
        return transfer

    def _cancel(self, transfer: Transfer) -> None:
        with contextlib.suppress(errors.Unavailable):  # then it has ended
            self._pump.enter(lambda now: self._core.cancel(now, transfer.number))

    # ---- the pump ----

    def _turn(self, now: float) -> None:
        core, feed = self._core, self._pump.feed
        for imm, value in self._counts.look():
            feed(core.faulted(now, imm) if value is None else core.counted(now, imm, value))

    def _do(self, action: Action) -> None:
        match action:
            case act.Started():
                self._counts.watch(action.imm, action.targets)
            case act.Landed():
                self._landed(action)
            case act.Ended():
                self._over(action)
            case act.MakeGrants():
                self._grants.make(action.pair, action.epoch, self._core.granted)
            case act.Revoke():
                self._grants.revoke(action.pair, action.epoch, self._core.revoked)
            case act.Acknowledge():
                acknowledge_soon(self._pump.session, action.imm)
            case act.Fence():
                self._fence(action)
            case act.PairReady():
                self._by_number[action.pair].ready = True
                self.news.notify_all()
            case act.PairOver():
                self._pair_over(action)
            case act.PairGone():
                self._by_number.pop(action.pair, None)
                self.news.notify_all()
            case _:
                raise AssertionError(f"a decoder is not asked for {action}")

    def _pair_over(self, action: act.PairOver) -> None:
        pair = self._by_number[action.pair]
        pair.ready = False
        if not action.again:
            pair.over = f"{action.why.value}{f': {action.detail}' if action.detail else ''}"
            self._pairs = {key: one for key, one in self._pairs.items() if one is not pair}
        self.news.notify_all()

    def _landed(self, action: act.Landed) -> None:
        transfer = self._transfers.get(action.transfer)
        if transfer is None:
            return
        if self._cache.device:
            self._pump.session.landed()
        transfer._landed |= 1 << action.stage
        stages = transfer._stages
        here = 0
        while here < len(stages) and transfer._landed >> here & 1:
            here += 1
        transfer._layers = stages[here - 1] if here else 0
        self.news.notify_all()

    def _fence(self, action: act.Fence) -> None:
        core = self._core
        faults = self._counts.faults_seen(action.imm, len(action.bases))

        def done(values: Sequence[int], failed: int, detail: str) -> None:
            number = action.transfer
            if failed:
                self._pump.post(lambda now: core.fence_failed(now, number, failed, detail))
            else:
                self._pump.post(lambda now: core.fenced(now, number, values))

        self._counts.forget(action.imm, len(action.bases))
        self._grants.fence(action, self._counts, faults, done)

    def _over(self, action: act.Ended) -> None:
        transfer = self._transfers.pop(action.transfer)
        self._counts.forget(transfer._imm, self._stages + 1)
        size = self._cache.layout.tail_bytes
        if size:
            if action.outcome is Outcome.COMPLETE:
                first = transfer._tail_slot * size
                transfer.tail = bytes(self._grants.tails_view[first : first + size])
            self._tail_slots.append(transfer._tail_slot)
        transfer.detail = action.detail
        transfer.outcome = action.outcome
        self._ended.append(transfer)
        self.news.notify_all()

    def _failed(self, error: errors.TransferdError) -> None:
        """The session is over: so are all grants, and no byte lands any more."""
        for transfer in self._transfers.values():
            transfer.detail = str(error)
            transfer.outcome = Outcome.LOST
            self._ended.append(transfer)
        self._transfers.clear()
        self.news.notify_all()
