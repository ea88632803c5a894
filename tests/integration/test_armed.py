# SPDX-License-Identifier: Apache-2.0
"""Watchers and armed jobs of the SDK, on real daemons: to another daemon and to one's own."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest

import transferd
import transferd.aio
from transferd import Armed, Barrier, Imm, Read, Scatter, Send, Write, WritePages
from transferd.native.client_half import ffi, lib
from transferd.native.names import Detail, JobStatus

from support.both_ways import LENGTH, filled, granted
from support.raw_sender import RawSender, raw_sender
from support.waiting import WAIT_S, eventually

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

    from transferd import Client

    from support.daemon import DaemonProcess

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = pytest.mark.slow

OK, CANCELLED, PENDING = JobStatus.OK, JobStatus.CANCELLED, JobStatus.PENDING


def test_a_job_starts_when_its_value_is_reached(
    sender: Client, receiver: Client, seeded: random.Random
) -> None:
    source = filled(sender, seeded)
    target, grant = granted(receiver)
    with sender.watcher() as watcher:
        job = sender.arm(watcher, 5, Write(src=source[0:4096], dst=grant.descriptor, imm=1))
        other = sender.arm(watcher, 6, Imm(dst=grant.descriptor, imm=2))
        watcher.bump(3)
        watcher.bump()
        sender.imm(grant.descriptor, 3).wait(WAIT_S)  # taken after the arming, and over
        assert (job.status, watcher.value) == (PENDING, 4)
        source.view[0:4096] = wanted = seeded.randbytes(4096)  # read when it starts
        watcher.bump()
        assert job.wait(WAIT_S) is OK
        receiver.counter(1).wait(1, WAIT_S)
        assert target.view[0:4096] == wanted
        assert other.status is PENDING
        watcher.bump()
        assert other.wait(WAIT_S) is OK
        assert other.result is not None
        assert other.result.posted_ns is not None
        late = sender.arm(watcher, 2, Imm(dst=grant.descriptor, imm=2))  # reached long ago
        assert late.wait(WAIT_S) is OK


def test_every_member_of_a_batch_can_be_armed(
    sender: Client, receiver: Client, seeded: random.Random
) -> None:
    source = filled(sender, seeded)
    target, grant = granted(receiver)
    desc = grant.descriptor
    back = sender.alloc(4096)
    with receiver.mailbox(slots=4, slot_bytes=64) as mailbox, sender.watcher() as watcher:
        members: list[Any] = [
            Write(src=source[0:100], dst=desc, dst_offset=0, imm=1),
            Imm(dst=desc, imm=1),
            WritePages(
                src=source, src_pages=[1, 2], dst=desc, dst_pages=[3, 5], page_bytes=4096, imm=1
            ),
            Scatter(src=source, targets=[(desc, 7, 9000, 50), (desc, 0, 9100, 0)], imm=1),
            Barrier(group=[desc, desc], imm=1),
            Read(src=desc, dst=back, src_offset=60000),
            Send(dst=mailbox.descriptor, data=b"armed"),
        ]
        jobs = sender.submit([Armed(watcher=watcher, value=1, job=member) for member in members])
        plain = sender.submit([members[1]])[0]  # unarmed beside them
        assert plain.wait(WAIT_S) is OK
        assert {job.status for job in jobs} == {PENDING}
        target.view[60000:] = wanted = seeded.randbytes(LENGTH - 60000)
        watcher.bump()
        assert {job.wait(WAIT_S) for job in jobs} == {OK}
        receiver.counter(1).wait(1 + 1 + 2 + 2 + 2 + 1, WAIT_S)
        assert receiver.counter(1).value == 9
        assert mailbox.receive(WAIT_S) == b"armed"
    assert target.view[0:100] == source.view[0:100]
    assert target.view[3 * 4096 : 4 * 4096] == source.view[4096 : 2 * 4096]
    assert target.view[5 * 4096 : 6 * 4096] == source.view[2 * 4096 : 3 * 4096]
    assert back.view == wanted[:4096]


def test_cancel_deadline_and_close(sender: Client, receiver: Client) -> None:
    _, grant = granted(receiver)
    with sender.watcher() as watcher:
        cancelled = sender.arm(watcher, 1, Imm(dst=grant.descriptor, imm=4))
        assert cancelled.cancel(WAIT_S) is CANCELLED
        late = sender.arm(watcher, 1, Imm(dst=grant.descriptor, imm=4, deadline_s=0.01))
        with pytest.raises(transferd.JobFailed) as caught:
            late.wait(WAIT_S)
        assert caught.value.status is JobStatus.DEADLINE
        left = sender.arm(watcher, 1, Imm(dst=grant.descriptor, imm=4))
    assert left.status is CANCELLED  # the watcher's close answers after that
    counter = receiver.counter(4)  # whoever waits for them is told
    with pytest.raises(transferd.CounterFault):
        counter.wait(1, WAIT_S)
    eventually(lambda: counter.lost == 3, "three are known lost")
    assert counter.value == 0


def test_fence_and_revoke_end_what_waits(sender: Client, receiver: Client) -> None:
    _, grant = granted(receiver)
    with sender.watcher() as watcher:
        fenced = sender.arm(watcher, 1, Imm(dst=grant.descriptor, imm=5))
        spared = sender.arm(watcher, 1, Imm(dst=grant.descriptor, imm=6))
        grant.fence([5])
        assert fenced.status is CANCELLED
        assert fenced.result is not None
        assert fenced.result.detail == "FENCED"
        watcher.bump()
        assert spared.wait(WAIT_S) is OK
        revoked = sender.arm(watcher, 2, Imm(dst=grant.descriptor, imm=6))
        sender.imm(grant.descriptor, 7).wait(WAIT_S)  # the arming was taken before
        grant.revoke()
        assert (revoked.status, revoked.result and revoked.result.detail) == (CANCELLED, "REVOKED")
        watcher.bump()
    assert receiver.counter(5).value == 0
    assert receiver.counter(6).value == 1


def test_closed_with_the_client(shared_pair: Pair) -> None:
    with transferd.Client(shared_pair[1].socket) as receiver:
        _, grant = granted(receiver)
        with transferd.Client(shared_pair[0].socket) as sender:
            watcher = sender.watcher()
            sender.arm(watcher, 1, Imm(dst=grant.descriptor, imm=7))
        with pytest.raises(transferd.Unavailable):
            watcher.bump()
        with pytest.raises(transferd.Unavailable):
            assert watcher.value
        assert repr(watcher) == "<Watcher 0: its session is over>"
        watcher.close()  # nothing is left to do
        with pytest.raises(transferd.Unavailable):
            sender.watcher()


def test_many_threads_bump(sender: Client, receiver: Client) -> None:
    _, grant = granted(receiver)
    with sender.watcher() as watcher:
        jobs = [
            sender.arm(watcher, value, Imm(dst=grant.descriptor, imm=8))
            for value in range(400, 0, -1)
        ]

        def bump() -> None:
            for _ in range(100):
                watcher.bump()

        threads = [threading.Thread(target=bump) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert watcher.value == 400
        assert {job.wait(WAIT_S) for job in jobs} == {OK}
    receiver.counter(8).wait(400, WAIT_S)
    assert receiver.counter(8).value == 400


def test_a_device_bumps(sender: Client, receiver: Client) -> None:
    """A plain store into the segment, as a kernel's: nobody rings."""
    _, grant = granted(receiver)
    with sender.watcher(device=True) as watcher:
        session: Any = sender._session
        header = lib.tfd_client_header(session.client)
        base = ffi.cast("uint8_t *", header)
        words = ffi.cast("struct tfd_watcher *", base + header.watcher_offset)
        for value in range(1, 20):
            job = sender.arm(watcher, value, Imm(dst=grant.descriptor, imm=9))
            words[watcher._slot].value = value
            assert job.wait(WAIT_S) is OK
        assert watcher.value == 19
    receiver.counter(9).wait(19, WAIT_S)


