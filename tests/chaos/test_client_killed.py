# SPDX-License-Identifier: Apache-2.0
"""Clients killed with SIGKILL in the middle of a transfer; nobody else notices, nothing is left."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

import transferd
from transferd.native.names import JobStatus

from support.actor import Actor
from support.bystander import Bystander
from support.levels import back_to, level
from support.waiting import WAIT_S

if TYPE_CHECKING:
    from support.daemon import DaemonProcess

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(240)]

TIMES = 10
LENGTH = 64 << 20
IMM = 1


def test_sender_killed(shared_pair: Pair) -> None:
    near, far = shared_pair
    with Bystander(near, far) as bystander, transferd.Client(far.socket) as receiver:
        region = receiver.alloc(LENGTH)
        counter = receiver.counter(IMM)

        def kill_one() -> None:
            grant = region.grant(imms=[IMM])
            with Actor("send", near.socket, LENGTH, IMM, grant.descriptor) as sender:
                sender.sending()
                sender.kill()
            # It is told, not left to wait for ever.
            with pytest.raises(transferd.CounterFault) as caught:
                counter.wait(1 << 40, WAIT_S)
            assert caught.value.faults > 0
            counter.acknowledge()
            grant.revoke()
            bystander.check()

        kill_one()  # what is made once and kept, as connections to the peer, is there after this
        before = level(near), level(far)
        for _ in range(TIMES):
            kill_one()
            back_to(near, before[0])
            back_to(far, before[1])


def test_sender_killed_and_the_grant_goes_on(shared_pair: Pair) -> None:
    near, far = shared_pair
    with transferd.Client(far.socket) as receiver, transferd.Client(near.socket) as other:
        region = receiver.alloc(LENGTH)
        grant = region.grant(imms=[IMM])
        counter = receiver.counter(IMM)
        source = other.alloc(4096)
        assert other.write(source, grant.descriptor, imm=IMM).wait(WAIT_S) is JobStatus.OK
        with Actor("send", near.socket, LENGTH, IMM, grant.descriptor) as sender:
            sender.sending()
        with pytest.raises(transferd.CounterFault):
            counter.wait(1 << 40, WAIT_S)
        # The same grant, the same immediate, by whoever else holds the descriptor.
        counter.acknowledge()
        landed = counter.value
        assert other.write(source, grant.descriptor, imm=IMM).wait(WAIT_S) is JobStatus.OK
        counter.wait(landed + 1, WAIT_S)


def test_receiver_killed(shared_pair: Pair) -> None:
    near, far = shared_pair
    with Bystander(near, far) as bystander, transferd.Client(near.socket) as sender:
        source = sender.alloc(LENGTH)

        def kill_one() -> None:
            with Actor("receive", far.socket, LENGTH, IMM) as receiver:
                descriptor = receiver.descriptor()
                sender.warm(descriptor)
                jobs = [sender.write(source, descriptor, imm=IMM) for _ in range(30)]
                # Bulk jobs share the path, so that all of them are in flight when this one is back.
                assert sender.imm(descriptor, IMM, priority="latency").wait(WAIT_S) is JobStatus.OK
                receiver.kill()
            for job in jobs:  # each ends, within the bound
                with contextlib.suppress(transferd.JobFailed):
                    job.wait(WAIT_S)
            ends = {job.status for job in jobs}
            assert ends <= {JobStatus.OK, JobStatus.CANCELLED, JobStatus.INVALID}, ends
            assert jobs[-1].status is not JobStatus.OK
            with pytest.raises(transferd.TransferdError) as caught:
                sender.write(source, descriptor, imm=IMM).wait(WAIT_S)
            assert "REVOKED" in caught.value.reason
            bystander.check()

        kill_one()
        before = level(near), level(far)
        for _ in range(TIMES):
            kill_one()
            back_to(near, before[0])
            back_to(far, before[1])


@pytest.mark.parametrize("role", ["send", "receive"])
def test_both_on_one_daemon(shared_pair: Pair, role: str) -> None:
    """The same within a daemon, where no peer stands between."""
    daemon, _ = shared_pair
    with Bystander(daemon, daemon) as bystander, transferd.Client(daemon.socket) as survivor:
        region = survivor.alloc(LENGTH)
        bystander.check()
        before = level(daemon)
        if role == "send":
            grant = region.grant(imms=[IMM])
            with Actor("send", daemon.socket, LENGTH, IMM, grant.descriptor) as actor:
                actor.sending()
            with pytest.raises(transferd.CounterFault):
                survivor.counter(IMM).wait(1 << 40, WAIT_S)
            grant.revoke()
        else:
            with Actor("receive", daemon.socket, LENGTH, IMM) as actor:
                descriptor = actor.descriptor()
                survivor.warm(descriptor)
                jobs = [survivor.write(region, descriptor, imm=IMM) for _ in range(30)]
                survivor.imm(descriptor, IMM, priority="latency").wait(WAIT_S)
            for job in jobs:
                with contextlib.suppress(transferd.JobFailed):
                    job.wait(WAIT_S)
            assert jobs[-1].status is not JobStatus.OK
        bystander.check()
        back_to(daemon, before)
