# SPDX-License-Identifier: Apache-2.0
"""Writes over NIXL (UCX, tcp) between two processes; run by its own interpreter.

``nixl_write.py SIZE WINDOW COUNT`` prints one line of JSON. It imports nothing of transferd.
"""

from __future__ import annotations

import base64
import ctypes
import importlib
import json
import mmap
import os
import subprocess
import sys
import time
from collections import deque
from typing import Any

# Loopback tcp and nothing faster: what is compared is the same wire.
TRANSPORT = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo", "NIXL_LOG_LEVEL": "ERROR"}


def make_agent(name: str, length: int) -> tuple[Any, int, mmap.mmap]:
    """Starts an agent with registered memory; returns it, the memory's address and its owner."""
    api = importlib.import_module("nixl._api")
    agent = api.nixl_agent(name, api.nixl_agent_config(backends=["UCX"]))
    memory = mmap.mmap(-1, length)
    memory.write(b"\x5a" * length)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    agent.register_memory([(address, length, 0, "")], mem_type="DRAM")
    return agent, address, memory


def target(length: int) -> None:
    """The receiving process; lives until its stdin closes."""
    agent, address, _memory = make_agent("target", length)
    metadata = base64.b64encode(agent.get_agent_metadata()).decode()
    print(json.dumps({"address": address, "metadata": metadata}), flush=True)
    sys.stdin.read()
    os._exit(0)


class Sender:
    """The writing process's agent and its prepared transfers, one for each slot."""

    def __init__(self, told: dict[str, Any], size: int, slots: int) -> None:
        self.agent, here, self._memory = make_agent("sender", size * slots)
        far = self.agent.add_remote_agent(base64.b64decode(told["metadata"]))
        self.handles = []
        for slot in range(slots):
            local = self.agent.get_xfer_descs([(here + slot * size, size, 0)], mem_type="DRAM")
            there = self.agent.get_xfer_descs(
                [(told["address"] + slot * size, size, 0)], mem_type="DRAM"
            )
            self.handles.append(self.agent.initialize_xfer("WRITE", local, there, far))

    def flood(self, count: int) -> float:
        """Writes count times with one in flight in each slot; returns seconds."""
        flying: deque[Any] = deque()
        begin = time.monotonic()
        for index in range(count):
            if len(flying) == len(self.handles):
                self.finish(flying.popleft())
            handle = self.handles[index % len(self.handles)]
            if self.agent.transfer(handle) == "ERR":
                raise SystemExit("nixl: a write was refused")
            flying.append(handle)
        while flying:
            self.finish(flying.popleft())
        return time.monotonic() - begin

    def finish(self, handle: Any) -> None:
        """Waits for one write."""
        while (state := self.agent.check_xfer_state(handle)) != "DONE":
            if state == "ERR":
                raise SystemExit("nixl: a write failed")
            os.sched_yield()


def main() -> None:
    """Runs either side."""
    os.environ.update(TRANSPORT)
    if sys.argv[1] == "target":
        target(int(sys.argv[2]))
    size, slots, count = (int(word) for word in sys.argv[1:])
    far = subprocess.Popen(
        [sys.executable, __file__, "target", str(size * slots)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert far.stdin is not None
    assert far.stdout is not None
    while not (line := far.stdout.readline()).startswith("{"):
        if not line:
            raise SystemExit("nixl: the receiving process ended")
    sender = Sender(json.loads(line), size, slots)
    sender.flood(slots)
    seconds = sender.flood(count)
    far.stdin.close()
    far.wait(10)
    result = {"seconds": seconds, "gbps": count * size * 8 / seconds / 1e9}
    print(json.dumps(result), flush=True)
    os._exit(0)


main()
