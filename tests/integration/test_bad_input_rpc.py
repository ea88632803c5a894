# SPDX-License-Identifier: Apache-2.0
"""Wrong values in every call of transferd.v1: code, reason and field of each refusal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from transferd.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    region_pb2,
    session_pb2,
    session_pb2_grpc,
    transfer_pb2,
    types_pb2,
)

from support.grpc_session import GrpcSession, grpc_session, refusal, shm_file
from support.waiting import WAIT_S, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.daemon import DaemonProcess

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = pytest.mark.slow

LENGTH = 1 << 16
U32, U64 = (1 << 32) - 1, (1 << 64) - 1
IMM_COUNT = 1 << 20
INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
FULL = grpc.StatusCode.RESOURCE_EXHAUSTED
BAD = "INVALID_REQUEST"
WRITE = [types_pb2.RIGHT_WRITE]


@dataclass(frozen=True, slots=True)
class Setting:
    """What the requests of the table can name.

    Attributes:
        session: The caller.
        region: A region of its own.
        shm: Name of memory that can be registered.
        descriptor: Of a grant at the other daemon: imms 0 to 15, LENGTH bytes.
        foreign_region: A region of another session of the same daemon.
        foreign_grant: A grant of that session.
        foreign_job: A job of that session.
    """

    session: GrpcSession
    region: int
    shm: str
    descriptor: bytes
    foreign_region: int
    foreign_grant: int
    foreign_job: int


@pytest.fixture(scope="module")
def setting(shared_pair: Pair) -> Iterator[Setting]:
    near, far = shared_pair
    with (
        shm_file(LENGTH) as (name, _),
        grpc_session(near) as session,
        grpc_session(near) as other,
        grpc_session(far) as receiver,
    ):
        descriptor = receiver.grant(receiver.register(name)).descriptor
        foreign = other.register(name)
        foreign_grant = other.grant(foreign)
        (job,) = other.write(foreign, descriptor, 1, 0)
        other.wait([job])
        yield Setting(
            session, session.register(name), name, descriptor, foreign, foreign_grant.grant_id, job
        )


def register(**fields: Any) -> Callable[[Setting], Any]:
    return lambda s: region_pb2.RegisterRegionRequest(**({"shm_path": s.shm} | fields))


def create(**fields: Any) -> Callable[[Setting], Any]:
    def make(s: Setting) -> Any:
        values: dict[str, Any] = {"region": s.region, "rights": WRITE} | fields
        return region_pb2.CreateGrantRequest(**values)

    return make


def write(**fields: Any) -> Callable[[Setting], Any]:
    """A batch of two: the second is wrong, so that the path's index is proven."""
    of_job = {key: fields.pop(key) for key in ("deadline_ms", "priority") if key in fields}

    def make(s: Setting) -> Any:
        good: dict[str, Any] = {
            "src_region": s.region,
            "dst": s.descriptor,
            "imm": 1,
            "length_bytes": 1,
        }
        return transfer_pb2.SubmitRequest(
            jobs=[
                transfer_pb2.Job(write=transfer_pb2.WriteJob(**good)),
                transfer_pb2.Job(write=transfer_pb2.WriteJob(**(good | fields)), **of_job),
            ]
        )

    return make


def imm(**fields: Any) -> Callable[[Setting], Any]:
    return lambda s: transfer_pb2.SubmitRequest(
        jobs=[transfer_pb2.Job(imm=transfer_pb2.ImmJob(**({"dst": s.descriptor} | fields)))]
    )


def const(message: Any) -> Callable[[Setting], Any]:
    return lambda _: message


SUBMIT = transfer_pb2.SubmitRequest
STREAM = transfer_pb2.SubmitStreamRequest
WAIT = transfer_pb2.WaitJobsRequest
EMPTY = transfer_pb2.Job()

