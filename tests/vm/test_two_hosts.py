# SPDX-License-Identifier: Apache-2.0
"""Two hosts: a daemon on each, and clients that write from one to the other; one of them dies."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from bench.guests import GuestEndpoint, join

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
KIB, IMM = 1 << 10, 3
LENGTH = 2 << 20
LOAD = {"size": 64 * KIB, "window": 8, "imm": IMM}
ROUND = {"writes": 4, "size": 64 * KIB, "pages": 64, "page": 4 * KIB}


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


def check_rounds(one: GuestEndpoint, other: GuestEndpoint, seed: int) -> None:
    """Makes a round each way: every count and every hash."""
    for by, to in ((one, other), (other, one)):
        to.tell("check_round", seed=seed, **ROUND)
        assert by.ask("send_round", seed=seed, **ROUND)["failed"] == []
        assert to.answer(WAIT_S)["wrong"] == []


@pytest.mark.long
def test_a_host_dies_and_another_takes_its_place(daemons: Daemons) -> None:
    """How soon they are told is a bar of tests/bench (verbs_death.py)."""
    sender, waiter = (GuestEndpoint(daemons[1], LENGTH, "bench.checked") for _ in range(2))
    receiver, writer = (GuestEndpoint(daemons[2], LENGTH, "bench.checked") for _ in range(2))
    for client in (sender, waiter, receiver, writer):
        client.wait_ready()
    join(sender, receiver)
    join(waiter, writer)
    check_rounds(sender, receiver, 1)
    for by in (sender, writer):
        by.tell("load", **LOAD)
    waiter.tell("await_fault", imm=IMM, timeout_s=WAIT_S)
    assert receiver.ask("counter", imm=IMM, awaited=LOAD["window"])["value"] >= LOAD["window"]
    daemons.pair[2].kill()
    failed = {status.split()[0] for status in sender.answer(WAIT_S)["failed"]}
    assert failed
    assert failed <= {"PEER_LOST", "PeerLost"}  # of those under way; who writes later is refused
    assert waiter.answer(WAIT_S) == {"ended": "CounterFault"}
    process = daemons[1].process
    daemons.boot()
    assert daemons[1].process is process
    came = GuestEndpoint(daemons[2], LENGTH, "bench.checked")
    came.wait_ready()
    join(sender, came)
    sender.ask("acknowledge")  # what the dead one may have been about to write
    check_rounds(sender, came, 2)
    for client in (sender, waiter, came):
        client.end()
