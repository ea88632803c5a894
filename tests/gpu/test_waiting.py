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
from support.waiting import WAIT_S, eventually

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


def threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


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
            # The driver closes an IPC handle when no stream of the context waits.
            assert peer.ask("revoke") == ("STILL_MAPPED" if kind == "malloc" else "OK")
            host = sender.alloc(4096)
            grant = receiver.alloc(4096).grant(imms=range(4))
            assert sender.write(host, grant.descriptor, imm=2).wait(WAIT_S) is OK
        eventually(lambda: peer.ask("revoke") == "OK", "it is given back", TEST_WAIT_S)


@pytest.mark.parametrize("kind", ["malloc", "vmm"])
def test_memory_is_mapped_while_a_stream_waits(
    gpu: Gpu, sender: Client, receiver: Client, shared_pair: Daemons, kind: str
) -> None:
    source = sender.register(gpu.malloc(4 * MIB))
    results = []
    with cuda_peer.running(shared_pair[0].socket, kind, 4 * MIB) as peer:

        def write() -> None:
            results.append(sender.write(source, peer.descriptor, imm=1).wait(WAIT_S))

        thread = threading.Thread(target=write, daemon=True)
        with waiting_copy(gpu, sender, receiver):
            thread.start()
            thread.join(TEST_WAIT_S)
            assert results == [OK]


def test_a_client_closes_while_the_stream_of_another_waits(
    gpu: Gpu, sender: Client, receiver: Client, shared_pair: Daemons
) -> None:
    other = transferd.Client(shared_pair[0].socket)
    grant = receiver.register(gpu.malloc(4096)).grant(rights=MAP, imms=range(4))
    copy = other.write(other.register(gpu.malloc(4096)), grant.descriptor, imm=1)
    assert copy.wait(WAIT_S) is OK
    closing = threading.Thread(target=other.close, daemon=True)
    with waiting_copy(gpu, sender, receiver):
        closing.start()
        closing.join(TEST_WAIT_S)
        assert not closing.is_alive(), "closing waits for the other's stream"
        left = threads("transferd-cuda-end")
        assert left, "unregistering waits for it"
    for thread in left:
        thread.join(TEST_WAIT_S)
        assert not thread.is_alive(), "it ends with the stream's wait"
