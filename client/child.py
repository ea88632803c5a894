# SPDX-License-Identifier: Apache-2.0
"""A helper process that is told what to do by lines of JSON on its stdin and answers on its stdout.

Demo and benchmark run each side of a transfer in a process of its own; this is the cord between.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from transferd.client import errors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

STOP_S = 10.0


class Child:
    """The process, seen from its parent; a context manager that ends it."""

    def __init__(self, module: str, *arguments: str, own_group: bool = False) -> None:
        """Starts it.

        Args:
            module: Run as ``python -m``.
            arguments: Of its command line.
            own_group: Whether Ctrl-C reaches the parent alone, which then ends it.
        """
        self._module = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
            process_group=0 if own_group else None,
        )

    def read(self) -> dict[str, Any]:
        """Reads its next answer.

        Raises:
            Unavailable: It failed; the message is its own.
            Internal: It ended without a word.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise errors.Internal(f"{self._module} ended with status {status}")
        values: dict[str, Any] = json.loads(line)
        if "error" in values:
            raise errors.Unavailable(values["error"])
        return values

    def tell(self, **command: Any) -> None:
        """Sends it a command."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self.read()  # says why
            raise

    def ask(self, **command: Any) -> dict[str, Any]:
        """Sends it a command and reads the answer."""
        self.tell(**command)
        return self.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if kind is not None:
            self._process.terminate()
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def answer(**values: Any) -> None:
    """Answers the parent."""
    print(json.dumps(values), flush=True)


def commands() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the parent's commands, as the word under ``do`` and the rest, until it hangs up."""
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        yield command.pop("do"), command
