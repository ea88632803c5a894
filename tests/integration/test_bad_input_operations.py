# SPDX-License-Identifier: Apache-2.0
"""Paged writes, scatters, barriers and reads with wrong values: by raw entries and by gRPC."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import struct
from typing import TYPE_CHECKING, Any

import grpc
import pytest

import transferd
from transferd.native.client_half import lib
from transferd.native.names import Detail, JobStatus
from transferd.v1 import region_pb2, types_pb2
from transferd.v1 import transfer_pb2 as pb

from support.grpc_session import GrpcSession, grpc_session, shm_file
from support.raw_sender import IMM, IMMS, LENGTH, RawSender, raw_sender
from support.waiting import WAIT_S

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.daemon import DaemonProcess

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = pytest.mark.slow

U64 = (1 << 64) - 1
U32 = (1 << 32) - 1
EXACT, COUNT_JOB = int(lib.TFD_FLAG_EXACT), int(lib.TFD_FLAG_COUNT_JOB)
IMMEDIATE, PAGES, SCATTER, BARRIER, READ = (
    int(getattr(lib, f"TFD_OP_{name}"))
    for name in ("IMM", "WRITE_PAGES", "SCATTER", "BARRIER", "READ")
)
PAGES_GOOD = {
    "op": PAGES, "length": 4096, "src_stride": 4096, "dst_stride": 4096, "table_count": 2,
}  # fmt: skip
SCATTER_GOOD = {"op": SCATTER, "dst_grant": 0, "length": 0, "table_count": 2}
BARRIER_GOOD = SCATTER_GOOD | {"op": BARRIER, "src_region": 0}
READ_GOOD = {"op": READ, "imm": 0}


def pages(*indices: int) -> bytes:
    return struct.pack(f"<{len(indices)}I", *indices)


def targets(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}Q", *numbers)


@pytest.fixture
def ring(shared_pair: Pair) -> Iterator[RawSender]:
    with raw_sender(*shared_pair) as sender:
        yield sender
        assert not any(
            sender.target.view
        )  # the source is zero; what is out of bounds lands nowhere
        assert sender.end() == (JobStatus.OK, Detail.NONE)  # the session goes on


@pytest.mark.parametrize(
    ("fields", "table", "detail"),
    [
        ({}, pages(0, 0, 16, 0), Detail.SOURCE_BOUNDS),
        ({}, pages(0, 0, U32, 0), Detail.SOURCE_BOUNDS),
        ({}, pages(0, 16, 0, 0), Detail.DESTINATION_BOUNDS),
        ({"src_stride": U64}, pages(0, 0, 1, 0), Detail.SOURCE_BOUNDS),
        ({"dst_stride": U64 // 2 + 1}, pages(0, 2, 0, 0), Detail.DESTINATION_BOUNDS),
        ({"src_offset": U64}, pages(0, 0, 0, 0), Detail.SOURCE_BOUNDS),
        ({"dst_offset": LENGTH - 4095}, pages(0, 0, 0, 0), Detail.DESTINATION_BOUNDS),
        ({"length": LENGTH + 1}, pages(0, 0, 0, 0), Detail.SOURCE_BOUNDS),
        ({"length": (1 << 40) + 1}, pages(0, 0, 0, 0), Detail.LENGTH),
        ({"table_offset": 4}, b"", Detail.TABLE),
        ({"table_offset": U64 - 7}, b"", Detail.TABLE),
        ({"table_count": U32}, b"", Detail.TABLE),
        ({"flags": 128}, b"", Detail.BAD_FLAGS),
        ({"plan": 1}, b"", Detail.BAD_FLAGS),
        ({"imm": IMMS.stop}, pages(0, 0, 0, 0), Detail.IMM_RANGE),
        ({"dst_grant": 0}, pages(0, 0, 0, 0), Detail.BAD_GRANT),
        ({"src_region": U64}, pages(0, 0, 0, 0), Detail.BAD_REGION),
    ],
    ids=str,
)
def test_raw_pages(ring: RawSender, fields: dict[str, int], table: bytes, detail: Detail) -> None:
    ring.fill(table)
    assert ring.end(**PAGES_GOOD | fields) == (JobStatus.INVALID, detail)
    assert ring.counter.value == 0


@pytest.mark.parametrize(
    ("fields", "target", "detail"),
    [
        ({}, (U64, 0, 0, 1), Detail.BAD_GRANT),
        ({}, (None, LENGTH, 0, 1), Detail.SOURCE_BOUNDS),
        ({}, (None, U64, 0, 2), Detail.SOURCE_BOUNDS),
        ({}, (None, 0, LENGTH, 1), Detail.DESTINATION_BOUNDS),
        ({}, (None, 0, U64, 2), Detail.DESTINATION_BOUNDS),
        ({}, (None, 0, 0, U64), Detail.DESTINATION_BOUNDS),
        ({"imm": IMMS.stop}, (None, 0, 0, 1), Detail.IMM_RANGE),
        ({"table_count": 4097}, (None, 0, 0, 1), Detail.TABLE),
        ({"table_count": U32}, (None, 0, 0, 1), Detail.TABLE),
        ({"table_offset": U64 - 7}, (None, 0, 0, 1), Detail.TABLE),
        ({"flags": EXACT}, (None, 0, 0, 1), Detail.BAD_FLAGS),
        ({"src_stride": 1}, (None, 0, 0, 1), Detail.BAD_FLAGS),
        (BARRIER_GOOD, (None, 0, 0, 1), Detail.SOURCE_BOUNDS),  # bytes, but no region
        (BARRIER_GOOD, (None, 1, 0, 0), Detail.SOURCE_BOUNDS),
        (BARRIER_GOOD, (U64, 0, 0, 0), Detail.BAD_GRANT),
        (BARRIER_GOOD | {"src_region": 1}, (None, 0, 0, 0), Detail.BAD_FLAGS),
    ],
    ids=str,
)
def test_raw_targets(
    ring: RawSender, fields: dict[str, int], target: tuple[Any, ...], detail: Detail
) -> None:
    """The first target is right: with the second it is not sent either."""
    grant, *numbers = target
    ring.fill(targets(ring.grant, 0, 0, 0, ring.grant if grant is None else grant, *numbers))
    assert ring.end(**SCATTER_GOOD | fields) == (JobStatus.INVALID, detail)
    assert ring.counter.value == 0


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"length": LENGTH + 1}, Detail.DESTINATION_BOUNDS),
        ({"dst_offset": LENGTH}, Detail.DESTINATION_BOUNDS),
        ({"src_offset": LENGTH}, Detail.SOURCE_BOUNDS),
        ({"src_region": U64}, Detail.BAD_REGION),
        ({"dst_grant": U64}, Detail.BAD_GRANT),
        ({"flags": EXACT}, Detail.BAD_FLAGS),
        ({"table_count": 1}, Detail.BAD_FLAGS),
    ],
    ids=str,
)
def test_raw_reads(ring: RawSender, fields: dict[str, int], detail: Detail) -> None:
    assert ring.end(**READ_GOOD | fields) == (JobStatus.INVALID, detail)


def test_memory_that_is_read_only(shared_pair: Pair) -> None:
    """It can be read by others, and nothing can be read into it."""
    near, far = shared_pair
    memfd = os.memfd_create("tests", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(memfd, b"ro" * (LENGTH // 2))
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE)
    with (
        raw_sender(near, far) as ring,
        near.channel() as channel,
        transferd.Client(far.socket) as reader,
    ):
        region = ring.raw.register(channel, memfd)
        os.close(memfd)
        assert ring.end(**READ_GOOD | {"src_region": region}) == (
            JobStatus.INVALID, Detail.READ_ONLY,
        )  # fmt: skip
        assert ring.end(src_region=region) == (JobStatus.OK, Detail.NONE)
        session = GrpcSession(channel, ring.raw.token)
        create = region_pb2.CreateGrantRequest(region=region, rights=[types_pb2.RIGHT_WRITE])
        assert session.refused("regions.CreateGrant", create).field == "region"
        create.rights[0] = types_pb2.RIGHT_READ
        descriptor = session.call("regions.CreateGrant", create).descriptor
        target = reader.alloc(LENGTH)
        assert reader.read(descriptor, target).wait(WAIT_S) is JobStatus.OK
        assert bytes(target.view) == b"ro" * (LENGTH // 2)


def test_flags_that_an_operation_has_not(ring: RawSender) -> None:
    for fields in ({"flags": COUNT_JOB}, {"op": IMMEDIATE, "flags": EXACT, "length": 0}):
        assert ring.end(**fields) == (JobStatus.INVALID, Detail.BAD_FLAGS)


def test_a_deadline_that_has_passed(ring: RawSender) -> None:
    ring.fill(pages(0, 0, 1, 1))
    ring.fill(targets(*[ring.grant, 0, 0, 0] * 2), 64)
    for fields in (
        {},
        {"op": IMMEDIATE, "src_region": 0, "length": 0},
        PAGES_GOOD,
        SCATTER_GOOD | {"table_offset": 64},
        BARRIER_GOOD | {"table_offset": 64},
        READ_GOOD,
    ):
        assert ring.end(**fields | {"deadline_ns": 1}) == (JobStatus.DEADLINE, Detail.NONE), fields
        assert ring.counter.value == 0


def test_a_cancel_of_a_job_that_has_ended(ring: RawSender) -> None:
    job = ring.submit()
    assert ring.end_of(job) == (JobStatus.OK, Detail.NONE)
    nothing = {"src_region": 0, "dst_grant": 0, "length": 0, "imm": 0}
    end = ring.end(op=int(lib.TFD_OP_CANCEL), argument=job, **nothing)
    assert end == (JobStatus.INVALID, Detail.NO_SUCH_JOB)
    assert ring.end_of(job) == (JobStatus.OK, Detail.NONE)


def test_a_table_that_changes_under_way(ring: RawSender) -> None:
    """The daemon reads each part of a table once: it is legal or the job ends; nobody is hurt."""
    count = 100_000
    good, bad = pages(0, 0) * count, pages(U32, U32) * count
    for start in itertools.cycle((0, count // 2 * 8)):
        ring.fill(good)
        job = ring.submit(**PAGES_GOOD | {"length": 512, "table_count": count, "flags": COUNT_JOB})
        ring.fill(bad[start:], start)
        status, detail = ring.end_of(job)
        if status is JobStatus.INVALID:
            assert detail in (Detail.SOURCE_BOUNDS, Detail.DESTINATION_BOUNDS)
            break
        assert status is JobStatus.OK


# ---- by gRPC ----

TWICE = [0, 0]


@contextlib.contextmanager
def prepared(pair: Pair) -> Iterator[tuple[GrpcSession, int, bytes, transferd.Client]]:
    """Gives a session by gRPC with a region, and a grant of the other daemon's."""
    with (
        shm_file(LENGTH) as (name, _),
        grpc_session(pair[0]) as sender,
        transferd.Client(pair[1].socket) as receiver,
    ):
        descriptor = receiver.alloc(LENGTH).grant(imms=IMMS).descriptor
        yield sender, sender.register(name), descriptor, receiver


