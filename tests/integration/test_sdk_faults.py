# SPDX-License-Identifier: Apache-2.0
"""The SDK when daemons and clients die."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

import transferd
from transferd.native.names import JobStatus

if TYPE_CHECKING:
    from support.daemon import DaemonProcess

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

WAIT_S = 20.0
LENGTH = 64 << 20
MIDDLE_S = 0.1  # 50 writes of it take about ten times as long


def test_receivers_daemon_dies_in_mid_transfer(
    daemon_pair: tuple[DaemonProcess, DaemonProcess],
) -> None:
    near, far = daemon_pair
    with transferd.Client(near.socket) as sender, transferd.Client(far.socket) as receiver:
        source = sender.alloc(LENGTH)
        grant = receiver.alloc(LENGTH).grant(imms=[1])
        sender.warm(grant.descriptor)
        waited: list[BaseException] = []

        def wait() -> None:
            try:
                receiver.counter(1).wait(1000)
            except transferd.Unavailable as error:
                waited.append(error)

        waiter = threading.Thread(target=wait)
        waiter.start()
        jobs = [sender.write(source, grant.descriptor, imm=1) for _ in range(50)]
        time.sleep(MIDDLE_S)
        far.kill()
        killed = time.monotonic()
        waiter.join(WAIT_S)
        assert waited
        assert time.monotonic() - killed < 1.5
        for job in jobs:
            with contextlib.suppress(transferd.PeerLost):
                job.wait(WAIT_S)
        ends = [job.status for job in jobs]
        assert set(ends) <= {JobStatus.OK, JobStatus.PEER_LOST}
        assert ends[-1] is JobStatus.PEER_LOST
        far.restart()
        with pytest.raises((transferd.StaleDescriptor, transferd.PeerLost)):
            sender.write(source, grant.descriptor, imm=1).wait(WAIT_S)
        with transferd.Client(far.socket) as again:
            fresh = again.alloc(LENGTH).grant(imms=[1])
            assert sender.write(source, fresh.descriptor, imm=1).wait(WAIT_S) is JobStatus.OK
            again.counter(1).wait(1, WAIT_S)
            # Of another epoch: told by its name now that the owner answers.
            with pytest.raises(transferd.StaleDescriptor):
                sender.write(source, grant.descriptor, imm=1).wait(WAIT_S)


def test_own_daemon_dies(daemon: DaemonProcess) -> None:
    with transferd.Client(daemon.socket) as client:
        region = client.alloc(4096)
        grant = region.grant(imms=[1])
        assert client.write(region, grant.descriptor, imm=1).wait(WAIT_S) is JobStatus.OK
        counter = client.counter(1)
        killer = threading.Timer(0.1, daemon.kill)
        killer.start()
        started = time.monotonic()
        with pytest.raises(transferd.Unavailable):
            counter.wait(2, WAIT_S)
        assert time.monotonic() - started < 1.2
        with pytest.raises(transferd.Unavailable):
            client.write(region, grant.descriptor, imm=1)
        with pytest.raises(transferd.Unavailable):
            client.alloc(4096)
        assert counter.value == 1
    killer.join()
    daemon.restart()
    with transferd.Client(daemon.socket) as client:
        client.alloc(4096)


def test_daemon_stops_cleanly_under_a_client(daemon: DaemonProcess) -> None:
    with transferd.Client(daemon.socket) as client:
        counter = client.counter(1)
        stopper = threading.Timer(0.1, daemon.stop)
        stopper.start()
        with pytest.raises(transferd.Unavailable):
            counter.wait(1, WAIT_S)
    stopper.join()
    daemon.start()


SENDER = """
import sys, transferd
c = transferd.Client(sys.argv[1])
r = c.alloc(64 << 20)
d = bytes.fromhex(sys.argv[2])
c.warm(d)
while True:
    jobs = [c.write(r, d, imm=1) for _ in range(4)]
    print("sending", flush=True)
    for j in jobs: j.wait()
"""


@pytest.mark.parametrize("again", range(3))
def test_sender_killed_in_mid_transfer(
    daemon_pair: tuple[DaemonProcess, DaemonProcess], again: int
) -> None:
    del again
    near, far = daemon_pair
    with transferd.Client(far.socket) as receiver, transferd.Client(near.socket) as bystander:
        region = receiver.alloc(LENGTH)
        grant, others = region.grant(imms=range(4)), region.grant(imms=range(4, 8))
        source = bystander.alloc(4096)
        process = subprocess.Popen(
            [sys.executable, "-c", SENDER, near.socket, grant.descriptor.hex()],
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
        process.wait()
        process.stdout.close()
        with pytest.raises(transferd.CounterFault):
            receiver.counter(1).wait(1 << 40, WAIT_S)
        # Neither the receiver nor the other client of the sender's daemon is harmed.
        assert bystander.write(source, others.descriptor, imm=4).wait(WAIT_S) is JobStatus.OK
        receiver.counter(4).wait(1, WAIT_S)
        assert receiver.counter(4).faults == 0


RECEIVER = """
import sys, transferd
c = transferd.Client(sys.argv[1])
r = c.alloc(64 << 20)
print(r.grant(imms=range(4)).descriptor.hex(), flush=True)
c.counter(1).wait(1 << 40)
"""


@pytest.mark.parametrize("again", range(3))
def test_receiver_killed_in_mid_transfer(
    daemon_pair: tuple[DaemonProcess, DaemonProcess], again: int
) -> None:
    del again
    near, far = daemon_pair
    with transferd.Client(near.socket) as sender, transferd.Client(far.socket) as bystander:
        process = subprocess.Popen(
            [sys.executable, "-c", RECEIVER, far.socket], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        descriptor = bytes.fromhex(process.stdout.readline().decode())
        process.stdout.close()
        source = sender.alloc(LENGTH)
        sender.warm(descriptor)
        jobs = [sender.write(source, descriptor, imm=1) for _ in range(50)]
        time.sleep(MIDDLE_S)
        process.kill()
        process.wait()
        for job in jobs:
            with contextlib.suppress(transferd.JobFailed):
                job.wait(WAIT_S)
        assert jobs[-1].status is not JobStatus.OK
        grant = bystander.alloc(4096).grant(imms=[1])
        assert sender.write(source[:4096], grant.descriptor, imm=1).wait(WAIT_S) is JobStatus.OK
        bystander.counter(1).wait(1, WAIT_S)


def test_sessions_leave_nothing_in_the_daemon(daemon: DaemonProcess) -> None:
    def cycle() -> None:
        with transferd.Client(daemon.socket) as client:
            region = client.alloc(1 << 16)
            grant = region.grant(imms=range(4))
            client.write(region, grant.descriptor, imm=1).wait(WAIT_S)

    def held() -> tuple[int, int]:
        status = daemon.status()
        return status.sessions, status.regions

    for _ in range(20):
        cycle()
    deadline = time.monotonic() + WAIT_S
    while held() != (0, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert held() == (0, 0)
