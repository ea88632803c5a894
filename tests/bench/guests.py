# SPDX-License-Identifier: Apache-2.0
"""Client processes in guests, told what to do by this host.

Python takes seconds to start in an emulated machine, so that they live for all turns.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vm.guest import SHARE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vm.daemons import GuestDaemon

TESTS = Path(__file__).resolve().parents[1]
START_S = 240.0  # of a process; alone it takes 10
ANSWER_S = 300.0
# Longer than any line, so that nothing is folded.
TERMINAL = (24, 1000)
_ENVIRONMENT = {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(TESTS)}


class GuestEndpoint:
    """A client process in a guest: :mod:`bench.endpoint`, or another that speaks as it does.

    Attributes:
        about: What it has told of itself; after :meth:`wait_ready`.
        heard_s: time.monotonic() of this host when the last answer that was read had come.
    """

    def __init__(
        self,
        daemon: GuestDaemon,
        length: int,
        module: str = "bench.endpoint",
        *,
        arguments: Sequence[str] = (),
        prefix: Sequence[str] = (),
    ) -> None:
        """Starts it; :meth:`wait_ready` waits until it takes commands.

        Args:
            daemon: Whose client it is; ready.
            length: Bytes of its memory.
            module: What runs.
            arguments: More of them.
            prefix: What its command line begins with.
        """
        self.guest = daemon.guest
        self.about: dict[str, Any] = {}
        self.heard_s = 0.0
        self._errors = f"{daemon.name}-{time.monotonic_ns()}.err"
        self._part = b""
        self._lines: deque[tuple[bytes, float]] = deque()
        command = [*prefix, sys.executable, "-m", module, daemon.socket, str(length), *arguments]
        line = f"stty raw -echo; exec {shlex.join(command)} 2>{SHARE}/out/{self._errors}"
        self._process = self.guest.spawn(line, env=_ENVIRONMENT, cwd="/", terminal=TERMINAL)
        self._process.on_output = self._take

    def _take(self, data: bytes) -> None:
        *lines, self._part = (self._part + data).split(b"\n")
        self._lines.extend((line, time.monotonic()) for line in lines)

    def wait_ready(self) -> None:
        """Waits until it is attached."""
        self.about = self.answer(START_S)

    def tell(self, do: str, **arguments: Any) -> None:
        """Sends it a command."""
        self._process.type(json.dumps({"do": do, **arguments}).encode() + b"\n")

    def answer(self, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """Reads the answer to the oldest command.

        Raises:
            RuntimeError: The process has ended, or says nothing in time.
            GuestDied: The guest has ended.
        """
        process = self._process
        self.guest.pump(lambda: bool(self._lines) or process.status is not None, timeout_s)
        if not self._lines:
            errors = self.guest.out / self._errors
            text = errors.read_text() if errors.exists() else ""
            state = "says nothing" if process.status is None else f"ended ({process.status})"
            raise RuntimeError(f"a client process in {self.guest.name} {state}\n{text}")
        line, self.heard_s = self._lines.popleft()
        answer: dict[str, Any] = json.loads(line)
        return answer

    @property
    def answered(self) -> bool:
        """Whether an answer has come that was not read."""
        return bool(self._lines)

    def end(self) -> None:
        """Kills it, if it runs."""
        if self._process.running:
            self._process.kill()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends it a command and reads the answer."""
        self.tell(do, **arguments)
        return self.answer()


def join(one: GuestEndpoint, other: GuestEndpoint) -> None:
    """Lets each write to the other's memory."""
    one.ask("join", descriptor=other.about["descriptor"])
    other.ask("join", descriptor=one.about["descriptor"])


@contextlib.contextmanager
def telling(*daemons: GuestDaemon) -> Iterator[None]:
    """Adds the logs of daemons to what goes wrong meanwhile."""
    try:
        yield
    except Exception as error:
        for daemon in daemons:
            error.add_note(
                f"--- daemon {daemon.name} of {daemon.guest.name}\n{daemon.log()[-3000:]}"
            )
        raise
