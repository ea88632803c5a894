# SPDX-License-Identifier: Apache-2.0
"""Jobs from GPU memory to GPU memory of this host: the client's own stream copies.

The daemon's worker checks such a job as any other, moves nothing, and counts when the lane's word
says that the stream is through.
"""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING, Any

from transferd.client import errors, tables
from transferd.client.cuda.launches import CopiedPlan, copied_plan, put_places
from transferd.client.cuda.streams import to_stream, watcher_address
from transferd.client.indices import plain_indices
from transferd.client.session import (
    FLAG_CHECKSUM,
    FLAG_EXACT,
    IMM_COUNT,
    LENGTH_MAX,
    OP_READ,
    OP_SCATTER,
    OP_WRITE,
    to_ns,
)
from transferd.native.client_half import ffi, lib

if TYPE_CHECKING:
    from transferd.client.cuda.allocation import Allocation
    from transferd.client.cuda.gpu import Gpu
    from transferd.client.cuda.lanes import Lane
    from transferd.client.cuda.mapping import Mapped
    from transferd.client.memory import BaseRegion, RegionSlice
    from transferd.client.session import Request

_copy = lib.tfd_lane_copy
_write = lib.tfd_lane_write
_pages = lib.tfd_lane_pages
_launch = lib.tfd_lane_launch
_from_buffer = ffi.from_buffer
_ASK_AGAIN = (-errno.EINTR, -errno.ERANGE, -errno.EMSGSIZE, -errno.ESTALE)
_new = ffi.new
TRIGGER_MAX = (1 << 63) - 1  # TFD_LANE_TRIGGER_MAX
NOTHING = contextlib.nullcontext()  # it has no state
FAULT_GRANT = int(lib.TFD_FAULT_GRANT)


def source_of(request: Request) -> Allocation:
    """The GPU memory that a request reads from."""
    assert request.source is not None
    return request.source


def _capturing() -> errors.InvalidRequest:
    return errors.InvalidRequest(
        "a job is submitted once, and a CUDA graph that is captured runs again and again: capture "
        "watcher.cuda_bump(stream), and arm jobs on that watcher",
        reason="CAPTURING",
    )


