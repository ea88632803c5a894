# SPDX-License-Identifier: Apache-2.0
"""Rails that die under traffic: the other rails carry on, every count is exact, and they come back.

The control address is on rail 0 of each host.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

import transferd
from transferd.client import JobStatus

from support import netns
from support.waiting import eventually

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.daemon import DaemonProcess
    from support.netns import Host, Network

WHY_NOT = netns.missing()
pytestmark = [pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT), pytest.mark.slow]

LENGTH = 32 << 20
JOBS = 6
RATE = "1gbit"  # 32 MiB take 270 ms on one rail: what is cut is surely under way
END_S = 30.0  # a silent rail is given up after 5 s
COUNTED_S = 10.0
FAR, NEAR = 1, 0


class Pair:
    """Two hosts, a client on each, and a grant of the far one's memory."""

    def __init__(self, network: Network, hosts: list[Host], daemons: list[DaemonProcess]) -> None:
        self.network = network
        self.hosts = hosts
        self.near, self.far = daemons
        self.sender = transferd.Client(self.near.socket)
        self.receiver = transferd.Client(self.far.socket)
        self.source = self.sender.alloc(LENGTH)
        self.target = self.receiver.alloc(LENGTH)
        self.descriptor = self.target.grant(imms=range(8)).descriptor
        self.counter = self.receiver.counter(1)
        self.written = 0

    def fill(self, content: bytes) -> None:
        self.source.view[:] = content
        self.digest = hashlib.sha256(content).digest()

    def start(self, count: int) -> list[Any]:
        """Starts writes of everything."""
        self.written += count
        return [self.sender.write(self.source, self.descriptor, imm=1) for _ in range(count)]

    def clear(self) -> None:
        self.target.view[:] = bytes(LENGTH)

    def check(self, jobs: list[Any]) -> None:
        """Waits for writes: all of them are well, and counted once."""
        for job in jobs:
            job.wait(END_S)
        self.counter.wait(self.written, COUNTED_S)
        assert self.counter.value == self.written
        assert (self.counter.faults, self.counter.lost) == (0, 0)
        assert hashlib.sha256(self.target.view).digest() == self.digest

    def sent(self, rail: int) -> int:
        """Bytes that the sender's rail has carried."""
        return self.near.rails()[rail].bytes_sent

    def paths(self) -> list[tuple[int, int]]:
        """Paths of each of the sender's NICs: up, down."""
        nics = [rail for rail in self.near.rails() if rail.name != "local"]
        return [(rail.paths_up, rail.paths_down) for rail in nics]

    def works(self) -> bool:
        """Whether a write arrives, after a fault that its owner has acknowledged."""
        try:
            self.counter.acknowledge()
            self.sender.write(self.source, self.descriptor, imm=1).wait(END_S)
        except transferd.PeerLost:
            return False
        return hashlib.sha256(self.target.view).digest() == self.digest

    @staticmethod
    def ended_well(job: Any) -> bool:
        """Waits for the end of a write whose peer may have been lost."""
        try:
            return job.wait(END_S) is JobStatus.OK
        except transferd.PeerLost:
            return False

    def arrives(self, descriptor: bytes) -> bool:
        """Whether a small write does."""
        try:
            return (
                self.sender.write(self.source[:4096], descriptor, imm=9).wait(END_S) is JobStatus.OK
            )
        except transferd.PeerLost:
            return False

    def lose(self, jobs: list[Any]) -> None:
        """Waits for the ends of writes to a peer that is lost: the last of them cannot be well."""
        ends = [self.ended_well(job) for job in jobs]
        assert not ends[-1]

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()


@contextlib.contextmanager
def pair(
    directory: Path,
    *rails: int,
    content: bytes,
    dead: tuple[int, ...] = (),
    provider: str = "tcp",
) -> Iterator[Pair]:
    """Runs two hosts with so many rails, some of the far one's dead from the start."""
    with netns.network() as network, contextlib.ExitStack() as stack:
        hosts, daemons = [], []
        for number, count in enumerate(rails):
            place = directory / str(number)
            place.mkdir()
            host = network.host(count, RATE)
            hosts.append(host)
            daemon = host.daemon(place, directory / "tls", provider=provider)
            daemons.append(stack.enter_context(daemon))
        for rail in dead:
            network.silence(hosts[FAR], rail)
        made = Pair(network, hosts, daemons)
        stack.callback(made.close)
        made.fill(content)
        made.check(made.start(1))
        yield made