# (call, request, code, reason, field)
TABLE: list[tuple[str, Callable[[Setting], Any], grpc.StatusCode, str, str]] = [
    (
        "sessions.OpenSession",
        const(session_pb2.OpenSessionRequest(name="n" * 65)),
        INVALID,
        BAD,
        "name",
    ),
    (
        "sessions.OpenSession",
        const(session_pb2.OpenSessionRequest(name="é" * 33)),
        INVALID,
        BAD,
        "name",
    ),
    (
        "sessions.OpenSession",
        const(session_pb2.OpenSessionRequest(lease_ms=999)),
        INVALID,
        BAD,
        "lease_ms",
    ),
    (
        "sessions.OpenSession",
        const(session_pb2.OpenSessionRequest(lease_ms=600_001)),
        INVALID,
        BAD,
        "lease_ms",
    ),
    (
        "sessions.OpenSession",
        const(session_pb2.OpenSessionRequest(lease_ms=U32)),
        INVALID,
        BAD,
        "lease_ms",
    ),
    ("regions.RegisterRegion", const(region_pb2.RegisterRegionRequest()), INVALID, BAD, "source"),
    (
        "regions.RegisterRegion",
        const(region_pb2.RegisterRegionRequest(memory_id=0)),
        NOT_FOUND,
        "MEMORY_NOT_FOUND",
        "",
    ),
    (
        "regions.RegisterRegion",
        const(region_pb2.RegisterRegionRequest(memory_id=U64)),
        NOT_FOUND,
        "MEMORY_NOT_FOUND",
        "",
    ),
    ("regions.RegisterRegion", register(shm_path=""), INVALID, BAD, "shm_path"),
    ("regions.RegisterRegion", register(shm_path="/"), INVALID, BAD, "shm_path"),
    ("regions.RegisterRegion", register(shm_path="/../etc/passwd"), INVALID, BAD, "shm_path"),
    ("regions.RegisterRegion", register(shm_path="/.."), INVALID, BAD, "shm_path"),
    ("regions.RegisterRegion", register(shm_path="/a\0b"), INVALID, BAD, "shm_path"),
    ("regions.RegisterRegion", register(shm_path="/" + "n" * 300), INVALID, BAD, "shm_path"),
    ("regions.RegisterRegion", register(shm_path="/no-such-object"), INVALID, BAD, "shm_path"),
    ("regions.RegisterRegion", register(offset_bytes=1), INVALID, BAD, "offset_bytes"),
    ("regions.RegisterRegion", register(offset_bytes=LENGTH), INVALID, BAD, "offset_bytes"),
    ("regions.RegisterRegion", register(offset_bytes=U64 - 4095), INVALID, BAD, "offset_bytes"),
    ("regions.RegisterRegion", register(length_bytes=LENGTH + 1), INVALID, BAD, "length_bytes"),
    ("regions.RegisterRegion", register(length_bytes=U64), INVALID, BAD, "length_bytes"),
    (
        "regions.RegisterRegion",
        register(offset_bytes=4096, length_bytes=U64 - 4095),
        INVALID,
        BAD,
        "length_bytes",
    ),
    ("regions.RegisterRegion", register(name="n" * 65), INVALID, BAD, "name"),
    (
        "regions.DeregisterRegion",
        const(region_pb2.DeregisterRegionRequest()),
        NOT_FOUND,
        "REGION_NOT_FOUND",
        "",
    ),
    (
        "regions.DeregisterRegion",
        const(region_pb2.DeregisterRegionRequest(region=U64)),
        NOT_FOUND,
        "REGION_NOT_FOUND",
        "",
    ),
    (
        "regions.DeregisterRegion",
        lambda s: region_pb2.DeregisterRegionRequest(region=s.foreign_region),
        NOT_FOUND,
        "REGION_NOT_FOUND",
        "",
    ),
    ("regions.CreateGrant", create(region=U64), NOT_FOUND, "REGION_NOT_FOUND", ""),
    (
        "regions.CreateGrant",
        lambda s: create(region=s.foreign_region)(s),
        NOT_FOUND,
        "REGION_NOT_FOUND",
        "",
    ),
    ("regions.CreateGrant", create(rights=[]), INVALID, BAD, "rights"),
    (
        "regions.CreateGrant",
        create(rights=[types_pb2.RIGHT_UNSPECIFIED]),
        INVALID,
        BAD,
        "rights[0]",
    ),
    ("regions.CreateGrant", create(rights=[types_pb2.RIGHT_WRITE, 77]), INVALID, BAD, "rights[1]"),
    ("regions.CreateGrant", create(offset_bytes=LENGTH + 1), INVALID, BAD, "offset_bytes"),
    ("regions.CreateGrant", create(offset_bytes=U64), INVALID, BAD, "offset_bytes"),
    ("regions.CreateGrant", create(length_bytes=LENGTH + 1), INVALID, BAD, "length_bytes"),
    ("regions.CreateGrant", create(offset_bytes=2, length_bytes=U64), INVALID, BAD, "length_bytes"),
    ("regions.CreateGrant", create(imm_first=IMM_COUNT), INVALID, BAD, "imm_first"),
    ("regions.CreateGrant", create(imm_first=U32, imm_count=U32), INVALID, BAD, "imm_first"),
    (
        "regions.CreateGrant",
        create(imm_first=IMM_COUNT - 1, imm_count=2),
        INVALID,
        BAD,
        "imm_count",
    ),
    ("regions.CreateGrant", create(imm_count=U32), INVALID, BAD, "imm_count"),
    ("regions.CreateGrant", create(imm_count=IMM_COUNT), FULL, "COUNTERS", ""),
    ("regions.CreateGrant", create(expires_ms=U64), INVALID, BAD, "expires_ms"),
    (
        "regions.RevokeGrant",
        const(region_pb2.RevokeGrantRequest()),
        NOT_FOUND,
        "GRANT_NOT_FOUND",
        "",
    ),
    (
        "regions.RevokeGrant",
        const(region_pb2.RevokeGrantRequest(grant_id=U64)),
        NOT_FOUND,
        "GRANT_NOT_FOUND",
        "",
    ),
    (
        "regions.RevokeGrant",
        lambda s: region_pb2.RevokeGrantRequest(grant_id=s.foreign_grant),
        NOT_FOUND,
        "GRANT_NOT_FOUND",
        "",
    ),
    (
        "regions.FenceGrant",
        lambda s: region_pb2.FenceGrantRequest(grant_id=s.foreign_grant),
        NOT_FOUND,
        "GRANT_NOT_FOUND",
        "",
    ),
    ("regions.FenceGrants", const(region_pb2.FenceGrantsRequest()), INVALID, BAD, "fences"),
    (
        "regions.OpenDescriptors",
        const(region_pb2.OpenDescriptorsRequest()),
        INVALID,
        BAD,
        "descriptors",
    ),
    (
        "regions.OpenDescriptors",
        const(region_pb2.OpenDescriptorsRequest(descriptors=[b""] * 4097)),
        INVALID,
        BAD,
        "descriptors",
    ),
    (
        "regions.OpenDescriptors",
        const(region_pb2.OpenDescriptorsRequest(descriptors=[b"x"])),
        INVALID,
        "DESCRIPTOR_INVALID",
        "descriptors",
    ),
    (
        "regions.OpenDescriptors",
        lambda s: region_pb2.OpenDescriptorsRequest(
            descriptors=[s.descriptor, b"tfd2" + s.descriptor[4:]]
        ),
        INVALID,
        "DESCRIPTOR_INVALID",
        "descriptors[1]",
    ),
    (
        "regions.CloseDescriptor",
        const(region_pb2.CloseDescriptorRequest()),
        NOT_FOUND,
        "OPEN_NOT_FOUND",
        "",
    ),
    (
        "regions.CloseDescriptor",
        const(region_pb2.CloseDescriptorRequest(handle=U64)),
        NOT_FOUND,
        "OPEN_NOT_FOUND",
        "",
    ),
    ("transfers.Submit", const(SUBMIT()), INVALID, BAD, "jobs"),
    ("transfers.Submit", const(SUBMIT(jobs=[EMPTY] * 4097)), INVALID, BAD, "jobs"),
    ("transfers.Submit", const(SUBMIT(jobs=[EMPTY])), INVALID, BAD, "jobs[0].operation"),
    ("transfers.Submit", write(dst=b""), INVALID, "DESCRIPTOR_INVALID", "jobs[1].write.dst"),
    ("transfers.Submit", write(dst=b"tfd1"), INVALID, "DESCRIPTOR_INVALID", "jobs[1].write.dst"),
    ("transfers.Submit", write(imm=IMM_COUNT), INVALID, BAD, "jobs[1].write.imm"),
    ("transfers.Submit", write(imm=U32), INVALID, BAD, "jobs[1].write.imm"),
    (
        "transfers.Submit",
        write(length_bytes=(1 << 40) + 1),
        INVALID,
        BAD,
        "jobs[1].write.length_bytes",
    ),
    ("transfers.Submit", write(length_bytes=U64), INVALID, BAD, "jobs[1].write.length_bytes"),
    ("transfers.Submit", write(priority=9), INVALID, BAD, "jobs[1].priority"),
    ("transfers.Submit", write(deadline_ms=U64), INVALID, BAD, "jobs[1].deadline_ms"),
    ("transfers.Submit", imm(imm=IMM_COUNT), INVALID, BAD, "jobs[0].imm.imm"),
    ("transfers.Submit", imm(dst=b"?"), INVALID, "DESCRIPTOR_INVALID", "jobs[0].imm.dst"),
    ("transfers.SubmitStream", const(STREAM()), INVALID, BAD, "jobs"),
    ("transfers.SubmitStream", const(STREAM(jobs=[EMPTY])), INVALID, BAD, "jobs[0].operation"),
    ("transfers.WaitJobs", const(WAIT()), INVALID, BAD, "job_ids"),
    ("transfers.WaitJobs", const(WAIT(job_ids=[1] * 4097)), INVALID, BAD, "job_ids"),
    (
        "transfers.WaitJobs",
        const(WAIT(job_ids=[1], timeout_ms=3_600_001)),
        INVALID,
        BAD,
        "timeout_ms",
    ),
    ("transfers.WaitJobs", const(WAIT(job_ids=[0])), NOT_FOUND, "JOB_NOT_FOUND", ""),
    ("transfers.WaitJobs", const(WAIT(job_ids=[U64])), NOT_FOUND, "JOB_NOT_FOUND", ""),
    ("transfers.WaitJobs", lambda s: WAIT(job_ids=[s.foreign_job]), NOT_FOUND, "JOB_NOT_FOUND", ""),
    ("transfers.CancelJob", const(transfer_pb2.CancelJobRequest()), NOT_FOUND, "JOB_NOT_FOUND", ""),
    (
        "transfers.CancelJob",
        const(transfer_pb2.CancelJobRequest(job_id=U64)),
        NOT_FOUND,
        "JOB_NOT_FOUND",
        "",
    ),
    (
        "transfers.CancelJob",
        lambda s: transfer_pb2.CancelJobRequest(job_id=s.foreign_job),
        NOT_FOUND,
        "JOB_NOT_FOUND",
        "",
    ),
    (
        "transfers.GetCounter",
        const(transfer_pb2.GetCounterRequest(imm=IMM_COUNT)),
        INVALID,
        BAD,
        "imm",
    ),
    ("transfers.WaitCounter", const(transfer_pb2.WaitCounterRequest(imm=U32)), INVALID, BAD, "imm"),
    (
        "transfers.WaitCounter",
        const(transfer_pb2.WaitCounterRequest(timeout_ms=U64)),
        INVALID,
        BAD,
        "timeout_ms",
    ),
    (
        "transfers.AcknowledgeCounter",
        const(transfer_pb2.AcknowledgeCounterRequest(imm=IMM_COUNT)),
        INVALID,
        BAD,
        "imm",
    ),
    (
        "admin.ListSessions",
        const(admin_pb2.ListSessionsRequest(page_token="x")),
        INVALID,
        BAD,
        "page_token",
    ),
    (
        "admin.ListRegions",
        const(admin_pb2.ListRegionsRequest(page_token="-1")),
        INVALID,
        BAD,
        "page_token",
    ),
    (
        "admin.ListRegions",
        const(admin_pb2.ListRegionsRequest(page_token="9" * 21)),
        INVALID,
        BAD,
        "page_token",
    ),
]