def test_more_than_records_allow(shared_pair: Pair) -> None:
    with (
        transferd.Client(shared_pair[1].socket) as receiver,
        transferd.Client(shared_pair[0].socket, records=64) as sender,
    ):
        _, grant = granted(receiver)
        with sender.watcher() as watcher:
            jobs = [sender.arm(watcher, 1, Imm(dst=grant.descriptor, imm=1)) for _ in range(56)]
            beyond = sender.arm(watcher, 1, Imm(dst=grant.descriptor, imm=1))
            with pytest.raises(transferd.QuotaExceeded):
                beyond.wait(WAIT_S)
            assert jobs[0].cancel(WAIT_S) is CANCELLED  # there is always a record for that
            watcher.bump()
            assert {job.wait(WAIT_S) for job in jobs[1:]} == {OK}


def test_asyncio(shared_pair: Pair, seeded: random.Random) -> None:
    async def run() -> None:
        async with (
            transferd.aio.Client(shared_pair[1].socket) as receiver,
            transferd.aio.Client(shared_pair[0].socket) as sender,
        ):
            region = await receiver.alloc(LENGTH)
            grant = await region.grant(imms=range(4))
            source = await sender.alloc(LENGTH)
            source.view[:] = seeded.randbytes(LENGTH)
            async with await sender.watcher() as watcher:
                job = await sender.arm(watcher, 2, Write(src=source, dst=grant.descriptor, imm=1))
                (batched,) = await sender.submit(
                    [Armed(watcher=watcher, value=1, job=Imm(dst=grant.descriptor, imm=2))]
                )
                watcher.bump()
                assert await batched is OK
                assert job.status is PENDING
                watcher.bump()
                assert await job is OK
                await (await receiver.counter(1)).wait(1, WAIT_S)
                left = await sender.arm(watcher, 9, Imm(dst=grant.descriptor, imm=2))
            assert region.view == source.view
            assert left.status is CANCELLED

    asyncio.run(run())


