# SPDX-License-Identifier: Apache-2.0
"""Processes of a benchmark that are told what to do by lines of JSON.

Such a process tells of itself in a line, and answers each command with another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

from support.child import Child

WAIT_S = 60.0
TESTS = Path(__file__).resolve().parents[1]


class ServedProcess(Child):
    """The process as the benchmark sees it; a context manager that kills it.

    Attributes:
        about: What it has told of itself.
        pid: Of the process.
    """

    wait_s = WAIT_S

    def __init__(self, module: str, *arguments: str) -> None:
        """Starts it, and waits until it is there."""
        path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
        super().__init__(
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            )
        )
        self.pid = self.process.pid
        try:
            self.about = self.answer()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def tell(self, do: str, **arguments: Any) -> None:
        """Sends it a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Reads the answer to the oldest command.

        Raises:
            AssertionError: It has ended, or is silent; its error is on stderr.
        """
        answer: dict[str, Any] = json.loads(self.line())
        return answer

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends it a command and reads the answer."""
        self.tell(do, **arguments)
        return self.answer()


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
