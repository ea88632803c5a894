# SPDX-License-Identifier: Apache-2.0
"""A worker of the initiator: a process with a session of its own, told what to do by its parent."""

from __future__ import annotations

import base64
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import transferd
from transferd.client.child import answer, commands
from transferd.client.ctl.bench.link import failed
from transferd.client.ctl.bench.pattern import Pattern
from transferd.client.ctl.bench.sweep import Settings, Step
from transferd.client.ctl.bench.work import Place, Work

if TYPE_CHECKING:
    from transferd import Client, Region


class Worker:
    """Its steps, one after the other."""

    def __init__(self, client: Client, index: int, settings: Settings) -> None:
        self._client = client
        self._index = index
        self._settings = settings
        self._region: Region | None = None
        self._work: Work | None = None
        self._pattern: Pattern | None = None
        self._step: Step | None = None

    def prepare(self, step: dict[str, Any], descriptor: str, base: int, imm: int) -> dict[str, Any]:
        """Registers memory, fills it, and opens the target's."""
        self._step = chosen = Step(**step)
        begun = time.monotonic_ns()
        self._region = region = self._client.alloc(chosen.length, name="bench")
        registered = time.monotonic_ns()
        place = Place(base64.b64decode(descriptor), base, imm)
        self._client.warm(place.descriptor)
        opened = time.monotonic_ns()
        seed = self._settings.seed
        self._pattern = Pattern(seed, chosen.number, self._index)
        self._work = Work(self._client, region, place, chosen, self._settings, seed)
        if chosen.operation != "read":
            self._work.fill(self._pattern)
        return {"register_ms": (registered - begun) / 1e6, "open_ms": (opened - registered) / 1e6}

    def warm_up(self) -> dict[str, Any]:
        """As :meth:`Work.warm_up`."""
        self._working.warm_up()
        return {}

    def latency(self) -> dict[str, Any]:
        """As :meth:`Work.latency`."""
        return self._working.latency()._asdict()

    def rate(self) -> dict[str, Any]:
        """As :meth:`Work.rate`."""
        batches, begun_ns, ended_ns = self._working.rate()
        return {"batches": batches, "begun_ns": begun_ns, "ended_ns": ended_ns}

    def finish(self) -> dict[str, Any]:
        """Tells what was done; compares what was read."""
        work, step = self._working, self._step
        assert step is not None
        length = work.touched * step.slot_bytes
        difference = None
        if step.operation == "read":
            assert self._region is not None
            assert self._pattern is not None
            difference = self._pattern.difference(self._region.view[:length])
        return {
            "batches": work.batches,
            "length": length,
            "difference": difference,
            "paths": [asdict(path) for path in work.paths if path is not None],
        }

    def release(self) -> dict[str, Any]:
        """Gives the memory back."""
        if self._region is not None:
            self._region.close()
        self._region = self._work = None
        return {}

    @property
    def _working(self) -> Work:
        assert self._work is not None
        return self._work


def main() -> int:
    """Runs a worker: address, its number; its settings are the first command."""
    address, index = sys.argv[1:]
    try:
        with transferd.Client(address, name=f"bench initiator {index}") as client:
            answer(session=client.session_id, shared_memory=client.shared_memory)
            serve(client, int(index))
    except transferd.TransferdError as error:
        answer(**failed(error))
        return 1
    return 0


def serve(client: Client, index: int) -> None:
    """Does what the parent asks for until it hangs up."""
    worker: Worker | None = None
    for word, values in commands():
        if word == "settings":
            worker = Worker(client, index, Settings(**values))
            answer()
            continue
        try:
            values = getattr(worker, word)(**values)
        except transferd.TransferdError as error:
            values = failed(error)  # the parent decides whether to go on
        answer(**values)


if __name__ == "__main__":
    sys.exit(main())
