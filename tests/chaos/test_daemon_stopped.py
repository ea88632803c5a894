# SPDX-License-Identifier: Apache-2.0
"""A daemon that stands still for a while (SIGSTOP) must not break the fences of the others."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import pytest

import transferd
from transferd.client import JobStatus

from support.bystander import Bystander
from support.daemon import stopped
from support.waiting import eventually

if TYPE_CHECKING:
    from support.daemon import DaemonProcess

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

LENGTH = 8 << 20
WAIT_S = 20.0


def test_revoke_while_the_opener_stands_still(
    daemon_pair: tuple[DaemonProcess, DaemonProcess],
) -> None:
    near, far = daemon_pair
    with transferd.Client(near.socket) as sender, transferd.Client(far.socket) as receiver:
        source = sender.alloc(LENGTH)
        source.view[:] = b"\x01" * LENGTH
        region = receiver.alloc(LENGTH)
        grant = region.grant(imms=[1])
        assert sender.write(source, grant.descriptor, imm=1).wait(WAIT_S) is JobStatus.OK
        source.view[:] = b"\x02" * LENGTH
        jobs = [sender.write(source, grant.descriptor, imm=1) for _ in range(20)]
        with stopped(near):
            started = time.monotonic()
            grant.revoke()
            took = time.monotonic() - started
            assert took < 2.5, f"the fence took {took:.1f} s"
            region.view[:] = b"\x03" * LENGTH
        for job in jobs:
            with contextlib.suppress(transferd.TransferdError):
                job.wait(WAIT_S)
        # What the opener believed before it stood still does not open the way again.
        with pytest.raises(transferd.TransferdError):
            sender.write(source, grant.descriptor, imm=1).wait(WAIT_S)
        assert bytes(region.view) == b"\x03" * LENGTH, "a byte landed after the fence"
        with pytest.raises(transferd.CounterFault):
            receiver.counter(1).wait(1 << 40, WAIT_S)

        again = region.grant(imms=[2])

        def works() -> bool:
            try:
                return sender.write(source, again.descriptor, imm=2).wait(WAIT_S) is JobStatus.OK
            except transferd.PeerLost:
                return False

        eventually(works, "the pair works again", WAIT_S)


def test_fence_while_the_opener_stands_still(
    daemon_pair: tuple[DaemonProcess, DaemonProcess],
) -> None:
    """What it had in flight does not land when it wakes, and the grant lives on."""
    near, far = daemon_pair
    with (
        transferd.Client(near.socket) as sender,
        transferd.Client(far.socket) as receiver,
        Bystander(far, far) as bystander,
    ):
        source = sender.alloc(LENGTH)
        region = receiver.alloc(LENGTH)
        grant = region.grant(imms=[1, 2])
        sender.warm(grant.descriptor)
        source.view[:] = b"\x02" * LENGTH
        jobs = [sender.write(source, grant.descriptor, imm=1) for _ in range(20)]
        # Bulk jobs share the path, so that all of them are in flight when this one is back.
        sender.imm(grant.descriptor, 2, priority="latency").wait(WAIT_S)
        with stopped(near):
            grant.fence([1])
            region.view[:] = b"\x03" * LENGTH
            bystander.check()
        for job in jobs:
            with contextlib.suppress(transferd.TransferdError):
                job.wait(WAIT_S)
        assert jobs[-1].status is JobStatus.PEER_LOST

        def works() -> bool:
            try:
                return sender.imm(grant.descriptor, 2).wait(WAIT_S) is JobStatus.OK
            except transferd.PeerLost:
                return False

        eventually(works, "the same grant works again", WAIT_S)
        assert bytes(region.view) == b"\x03" * LENGTH, "a byte landed after the fence"


def test_both_sides_agree_after_one_stood_still(
    daemon_pair: tuple[DaemonProcess, DaemonProcess],
) -> None:
    """Longer than the heartbeats' timeout: the one forgets, the other has slept through it."""
    near, far = daemon_pair
    with transferd.Client(near.socket) as sender, transferd.Client(far.socket) as receiver:
        source, target = sender.alloc(4096), receiver.alloc(4096)
        there = target.grant(imms=[1])
        back = source.grant(imms=[1])
        assert sender.write(source, there.descriptor, imm=1).wait(WAIT_S) is JobStatus.OK
        assert receiver.write(target, back.descriptor, imm=1).wait(WAIT_S) is JobStatus.OK
        with stopped(near), pytest.raises(transferd.CounterFault):
            receiver.counter(1).wait(100, WAIT_S)
        receiver.counter(1).acknowledge()

        def works(client: transferd.Client, region: transferd.Region, descriptor: bytes) -> bool:
            try:
                return client.write(region, descriptor, imm=1).wait(WAIT_S) is JobStatus.OK
            except transferd.TransferdError:
                return False

        eventually(lambda: works(sender, source, there.descriptor), "there", WAIT_S)
        eventually(lambda: works(receiver, target, back.descriptor), "back", WAIT_S)
        time.sleep(4)  # the heartbeats of the new relation agree, or it would be lost by now
        assert works(sender, source, there.descriptor)
        assert works(receiver, target, back.descriptor)


def test_what_was_closed_or_begun_meanwhile_is_not_lost(daemon: DaemonProcess) -> None:
    """Watchers and plans whose daemon gave no answer in time can all be had again."""
    with transferd.Client(daemon.socket, timeout_s=1) as client:
        grant = client.alloc(4096).grant(imms=[1])
        template = transferd.Imm(dst=grant.descriptor, imm=1)
        watcher, plan = client.watcher(), client.plan(template)
        waiting = client.arm(watcher, 1, plan)
        with stopped(daemon):
            for use in (watcher.close, plan.close, lambda: client.plan(template)):
                with pytest.raises(transferd.WaitTimeout):
                    use()
        assert eventually(waiting.done, "the armed launch ends with its watcher")
        assert waiting.status is JobStatus.CANCELLED
        watcher.close()
        plan.close()
        for make, most in ((client.watcher, 64), (lambda: client.plan(template), 64)):
            made = [make() for _ in range(most)]
            with pytest.raises(transferd.QuotaExceeded):
                make()
            for each in made:
                each.close()
