# SPDX-License-Identifier: Apache-2.0
"""What clients do by two daemons on the provider, and what they see when one of them dies."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import transferd
from transferd.daemon import certs
from transferd.native.names import JobStatus

from support.actor import Actor
from support.canary import KINDS, Canary
from support.daemon import DaemonProcess
from support.providers import LOOPBACK, configuration
from support.waiting import WAIT_S, eventually

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from transferd import Client, Grant, Region

    from support.providers import Provider

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LENGTH = 1 << 20
LONG = 32 << 20
ROUNDS = 6
HEARTBEAT = {"interval": 0.5, "timeout": 5.0}
OK = JobStatus.OK


@pytest.fixture(scope="session")
def daemons(provider: Provider) -> Iterator[Pair]:
    """Gives two daemons on the provider's rail; a test that kills one starts it again."""
    base = Path(tempfile.mkdtemp(prefix="tfd-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, base, ignore_errors=True)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in provider.environment.items():
            patch.setenv(name, value)
        cert, key, ca = certs.make(base / "tls", "host", [LOOPBACK])
        tls = {"cert": str(cert), "key": str(key), "ca": str(ca)}
        made = []
        for name in "ab":
            (base / name).mkdir()
            keys = {**configuration(provider), "heartbeat": HEARTBEAT, "tls": tls}
            made.append(stack.enter_context(DaemonProcess(base / name, keys).start(60)))
        yield made[0], made[1]


@pytest.fixture
def pair(request: pytest.FixtureRequest, daemons: Pair) -> Pair:
    request.node.transferd_daemons = list(daemons)
    return daemons


@pytest.fixture
def sender(pair: Pair) -> Iterator[Client]:
    with transferd.Client(pair[0].socket) as client:
        yield client


@pytest.fixture
def receiver(pair: Pair) -> Iterator[Client]:
    with transferd.Client(pair[1].socket) as client:
        yield client


def granted(client: Client, length: int = LENGTH) -> tuple[Region, Grant]:
    region = client.alloc(length)
    return region, region.grant(imms=range(16), rights={"write", "read"})


def filled(client: Client, seeded: random.Random, length: int = LENGTH) -> Region:
    region = client.alloc(length)
    region.view[:] = seeded.randbytes(length)
    return region


def exactly(client: Client, imm: int, value: int) -> None:
    counter = client.counter(imm)
    counter.wait(value, WAIT_S)
    assert counter.read() == (value, 0, 0, 0)


@pytest.mark.parametrize("keys", [{}, {"exact": True}, {"checksum": True}], ids=str)
def test_write(
    sender: Client, receiver: Client, seeded: random.Random, provider: Provider, keys: dict
) -> None:
    source = filled(sender, seeded)
    target, grant = granted(receiver)
    for count, size in enumerate((1, 63, 4096, 16_385, LENGTH - 77), start=1):
        job = sender.write(source[:size], grant.descriptor, 77, imm=1, **keys)
        assert job.wait(WAIT_S) is OK
        exactly(receiver, 1, count)
        assert target.view[77 : 77 + size] == source.view[:size]
        assert job.path is not None
        assert job.path.provider == provider.provider


def test_pages(sender: Client, receiver: Client, seeded: random.Random) -> None:
    source = filled(sender, seeded)
    target, grant = granted(receiver)
    src, dst = seeded.sample(range(500), 300), seeded.sample(range(500), 300)
    job = sender.write_pages(source, src, grant.descriptor, dst, 2000, imm=1)
    assert job.wait(WAIT_S) is OK
    exactly(receiver, 1, 300)
    for here, there in zip(src, dst, strict=True):
        assert target.view[there * 2000 :][:2000] == source.view[here * 2000 :][:2000]


def test_scatter_and_barrier(sender: Client, receiver: Client, seeded: random.Random) -> None:
    source = filled(sender, seeded)
    targets = [granted(receiver) for _ in range(4)]
    parts = [
        (grant.descriptor, number * 1000, number * 7, 50_000 + number)
        for number, (_, grant) in enumerate(targets)
    ]
    assert sender.scatter(source, parts, imm=1).wait(WAIT_S) is OK
    exactly(receiver, 1, 4)
    for (region, _), (_, src, dst, size) in zip(targets, parts, strict=True):
        assert region.view[dst : dst + size] == source.view[src : src + size]
    group = sender.peer_group([grant.descriptor for _, grant in targets])
    assert sender.barrier(group, imm=2).wait(WAIT_S) is OK
    exactly(receiver, 2, 4)


def test_read(sender: Client, receiver: Client, seeded: random.Random) -> None:
    there, grant = granted(receiver)
    there.view[:] = seeded.randbytes(LENGTH)
    here = sender.alloc(LENGTH + 64)
    for size in (0, 1, 4095, 16_385, LENGTH - 77):
        here.view[:] = bytes(LENGTH + 64)
        job = sender.read(src=grant.descriptor, dst=here[5 : 5 + size], src_offset=77)
        assert job.wait(WAIT_S) is OK
        assert here.view[5 : 5 + size] == there.view[77 : 77 + size]
        assert not any(here.view[:5])
        assert not any(here.view[5 + size : 69 + size])


def test_messages(sender: Client, receiver: Client, seeded: random.Random) -> None:
    with receiver.mailbox(slots=4, slot_bytes=5000) as mailbox:
        sent = [seeded.randbytes(size) for size in (0, 1, 64, 4096, 5000) * 8]
        jobs = [sender.send(mailbox.descriptor, data) for data in sent]
        assert sorted(mailbox.receive(WAIT_S) for _ in sent) == sorted(sent)
        assert {job.wait(WAIT_S) for job in jobs} == {OK}


def test_cancel_and_deadline(sender: Client, receiver: Client) -> None:
    source = sender.alloc(LONG)
    _, grant = granted(receiver, LONG)
    dst = grant.descriptor
    sender.warm(dst)
    cancelled = [sender.write(source, dst, imm=1) for _ in range(8)]
    for job in reversed(cancelled):
        job.cancel()
    late = [sender.write(source, dst, imm=1, deadline_s=0.005) for _ in range(8)]
    for job in (*cancelled, *late):
        with contextlib.suppress(transferd.JobFailed):
            job.wait(WAIT_S)
    assert {job.status for job in cancelled} <= {OK, JobStatus.CANCELLED}
    assert {job.status for job in late} <= {OK, JobStatus.DEADLINE}
    # All losses are told in the end; then the same immediate is as good as any.
    counter = receiver.counter(1)
    lost = sum(job.status is not OK for job in (*cancelled, *late))
    eventually(lambda: counter.lost == lost, f"{lost} are told to be lost", WAIT_S)
    counter.acknowledge()
    landed = counter.value
    assert sender.write(source[:1], dst, imm=1).wait(WAIT_S) is OK
    counter.wait(landed + 1, WAIT_S)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_lands_after_a_fence(sender: Client, receiver: Client, kind: str) -> None:
    with Canary(kind, sender, receiver) as canary:
        canary.run(ROUNDS)


def moves(sender: Client, receiver: Client, imm: int) -> None:
    """Proves that the way between two clients is whole."""
    source, (target, grant) = sender.alloc(LENGTH), granted(receiver)
    source.view[:] = os.urandom(LENGTH)
    counter = receiver.counter(imm)
    landed = counter.value
    assert sender.write(source, grant.descriptor, imm=imm).wait(WAIT_S) is OK
    counter.wait(landed + 1, WAIT_S)
    assert target.view == source.view


def test_a_sender_that_is_killed(pair: Pair, sender: Client, receiver: Client) -> None:
    _, grant = granted(receiver, LONG)
    counter = receiver.counter(1)
    with Actor("send", pair[0].socket, LONG, 1, grant.descriptor) as actor:
        actor.sending()
        actor.kill()
    with pytest.raises(transferd.CounterFault) as caught:
        counter.wait(1 << 40, WAIT_S)
    assert caught.value.faults > 0
    counter.acknowledge()
    moves(sender, receiver, 2)


def ends(jobs: list[transferd.Job]) -> list[JobStatus | str]:
    """Waits until each has ended, or is lost with its daemon."""
    ended: list[JobStatus | str] = []
    for job in jobs:
        try:
            ended.append(job.wait(WAIT_S))
        except transferd.JobFailed:
            ended.append(job.status)
        except transferd.TransferdError as error:
            ended.append(error.reason)
    return ended


@contextlib.contextmanager
def killed(daemon: DaemonProcess) -> Iterator[None]:
    """Kills it in the midst of its work; begins it anew after the block."""
    daemon.kill()
    try:
        yield
    finally:
        daemon.start(60)


def test_a_senders_daemon_that_is_killed(pair: Pair, receiver: Client) -> None:
    near, _ = pair
    _, grant = granted(receiver, LONG)
    counter = receiver.counter(1)
    with transferd.Client(near.socket) as sender:
        source = sender.alloc(LONG)
        sender.warm(grant.descriptor)
        jobs = [sender.write(source, grant.descriptor, imm=1) for _ in range(12)]
        with killed(near):
            landed = ends(jobs).count(OK)
            # Whoever waits is told, or all of them had landed.
            with contextlib.suppress(transferd.CounterFault, transferd.PeerLost):
                counter.wait(len(jobs), WAIT_S)
            eventually(lambda: counter.read().value >= landed, "what was acknowledged is counted")
            assert counter.read().value <= len(jobs)
    with transferd.Client(near.socket) as sender:
        eventually(lambda: _reaches(sender, receiver), "the daemon that began anew is talked to")


def test_a_receivers_daemon_that_is_killed(pair: Pair, sender: Client) -> None:
    _, far = pair
    source = sender.alloc(LONG)
    with transferd.Client(far.socket) as receiver:
        _, grant = granted(receiver, LONG)
        sender.warm(grant.descriptor)
        jobs = [sender.write(source, grant.descriptor, imm=1) for _ in range(12)]
        with killed(far):
            ended = ends(jobs)
            assert set(ended) <= {OK, JobStatus.PEER_LOST}
            assert ended[-1] is JobStatus.PEER_LOST
    with transferd.Client(far.socket) as receiver:
        eventually(lambda: _reaches(sender, receiver), "the daemon that began anew is talked to")


def _reaches(sender: Client, receiver: Client) -> bool:
    try:
        moves(sender, receiver, 3)
    except (transferd.PeerLost, transferd.Unavailable):
        return False
    except transferd.CounterFault:  # what the dead daemon may have been about to write
        receiver.counter(3).acknowledge()
        return False
    return True
