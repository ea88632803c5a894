# SPDX-License-Identifier: Apache-2.0
"""Jobs: what was submitted, and how it ends."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from transferd.client import errors
from transferd.client.events import run_callback
from transferd.client.session import (
    FLAG_CHECKSUM,
    FLAG_EXACT,
    IMM_COUNT,
    NS_PER_S,
    OP_IMM,
    OP_WRITE,
    Request,
    to_descriptor,
    to_handle,
)
from transferd.native.names import Detail, JobStatus, detail_text, job_status_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from transferd.client.events import Driver
    from transferd.client.memory import BaseRegion, RegionSlice
    from transferd.client.session import JobPath, JobResult, Session

PRIORITIES = {"bulk": 0, "latency": 1}

_OK = int(JobStatus.OK)
_PENDING = int(JobStatus.PENDING)

_FAILURES: dict[JobStatus, type[errors.JobFailed]] = {
    JobStatus.PEER_LOST: errors.JobPeerLost,
    JobStatus.INVALID: errors.JobInvalid,
    JobStatus.REMOTE_ACCESS: errors.JobDenied,
    JobStatus.QUOTA: errors.JobQuota,
}
_FAILURES_BY_DETAIL: dict[str, type[errors.JobFailed]] = {
    "STALE": errors.JobStale,
    "RIGHTS": errors.JobDenied,
    "IMM_RANGE": errors.JobDenied,
    "EXPIRED": errors.JobDenied,
    "REVOKED": errors.JobDenied,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """A write of a batch; the fields are the arguments of :meth:`Client.write`."""

    src: BaseRegion | RegionSlice
    dst: bytes
    imm: int
    dst_offset: int = 0
    exact: bool = False
    checksum: bool = False
    priority: str = "bulk"
    deadline_s: float | None = None
    stream: Any = None

    def request(self) -> Request:
        """Checks the values and makes the request."""
        src = self.src
        return Request(
            OP_WRITE,
            to_priority(self.priority),
            to_imm(self.imm),
            to_handle("src", src),
            src.start,
            to_descriptor(self.dst),
            to_offset("dst_offset", self.dst_offset),
            src.length,
            to_deadline_ns(self.deadline_s),
            (FLAG_EXACT if self.exact else 0) | (FLAG_CHECKSUM if self.checksum else 0),
            source=src.source,
            stream=to_copied(src, self.stream),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Imm:
    """An immediate of a batch: one count, no bytes."""

    dst: bytes
    imm: int
    priority: str = "bulk"
    deadline_s: float | None = None

    def request(self) -> Request:
        """Checks the values and makes the request."""
        return Request(
            OP_IMM,
            to_priority(self.priority),
            to_imm(self.imm),
            0,
            0,
            to_descriptor(self.dst),
            0,
            0,
            to_deadline_ns(self.deadline_s),
        )


def to_priority(priority: str) -> int:
    """Checks a priority."""
    try:
        return PRIORITIES[priority]
    except (KeyError, TypeError):
        raise errors.InvalidRequest(f'priority is "bulk" or "latency", not {priority!r}') from None


def to_copied(region: BaseRegion | RegionSlice, stream: Any, name: str = "src") -> Any:
    """Checks that a stream can be used; gives it."""
    if stream is not None and region.source is None:
        raise errors.InvalidRequest(
            f"stream= is for copies between GPU memory of this host, and {name} is host memory",
            reason="NOT_COPIED",
        )
    return stream


def to_imm(imm: int) -> int:
    """Checks an immediate."""
    if not isinstance(imm, int) or not 0 <= imm < IMM_COUNT:
        raise errors.InvalidRequest(
            f"imm is a number from 0 to {IMM_COUNT - 1} (20 bits), not {imm!r}", reason="IMM_BITS"
        )
    return imm


def to_offset(name: str, value: int) -> int:
    """Checks an offset in bytes."""
    if not isinstance(value, int) or not 0 <= value < 1 << 64:
        raise errors.InvalidRequest(f"{name} is a number of bytes from 0 on, not {value!r}")
    return value


def to_deadline_ns(deadline_s: float | None) -> int:
    """Checks a deadline; 0: none."""
    if deadline_s is None:
        return 0
    if not deadline_s > 0:
        raise errors.InvalidRequest(f"deadline_s is above 0 or None, not {deadline_s!r}")
    return max(1, min(int(deadline_s * NS_PER_S), (1 << 63) - 1))


def failure(result: JobResult) -> errors.JobFailed:
    """Makes the exception for a job that did not end OK."""
    detail = result.detail
    cls = _FAILURES_BY_DETAIL.get(detail) or _FAILURES.get(result.status, errors.JobFailed)
    why = _sentence(detail)
    return cls(
        f"job {result.job_id} ended with {result.status.name}: "
        f"{job_status_text(result.status)}{f' ({why})' if why else ''}",
        job_id=result.job_id,
        status=result.status,
        detail=detail,
    )


def _sentence(detail: str) -> str:
    with contextlib.suppress(KeyError):
        return detail_text(Detail[detail]) if detail else ""
    return detail


class BaseJob:
    """What both faces of a job have. A job that nobody holds gives its record back by itself."""

    __slots__ = ("__weakref__", "_driver", "_dst", "_handle", "_raw", "_session", "_status", "id")

    def __init__(
        self, session: Session, driver: Driver, job_id: int, dst: bytes | tuple[bytes, ...]
    ) -> None:
        self._session = session
        self._driver = driver
        self.id = job_id
        self._dst = dst
        self._handle = session.handles.get(dst, 0) if isinstance(dst, bytes) else 0
        self._raw: Any = None
        self._status = _PENDING

    def __del__(self) -> None:
        if self._status == _PENDING:
            self._session.job_release(self.id)

    def __repr__(self) -> str:
        name = (
            JobStatus(self._status).name if self._status != _PENDING else "not known to have ended"
        )
        return f"<{type(self).__name__} {self.id}: {name}>"

    def _finish(self, raw: Any) -> None:
        """Keeps the end and gives the record back; raw None: another thread has done so."""
        if raw is None:
            return
        gpu = self._session.gpu_or_none
        if gpu is not None and gpu.flusher.reads and raw.status == _OK:
            gpu.flusher.host()
        self._raw = raw
        self._status = int(raw.status)  # last: other threads look at it first
        self._session.job_release(self.id)
        if self._status != _OK:
            self._session.note_end(self._session.decode(self.id, raw), self._dst, self._handle)

    def _ended(self) -> bool:
        """Looks whether the job has ended; true as well when its end will never be known."""
        if self._status == _PENDING:
            try:
                self._finish(self._session.job_poll(self.id))
            except errors.Unavailable:
                return True
        return self._status != _PENDING

    def _check(self) -> JobStatus:
        """Passes an OK end on, raises for any other."""
        if self._status == _OK:
            return JobStatus.OK
        error = failure(self._session.decode(self.id, self._raw))
        gpu = self._session.gpu_or_none
        if gpu is not None and gpu.fault:
            error.add_note(gpu.fault)
        raise error

    @property
    def status(self) -> JobStatus:
        """How the job ended; PENDING while it runs. Never waits.

        Raises:
            Unavailable: The session is over and the job's end unknown.
        """
        if self._status == _PENDING:
            self._finish(self._session.job_poll(self.id))
        return JobStatus(self._status)

    @property
    def result(self) -> JobResult | None:
        """All that is known of the job's end; None while it runs. Never waits."""
        if self.status is JobStatus.PENDING:
            return None
        return self._session.decode(self.id, self._raw)

    @property
    def path(self) -> JobPath | None:
        """What the job really used; None while it runs."""
        result = self.result
        return None if result is None else result.path

    def done(self) -> bool:
        """Tells whether the job has ended. Never waits."""
        return self._ended()

    def add_done_callback(self, callback: Callable[[Self], object]) -> None:
        """Has ``callback(job)`` called once, when the job has ended or its session is over.

        It runs in a thread of the Client's (in ``transferd.aio``: in the event loop), or at once if
        the job has ended already. What it raises is logged and stops nobody.
        """
        if self._ended():
            run_callback(callback, self)
            return

        def watch() -> bool:
            if not self._ended():
                return False
            run_callback(callback, self)
            return True

        self._driver.add(watch)