CUTS: dict[str, Callable[[Network, Host, int], None]] = {
    "silent": lambda network, host, rail: network.silence(host, rail),
    "cable": lambda network, host, rail: network.unplug(host, rail),
    "interface": lambda network, host, rail: network.take_down(host, rail),
}


@pytest.mark.parametrize(
    ("cut", "side", "provider"),
    [
        ("silent", NEAR, "tcp"),
        pytest.param("silent", FAR, "tcp", marks=pytest.mark.long),
        ("cable", FAR, "tcp"),
        pytest.param("interface", NEAR, "tcp", marks=pytest.mark.long),
        pytest.param("silent", NEAR, "libfabric", marks=pytest.mark.long),
        pytest.param("interface", NEAR, "libfabric", marks=pytest.mark.long),
    ],
)
def test_rail_is_cut_in_mid_transfer(
    short_tmp: Path, seeded: random.Random, cut: str, side: int, provider: str
) -> None:
    """Its traffic moves, its jobs end well, and once it is back it is used again."""
    content = seeded.randbytes(LENGTH)
    with pair(short_tmp, 2, 2, content=content, provider=provider) as two:
        host = two.hosts[side]
        two.clear()
        before = [two.sent(rail) for rail in (0, 1)]
        assert min(before) > 0
        jobs = two.start(JOBS)
        two.counter.wait(two.written - JOBS + 1, END_S)
        CUTS[cut](two.network, host, 1)
        jobs += two.start(2)  # whatever has ended by now, these meet a rail that is dead
        two.check(jobs)
        moved = [two.sent(rail) - before[rail] for rail in (0, 1)]
        assert sum(moved) >= (JOBS + 2) * LENGTH
        assert moved[0] > moved[1], "most of it went by the rail that lives"
        assert two.paths() == [(1, 0), (0, 1)]

        two.clear()
        stopped = two.sent(1)
        two.check(two.start(1))
        assert two.sent(1) == stopped

        two.network.mend(host, 1)
        eventually(lambda: two.paths() == [(1, 0), (1, 0)], "the rail is used again", END_S)
        two.check(two.start(2))
        assert two.sent(1) >= stopped + LENGTH // 2
        assert two.near.status().peers == 1
        assert "peer lost" not in two.near.log() + two.far.log()


@pytest.mark.long
def test_rails_die_one_after_the_other_and_at_once(short_tmp: Path, seeded: random.Random) -> None:
    with pair(short_tmp, 4, 4, content=seeded.randbytes(LENGTH)) as four:
        for rails in ((2,), (1, 3)):
            jobs = four.start(JOBS)
            for rail in rails:
                four.network.silence(four.hosts[FAR], rail)
            jobs += four.start(2)
            four.check(jobs)
        assert four.paths() == [(1, 0), (0, 1), (0, 1), (0, 1)]
        before = [four.sent(rail) for rail in range(4)]
        for rail in (3, 1, 2):
            four.network.mend(four.hosts[FAR], rail)
        eventually(lambda: four.paths() == [(1, 0)] * 4, "all rails are used again", END_S)
        four.check(four.start(2))
        for rail in range(4):
            assert four.sent(rail) >= before[rail] + LENGTH // 4


@pytest.mark.long
def test_far_rail_dies_where_numbers_differ(short_tmp: Path, seeded: random.Random) -> None:
    """One rail here, two there: the path to the dead one goes, the rail here stays."""
    with pair(short_tmp, 1, 2, content=seeded.randbytes(LENGTH)) as odd:
        assert odd.paths() == [(2, 0)]
        jobs = odd.start(2)
        odd.network.silence(odd.hosts[FAR], 1)
        odd.check(jobs + odd.start(2))
        assert odd.paths() == [(1, 1)]
        odd.network.mend(odd.hosts[FAR], 1)
        eventually(lambda: odd.paths() == [(2, 0)], "both paths are used again", END_S)
        odd.check(odd.start(1))


