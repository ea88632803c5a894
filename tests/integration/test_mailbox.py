# SPDX-License-Identifier: Apache-2.0
"""Mailboxes: by the ring and by gRPC, to another daemon and to one's own."""

from __future__ import annotations

import asyncio
import collections
import threading
from typing import TYPE_CHECKING, Any

import pytest

import transferd
import transferd.aio
from transferd.native.names import JobStatus

from support.daemon import provider_of_tests

if TYPE_CHECKING:
    import random

    from transferd import Client

    from support.daemon import DaemonProcess

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = pytest.mark.slow

WAIT_S = 20.0
OK = JobStatus.OK


@pytest.fixture(params=["ring", "grpc"])
def shared_memory(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "ring")


def test_messages_arrive_as_they_were_sent(
    sender: Client, receiver: Client, seeded: random.Random
) -> None:
    with receiver.mailbox(slots=4, slot_bytes=5000) as mailbox:
        for size in (0, 1, 63, 64, 65, 4096, 5000):
            for data in (seeded.randbytes(size), bytearray(seeded.randbytes(size))):
                job = sender.send(mailbox.descriptor, data)
                assert job.wait(WAIT_S) is OK
                assert mailbox.receive(WAIT_S) == data
                assert job.result is not None
                assert (job.result.bytes, job.result.detail) == (size, "")
                assert job.path is not None
                assert job.path.provider in (provider_of_tests(), "local")
        with pytest.raises(transferd.WaitTimeout):
            mailbox.receive(0)


def test_a_full_mailbox_makes_senders_wait(sender: Client, receiver: Client) -> None:
    with receiver.mailbox(slots=3, slot_bytes=64) as mailbox:
        jobs = [sender.send(mailbox.descriptor, b"%d" % i) for i in range(40)]
        received: list[bytes] = []
        while len(received) < 40:
            received.append(mailbox.receive(WAIT_S))
            # Those that were received, and what lies in the slots.
            assert sum(job.done() for job in jobs) <= len(received) + 3
        assert sorted(received, key=int) == [b"%d" % i for i in range(40)]
        for job in jobs:
            assert job.wait(WAIT_S) is OK


def test_many_senders_of_one_mailbox(
    shared_pair: Pair, receiver: Client, shared_memory: bool
) -> None:
    senders, each = 5, 30

    def send(name: int) -> None:
        socket = shared_pair[name % 2].socket
        with transferd.Client(socket, shared_memory=shared_memory) as client:
            jobs = [client.send(descriptor, b"%d %d" % (name, i)) for i in range(each)]
            for job in jobs:
                assert job.wait(WAIT_S) is OK

    with receiver.mailbox(slots=2, slot_bytes=64) as mailbox:
        descriptor = mailbox.descriptor
        threads = [threading.Thread(target=send, args=(name,)) for name in range(senders)]
        for thread in threads:
            thread.start()
        received = collections.Counter(mailbox.receive(WAIT_S) for _ in range(senders * each))
        for thread in threads:
            thread.join(WAIT_S)
        wanted = [b"%d %d" % (name, i) for name in range(senders) for i in range(each)]
        assert received == collections.Counter(wanted)
        with pytest.raises(transferd.WaitTimeout):
            mailbox.receive(0)


def test_cancel_and_deadline_of_what_waits(sender: Client, receiver: Client) -> None:
    with receiver.mailbox(slots=1, slot_bytes=16) as mailbox:
        assert sender.send(mailbox.descriptor, b"first").wait(WAIT_S) is OK
        cancelled = sender.send(mailbox.descriptor, b"cancelled")
        late = sender.send(mailbox.descriptor, b"late", deadline_s=0.05)
        with pytest.raises(transferd.JobFailed) as caught:
            late.wait(WAIT_S)
        assert caught.value.status is JobStatus.DEADLINE
        assert cancelled.cancel(WAIT_S) is JobStatus.CANCELLED
        waiting = sender.send(mailbox.descriptor, b"second")
        assert mailbox.receive(WAIT_S) == b"first"
        assert mailbox.receive(WAIT_S) == b"second"
        assert waiting.wait(WAIT_S) is OK