def _name(row: Any) -> str:
    return f"{row[0]}-{row[4] or row[3]}"


@pytest.mark.parametrize(
    ("method", "make", "code", "reason", "field"), TABLE, ids=[_name(row) for row in TABLE]
)
def test_refused_by_name(
    setting: Setting,
    method: str,
    make: Callable[[Setting], Any],
    code: grpc.StatusCode,
    reason: str,
    field: str,
) -> None:
    seen = setting.session.refused(method, make(setting))
    assert (seen.code, seen.reason, seen.field) == (code, reason, field), seen.message
    assert len(seen.message) > len(field) + 5  # says more than where
    # The session lives on, and a correct call works.
    assert setting.session.call("sessions.GetSession", session_pb2.GetSessionRequest()).session_id


SERVICES: list[tuple[str, Any]] = [
    ("sessions", session_pb2.DESCRIPTOR.services_by_name["SessionService"]),
    ("regions", region_pb2.DESCRIPTOR.services_by_name["RegionService"]),
    ("transfers", transfer_pb2.DESCRIPTOR.services_by_name["TransferService"]),
    ("admin", admin_pb2.DESCRIPTOR.services_by_name["AdminService"]),
]
WITHOUT_TOKEN = {"OpenSession", *(m.name for m in SERVICES[3][1].methods)}
METHODS = [(service, method) for service, found in SERVICES for method in found.methods]


