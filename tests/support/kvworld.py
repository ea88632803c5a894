# SPDX-License-Identifier: Apache-2.0
"""A simulated world for the cores of transferd.kv: mailboxes, jobs, grants, counters, engines.

Time is simulated; everything random comes from one generator. What daemons promise is modelled as
they promise it: messages arrive once or not at all, in any order, and a sender may be told
PEER_LOST either way; a fence ends what was submitted before it and nothing else; a revoke ends all;
a counter's value is the highest that its sum has been; a client that dies faults every immediate of
its grants. What must hold is asserted where it could be broken: where a byte lands, where pages or
immediates are given back.
"""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transferd.kv.protocol.bounds import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from transferd.kv.protocol import actions as act
    from transferd.kv.protocol.actions import Outcome

    from support.kvnodes import Job, Node

from support.kvnodes import SimDecoder, SimPrefiller


@dataclass
class Weather:
    """How likely things go wrong, for each message or call.

    Attributes:
        lost: Not delivered, and told so.
        doubted: Delivered, and told PEER_LOST: the sender says it again.
        dropped: Not delivered, and told OK; no mailbox does that.
        slow: Takes up to two seconds.
        fence: A fence fails on a pair.
        restless: A job that is cancelled ends with PEER_LOST at its client, and lands on until its
            owner fences.
        pace: Longest time between two writes of a job, in seconds.
    """

    lost: float = 0.0
    doubted: float = 0.0
    dropped: float = 0.0
    slow: float = 0.0
    fence: float = 0.0
    restless: float = 0.0
    pace: float = 0.05


class World:
    """Everything, and the time."""

    def __init__(self, seed: int, weather: Weather | None = None) -> None:
        self.rng = random.Random(seed)
        self.weather = weather or Weather()
        self.now = 1000.0
        self.settings = Settings(lease_s=6.0, hello_timeout_s=12.0)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = itertools.count()
        self.names = itertools.count(1)
        self.decoders: list[SimDecoder] = []
        self.prefillers: list[SimPrefiller] = []
        self.mailboxes: dict[bytes, Node] = {}
        self.cuts: set[tuple[Node, Node]] = set()
        self.letters: list[tuple[bytes, bytes]] = []  # some that were sent, to be said again
        self.outcomes: list[Outcome] = []

    def token(self) -> bytes:
        return self.rng.randbytes(16)

    def at(self, delay: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (self.now + delay, next(self._serial), do))

    def soon(self, do: Callable[[], None], longest: float = 0.01) -> None:
        self.at(self.rng.uniform(0.0, longest), do)

    def chance(self, likely: float) -> bool:
        return self.rng.random() < likely

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self._heap and self._heap[0][0] <= until:
            when, _, do = heapq.heappop(self._heap)
            self.now = max(self.now, when)
            do()
        self.now = until

    # ---- messages ----

    def send(self, sender: Node, action: act.Send) -> None:
        for letter in action.letters:
            assert len(letter) <= 8192
            if len(self.letters) < 200:
                self.letters.append((action.mailbox, letter))
            else:
                self.letters[self.rng.randrange(200)] = (action.mailbox, letter)
            self._send_letter(sender, action, letter)

    def _send_letter(self, sender: Node, action: act.Send, letter: bytes) -> None:
        weather = self.weather
        receiver = self.mailboxes[action.mailbox]
        longest = 2.0 if self.chance(weather.slow) else 0.01
        luck = self.rng.random()

        def arrive() -> None:
            if not receiver.alive:
                self.soon(lambda: sender.undelivered(action.key, dead=True))
            elif (sender, receiver) in self.cuts or luck < weather.lost:
                self.at(0.5, lambda: sender.undelivered(action.key, dead=False))
            elif luck >= weather.lost + weather.dropped:
                receiver.receive(letter)
                if luck < weather.lost + weather.dropped + weather.doubted:
                    self.soon(lambda: sender.undelivered(action.key, dead=False), 1.0)

        self.soon(arrive, longest)

    # ---- nodes ----

    def add_decoder(self) -> SimDecoder:
        decoder = SimDecoder(self)
        self.decoders.append(decoder)
        for prefiller in self.prefillers:
            if prefiller.alive:
                decoder.meet(prefiller)
        return decoder

    def add_prefiller(self) -> SimPrefiller:
        prefiller = SimPrefiller(self)
        self.prefillers.append(prefiller)
        for decoder in self.decoders:
            if decoder.alive:
                decoder.meet(prefiller)
        return prefiller

    def jobs(self) -> list[Job]:
        return [job for prefiller in self.prefillers for job in prefiller.jobs if not job.over]
