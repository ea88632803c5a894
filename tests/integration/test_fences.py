# SPDX-License-Identifier: Apache-2.0
"""Fences on real daemons: after the answer no byte lands; all the rest goes on."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
import pytest

import transferd
import transferd.aio
from transferd.native.names import JobStatus
from transferd.v1 import region_pb2

from support.canary import KINDS, Canary
from support.grpc_session import grpc_session, shm_file
from support.waiting import WAIT_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.daemon import DaemonProcess

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = pytest.mark.slow

ROUNDS = 30
MIB = 1 << 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["two daemons", "one daemon"])
@pytest.mark.parametrize("shared_memory", [True, False], ids=["ring", "grpc"])
def test_canary(shared_pair: Pair, where: str, shared_memory: bool, kind: str) -> None:
    near, far = shared_pair
    if where == "one daemon":
        far = near
    with (
        transferd.Client(near.socket, shared_memory=shared_memory) as sender,
        transferd.Client(far.socket, shared_memory=shared_memory) as receiver,
        Canary(kind, sender, receiver) as canary,
    ):
        canary.run(ROUNDS)
        assert canary.caught, "no fence met a job in flight"


@pytest.mark.parametrize("kind", KINDS)
def test_canary_on_a_slow_simulated_fabric(
    make_daemon: Callable[..., DaemonProcess], kind: str
) -> None:
    daemon = make_daemon(provider="sim", fabric={"name": "delay_us=500"})
    with (
        transferd.Client(daemon.socket) as sender,
        transferd.Client(daemon.socket) as receiver,
        Canary(kind, sender, receiver) as canary,
    ):
        canary.run(ROUNDS)
        assert canary.caught, "no fence met a job in flight"


def test_several_requests_at_once(shared_pair: Pair) -> None:
    near, far = shared_pair
    imms = range(1, 9)
    with transferd.Client(near.socket) as sender, transferd.Client(far.socket) as receiver:
        source = sender.alloc(32 * MIB)
        grant = receiver.alloc(32 * MIB).grant(imms=imms)
        sender.warm(grant.descriptor)
        jobs = {
            imm: [sender.write(source, grant.descriptor, imm=imm) for _ in range(4)] for imm in imms
        }
        fenced, kept = list(imms)[1::2], list(imms)[0::2]
        with ThreadPoolExecutor(len(fenced)) as pool:
            list(pool.map(grant.fence, [[imm] for imm in fenced]))
        for imm in fenced:
            assert {job.status for job in jobs[imm]} <= {JobStatus.OK, JobStatus.CANCELLED}
        ended = [job.result for imm in fenced for job in jobs[imm]]
        cut_off = {end.detail for end in ended if end and end.status is not JobStatus.OK}
        assert cut_off == {"FENCED"}  # a gigabyte had not landed by then
        for imm in kept:
            assert [job.wait(WAIT_S) for job in jobs[imm]] == [JobStatus.OK] * 4
            receiver.counter(imm).wait(4, WAIT_S)
        for imm in fenced:
            landed = sum(job.status is JobStatus.OK for job in jobs[imm])
            view = receiver.counter(imm).read()
            assert (view.value, view.lost) == (landed, 4 - landed)


@pytest.mark.parametrize("where", ["two daemons", "one daemon"])
def test_several_grants_at_once(shared_pair: Pair, where: str) -> None:
    """On none of them does a byte land after the answer; what is on other immediates goes on."""
    near, far = shared_pair
    if where == "one daemon":
        far = near
    with transferd.Client(near.socket) as sender, transferd.Client(far.socket) as receiver:
        source = sender.alloc(16 * MIB)
        regions = [receiver.alloc(16 * MIB) for _ in range(4)]
        grants = [region.grant(imms=range(1, 3)) for region in regions]
        sender.warm(*(grant.descriptor for grant in grants))
        jobs = {
            imm: [sender.write(source, grant.descriptor, imm=imm) for grant in grants * 4]
            for imm in (1, 2)
        }
        receiver.fence({grant: [1] for grant in grants})
        ended = [job.result for job in jobs[1]]
        cut_off = {end.detail for end in ended if end and end.status is not JobStatus.OK}
        assert None not in ended
        assert cut_off == {"FENCED"}  # not all had landed by then
        assert [job.wait(WAIT_S) for job in jobs[2]] == [JobStatus.OK] * 16
        grants[1].revoke()
        with pytest.raises(transferd.FencesFailed) as caught:
            receiver.fence({grant: [1] for grant in grants})
        assert {g: e.reason for g, e in caught.value.failed.items()} == {grants[1]: "GRANT_REVOKED"}


def test_bad_input_of_several(shared_pair: Pair) -> None:
    _, far = shared_pair
    one, many = region_pb2.FenceGrantRequest, region_pb2.FenceGrantsRequest
    imms = region_pb2.ImmRange
    with (
        shm_file(1 << 16) as (name, _),
        grpc_session(far) as session,
        grpc_session(far) as other,
    ):
        region = session.register(name)
        grant, over = (session.grant(region, range(4, 8)).grant_id for _ in range(2))
        foreign = other.grant(other.register(name), range(4, 8)).grant_id
        session.call("regions.RevokeGrant", region_pb2.RevokeGrantRequest(grant_id=over))
        good = [imms(first=4, count=1)]
        fine = one(grant_id=grant, imms=good)
        for wrong, field in (
            ([], "fences"),
            ([one(grant_id=number, imms=good) for number in range(4097)], "fences"),
            ([fine, one(grant_id=foreign, imms=good * 4096)], "fences"),
            ([fine, fine], "fences[1].grant_id"),
            ([one(grant_id=foreign, imms=good), one(grant_id=grant)], "fences[1].imms"),
            ([one(grant_id=grant, imms=[*good, imms(first=5)])], "fences[0].imms[1].count"),
            ([one(grant_id=grant, imms=[imms(first=7, count=2)])], "fences[0].imms[0]"),
        ):
            refusal = session.refused("regions.FenceGrants", many(fences=wrong))
            assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
        numbers = (over, foreign, grant, 0, (1 << 64) - 1)
        answer = session.call(
            "regions.FenceGrants",
            many(fences=[one(grant_id=number, imms=good) for number in numbers]),
        )
        assert [result.reason for result in answer.results] == [
            "GRANT_REVOKED",
            "GRANT_NOT_FOUND",
            "",
            "GRANT_NOT_FOUND",
            "GRANT_NOT_FOUND",
        ]
        assert [bool(result.message) for result in answer.results] == [
            bool(result.reason) for result in answer.results
        ]
        session.call("regions.FenceGrants", many(fences=[one(grant_id=grant, imms=good * 4096)]))


def test_the_same_immediate_works_again(shared_pair: Pair) -> None:
    near, far = shared_pair
    with transferd.Client(near.socket) as sender, transferd.Client(far.socket) as receiver:
        source = sender.alloc(32 * MIB)
        grant = receiver.alloc(32 * MIB).grant(imms=[1])
        jobs = [sender.write(source, grant.descriptor, imm=1) for _ in range(4)]
        grant.fence([1])
        counter = receiver.counter(1)
        with pytest.raises(transferd.CounterFault):
            counter.wait(4, WAIT_S)
        counter.acknowledge()
        missing = sum(job.status is not JobStatus.OK for job in jobs)
        assert missing
        for _ in range(missing):
            assert sender.write(source, grant.descriptor, imm=1).wait(WAIT_S) is JobStatus.OK
        counter.wait(4, WAIT_S)
        assert counter.value == 4


def test_aio(shared_pair: Pair) -> None:
    async def main() -> None:
        near, far = shared_pair
        async with (
            transferd.aio.Client(near.socket) as sender,
            transferd.aio.Client(far.socket) as receiver,
        ):
            source = await sender.alloc(32 * MIB)
            grant = await (await receiver.alloc(32 * MIB)).grant(imms=range(4))
            await sender.warm(grant.descriptor)
            jobs = [await sender.write(source, grant.descriptor, imm=i % 2) for i in range(8)]
            await receiver.fence({grant: range(1, 2)})
            assert JobStatus.PENDING not in {job.status for job in jobs[1::2]}
            assert jobs[7].status is JobStatus.CANCELLED
            assert await asyncio.gather(*jobs[0::2]) == [JobStatus.OK] * 4

    asyncio.run(main())


def test_bad_input(shared_pair: Pair) -> None:
    _, far = shared_pair
    request = region_pb2.FenceGrantRequest
    imms = region_pb2.ImmRange
    with (
        shm_file(1 << 16) as (name, _),
        grpc_session(far) as session,
        grpc_session(far) as other,
    ):
        region = session.register(name)
        grant = session.grant(region, range(4, 8)).grant_id
        foreign = other.grant(other.register(name), range(4, 8)).grant_id
        bare = session.grant(region, range(0)).grant_id
        good = [imms(first=4, count=1)]
        for wrong, field in (
            ([], "imms"),
            (good * 4097, "imms"),
            ([*good, imms(first=5)], "imms[1].count"),
            ([*good, imms(first=3, count=2)], "imms[1]"),
            ([imms(first=7, count=2)], "imms[0]"),
            ([imms(first=(1 << 32) - 1, count=(1 << 32) - 1)], "imms[0]"),
        ):
            refusal = session.refused("regions.FenceGrant", request(grant_id=grant, imms=wrong))
            assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
        refusal = session.refused("regions.FenceGrant", request(grant_id=bare, imms=good))
        assert (refusal.reason, refusal.field) == ("IMM_RANGE", "imms[0]")
        for number in (0, foreign, (1 << 64) - 1):
            refusal = session.refused("regions.FenceGrant", request(grant_id=number, imms=good))
            assert refusal.reason == "GRANT_NOT_FOUND"
        session.call("regions.FenceGrant", request(grant_id=grant, imms=good * 4096))
        session.call("regions.RevokeGrant", region_pb2.RevokeGrantRequest(grant_id=grant))
        refusal = session.refused("regions.FenceGrant", request(grant_id=grant, imms=good))
        assert (refusal.code, refusal.reason) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "GRANT_REVOKED",
        )


def test_fence_while_the_grant_is_revoked(shared_pair: Pair) -> None:
    """Whichever comes first: both answer, and the fence says so if there was nothing left."""
    near, far = shared_pair
    with transferd.Client(near.socket) as sender, transferd.Client(far.socket) as receiver:
        source = sender.alloc(8 * MIB)
        region = receiver.alloc(8 * MIB)
        for _ in range(5):
            grant = region.grant(imms=[1])
            sender.warm(grant.descriptor)
            jobs = [sender.write(source, grant.descriptor, imm=1) for _ in range(4)]

            def fence(grant: transferd.Grant = grant) -> None:
                with contextlib.suppress(transferd.Conflict):
                    grant.fence([1])

            with ThreadPoolExecutor(3) as pool:
                waits = [pool.submit(fence), pool.submit(grant.revoke), pool.submit(fence)]
                for wait in waits:
                    wait.result(WAIT_S)
            assert JobStatus.PENDING not in {job.status for job in jobs}
            with pytest.raises(transferd.Conflict, match="nothing can land"):
                grant.fence([1])
