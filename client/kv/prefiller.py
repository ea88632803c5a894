# SPDX-License-Identifier: Apache-2.0
"""A prefiller rank: pushes what its engine computes into the decoders that have asked for it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transferd.client import errors
from transferd.client.closing import Closing
from transferd.kv.address import Rank, pack, unpack_offer
from transferd.kv.fingerprint import check_alike
from transferd.kv.fingerprint import fingerprint as fingerprint_of
from transferd.kv.grants import TAILS
from transferd.kv.pages import Extent, PageTable, needed
from transferd.kv.planner import make_plan
from transferd.kv.protocol import actions as act
from transferd.kv.protocol.bounds import Settings
from transferd.kv.protocol.messages import Reason
from transferd.kv.protocol.prefiller import PrefillerCore
from transferd.kv.protocol.prefiller_pairs import RefusedError, Terms
from transferd.kv.pump import CLOSE_S, Kind, Pump
from transferd.kv.push import Armor, Pushes, Tail, Unit, Ways
from transferd.kv.router.policy import Load
from transferd.kv.step import Step, Watchers
from transferd.kv.tails import Tails

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transferd.client.client import Client
    from transferd.client.memory import RegionSlice
    from transferd.client.watcher import Watcher
    from transferd.kv.address import Offer
    from transferd.kv.cache import Cache
    from transferd.kv.plan import Delivery, Plan
    from transferd.kv.protocol.actions import Action, TransferKey
    from transferd.kv.protocol.messages import Hello, Request

OFFERS_KEPT = 64
JOB_S = 5.0  # a job may outlive its request's deadline by so much: the request's end cancels it


@dataclass(slots=True, eq=False)
class Prefill:
    """A request that the engine computes.

    Attributes:
        pages: Its block tables.
        tokens: Of the prompt, for the load; 0: not told.
        computed: Of them, with those of the last step.
        step: The last one that had a part of it.
        tail: Its tail, once it is finished.
    """

    pages: dict[str, PageTable]
    tokens: int = 0
    computed: int = 0
    step: Step | None = None
    tail: RegionSlice | None = None


@dataclass(slots=True, eq=False)
class _Pair:
    """A decoder rank.

    Attributes:
        offer: What it wants.
        plan: Of that.
        grants: Descriptors, by region.
    """

    offer: Offer
    plan: Plan
    hello: Hello
    grants: dict[str, bytes] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Transfer:
    """A transfer as this rank has it; of a request that does not fit, what is wrong with it."""

    request: Request
    delivery: Delivery | None
    wrong: str = ""


class Prefiller(Closing):
    """One rank of a prefiller. A context manager; usable from several threads.

    Attributes:
        boot: 16 random bytes of this life.
        address: Where decoders find it; ``kv.join`` makes one of those of several ranks.
    """

    def __init__(
        self,
        client: Client,
        cache: Cache,
        name: str = "prefiller",
        *,
        settings: Settings | None = None,
    ) -> None:
        """Begins: decoders may present themselves.

        Args:
            client: Of this process; by the daemon's Unix socket.
            cache: Of this rank.
            name: For people.
            settings: Times and limits of the protocol.

        Raises:
            InvalidRequest: A value is wrong.
            Conflict: NO_SHARED_MEMORY.
            QuotaExceeded: No room for the mailbox.
        """
        self._settings = settings or Settings()
        self._cache = cache
        self.boot = os.urandom(16)
        self._pump = pump = Pump(
            client, name, self._settings, Kind(self._turn, self._do, self._failed)
        )
        self._news = threading.Condition(pump.lock)
        self.address = pack([Rank(name, self.boot, pump.mailbox.descriptor, cache.layout)])
        self._core = pump.core = PrefillerCore(
            self.boot, self._judge, token=lambda: os.urandom(16), settings=self._settings
        )
        self._pushes = Pushes(pump, self._unit_over, armed_max=_armed_max(cache))
        self._watchers = Watchers(client)
        try:
            self._tails = Tails(client, cache.layout.tail_bytes)
        except BaseException:
            pump.shut()
            raise
        self._ranks = {layer: at for at, layer in enumerate(cache.layout.layers)}
        self._offers: dict[bytes, tuple[Offer, Plan]] = {}
        self._pairs: dict[int, _Pair] = {}
        self._prefills: dict[bytes, Prefill] = {}
        self._transfers: dict[TransferKey, _Transfer] = {}
        self._released: deque[tuple[bytes, str]] = deque()
        self._steps = 0
        self._draining = False
        self._drained = False
        self._closed = False
        pump.begin()

    # ---- what engines call ----

    def begin(self, request_id: bytes, pages: Mapping[str, Any], tokens: int = 0) -> None:
        """The engine begins to compute a request, or will.

        Args:
            request_id: As decoders ask for it.
            pages: For each group, the block table of the request: indices from token 0 on, or a
                :class:`PageTable`. :meth:`extend` gives more of them.
            tokens: Of the prompt, for :attr:`load`.

        Raises:
            InvalidRequest: A value is wrong.
            Conflict: PREFILL: there is one of that id.
            QuotaExceeded: PREFILLS.
        """
        tables = {name: _table(table) for name, table in pages.items()}
        with self._pump.lock:
            self._pump.check()
            made = self._core.prefill(time.monotonic(), request_id)
            self._prefills[request_id] = Prefill(tables, tokens)
            self._pump.feed(made)
        self._pump.kick()

    def extend(self, request_id: bytes, pages: Mapping[str, Any]) -> None:
        """Replaces block tables of a request by longer ones, before the step that fills them."""
        tables = {name: _table(table) for name, table in pages.items()}
        with self._pump.lock:
            self._known(request_id).pages.update(tables)

    def step(self, tokens: Mapping[bytes, int], *, device: bool = False) -> Step:
        """Begins a step of the engine: a forward pass over parts of some requests.

        What it computes is pushed layer by layer, as the step's watcher is counted up. A context
        manager: at its end all layers are computed; if it ends with an exception, what waits for
        layers is cancelled, and its requests are given up.

        Args:
            tokens: For each request, how many are computed when the step is done, from its
                beginning.
            device: Kernels count the watcher up, by ``step.watcher.cuda_bump(stream)`` after each
                layer, or in a captured graph; the step may end before they have run.

        Raises:
            NotFound: There is no such request, or it is released.
            InvalidRequest: Fewer tokens than before.
            QuotaExceeded: WATCHERS.
        """
        with self._pump.lock:
            self._pump.check()
            known = [(self._known(request_id), n) for request_id, n in tokens.items()]
            for prefill, n in known:
                if n < prefill.computed:
                    raise errors.InvalidRequest(
                        f"tokens only grow: {prefill.computed} were computed, now {n}"
                    )
            self._steps += 1
            step = self._watchers.step(self._steps, len(self._ranks), device, self, tuple(tokens))
            for (prefill, n), request_id in zip(known, tokens, strict=True):
                prefill.computed = n
                prefill.step = step
                self._pump.feed(self._core.computed(time.monotonic(), request_id, n))
        self._pump.kick()
        return step

    def watcher(self, *, device: bool = True) -> Watcher:
        """Gives the watcher of all steps of a kind, for a graph that is captured before the first.

        Raises:
            QuotaExceeded: WATCHERS.
        """
        with self._pump.lock:
            self._pump.check()
            return self._watchers.get(device)

    def finish(self, request_id: bytes, tail: bytes = b"") -> None:
        """The engine is through with a request; its pages are held until they are released.

        Args:
            request_id: Which.
            tail: What decoders get besides the pages: ``layout.tail_bytes`` bytes.

        Raises:
            NotFound: There is no such request, or it is released.
            InvalidRequest: TAIL: another number of bytes.
        """
        size = self._cache.layout.tail_bytes
        if len(tail) != size:
            raise errors.InvalidRequest(
                f"a tail has {size} bytes in this layout, not {len(tail)}", reason="TAIL"
            )
        with self._pump.lock:
            self._pump.check()
            prefill = self._known(request_id)
            if size and prefill.tail is None:
                prefill.tail = self._tails.put(tail)
            self._pump.feed(self._core.finished(time.monotonic(), request_id))
        self._pump.kick()

    def abort(self, request_id: bytes, detail: str = "") -> None:
        """The engine gives a request up; :meth:`released` tells when its pages are free."""
        self._pump.enter(lambda now: self._core.aborted(now, request_id, detail))

    def poll(self) -> list[tuple[bytes, str]]:
        """Takes the requests whose pages became free since the last call, and why. Never waits."""
        with self._pump.lock:
            found = list(self._released)
            self._released.clear()
            return found

    def released(self, timeout_s: float | None = None) -> list[tuple[bytes, str]]:
        """As :meth:`poll`, but waits until there is one, or the bound has passed."""
        with self._news:
            self._news.wait_for(lambda: self._released or self._pump.over, timeout_s)
            return self.poll()

    def drain(self, timeout_s: float | None = 0) -> bool:
        """Takes no new requests, and tells whether nothing is left of those that there were.

        Args:
            timeout_s: Waits so long for that; None: as long as it takes.
        """
        self._draining = True
        self._pump.enter(self._core.drain)
        with self._news:
            self._news.wait_for(lambda: self._drained or self._pump.over, timeout_s)
            return self._drained

    def load(self, free_pages: int = 1) -> Load:
        """Tells the router how much there is to do: tokens of requests whose length was told."""
        with self._pump.lock:
            waiting = sum(max(0, one.tokens - one.computed) for one in self._prefills.values())
        return Load(waiting, free_pages, self._draining)

    @property
    def pairs(self) -> int:
        """How many decoder ranks have presented themselves."""
        return len(self._pairs)

    def __len__(self) -> int:
        """Counts the requests whose pages are not free."""
        return len(self._prefills)

    @property
    def transfers(self) -> int:
        """How many transfers have not ended."""
        return len(self._transfers)

    @property
    def over(self) -> bool:
        """Whether it is closed, or its daemon gone: it takes no requests any more."""
        return self._pump.over

    @property
    def statistics(self) -> act.Statistics:
        """What was ignored of what came."""
        return self._core.statistics

    def close(self) -> None:
        """Gives all requests up, tells the decoders, leaves. Idempotent."""
        with self._pump.lock:
            if self._closed:
                return
            self._closed = True
            with contextlib.suppress(errors.TransferdError):
                self._pump.enter(self._core.drain)
                for request_id in list(self._prefills):
                    self._pump.enter(lambda now, r=request_id: self._core.aborted(now, r, "closed"))  # type: ignore[misc]
            self._news.wait_for(lambda: not self._prefills or self._pump.over, CLOSE_S)
        self._pump.shut()
        self._watchers.close()
        self._tails.close()

    def _known(self, request_id: bytes) -> Prefill:
        prefill = self._prefills.get(request_id)
        if prefill is None:
            raise errors.NotFound(f"there is no request {request_id!r}, or it is released")
        return prefill

    # ---- steps ----

    def step_failed(self, step: Step) -> None:
        """A step has ended without all of its layers: its requests are given up."""
        with self._pump.lock:
            if self._pump.over:
                return
            for request_id in step.requests:
                self._pump.enter(
                    lambda now, r=request_id: self._core.aborted(now, r, "a step has failed")  # type: ignore[misc]
                )

    # ---- decoders ----

    def _judge(self, hello: Hello) -> Terms:
        """Compares a decoder's Hello with our layout."""
        try:
            offer, _ = self._planned(hello.layout)
            if hello.fingerprint != fingerprint_of(offer.layout).encode():
                raise errors.InvalidRequest("the fingerprint is of another layout")
            if hello.stages > len(offer.steps):
                raise errors.InvalidRequest(
                    f"{len(offer.steps)} steps have {hello.stages} stages: at most one each"
                )
            named = {name for name, _ in hello.grants}
            missing = {*offer.layout.regions, *([TAILS] if offer.tail else [])} - named
            if missing:
                raise errors.InvalidRequest(f"no grant of region {min(missing)}")
        except (ArithmeticError, LookupError, ValueError) as error:  # whatever a peer makes of it
            raise RefusedError(Reason.FINGERPRINT, str(error)) from None
        return Terms(
            tuple(group.num_pages for group in offer.layout.groups),
            max(0, offer.tails_bytes - offer.layout.tail_bytes),
        )

    def _planned(self, data: bytes) -> tuple[Offer, Plan]:
        found = self._offers.get(data)
        if found is None:
            offer = unpack_offer(data)
            check_alike(self._cache.layout, offer.layout, ("at the prefiller", "at the decoder"))
            plan = make_plan(self._cache.layout, offer.layout, offer.wanted, offer.steps)
            found = offer, plan
            while len(self._offers) >= OFFERS_KEPT:
                del self._offers[next(iter(self._offers))]
            self._offers[data] = found
        return found

    # ---- the pump ----

    def _turn(self, now: float) -> None:
        del now
        self._pushes.turn()

    def _do(self, action: Action) -> None:
        match action:
            case act.Push():
                self._push(action)
            case act.Arrived():
                self._transfers[action.key] = self._arrived(action)
            case act.Over():
                self._transfers.pop(action.key, None)
            case act.Stop():
                self._pushes.stop(action.key)
            case act.Open():
                offer, plan = self._planned(action.hello.layout)
                pair = _Pair(offer, plan, action.hello, dict(action.hello.grants))
                self._pairs[action.pair] = pair
                self._pump.open_ahead(pair.grants.values())
            case act.Close():
                self._pairs.pop(action.pair, None)
            case act.Release():
                self._release(action)
            case act.Drained():
                self._drained = True
                self._news.notify_all()
            case _:
                raise AssertionError(f"a prefiller is not asked for {action}")

    def _arrived(self, action: act.Arrived) -> _Transfer:
        request, pair = action.request, self._pairs[action.key.pair]
        try:
            extent = Extent(request.end, request.first_token)
            entries = needed(pair.offer.layout, extent)
            tables = {
                name: PageTable(_indices(pages), entries[name].start)
                for name, pages in zip(entries, request.groups, strict=True)
            }
            return _Transfer(request, pair.plan.delivery(extent, tables))
        except errors.InvalidRequest as error:
            return _Transfer(request, None, str(error))

    def _push(self, action: act.Push) -> None:
        transfer = self._transfers[action.key]
        pair = self._pairs[action.key.pair]
        request = transfer.request
        delivery = transfer.delivery
        if delivery is None:
            wrong, key, unit = transfer.wrong, action.key, action.unit
            self._pump.post(lambda now: self._core.push_failed(now, key, unit, wrong, dead=False))
            return
        prefill = self._prefills[request.request_id]
        begin, end, pages = action.begin, action.end, prefill.pages
        tail = None
        if action.tail and pair.offer.tail and prefill.tail is not None:
            tail = Tail(prefill.tail, pair.grants[TAILS], request.tail_offset)
        self._pushes.add(
            Unit(
                key=action.key,
                number=action.unit,
                ways=Ways(
                    self._cache.regions,
                    pair.grants,
                    request.imm,
                    pair.hello.stages,
                    pair.offer.steps,
                    request.deadline_ms / 1000 + JOB_S,
                ),
                begin=lambda: delivery.sending(begin, end, pages),
                tail=tail,
                armor=self._armor(prefill),
            )
        )

    def _armor(self, prefill: Prefill) -> Armor | None:
        """Tells what a push of a prefill has to wait for; None: all is computed."""
        step = prefill.step
        if step is None or step.computed:
            return None
        return Armor(step.number, step.watcher, step.base, self._ranks)

    def _unit_over(self, unit: Unit) -> None:
        core, key, number = self._core, unit.key, unit.number
        if unit.failed:
            text, dead = unit.failed, unit.dead
            self._pump.post(lambda now: core.push_failed(now, key, number, text, dead=dead))
        else:
            self._pump.post(lambda now: core.pushed(now, key, number))

    def _release(self, action: act.Release) -> None:
        prefill = self._prefills.pop(action.request_id)
        if prefill.tail is not None:
            self._tails.give_back(prefill.tail)
        self._released.append((action.request_id, action.why))
        self._news.notify_all()

    def _failed(self, error: errors.TransferdError) -> None:
        """The session is over: nothing reads our pages any more."""
        for request_id in self._prefills:
            self._released.append((request_id, str(error)))
        self._prefills.clear()
        self._news.notify_all()


def _armed_max(cache: Cache) -> int | None:
    """Tells how many armed jobs the streams of a GPU take; None: there is none."""
    if not cache.device:
        return None
    from transferd.client.cuda import lanes

    return lanes.ARMED_LANES_MAX * lanes.ARMED_COPIES_MAX


def _table(table: Any) -> PageTable:
    return table if isinstance(table, PageTable) else PageTable(table)


def _indices(pages: bytes) -> Any:
    import numpy as np

    return np.frombuffer(pages, dtype="<u4")
