# SPDX-License-Identifier: Apache-2.0
"""Senders, receivers and daemons of mailboxes killed with SIGKILL; messages arrive once or not."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest

import transferd
from transferd.native.names import JobStatus

from support.actor import Actor
from support.levels import back_to, level
from support.waiting import WAIT_S, eventually

if TYPE_CHECKING:
    from conftest import MakeDaemon

    from support.daemon import DaemonProcess

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(240)]

TIMES = 5
BYTES = 1024
JOBS = 40


def number_of(message: bytes) -> int:
    assert message[8:] == b"m" * (BYTES - 8)
    return int.from_bytes(message[:8], "little")


@pytest.mark.parametrize("place", ["other daemon", "same daemon"])
def test_sender_killed(shared_pair: Pair, place: str) -> None:
    """Its messages came once; the mailbox goes on for others, also when it was full."""
    near, far = shared_pair
    daemon = near if place == "same daemon" else far
    with (
        transferd.Client(daemon.socket) as receiver,
        transferd.Client(near.socket) as other,
        receiver.mailbox(slots=2, slot_bytes=BYTES) as mailbox,
    ):
        before = None
        for _ in range(TIMES):
            with Actor("send messages", near.socket, BYTES, 0, mailbox.descriptor) as sender:
                sender.sending()
                numbers = [number_of(mailbox.receive(WAIT_S)) for _ in range(10)]
                sender.kill()
            waiting = other.send(mailbox.descriptor, b"from another")
            message = mailbox.receive(WAIT_S)
            while message != b"from another":
                numbers.append(number_of(message))
                message = mailbox.receive(WAIT_S)
            assert waiting.wait(WAIT_S) is JobStatus.OK
            while True:  # what was in a slot when it died
                try:
                    numbers.append(number_of(mailbox.receive(0)))
                except transferd.WaitTimeout:
                    break
            assert len(numbers) == len(set(numbers))
            if before is None:
                before = level(near), level(far)
            back_to(near, before[0])
            back_to(far, before[1])


def _two_have_ended(jobs: list[transferd.Job]) -> bool:
    return sum(job.done() for job in jobs) == 2


@pytest.mark.parametrize("place", ["other daemon", "same daemon"])
def test_receiver_killed(shared_pair: Pair, place: str) -> None:
    """Those who wait for a slot learn it; nothing is left."""
    near, far = shared_pair
    daemon = near if place == "same daemon" else far
    with transferd.Client(near.socket) as sender:
        before = None
        for _ in range(TIMES):
            with Actor("mailbox", daemon.socket, BYTES) as receiver:
                descriptor = receiver.descriptor()
                jobs = [sender.send(descriptor, bytes(BYTES)) for _ in range(JOBS)]
                eventually(functools.partial(_two_have_ended, jobs), "the slots are full")
                delivered = [job for job in jobs if job.done()]
                receiver.kill()
            ends = []
            for job in jobs:
                if job in delivered:
                    continue
                with pytest.raises(transferd.JobFailed) as caught:
                    job.wait(WAIT_S)
                ends.append((caught.value.status, caught.value.detail))
            assert [job.status for job in delivered] == [JobStatus.OK] * 2
            assert set(ends) == {(JobStatus.CANCELLED, "REVOKED")}
            with pytest.raises(transferd.TransferdError) as gone:
                sender.send(descriptor, b"").wait(WAIT_S)
            assert "REVOKED" in gone.value.reason
            if before is None:
                before = level(near), level(far)
            back_to(near, before[0])
            back_to(far, before[1])


@pytest.mark.parametrize("victim", ["sender's", pytest.param("receiver's", marks=pytest.mark.long)])
def test_daemon_killed(make_daemon: MakeDaemon, victim: str) -> None:
    """The other side's jobs and mailbox learn it, and work with the daemon that comes next."""
    heartbeat = {"interval": 0.25, "timeout": 2.0}
    near, far = make_daemon(heartbeat=heartbeat), make_daemon(heartbeat=heartbeat)
    with transferd.Client(near.socket) as sender, transferd.Client(far.socket) as receiver:
        mailbox = receiver.mailbox(slots=2, slot_bytes=BYTES)
        jobs = [sender.send(mailbox.descriptor, b"%d" % i) for i in range(JOBS)]
        first = mailbox.receive(WAIT_S)
        if victim == "sender's":
            near.kill()
            for job in jobs:
                try:
                    assert job.wait(WAIT_S) is JobStatus.OK
                except transferd.Unavailable:
                    continue
            messages = {first}
            while True:
                try:
                    message = mailbox.receive(0)
                except transferd.WaitTimeout:
                    break
                assert message not in messages
                messages.add(message)
            near.start()
            with transferd.Client(near.socket) as again:
                job = again.send(mailbox.descriptor, b"again")
                while (message := mailbox.receive(WAIT_S)) != b"again":
                    assert message not in messages
                assert job.wait(WAIT_S) is JobStatus.OK
        else:
            # Its answer may come after the message itself has been seen.
            eventually(lambda: any(job.done() for job in jobs), "no answer has come")
            far.kill()
            ends = set()
            for job in jobs:
                try:
                    ends.add(job.wait(WAIT_S))
                except transferd.JobFailed as error:
                    ends.add(JobStatus(error.status))
            assert ends == {JobStatus.OK, JobStatus.PEER_LOST}
            with pytest.raises(transferd.Unavailable):
                mailbox.receive(WAIT_S)