def test_the_table_has_every_call_that_takes_values() -> None:
    with_fields = {f"{s}.{m.name}" for s, m in METHODS if m.input_type.fields}
    free = {"admin.ListJobs"}  # any number names a session, or none; any limit is cut
    assert {row[0] for row in TABLE} == with_fields - free


@pytest.mark.parametrize("token", ["", "0" * 64, "zz", "f" * 63, "é".encode().hex() * 400])
def test_token_that_names_no_session(shared_pair: Pair, token: str) -> None:
    with shared_pair[0].channel() as channel:
        caller = GrpcSession(channel, token or "unused")
        if not token:
            caller.token = ""
        for service, method in METHODS:
            if method.name in WITHOUT_TOKEN:
                continue
            request = method.input_type._concrete_class()
            seen = caller.refused(f"{service}.{method.name}", request)
            assert seen.code is grpc.StatusCode.UNAUTHENTICATED, method.name
            assert seen.reason == ("TOKEN_UNKNOWN" if token else "TOKEN_MISSING")


def test_token_belongs_to_one_daemon(shared_pair: Pair) -> None:
    with grpc_session(shared_pair[0]) as session, shared_pair[1].channel() as channel:
        seen = GrpcSession(channel, session.token).refused(
            "sessions.GetSession", session_pb2.GetSessionRequest()
        )
        assert seen.reason == "TOKEN_UNKNOWN"


