# SPDX-License-Identifier: Apache-2.0
"""Ranks of the simulated world (kvworld.py), with their caches, engines, jobs and daemons."""

from __future__ import annotations

import dataclasses
from array import array
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from transferd.kv.protocol import actions as act
from transferd.kv.protocol.actions import Outcome, TransferKey
from transferd.kv.protocol.decoder import DecoderCore
from transferd.kv.protocol.decoder_pairs import Identity
from transferd.kv.protocol.decoder_tables import PairState
from transferd.kv.protocol.decoder_transfer import Wanted
from transferd.kv.protocol.messages import Reason, pages_of
from transferd.kv.protocol.prefiller import PrefillerCore
from transferd.kv.protocol.prefiller_pairs import RefusedError, Terms

if TYPE_CHECKING:
    from collections.abc import Callable

    from transferd.kv.protocol.messages import Hello, Request

    from support.kvworld import World

PAGES = 40  # of a decoder's cache; a token a page
SPARE_PAGES = 2100  # of a second group that nobody writes: makes a request two letters long
STAGES = 2
WIDTH = STAGES + 1
BLOCKS = 5
IMMS = range(100, 100 + BLOCKS * WIDTH)
OP_S = 0.5  # longest call of a daemon
DEADLINE_S = 8.0
FINGERPRINT = b"one model"


@dataclass(eq=False)
class Job:
    """Writes of one push. Each is (stage, token); the tail is (STAGES, 0).

    Attributes:
        left: Those that have not landed.
        landed: Those that have, by stage.
        over: It lands nothing any more.
        ghost: Its client is dead.
    """

    owner: SimPrefiller
    key: TransferKey
    unit: int
    grant: Grant
    request: Request
    left: list[tuple[int, int]]
    landed: dict[int, int] = field(default_factory=dict)
    over: bool = False
    ghost: bool = False

    def imms(self) -> set[int]:
        return set(range(self.request.imm, self.request.imm + WIDTH))


@dataclass(eq=False)
class Grant:
    """A grant of a decoder to a prefiller."""

    owner: SimDecoder
    pair: int
    epoch: int
    number: int
    jobs: dict[Job, None] = field(default_factory=dict)  # a set has no order
    revoked: bool = False
    opener: SimPrefiller | None = None


@dataclass
class Counter:
    """As native/core/counter.c has it, in whole writes."""

    total: int = 0
    value: int = 0
    faults: int = 0
    acknowledged: int = 0

    def add(self, count: int) -> None:
        self.total += count
        self.value = max(self.value, self.total)


class Node:
    """A process with a core and a mailbox.

    Attributes:
        offset: Of its clock.
        thaws: It does nothing before that time.
        patience: How long it was frozen, how far its clock was set: bounds are longer by it.
    """

    core: Any

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = f"{name}{next(world.names)}"
        self.mailbox = self.name.encode()
        world.mailboxes[self.mailbox] = self
        self.alive = True
        self.offset = world.rng.uniform(0.0, 1e6)
        self.thaws = 0.0
        self.patience = 0.0
        self._tick = 0

    def __repr__(self) -> str:
        return self.name

    @property
    def frozen(self) -> bool:
        return self.world.now < self.thaws

    def clock(self) -> float:
        return self.world.now + self.offset

    def feed(self, call: Callable[[], list[act.Action]]) -> None:
        """Has the core take an event, now or when the process runs again."""
        if not self.alive:
            return
        if self.frozen:
            self.world.at(self.thaws - self.world.now, lambda: self.feed(call))
            return
        for action in call():
            self.do(action)
        self.arm()

    def arm(self) -> None:
        """Sees to it that the core is called when something is due."""
        due = self.core.due()
        self._tick += 1
        if due is None:
            return
        mine = self._tick

        def tick() -> None:
            if self._tick == mine:
                self.feed(lambda: self.core.tick(self.clock()))

        self.world.at(max(0.0, due - self.clock()) + 1e-6, tick)

    def receive(self, letter: bytes) -> None:
        self.feed(lambda: self.core.receive(self.clock(), letter))

    def undelivered(self, key: act.SendKey, *, dead: bool) -> None:
        self.feed(lambda: self.core.undelivered(self.clock(), key, dead=dead))

    def freeze(self, seconds: float) -> None:
        self.thaws = self.world.now + seconds
        self.patience += seconds

    def step_clock(self, seconds: float) -> None:
        self.offset += seconds
        self.patience += abs(seconds)
        self.arm()

    def do(self, action: act.Action) -> None:
        raise NotImplementedError


