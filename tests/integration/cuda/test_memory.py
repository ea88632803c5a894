# SPDX-License-Identifier: Apache-2.0
"""GPU memory in a real daemon, by handles that name nothing: copied jobs, who may map it."""

from __future__ import annotations

import fcntl
import os
import threading
from typing import TYPE_CHECKING

import grpc
import pytest

from transferd.native.client_half import lib
from transferd.native.names import Detail, JobStatus
from transferd.v1 import admin_pb2, attach_pb2, mailbox_pb2, region_pb2, types_pb2

from support.cuda_client import ALL, BASE, SIZE, UUID, CudaClient, CudaProcess
from support.levels import back_to, level
from support.raw_session import read
from support.waiting import eventually

if TYPE_CHECKING:
    from support.daemon import DaemonProcess

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = pytest.mark.slow

OK = (JobStatus.OK, Detail.NONE)
BAD = grpc.StatusCode.INVALID_ARGUMENT
STILL = "STILL_MAPPED"


def ended(client: CudaClient, job: int) -> tuple[int, int]:
    end = eventually(lambda: client.end_of(job), "the job's end")
    assert end is not None
    return end


def revoke(client: CudaClient, grant_id: int) -> str:
    """Takes a grant back; gives the reason if it is refused."""
    request = region_pb2.RevokeGrantRequest(grant_id=grant_id)
    try:
        client.calls.call("regions.RevokeGrant", request)
    except grpc.RpcError:
        return client.calls.refused("regions.RevokeGrant", request).reason
    return ""


def test_copied_jobs_count(shared_pair: Pair) -> None:
    daemon, _ = shared_pair
    with CudaClient(daemon, "from") as sender, CudaClient(daemon, "to") as receiver:
        source = sender.device_region()
        granted = receiver.grant(receiver.device_region())
        counter = receiver.counters[granted.counter_slots[1]]
        handle = sender.open(granted.descriptor).handle
        job = sender.arm_copied(source, handle, imm=1)
        eventually(lambda: sender.ring.head == sender.ring.tail, "the entry is taken")
        assert sender.end_of(job) is None
        assert counter.value == 0
        sender.bump(1)
        assert ended(sender, job) == OK
        assert counter.value == 1
        path = sender.records[job & (int(sender.header.record_count) - 1)].path
        assert path & lib.TFD_PATH_PROVIDER_MASK == lib.TFD_PATH_CUDA
        job = sender.submit(op=lib.TFD_OP_WRITE, src_region=source, dst_grant=handle, length=1)
        assert ended(sender, job) == (JobStatus.INVALID, Detail.DEVICE_MEMORY)
        job = sender.submit(op=lib.TFD_OP_IMM, dst_grant=handle, imm=1)
        assert ended(sender, job) == OK
        assert counter.value == 2


def test_a_revoke_ends_what_waits(shared_pair: Pair) -> None:
    daemon, _ = shared_pair
    with CudaClient(daemon, "from") as sender, CudaClient(daemon, "to") as receiver:
        granted = receiver.grant(receiver.device_region())
        handle = sender.open(granted.descriptor).handle
        job = sender.arm_copied(sender.device_region(), handle)
        eventually(lambda: sender.ring.head == sender.ring.tail, "the entry is taken")
        assert revoke(receiver, granted.grant_id) == ""
        assert sender.end_of(job) == (JobStatus.CANCELLED, Detail.REVOKED)
        sender.bump(1)
        counter = receiver.counters[granted.counter_slots[0]]
        assert (counter.value, counter.faults, counter.lost) == (0, 1, 1)


def test_another_host_has_no_path(shared_pair: Pair) -> None:
    near, far = shared_pair
    with CudaClient(near, "from") as sender, CudaClient(far, "to") as receiver:
        granted = receiver.grant(receiver.device_region())
        opened = sender.open(granted.descriptor)
        assert list(opened.rights) == list(ALL)
        job = sender.arm_copied(sender.device_region(), opened.handle)
        assert ended(sender, job) == (JobStatus.INVALID, Detail.DEVICE_MEMORY)
        assert sender.map(opened.handle).error.reason == "MAP_OTHER_HOST"


def test_what_is_told_of_a_region(shared_pair: Pair) -> None:
    daemon, _ = shared_pair
    with CudaClient(daemon, "own") as owner:
        memory_id = owner.share_cuda().share_memory.memory_id
        request = region_pb2.RegisterRegionRequest(
            memory_id=memory_id, offset_bytes=16, length_bytes=32
        )
        made = owner.calls.call("regions.RegisterRegion", request)
        assert (made.length_bytes, made.rails) == (32, 0)
        for field, value in (("offset_bytes", 8), ("offset_bytes", SIZE), ("length_bytes", SIZE)):
            wrong = region_pb2.RegisterRegionRequest()
            wrong.CopyFrom(request)
            setattr(wrong, field, value)
            refused = owner.calls.refused("regions.RegisterRegion", wrong)
            assert (refused.code, refused.field) == (BAD, field)
        mailbox = mailbox_pb2.CreateMailboxRequest(region=made.region, slots=1, slot_bytes=1)
        assert owner.calls.refused("mailboxes.CreateMailbox", mailbox).code == BAD
        listed = owner.calls.call("admin.ListRegions", admin_pb2.ListRegionsRequest()).regions
        assert [(one.kind, one.length_bytes, one.mappings) for one in listed] == [("cuda", 32, 0)]


