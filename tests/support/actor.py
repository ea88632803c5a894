# SPDX-License-Identifier: Apache-2.0
"""Clients in processes of their own, for tests that kill them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.child import Child

PROGRAM = Path(__file__).with_name("actor_process.py")


class Actor(Child):
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
        arguments = [role, socket, str(length), str(imm)]
        super().__init__(
            subprocess.Popen(
                [
                    sys.executable,
                    str(PROGRAM),
                    *arguments,
                    *([descriptor.hex()] if descriptor else []),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONSAFEPATH": "1"},
            )
        )

    def sending(self) -> None:
        """Waits until bytes of a sender are in flight."""
        while self.line() != "sending":
            pass

    def descriptor(self) -> bytes:
        """Reads a receiver's descriptor, its first line."""
        return bytes.fromhex(self.line())
