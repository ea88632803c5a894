# SPDX-License-Identifier: Apache-2.0
"""The blocking face of the SDK. Its calls that move data go straight into native code."""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING, Any

from transferd.client.adopt import adopt
from transferd.client.calls import Calls
from transferd.client.closing import Closing
from transferd.client.connect import Options, open_session
from transferd.client.counter import Counter
from transferd.client.cuda.arrays import device_array
from transferd.client.events import ThreadDriver
from transferd.client.grant import fence_all
from transferd.client.job import (
    Job,
    Write,
    to_deadline_ns,
    to_imm,
    to_offset,
    to_priority,
)
from transferd.client.memory import Region, RegionSlice, allocate, register_device
from transferd.client.operations import to_requests
from transferd.client.session import IMM_COUNT, OP_IMM, OP_WRITE, no_region, to_descriptor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from transferd.client.cuda.mapping import DevicePointer
    from transferd.client.grant import Grant
    from transferd.client.operations import Operation
    from transferd.client.session import Session


class Client(Calls, Closing):
    """A session with the daemon of this host. Usable from several threads; a context manager.

    Nothing of it survives ``fork``: a child makes its own.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        name: str = "",
        shared_memory: bool | None = None,
        records: int = 0,
        counters: int = 0,
        spin_us: float = 200.0,
        timeout_s: float = 30.0,
    ) -> None:
        """Attaches.

        Args:
            address: ``unix:///path`` of the daemon; None: TRANSFERD_SOCKET, or
                ``unix:///run/transferd/transferd.sock``.
            name: Shown by transferctl; at most 64 bytes.
            shared_memory: True: only with the fd socket. False: gRPC only. None: gRPC only where
                there is no fd socket.
            records: Jobs in flight; 0: the daemon's default.
            counters: Immediates that can be counted; 0: the daemon's default.
            spin_us: How long a wait polls before it sleeps.
            timeout_s: Bound of each control call.

        Raises:
            Unavailable: No daemon answers there.
            AccessDenied: The daemon's policy refuses this client.
            QuotaExceeded: The daemon has no room for a session.
        """
        self._session: Session = open_session(
            Options(
                address=address,
                name=name,
                shared_memory=shared_memory,
                records=records,
                counters=counters,
                spin_us=spin_us,
                timeout_s=timeout_s,
            )
        )
        self._driver = driver = ThreadDriver(self._session)
        self._session.on_end = driver.kick
        self._counters: dict[int, Counter] = {}

    # ---- what it is ----

    @property
    def session_id(self) -> int:
        """Number of the session, as transferctl shows it."""
        return self._session.session_id

    @property
    def shared_memory(self) -> bool:
        """Whether jobs go through shared memory; False: over gRPC."""
        return self._session.shared_memory

    @property
    def provider(self) -> str:
        """The daemon's provider, for people; empty without shared memory."""
        return self._session.provider

    @property
    def batch_limit(self) -> int:
        """Jobs that one :meth:`submit` hands over as a whole."""
        return self._session.batch_limit

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._session.closed

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"session {self.session_id}"
        return f"<Client of {self._session.control.address}: {state}>"

    # ---- memory ----

    def alloc(self, length: int, near: int | str | None = None, *, name: str = "") -> Region:
        """Makes and registers new host memory, zeroed.

        Args:
            length: Bytes.
            near: NUMA node whose NICs are nearest; None: the daemon chooses.
            name: Shown by transferctl.

        Raises:
            InvalidRequest: A value is out of range.
            QuotaExceeded: Too many regions, or too much memory locked.
        """
        handle, view = allocate(self._session, length, near, name)
        return Region(self._session, handle, view, name=name)

    def register(self, memory: Any, near: int | str | None = None, *, name: str = "") -> Region:
        """Registers a GPU tensor or array, or adopts a host tensor, array or buffer in place.

        GPU memory: its allocation is registered once; a further tensor in it costs no call of the
        daemon. Host memory: its address stays, its pages become shared. Nobody may write to it
        while this runs. A child that is forked later shares the pages.

        Args:
            memory: Contiguous. GPU: of torch, cupy, or with ``__cuda_array_interface__`` or DLPack;
                kept alive by the region. Host: large enough to have pages of its own; the error
                says so where it has not.
            near: As for :meth:`alloc`.
            name: Shown by transferctl; of GPU memory, that of the allocation's first tensor.

        Raises:
            InvalidRequest: It cannot be registered; the message says why and what to do.
            QuotaExceeded: Too many regions, or too much memory locked.
            Unavailable: NO_CUDA, CUDA_TOO_OLD: it is GPU memory, and no driver is of use.
        """
        array = device_array(memory)
        if array is not None:
            source = register_device(self._session, array, near, name)
            return Region(
                self._session,
                source.handle,
                None,
                start=array.address - source.base,
                length=array.length,
                name=name,
                owner=memory,
                source=source,
            )
        handle, view, start = adopt(self._session, memory, near, name)
        return Region(self._session, handle, view, start=start, name=name, owner=memory)

    def map(self, dst: bytes, *, device: int | None = None) -> DevicePointer:
        """Maps the GPU memory of a grant with the right "map" for the application's own kernels.

        Counts nothing, checks nothing: what kernels do there is between the two processes. While it
        is held, the owner's ``revoke()`` fails with STILL_MAPPED.

        Args:
            dst: Descriptor of a grant of this host and tenant.
            device: Ordinal of the device whose kernels use it; None: of the current context.

        Returns:
            The address, a number with ``length``; a context manager that closes it.

        Raises:
            AccessDenied: It cannot be mapped; the message says why.
            Unavailable: NO_CUDA, GPU_NOT_VISIBLE.
        """
        return self._session.gpu().map(to_descriptor(dst), device)

    def fence(self, fences: Mapping[Grant, Iterable[int | range]]) -> None:
        """Fences immediates of several grants at once, in the time of one.

        Args:
            fences: For each grant of this Client its immediates, as for :meth:`Grant.fence`.

        Raises:
            InvalidRequest: None, or one that is not the grant's: nothing is fenced.
            FencesFailed: A Conflict; ``failed`` tells what :meth:`Grant.fence` would have raised
                for each grant of which more is to be said. All others are quiet.
        """
        fence_all(self._session, fences)

    # ---- jobs ----

    def warm(self, *descriptors: bytes) -> None:
        """Opens descriptors and connects to their owners ahead of the first use.

        Once GPU memory is registered, it maps what can be mapped, too, and loads the kernels.

        Raises:
            StaleDescriptor: An owner has restarted.
            AccessDenied: A descriptor is forged.
            PeerLost: An owner cannot be reached.
        """
        self._session.open_many(descriptors)
        if self._session.gpu_or_none is not None:
            self._session.gpu_or_none.warm(descriptors)

    def write(
        self,
        src: Region | RegionSlice,
        dst: bytes,
        dst_offset: int = 0,
        *,
        imm: int,
        exact: bool = False,
        checksum: bool = False,
        priority: str = "bulk",
        deadline_s: float | None = None,
        stream: Any = None,
        timeout_s: float | None = None,
    ) -> Job:
        """Writes a region, or part of one, into a grant; then counts 1 on the immediate there.

        The source must stay as it is until the job has ended. The first use of a descriptor opens
        it.

        Args:
            src: ``region`` or ``region[a:b]``.
            dst: Descriptor.
            dst_offset: Bytes into the granted range.
            imm: Immediate, inside the grant.
            exact: The count follows the acknowledgement of all bytes on all rails, so that a
                target need not include the other writes in flight on the immediate.
            checksum: The receiver's daemon compares what it finds there (CRC-32C) before it counts;
                if it differs, the job ends with REMOTE_ACCESS (CHECKSUM). Costs both daemons a
                reading of the bytes, and a round trip.
            priority: "bulk" or "latency".
            deadline_s: The job ends with DEADLINE after this long.
            stream: As for :meth:`write_pages`.
            timeout_s: How long to wait for room when too many jobs are in flight; None: as long as
                it takes.

        Returns:
            The job.

        Raises:
            InvalidRequest: A value is out of range.
            StaleDescriptor, AccessDenied, PeerLost, Conflict: The descriptor cannot be opened.
            WaitTimeout: No room in time.
            Unavailable: The session is over.
        """
        if type(imm) is not int or not 0 <= imm < IMM_COUNT:
            to_imm(imm)
        if type(dst_offset) is not int or not 0 <= dst_offset < 1 << 64:
            to_offset("dst_offset", dst_offset)
        if type(dst) is not bytes:
            dst = to_descriptor(dst)
        try:
            handle = src.open_handle()
            source = src.source
        except AttributeError:
            raise no_region("src", src) from None
        session, job_id = self._session, 0
        if exact or checksum or (source is None and stream is not None):
            pass  # nothing of these in the two short ways
        elif source is None:
            job_id = session.submit(
                OP_WRITE,
                to_priority(priority),
                imm,
                handle,
                src.start,
                dst,
                dst_offset,
                src.length,
                0 if deadline_s is None else to_deadline_ns(deadline_s),
                timeout_s,
            )
        else:
            job_id = session.gpu().copier.write(
                source,
                to_priority(priority),
                imm,
                src.start,
                dst,
                dst_offset,
                src.length,
                0 if deadline_s is None else to_deadline_ns(deadline_s),
                stream,
                timeout_s,
            )
        if job_id:
            return Job(session, self._driver, job_id, dst)
        spec = Write(
            src=src,
            dst=dst,
            imm=imm,
            dst_offset=dst_offset,
            exact=exact,
            checksum=checksum,
            priority=priority,
            deadline_s=deadline_s,
            stream=stream,
        )
        return self._submit_one(spec.request(), timeout_s)

    def imm(
        self,
        dst: bytes,
        imm: int,
        *,
        priority: str = "bulk",
        deadline_s: float | None = None,
        timeout_s: float | None = None,
    ) -> Job:
        """Counts 1 on an immediate of a grant, without bytes. Otherwise as :meth:`write`."""
        session = self._session
        dst = to_descriptor(dst)
        job_id = session.submit(
            OP_IMM,
            to_priority(priority),
            to_imm(imm),
            0,
            0,
            dst,
            0,
            0,
            to_deadline_ns(deadline_s),
            timeout_s,
        )
        return Job(session, self._driver, job_id, dst)

    def submit(self, jobs: Iterable[Operation], *, timeout_s: float | None = None) -> list[Job]:
        """Submits a batch in one native call (one RPC without shared memory).

        Args:
            jobs: :class:`transferd.Write`, :class:`transferd.Imm`, :class:`transferd.WritePages`,
                :class:`transferd.Scatter`, :class:`transferd.Barrier`, :class:`transferd.Read`. Up
                to ``batch_limit`` are taken as a whole, all or none, if there is room for their
                tables; more go in parts, in order.
            timeout_s: How long to wait for room; None: as long as it takes.

        Returns:
            The jobs, in the same order.

        Raises:
            InvalidRequest: A value is out of range; nothing was submitted.
            WaitTimeout: No room in time; of the exception, ``jobs`` are those that were submitted.
        """
        requests = to_requests(jobs)
        end = None if timeout_s is None else time.monotonic() + timeout_s
        made: list[Job] = []
        for part in self._session.parts(requests):
            left = None if end is None else max(0.0, end - time.monotonic())
            try:
                made += self._submit(part, left)
            except Exception as error:
                error.jobs = made  # type: ignore[attr-defined]
                raise
        return made

    # ---- counting ----

    def counter(self, imm: int) -> Counter:
        """Finds the counter of an immediate of this session, making one where there is none.

        Raises:
            InvalidRequest: More than 20 bits.
            QuotaExceeded: No counter is left.
        """
        counter = self._counters.get(imm)
        if counter is None:
            self._session.check_open()
            self._session.counter_open(to_imm(imm))
            counter = self._counters[imm] = Counter(self._session, self._driver, imm)
        return counter

    # ---- its end ----

    def close(self) -> None:
        """Ends the session cleanly, with its regions, grants and jobs. Idempotent.

        Threads that wait get Unavailable.
        """
        self._session.close()
        self._driver.close()
        self._session.close_events()

    def __del__(self) -> None:
        session: Session | None = getattr(self, "_session", None)
        if session is not None and not session.closed and not session.control.orphaned:
            # An exiting process closes its sessions before this: living._at_exit.
            warnings.warn(f"{self!r} was not closed", ResourceWarning, source=self, stacklevel=2)
            self.close()


__all__: Sequence[str] = ["Client"]