class Job(BaseJob):
    """A job of a :class:`transferd.Client`. Safe to use from several threads."""

    __slots__ = ()

    def wait(self, timeout_s: float | None = None) -> JobStatus:
        """Waits until the job has ended.

        Args:
            timeout_s: Bound; None: as long as it takes.

        Returns:
            ``JobStatus.OK``.

        Raises:
            JobFailed: It ended otherwise; also of the class that fits, as PeerLost.
            WaitTimeout: The bound passed; the job goes on.
            Unavailable: The session is over and the job's end unknown.
        """
        self._wait(timeout_s)
        return self._check() if self._status != _OK else JobStatus.OK

    def cancel(self, timeout_s: float | None = None) -> JobStatus:
        """Stops the job: a fence. When this returns, none of its bytes can land any more.

        Args:
            timeout_s: Bound; None: as long as it takes.

        Returns:
            How the job ended: CANCELLED, or OK if it was quicker. PEER_LOST: the far daemon does
            not answer; what was on its way may land as long as that daemon has not noticed.

        Raises:
            WaitTimeout: It is not quiet yet.
            Unavailable: The session is over.
        """
        if self.status is JobStatus.PENDING:
            self._session.job_cancel(self.id)
            self._wait(timeout_s)
        return JobStatus(self._status)

    def _wait(self, timeout_s: float | None) -> None:
        while self._status == _PENDING:
            self._finish(self._session.job_wait(self.id, timeout_s))
