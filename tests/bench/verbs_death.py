# SPDX-License-Identifier: Apache-2.0
"""A long load that nobody may be told is lost; then one of two hosts dies, and another comes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from bench import guests, verbs_loss
from bench.report import Row
from transferd import PeerLost

if TYPE_CHECKING:
    from bench.guests import GuestEndpoint
    from bench.topic import Run
    from bench.verbs_hosts import Hosts

KIB, MIB = 1 << 10, 1 << 20
LOAD_S, QUICK_LOAD_S = 600, 60
SIZE, WINDOW, IMM = 64 * KIB, 8, 3
DETECTION_S = 3.0  # heartbeat.timeout by default
FACTOR = 3
BEFORE_DEATH_S = 5.0  # the load has begun by then
PATIENCE_S = 60.0
ROUNDS = 3
FIRST_SEED = 100_001


def rows(run: Run, hosts: Hosts) -> list[Row]:
    """Measures the load, the death, and the new host."""
    one, other = (side.clients for side in hosts.sides.values())
    # The first clients write from here to there, the second ones from there to here.
    guests.join(one[0], other[0])
    guests.join(one[1], other[1])
    found = [load_row(run, one[0], other[0], other[1], one[1])]
    found += death_rows(hosts, one[0], other[1], one[1])
    found.append(new_host_row(hosts, one[0]))
    return found


def load_row(
    run: Run,
    sender: GuestEndpoint,
    receiver: GuestEndpoint,
    far_sender: GuestEndpoint,
    near_receiver: GuestEndpoint,
) -> Row:
    """Writes both ways for minutes: no job may fail, and every count has to be exact."""
    seconds = QUICK_LOAD_S if run.quick else LOAD_S
    both = ((sender, receiver), (far_sender, near_receiver))
    before = [counter(to) for _, to in both]
    for by, _ in both:
        by.tell("load", size=SIZE, window=WINDOW, seconds=seconds, imm=IMM)
    sent = [by.answer(seconds + PATIENCE_S) for by, _ in both]
    wrong = [f"a job ended with {status}" for each in sent for status in each["failed"]]
    for each, (_, to), then in zip(sent, both, before, strict=True):
        now = to.ask("counter", imm=IMM, awaited=then + each["jobs"])
        if (now["value"] - then, now["faults"]) != (each["jobs"], 0):
            wrong.append(f"{each['jobs']} jobs, and the counter shows {now} after {then}")
    jobs = sum(each["jobs"] for each in sent)
    note = (
        f"{jobs:,} writes of {SIZE // KIB} KiB both ways, {jobs * SIZE / MIB / seconds:.1f} MiB/s"
    )
    if run.quick:
        note += "; a full run takes 10 minutes"
    if wrong:
        note += f"; wrong: {'; '.join(wrong[:5])}"
    bar = f"verbs: false PEER_LOST or wrong counts in {seconds // 60} min of load"
    return Row(bar, len(wrong), "", "<=", 0, note)


def counter(endpoint: GuestEndpoint) -> int:
    """Reads the counter of the load."""
    return int(endpoint.ask("counter", imm=IMM)["value"])


def death_rows(
    hosts: Hosts, sender: GuestEndpoint, far_sender: GuestEndpoint, waiter: GuestEndpoint
) -> list[Row]:
    """Kills the second guest under load; times, by this host's clock, when the first's know."""
    for by in (sender, far_sender):
        by.tell("load", size=SIZE, window=WINDOW, seconds=PATIENCE_S * 2, imm=IMM)
    waiter.tell("await_fault", imm=IMM, timeout_s=PATIENCE_S * 2)
    time.sleep(BEFORE_DEATH_S)
    killed_s = hosts.kill(2)
    failed, told = sender.answer()["failed"], waiter.answer()["ended"]
    # Jobs end with PEER_LOST; a write that comes after that is refused with PeerLost.
    ended = [each for each in failed if each.split()[0] == "PEER_LOST"]
    if not failed or not {each.split()[0] for each in failed} <= {"PEER_LOST", PeerLost.__name__}:
        raise RuntimeError(f"jobs to a host that is dead ended with {failed}")
    if told != "CounterFault":
        raise RuntimeError(f"who waits for writes of a host that is dead was told {told!r}")
    limit = FACTOR * DETECTION_S
    made = []
    for what, endpoint, note in (
        ("jobs", sender, f"{len(ended)} jobs ended PEER_LOST; the last counts"),
        ("waiters", waiter, "by a fault of the counter"),
    ):
        bar = f"verbs: {what} told after the other guest was killed under load"
        detail = f"{note}; detection is configured to {DETECTION_S:g} s"
        made.append(Row(bar, endpoint.heard_s - killed_s, "s", "<=", limit, detail))
    return made


def new_host_row(hosts: Hosts, survivor: GuestEndpoint) -> Row:
    """Boots a new guest in the place of the dead one: those that are left talk to it."""
    came = hosts.replace(2)
    guests.join(survivor, came)
    survivor.ask("acknowledge")  # the dead one may have been about to write to it
    wrong = verbs_loss.rounds(survivor, came, ROUNDS, FIRST_SEED)
    note = f"{ROUNDS} rounds each way by the same client and daemon"
    if wrong:
        note += f"; wrong: {'; '.join(wrong[:5])}"
    bar = "verbs: wrong counts, hashes and job ends with a new guest in the dead one's place"
    return Row(bar, len(wrong), "", "<=", 0, note)