def test_closed_session(shared_pair: Pair) -> None:
    with shared_pair[0].channel() as channel:
        session = GrpcSession(channel)
        session.call("sessions.CloseSession", session_pb2.CloseSessionRequest())
        seen = session.refused("transfers.GetCounter", transfer_pb2.GetCounterRequest(imm=1))
        assert seen.code is grpc.StatusCode.UNAUTHENTICATED


def test_expired_lease(shared_pair: Pair) -> None:
    """A call that waits does not hear for ever from a session that is over; its token is dead."""
    with shared_pair[0].channel() as channel:
        stub = session_pb2_grpc.SessionServiceStub(channel)
        opened = stub.OpenSession(session_pb2.OpenSessionRequest(lease_ms=1000), timeout=WAIT_S)
        session = GrpcSession(channel, opened.token)
        admin = admin_pb2_grpc.AdminServiceStub(channel)

        def listed() -> bool:
            sessions = admin.ListSessions(admin_pb2.ListSessionsRequest(), timeout=WAIT_S).sessions
            return any(one.session_id == opened.session_id for one in sessions)

        assert listed()
        eventually(lambda: not listed(), "the lease ended the session", 5.0)
        seen = session.refused("sessions.RenewSession", session_pb2.RenewSessionRequest())
        assert seen.code is grpc.StatusCode.UNAUTHENTICATED


RAW = [b"\xff", b"\x08", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x05ab", bytes(range(256))]


@pytest.mark.parametrize("data", RAW, ids=[raw.hex()[:12] for raw in RAW])
def test_bytes_that_are_no_message(shared_pair: Pair, data: bytes) -> None:
    """Wrong field types on the wire: every call answers with an error, and the daemon serves on."""
    daemon = shared_pair[0]
    with daemon.channel() as channel:
        for _, method in METHODS:
            path = f"/{method.containing_service.full_name}/{method.name}"
            call = channel.unary_unary(path, lambda raw: raw, lambda raw: raw)
            with pytest.raises(grpc.RpcError) as caught:
                call(data, timeout=WAIT_S)
            code = caught.value.code()
            assert code is not grpc.StatusCode.DEADLINE_EXCEEDED, method.name
            assert "Traceback" not in refusal(caught.value).message
    assert daemon.status().state == "SERVING"


def test_message_that_is_too_long(shared_pair: Pair) -> None:
    with grpc_session(shared_pair[0]) as session:
        request = region_pb2.OpenDescriptorsRequest(descriptors=[bytes(17 << 20)])
        with pytest.raises(grpc.RpcError) as caught:
            session.call("regions.OpenDescriptors", request)
        assert caught.value.code() is FULL


def test_unknown_call(shared_pair: Pair) -> None:
    with shared_pair[0].channel() as channel:
        call = channel.unary_unary(
            "/transferd.v1.Nothing/Nothing", lambda raw: raw, lambda raw: raw
        )
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=WAIT_S)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
