# SPDX-License-Identifier: Apache-2.0
"""Clients killed with SIGKILL while jobs and launches of plans wait; nothing starts afterwards."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    "place", ["other daemon", pytest.param("same daemon", marks=pytest.mark.long)]
)
def test_a_client_with_armed_jobs_is_killed(shared_pair: Pair, place: str) -> None:
    near = shared_pair[0]
    far = shared_pair[1] if place == "other daemon" else near
    with Bystander(near, far) as bystander, transferd.Client(far.socket) as receiver:
        region = receiver.alloc(LENGTH)
        counter = receiver.counter(IMM)

        def kill_one() -> None:
            grant = region.grant(imms=[IMM])
            with Actor("arm", near.socket, LENGTH, IMM, grant.descriptor) as sender:
                sender.sending()  # some have started, most wait
                sender.kill()
            with pytest.raises(transferd.CounterFault) as caught:  # whoever waits for them is told
                counter.wait(1 << 40, WAIT_S)
            assert caught.value.faults > 0
            grant.revoke()
            counter.acknowledge()
            bystander.check()

        kill_one()
        before = level(near), level(far)
        for _ in range(TIMES):
            kill_one()
            back_to(near, before[0])
            back_to(far, before[1])


def test_the_receiver_of_armed_jobs_is_killed(shared_pair: Pair) -> None:
    near, far = shared_pair
    with Bystander(near, far) as bystander, transferd.Client(near.socket) as sender:
        source = sender.alloc(4096)

        def kill_one() -> None:
            with (
                Actor("receive", far.socket, 4096, IMM) as receiver,
                sender.watcher() as watcher,
            ):
                descriptor = receiver.descriptor()
                job = transferd.Write(src=source, dst=descriptor, imm=IMM)
                waiting = [sender.arm(watcher, 1, job) for _ in range(30)]
                assert sender.imm(descriptor, IMM).wait(WAIT_S) is JobStatus.OK
                receiver.kill()
                for one in waiting:  # each ends, though nobody bumps
                    with pytest.raises(transferd.JobFailed):
                        one.wait(WAIT_S)
                assert {one.status for one in waiting} == {JobStatus.CANCELLED}
            bystander.check()

        kill_one()
        before = level(near), level(far)
        for _ in range(TIMES):
            kill_one()
            back_to(near, before[0])
            back_to(far, before[1])
