# SPDX-License-Identifier: Apache-2.0
"""Writes over Mooncake's TransferEngine (tcp) between two processes; run by its own interpreter.

``python -m bench.peer_programs.mooncake_write BYTES``: each line of JSON on stdin is answered by
one (:mod:`bench.peer_programs.commands`).
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from bench.peer_programs import commands

if TYPE_CHECKING:
    from bench.random_pages import Shape

ENDED = 1  # transfer_check_status
BATCH = 1024  # pages of a call: a few thousand at once are refused, its queue to a peer is full


def make_engine(length: int) -> tuple[Any, commands.Memory]:
    """Starts an engine with registered memory."""
    engine = importlib.import_module("mooncake.engine").TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
        raise SystemExit("mooncake: initialize failed")
    memory = commands.Memory(length)
    if engine.register_memory(memory.address, length):
        raise SystemExit("mooncake: register_memory failed")
    return engine, memory


def target(length: int) -> None:
    """The receiving process; lives until its stdin closes."""
    engine, memory = make_engine(length)
    commands.say({"port": engine.get_rpc_port(), "address": memory.address})
    sys.stdin.read()
    os._exit(0)  # its destructors may hang when the far side is gone


class Sender:
    """The writing process's engine."""

    def __init__(self, told: dict[str, Any], length: int) -> None:
        self._engine, self._memory = make_engine(length)
        self._name, self._there = f"127.0.0.1:{told['port']}", told["address"]
        self._addresses: dict[Shape, list[tuple[list[int], list[int], list[int]]]] = {}

    def prepare(self, shape: Shape) -> list[tuple[list[int], list[int], list[int]]]:
        """Makes the lists of addresses and lengths of job after job."""
        if shape not in self._addresses:
            self._addresses[shape] = [
                (
                    [self._memory.address + page * shape.page for page in here.tolist()],
                    [self._there + page * shape.page for page in there.tolist()],
                    [shape.page] * shape.pages,
                )
                for here, there in shape.tables()
            ]
        return self._addresses[shape]

    def flood(self, shape: Shape, window: int, jobs: int) -> float:
        """Writes so many jobs with so many in flight; returns seconds."""
        lists = self.prepare(shape)
        flying: deque[int] = deque()
        begin = time.monotonic()
        for index in range(jobs):
            here, there, lengths = lists[index % len(lists)]
            if shape.pages > 1:
                self._write_pages(here, there, lengths)
                continue
            if len(flying) == window:
                self._finish(flying.popleft())
            flying.append(
                self._engine.transfer_submit_write(self._name, here[0], there[0], lengths[0])
            )
        while flying:
            self._finish(flying.popleft())
        return time.monotonic() - begin

    def _write_pages(self, here: list[int], there: list[int], lengths: list[int]) -> None:
        write = self._engine.batch_transfer_sync_write
        for at in range(0, len(here), BATCH):
            part = slice(at, at + BATCH)
            if write(self._name, here[part], there[part], lengths[part]):
                raise commands.Refused("batch_transfer_sync_write failed")

    def _finish(self, batch: int) -> None:
        while (state := self._engine.transfer_check_status(batch)) == 0:
            os.sched_yield()
        if state != ENDED:
            raise commands.Refused(f"a write ended with {state}")


def main() -> None:
    """Runs either side."""
    commands.end_with_parent()
    length = int(sys.argv[1])
    if sys.argv[-1] == "target":
        target(length)
    far = commands.Far("bench.peer_programs.mooncake_write", *sys.argv[1:])
    commands.serve(Sender(far.told, length).flood)
    far.close()
    os._exit(0)


main()
