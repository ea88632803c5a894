# SPDX-License-Identifier: Apache-2.0
"""Two daemons over loopback, and client processes of theirs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.daemon import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

TESTS = Path(__file__).resolve().parents[1]


class Endpoint:
    """A client process (:mod:`bench.endpoint`).

    Attributes:
        about: What it has told of itself.
    """

    def __init__(self, daemon: DaemonProcess | str, length: int) -> None:
        socket = daemon if isinstance(daemon, str) else daemon.socket
        path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.endpoint", socket, str(length)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
        )
        self.about = self.answer()

    def tell(self, do: str, **arguments: Any) -> None:
        """Sends it a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Reads the answer to the oldest command.

        Raises:
            RuntimeError: The process has ended; its error is on stderr.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a client process of the benchmark ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends it a command and reads the answer."""
        self.tell(do, **arguments)
        return self.answer()

    def close(self) -> None:
        """Ends the process, its session first."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@contextlib.contextmanager
def daemons(count: int = 2, **overrides: Any) -> Iterator[list[DaemonProcess]]:
    """Runs daemons that are configured as by default, and quiet."""
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(count):
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tfd-")))
            daemon = DaemonProcess(directory, {"log_level": "warning", **overrides})
            made.append(stack.enter_context(daemon))
        yield made


@contextlib.contextmanager
def endpoints(pair: list[DaemonProcess], length: int) -> Iterator[tuple[Endpoint, Endpoint]]:
    """Runs a client process at each daemon; each can write to the other's memory."""
    with contextlib.ExitStack() as stack:
        made = []
        for daemon in pair:
            endpoint = Endpoint(daemon, length)
            stack.callback(endpoint.close)
            made.append(endpoint)
        one, other = made
        one.ask("join", descriptor=other.about["descriptor"])
        other.ask("join", descriptor=one.about["descriptor"])
        yield one, other


@contextlib.contextmanager
def on_cores(count: int) -> Iterator[bool]:
    """Restricts this process, and those that it starts meanwhile, to some cores.

    Yields:
        Whether there are that many.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield len(before) >= count
    finally:
        os.sched_setaffinity(0, before)