@dataclass
class Live:
    """A transfer as its decoder's caller sees it."""

    number: int
    imm: int
    pages: list[int]
    tokens: int
    first: int
    parts: int
    until: float
    patience: float
    landed: set[tuple[SimPrefiller, int, int]] = field(default_factory=set)


class SimDecoder(Node):
    """A decoder rank: its cache, grants and counters."""

    def __init__(self, world: World) -> None:
        super().__init__(world, "decoder")
        identity = Identity(
            decoder=world.token(),
            mailbox=self.mailbox,
            imms=IMMS,
            stages=STAGES,
            fingerprint=FINGERPRINT,
            layout=world.rng.randbytes(20_000),
        )
        self.core: DecoderCore = DecoderCore(
            identity, (PAGES, SPARE_PAGES), token=world.token, settings=world.settings
        )
        self.owners: list[int | None] = [None] * PAGES
        self.counters = {imm: Counter() for imm in IMMS}
        self.grants: dict[tuple[int, int], Grant] = {}
        self.names: dict[int, SimPrefiller] = {}
        self.live: dict[int, Live] = {}
        self.outcomes: dict[int, Outcome] = {}
        self.deaf = 0

    def meet(self, prefiller: SimPrefiller) -> None:
        def add() -> list[act.Action]:
            made = self.core.add(self.clock(), prefiller.name, prefiller.mailbox)
            assert isinstance(made[0], act.MakeGrants)
            self.names[made[0].pair] = prefiller
            return made

        self.feed(add)

    def pair_of(self, prefiller: SimPrefiller) -> int | None:
        for number, state in self.core.pairs().items():
            taking = state in (PairState.GRANTING, PairState.GREETING, PairState.READY)
            if self.names[number] is prefiller and taking:
                return number
        return None

    def request(
        self,
        request_id: bytes,
        prefillers: list[SimPrefiller],
        tokens: int,
        *,
        first: int = 0,
        readers: int = 1,
        long: bool = False,
    ) -> int | None:
        """Starts a transfer; None: no pages, no immediates, no pair."""
        pairs = [self.pair_of(prefiller) for prefiller in prefillers]
        free = [page for page, owner in enumerate(self.owners) if owner is None]
        if None in pairs or len(free) < tokens + 1 or not self.core.free_blocks or self.frozen:
            return None
        pages = self.world.rng.sample(free, tokens + 1)  # the last one is for the tail
        spare = array("I", range(SPARE_PAGES)).tobytes() if long else b""
        wanted = Wanted(
            request_id=request_id,
            tokens=tokens,
            first_token=first,
            groups=(array("I", pages).tobytes(), spare),
            counts=[tokens * len(pairs)] * STAGES + [len(pairs)],
            deadline_s=DEADLINE_S,
            readers=readers,
        )
        chosen = [pair for pair in pairs if pair is not None]
        made = self.core.start(self.clock(), chosen, wanted)
        started = made[0]
        assert isinstance(started, act.Started)
        taken = range(started.imm, started.imm + WIDTH)
        for live in self.live.values():
            assert not set(taken) & set(range(live.imm, live.imm + WIDTH)), "an immediate is shared"
        number = started.transfer
        for page in pages:
            self.owners[page] = number
        settings = self.world.settings
        bound = DEADLINE_S + settings.cancel_s + 3 * (len(pairs) + 1) * OP_S
        until = self.clock() + bound
        self.live[number] = Live(
            number, started.imm, pages, tokens, first, len(pairs), until, self.patience
        )
        for action in made:
            self.do(action)
        self.arm()
        return number

    def decline(self, request_id: bytes, prefillers: list[SimPrefiller], readers: int = 1) -> None:
        """Wants nothing of a request."""

        def decline(pair: int) -> list[act.Action]:
            return self.core.decline(self.clock(), pair, request_id, readers)

        for prefiller in prefillers:
            pair = self.pair_of(prefiller)
            if pair is not None:
                self.feed(partial(decline, pair))

    # ---- what the core asks for ----

    def do(self, action: act.Action) -> None:
        match action:
            case act.Send():
                self.world.send(self, action)
            case act.MakeGrants():
                self.world.soon(lambda: self._grant(action.pair, action.epoch), OP_S / 2)
            case act.Revoke():
                self.world.at(OP_S / 2, lambda: self._revoke(action.pair, action.epoch))
            case act.Acknowledge():
                counter = self.counters[action.imm]
                counter.acknowledged = counter.faults
            case act.Fence():
                self._fence(action)
            case act.Landed():
                live = self.live[action.transfer]
                assert len(self._wanted(live, action.stage)) == self._landed(live, action.stage)
            case act.Ended():
                self._ended(action)

    def _wanted(self, live: Live, stage: int) -> range:
        return range(live.parts * (1 if stage == STAGES else live.tokens))

    def _landed(self, live: Live, stage: int) -> int:
        return sum(1 for _, landed_stage, _ in live.landed if landed_stage == stage)

    def _grant(self, pair: int, epoch: int) -> None:
        if not self.alive:
            return
        grant = Grant(self, pair, epoch, next(self.world.names))
        self.grants[pair, epoch] = grant
        name = str(grant.number).encode()
        self.feed(lambda: self.core.granted(self.clock(), pair, epoch, (("cache", name),)))

    def _revoke(self, pair: int, epoch: int) -> None:
        """MakeGrants of this epoch was carried out before: it takes less long."""
        grant = self.grants.get((pair, epoch))
        if grant is not None:
            grant.revoked = True
            for job in list(grant.jobs):
                job.owner.job_over(job, "REVOKED", dead=True)
        self.feed(lambda: self.core.revoked(self.clock(), pair, epoch))

    def _fence(self, action: act.Fence) -> None:
        imms = set(range(action.imm, action.imm + WIDTH))
        before = [
            (pair, job)
            for pair in action.pairs
            for grant in self.grants.values()
            if grant.pair == pair
            for job in grant.jobs
            if job.imms() & imms
        ]
        fails = action.pairs and self.world.chance(self.world.weather.fence)

        def done() -> None:
            if not self.alive:
                return
            if fails:
                pair = action.pairs[0]
                call = self.core.fence_failed
                self.feed(lambda: call(self.clock(), action.transfer, pair, "STILL_COPIED"))
                return
            for _, job in before:
                if not job.over:
                    job.owner.job_over(job, "CANCELLED", dead=False)
            values = [self._level(imm) for imm in sorted(imms)]
            self.feed(lambda: self.core.fenced(self.clock(), action.transfer, values))

        self.world.soon(done, OP_S)

    def _level(self, imm: int) -> int:
        counter = self.counters[imm]
        counter.acknowledged = counter.faults
        counter.total = counter.value = counter.value + 1
        return counter.value

    def _ended(self, action: act.Ended) -> None:
        live = self.live.pop(action.transfer)
        held = self.patience - live.patience
        assert self.clock() <= live.until + held, f"{action} came too late"
        self.outcomes[action.transfer] = action.outcome
        self.world.outcomes.append(action.outcome)
        if action.outcome is Outcome.COMPLETE:
            for stage in range(WIDTH):
                assert len(self._wanted(live, stage)) == self._landed(live, stage)
        for page in live.pages:
            assert self.owners[page] == action.transfer
            self.owners[page] = None  # to be used again at once

    # ---- what lands ----

    def land(self, job: Job, stage: int, token: int) -> None:
        """A write of a job lands: bytes, and then a count."""
        request = job.request
        pages = pages_of(request.groups[0])
        page = pages[-1] if stage == STAGES else pages[token - request.first_token]
        owner = self.owners[page]
        assert owner == request.transfer, f"{job.owner} wrote into page {page} of {owner}"
        live = self.live[request.transfer]
        write = (job.owner, stage, token)
        assert write not in live.landed, f"{write} landed twice"
        live.landed.add(write)
        imm = request.imm + stage
        if self.deaf:  # completions are lost here: the writer takes them for landed
            self.deaf -= 1
            self.fault(set(IMMS))
            return
        self.counters[imm].add(1)
        self._look_at(imm)

    def fault(self, imms: set[int]) -> None:
        for imm in imms:
            self.counters[imm].faults += 1
            self._look_at(imm)

    def _look_at(self, imm: int) -> None:
        counter = self.counters[imm]
        then = counter.value if self.world.chance(0.3) else None  # read early, told late

        def look() -> None:
            if counter.faults > counter.acknowledged:
                self.feed(lambda: self.core.faulted(self.clock(), imm))
            self.feed(lambda: self.core.counted(self.clock(), imm, then or counter.value))

        self.world.soon(look)
        if then is not None:
            self.world.soon(lambda: self._look_at(imm) if then != counter.value else None, 0.02)

    def kill(self) -> None:
        self.alive = False
        for grant in self.grants.values():
            grant.revoked = True
            for job in list(grant.jobs):
                self.world.soon(lambda job=job: job.owner.job_over(job, "STALE", dead=True))  # type: ignore[misc]