# ---- wrong values ----


@pytest.mark.parametrize(
    ("arm", "kind", "message"),
    [
        (lambda c, w, j: c.arm(w, -1, j), transferd.InvalidRequest, "from 0 to 2^64 - 1, not -1"),
        (
            lambda c, w, j: c.arm(w, 1 << 64, j),
            transferd.InvalidRequest,
            "not 18446744073709551616",
        ),
        (lambda c, w, j: c.arm(w, 1.5, j), transferd.InvalidRequest, "not 1.5"),
        (lambda c, w, j: c.arm(7, 1, j), transferd.InvalidRequest, "watcher() makes, not int"),
        (lambda c, w, j: c.arm(w, 1, None), transferd.InvalidRequest, "not NoneType"),
        (lambda c, w, j: c.arm(w, 1, [j]), transferd.InvalidRequest, "not list"),
        (
            lambda c, w, j: c.arm(w, 1, Armed(watcher=w, value=1, job=j)),
            transferd.InvalidRequest,
            "one watcher, not for two",
        ),
        (
            lambda c, w, j: c.arm(w, 1, c.submit([j])[0]),
            transferd.InvalidRequest,
            "not submitted yet, not Job",
        ),
        (lambda c, w, j: w.bump(0), transferd.InvalidRequest, "from 1 to 2^63 - 1, not 0"),
        (lambda c, w, j: w.bump(-1), transferd.InvalidRequest, "not -1"),
        (lambda c, w, j: w.bump(1 << 63), transferd.InvalidRequest, "not 9223372036854775808"),
        (lambda c, w, j: w.bump("1"), transferd.InvalidRequest, "not '1'"),
        (
            lambda c, w, j: [w.bump((1 << 63) - 1) for _ in range(3)],
            transferd.InvalidRequest,
            "would pass 2^64; take another",
        ),
        (lambda c, w, j: [w.close(), w.bump()], transferd.Conflict, "the watcher is closed"),
        (lambda c, w, j: [w.close(), c.arm(w, 1, j)], transferd.Conflict, "the watcher is closed"),
        (lambda c, w, j: [w.close(), w.value], transferd.Conflict, "the watcher is closed"),
    ],
)
def test_wrong_values(
    shared_pair: Pair, arm: Callable[..., object], kind: type[Exception], message: str
) -> None:
    with transferd.Client(shared_pair[0].socket) as client:
        _, grant = granted(client)
        with client.watcher() as watcher:
            with pytest.raises(kind) as caught:
                arm(client, watcher, Imm(dst=grant.descriptor, imm=1))
            assert message in str(caught.value)


