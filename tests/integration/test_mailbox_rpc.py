# SPDX-License-Identifier: Apache-2.0
"""MailboxService as a client of another language meets it, and what it refuses."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from transferd.daemon.transfers import WAITS_MAX
from transferd.v1 import mailbox_pb2, region_pb2, session_pb2, transfer_pb2, types_pb2

from support.grpc_session import GrpcSession, grpc_session, refusal, shm_file, tenants
from support.levels import back_to, level
from support.waiting import WAIT_S, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import MakeDaemon

    from support.daemon import DaemonProcess

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = pytest.mark.slow

LENGTH = 1 << 16
INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture
def owner(shared_pair: Pair) -> Iterator[GrpcSession]:
    with grpc_session(shared_pair[1]) as session:
        yield session


@pytest.fixture
def sender(shared_pair: Pair) -> Iterator[GrpcSession]:
    with grpc_session(shared_pair[0]) as session:
        yield session


def create(session: GrpcSession, region: int = 0, slots: int = 2) -> Any:
    return session.call(
        "mailboxes.CreateMailbox",
        mailbox_pb2.CreateMailboxRequest(slots=slots, slot_bytes=100, region=region),
    )


def send(session: GrpcSession, descriptor: bytes, *messages: bytes) -> list[int]:
    jobs = [
        transfer_pb2.Job(send=transfer_pb2.SendJob(dst=descriptor, data=data)) for data in messages
    ]
    return list(session.call("transfers.Submit", transfer_pb2.SubmitRequest(jobs=jobs)).job_ids)


def receive(
    session: GrpcSession, mailbox: int, limit: int = 0, timeout_s: float = WAIT_S
) -> list[bytes]:
    request = mailbox_pb2.ReceiveMessagesRequest(
        mailbox=mailbox, limit=limit, timeout_ms=int(timeout_s * 1000)
    )
    return list(session.call("mailboxes.ReceiveMessages", request, timeout_s + 5).messages)


def test_memory_of_the_daemon(owner: GrpcSession, sender: GrpcSession) -> None:
    box = create(owner, slots=3)
    jobs = send(sender, box.descriptor, b"one", b"", b"three")
    ends = sender.wait(jobs)
    assert {end.status for end in ends} == {types_pb2.JOB_STATUS_OK}
    assert sorted(receive(owner, box.mailbox, limit=2) + receive(owner, box.mailbox)) == [
        b"",
        b"one",
        b"three",
    ]
    assert receive(owner, box.mailbox, timeout_s=0) == []
    owner.call("mailboxes.CloseMailbox", mailbox_pb2.CloseMailboxRequest(mailbox=box.mailbox))


def test_memory_of_the_client(owner: GrpcSession, sender: GrpcSession) -> None:
    with shm_file(LENGTH) as (name, _):
        region = owner.register(name)
        box = create(owner, region)
        assert sender.wait(send(sender, box.descriptor, b"x" * 100))[0].bytes == 100
        opened = sender.call(
            "regions.OpenDescriptors",
            region_pb2.OpenDescriptorsRequest(descriptors=[box.descriptor]),
        ).grants[0]
        assert (opened.length_bytes, list(opened.rights)) == (100, [types_pb2.RIGHT_SEND])
        # Its region takes the mailbox along, and those who wait for a slot.
        waiting = send(sender, box.descriptor, b"second", b"third")
        owner.call("regions.DeregisterRegion", region_pb2.DeregisterRegionRequest(region=region))
        ends = {(end.status, end.detail) for end in sender.wait(waiting)}
        assert ends <= {
            (types_pb2.JOB_STATUS_OK, ""),
            (types_pb2.JOB_STATUS_CANCELLED, "REVOKED"),
            (types_pb2.JOB_STATUS_INVALID, "REVOKED"),
        }
        request = mailbox_pb2.ReceiveMessagesRequest(mailbox=box.mailbox)
        assert owner.refused("mailboxes.ReceiveMessages", request).reason == "MAILBOX_NOT_FOUND"


def test_a_wait_ends_with_the_mailbox(owner: GrpcSession) -> None:
    box = create(owner)
    refused: list[Any] = []

    def wait() -> None:
        request = mailbox_pb2.ReceiveMessagesRequest(mailbox=box.mailbox, timeout_ms=20_000)
        refused.append(owner.refused("mailboxes.ReceiveMessages", request))

    thread = threading.Thread(target=wait)
    thread.start()
    owner.call("mailboxes.CloseMailbox", mailbox_pb2.CloseMailboxRequest(mailbox=box.mailbox))
    thread.join(WAIT_S)
    assert [(error.code, error.reason) for error in refused] == [(NOT_FOUND, "MAILBOX_NOT_FOUND")]


def test_a_region_holds_one_mailbox(owner: GrpcSession, sender: GrpcSession) -> None:
    with shm_file(LENGTH) as (name, _):
        region = owner.register(name)
        box = create(owner, region)
        again = mailbox_pb2.CreateMailboxRequest(slots=1, slot_bytes=1, region=region)
        refused = owner.refused("mailboxes.CreateMailbox", again)
        assert (refused.code, refused.reason) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "REGION_IN_USE",
        )
        assert f"region {region} holds mailbox {box.mailbox}" in refused.message
        sender.wait(send(sender, box.descriptor, b"whole"))
        assert receive(owner, box.mailbox) == [b"whole"]
        owner.call("mailboxes.CloseMailbox", mailbox_pb2.CloseMailboxRequest(mailbox=box.mailbox))
        create(owner, region)


def test_waits_of_a_session_are_bounded(owner: GrpcSession) -> None:
    """Every event of a session wakes all that wait in it, which the whole daemon has to bear."""
    box = create(owner)
    request = mailbox_pb2.ReceiveMessagesRequest(mailbox=box.mailbox, timeout_ms=60_000)
    metadata = [("authorization", f"Bearer {owner.token}")]
    calls = [
        owner.mailboxes.ReceiveMessages.future(request, metadata=metadata)
        for _ in range(WAITS_MAX + 20)
    ]
    eventually(lambda: sum(call.done() for call in calls) == 20, "all above the bound refused")
    refused = [refusal(call.exception()) for call in calls if call.done()]
    assert {(one.code, one.reason) for one in refused} == {(EXHAUSTED, "WAITS")}
    for call in calls:
        call.cancel()

    def answered() -> bool:
        try:
            return receive(owner, box.mailbox, timeout_s=0.001) == []
        except grpc.RpcError:
            return False

    eventually(answered, "room for another once they have gone")


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"slots": 0, "slot_bytes": 1}, "slots"),
        ({"slots": 65_537, "slot_bytes": 1}, "slots"),
        ({"slots": (1 << 32) - 1, "slot_bytes": 1}, "slots"),
        ({"slots": 1, "slot_bytes": 0}, "slot_bytes"),
        ({"slots": 1, "slot_bytes": 8193}, "slot_bytes"),
    ],
)
def test_sizes_are_refused(owner: GrpcSession, values: dict[str, int], field: str) -> None:
    request = mailbox_pb2.CreateMailboxRequest(**values)
    refused = owner.refused("mailboxes.CreateMailbox", request)
    assert (refused.code, refused.reason, refused.field) == (INVALID, "INVALID_REQUEST", field)


@pytest.mark.parametrize(
    ("quotas", "reason"),
    [
        ({"registered_bytes": 4096}, "REGISTERED_BYTES"),
        ({"regions": 0}, "REGIONS"),
        ({"grants": 0}, "GRANTS"),
        ({"per_session_shared_files": 1}, "SHARED_FILES"),
        ({"per_session_counters": 16}, "COUNTERS"),
    ],
)
def test_quotas_bound_mailboxes_and_refusals_leave_nothing(
    make_daemon: MakeDaemon, quotas: dict[str, int], reason: str
) -> None:
    tenant = {**tenants()[0], "quotas": quotas}
    daemon = make_daemon(tenants=[tenant])
    big = mailbox_pb2.CreateMailboxRequest(slots=64, slot_bytes=100)
    with grpc_session(daemon) as session:
        room = {"SHARED_FILES": 1, "COUNTERS": 16}.get(reason, 0)
        for _ in range(room):
            session.call("mailboxes.CreateMailbox", big)
        before = level(daemon)
        for _ in range(30):
            refused = session.refused("mailboxes.CreateMailbox", big)
            assert (refused.code, refused.reason) == (EXHAUSTED, reason)
        back_to(daemon, before)


def test_slots_of_a_session_have_a_bound(owner: GrpcSession) -> None:
    most = mailbox_pb2.CreateMailboxRequest(slots=65_536, slot_bytes=1)
    boxes = [owner.call("mailboxes.CreateMailbox", most).mailbox for _ in range(4)]
    refused = owner.refused("mailboxes.CreateMailbox", most)
    assert (refused.code, refused.reason) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "MAILBOX_SLOTS",
    )
    closing = mailbox_pb2.CloseMailboxRequest(mailbox=boxes[0])
    owner.call("mailboxes.CloseMailbox", closing)
    owner.call("mailboxes.CreateMailbox", most)


def test_what_is_not_there_is_refused(owner: GrpcSession, sender: GrpcSession) -> None:
    box = create(owner)
    for session, number in ((owner, box.mailbox + 1), (owner, 0), (sender, box.mailbox)):
        for method, request in (
            ("ReceiveMessages", mailbox_pb2.ReceiveMessagesRequest(mailbox=number)),
            ("CloseMailbox", mailbox_pb2.CloseMailboxRequest(mailbox=number)),
        ):
            refused = session.refused(f"mailboxes.{method}", request)
            assert (refused.code, refused.reason) == (NOT_FOUND, "MAILBOX_NOT_FOUND")
    wrong = mailbox_pb2.CreateMailboxRequest(slots=1, slot_bytes=1, region=77)
    assert owner.refused("mailboxes.CreateMailbox", wrong).reason == "REGION_NOT_FOUND"
    with shm_file(LENGTH) as (name, _):
        small = mailbox_pb2.CreateMailboxRequest(
            slots=1000, slot_bytes=64, region=owner.register(name)
        )
        refused = owner.refused("mailboxes.CreateMailbox", small)
        assert (refused.code, refused.field) == (INVALID, "region")
        assert "1000 slots of 64 bytes take 80000 bytes" in refused.message
    many = mailbox_pb2.ReceiveMessagesRequest(mailbox=box.mailbox, limit=257)
    assert owner.refused("mailboxes.ReceiveMessages", many).field == "limit"
    long = mailbox_pb2.ReceiveMessagesRequest(mailbox=box.mailbox, timeout_ms=3_600_001)
    assert owner.refused("mailboxes.ReceiveMessages", long).field == "timeout_ms"


def test_messages_that_are_refused(owner: GrpcSession, sender: GrpcSession) -> None:
    box = create(owner)
    too_long = transfer_pb2.Job(send=transfer_pb2.SendJob(dst=box.descriptor, data=bytes(8193)))
    refused = sender.refused("transfers.Submit", transfer_pb2.SubmitRequest(jobs=[too_long]))
    assert (refused.code, refused.field) == (INVALID, "jobs[0].send.data")
    (end,) = sender.wait(send(sender, box.descriptor, bytes(101)))
    assert (end.status, end.detail) == (types_pb2.JOB_STATUS_INVALID, "DESTINATION_BOUNDS")
    nowhere = transfer_pb2.Job(send=transfer_pb2.SendJob(data=b"x"))
    refused = sender.refused("transfers.Submit", transfer_pb2.SubmitRequest(jobs=[nowhere]))
    assert (refused.code, refused.field) == (INVALID, "jobs[0].send.dst")


def test_the_right_to_send_is_not_given_by_hand(owner: GrpcSession) -> None:
    with shm_file(LENGTH) as (name, _):
        request = region_pb2.CreateGrantRequest(
            region=owner.register(name), rights=[types_pb2.RIGHT_SEND]
        )
        refused = owner.refused("regions.CreateGrant", request)
        assert (refused.code, refused.field) == (INVALID, "rights[0]")


def test_a_session_that_ends_takes_its_mailboxes_along(
    shared_pair: Pair, sender: GrpcSession
) -> None:
    with shared_pair[1].channel() as channel:
        owner = GrpcSession(channel)
        box = create(owner, slots=1)
        assert (
            sender.wait(send(sender, box.descriptor, b"fits"))[0].status == types_pb2.JOB_STATUS_OK
        )
        waiting = send(sender, box.descriptor, b"waits")
        owner.call("sessions.CloseSession", session_pb2.CloseSessionRequest())
        (end,) = sender.wait(waiting)
        assert end.detail == "REVOKED"
