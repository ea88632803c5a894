# SPDX-License-Identifier: Apache-2.0
"""Jobs from GPU memory to GPU memory of this host: the client's own stream copies.

The daemon's worker checks such a job as any other, moves nothing, and counts when the lane's word says
that the stream is through.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from transferd.client import errors, tables
from transferd.client.cuda.streams import to_stream, watcher_pointer
from transferd.client.session import (
    FLAG_CHECKSUM,
    FLAG_EXACT,
    OP_SCATTER,
    OP_WRITE,
    to_ns,
)
from transferd.native.client_half import ffi, lib

if TYPE_CHECKING:
    from transferd.client.cuda.gpu import Gpu
    from transferd.client.cuda.lanes import Lane
    from transferd.client.cuda.mapping import Mapped
    from transferd.client.session import Request

_copy = lib.tfd_lane_copy
_new = ffi.new
FAULT_GRANT = int(lib.TFD_FAULT_GRANT)


class Copier:
    """That of one session."""

    def __init__(self, gpu: Gpu) -> None:
        """Copies nothing yet."""
        self._gpu = gpu

    def ready(self, request: Request) -> bool:
        """Tells whether :meth:`submit` would wait for the daemon before it submits."""
        device = request.source.device
        return all(self._gpu.mappings.settled(d, device) for d in request.destinations)

    def prepare(self, request: Request) -> None:
        """Maps what a job writes to."""
        for descriptor in dict.fromkeys(request.destinations):
            self._gpu.mappings.find(descriptor, request.source.device)

    def submit(self, request: Request, timeout_s: float | None) -> int | None:
        """Submits a job that a stream copies; None: no stream can, it goes by the daemon.

        Raises:
            TransferdError: As for any job; CudaError: the driver refused.
        """
        mapped = self._mapped(request)
        if mapped is None:
            if request.stream is not None:
                raise errors.InvalidRequest(
                    "stream= is for copies between GPU memory of this host, and this is none: "
                    + self._why_not(request),
                    reason="NOT_COPIED",
                )
            return None
        used = set(mapped.values())
        if not self._gpu.mappings.begin(used):
            return None  # taken back by its owner: the job tells
        value, lane = 0, None
        try:
            lane = self._lane(request)
            job_id, value = self._enqueue(request, mapped, lane, timeout_s)
            return job_id
        finally:
            self._gpu.mappings.end(used, lane, value)

    def _mapped(self, request: Request) -> dict[bytes, Mapped] | None:
        if request.flags & FLAG_CHECKSUM:
            return None
        find = self._gpu.mappings.find
        device = request.source.device
        if request.op != OP_SCATTER:
            one = find(request.dst, device)
            if one is None or (
                request.op == OP_WRITE and request.dst_offset + request.length > one.length
            ):
                return None
            return {request.dst: one}
        found: dict[bytes, Mapped] = {}
        for descriptor in dict.fromkeys(request.destinations):
            mapped = find(descriptor, device)
            if mapped is None:
                return None
            found[descriptor] = mapped
        return found

    def _why_not(self, request: Request) -> str:
        if request.flags & FLAG_CHECKSUM:
            return "checksums are for host memory"
        mappings = self._gpu.mappings
        for descriptor in request.destinations:
            if mappings.known(descriptor, request.source.device) is None:
                return mappings.refusal(descriptor)
        return "it leaves the grant"

    def _lane(self, request: Request) -> Lane:
        lanes = self._gpu.lanes
        device = request.source.device
        if request.trigger is not None:
            if request.stream is not None:
                raise errors.InvalidRequest(
                    "stream= is for jobs that start at once: the stream of an armed one waits"
                )
            return lanes.of_armed(device, request.trigger.slot, request.trigger.value)
        if request.stream is None:
            return lanes.of(device, request.priority)
        stream = to_stream(request.stream)
        driver = self._gpu.driver
        context = self._gpu.context(device)
        with driver.entered(context):
            if driver.stream_context(stream) != context:
                raise errors.InvalidRequest(
                    f"the stream is of another device than the source, which is on {device}",
                    reason="WRONG_DEVICE",
                )
            if driver.stream_capturing(stream):
                raise errors.InvalidRequest(
                    "a job is submitted once, and a CUDA graph that is captured runs again and "
                    "again: capture watcher.cuda_bump(stream), and arm jobs on that watcher",
                    reason="CAPTURING",
                )
        return lanes.of_caller(device, stream)

    def _enqueue(
        self, request: Request, mapped: dict[bytes, Mapped], lane: Lane, timeout_s: float | None
    ) -> tuple[int, int]:
        session = self._gpu.session
        # The count follows all bytes in any case; and what it waits for is the lane's word.
        plain = request._replace(flags=request.flags & ~FLAG_EXACT, trigger=None)
        batch = tables.make([plain], session.handles_of([plain]), session.lengths)
        copy = self._struct(request, mapped)
        kept = self._places(request, batch, mapped)
        fault = _new("struct tfd_table_fault *")
        result = _new("int32_t *")
        # An armed lane that is full is so until somebody bumps: perhaps this very thread.
        timeout_ns = 0 if request.trigger is not None else to_ns(timeout_s)
        rc = -errno.EINTR
        while rc == -errno.EINTR:
            rc = _copy(lane.native, batch.entries, batch.tables, copy, timeout_ns, fault, result)
        del kept
        entry = batch.entries[0]
        if not rc:
            if request.trigger is not None:
                lane.jobs.append(entry.job_id)
            return entry.job_id, entry.fire_at
        if rc == -errno.ERANGE:
            if fault.side != FAULT_GRANT:
                raise tables.refusal([request], fault)
            raise errors.InvalidRequest(
                f"entry {fault.position} of the table leaves the region or its grant",
                reason="DESTINATION_BOUNDS",
            )
        raise self._failed(lane, rc, entry, int(result[0]), timeout_s)

    def _struct(self, request: Request, mapped: dict[bytes, Mapped]) -> Any:
        copy = _new("struct tfd_copy *")
        copy.src = request.source.base
        if request.op != OP_SCATTER:
            copy.dst = mapped[request.dst].address
        if request.trigger is not None:
            slot = request.trigger.slot
            copy.trigger = watcher_pointer(self._gpu, slot)
            copy.trigger_at = request.trigger.value
            copy.trigger_slot = slot
        return copy

    def _places(self, request: Request, batch: Any, mapped: dict[bytes, Mapped]) -> Any:
        """Says where the grants of a scatter's targets, or members, are mapped."""
        if request.op != OP_SCATTER or batch.tables == ffi.NULL:
            return None
        table = batch.tables[0]
        by = request.rows.members if request.rows is not None else request.destinations
        places = _new("uint64_t[]", [mapped[d].address for d in by])
        ends = _new("uint64_t[]", [mapped[d].length for d in by])
        table.places, table.ends = places, ends
        if request.rows is None:
            table.src_end = request.source.length
        return places, ends

    def _failed(
        self, lane: Lane, rc: int, entry: Any, result: int, timeout_s: float | None
    ) -> errors.TransferdError:
        session = self._gpu.session
        if rc == -errno.EIO:
            # It is published, and would wait for ever.
            session.job_cancel(entry.job_id)
            session.job_release(entry.job_id)
            self._gpu.lanes.drop(lane)
            return self._gpu.driver.error("enqueueing a copy", result)
        if rc == -errno.ENODEV:
            return errors.Unavailable(
                f"copies by this stream are over: {self._gpu.fault or 'the driver refused one'}",
                reason="CUDA_FAILED",
            )
        return session.refusal(rc, timeout_s)
