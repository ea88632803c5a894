# SPDX-License-Identifier: Apache-2.0
"""A transfer that goes on while something else goes wrong, and proves that it is not harmed."""

from __future__ import annotations

import hashlib
import os
import threading
from typing import TYPE_CHECKING

import transferd

from support.waiting import WAIT_S, eventually

if TYPE_CHECKING:
    from types import TracebackType

    from support.daemon import DaemonProcess

PIECE = 128 << 10
PIECES = 8
IMM = 1  # the same as everybody's: name spaces must keep them apart


class Bystander:
    """Sends random bytes from one daemon to another, round after round, and compares hashes.

    A context manager: at the end it must have come through whole, with every count exact.

    Attributes:
        rounds: Transfers that arrived and were the same.
        failure: What went wrong first.
    """

    def __init__(self, near: DaemonProcess, far: DaemonProcess) -> None:
        """Attaches both clients; the transfers begin with the context."""
        self.rounds = 0
        self.failure: BaseException | None = None
        self._sender = transferd.Client(near.socket, name="bystander")
        try:
            self._receiver = transferd.Client(far.socket, name="bystander")
        except BaseException:
            self._sender.close()
            raise
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bystander")

    def _run(self) -> None:
        try:
            source = self._sender.alloc(PIECE * PIECES)
            target = self._receiver.alloc(PIECE * PIECES)
            grant = target.grant(imms=[IMM])
            counter = self._receiver.counter(IMM)
            while not self._stop.is_set():
                source.view[:] = os.urandom(len(source))
                jobs = self._sender.submit(
                    [
                        transferd.Write(
                            src=source[at : at + PIECE],
                            dst=grant.descriptor,
                            dst_offset=at,
                            imm=IMM,
                        )
                        for at in range(0, len(source), PIECE)
                    ]
                )
                counter.wait((self.rounds + 1) * PIECES, WAIT_S)
                sent, got = (hashlib.sha256(region.view).digest() for region in (source, target))
                assert sent == got, f"round {self.rounds}: what arrived is not what was sent"
                for job in jobs:
                    job.wait(WAIT_S)
                self.rounds += 1
            assert tuple(counter.read()) == (self.rounds * PIECES, 0, 0, 0)
        except BaseException as error:
            self.failure = error

    def check(self, more: int = 2) -> None:
        """Waits for some more whole rounds.

        Raises:
            AssertionError: They do not come, or one was wrong.
        """
        wanted = self.rounds + more
        eventually(
            lambda: self.failure is not None or self.rounds >= wanted, "the bystander goes on"
        )
        if self.failure is not None:
            raise AssertionError("the bystander was harmed") from self.failure

    def __enter__(self) -> Bystander:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join(2 * WAIT_S)
        stuck = self._thread.is_alive()
        self._sender.close()
        self._receiver.close()
        self._thread.join()
        if error is not None:
            return  # what the test found comes first
        assert not stuck, "the bystander hangs"
        if self.failure is not None:
            raise AssertionError("the bystander was harmed") from self.failure
        assert self.rounds
