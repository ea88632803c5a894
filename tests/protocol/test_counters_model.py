# SPDX-License-Identifier: Apache-2.0
"""Counts are exact: random writes of several senders at once, against what each of them counted."""

from __future__ import annotations

import random
import threading
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import transferd
from transferd.native.names import JobStatus

from support.waiting import WAIT_S

if TYPE_CHECKING:
    from support.daemon import DaemonProcess

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = pytest.mark.slow

LENGTH = 1 << 18
IMMS = 16
SIZES = (0, 1, 7, 64, 4096, 4097, 65_536, LENGTH)


class Sender(threading.Thread):
    """Writes at random and counts what it has sent.

    Attributes:
        sent: Landed writes by immediate, by its own account.
        failure: What went wrong.
    """

    def __init__(self, daemon: DaemonProcess, descriptor: bytes, count: int, seed: int) -> None:
        super().__init__(name=f"sender {seed}")
        self.sent: Counter[int] = Counter()
        self.failure: BaseException | None = None
        self._arguments = daemon, descriptor, count, random.Random(seed)

    def run(self) -> None:
        """Sends; a thread's body."""
        try:
            self._send(*self._arguments)
        except BaseException as error:
            self.failure = error

    def _send(
        self, daemon: DaemonProcess, descriptor: bytes, count: int, chance: random.Random
    ) -> None:
        with transferd.Client(daemon.socket) as client:
            source = client.alloc(LENGTH)
            jobs: list[tuple[int, transferd.Job]] = []
            for _ in range(count):
                size, imm = chance.choice(SIZES), chance.randrange(IMMS)
                priority = chance.choice(("bulk", "latency"))
                if chance.random() < 0.2:
                    jobs.append((imm, client.imm(descriptor, imm, priority=priority)))
                    continue
                offset = chance.randrange(LENGTH - size + 1)
                job = client.write(source[:size], descriptor, offset, imm=imm, priority=priority)
                jobs.append((imm, job))
            for imm, job in jobs:
                assert job.wait(WAIT_S) is JobStatus.OK
                self.sent[imm] += 1


@pytest.mark.parametrize("count", [50, 1500])
def test_several_senders(shared_pair: Pair, seeded: random.Random, count: int) -> None:
    near, far = shared_pair
    with transferd.Client(far.socket) as receiver:
        grant = receiver.alloc(LENGTH).grant(imms=range(IMMS))
        senders = [
            Sender(daemon, grant.descriptor, count, seeded.getrandbits(32))
            for daemon in (near, near, far, near)
        ]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
            assert sender.failure is None, sender.failure
        total = sum((sender.sent for sender in senders), Counter())
        assert total.total() == count * len(senders)
        for imm in range(IMMS):
            receiver.counter(imm).wait(total[imm], WAIT_S)
            assert tuple(receiver.counter(imm).read()) == (total[imm], 0, 0, 0)


@given(batches=st.lists(st.lists(st.integers(0, IMMS - 1), max_size=40), max_size=6))
@settings(
    max_examples=25,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_batches(shared_pair: Pair, batches: list[list[int]]) -> None:
    """A value only grows, by exactly what was sent, and waits for a lower target end at once."""
    near, far = shared_pair
    with transferd.Client(far.socket) as receiver, transferd.Client(near.socket) as sender:
        grant = receiver.alloc(4096).grant(imms=range(IMMS))
        expected: Counter[int] = Counter()
        for batch in batches:
            jobs = sender.submit([transferd.Imm(dst=grant.descriptor, imm=imm) for imm in batch])
            expected.update(batch)
            for imm in range(IMMS):
                receiver.counter(imm).wait(expected[imm], WAIT_S)
                receiver.counter(imm).wait(max(0, expected[imm] - 1), 0)
                assert receiver.counter(imm).value == expected[imm]
            assert {job.wait(WAIT_S) for job in jobs} <= {JobStatus.OK}
        for imm in range(IMMS):
            with pytest.raises(transferd.WaitTimeout):
                receiver.counter(imm).wait(expected[imm] + 1, 0)
