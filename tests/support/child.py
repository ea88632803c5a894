# SPDX-License-Identifier: Apache-2.0
"""Processes that say lines, for tests that kill them."""

from __future__ import annotations

import contextlib
import os
import select
import time
from typing import TYPE_CHECKING

from support.waiting import WAIT_S

if TYPE_CHECKING:
    import subprocess
    from types import TracebackType
    from typing import Self


class Child:
    """A process whose standard output is a pipe; a context manager that kills it.

    Attributes:
        wait_s: Bound of a line that gives none of its own.
    """

    wait_s = WAIT_S

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        """Takes it over."""
        self.process = process
        self._buffer = b""

    def line(self, timeout_s: float | None = None) -> str:
        """Reads its next line.

        Raises:
            AssertionError: None came, or it ended.
        """
        timeout_s = self.wait_s if timeout_s is None else timeout_s
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left = max(0.0, deadline - time.monotonic())
            assert select.select([fd], [], [], left)[0], f"silent for {timeout_s:g} s"
            data = os.read(fd, 65_536)
            assert data, f"it ended with {self.process.wait()}"
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\n")
        return text.decode()

    def kill(self) -> None:
        """Kills it with SIGKILL and reaps it."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        for pipe in filter(None, (self.process.stdin, self.process.stdout)):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
