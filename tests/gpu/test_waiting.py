# SPDX-License-Identifier: Apache-2.0
"""While a stream waits on a real GPU: memory is taken back, and another client closes."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

import pytest

import transferd
from transferd import JobStatus, Write

from support import cuda_peer
from support.gpu import TEST_WAIT_S
from support.waiting import WAIT_S

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transferd import Client

    from support.daemon import DaemonProcess
    from support.gpu import Gpu

    Daemons = tuple[DaemonProcess, DaemonProcess]

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

MIB = 1 << 20
MAP = {"write", "map"}
OK, PENDING = JobStatus.OK, JobStatus.PENDING


@contextlib.contextmanager
def waiting_copy(gpu: Gpu, sender: Client, receiver: Client) -> Iterator[None]:
    """A stream of the sender's waits; it goes on at the end, whatever happens."""
    region = sender.register(gpu.malloc(4096))
    grant = receiver.register(gpu.malloc(4096)).grant(rights=MAP, imms=range(4))
    with sender.watcher() as watcher:
        job = sender.arm(watcher, 1, Write(src=region, dst=grant.descriptor, imm=3))
        try:
            yield
            assert job.status is PENDING
        finally:
            watcher.bump()
        assert job.wait(WAIT_S) is OK


@pytest.mark.parametrize("kind", ["malloc", "vmm"])
def test_memory_is_taken_back_while_a_stream_waits(
    gpu: Gpu, sender: Client, receiver: Client, shared_pair: Daemons, kind: str
) -> None:
    source = sender.register(gpu.malloc(4 * MIB))
    with cuda_peer.running(shared_pair[0].socket, kind, 4 * MIB) as peer:
        assert sender.write(source, peer.descriptor, imm=1).wait(WAIT_S) is OK
        with waiting_copy(gpu, sender, receiver):
            assert peer.ask("revoke") == "OK"


def test_a_client_closes_while_the_stream_of_another_waits(
    gpu: Gpu, sender: Client, receiver: Client, shared_pair: Daemons
) -> None:
    other = transferd.Client(shared_pair[0].socket)
    grant = receiver.register(gpu.malloc(4096)).grant(rights=MAP, imms=range(4))
    copy = other.write(other.register(gpu.malloc(4096)), grant.descriptor, imm=1)
    assert copy.wait(WAIT_S) is OK
    closing = threading.Thread(target=other.close, daemon=True)
    try:
        with waiting_copy(gpu, sender, receiver):
            closing.start()
            closing.join(TEST_WAIT_S)
            assert not closing.is_alive(), "closing waits for the other's stream"
    finally:
        closing.join(TEST_WAIT_S)
