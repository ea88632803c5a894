# SPDX-License-Identifier: Apache-2.0
"""GPU memory between processes in namespaces of their own, with a driver of host memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import transferd
from transferd import JobStatus

from support import cuda_peer, pods
from support.cuda_memory import granted, memory
from support.waiting import WAIT_S

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from support.daemon import DaemonProcess
    from support.fakecuda import FakeCuda

pytestmark = pytest.mark.slow

LENGTH = 5 << 20  # more than two chunks
OK = JobStatus.OK


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    pods.prefix()
    with tempfile.TemporaryDirectory(prefix="tfd-") as folder:
        made = pods.PodsDaemon(Path(folder))
        try:
            yield made
        finally:
            made.kill()


def test_chunks_go_from_pod_to_pod(daemon: DaemonProcess, seeded: random.Random) -> None:
    """They have no process, IPC object or shared memory in common, only the daemon's socket."""
    socket, prefix = daemon.start().socket, pods.prefix()
    data = seeded.randbytes(1000)
    with (
        cuda_peer.running(socket, "fake-vmm", LENGTH, prefix) as one,
        cuda_peer.running(socket, "fake-vmm", LENGTH, prefix) as two,
    ):
        for writer, reader in ((one, two), (two, one)):
            writer.ask("fill", LENGTH - 1000, data.hex())
            assert writer.ask("write", reader.descriptor.hex()) == "cuda, 1 rail"
            assert reader.ask("wait", 1, 1) == 1
            assert reader.bytes_at(LENGTH - 1000, 1000) == data
        assert two.ask("revoke") == "OK"
        assert one.ask("write", two.descriptor.hex()) != "cuda, 1 rail"


def test_a_daemon_that_sees_no_process_ids(
    daemon: DaemonProcess, cuda: FakeCuda, seeded: random.Random
) -> None:
    """In a process namespace of its own it does not know who of its clients are one process."""
    daemon.prefix = [*pods.prefix()]
    cuda.opens_own = False
    source = memory(cuda, seeded)
    with transferd.Client(daemon.start().socket) as one, transferd.Client(daemon.socket) as two:
        target, _, grant = granted(two, cuda)
        job = one.write(one.register(source), grant.descriptor, imm=1)
        assert job.wait(WAIT_S) is OK
        assert str(job.path) == "cuda, 1 rail"
        assert target.view == source.view
        own = one.register(memory(cuda)).grant(rights={"write", "map"}, imms=range(2))
        assert one.write(one.register(source), own.descriptor, imm=1).wait(WAIT_S) is OK
