# SPDX-License-Identifier: Apache-2.0
"""Clients in processes of their own, for tests that kill them."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from support.waiting import WAIT_S

if TYPE_CHECKING:
    from types import TracebackType

PROGRAM = Path(__file__).with_name("actor_process.py")


class Actor:
    """A client in a process of its own; a context manager that kills it."""

    def __init__(
        self, role: str, socket: str, length: int, imm: int = 1, descriptor: bytes = b""
    ) -> None:
        """Starts it.

        Args:
            role: "send", "receive", "send messages" or "mailbox".
            socket: Of its daemon.
            length: Bytes of its region and of each write; of a message, of a slot.
            imm: Immediate.
            descriptor: Where a sender writes to.
        """
        self._buffer = b""
        arguments = [role, socket, str(length), str(imm)]
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), *arguments, *([descriptor.hex()] if descriptor else [])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )

    def line(self, timeout_s: float = WAIT_S) -> str:
        """Reads its next line.

        Raises:
            AssertionError: None came, or it ended.
        """
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

    def sending(self) -> None:
        """Waits until bytes of a sender are in flight."""
        while self.line() != "sending":
            pass

    def descriptor(self) -> bytes:
        """Reads a receiver's descriptor, its first line."""
        return bytes.fromhex(self.line())

    def kill(self) -> None:
        """Kills it with SIGKILL and reaps it."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Actor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()