def test_the_right_to_map_host_memory(shared_pair: Pair) -> None:
    daemon, _ = shared_pair
    fd = os.memfd_create("m", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with CudaClient(daemon, "own") as owner:
        region = owner.register(owner.channel, fd)
        request = region_pb2.CreateGrantRequest(region=region, rights=[types_pb2.RIGHT_MAP])
        refused = owner.calls.refused("regions.CreateGrant", request)
        assert (refused.code, refused.field) == (BAD, "rights")
    os.close(fd)


def test_one_process_maps_its_own(shared_pair: Pair) -> None:
    daemon, _ = shared_pair
    with CudaClient(daemon, "own") as owner, CudaClient(daemon, "map") as mapper:
        granted = owner.grant(owner.device_region())
        handle = mapper.open(granted.descriptor).handle
        assert mapper.map(handle + 1).error.reason == "OPEN_NOT_FOUND"
        answer = mapper.map(handle).map
        assert (answer.own_process, answer.base, answer.ipc_handle) == (True, BASE, b"")
        assert (answer.device_uuid, answer.size_bytes, answer.buffer_id) == (UUID, SIZE, 7)
        assert revoke(owner, granted.grant_id) == STILL
        asked, _ = read(mapper.sock)
        assert list(asked.map_revoked.map_ids) == [answer.map_id]
        mapper.fd_ask(unmap=attach_pb2.UnmapRequest(map_id=answer.map_id))
        assert revoke(owner, granted.grant_id) == ""


def test_processes_that_unmap_and_that_do_not(shared_pair: Pair) -> None:
    daemon, _ = shared_pair
    with CudaClient(daemon, "own") as owner:
        region = owner.device_region()
        granted = owner.grant(region)
        with CudaProcess(daemon, "map", granted.descriptor) as good:
            assert good.said.isdigit()
            assert revoke(owner, granted.grant_id) == ""
            assert good.line() == f"asked {good.said}"
        granted = owner.grant(region)
        with CudaProcess(daemon, "keep", granted.descriptor) as bad:
            assert revoke(owner, granted.grant_id) == STILL
            assert bad.line() == f"asked {bad.said}"
            request = region_pb2.DeregisterRegionRequest(region=region)
            refused = owner.calls.refused("regions.DeregisterRegion", request)
            assert refused.reason == STILL
            assert str(bad.pid) in refused.message
            bad.kill()
            eventually(lambda: revoke(owner, granted.grant_id) == "", "its death is noticed")
        owner.calls.call("regions.DeregisterRegion", request)


@pytest.mark.chaos
def test_a_mapper_killed_while_it_is_waited_for(shared_pair: Pair) -> None:
    daemon, _ = shared_pair
    with CudaClient(daemon, "own") as owner:
        granted = owner.grant(owner.device_region())
        with CudaProcess(daemon, "keep", granted.descriptor) as mapper:
            reasons: list[str] = []
            waiting = threading.Thread(
                target=lambda: reasons.append(revoke(owner, granted.grant_id))
            )
            waiting.start()
            assert mapper.line() == f"asked {mapper.said}"
            mapper.kill()
            waiting.join()
            assert reasons == [""]


@pytest.mark.chaos
def test_an_owner_killed_while_it_is_mapped(shared_pair: Pair) -> None:
    daemon, _ = shared_pair
    before = level(daemon)
    with CudaProcess(daemon, "own") as owner, CudaClient(daemon, "map") as mapper:
        handle = mapper.open(bytes.fromhex(owner.said)).handle
        answer = mapper.map(handle).map
        assert (answer.ipc_handle, answer.owner_pid) == (b"h" * 64, owner.pid)
        assert not answer.own_process
        job = mapper.arm_copied(mapper.device_region(), handle)
        owner.kill()
        asked, _ = read(mapper.sock)
        assert list(asked.map_revoked.map_ids) == [answer.map_id]
        assert ended(mapper, job)[0] == JobStatus.CANCELLED
        assert mapper.map(handle).error.reason in ("GRANT_REVOKED", "OPEN_NOT_FOUND")
        mapper.fd_ask(unmap=attach_pb2.UnmapRequest(map_id=answer.map_id))
    back_to(daemon, before)
