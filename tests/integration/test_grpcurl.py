# SPDX-License-Identifier: Apache-2.0
"""A client without an SDK: everything by grpcurl, with nothing but reflection."""

from __future__ import annotations

import base64
import contextlib
import os
from multiprocessing import shared_memory
from typing import TYPE_CHECKING, Any

import pytest

from support import grpcurl
from support.grpcurl import Grpcurl, GrpcurlError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import MakeDaemon

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(grpcurl.executable() is None, reason="grpcurl is not installed"),
]

REGION_BYTES = 1 << 20
IMM = 7
SERVICES = {
    "transferd.v1.SessionService",
    "transferd.v1.RegionService",
    "transferd.v1.TransferService",
    "transferd.v1.AdminService",
    "grpc.health.v1.Health",
}


def tenants() -> list[dict[str, Any]]:
    """Configures a tenant that may do without the fd socket."""
    return [{"name": "tests", "uids": [os.getuid()], "lease_sessions": True, "shm_paths": True}]


@pytest.fixture
def sender(make_daemon: MakeDaemon) -> Grpcurl:
    return Grpcurl(make_daemon(tenants=tenants()).socket)


@pytest.fixture
def receiver(make_daemon: MakeDaemon) -> Grpcurl:
    return Grpcurl(make_daemon(tenants=tenants()).socket)


@contextlib.contextmanager
def shared(size_bytes: int) -> Iterator[shared_memory.SharedMemory]:
    """Makes a POSIX shared memory object that is gone afterwards."""
    memory = shared_memory.SharedMemory(create=True, size=size_bytes)
    try:
        yield memory
    finally:
        memory.close()
        memory.unlink()


def view(memory: shared_memory.SharedMemory) -> memoryview:
    assert memory.buf is not None
    return memory.buf


def register(session: Grpcurl, memory: shared_memory.SharedMemory) -> str:
    reply = session.call(
        "RegionService/RegisterRegion", {"shm_path": f"/{memory.name.lstrip('/')}", "name": "shm"}
    )
    assert int(reply["length_bytes"]) == memory.size, reply
    return str(reply["region"])


def test_lists_and_describes(sender: Grpcurl) -> None:
    assert set(sender.list()) >= SERVICES
    assert "transferd.peer.v1.PeerService" not in sender.list()
    assert "transferd.v1.TransferService.Submit" in sender.list("transferd.v1.TransferService")
    assert "rpc Submit" in sender.describe("transferd.v1.TransferService")
    assert "length_bytes" in sender.describe("transferd.v1.WriteJob")


def test_health_is_serving(sender: Grpcurl) -> None:
    assert "SERVING" in sender.run("grpc.health.v1.Health/Check")


def test_writes_between_two_daemons(sender: Grpcurl, receiver: Grpcurl) -> None:
    with shared(REGION_BYTES) as source, shared(REGION_BYTES) as target:
        payload = os.urandom(65_536)
        view(source)[4096 : 4096 + len(payload)] = payload
        here, there = sender.open_session("sender"), receiver.open_session("receiver")

        region = register(there, target)
        grant = there.call(
            "RegionService/CreateGrant",
            {"region": region, "rights": ["RIGHT_WRITE"], "imm_first": IMM, "imm_count": 1},
        )
        write = {
            "src_region": register(here, source),
            "src_offset_bytes": 4096,
            "dst": grant["descriptor"],
            "dst_offset_bytes": 8192,
            "length_bytes": len(payload),
            "imm": IMM,
        }
        jobs = here.call("TransferService/Submit", {"jobs": [{"write": write}]})
        ends = here.call(
            "TransferService/WaitJobs", {"job_ids": jobs["job_ids"], "timeout_ms": 10_000}
        )
        (end,) = ends["jobs"]
        assert end["status"] == "JOB_STATUS_OK", end
        assert int(end["bytes"]) == len(payload)
        assert end["path"]["provider"] == "tcp"

        waited = there.call(
            "TransferService/WaitCounter", {"imm": IMM, "target": 1, "timeout_ms": 10_000}
        )
        assert waited["reached"]
        counter = there.call("TransferService/GetCounter", {"imm": IMM})["counter"]
        assert (counter["imm"], counter["value"]) == (IMM, "1")
        assert bytes(view(target)[8192 : 8192 + len(payload)]) == payload

        there.call("RegionService/RevokeGrant", {"grant_id": grant["grant_id"]})
        here.call("SessionService/CloseSession")
        there.call("SessionService/CloseSession")


def test_refusals_say_what_is_wrong(sender: Grpcurl) -> None:
    with pytest.raises(GrpcurlError, match="Unauthenticated"):
        sender.call("SessionService/GetSession")
    session = sender.open_session("clumsy")
    forged = base64.b64encode(b"tfd1 not a descriptor").decode()
    with pytest.raises(GrpcurlError, match="DESCRIPTOR_INVALID"):
        session.call("RegionService/OpenDescriptors", {"descriptors": [forged]})
    with pytest.raises(GrpcurlError, match=r"(?s)InvalidArgument.*jobs\[0\]"):
        session.call("TransferService/Submit", {"jobs": [{}]})
    with pytest.raises(GrpcurlError, match="InvalidArgument"):
        session.call("TransferService/GetCounter", {"imm": 1 << 20})
    with pytest.raises(GrpcurlError, match=r"(?s)InvalidArgument.*shm_path"):
        session.call("RegionService/RegisterRegion", {"shm_path": "/transferd-test-none"})


def test_sessions_end_when_their_lease_does(sender: Grpcurl) -> None:
    session = sender.open_session("brief", lease_ms=1000)
    assert session.call("SessionService/GetSession")["name"] == "brief"
    session.call("SessionService/CloseSession")
    with pytest.raises(GrpcurlError, match="Unauthenticated"):
        session.call("SessionService/GetSession")
