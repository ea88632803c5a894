# SPDX-License-Identifier: Apache-2.0
"""transferd.v1.TransferService."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from transferd.daemon.errors import InvalidRequest, TransferdError
from transferd.daemon.plane import IMM_COUNT, PATH_EMULATED, PATH_PACKED, PROVIDERS
from transferd.daemon.services.jobs import (
    Entries,
    check_counts,
    destination_field,
    destinations,
)
from transferd.v1 import transfer_pb2 as pb
from transferd.v1 import transfer_pb2_grpc, types_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    import grpc.aio

    from transferd.daemon.opens import Opener
    from transferd.daemon.plane import CounterState, JobEnd, Plane
    from transferd.daemon.services.auth import Authenticator
    from transferd.daemon.session import Session
    from transferd.daemon.transfers import Transfers

    Context = grpc.aio.ServicerContext[Any, Any]

JOBS_MAX = 4096
TIMEOUT_MAX_MS = 3_600_000


class TransferService(transfer_pb2_grpc.TransferServiceServicer):
    """Jobs and counters of the calling session."""

    def __init__(
        self, transfers: Transfers, opener: Opener, plane: Plane, auth: Authenticator
    ) -> None:
        self._transfers = transfers
        self._opener = opener
        self._plane = plane
        self._auth = auth

    async def Submit(self, request: pb.SubmitRequest, context: Context) -> pb.SubmitResponse:
        """Submits jobs, all or none."""
        session = self._auth.session(context)
        return pb.SubmitResponse(job_ids=await self._submit(session, request.jobs))

    async def SubmitStream(
        self, request_iterator: AsyncIterator[pb.SubmitStreamRequest], context: Context
    ) -> AsyncIterator[pb.SubmitStreamResponse]:
        """Submits jobs, request by request."""
        session = self._auth.session(context)
        async for request in request_iterator:
            yield pb.SubmitStreamResponse(job_ids=await self._submit(session, request.jobs))

    async def _submit(self, session: Session, jobs: Sequence[pb.Job]) -> list[int]:
        if not 1 <= len(jobs) <= JOBS_MAX:
            raise InvalidRequest("jobs", f"{len(jobs)} of them; send 1 to {JOBS_MAX}")
        check_counts(jobs)
        handles = await self._handles(session, jobs)
        maker = Entries(session, handles, time.monotonic_ns())
        entries = [maker.make(i, job) for i, job in enumerate(jobs)]
        return self._transfers.submit(session, entries, maker.tables)

    async def _handles(self, session: Session, jobs: Sequence[pb.Job]) -> dict[bytes, int]:
        """Resolves each distinct destination once; no round trip for those that are open."""
        handles: dict[bytes, int] = {}
        missing: dict[bytes, str] = {}
        known = session.by_descriptor
        for i, job in enumerate(jobs):
            for k, raw in enumerate(destinations(i, job)):
                if raw in handles or raw in missing:
                    continue
                opened = known.get(raw)
                if opened is not None:
                    handles[raw] = opened.handle
                else:
                    missing[raw] = destination_field(i, job, k)
        if len(missing) > 1:  # all at once; a failure is met again below, where its field is known
            with contextlib.suppress(TransferdError):
                work = self._opener.open(session, list(missing), "jobs")
                await session.ops.run(work, "open destinations")
        for raw, where in missing.items():
            work = self._opener.open(session, [raw], where)
            (opened,) = await session.ops.run(work, "open destination")
            handles[raw] = opened.handle
        return handles

    async def WaitJobs(self, request: pb.WaitJobsRequest, context: Context) -> pb.WaitJobsResponse:
        """Tells how jobs ended, waiting for them up to a bound."""
        session = self._auth.session(context)
        count = len(request.job_ids)
        if not 1 <= count <= JOBS_MAX:
            raise InvalidRequest("job_ids", f"{count} of them; send 1 to {JOBS_MAX}")
        ends = await self._transfers.wait_jobs(
            session, request.job_ids, to_timeout_s(request.timeout_ms)
        )
        return pb.WaitJobsResponse(
            jobs=[self._end(job_id, ends.get(job_id)) for job_id in request.job_ids]
        )

    async def CancelJob(
        self, request: pb.CancelJobRequest, context: Context
    ) -> pb.CancelJobResponse:
        """Cancels a job: a fence."""
        session = self._auth.session(context)
        end = await self._transfers.cancel(session, request.job_id)
        return pb.CancelJobResponse(job=self._end(request.job_id, end))

    async def GetCounter(
        self, request: pb.GetCounterRequest, context: Context
    ) -> pb.GetCounterResponse:
        """Reads a counter."""
        session = self._auth.session(context)
        state = self._transfers.counter(session, _imm(request.imm))
        return pb.GetCounterResponse(counter=_counter(request.imm, *state))

    async def WaitCounter(
        self, request: pb.WaitCounterRequest, context: Context
    ) -> pb.WaitCounterResponse:
        """Waits until a counter reaches a target, a fault comes, or the time is over."""
        session = self._auth.session(context)
        state, slot = await self._transfers.wait_counter(
            session, _imm(request.imm), request.target, to_timeout_s(request.timeout_ms)
        )
        reached = state.value >= request.target
        return pb.WaitCounterResponse(
            reached=reached,
            faulted=not reached and state.faults > state.acknowledged,
            counter=_counter(request.imm, state, slot),
        )

    async def AcknowledgeCounter(
        self, request: pb.AcknowledgeCounterRequest, context: Context
    ) -> pb.AcknowledgeCounterResponse:
        """Takes a counter's faults as seen."""
        session = self._auth.session(context)
        state = await self._transfers.acknowledge(session, _imm(request.imm))
        return pb.AcknowledgeCounterResponse(counter=_counter(request.imm, *state))

    def _end(self, job_id: int, end: JobEnd | None) -> pb.JobEnd:
        if end is None:
            return pb.JobEnd(job_id=job_id, status=types_pb2.JOB_STATUS_PENDING)
        path = types_pb2.Path(
            provider=PROVIDERS.get(end.path & 0xFF, ""),
            rails=end.path >> 8 & 0xFF,
            packed=bool(end.path & PATH_PACKED),
            emulated=bool(end.path & PATH_EMULATED),
        )
        return pb.JobEnd(
            job_id=job_id,
            status=end.status,  # type: ignore[arg-type]
            detail=self._plane.detail_name(end.detail) if end.detail else "",
            bytes=end.bytes,
            path=path,
            duration_ns=max(end.ended_ns - end.accepted_ns, 0),
        )


def to_timeout_s(timeout_ms: int) -> float:
    """Checks how long a call may wait."""
    if timeout_ms > TIMEOUT_MAX_MS:
        raise InvalidRequest("timeout_ms", f"{timeout_ms} is above {TIMEOUT_MAX_MS}")
    return timeout_ms / 1000


def _imm(imm: int) -> int:
    if imm >= IMM_COUNT:
        raise InvalidRequest("imm", f"{imm} needs more than 20 bits")
    return imm


def _counter(imm: int, state: CounterState, slot: int) -> pb.CounterState:
    return pb.CounterState(
        imm=imm,
        value=state.value,
        faults=state.faults,
        lost=state.lost,
        acknowledged=state.acknowledged,
        slot=slot,
    )