def test_closing_ends_what_waits(sender: Client, receiver: Client) -> None:
    mailbox = receiver.mailbox(slots=1, slot_bytes=16)
    assert sender.send(mailbox.descriptor, b"first").wait(WAIT_S) is OK
    jobs = [sender.send(mailbox.descriptor, b"waits") for _ in range(10)]
    mailbox.close()
    mailbox.close()
    for job in jobs:
        with pytest.raises(transferd.JobFailed) as caught:
            job.wait(WAIT_S)
        # INVALID: the daemon had not looked at it yet.
        assert caught.value.status in (JobStatus.CANCELLED, JobStatus.INVALID)
        assert caught.value.detail == "REVOKED"
    with pytest.raises(transferd.Conflict) as gone:
        mailbox.receive(WAIT_S)
    assert gone.value.reason == "MAILBOX_CLOSED"
    assert list(mailbox) == []
    with pytest.raises(transferd.TransferdError):
        sender.send(mailbox.descriptor, b"late").wait(WAIT_S)


def test_iterating_ends_with_the_mailbox(sender: Client, receiver: Client) -> None:
    mailbox = receiver.mailbox(slots=8, slot_bytes=16)
    received: list[bytes] = []
    came = threading.Event()

    def receive() -> None:
        for message in mailbox:
            received.append(message)
            came.set()

    thread = threading.Thread(target=receive)
    thread.start()
    assert sender.send(mailbox.descriptor, b"one").wait(WAIT_S) is OK
    assert came.wait(WAIT_S)
    mailbox.close()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert received == [b"one"]


def test_bad_input(sender: Client, receiver: Client) -> None:
    for bad in ({"slots": 0}, {"slots": 65_537}, {"slot_bytes": 0}, {"slot_bytes": 8193}):
        with pytest.raises(transferd.InvalidRequest, match=next(iter(bad))):
            receiver.mailbox(**bad)
    with receiver.mailbox(slots=1, slot_bytes=16) as mailbox:
        for data in ("text", 7, None):
            with pytest.raises(transferd.InvalidRequest, match="data is bytes"):
                sender.send(mailbox.descriptor, data)
        with pytest.raises(transferd.InvalidRequest, match="8193 bytes"):
            sender.send(mailbox.descriptor, bytes(8193))
        with pytest.raises(transferd.InvalidRequest):
            sender.send("descriptor", b"")  # type: ignore[arg-type]
        with pytest.raises(transferd.JobFailed) as caught:
            sender.send(mailbox.descriptor, bytes(17)).wait(WAIT_S)
        assert (caught.value.status, caught.value.detail) == (
            JobStatus.INVALID,
            "DESTINATION_BOUNDS",
        )
        # A mailbox is not memory, and memory is not a mailbox.
        region = sender.alloc(4096)
        with pytest.raises(transferd.JobFailed) as caught:
            sender.write(region[:8], mailbox.descriptor, imm=0).wait(WAIT_S)
        assert caught.value.detail == "RIGHTS"
        memory = receiver.alloc(4096).grant(imms=[0])
        with pytest.raises(transferd.JobFailed) as caught:
            sender.send(memory.descriptor, b"x").wait(WAIT_S)
        assert caught.value.detail == "RIGHTS"
        assert sender.send(mailbox.descriptor, b"fits").wait(WAIT_S) is OK
        assert mailbox.receive(WAIT_S) == b"fits"


def test_in_a_batch(sender: Client, receiver: Client) -> None:
    source = sender.alloc(4096)
    target = receiver.alloc(4096)
    grant = target.grant(imms=[3])
    source.view[:5] = b"bytes"
    with receiver.mailbox() as mailbox:
        jobs = sender.submit(
            [
                transferd.Send(dst=mailbox.descriptor, data=b"a"),
                transferd.Write(src=source[:5], dst=grant.descriptor, imm=3),
                transferd.Send(dst=mailbox.descriptor, data=b"b" * 4096),
                transferd.Send(dst=mailbox.descriptor, data=b""),
            ]
        )
        for job in jobs:
            assert job.wait(WAIT_S) is OK
        received = {mailbox.receive(WAIT_S) for _ in range(3)}
    assert received == {b"a", b"b" * 4096, b""}
    receiver.counter(3).wait(1, WAIT_S)
    assert bytes(target.view[:5]) == b"bytes"


def test_mailboxes_come_and_go(sender: Client, receiver: Client) -> None:
    """Counters, regions and grants of closed mailboxes are given back."""
    for i in range(40):
        with receiver.mailbox(slots=2, slot_bytes=32) as mailbox:
            assert sender.send(mailbox.descriptor, b"%d" % i).wait(WAIT_S) is OK
            assert mailbox.receive(WAIT_S) == b"%d" % i
    region = receiver.alloc(4096)
    region.close()


