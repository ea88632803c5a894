# SPDX-License-Identifier: Apache-2.0
"""A prefiller of ``transferd demo kv``: computes prompts in chunks, pushes layer by layer."""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import transferd
from transferd import kv
from transferd.client.demo.kvengine import (
    CHUNK,
    CONFIG,
    GROUP,
    TAIL_BYTES,
    Engine,
    Inbox,
    Prefixes,
    pages_for,
    table,
    tell,
)
from transferd.client.demo.kvrank import run
from transferd.kv.router import Engine as Member
from transferd.kv.router.policy import PREFILLER

if TYPE_CHECKING:
    from transferd.kv.router import Load

IDLE_S = 0.05


@dataclass(slots=True)
class Prompt:
    """A request on its way.

    Attributes:
        tokens: Of the prompt.
        done: How many of them are in the cache.
        pages: Its pages.
    """

    tokens: list[int]
    done: int = 0
    pages: list[int] = field(default_factory=list)


class PrefillEngine(Engine):
    """The engine: prompts take turns, a chunk each."""

    def __init__(self, client: transferd.Client, name: str) -> None:
        """Takes the memory; decoders may present themselves."""
        super().__init__(client)
        self.rank = kv.Prefiller(client, self.cache, name)
        self._prefixes = Prefixes(self.pages)
        self._waiting: deque[tuple[str, Prompt]] = deque()
        self._running: deque[tuple[str, Prompt]] = deque()
        self._held: dict[str, list[int]] = {}

    @property
    def busy(self) -> bool:
        """Whether there is something to compute."""
        return bool(self._running)

    def load(self) -> Load:
        """Tells the router."""
        return self.rank.load(self.pages.free)

    def add(self, name: str, tokens: list[int]) -> None:
        """Takes a prompt."""
        self._waiting.append((name, Prompt(tokens)))

    def turn(self) -> None:
        """Frees what is released, begins what has room, computes one chunk."""
        for request_id, _ in self.rank.poll():
            self.pages.drop(self._held.pop(request_id.decode()))
        while self._waiting and self._begin(*self._waiting[0]):
            self._running.append(self._waiting.popleft())
        if self._running:
            self._chunk(*self._running.popleft())

    def _begin(self, name: str, prompt: Prompt) -> bool:
        reused = self._prefixes.find(prompt.tokens)
        need = pages_for(len(prompt.tokens)) - len(reused)
        while (fresh := self.pages.take(need)) is None:
            if not self._prefixes.forget():
                self.pages.drop(reused)
                return False
        prompt.pages = self._held[name] = reused + fresh
        prompt.done = len(reused) * CONFIG.page_tokens
        self.rank.begin(name.encode(), {GROUP: table(prompt.pages)}, len(prompt.tokens))
        tell("begun", id=name, reused=prompt.done)
        return True

    def _chunk(self, name: str, prompt: Prompt) -> None:
        first, last = prompt.done, min(prompt.done + CHUNK, len(prompt.tokens))
        times = [time.monotonic()]
        with self.rank.step({name.encode(): last}) as step:

            def layer_done(_: int) -> None:
                step.layer_done()
                times.append(time.monotonic())

            token = self.model.forward(
                prompt.tokens[first:last], first, table(prompt.pages), layer_done
            )
        prompt.done = last
        tell("chunk", id=name, first=first, last=last, times=times)
        if last < len(prompt.tokens):
            self._running.append((name, prompt))
            return
        self._prefixes.keep(prompt.tokens, prompt.pages)
        self.rank.finish(name.encode(), token.to_bytes(TAIL_BYTES, "little"))


def serve(engine: PrefillEngine) -> None:
    """Does what the driver asks for until it hangs up."""
    inbox = Inbox()
    while True:
        for command in inbox.take(0 if engine.busy else IDLE_S):
            if command["do"] == "end":
                return
            engine.add(command["id"], command["prompt"])
        engine.turn()


def describe(engine: PrefillEngine, name: str) -> Member:
    """Tells what the router is told of it."""
    rank, fingerprint = engine.rank, kv.fingerprint(engine.cache.layout).encode()
    return Member(name, PREFILLER, rank.boot, fingerprint, rank.address, CONFIG.page_tokens)


if __name__ == "__main__":
    sys.exit(run(PrefillEngine, describe, serve))
