# SPDX-License-Identifier: Apache-2.0
"""Rails that die under traffic: the other rails carry on, every count is exact, and they come back.

The control address is on rail 0 of each host.
"""

from __future__ import annotations

import contextlib
import hashlib
from typing import TYPE_CHECKING, Any

import pytest

import transferd

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
        """Paths of each of the sender's rails: up, down."""
        return [(rail.paths_up, rail.paths_down) for rail in self.near.rails()]

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()


@contextlib.contextmanager
def pair(directory: Path, rails: int, content: bytes, **config: Any) -> Iterator[Pair]:
    with netns.network() as network, contextlib.ExitStack() as stack:
        hosts, daemons = [], []
        for number in range(2):
            place = directory / str(number)
            place.mkdir()
            host = network.host(rails, RATE)
            hosts.append(host)
            daemons.append(stack.enter_context(host.daemon(place, directory / "tls", **config)))
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


@pytest.mark.parametrize("side", [NEAR, FAR])
@pytest.mark.parametrize("cut", CUTS)
def test_rail_is_cut_in_mid_transfer(
    short_tmp: Path, seeded: random.Random, cut: str, side: int
) -> None:
    """Its traffic moves, its jobs end well, and once it is back it is used again."""
    with pair(short_tmp, 2, seeded.randbytes(LENGTH)) as two:
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