def test_asyncio(shared_pair: Pair, receiver: Client, shared_memory: bool) -> None:
    """Both faces; what nobody waits for any more is not lost."""
    del receiver  # its parameters are what is wanted: both ends are asyncio's here

    async def run() -> None:
        async with (
            transferd.aio.Client(shared_pair[0].socket, shared_memory=shared_memory) as near,
            transferd.aio.Client(shared_pair[1].socket, shared_memory=shared_memory) as far,
        ):
            mailbox: Any = await far.mailbox(slots=2, slot_bytes=64)
            with pytest.raises(transferd.WaitTimeout):
                await mailbox.receive(0.01)
            waiting = asyncio.create_task(mailbox.receive(WAIT_S))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            jobs = [await near.send(mailbox.descriptor, b"%d" % i) for i in range(20)]
            received: list[bytes] = []
            async for message in mailbox:
                received.append(message)
                if len(received) == 20:
                    break
            for job in jobs:
                assert await job.wait(WAIT_S) is OK
            assert sorted(received, key=int) == [b"%d" % i for i in range(20)]
            closing = asyncio.create_task(mailbox.receive(WAIT_S))
            await asyncio.sleep(0)
            await mailbox.close()
            with pytest.raises(transferd.Conflict):
                await closing

    asyncio.run(run())


def test_receives_keep_no_control_call_waiting(
    shared_pair: Pair, shared_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transferd.client.mailbox.SLICE_S", WAIT_S)
    monkeypatch.setattr("transferd.client.aiomailbox.SLICE_S", WAIT_S)

    async def run() -> None:
        async with transferd.aio.Client(
            shared_pair[0].socket, shared_memory=shared_memory
        ) as client:
            mailboxes = [await client.mailbox(slots=1, slot_bytes=16) for _ in range(8)]
            waiting = [asyncio.create_task(mailbox.receive(WAIT_S)) for mailbox in mailboxes]
            await asyncio.sleep(0)
            async with asyncio.timeout(WAIT_S / 2):
                for mailbox in mailboxes:
                    await (await client.send(mailbox.descriptor, b"x")).wait(WAIT_S)
                assert await asyncio.gather(*waiting) == [b"x"] * 8

    asyncio.run(run())


def test_cancelled_receives_take_no_message(shared_pair: Pair, shared_memory: bool) -> None:
    async def run() -> None:
        async with (
            transferd.aio.Client(shared_pair[0].socket, shared_memory=shared_memory) as near,
            transferd.aio.Client(shared_pair[1].socket, shared_memory=shared_memory) as far,
        ):
            mailbox = await far.mailbox(slots=40, slot_bytes=16)
            for i in range(40):
                await (await near.send(mailbox.descriptor, b"%d" % i)).wait(WAIT_S)
            received: list[bytes] = []
            for turns in range(20):
                waiting = asyncio.create_task(mailbox.receive(WAIT_S))
                for _ in range(turns):
                    await asyncio.sleep(0)
                waiting.cancel()
                received += [
                    one
                    for one in await asyncio.gather(waiting, return_exceptions=True)
                    if isinstance(one, bytes)
                ]
            while len(received) < 40:
                received.append(await mailbox.receive(WAIT_S))
            assert sorted(received, key=int) == [b"%d" % i for i in range(40)]

    asyncio.run(run())


def test_a_message_of_a_cancelled_receive_goes_to_another(shared_pair: Pair) -> None:
    async def run() -> None:
        async with (
            transferd.aio.Client(shared_pair[0].socket) as near,
            transferd.aio.Client(shared_pair[1].socket) as far,
        ):
            mailbox = await far.mailbox()
            driver = mailbox._runtime.driver
            first = asyncio.create_task(mailbox.receive(WAIT_S))
            second = asyncio.create_task(mailbox.receive(WAIT_S))
            while len(driver._watches) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0)
            await near.send(mailbox.descriptor, b"one")
            while len(driver._watches) == 2:  # noqa: ASYNC110
                await asyncio.sleep(0)
            first.cancel()  # it has the message, and has not run since
            assert await second == b"one"
            assert first.cancelled()

    asyncio.run(run())