class SimPrefiller(Node):
    """A prefiller rank: its engine and its jobs."""

    def __init__(self, world: World) -> None:
        super().__init__(world, "prefiller")
        self.core: PrefillerCore = PrefillerCore(
            world.token(), self._judge, token=world.token, settings=world.settings
        )
        self.hellos: dict[int, Hello] = {}
        self.requests: dict[TransferKey, Request] = {}
        self.jobs: dict[Job, None] = {}
        self.released: dict[bytes, str] = {}
        self.computing: dict[bytes, tuple[int, int]] = {}
        self.drained = False

    @staticmethod
    def _judge(hello: Hello) -> Terms:
        if hello.fingerprint != FINGERPRINT:
            raise RefusedError(Reason.FINGERPRINT, "model")
        return Terms((PAGES, SPARE_PAGES), 0)

    def grant_of(self, key: TransferKey) -> Grant:
        number = int(self.hellos[key.pair].grants[0][1])
        for decoder in self.world.decoders:
            for grant in decoder.grants.values():
                if grant.number == number:
                    return grant
        raise AssertionError(f"no grant {number}")

    # ---- the engine ----

    def compute(self, request_id: bytes, tokens: int, chunk: int) -> None:
        """Begins a prefill that goes on by itself."""

        def begin() -> list[act.Action]:
            if request_id in self.released or request_id in self.computing:
                return []
            self.computing[request_id] = (0, tokens)
            self.world.soon(lambda: self._compute_more(request_id, chunk), 0.5)
            return self.core.prefill(self.clock(), request_id)

        self.feed(begin)

    def _compute_more(self, request_id: bytes, chunk: int) -> None:
        def more() -> list[act.Action]:
            if request_id not in self.computing:
                return []
            done, tokens = self.computing[request_id]
            if done == tokens:
                return self.core.finished(self.clock(), request_id)
            done = min(tokens, done + chunk)
            self.computing[request_id] = (done, tokens)
            self.world.soon(lambda: self._compute_more(request_id, chunk), 0.5)
            return self.core.computed(self.clock(), request_id, done)

        self.feed(more)

    def abort(self, request_id: bytes) -> None:
        self.feed(lambda: self.core.aborted(self.clock(), request_id, "preempted"))

    # ---- what the core asks for ----

    def do(self, action: act.Action) -> None:
        match action:
            case act.Send():
                self.world.send(self, action)
            case act.Open():
                self.hellos[action.pair] = action.hello
                self.grant_of(TransferKey(action.pair, 0)).opener = self
            case act.Close():
                assert not [key for key in self.requests if key.pair == action.pair]
                del self.hellos[action.pair]
            case act.Arrived():
                self.requests[action.key] = action.request
            case act.Push():
                self._push(action)
            case act.Stop():
                self.world.soon(lambda: self._stop(action.key), OP_S / 2)
            case act.Over():
                mine = [job for job in self.jobs if not job.over and not job.ghost]
                assert not [job for job in mine if job.key == action.key]
                del self.requests[action.key]
            case act.Release():
                self._release(action)
            case act.Drained():
                self.drained = True

    def _release(self, action: act.Release) -> None:
        request_id = action.request_id
        mine = [job for job in self.jobs if not job.over and not job.ghost]
        reading = [job for job in mine if job.request.request_id == request_id]
        assert not reading, f"{reading} read pages that are released"
        self.released[request_id] = action.why
        del self.computing[request_id]

    def _push(self, action: act.Push) -> None:
        request = self.requests[action.key]
        computed, _ = self.computing[request.request_id]
        assert action.end <= computed
        left = [(s, t) for s in range(STAGES) for t in range(action.begin, action.end)]
        if action.tail:
            left.append((STAGES, 0))
        self.world.rng.shuffle(left)
        job = Job(self, action.key, action.unit, self.grant_of(action.key), request, left)
        self.jobs[job] = None
        job.grant.jobs[job] = None
        self._land_soon(job)

    def _land_soon(self, job: Job) -> None:
        def land() -> None:
            if job.over:
                return
            if job.grant.revoked:
                self.job_over(job, "REVOKED", dead=True)
                return
            if job.left:
                stage, token = job.left.pop()
                job.landed[stage] = job.landed.get(stage, 0) + 1
                job.grant.owner.land(job, stage, token)
                self._land_soon(job)
                return
            self.job_over(job, "", dead=False)

        self.world.soon(land, self.world.weather.pace)

    def _stop(self, key: TransferKey) -> None:
        for job in list(self.jobs):
            if job.key == key and not job.over and not job.ghost:
                if self.world.chance(self.world.weather.restless):
                    self._haunt(job)
                self.job_over(job, "CANCELLED", dead=False)

    def _haunt(self, job: Job) -> None:
        """What is left of a job lands without its client."""
        ghost = dataclasses.replace(job, landed={}, ghost=True)
        job.left = []
        self.jobs[ghost] = None
        ghost.grant.jobs[ghost] = None
        self._land_soon(ghost)

    def job_over(self, job: Job, failed: str, *, dead: bool) -> None:
        """A job ends: by itself, by a fence, by its owner, with its path."""
        if job.over:
            return
        job.over = True
        job.grant.jobs.pop(job, None)
        self.jobs.pop(job, None)
        decoder = job.grant.owner
        if failed and decoder.alive and not dead:
            told = failed == "CANCELLED" or self.world.chance(0.5)  # else its fate is unknown
            for stage, count in job.landed.items():
                decoder.counters[job.request.imm + stage].total -= count if told else 0
            decoder.fault(job.imms())
        if job.ghost:
            return
        if failed:
            call = self.core.push_failed
            end = lambda: call(self.clock(), job.key, job.unit, failed, dead=dead)  # noqa: E731
        else:
            end = lambda: self.core.pushed(self.clock(), job.key, job.unit)  # noqa: E731
        self.world.soon(lambda: self.feed(end))

    def kill(self) -> None:
        """Its daemon goes on with its jobs for a while; then it faults all that it could write."""
        self.alive = False
        for job in self.jobs:
            job.ghost = True

        def gone() -> None:
            for job in list(self.jobs):
                self.job_over(job, "PEER_LOST", dead=False)
            for decoder in self.world.decoders:
                for grant in decoder.grants.values():
                    if grant.opener is self and not grant.revoked and decoder.alive:
                        decoder.fault(set(IMMS))

        self.world.soon(gone, OP_S)
