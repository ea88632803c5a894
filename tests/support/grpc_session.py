# SPDX-License-Identifier: Apache-2.0
"""A session by gRPC alone, call by call as the services define them."""

from __future__ import annotations

import contextlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from transferd.v1 import (
    admin_pb2_grpc,
    mailbox_pb2_grpc,
    region_pb2,
    region_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
    transfer_pb2,
    transfer_pb2_grpc,
    types_pb2,
)

from support.waiting import WAIT_S

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.daemon import DaemonProcess


def tenants() -> list[dict[str, Any]]:
    """Configures a tenant that may do without the fd socket and name shared memory."""
    return [{"name": "tests", "uids": [os.getuid()], "lease_sessions": True, "shm_paths": True}]


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error as programs see it.

    Attributes:
        code: gRPC status code.
        reason: ErrorInfo.reason; empty where the daemon gave none.
        field: Path of the field that was wrong; empty where the error is of another kind.
        message: For people.
    """

    code: grpc.StatusCode
    reason: str
    field: str
    message: str


def refusal(error: grpc.RpcError) -> Refusal:
    """Reads an error with its details."""
    reason = field = ""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    for packed in status.details if status is not None else ():
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if packed.Unpack(info):
            assert info.domain == "transferd"
            reason = info.reason
        elif packed.Unpack(bad):
            field = bad.field_violations[0].field
            assert bad.field_violations[0].description
    return Refusal(error.code(), reason, field, error.details() or "")


class GrpcSession:
    """Stubs that carry a session's token.

    Attributes:
        token: Of the session; anything else to see what happens.
    """

    def __init__(self, channel: grpc.Channel, token: str = "") -> None:
        """Opens a session, unless a token is given.

        Args:
            channel: To the daemon.
            token: Of a session that is there already.
        """
        self.sessions = session_pb2_grpc.SessionServiceStub(channel)
        self.regions = region_pb2_grpc.RegionServiceStub(channel)
        self.transfers = transfer_pb2_grpc.TransferServiceStub(channel)
        self.mailboxes = mailbox_pb2_grpc.MailboxServiceStub(channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(channel)
        self.token = (
            token or self.call("sessions.OpenSession", session_pb2.OpenSessionRequest()).token
        )

    def call(self, method: str, request: Any, timeout_s: float = WAIT_S) -> Any:
        """Calls "service.Method"."""
        service, name = method.split(".")
        metadata = [("authorization", f"Bearer {self.token}")] if self._has_token else []
        stub = getattr(getattr(self, service), name)
        if name == "SubmitStream":
            return next(stub(iter([request]), timeout=timeout_s, metadata=metadata))
        return stub(request, timeout=timeout_s, metadata=metadata)

    @property
    def _has_token(self) -> bool:
        return bool(getattr(self, "token", ""))

    def refused(self, method: str, request: Any) -> Refusal:
        """Makes a call that has to fail.

        Raises:
            AssertionError: It worked.
        """
        try:
            answer = self.call(method, request)
        except grpc.RpcError as error:
            return refusal(error)
        raise AssertionError(f"{method} took {request!r} and answered {answer!r}")

    def register(self, name: str) -> int:
        """Registers POSIX shared memory by name; returns the region."""
        region: int = self.call(
            "regions.RegisterRegion", region_pb2.RegisterRegionRequest(shm_path=name)
        ).region
        return region

    def grant(self, region: int, imms: range = range(16)) -> Any:
        """Makes a grant on all of a region."""
        return self.call(
            "regions.CreateGrant",
            region_pb2.CreateGrantRequest(
                region=region,
                rights=[types_pb2.RIGHT_WRITE],
                imm_first=imms.start,
                imm_count=len(imms),
            ),
        )

    def write(
        self, region: int, descriptor: bytes, length: int, imm: int, count: int = 1
    ) -> list[int]:
        """Submits the same write some times; returns the jobs' ids."""
        job = transfer_pb2.Job(
            write=transfer_pb2.WriteJob(
                src_region=region, dst=descriptor, length_bytes=length, imm=imm
            )
        )
        request = transfer_pb2.SubmitRequest(jobs=[job] * count)
        return list(self.call("transfers.Submit", request).job_ids)

    def wait(self, job_ids: list[int], timeout_s: float = WAIT_S) -> list[Any]:
        """Waits for jobs; returns how they ended."""
        request = transfer_pb2.WaitJobsRequest(job_ids=job_ids, timeout_ms=int(timeout_s * 1000))
        return list(self.call("transfers.WaitJobs", request, timeout_s + 5).jobs)


@contextlib.contextmanager
def grpc_session(daemon: DaemonProcess) -> Iterator[GrpcSession]:
    """Opens a session by gRPC and closes it cleanly."""
    with daemon.channel() as channel:
        session = GrpcSession(channel)
        yield session
        session.call("sessions.CloseSession", session_pb2.CloseSessionRequest())


@contextlib.contextmanager
def shm_file(length: int) -> Iterator[tuple[str, int]]:
    """Makes POSIX shared memory whose pages are there; gives its name and fd."""
    name = f"/tests-{secrets.token_hex(8)}"
    path = Path("/dev/shm") / name[1:]
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, length)
        yield name, fd
    finally:
        os.close(fd)
        path.unlink()
