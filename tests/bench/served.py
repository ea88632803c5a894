# SPDX-License-Identifier: Apache-2.0
"""Processes of a benchmark that are told what to do by lines of JSON.

Such a process tells of itself in a line, and answers each command with another.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

WAIT_S = 60.0
TESTS = Path(__file__).resolve().parents[1]


class ServedProcess:
    """The process as the benchmark sees it; a context manager that kills it.

    Attributes:
        about: What it has told of itself.
        pid: Of the process.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        """Starts it, and waits until it is there."""
        path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
        self._module = module
        self._buffer = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
        )
        self.about = self.answer()
        self.pid = self._process.pid

    def tell(self, do: str, **arguments: Any) -> None:
        """Sends it a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Reads the answer to the oldest command.

        Raises:
            RuntimeError: It has ended, or is silent; its error is on stderr.
        """
        assert self._process.stdout is not None
        fd, end = self._process.stdout.fileno(), time.monotonic() + WAIT_S
        while b"\n" not in self._buffer:
            if not select.select([fd], [], [], max(0.0, end - time.monotonic()))[0]:
                raise RuntimeError(f"{self._module} was silent for {WAIT_S:g} s")
            data = os.read(fd, 65_536)
            if not data:
                raise RuntimeError(f"{self._module} ended")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends it a command and reads the answer."""
        self.tell(do, **arguments)
        return self.answer()

    def kill(self) -> None:
        """Kills it with SIGKILL and reaps it."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


class Served(Protocol):
    """Has a method for each command, which takes its arguments and gives the answer."""

    def about(self) -> dict[str, Any]:
        """Tells of itself."""


def serve(served: Served) -> None:
    """Serves commands until stdin ends."""
    print(json.dumps(served.about()), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(getattr(served, command.pop("do"))(**command)), flush=True)