def test_watchers_of_another_client(sender: Client, shared_pair: Pair) -> None:
    with transferd.Client(shared_pair[0].socket) as other:
        _, grant = granted(other)
        watcher = other.watcher()
        with pytest.raises(transferd.InvalidRequest, match="another Client's"):
            sender.arm(watcher, 1, Imm(dst=grant.descriptor, imm=1))


def test_without_shared_memory(shared_pair: Pair) -> None:
    with transferd.Client(shared_pair[0].socket, shared_memory=False) as client:
        with pytest.raises(transferd.Conflict, match="a session over gRPC has not") as caught:
            client.watcher()
        assert caught.value.reason == "NO_SHARED_MEMORY"


def test_all_are_taken(sender: Client) -> None:
    watchers = [sender.watcher() for _ in range(64)]
    with pytest.raises(transferd.QuotaExceeded, match=r"limits\.watchers") as caught:
        sender.watcher()
    assert caught.value.reason == "WATCHERS"
    watchers[7].bump(3)
    watchers[7].close()
    assert sender.watcher().value == 0  # another one, from the beginning


@pytest.fixture
def ring(shared_pair: Pair) -> Iterator[RawSender]:
    with raw_sender(*shared_pair) as sender:
        yield sender
        assert sender.end() == (JobStatus.OK, Detail.NONE)  # the session goes on


ARMED = int(lib.TFD_FLAG_ARMED)


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"flags": ARMED, "watcher": 64}, Detail.BAD_WATCHER),
        ({"flags": ARMED, "watcher": (1 << 32) - 1}, Detail.BAD_WATCHER),
        ({"flags": int(lib.TFD_FLAG_POLLED)}, Detail.BAD_FLAGS),
        ({"watcher": 1}, Detail.BAD_FLAGS),
        ({"fire_at": 1}, Detail.BAD_FLAGS),
        ({"flags": ARMED, "dst_offset": LENGTH}, Detail.DESTINATION_BOUNDS),
        ({"flags": ARMED, "imm": 16}, Detail.IMM_RANGE),
        ({"flags": ARMED, "op": int(lib.TFD_OP_CANCEL), "src_region": 0}, Detail.BAD_FLAGS),
    ],
)
def test_raw_entries(ring: RawSender, fields: dict[str, int], detail: Detail) -> None:
    assert ring.end(**fields) == (JobStatus.INVALID, detail)


def test_raw_words(ring: RawSender) -> None:
    """A word that falls, and one of all ones: what it reached has started, once."""
    header = ring.raw.header
    base = ffi.cast("uint8_t *", header)
    word = ffi.cast("struct tfd_watcher *", base + header.watcher_offset)
    jobs = [ring.submit(flags=ARMED, fire_at=at) for at in (10, 20, (1 << 64) - 1)]
    assert ring.end() == (JobStatus.OK, Detail.NONE)
    word[0].value = 15
    assert ring.end() == (JobStatus.OK, Detail.NONE)  # rings
    assert ring.end_of(jobs[0]) == (JobStatus.OK, Detail.NONE)
    word[0].value = 3
    assert ring.end() == (JobStatus.OK, Detail.NONE)
    assert ring.raw.end_of(jobs[1]) is None
    word[0].value = (1 << 64) - 1
    assert ring.end() == (JobStatus.OK, Detail.NONE)
    assert [ring.end_of(job) for job in jobs[1:]] == [(JobStatus.OK, Detail.NONE)] * 2
    ring.counter.wait(7, WAIT_S)
    assert ring.counter.value == 7
