# SPDX-License-Identifier: Apache-2.0
"""A decoder of ``transferd demo kv``: asks for pages, generates once they are here."""

from __future__ import annotations

import base64
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

import transferd
from transferd import kv
from transferd.client.demo.kvengine import (
    CONFIG,
    GROUP,
    Engine,
    Inbox,
    pages_for,
    table,
    tell,
)
from transferd.client.demo.kvrank import run
from transferd.kv.router import Engine as Member
from transferd.kv.router import Load
from transferd.kv.router.policy import DECODER

if TYPE_CHECKING:
    from numpy.typing import NDArray

IDLE_S = 0.005
SAMPLE_S = 0.01
SLOTS = 32
DEADLINE_S = 20.0
POISON = np.float32(np.nan)  # of pages that nothing has landed in


@dataclass(slots=True)
class Request:
    """A request on its way.

    Attributes:
        name: As the driver calls this attempt.
        length: Of its prompt.
        count: Tokens to generate.
        address: Of the prefiller.
        pages: With room for what is generated.
        tokens: Generated so far.
        samples: When how many pages, of all layers together, had landed.
    """

    name: str
    length: int
    count: int
    address: bytes
    pages: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    samples: list[tuple[float, int]] = field(default_factory=list)


class Landings:
    """Looks at the memory of transfers, and notes how many pages have landed.

    The last number of each page's keys and values is poisoned before the prefiller is asked: where
    it is a number, the page is here. Nothing but the pictures needs this: the decoder itself waits
    on its counters.
    """

    def __init__(self, rank: kv.Decoder, cache: NDArray[np.float32]) -> None:
        """Starts the thread that looks."""
        self._rank = rank
        self._cache = cache
        self._watched: dict[str, Request] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="landings", daemon=True)
        self._thread.start()

    def add(self, request: Request) -> None:
        """Poisons a request's pages, and watches them from now on."""
        self._cache[:, :, request.pages] = POISON
        with self._lock:
            self._watched[request.name] = request

    def remove(self, request: Request) -> None:
        """Looks a last time."""
        with self._lock:
            if self._watched.pop(request.name, None) is not None:
                self._look(request)

    def close(self) -> None:
        """Ends the thread."""
        self._over.set()
        self._thread.join()
        self._cache = np.empty(0, dtype=np.float32)

    def _run(self) -> None:
        while not self._over.is_set():
            with self._rank.news:
                self._rank.news.wait(SAMPLE_S if self._watched else IDLE_S * 10)
            with self._lock:
                for request in self._watched.values():
                    self._look(request)

    def _look(self, request: Request) -> None:
        count = pages_for(request.length)
        last = np.full(count, CONFIG.page_tokens - 1)
        last[-1] = (request.length - 1) % CONFIG.page_tokens
        here = ~np.isnan(self._cache[:, :, request.pages[:count], last, -1, -1])
        pages = int(here.all(axis=1).sum())  # keys and values
        if not request.samples or request.samples[-1][1] != pages:
            request.samples.append((time.monotonic(), pages))


class DecodeEngine(Engine):
    """The engine: requests whose pages are here take turns, a token each."""

    def __init__(self, client: transferd.Client, name: str) -> None:
        """Takes the memory."""
        super().__init__(client)
        self.rank = kv.Decoder(client, self.cache, name, stages=CONFIG.layers, slots=SLOTS)
        self._landings = Landings(self.rank, self.model.cache)
        self._waiting: deque[Request] = deque()
        self._asked: dict[int, Request] = {}
        self._running: deque[Request] = deque()

    @property
    def busy(self) -> bool:
        """Whether there is something to compute."""
        return bool(self._running)

    def load(self) -> Load:
        """Tells the router."""
        return self.rank.load(len(self._waiting) + len(self._running), self.pages.free)

    def add(self, request: Request) -> None:
        """Takes a request."""
        self._waiting.append(request)

    def turn(self) -> None:
        """Asks for what there is room for, takes what has come, generates one token."""
        while self._waiting and self.rank.free_slots and self._ask(self._waiting[0]):
            self._waiting.popleft()
        for transfer in self.rank.poll():
            self._ended(self._asked.pop(transfer.number), transfer)
        if self._running:
            self._generate(self._running.popleft())

    def close(self) -> None:
        """See Engine."""
        self._landings.close()
        super().close()

    def _ask(self, request: Request) -> bool:
        pages = self.pages.take(pages_for(request.length + request.count))
        if pages is None:
            return False
        request.pages = pages
        self._landings.add(request)
        try:
            transfer = self.rank.request(
                request.name.encode(),
                request.address,
                {GROUP: table(pages)},
                request.length,
                deadline_s=DEADLINE_S,
            )
        except transferd.TransferdError as error:
            self._failed(request, error.reason, str(error))
            return True
        self._asked[transfer.number] = request
        return True

    def _ended(self, request: Request, transfer: kv.Transfer) -> None:
        if transfer.outcome is not kv.Outcome.COMPLETE:
            assert transfer.outcome is not None
            self._failed(request, transfer.outcome.name, transfer.detail)
            return
        self._landings.remove(request)
        tell("landed", id=request.name, samples=request.samples, at=time.monotonic())
        request.tokens.append(int.from_bytes(transfer.tail, "little"))
        self._running.append(request)

    def _failed(self, request: Request, why: str, detail: str) -> None:
        self._landings.remove(request)
        self.pages.drop(request.pages)
        tell(
            "failed",
            id=request.name,
            why=why,
            detail=detail,
            samples=request.samples,
            at=time.monotonic(),
        )

    def _generate(self, request: Request) -> None:
        if len(request.tokens) < request.count:
            position = request.length + len(request.tokens) - 1
            request.tokens.append(
                self.model.forward(request.tokens[-1:], position, table(request.pages))
            )
        if len(request.tokens) < request.count:
            self._running.append(request)
            return
        self.pages.drop(request.pages)
        tell("tokens", id=request.name, tokens=request.tokens, at=time.monotonic())


def serve(engine: DecodeEngine) -> None:
    """Does what the driver asks for until it hangs up."""
    inbox = Inbox()
    while True:
        for command in inbox.take(0 if engine.busy else IDLE_S):
            if command.pop("do") == "end":
                return
            engine.add(
                Request(
                    command["id"],
                    command["length"],
                    command["count"],
                    base64.b64decode(command["address"]),
                )
            )
        engine.turn()


def describe(engine: DecodeEngine, name: str) -> Member:
    """Tells what the router is told of it."""
    rank, fingerprint = engine.rank, kv.fingerprint(engine.cache.layout).encode()
    return Member(name, DECODER, rank.boot, fingerprint)


if __name__ == "__main__":
    sys.exit(run(DecodeEngine, describe, serve))
