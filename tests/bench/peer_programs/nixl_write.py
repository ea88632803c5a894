# SPDX-License-Identifier: Apache-2.0
"""Writes over NIXL (UCX) between two processes; run by its own interpreter.

``python -m bench.peer_programs.nixl_write BYTES TRANSPORT [thread]``: each line of JSON on stdin
is answered by one (:mod:`bench.peer_programs.commands`). With ``thread`` the sender has a thread
that makes progress, as by default; the receiver always has: it makes no calls.
"""

from __future__ import annotations

import base64
import importlib
import os
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
from bench.peer_programs import commands

if TYPE_CHECKING:
    from bench.random_pages import Shape
    from numpy.typing import NDArray

QUIET = {"NIXL_LOG_LEVEL": "ERROR", "UCX_LOG_LEVEL": "error"}
# name: what UCX may use; its backend does not start without tcp
TRANSPORTS = {
    "tcp": {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"},  # the wire that the daemons use
    "shm": {"UCX_TLS": "posix,sysv,tcp", "UCX_NET_DEVICES": "all"},
    "cma": {"UCX_TLS": "posix,sysv,cma,tcp", "UCX_NET_DEVICES": "all"},
}


def make_agent(name: str, length: int, *, thread: bool) -> tuple[Any, commands.Memory]:
    """Starts an agent with registered memory."""
    api = importlib.import_module("nixl._api")
    config = api.nixl_agent_config(enable_prog_thread=thread, backends=["UCX"])
    agent = api.nixl_agent(name, config)
    memory = commands.Memory(length)
    agent.register_memory([(memory.address, length, 0, "")], mem_type="DRAM")
    return agent, memory


def target(length: int) -> None:
    """The receiving process; lives until its stdin closes."""
    agent, memory = make_agent("target", length, thread=True)
    metadata = base64.b64encode(agent.get_agent_metadata()).decode()
    commands.say({"address": memory.address, "metadata": metadata})
    sys.stdin.read()
    os._exit(0)


class Sender:
    """The writing process's agent, and transfers that are prepared before anything is timed."""

    def __init__(self, told: dict[str, Any], length: int, *, thread: bool) -> None:
        self._agent, self._memory = make_agent("sender", length, thread=thread)
        self._there = told["address"]
        self._far = self._agent.add_remote_agent(base64.b64decode(told["metadata"]))
        self._handles: dict[tuple[Shape, int], list[Any]] = {}

    def _descriptors(self, base: int, page: int, indices: NDArray[np.int32]) -> Any:
        rows = np.zeros((indices.size, 3), np.uint64)
        rows[:, 0] = base + indices.astype(np.uint64) * page
        rows[:, 1] = page
        return self._agent.get_xfer_descs(rows, mem_type="DRAM")

    def prepare(self, shape: Shape, jobs: int) -> list[Any]:
        """Prepares the transfers of so many jobs, or of all tables where these are fewer."""
        if (shape, jobs) not in self._handles:
            self._handles[shape, jobs] = [
                self._agent.initialize_xfer(
                    "WRITE",
                    self._descriptors(self._memory.address, shape.page, here),
                    self._descriptors(self._there, shape.page, there),
                    self._far,
                )
                for here, there in shape.tables()[:jobs]
            ]
        return self._handles[shape, jobs]

    def flood(self, shape: Shape, window: int, jobs: int) -> float:
        """Writes so many jobs with so many in flight; returns seconds."""
        handles = self.prepare(shape, jobs)
        flying: deque[Any] = deque()
        begin = time.monotonic()
        for index in range(jobs):
            if len(flying) == min(window, len(handles)):
                self._finish(flying.popleft())
            handle = handles[index % len(handles)]
            if self._agent.transfer(handle) == "ERR":
                raise commands.Refused("a write was refused")
            flying.append(handle)
        while flying:
            self._finish(flying.popleft())
        return time.monotonic() - begin

    def _finish(self, handle: Any) -> None:
        while (state := self._agent.check_xfer_state(handle)) != "DONE":
            if state == "ERR":
                raise commands.Refused("a write failed")
            os.sched_yield()


def main() -> None:
    """Runs either side."""
    commands.end_with_parent()
    length, transport = int(sys.argv[1]), sys.argv[2]
    os.environ.update(QUIET | TRANSPORTS[transport])
    if sys.argv[-1] == "target":
        target(length)
    far = commands.Far("bench.peer_programs.nixl_write", *sys.argv[1:])
    commands.serve(Sender(far.told, length, thread=sys.argv[-1] == "thread").flood)
    far.close()
    os._exit(0)


main()
