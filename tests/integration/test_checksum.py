# SPDX-License-Identifier: Apache-2.0
"""``checksum=True``: what is as it should be counts, what is not does not."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

import transferd
from transferd.native.names import JobStatus

if TYPE_CHECKING:
    import random

    from transferd import Client, Region

    from support.daemon import DaemonProcess

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = pytest.mark.slow

WAIT_S = 20.0
LENGTH = 4 << 20
OK = JobStatus.OK


@pytest.fixture(params=["ring", "grpc"])
def shared_memory(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "ring")


def test_every_operation_that_moves_bytes(
    sender: Client, receiver: Client, seeded: random.Random
) -> None:
    source, target = sender.alloc(LENGTH), receiver.alloc(LENGTH)
    source.view[:] = seeded.randbytes(LENGTH)
    dst = target.grant(imms=range(4)).descriptor
    for size in (0, 1, 65_537, LENGTH):
        job = sender.write(source[:size], dst, imm=0, checksum=True, exact=size == 1)
        assert job.wait(WAIT_S) is OK
        assert target.view[:size] == source.view[:size]
    job = sender.write_pages(
        source, [3, 1, 2], dst, [0, 1, 5], 70_000, imm=1, count="page", checksum=True
    )
    assert job.wait(WAIT_S) is OK
    job = sender.scatter(
        source, [(dst, 0, 1 << 20, 1000), (dst, 9, 2 << 20, 0)], imm=2, checksum=True
    )
    assert job.wait(WAIT_S) is OK
    assert target.view[1 << 20 : (1 << 20) + 1000] == source.view[:1000]
    for imm, count in ((0, 4), (1, 3), (2, 2)):
        receiver.counter(imm).wait(count, WAIT_S)
        assert receiver.counter(imm).read() == (count, 0, 0, 0)


def write_until_refused(sender: Client, source: Region, dst: bytes) -> None:
    """Nearly always the first: its bytes land, are spoilt within microseconds, and compared."""
    for _ in range(200):
        sender.write(source, dst, imm=5, checksum=True).wait(WAIT_S)


def test_a_byte_that_changes_on_the_way(
    shared_pair: Pair, receiver: Client, sender: Client
) -> None:
    """The receiver itself goes on writing where a write lands: what is counted is what was sent."""
    source, target = sender.alloc(LENGTH), receiver.alloc(LENGTH)
    dst = target.grant(imms=[5]).descriptor
    spoilt = target.numpy()[LENGTH // 2 : LENGTH // 2 + 64]
    stop = threading.Event()

    def spoil() -> None:
        noise = np.arange(1, 65, dtype=np.uint8)
        while not stop.is_set():
            spoilt[:] = noise

    thread = threading.Thread(target=spoil)
    thread.start()
    try:
        with pytest.raises(transferd.JobFailed) as caught:
            write_until_refused(sender, source, dst)
    finally:
        stop.set()
        thread.join(WAIT_S)
    assert (caught.value.status, caught.value.detail) == (JobStatus.REMOTE_ACCESS, "CHECKSUM")
    counter = receiver.counter(5)
    with pytest.raises(transferd.CounterFault):
        counter.wait(1 << 40, WAIT_S)
    assert counter.lost == 1
    counter.acknowledge()
    landed = counter.value
    assert sender.write(source, dst, imm=5, checksum=True).wait(WAIT_S) is OK
    counter.wait(landed + 1, WAIT_S)
    assert target.view == source.view
