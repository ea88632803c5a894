# SPDX-License-Identifier: Apache-2.0
"""What the programs of all peers have in common; it imports nothing of transferd.

A program starts its receiving process, says a line when it is ready, and answers each line on
stdin: ``{"page", "pages", "set_bytes", "window", "jobs"}`` by ``{"gbps"}`` or ``{"error"}``.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from bench.random_pages import Shape

if TYPE_CHECKING:
    from collections.abc import Callable


PR_SET_PDEATHSIG = 1


class Refused(Exception):
    """The library did not do it."""


class Memory:
    """Memory that is filled.

    Attributes:
        address: Of its first byte.
    """

    def __init__(self, length: int) -> None:
        self._owner = mmap.mmap(-1, length)
        self._owner.write(b"\x5a" * length)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._owner))


class Far:
    """The receiving process.

    Attributes:
        told: What it said of itself.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, "target"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        while not (line := self._process.stdout.readline()).startswith("{"):
            if not line:
                raise SystemExit("the receiving process ended")
        self.told: dict[str, Any] = json.loads(line)

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


def end_with_parent() -> None:
    """Lets this process die with the one that started it, be it stopped or polling for ever."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def say(what: dict[str, Any]) -> None:
    """Says a line; libraries may say others, which do not begin as these do."""
    print("\n" + json.dumps(what), flush=True)


def serve(flood: Callable[[Shape, int, int], float]) -> None:
    """Answers until stdin closes."""
    say({"ready": True})
    known: set[Shape] = set()
    for line in sys.stdin:
        load = json.loads(line)
        shape = Shape(load["page"], load["pages"], load["set_bytes"])
        window, jobs = load["window"], load["jobs"]
        try:
            if shape not in known:
                flood(shape, window, jobs)  # touches what is touched for the first time
                known.add(shape)
            seconds = flood(shape, window, jobs)
        except Refused as error:
            say({"error": str(error)})
        else:
            say({"gbps": jobs * shape.job_bytes * 8 / seconds / 1e9})