def test_rail_is_dead_from_the_start(short_tmp: Path, seeded: random.Random) -> None:
    """No job meets it; it is used once it carries."""
    with pair(short_tmp, 2, 2, content=seeded.randbytes(LENGTH), dead=(1,)) as two:
        assert two.paths() == [(1, 0), (0, 1)]
        assert two.sent(1) == 0
        two.network.mend(two.hosts[FAR], 1)
        eventually(lambda: two.paths() == [(1, 0), (1, 0)], "the rail is used", END_S)
        two.check(two.start(1))
        assert two.sent(1) > 0
        assert "connection broke" not in two.near.log()


@pytest.mark.parametrize("side", [NEAR, FAR])
def test_connections_of_one_rail_are_reset(
    short_tmp: Path, seeded: random.Random, side: int
) -> None:
    """The half that breaks at one side alone, under traffic and idle; the other side finds out."""
    if why := netns.no_reset():
        pytest.skip(why)
    with pair(short_tmp, 2, 2, content=seeded.randbytes(LENGTH)) as two:
        jobs = two.start(JOBS)
        two.counter.wait(two.written - JOBS + 1, END_S)
        two.network.reset(two.hosts[side], 1)
        two.check(jobs + two.start(1))
        eventually(lambda: two.paths() == [(1, 0), (1, 0)], "the rail is used again", END_S)
        two.network.reset(two.hosts[side], 1)
        two.check(two.start(1))
        eventually(lambda: two.paths() == [(1, 0), (1, 0)], "the rail is used again", END_S)
        assert "peer lost" not in two.near.log() + two.far.log()


@pytest.mark.parametrize("side", [NEAR, pytest.param(FAR, marks=pytest.mark.long)])
def test_rail_of_the_control_address_dies(
    short_tmp: Path, seeded: random.Random, side: int
) -> None:
    """It carries the heartbeats: the peer is lost, whatever other rails there are."""
    with pair(short_tmp, 2, 2, content=seeded.randbytes(LENGTH)) as two:
        jobs = two.start(JOBS)
        two.network.silence(two.hosts[side], 0)
        two.lose(jobs + two.start(1))
        with pytest.raises(transferd.CounterFault):
            two.counter.wait(1 << 40, END_S)
        assert two.paths() == [(0, 0), (0, 0)]
        two.target.view[:] = b"\x5a" * LENGTH
        two.network.mend(two.hosts[side], 0)
        # What either side still had in its sockets goes nowhere, now that it gets through.
        other = two.receiver.alloc(4096).grant(imms=[9]).descriptor
        eventually(lambda: two.arrives(other), "the pair works again", END_S)
        assert two.target.view == b"\x5a" * LENGTH, "a byte landed after the end"
        eventually(two.works, "the old descriptor, too", END_S)
        assert two.paths() == [(1, 0), (1, 0)]


@pytest.mark.long
def test_peer_stands_still(short_tmp: Path, seeded: random.Random) -> None:
    with pair(short_tmp, 2, 2, content=seeded.randbytes(LENGTH)) as two:
        jobs = two.start(JOBS)
        os.kill(two.far.pid, signal.SIGSTOP)
        try:
            two.lose(jobs + two.start(1))
            assert two.paths() == [(0, 0), (0, 0)]
        finally:
            os.kill(two.far.pid, signal.SIGCONT)
        with pytest.raises(transferd.CounterFault):
            two.counter.wait(1 << 40, END_S)
        eventually(two.works, "the pair works again", END_S)
        assert two.paths() == [(1, 0), (1, 0)]


def test_peer_vanishes_with_its_network(short_tmp: Path, seeded: random.Random) -> None:
    """Half-open: no connection is ever closed by the other end, which has begun anew meanwhile."""
    with pair(short_tmp, 2, 2, content=seeded.randbytes(LENGTH)) as two:
        jobs = two.start(JOBS)
        for rail in (0, 1):
            two.network.silence(two.hosts[FAR], rail)
        two.far.kill()
        two.lose(jobs + two.start(1))
        assert two.paths() == [(0, 0), (0, 0)]
        for rail in (0, 1):
            two.network.mend(two.hosts[FAR], rail)
        two.far.start()
        with transferd.Client(two.far.socket) as reborn:
            target = reborn.alloc(LENGTH)
            descriptor = target.grant(imms=[1]).descriptor
            two.sender.write(two.source, descriptor, imm=1).wait(END_S)
            assert hashlib.sha256(target.view).digest() == two.digest
            assert reborn.counter(1).value == 1
        assert two.paths() == [(1, 0), (1, 0)]
