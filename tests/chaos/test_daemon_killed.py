# SPDX-License-Identifier: Apache-2.0
"""Daemons killed and frozen in the middle of a transfer: both sides learn it within the bound."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from typing import TYPE_CHECKING

import pytest

import transferd
from transferd.native.names import JobStatus

from support.actor import Actor
from support.daemon import stopped
from support.levels import back_to, level
from support.waiting import WAIT_S, eventually

if TYPE_CHECKING:
    from conftest import MakeDaemon

    from support.daemon import DaemonProcess

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

LENGTH = 64 << 20
IMM = 1
JOBS = 30
HEARTBEAT = {"interval": 0.25, "timeout": 2.0}
SILENCE_S = HEARTBEAT["timeout"]
SLACK_S = 1.5  # two cores, shared with others
OWN_DAEMON_S = 1.0  # a client learns within this that its own daemon is gone


@pytest.fixture
def pair(make_daemon: MakeDaemon) -> Pair:
    return make_daemon(heartbeat=HEARTBEAT), make_daemon(heartbeat=HEARTBEAT)


class Waiting:
    """A thread that waits for a counter; tells how that ended, and when."""

    def __init__(self, counter: transferd.Counter) -> None:
        self.error: BaseException | None = None
        self.ended_s = 0.0
        self._thread = threading.Thread(target=self._run, args=(counter,))
        self._thread.start()

    def _run(self, counter: transferd.Counter) -> None:
        try:
            counter.wait(1 << 40, 2 * WAIT_S)
        except transferd.TransferdError as error:
            self.error = error
        self.ended_s = time.monotonic()

    def end(self) -> BaseException | None:
        self._thread.join(2 * WAIT_S)
        assert not self._thread.is_alive()
        return self.error


def bulk(
    sender: transferd.Client, source: transferd.Region, descriptor: bytes
) -> list[transferd.Job]:
    """Puts many bytes in flight; the first have landed when it returns."""
    sender.warm(descriptor)
    jobs = [sender.write(source, descriptor, imm=IMM) for _ in range(JOBS)]
    assert sender.imm(descriptor, IMM, priority="latency").wait(WAIT_S) is JobStatus.OK
    return jobs


def ends(jobs: list[transferd.Job]) -> set[JobStatus]:
    """Waits until all have ended."""
    for job in jobs:
        with contextlib.suppress(transferd.JobFailed):
            job.wait(WAIT_S)
    return {job.status for job in jobs}


def moves(sender: transferd.Client, receiver: transferd.Client, length: int = 1 << 20) -> None:
    """Proves that the way between two clients is whole, at once and with a fresh descriptor."""
    source, target = sender.alloc(length), receiver.alloc(length)
    source.view[:] = os.urandom(length)
    grant = target.grant(imms=[IMM])
    counter = receiver.counter(IMM)
    landed = counter.value
    assert sender.write(source, grant.descriptor, imm=IMM).wait(WAIT_S) is JobStatus.OK
    counter.wait(landed + 1, WAIT_S)
    assert hashlib.sha256(source.view).digest() == hashlib.sha256(target.view).digest()
    target.close()
    source.close()


def test_receivers_daemon_killed(pair: Pair) -> None:
    near, far = pair
    with transferd.Client(near.socket) as sender, transferd.Client(far.socket) as receiver:
        source = sender.alloc(LENGTH)
        grant = receiver.alloc(LENGTH).grant(imms=[IMM])
        waiting = Waiting(receiver.counter(IMM))
        before = level(near)
        jobs = bulk(sender, source, grant.descriptor)
        far.kill()
        killed_s = time.monotonic()
        assert ends(jobs) <= {JobStatus.OK, JobStatus.PEER_LOST}
        assert time.monotonic() - killed_s < SILENCE_S + SLACK_S
        assert jobs[-1].status is JobStatus.PEER_LOST
        assert isinstance(waiting.end(), transferd.Unavailable)
        assert waiting.ended_s - killed_s < OWN_DAEMON_S + SLACK_S
        # While it is down: refused by name, within a bound.
        with pytest.raises(transferd.PeerLost) as lost:
            sender.write(source, grant.descriptor, imm=IMM).wait(WAIT_S)
        assert far.peer_address in str(lost.value) or "lost" in str(lost.value)
        back_to(near, before)

        far.restart()
        with transferd.Client(far.socket) as again:
            started_s = time.monotonic()
            moves(sender, again)
            assert time.monotonic() - started_s < SLACK_S  # at once, not after a pause
            with pytest.raises(transferd.StaleDescriptor) as stale:
                sender.write(source, grant.descriptor, imm=IMM).wait(WAIT_S)
            assert "new one" in str(stale.value)
            assert stale.value.reason in {"STALE_DESCRIPTOR", "STALE"}


def test_old_descriptor_first_after_a_restart(pair: Pair) -> None:
    """Who only knows the old descriptor is told STALE, whatever was known of the peer."""
    near, far = pair
    with transferd.Client(near.socket) as sender:
        source = sender.alloc(4096)
        with transferd.Client(far.socket) as receiver:
            old = receiver.alloc(4096).grant(imms=[IMM]).descriptor
            assert sender.write(source, old, imm=IMM).wait(WAIT_S) is JobStatus.OK
            far.kill()
        far.restart()

        def refused() -> bool:
            try:
                sender.write(source, old, imm=IMM).wait(WAIT_S)
            except transferd.StaleDescriptor:
                return True
            except transferd.PeerLost:
                return False  # the loss itself, told once
            raise AssertionError("a write by the old descriptor went through")

        eventually(refused, "told STALE", SILENCE_S + SLACK_S)
        with transferd.Client(far.socket) as again:
            moves(sender, again)


def test_senders_daemon_killed(pair: Pair) -> None:
    near, far = pair
    with transferd.Client(far.socket) as receiver:
        counter = receiver.counter(IMM)
        region = receiver.alloc(LENGTH)
        grant = region.grant(imms=[IMM])
        before = level(far)
        with transferd.Client(near.socket) as sender:
            source = sender.alloc(LENGTH)
            jobs = bulk(sender, source, grant.descriptor)
            waiting = Waiting(counter)
            own = Waiting(sender.counter(IMM))
            near.kill()
            killed_s = time.monotonic()
            # Its own clients: everything that waits is told, and so is every later call.
            with pytest.raises(transferd.Unavailable):
                jobs[-1].wait(WAIT_S)
            assert time.monotonic() - killed_s < OWN_DAEMON_S + SLACK_S
            assert isinstance(own.end(), transferd.Unavailable)
            assert own.ended_s - killed_s < OWN_DAEMON_S + SLACK_S
            with pytest.raises(transferd.Unavailable):
                sender.write(source, grant.descriptor, imm=IMM)
            with pytest.raises(transferd.Unavailable):
                sender.alloc(4096)
        # The receiver: a fault, not an endless wait.
        assert isinstance(waiting.end(), transferd.CounterFault)
        assert waiting.ended_s - killed_s < SILENCE_S + SLACK_S
        counter.acknowledge()
        back_to(far, before)
        near.restart()
        with transferd.Client(near.socket) as sender:
            moves(sender, receiver)
            # The grant is the receiver's own: it outlives whoever used it.
            source = sender.alloc(4096)
            assert sender.write(source, grant.descriptor, imm=IMM).wait(WAIT_S) is JobStatus.OK


def test_receivers_daemon_frozen(pair: Pair) -> None:
    near, far = pair
    with transferd.Client(near.socket) as sender, transferd.Client(far.socket) as receiver:
        source = sender.alloc(LENGTH)
        grant = receiver.alloc(LENGTH).grant(imms=[IMM])
        jobs = bulk(sender, source, grant.descriptor)
        with stopped(far):
            frozen_s = time.monotonic()
            assert ends(jobs) <= {JobStatus.OK, JobStatus.PEER_LOST}
            assert time.monotonic() - frozen_s < SILENCE_S + SLACK_S
            assert jobs[-1].status is JobStatus.PEER_LOST
            # Whoever does not need it is not held up by it.
            with transferd.Client(near.socket) as neighbour:
                moves(sender, neighbour)
        # It thaws, and is the same daemon with the same grants.
        with transferd.Client(far.socket) as again:
            moves(sender, again)
        with pytest.raises(transferd.CounterFault):
            receiver.counter(IMM).wait(1 << 40, WAIT_S)
        receiver.counter(IMM).acknowledge()
        assert sender.write(source, grant.descriptor, imm=IMM).wait(WAIT_S) is JobStatus.OK


@pytest.mark.long
def test_senders_daemon_frozen(pair: Pair) -> None:
    near, far = pair
    with (
        transferd.Client(far.socket) as receiver,
        Actor("send", near.socket, LENGTH, IMM, receiver.alloc(LENGTH).grant(imms=[IMM]).descriptor)
        as sender,
    ):  # fmt: skip
        sender.sending()
        with stopped(near):
            frozen_s = time.monotonic()
            with pytest.raises(transferd.CounterFault):
                receiver.counter(IMM).wait(1 << 40, WAIT_S)
            assert time.monotonic() - frozen_s < SILENCE_S + SLACK_S
            # Nothing more lands by it after it has thawed, until it has begun anew.
            receiver.counter(IMM).acknowledge()
        with transferd.Client(near.socket) as again:
            moves(again, receiver)


@pytest.mark.long
def test_daemon_killed_again_and_again(pair: Pair) -> None:
    """A peer that keeps dying is reached at once each time; nothing piles up at the survivor."""
    near, far = pair
    with transferd.Client(near.socket) as sender:
        source = sender.alloc(4096)
        levels = []
        for _ in range(4):
            with transferd.Client(far.socket) as receiver:
                grant = receiver.alloc(4096).grant(imms=[IMM])
                assert sender.write(source, grant.descriptor, imm=IMM).wait(WAIT_S) is JobStatus.OK
                levels.append(level(near))
                far.kill()
            far.restart()
        # The second time is the measure: by then everything was made once.
        assert not levels[-1].above(levels[1])


@pytest.mark.long
def test_clean_stop_under_load(pair: Pair) -> None:
    near, far = pair
    with transferd.Client(near.socket) as sender, transferd.Client(far.socket) as receiver:
        source = sender.alloc(LENGTH)
        grant = receiver.alloc(LENGTH).grant(imms=[IMM])
        jobs = bulk(sender, source, grant.descriptor)
        assert far.stop() == 0, far.log()
        assert ends(jobs) <= {
            JobStatus.OK, JobStatus.CANCELLED, JobStatus.PEER_LOST, JobStatus.INVALID,
        }  # fmt: skip
        assert jobs[-1].status is not JobStatus.OK
        with pytest.raises(transferd.Unavailable):
            receiver.counter(IMM).wait(1 << 40, WAIT_S)
        far.start()
        with transferd.Client(far.socket) as again:
            moves(sender, again)
