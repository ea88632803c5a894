# SPDX-License-Identifier: Apache-2.0
"""Writes over two rails, and over one; each card may send less than the hosts could."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench import guests
from bench.report import Row
from bench.stats import median, spread
from bench.turns import in_turn, ratios

if TYPE_CHECKING:
    from bench.guests import GuestEndpoint
    from bench.topic import Run
    from bench.verbs_hosts import Hosts

MIB = 1 << 20
RATE = "20mbit"
SIZE, WINDOW, WRITES = 1 * MIB, 4, 12
IMM = 1
LEAST = 1.8
TURNS = 5


def rows(run: Run, hosts: Hosts) -> list[Row]:
    """Measures in turn by daemons with one rail and by daemons with two."""
    senders: dict[str, GuestEndpoint] = {}
    for rails in (1, 2):
        one, other = (
            side.clients[0] if rails == 1 else side.striping for side in hosts.sides.values()
        )
        assert one is not None
        assert other is not None
        guests.join(one, other)
        senders[str(rails)] = one
    # As much waits at a card as all writes in flight are: it is there to limit, not to lose.
    hosts.shape("tbf", "rate", RATE, "burst", "32kb", "limit", "8mb")
    try:
        for sender in senders.values():
            mbit_s(sender, WINDOW)
        found = in_turn(
            run,
            {rails: lambda by=by: mbit_s(by, WRITES) for rails, by in senders.items()},  # type: ignore[misc]
            TURNS,
        )
    finally:
        hosts.shape()
    by_turn = ratios(found, "2", "1")
    note = f"{median(found['2']):.1f} of {median(found['1']):.1f} Mbit/s; ratios {spread(by_turn)}"
    bar = f"verbs: write {SIZE // MIB} MiB over two rails of {RATE}, ratio to one"
    return [Row(bar, median(by_turn), "x", ">=", LEAST, note)]


def mbit_s(sender: GuestEndpoint, count: int) -> float:
    """Measures once, by the sender's clock: until the other host has acknowledged all."""
    sent = sender.ask("flood", size=SIZE, window=WINDOW, count=count, imm=IMM)
    seconds = (int(sent["end_ns"]) - int(sent["begin_ns"])) / 1e9
    return count * SIZE * 8 / seconds / 1e6
