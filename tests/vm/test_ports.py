# SPDX-License-Identifier: Apache-2.0
"""Two hosts with two rails each, under load both ways, while one of the rails goes away."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from bench.guests import GuestEndpoint, join

from support.waiting import eventually
from vm.daemons import PEER_PORT, Daemons
from vm.pair import ROLES, address

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vm.guest import Guest
    from vm.pair import Pair

pytestmark = pytest.mark.long

IMM = 3
KIB = 1 << 10
LENGTH = 2 << 20
LOAD = {"size": 64 * KIB, "window": 8, "imm": IMM}
ROUND = {"writes": 4, "size": 64 * KIB, "pages": 64, "page": 4 * KIB}
WAIT_S = 300.0
METRICS = (
    "exec 3<>/dev/tcp/127.0.0.1/9471 && printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3 && cat <&3"
)


class Hosts:
    """Daemons on both rails of a pair, in touch by eth1, and two clients of each."""

    def __init__(self, pair: Pair, tls: Path) -> None:
        self.pair = pair
        self.daemons = Daemons(pair, tls)
        self.clients: dict[int, list[GuestEndpoint]] = {}
        self.seed = 0

    def start(self) -> None:
        """Starts all of it; the first clients write from 1 to 2, the second ones from 2 to 1."""
        self.daemons.prepare()
        for role in ROLES:
            # What happens to eth0 is a matter of one rail: the daemons stay in touch.
            config = self.daemons[role].config
            config["peer_listen"] = f"{address(role, 1)}:{PEER_PORT}"
        self.daemons.boot()
        for role in ROLES:
            daemon = self.daemons[role]
            self.clients[role] = [GuestEndpoint(daemon, LENGTH, "bench.checked") for _ in range(2)]
        for client in (*self.clients[1], *self.clients[2]):
            client.wait_ready()
        for number in range(2):
            join(self.clients[1][number], self.clients[2][number])

    def ways(self) -> list[tuple[GuestEndpoint, GuestEndpoint]]:
        """Sender and receiver of each direction."""
        return [(self.clients[1][0], self.clients[2][0]), (self.clients[2][1], self.clients[1][1])]

    def begin(self) -> list[int]:
        """Has both write until :meth:`end`; what their counters show before."""
        before = [int(to.ask("counter", imm=IMM)["value"]) for _, to in self.ways()]
        for by, _ in self.ways():
            by.tell("load", **LOAD)
        return before

    def carries(self, guest: Guest, rail: str) -> bool:
        """Whether bytes go out by a rail at this moment.

        Raises:
            AssertionError: Nobody writes any more: a job has failed.
        """
        name = "transferd_rail_sent_bytes_total"
        before = metric(guest, name, rail)
        for by, _ in self.ways():
            assert not by.answered, by.answer()
        return metric(guest, name, rail) > before

    def end(self, before: list[int]) -> None:
        """Ends the load: every job has succeeded, counts are exact, bytes are right."""
        for by, _ in self.ways():
            by.tell("stop")
        for (by, to), then in zip(self.ways(), before, strict=True):
            sent = by.answer(WAIT_S)
            assert by.answer(WAIT_S) == {}
            assert sent["failed"] == []
            assert sent["jobs"] > LOAD["window"]
            now = to.ask("counter", imm=IMM, awaited=then + sent["jobs"])
            assert (now["value"] - then, now["faults"], now["lost"]) == (sent["jobs"], 0, 0)
        self.check()

    def check(self) -> None:
        """Makes a round each way: counts and hashes."""
        for by, to in self.ways():
            self.seed += 2
            to.tell("check_round", seed=self.seed, **ROUND)
            assert by.ask("send_round", seed=self.seed, **ROUND)["failed"] == []
            assert to.answer(WAIT_S)["wrong"] == []


@pytest.fixture(scope="module")
def hosts(vm_pair_of_two_links: Pair, vm_folder: Path) -> Iterator[Hosts]:
    """Gives hosts whose daemons and clients run."""
    made = Hosts(vm_pair_of_two_links, vm_folder / "tls-ports")
    made.start()
    yield made
    for role in ROLES:
        print(f"--- daemon of host{role}\n{made.daemons[role].log()[-20_000:]}")
        print(made.pair[role].console_tail())
        print(made.pair[role].run("cat /proc/net/dev /proc/net/softnet_stat", check=False).stdout)
    made.daemons.close()


def metric(guest: Guest, name: str, rail: str) -> float:
    """Reads what a daemon tells of a rail."""
    pattern = re.compile(rf'^{name}{{[^}}]*rail="{rail}"[^}}]*}} (\S+)$', re.M)

    def look() -> re.Match[str] | None:  # a daemon without a processor for a while says so instead
        return pattern.search(guest.run(METRICS).stdout)

    found = eventually(look, f"{guest.name} tells of {name}", WAIT_S)
    assert found is not None
    return float(found[1])


def is_up(guest: Guest, rail: str) -> bool:
    """Whether a daemon says that a rail is usable."""
    return metric(guest, "transferd_rail_up", rail) == 1


def test_a_port_goes_down_and_comes_back(hosts: Hosts) -> None:
    near, far = hosts.pair.guests
    before = hosts.begin()
    eventually(lambda: hosts.carries(near, "rxe0"), "rxe0 carries the load", WAIT_S)
    far.run("ip link set eth0 down")
    eventually(lambda: not is_up(far, "rxe0"), "the daemon sees it", WAIT_S)
    assert is_up(near, "rxe0"), "it is the other end's port"
    eventually(lambda: hosts.carries(near, "rxe1"), "rxe1 carries the load", WAIT_S)
    far.run("ip link set eth0 up")
    eventually(lambda: is_up(far, "rxe0"), "the daemon sees it", WAIT_S)
    hosts.end(before)
    before = hosts.begin()
    eventually(
        lambda: hosts.carries(near, "rxe0") and hosts.carries(far, "rxe0"),
        "it is used again",
        WAIT_S,
    )
    hosts.end(before)


def test_a_device_is_removed(hosts: Hosts) -> None:
    near, far = hosts.pair.guests
    before = hosts.begin()
    eventually(lambda: hosts.carries(far, "rxe0"), "rxe0 carries the load", WAIT_S)
    far.run("rdma link delete rxe0")
    eventually(lambda: not is_up(far, "rxe0"), "the daemon sees it", WAIT_S)
    eventually(lambda: hosts.carries(near, "rxe1"), "rxe1 carries the load", WAIT_S)
    hosts.end(before)
    assert hosts.daemons[2].running
    far.run("rdma link add rxe0 type rxe netdev eth0")
