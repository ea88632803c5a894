# SPDX-License-Identifier: Apache-2.0
"""A prefiller without a model, in a process of its own; also that process.

    python -m bench.kv_prefiller SOCKET SHAPE     (SHAPE: CacheShape as JSON)

It tells of itself in a line of JSON, and answers each command, a line of JSON, with another.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import transferd
from bench.kv_caches import GROUP, BenchCache, CacheShape
from bench.kv_spans import Stopwatch
from bench.processes import anonymous_bytes
from bench.served import WAIT_S, ServedProcess, serve
from transferd.kv import Prefiller
from transferd.kv.plan import Plan
from transferd.kv.push import Pushes
from transferd.kv.router import Engine, Registration

if TYPE_CHECKING:
    from transferd.kv import Step


class PrefillerProcess(ServedProcess):
    """The process as the benchmark sees it.

    Attributes:
        address: Of the prefiller.
    """

    def __init__(self, socket: str, shape: CacheShape) -> None:
        """Starts it, and waits until it is there."""
        super().__init__("bench.kv_prefiller", socket, json.dumps(dataclasses.asdict(shape)))
        self.address = bytes.fromhex(self.about["address"])


class _Served:
    """The commands; each is a method."""

    def __init__(self, client: transferd.Client, shape: CacheShape) -> None:
        self._cache = BenchCache(client, shape, seed=1)
        self._rank = Prefiller(client, self._cache.cache, "bench prefiller")
        self._pages: dict[str, Any] = {}
        self._step: Step | None = None
        self._ids: list[str] = []
        self._stopwatch = Stopwatch()
        self._cpu = 0.0
        self._registration: Registration | None = None

    def about(self) -> dict[str, Any]:
        return {"address": self._rank.address.hex()}

    def begin(self, ids: list[str], tokens: int, seed: int, fill: bool) -> dict[str, Any]:
        """Takes the pages of requests; each has its own contents, from seed on."""
        wanted = len(ids) * self._cache.shape.request_pages(tokens)
        while len(self._cache.free) < wanted:
            found = self._rank.released(WAIT_S)
            if not found:
                raise RuntimeError(f"{len(self._pages)} requests still hold pages")
            self._collect(found)
        for number, name in enumerate(ids, seed):
            pages = self._pages[name] = self._cache.take(tokens)
            if fill:
                self._cache.fill(pages, number)
            self._rank.begin(name.encode(), {GROUP: pages}, tokens)
        return {}

    def step(self, ids: list[str], tokens: int, layers: int) -> dict[str, Any]:
        """Computes some layers of requests; ``rest`` computes the others."""
        self._ids = ids
        self._step = self._rank.step({name.encode(): tokens for name in ids})
        return self.more(layers)

    def more(self, layers: int) -> dict[str, Any]:
        """Computes some more layers in the step."""
        assert self._step is not None
        for _ in range(layers):
            self._step.layer_done()
        return {}

    def rest(self) -> dict[str, Any]:
        """Ends the step, and its requests that were not aborted."""
        assert self._step is not None
        with self._step:
            pass
        tail = bytes(self._cache.shape.tail_bytes)
        self._collect(self._rank.poll())
        for name in self._ids:
            if name in self._pages:
                self._rank.finish(name.encode(), tail)
        return {}

    def prefill(self, ids: list[str], tokens: int, seed: int, fill: bool = True) -> dict[str, Any]:
        """All of that at once."""
        self.begin(ids, tokens, seed, fill)
        self.step(ids, tokens, 0)
        return self.rest()

    def abort(self, name: str) -> dict[str, Any]:
        """Gives a request up; tells when."""
        now = time.monotonic()
        self._rank.abort(name.encode(), "aborted")
        return {"at": now}

    def register(self, router: str, name: str) -> dict[str, Any]:
        """Joins; tells when it began to."""
        shape = self._cache.shape
        now = time.monotonic()
        address = self._rank.address
        engine = Engine(name, "prefiller", self._rank.boot, b"bench", address, shape.page_tokens)
        self._registration = Registration(router, engine, self._rank.load)
        return {"at": now}

    def watch(self) -> dict[str, Any]:
        """Begins to time what prepares and what posts."""
        for owner, method in ((Plan, "delivery"), (Pushes, "_peek"), (Pushes, "_operation")):
            self._stopwatch.watch(owner, method, "prep")
        self._stopwatch.watch(transferd.Client, "submit", "post")
        return self.spans()

    def spans(self) -> dict[str, Any]:
        """Tells the seconds since the last call."""
        cpu = time.process_time()
        took, self._cpu = cpu - self._cpu, cpu
        return {"prep": 0.0, "post": 0.0, **self._stopwatch.take(), "cpu": took}

    def state(self) -> dict[str, Any]:
        """Tells what there is, and the resident memory."""
        self._collect(self._rank.poll())
        return {
            "transfers": self._rank.transfers,
            "prefills": len(self._rank),
            "memory": anonymous_bytes(os.getpid()),
        }

    def _collect(self, found: list[tuple[bytes, str]]) -> None:
        for name, _ in found:
            pages = self._pages.pop(name.decode())
            self._cache.free += pages.tolist()


def main() -> None:
    """Serves commands until stdin ends."""
    with transferd.Client(sys.argv[1]) as client:
        serve(_Served(client, CacheShape(**json.loads(sys.argv[2]))))


if __name__ == "__main__":
    main()
