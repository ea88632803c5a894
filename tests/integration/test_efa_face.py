# SPDX-License-Identifier: Apache-2.0
"""Two daemons on EFA's face: unordered rails, a device that is often full."""

from __future__ import annotations

import ctypes.util
from typing import TYPE_CHECKING

import pytest

import transferd
from transferd.native.names import JobStatus

from support.efaface import face_config

if TYPE_CHECKING:
    import random

    from conftest import MakeDaemon

    from transferd import Client, Grant, Region

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ctypes.util.find_library("fabric"), reason="needs libfabric1"),
]

WAIT_S = 30.0
LENGTH = 4 << 20


def granted(client: Client) -> tuple[Region, Grant]:
    region = client.alloc(LENGTH)
    return region, region.grant(imms=range(16))


def check_writes(sender: Client, receiver: Client, seeded: random.Random) -> None:
    """Writes of several pieces, and pages: counts are exact, and behind their bytes."""
    source = sender.alloc(LENGTH)
    source.view[:] = seeded.randbytes(LENGTH)
    target, grant = granted(receiver)
    counter = receiver.counter(1)
    for i in range(6):
        job = sender.write(source[: LENGTH - i], grant.descriptor, imm=1, exact=bool(i % 2))
        counter.wait(i + 1, WAIT_S)
        assert target.view[: LENGTH - i] == source.view[: LENGTH - i]
        assert job.wait(WAIT_S) is JobStatus.OK
        target.view[:] = bytes(LENGTH)
    pages = list(range(500))
    seeded.shuffle(pages)
    sender.write_pages(source, range(500), grant.descriptor, pages, 4096, imm=2).wait(WAIT_S)
    counter = receiver.counter(2)
    counter.wait(500, WAIT_S)
    assert counter.read() == (500, 0, 0, 0)
    for src, dst in enumerate(pages):
        assert target.view[dst * 4096 :][:4096] == source.view[src * 4096 :][:4096]


@pytest.mark.parametrize("rails", [1, 2])
def test_writes_on_a_device_that_is_often_full(
    make_daemon: MakeDaemon, monkeypatch: pytest.MonkeyPatch, seeded: random.Random, rails: int
) -> None:
    monkeypatch.setenv("EFAFACE_SEED", str(seeded.randrange(1 << 32)))
    monkeypatch.setenv("EFAFACE_EAGAIN", "40")
    monkeypatch.setenv("EFAFACE_TX_SIZE", "8")
    near, far = (make_daemon(**face_config(rails)) for _ in range(2))
    with transferd.Client(near.socket) as sender, transferd.Client(far.socket) as receiver:
        check_writes(sender, receiver, seeded)
    assert "libfabric efa" in far.log()


def test_a_device_reaches_no_other_process_of_its_host(
    make_daemon: MakeDaemon, monkeypatch: pytest.MonkeyPatch, seeded: random.Random
) -> None:
    monkeypatch.setenv("EFAFACE_LOOPBACK", "0")
    daemons = []
    for host in (1, 2, 1):
        monkeypatch.setenv("EFAFACE_HOST", str(host))
        daemons.append(make_daemon(**face_config()))
    near, far, beside = daemons
    with (
        transferd.Client(near.socket) as sender,
        transferd.Client(near.socket) as neighbour,
        transferd.Client(far.socket) as receiver,
        transferd.Client(beside.socket) as unreachable,
    ):
        check_writes(sender, receiver, seeded)
        check_writes(sender, neighbour, seeded)  # of one daemon: by no device
        _, grant = granted(unreachable)
        with pytest.raises(transferd.PeerLost, match="does not answer by any rail"):
            sender.imm(grant.descriptor, 1).wait(WAIT_S)
        _, grant = granted(receiver)
        assert sender.imm(grant.descriptor, 3).wait(WAIT_S) is JobStatus.OK
        receiver.counter(3).wait(1, WAIT_S)


@pytest.mark.parametrize("emulated", [0, 1])
def test_a_job_tells_that_writes_were_emulated(
    make_daemon: MakeDaemon, monkeypatch: pytest.MonkeyPatch, emulated: int
) -> None:
    monkeypatch.setenv("EFAFACE_EMULATED", str(emulated))
    monkeypatch.setenv("EFAFACE_UNSOLICITED", str(1 - emulated))  # of a device that is as old
    near, far = (make_daemon(**face_config()) for _ in range(2))
    with transferd.Client(near.socket) as sender, transferd.Client(far.socket) as receiver:
        _, grant = granted(receiver)
        job = sender.write(sender.alloc(4096), grant.descriptor, imm=1)
        assert job.wait(WAIT_S) is JobStatus.OK
        assert job.path is not None
        assert job.path.emulated is bool(emulated)
        assert str(job.path).endswith("emulated") is bool(emulated)