class Copier:
    """That of one session."""

    def __init__(self, gpu: Gpu) -> None:
        """Copies nothing yet."""
        self._gpu = gpu
        self._mappings = gpu.mappings
        self._lanes = gpu.lanes

    def ready(self, request: Request) -> bool:
        """Tells whether :meth:`submit` would wait for the daemon before it submits."""
        device = source_of(request).device
        return all(self._mappings.settled(d, device) for d in request.destinations)

    def prepare(self, request: Request) -> None:
        """Maps what a job writes to."""
        for descriptor in dict.fromkeys(request.destinations):
            self._mappings.find(descriptor, source_of(request).device)

    def submit(self, request: Request, timeout_s: float | None) -> int | None:
        """Submits a job that a stream copies; None: no stream can, it goes by the daemon.

        Raises:
            TransferdError: As for any job; CudaError: the driver refused.
        """
        mapped = self._mapped(request)
        used = mapped if mapped is None or len(mapped) < 2 else tuple(dict.fromkeys(mapped))
        if mapped is None or used is None or not self._mappings.begin(used):
            self._refuse(request)
            return None  # it cannot be, or its owner takes it back: the daemon tells
        lane, value = None, 0
        # Who arms chooses a lane by what is enqueued on it, so no other may come in between.
        with self._lanes.arming if request.trigger is not None else NOTHING:
            try:
                lane = self._lane(request)
                job_id, value = self._enqueue(request, mapped, lane, timeout_s)
                return job_id
            finally:
                self._mappings.end(used, lane, value)

    def _refuse(self, request: Request) -> None:
        """Says why no stream can copy what nobody else may."""
        if request.launch is not None:
            raise errors.Conflict(
                "the plan's memory is being taken back by its owner, or was", reason="GRANT_REVOKED"
            )
        if request.stream is not None:
            raise errors.InvalidRequest(
                "stream= is for copies between GPU memory of this host, and this is none: "
                + self._why_not(request),
                reason="NOT_COPIED",
            )

    def plan(self, request: Request, table: bool) -> CopiedPlan | None:
        """Finds what the launches of a plan need; None: no stream can copy it.

        Raises:
            InvalidRequest: It is out of range; NOT_COPIED: there is no stream for ``stream=``.
        """
        mapped = self._mapped(request)
        if mapped is None:
            self._refuse(request)
            return None
        return copied_plan(request, mapped, table)

    def launch(
        self, plan: CopiedPlan, number: int, deadline_ns: int, timeout_s: float | None
    ) -> int:
        """Launches a plan by what is there already; 0: something is not, ask :meth:`submit`.

        Raises:
            TransferdError: As for any job; CudaError: the driver refused.
        """
        source, mappings = plan.source, self._mappings
        lane = self._quick_lane(source, plan.priority, plan.length, plan.stream)
        if lane is None or not mappings.begin(plan.used):
            return 0
        first = plan.mapped[0]
        try:
            rc: int = _launch(
                lane.native,
                number,
                deadline_ns,
                source.base,
                source.length,
                first.address,
                first.length,
                -1 if timeout_s is None else to_ns(timeout_s),
            )
        finally:
            mappings.end(plan.used, lane, 0)
        return self._submitted(rc, lane, timeout_s)

    def write(
        self,
        source: Allocation,
        priority: int,
        imm: int,
        src_offset: int,
        dst: bytes,
        dst_offset: int,
        length: int,
        deadline_ns: int,
        stream: Any,
        timeout_s: float | None,
    ) -> int:
        """Submits a plain write by what is there already; 0: something is not, ask :meth:`submit`.

        Raises:
            TransferdError: As for any job; CudaError: the driver refused.
        """
        mappings = self._mappings
        lane = self._quick_lane(source, priority, length, stream)
        mapped = mappings.known(dst, source.device)
        grant = self._gpu.session.handles.get(dst)
        if (
            lane is None
            or mapped is None
            or grant is None
            or dst_offset + length > mapped.length
            or not mappings.begin_one(mapped)
        ):
            return 0
        try:
            rc: int = _write(
                lane.native,
                priority,
                imm,
                source.handle,
                src_offset,
                grant,
                dst_offset,
                length,
                deadline_ns,
                source.base,
                mapped.address,
                -1 if timeout_s is None else to_ns(timeout_s),
            )
        finally:
            mappings.end_one(mapped, lane)
        return self._submitted(rc, lane, timeout_s)

    def pages(
        self,
        source: Allocation,
        src: BaseRegion | RegionSlice,
        arrays: tuple[Any, Any],
        dst: bytes,
        page_bytes: int,
        imm: int,
        strides: tuple[int | None, int | None],
        offsets: tuple[int, int],
        flags: int | None,
        priority: int | None,
        deadline_ns: int,
        stream: Any,
        timeout_s: float | None,
    ) -> int:
        """As :meth:`write`, of pages; pairs are of source, destination. What is unusual gives 0.

        Raises:
            TransferdError: As for any job; CudaError: the driver refused.
        """
        first, second = plain_indices(arrays[0]), plain_indices(arrays[1])
        src_stride, dst_stride = (page_bytes if stride is None else stride for stride in strides)
        src_offset, dst_offset = offsets
        for number in (imm, src_stride, dst_stride, src_offset, dst_offset, page_bytes):
            if type(number) is not int or not 0 <= number <= LENGTH_MAX:
                return 0
        if (
            first is None
            or second is None
            or len(first[0]) != len(second[0])
            or flags is None
            or priority is None
            or imm >= IMM_COUNT
            or not page_bytes
            or src_offset > src.length
        ):
            return 0
        mappings = self._mappings
        lane = self._quick_lane(source, priority, 0, stream)
        mapped = mappings.known(dst, source.device)
        grant = self._gpu.session.handles.get(dst)
        if lane is None or mapped is None or grant is None or not mappings.begin_one(mapped):
            return 0
        try:
            rc: int = _pages(
                lane.native,
                priority,
                flags,
                imm,
                source.handle,
                src.start + src_offset,
                src_stride,
                grant,
                dst_offset,
                dst_stride,
                page_bytes,
                len(first[0]),
                _from_buffer(first[0]),
                first[1],
                src.start + src.length,
                _from_buffer(second[0]),
                second[1],
                mapped.length,
                deadline_ns,
                source.base,
                mapped.address,
                -1 if timeout_s is None else to_ns(timeout_s),
            )
        finally:
            mappings.end_one(mapped, lane)
        return self._submitted(rc, lane, timeout_s)

    def _quick_lane(
        self, source: Allocation, priority: int, length: int, stream: Any
    ) -> Lane | None:
        if stream is None:
            return self._lanes.known(source.device, priority, length)
        return self._lanes.known_caller(source.device, to_stream(stream))

    def _submitted(self, rc: int, lane: Lane, timeout_s: float | None) -> int:
        if rc > 0:
            self._lanes.watch()
            return rc
        # Python's own signal handlers run between the two calls; what is out of range others tell.
        if rc in _ASK_AGAIN:
            return 0
        if rc == -errno.EIO:
            raise self._refused(lane)
        raise self._failure(rc, timeout_s)

    def _mapped(self, request: Request) -> tuple[Mapped, ...] | None:
        """Finds what a job's destinations are mapped as, in their order; None: one is not."""
        if request.launch is not None:
            return None if request.launch.copied is None else request.launch.copied.mapped
        if request.flags & FLAG_CHECKSUM:
            return None
        find = self._mappings.find
        device = source_of(request).device
        if request.op != OP_SCATTER:
            one = find(request.dst, device)
            if one is None:
                return None
            whole = request.op in (OP_WRITE, OP_READ)
            if whole and request.dst_offset + request.length > one.length:
                raise errors.InvalidRequest(
                    f"{request.dst_offset} + {request.length} is past the {one.length} bytes of "
                    "the grant",
                    reason="DESTINATION_BOUNDS",
                )
            return (one,)
        by = {d: find(d, device) for d in dict.fromkeys(request.destinations)}
        found = tuple(mapped for mapped in map(by.get, request.destinations) if mapped is not None)
        return found if len(found) == len(request.destinations) else None

    def _why_not(self, request: Request) -> str:
        if request.flags & FLAG_CHECKSUM:
            return "checksums are for host memory"
        for descriptor in request.destinations:
            if self._mappings.known(descriptor, source_of(request).device) is None:
                return self._mappings.refusal(descriptor)
        return "its owner takes the memory back"

    def _lane(self, request: Request) -> Lane:
        device = source_of(request).device
        if request.trigger is not None:
            if request.stream is not None:
                raise errors.InvalidRequest(
                    "stream= is for jobs that start at once: the stream of an armed one waits"
                )
            if request.trigger.value > TRIGGER_MAX:
                raise errors.InvalidRequest(
                    "a copy of GPU memory waits for a value up to 2^63 - 1, not "
                    f"{request.trigger.value}: streams compare words as signed numbers"
                )
            return self._lanes.of_armed(device, request.trigger.slot, request.trigger.value)
        if request.stream is None:
            length = request.length if request.op in (OP_WRITE, OP_READ) else 0
            if request.launch is not None and request.launch.copied is not None:
                length = request.launch.copied.length
            return self._lanes.of(device, request.priority, length)
        stream = to_stream(request.stream)
        driver = self._gpu.driver
        context = self._gpu.context(device)
        with driver.entered(context):
            if driver.stream_context(stream) != context:
                raise errors.InvalidRequest(
                    f"the stream is of another device than the source, which is on {device}",
                    reason="WRONG_DEVICE",
                )
            if driver.stream_capturing(stream):  # asked first: the next call would spoil a capture
                raise _capturing()
        return self._lanes.of_caller(device, stream)

    def _enqueue(
        self, request: Request, mapped: tuple[Mapped, ...], lane: Lane, timeout_s: float | None
    ) -> tuple[int, int]:
        session = self._gpu.session
        # The count follows all bytes in any case; and what it waits for is the lane's word.
        plain = request
        if request.flags & FLAG_EXACT or request.trigger is not None:
            plain = request._replace(flags=request.flags & ~FLAG_EXACT, trigger=None)
        known = session.handles
        if request.op == OP_SCATTER or request.dst not in known:
            known = session.handles_of([plain])
        batch = tables.make([plain], known, session.lengths)
        copy = self._struct(request, mapped)
        kept = self._places(request, batch, mapped)
        fault = _new("struct tfd_table_fault *")
        result = _new("int32_t *")
        timeout_ns = to_ns(timeout_s)
        rc = -errno.EINTR
        while rc == -errno.EINTR:
            rc = _copy(lane.native, batch.entries, batch.tables, copy, timeout_ns, fault, result)
        del kept
        self._lanes.watch()
        entry = batch.entries[0]
        if rc:
            raise self._failed(request, lane, rc, fault, timeout_s)
        job_id: int = entry.job_id
        if request.trigger is not None:
            lane.jobs.append(job_id)
        return job_id, entry.fire_at

    def _struct(self, request: Request, mapped: tuple[Mapped, ...]) -> Any:
        copy = _new("struct tfd_copy *")
        source = source_of(request)
        copy.src, copy.src_bytes = source.base, source.length
        if request.op != OP_SCATTER:
            copy.dst, copy.dst_bytes = mapped[0].address, mapped[0].length
        if request.trigger is not None:
            slot = request.trigger.slot
            copy.trigger = watcher_address(self._gpu, slot)
            copy.trigger_at = request.trigger.value
            copy.trigger_slot = slot
        return copy

    def _places(self, request: Request, batch: Any, mapped: tuple[Mapped, ...]) -> Any:
        """Says where the grants of a scatter's targets, or members, are mapped."""
        if request.op != OP_SCATTER or batch.tables == ffi.NULL:
            return None
        return put_places(request, batch.tables[0], mapped)

    def _failed(
        self,
        request: Request,
        lane: Lane,
        rc: int,
        fault: Any,
        timeout_s: float | None,
    ) -> errors.TransferdError:
        session = self._gpu.session
        match -rc:
            case errno.ERANGE if fault.side == FAULT_GRANT:
                return errors.InvalidRequest(
                    f"entry {fault.position} of the table leaves the region or its grant",
                    reason="DESTINATION_BOUNDS",
                )
            case errno.ERANGE:
                return tables.refusal([request], fault)
            case errno.EMSGSIZE:
                return session.table_too_large(request)
            case errno.EIO:
                return self._refused(lane)
            case errno.ESTALE if not lane.own:
                return self._stale(lane)
        return self._failure(rc, timeout_s)

    def _stale(self, lane: Lane) -> errors.TransferdError:
        """Says what the driver has against a stream of the caller's."""
        driver = self._gpu.driver
        try:
            with driver.entered(self._gpu.context(lane.device)):
                driver.stream_capturing(lane.stream)
        except errors.TransferdError as error:
            return error
        return errors.InvalidRequest("the stream was destroyed", reason="STREAM_DESTROYED")

    def _refused(self, lane: Lane) -> errors.TransferdError:
        """Ends a job that is published and would wait for ever; its lane takes no more."""
        session = self._gpu.session
        job_id = _new("uint64_t *")
        result: int = lib.tfd_lane_refused(lane.native, job_id)
        session.job_cancel(job_id[0])
        session.job_release(job_id[0])
        self._lanes.drop(lane)
        return self._gpu.driver.error("enqueueing a copy", result)

    def _failure(self, rc: int, timeout_s: float | None) -> errors.TransferdError:
        if rc == -errno.EBUSY:
            return _capturing()
        if rc == -errno.ENODEV:
            return errors.Unavailable(
                f"this stream copies no more: {self._gpu.fault or 'the driver refused a copy'}",
                reason="CUDA_FAILED",
            )
        return self._gpu.session.refusal(rc, timeout_s)
