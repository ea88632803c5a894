# SPDX-License-Identifier: Apache-2.0
"""Decoder and prefiller cores against each other, in a world where everything goes wrong.

``support/kvworld.py`` asserts where it could be broken: no byte lands in pages that are given back,
no write lands twice, counts are exact, no immediate has two transfers, no source is released while
it is read, each transfer ends within its bound. Here: nothing is left in the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from transferd.kv.protocol.actions import Outcome

from support.kvnodes import BLOCKS, PAGES, SimDecoder, SimPrefiller
from support.kvworld import Weather, World

if TYPE_CHECKING:
    from support.kvnodes import Node

EXAMPLES = 150
STEPS = 40
NODES = st.integers(0, 7)


def settle(world: World) -> None:
    """Lets good weather come, and everything end; then nothing must be left."""
    world.weather = Weather()
    world.cuts.clear()
    world.run(5.0)
    for prefiller in world.prefillers:
        for request_id in list(prefiller.computing):
            prefiller.abort(request_id)
    world.run(60.0)
    decoders = [decoder for decoder in world.decoders if decoder.alive]
    prefillers = [prefiller for prefiller in world.prefillers if prefiller.alive]
    assert world.jobs() == []
    for decoder in decoders:
        assert (len(decoder.core), decoder.core.free_blocks) == (0, BLOCKS)
        assert decoder.live == {}
        assert decoder.owners == [None] * PAGES
        for number in decoder.core.pairs():
            assert decoder.names[number].alive
            assert not decoder.names[number].drained
    for prefiller in prefillers:
        assert (len(prefiller.core), prefiller.core.prefills) == (0, 0)
        assert prefiller.core.partials() == 0
        assert (prefiller.requests, prefiller.core._waiting) == ({}, {})
    for decoder in decoders:
        decoder.feed(lambda decoder=decoder: decoder.core.close(decoder.clock()))  # type: ignore[misc]
    world.run(10.0)
    for decoder in decoders:
        assert (decoder.core.pairs(), decoder.core.due()) == ({}, None)
    for prefiller in prefillers:
        assert (prefiller.core.pairs(), prefiller.hellos) == ({}, {})
        assert prefiller.core.due() is None


class Transfers(RuleBasedStateMachine):
    """Everything that can happen, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(0)
        self.requests = 0

    @initialize(
        seed=st.integers(0, 2**32), decoders=st.integers(1, 2), prefillers=st.integers(1, 3)
    )
    def begin(self, seed: int, decoders: int, prefillers: int) -> None:
        self.world = World(seed)
        for _ in range(prefillers):
            self.world.add_prefiller()
        for _ in range(decoders):
            self.world.add_decoder()

    def decoder(self, i: int) -> SimDecoder:
        alive = [decoder for decoder in self.world.decoders if decoder.alive]
        return alive[i % len(alive)]

    def prefiller(self, i: int) -> SimPrefiller:
        alive = [prefiller for prefiller in self.world.prefillers if prefiller.alive]
        return alive[i % len(alive)]

    def node(self, i: int) -> Node:
        return self.decoder(i // 2) if i % 2 else self.prefiller(i // 2)

    @rule(
        lost=st.sampled_from([0.0, 0.0, 0.1, 0.5]),
        doubted=st.sampled_from([0.0, 0.2, 0.5]),
        dropped=st.sampled_from([0.0, 0.0, 0.05]),
        slow=st.sampled_from([0.0, 0.1, 0.5]),
        fence=st.sampled_from([0.0, 0.0, 0.3]),
        restless=st.sampled_from([0.0, 0.5]),
        pace=st.sampled_from([0.05, 0.05, 0.4]),
    )
    def weather(self, **likely: float) -> None:
        self.world.weather = Weather(**likely)

    @rule(
        count=st.integers(1, 6),
        decoders=st.sets(NODES, min_size=1, max_size=2),
        prefillers=st.sets(NODES, min_size=1, max_size=2),
        late=st.sampled_from([0.0, 0.01, 0.5, 0.5, 3.0, 20.0]),
        early=st.booleans(),
        seconds=st.sampled_from([0.0, 0.01, 0.1, 0.5, 2.0]),
    )
    def requests_come(
        self,
        count: int,
        decoders: set[int],
        prefillers: set[int],
        late: float,
        early: bool,
        seconds: float,
    ) -> None:
        askers = list(dict.fromkeys(self.decoder(i) for i in sorted(decoders)))
        asked = list(dict.fromkeys(self.prefiller(i) for i in sorted(prefillers)))
        for _ in range(count):
            self.requests += 1
            self.request(askers, asked, b"%d" % self.requests, late, early=early)
        self.world.run(seconds)

    def request(
        self,
        askers: list[SimDecoder],
        asked: list[SimPrefiller],
        request_id: bytes,
        late: float,
        *,
        early: bool,
    ) -> None:
        rng = self.world.rng
        tokens, first, chunk = rng.randint(1, 7), rng.randint(0, 3), rng.randint(1, 6)
        total = max(1, first + tokens - rng.choice([0] * 15 + [1]))
        begins = [lambda p=p: p.compute(request_id, total, chunk) for p in asked]
        for begin in begins:
            self.world.at(0.0 if early else late, begin)
        if early:
            self.world.run(late / 10)
        long = rng.random() < 0.2
        readers = len(askers)
        for decoder in askers:
            declines = rng.random()
            if declines < 0.2:  # also one that asks, which it should not
                decoder.decline(request_id, asked, readers)
            if declines > 0.1 and not decoder.request(
                request_id, asked, tokens, first=first, readers=readers, long=long
            ):
                decoder.decline(request_id, asked, readers)

    @rule(seconds=st.sampled_from([0.001, 0.01, 0.05, 0.2, 1.0, 4.0]))
    def run(self, seconds: float) -> None:
        self.world.run(seconds)

    @rule(i=NODES, which=st.integers(0, 10), seconds=st.sampled_from([0.0, 0.005, 0.1]))
    def cancel(self, i: int, which: int, seconds: float) -> None:
        decoder = self.decoder(i)
        if decoder.live:
            number = sorted(decoder.live)[which % len(decoder.live)]
            decoder.feed(lambda: decoder.core.cancel(decoder.clock(), number))
        self.world.run(seconds)

    @rule(i=NODES, which=st.integers(0, 10))
    def abort(self, i: int, which: int) -> None:
        prefiller = self.prefiller(i)
        if prefiller.computing:
            prefiller.abort(sorted(prefiller.computing)[which % len(prefiller.computing)])

    @precondition(lambda self: self.world.jobs())
    @rule(which=st.integers(0, 100))
    def break_a_job(self, which: int) -> None:
        jobs = sorted(self.world.jobs(), key=lambda job: (job.owner.name, job.key, job.unit))
        job = jobs[which % len(jobs)]
        job.owner.job_over(job, "PEER_LOST", dead=False)

    @rule(i=NODES, counts=st.integers(1, 3))
    def lose_counts(self, i: int, counts: int) -> None:
        self.decoder(i).deaf = counts

    @rule(what=st.sampled_from(["prefiller", "decoder", "drain", "remove"]), i=NODES, j=NODES)
    def leave(self, what: str, i: int, j: int) -> None:
        """One leaves, another comes in its place."""
        prefiller, decoder = self.prefiller(i), self.decoder(j)
        match what:
            case "prefiller":
                prefiller.kill()
                self.world.add_prefiller()
            case "drain":
                prefiller.feed(lambda: prefiller.core.drain(prefiller.clock()))
                self.world.add_prefiller()
            case "decoder":
                decoder.kill()
                self.world.add_decoder()
            case "remove" if (pair := decoder.pair_of(prefiller)) and not decoder.frozen:
                decoder.feed(lambda: decoder.core.remove(decoder.clock(), pair))
                decoder.meet(prefiller)

    @rule(i=NODES, j=NODES, how=st.sampled_from(["there", "back", "heal", "heal"]))
    def cut(self, i: int, j: int, how: str) -> None:
        ends: tuple[Node, Node] = (self.decoder(i), self.prefiller(j))
        match how:
            case "there":
                self.world.cuts.add(ends)
            case "back":
                self.world.cuts.add(ends[::-1])
            case "heal":
                self.world.cuts.clear()

    @rule(i=NODES, step=st.booleans(), seconds=st.sampled_from([-5.0, -0.5, 0.5, 2.0, 4.0, 20.0]))
    def time(self, i: int, step: bool, seconds: float) -> None:
        """A clock is set, or a process is stopped for a while."""
        if step:
            self.node(i).step_clock(seconds)
        else:
            self.node(i).freeze(abs(seconds))

    @precondition(lambda self: self.world.letters)
    @rule(which=st.integers(0, 200), at=st.integers(0, 8192), flip=st.integers(0, 255))
    def say_again(self, which: int, at: int, flip: int) -> None:
        """A letter of any age comes again, as it was or damaged."""
        mailbox, letter = self.world.letters[which % len(self.world.letters)]
        if flip > 200:
            letter = letter[: at % len(letter)]
        elif flip > 150:
            changed = bytearray(letter)
            changed[at % 18] ^= flip  # whom it is for
            letter = bytes(changed)
        self.world.mailboxes[mailbox].receive(letter)

    def teardown(self) -> None:
        settle(self.world)


@pytest.mark.long
def test_any_order_of_anything() -> None:
    run_state_machine_as_test(
        Transfers,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            phases=[Phase.explicit, Phase.generate],  # shrinking takes longer than a test may
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("seed", range(3))
def test_retries_make_up_for_bad_weather(seed: int) -> None:
    world = World(seed, Weather(lost=0.02, doubted=0.3, slow=0.02))
    prefillers = [world.add_prefiller() for _ in range(2)]
    decoder = world.add_decoder()
    for i in range(12):
        for prefiller in prefillers:
            prefiller.compute(b"%d" % i, 6, 2)
        assert decoder.request(b"%d" % i, prefillers, 6, long=i % 2 == 0)
        world.run(3.0)
    world.run(5.0)
    assert world.outcomes == [Outcome.COMPLETE] * 12
    settle(world)


@pytest.mark.parametrize("seed", range(3))
def test_cancelled_in_the_middle_and_pages_reused_at_once(seed: int) -> None:
    world = World(seed, Weather(doubted=0.2, slow=0.05, fence=0.3, restless=0.8, pace=0.2))
    prefillers = [world.add_prefiller() for _ in range(2)]
    decoder = world.add_decoder()
    world.run(2.0)
    for i in range(100):
        for prefiller in prefillers:
            prefiller.compute(b"%d" % i, 7, 3)
        number = decoder.request(b"%d" % i, prefillers, 7)
        world.run(world.rng.uniform(0.0, 1.5))
        if number is not None and i % 4:
            decoder.feed(lambda number=number: decoder.core.cancel(decoder.clock(), number))  # type: ignore[misc]
    world.run(10.0)
    assert world.outcomes.count(Outcome.CANCELLED) > 15
    assert world.outcomes.count(Outcome.COMPLETE) > 5
    settle(world)


def test_a_prefiller_that_dies_leaves_others_alone() -> None:
    world = World(0)
    dies, lives = world.add_prefiller(), world.add_prefiller()
    decoder = world.add_decoder()
    world.run(1.0)
    of_dies = decoder.request(b"a", [dies], 6)
    of_lives = decoder.request(b"b", [lives], 6)
    for prefiller, request_id in ((dies, b"a"), (lives, b"b")):
        prefiller.compute(request_id, 6, 1)
    world.run(0.5)
    dies.kill()  # and all immediates of the decoder are faulted
    world.run(5.0)
    assert decoder.outcomes == {of_dies: Outcome.LOST, of_lives: Outcome.COMPLETE}
    assert all(counter.faults for counter in decoder.counters.values())
    settle(world)


@pytest.mark.parametrize("back", [False, True])
def test_heartbeats_lost_in_one_way(back: bool) -> None:
    world = World(0)
    prefiller, decoder = world.add_prefiller(), world.add_decoder()
    world.run(1.0)
    number = decoder.request(b"a", [prefiller], 6)
    assert number is not None
    ends: tuple[Node, Node] = (decoder, prefiller)
    world.cuts.add(ends[::-1] if back else ends)
    begin = world.now
    while number in decoder.live:
        world.run(0.1)
    assert decoder.outcomes[number] is Outcome.LOST
    assert world.now - begin < world.settings.timeout_s + world.settings.heartbeat_s + 2
    world.run(world.settings.timeout_s)
    assert len(prefiller.core) == 0
    world.cuts.clear()
    world.run(world.settings.timeout_s + 1)
    again = decoder.request(b"b", [prefiller], 6)
    prefiller.compute(b"b", 6, 6)
    world.run(3.0)
    assert again is not None
    assert decoder.outcomes[again] is Outcome.COMPLETE
    settle(world)


@pytest.mark.parametrize("seed", range(3))
def test_all_complete_in_good_weather(seed: int) -> None:
    world = World(seed)
    prefillers = [world.add_prefiller() for _ in range(2)]
    decoders = [world.add_decoder() for _ in range(2)]
    for i in range(12):
        request_id = b"%d" % i
        for prefiller in prefillers:
            prefiller.compute(request_id, 6, 2)
        for decoder in decoders:
            assert decoder.request(request_id, prefillers, 6, readers=2)
        world.run(3.0)
    assert world.outcomes == [Outcome.COMPLETE] * 24
    for node in (*decoders, *prefillers):
        statistics = node.core.statistics
        assert (statistics.malformed, statistics.strangers, statistics.unexpected) == (0, 0, 0)
    settle(world)


@pytest.mark.parametrize("seed", [6, 7, 12])  # without a second try they fail
def test_what_is_declined_is_released_before_its_lease(seed: int) -> None:
    world = World(seed, Weather(lost=0.02, doubted=0.3, slow=0.02))
    prefiller = world.add_prefiller()
    decoders = [world.add_decoder() for _ in range(2)]
    for i in range(12):
        request_id = b"%d" % i
        world.at(world.rng.uniform(0.0, 1.0), lambda i=i: prefiller.compute(b"%d" % i, 6, 3))  # type: ignore[misc]
        reads = decoders[i % 2] if i % 3 else None
        for decoder in decoders:
            if decoder is reads:
                assert decoder.request(request_id, [prefiller], 6, readers=2)
            else:
                decoder.decline(request_id, [prefiller], 2)
        world.run(1.5)
    world.run(5.0)
    assert world.outcomes == [Outcome.COMPLETE] * 8
    assert prefiller.released == {b"%d" % i: "read" for i in range(12)}
    settle(world)
