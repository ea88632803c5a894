# SPDX-License-Identifier: Apache-2.0
"""Writes and pages over a link that loses packets: every count and every byte is checked."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from bench import guests
from bench.report import Row

if TYPE_CHECKING:
    from bench.guests import GuestEndpoint
    from bench.topic import Run
    from bench.verbs_hosts import Hosts

    from vm.guest import Guest

KIB = 1 << 10
LOSS = "0.5%"
ROUNDS = 40
SHAPE = {"writes": 8, "size": 64 * KIB, "pages": 256, "page": 4 * KIB}


def rows(run: Run, hosts: Hosts) -> list[Row]:
    """Makes rounds both ways while each side's card loses."""
    one, other = (side.clients[0] for side in hosts.sides.values())
    guests.join(one, other)
    count = run.scaled(ROUNDS)
    hosts.shape("netem", "loss", LOSS, "limit", "10000")
    try:
        wrong = rounds(one, other, count)
        lost = [dropped(guest) for guest in hosts.pair.guests]
    finally:
        hosts.shape()
    if not all(lost):
        raise RuntimeError(f"the link has lost nothing (packets dropped: {lost})")
    jobs = 2 * count * (SHAPE["writes"] + 1)
    note = (
        f"{jobs:,} jobs in {2 * count} rounds, {2 * count * SHAPE['pages']:,} pages of them; "
        f"{lost[0]} and {lost[1]} packets were lost"
    )
    if wrong:
        note += f"; wrong: {'; '.join(wrong[:5])}"
    bar = f"verbs: wrong counts, hashes and job ends with {LOSS} loss both ways"
    return [Row(bar, len(wrong), "", "<=", 0, note)]


def rounds(one: GuestEndpoint, other: GuestEndpoint, count: int, first: int = 1) -> list[str]:
    """Makes rounds in both directions, and checks each; gives what is wrong.

    Args:
        one: A side.
        other: The other.
        count: Rounds each way.
        first: Seed of the first.
    """
    wrong: list[str] = []
    for seed in range(first, first + 2 * count, 2):
        for sender, receiver, number in ((one, other, seed), (other, one, seed + 1)):
            receiver.tell("check_round", seed=number, **SHAPE)
            sent = sender.ask("send_round", seed=number, **SHAPE)
            wrong += [f"a job ended with {status}" for status in sent["failed"]]
            wrong += receiver.answer()["wrong"]
    for side in (one, other):  # nothing more has come meanwhile
        wrong += side.ask("counts_wrong")["wrong"]
    return wrong


def dropped(guest: Guest) -> int:
    """Tells how many packets a card has dropped of what it should send."""
    shown = guest.run("tc -s qdisc show dev eth0").stdout
    found = re.search(r"dropped (\d+)", shown)
    return int(found[1]) if found else 0