@pytest.mark.parametrize(
    ("job", "field"),
    [
        (pb.WritePagesJob(page_bytes=0), "page_bytes"),
        (pb.WritePagesJob(page_bytes=(1 << 40) + 1), "page_bytes"),
        (pb.WritePagesJob(page_bytes=1, src_pages=[0]), "dst_pages"),
        (pb.WritePagesJob(page_bytes=1, src_pages=[0], dst_pages=[0, 0]), "dst_pages"),
        (pb.WritePagesJob(page_bytes=4096, src_pages=[0, 16], dst_pages=TWICE), "src_pages"),
        (pb.WritePagesJob(page_bytes=4096, src_pages=TWICE, dst_pages=[0, 16]), "dst_pages"),
        (pb.WritePagesJob(page_bytes=1, src_pages=TWICE, dst_pages=[0, U32]), "dst_pages"),
        (
            pb.WritePagesJob(
                page_bytes=1, src_pages=[0, 3], dst_pages=TWICE, src_stride_bytes=U64 // 2
            ),
            "src_pages",
        ),
        (pb.WritePagesJob(page_bytes=LENGTH + 1, src_pages=[0], dst_pages=[0]), "src_pages"),
        (
            pb.WritePagesJob(page_bytes=1, src_pages=[0], dst_pages=[0], dst_offset_bytes=U64),
            "dst_pages",
        ),
        (pb.WritePagesJob(page_bytes=1, imm=1 << 20), "imm"),
        (pb.WritePagesJob(page_bytes=1, count=7), "count"),  # type: ignore[arg-type]
        (pb.WritePagesJob(page_bytes=1, dst=b"?"), "dst"),
        (
            pb.WritePagesJob(page_bytes=1, src_pages=[0] * 131_073, dst_pages=[0] * 131_073),
            "src_pages",
        ),
        (pb.ScatterJob(targets=[pb.ScatterTarget(dst=b"?")]), "targets[0].dst"),
        (pb.ScatterJob(targets=[pb.ScatterTarget(length_bytes=U64)]), "targets[0].length_bytes"),
        (pb.ScatterJob(targets=[pb.ScatterTarget()] * 4097), "targets"),
        (pb.ScatterJob(imm=U32), "imm"),
        (pb.BarrierJob(dsts=[b"?"]), "dsts[0]"),
        (pb.BarrierJob(dsts=[b""] * 4097), "dsts"),
        (pb.BarrierJob(imm=1 << 20), "imm"),
        (pb.ReadJob(src=b"?"), "src"),
        (pb.ReadJob(length_bytes=(1 << 40) + 1), "length_bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_grpc_fields(shared_pair: Pair, job: Any, field: str) -> None:
    """The job before it is right, and is not done."""
    name = {
        pb.WritePagesJob: "write_pages",
        pb.ScatterJob: "scatter",
        pb.BarrierJob: "barrier",
        pb.ReadJob: "read",
    }[type(job)]
    with prepared(shared_pair) as (sender, region, descriptor, receiver):
        body = type(job)()
        body.CopyFrom(job)
        fill(body, region, descriptor)
        right = pb.WriteJob(src_region=region, dst=descriptor, length_bytes=1, imm=IMM)
        request = pb.SubmitRequest(jobs=[pb.Job(write=right), pb.Job(**{name: body})])
        refusal = sender.refused("transfers.Submit", request)
        assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refusal.field == f"jobs[1].{name}.{field}"
        assert refusal.message.startswith(refusal.field)
        (end,) = sender.wait(
            list(sender.call("transfers.Submit", pb.SubmitRequest(jobs=request.jobs[:1])).job_ids)
        )
        assert end.status == types_pb2.JOB_STATUS_OK
        receiver.counter(IMM).wait(1, WAIT_S)
        assert tuple(receiver.counter(IMM).read()) == (1, 0, 0, 0)


def fill(job: Any, region: int, descriptor: bytes) -> None:
    """Fills in what has to be there, where the test has nothing else."""
    match job:
        case pb.WritePagesJob():
            job.src_region, job.dst = region, job.dst or descriptor
        case pb.ScatterJob():
            job.src_region = region
            for target in job.targets:
                target.dst = target.dst or descriptor
        case pb.ReadJob():
            job.dst_region, job.src = region, job.src or descriptor


def test_grpc_jobs_that_end_invalid(shared_pair: Pair) -> None:
    """What only the data plane knows ends the job, as it does for a write."""
    with prepared(shared_pair) as (sender, region, descriptor, receiver):
        target = pb.ScatterTarget(dst=descriptor)
        cases: list[tuple[dict[str, Any], str]] = [
            ({"write_pages": pb.WritePagesJob(dst=descriptor, page_bytes=1)}, "BAD_REGION"),
            (
                {
                    "write_pages": pb.WritePagesJob(
                        src_region=region, dst=descriptor, page_bytes=1, imm=IMMS.stop
                    )
                },
                "IMM_RANGE",
            ),
            (
                {
                    "scatter": pb.ScatterJob(
                        src_region=region, targets=[target, target], imm=IMMS.stop
                    )
                },
                "IMM_RANGE",
            ),
            ({"scatter": pb.ScatterJob(targets=[target], imm=IMM)}, "BAD_REGION"),
            ({"barrier": pb.BarrierJob(dsts=[descriptor], imm=IMMS.stop)}, "IMM_RANGE"),
            ({"read": pb.ReadJob(src=descriptor, dst_region=region)}, "RIGHTS"),
        ]
        for job, detail in cases:
            request = pb.SubmitRequest(jobs=[pb.Job(**job)])
            (end,) = sender.wait(list(sender.call("transfers.Submit", request).job_ids))
            assert (end.status, end.detail) == (types_pb2.JOB_STATUS_INVALID, detail), job
        assert receiver.counter(IMM).value == 0
