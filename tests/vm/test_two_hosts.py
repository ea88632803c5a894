# SPDX-License-Identifier: Apache-2.0
"""Two hosts: a daemon on each, and clients that write from one to the other."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from support.waiting import eventually

if TYPE_CHECKING:
    import random

    from vm.daemons import Daemons
    from vm.guest import Process
    from vm.pair import Pair

PROGRAM = Path(__file__).with_name("transfer.py")
WAIT_S = 300.0
WRITES = 40
BYTES = (8 << 20) + 1


def line(process: Process, number: int) -> list[str]:
    """Waits for a line that a client prints; its words."""

    def look() -> list[str]:
        assert process.running or process.status == 0, process.text()
        return process.stdout.splitlines()[number : number + 1]

    return eventually(look, f"line {number} of {process.what}", WAIT_S)[0].split()


def transfer(pair: Pair, sender: int, rng: random.Random) -> str:
    """Writes from one guest to the other; hash and count are exact; the path that it took."""
    command = [sys.executable, str(PROGRAM)]
    receiver = pair[3 - sender].spawn([*command, "receive", str(BYTES), str(WRITES)])
    (descriptor,) = line(receiver, 0)
    seed = str(rng.randrange(1 << 32))
    sent, *path = (
        pair[sender]
        .run([*command, "send", str(BYTES), str(WRITES), seed, descriptor], timeout_s=WAIT_S)
        .stdout.split()
    )
    receiver.signal(signal.SIGUSR1)
    assert line(receiver, 1) == [sent, str(WRITES)]
    assert receiver.wait().status == 0, receiver.text()
    return " ".join(path)


def test_writes_both_ways(daemons: Daemons, seeded: random.Random) -> None:
    assert transfer(daemons.pair, 1, seeded).startswith("verbs")
    assert transfer(daemons.pair, 2, seeded).startswith("verbs")
