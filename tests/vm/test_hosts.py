# SPDX-License-Identifier: Apache-2.0
"""deploy/quickstart vm: its check without a terminal, its shells at one."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING

from support.waiting import eventually
from vm import hosts

if TYPE_CHECKING:
    import pytest

    from vm.daemons import Daemons
    from vm.pair import Pair

WAIT_S = 120.0


def test_without_a_terminal(daemons: Daemons, capsys: pytest.CaptureFixture[str]) -> None:
    hosts.prepare(daemons.pair, daemons)
    hosts.check(daemons.pair)
    printed = capsys.readouterr().out
    assert "rxe0" in printed
    assert "verbs, 1 rail" in printed


class User(threading.Thread):
    """Types at a terminal and reads what it shows."""

    def __init__(self, terminal: int) -> None:
        super().__init__()
        self._terminal = terminal
        self._seen = b""
        self.failure: BaseException | None = None

    def run(self) -> None:
        os.set_blocking(self._terminal, False)
        try:
            self._play()
        except BaseException as error:
            self.failure = error
            os.close(self._terminal)  # which ends the other side

    def _play(self) -> None:
        self._type(b"", "# ")  # what is typed before the terminal is raw is discarded
        self._type(b"echo I am $HOSTNAME\r", "I am host1")
        self._type(hosts.SWITCH, "--- host2")
        self._type(b"echo I am $HOSTNAME\r", "I am host2")
        self._type(b"stty size\r", "33 99")
        self._type(b"sh -c 'echo run\"\"ning; exec sleep 1000'\r", "running")
        self._type(b"\x03", "# ")
        self._type(b"echo still $HOSTNAME\r", "still host2")
        self._type(b"exit\r", "--- host1")
        self._type(b"exit\r", "exit")

    def _type(self, keys: bytes, shown: str) -> None:
        self._seen = b""
        os.write(self._terminal, keys)
        eventually(lambda: self._shows(shown), f"{shown} after {keys!r}", WAIT_S)

    def _shows(self, text: str) -> bool:
        with contextlib.suppress(BlockingIOError):
            self._seen += os.read(self._terminal, 65536)
        return text.encode() in self._seen


def test_at_a_terminal(pair: Pair) -> None:
    ours, theirs = os.openpty()
    user = User(ours)
    opened = {
        guest.name: guest.spawn(["/bin/bash", "--norc", "-i"], terminal=(33, 99))
        for guest in pair.guests
    }
    user.start()
    try:
        with contextlib.suppress(hosts.TerminalClosed):
            hosts.Screen(opened, theirs, theirs).run()
    finally:
        user.join()
        os.close(theirs)
        if user.failure is None:
            os.close(ours)
        for shell in opened.values():
            if shell.running:
                shell.kill()
    assert user.failure is None, user.failure
    assert [shell.status for shell in opened.values()] == [0, 0]
