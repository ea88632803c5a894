# SPDX-License-Identifier: Apache-2.0
"""Writes over Mooncake's TransferEngine (tcp) between two processes; run by its own interpreter.

``mooncake_write.py SIZE WINDOW COUNT`` prints one line of JSON. It imports nothing of transferd.
"""

from __future__ import annotations

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

ENDED = 1  # transfer_check_status


def make_engine(length: int) -> tuple[Any, int, mmap.mmap]:
    """Starts an engine with registered memory; returns it, the memory's address and its owner."""
    engine = importlib.import_module("mooncake.engine").TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
        raise SystemExit("mooncake: initialize failed")
    memory = mmap.mmap(-1, length)
    memory.write(b"\x5a" * length)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if engine.register_memory(address, length):
        raise SystemExit("mooncake: register_memory failed")
    return engine, address, memory


def target(length: int) -> None:
    """The receiving process; lives until its stdin closes."""
    engine, address, _memory = make_engine(length)
    print(json.dumps({"port": engine.get_rpc_port(), "address": address}), flush=True)
    sys.stdin.read()
    os._exit(0)  # its destructors may hang when the far side is gone


def flood(engine: Any, name: str, here: int, there: int, size: int, slots: int, n: int) -> float:
    """Writes n times with as many in flight as there are slots; returns seconds."""
    flying: deque[int] = deque()
    begin = time.monotonic()
    for index in range(n):
        if len(flying) == slots:
            finish(engine, flying.popleft())
        offset = index % slots * size
        flying.append(engine.transfer_submit_write(name, here + offset, there + offset, size))
    while flying:
        finish(engine, flying.popleft())
    return time.monotonic() - begin


def finish(engine: Any, batch: int) -> None:
    """Waits for one write."""
    while (state := engine.transfer_check_status(batch)) == 0:
        os.sched_yield()
    if state != ENDED:
        raise SystemExit(f"mooncake: a write ended with {state}")


def main() -> None:
    """Runs either side."""
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
            raise SystemExit("mooncake: the receiving process ended")
    told = json.loads(line)
    engine, here, _memory = make_engine(size * slots)
    name, there = f"127.0.0.1:{told['port']}", told["address"]
    flood(engine, name, here, there, size, slots, slots)
    seconds = flood(engine, name, here, there, size, slots, count)
    far.stdin.close()
    far.wait(10)
    result = {"seconds": seconds, "gbps": count * size * 8 / seconds / 1e9}
    print(json.dumps(result), flush=True)
    os._exit(0)


main()
