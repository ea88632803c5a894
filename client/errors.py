# SPDX-License-Identifier: Apache-2.0
"""What the SDK raises.

``reason`` is the daemon's UPPER_SNAKE word, which programs may compare; the message is for people.
How a *job* ended is told by :class:`JobFailed`, raised by ``job.wait()``; where the end says the
same as a failed call would, the exception is of both classes, so ``except PeerLost`` catches
either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

if TYPE_CHECKING:
    from collections.abc import Mapping

DOMAIN = "transferd"


class TransferdError(Exception):
    """Base of everything that the SDK raises on purpose.

    Attributes:
        reason: UPPER_SNAKE word that says what happened.
        values: What the message speaks of, as strings.
    """

    reason: str = "INTERNAL"

    def __init__(
        self, message: str, *, reason: str = "", values: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        if reason:
            self.reason = reason
        self.values = dict(values or {})


class InvalidRequest(TransferdError, ValueError):
    """An argument is wrong; the message names it and its value."""

    reason = "INVALID_REQUEST"


class NotFound(TransferdError, LookupError):
    """What the call names does not exist in this session."""

    reason = "NOT_FOUND"


class Conflict(TransferdError):
    """The call does not fit the present state; something has to change first."""

    reason = "CONFLICT"


class AccessDenied(TransferdError, PermissionError):
    """The daemon's policy, or a descriptor's MAC, says no."""

    reason = "ACCESS_DENIED"


class QuotaExceeded(TransferdError):
    """A limit is reached; ``reason`` names it."""

    reason = "QUOTA"


class StaleDescriptor(TransferdError):
    """The descriptor's owner has restarted: get a new descriptor from it."""

    reason = "STALE_DESCRIPTOR"


class PeerLost(TransferdError):
    """The far daemon died, restarted or cannot be reached."""

    reason = "PEER_UNREACHABLE"


class Unavailable(TransferdError, ConnectionError):
    """The own daemon is not there, stops, or has ended this session. Make a new Client."""

    reason = "UNAVAILABLE"


class WaitTimeout(TransferdError, TimeoutError):
    """The bound that the caller gave passed first. Nothing was cancelled."""

    reason = "TIMED_OUT"


class Internal(TransferdError):
    """A fault of the daemon; its log has the rest under the id in the message."""


class JobFailed(TransferdError):
    """A job ended otherwise than OK.

    Attributes:
        job_id: The job.
        status: How it ended, as :class:`transferd.native.names.JobStatus`.
        detail: UPPER_SNAKE word that says why; empty where the status says all.
    """

    reason = "JOB_FAILED"

    def __init__(self, message: str, *, job_id: int, status: int, detail: str) -> None:
        super().__init__(message, reason=detail)
        self.job_id = job_id
        self.status = status
        self.detail = detail


class FencesFailed(Conflict):
    """A fence on several grants: of some of them more is to be said; the others are quiet.

    Attributes:
        failed: By grant, for each of those: what its own ``fence`` would have raised.
    """

    def __init__(self, failed: dict[Any, TransferdError]) -> None:
        worst = next(
            (error for error in failed.values() if error.reason == "STILL_COPIED"),
            next(iter(failed.values())),
        )
        count = f"{len(failed)} grants, the first: " if len(failed) > 1 else ""
        super().__init__(f"{count}{worst}", reason=worst.reason)
        self.failed = failed


class JobPeerLost(JobFailed, PeerLost):
    """A job ended because its peer is gone."""


class JobStale(JobFailed, StaleDescriptor):
    """A job ended because the owner of its destination has restarted."""


class JobInvalid(JobFailed, InvalidRequest):
    """A job was refused; ``detail`` names what was wrong with it."""


class JobDenied(JobFailed, AccessDenied):
    """A job was refused by the right, range or expiry of its destination."""


class JobQuota(JobFailed, QuotaExceeded):
    """A job was refused by a limit of the session."""


class CounterFault(TransferdError):
    """Writes on an immediate can no longer be trusted to arrive.

    ``counter.acknowledge()`` takes the faults as seen; waits work again afterwards.

    Attributes:
        imm: The immediate.
        value: Landed writes when the fault was seen.
        faults: Faults so far.
        lost: Writes known lost so far.
    """

    reason = "COUNTER_FAULT"

    def __init__(self, imm: int, *, value: int, faults: int, lost: int) -> None:
        known = f"{lost} writes are known lost" if lost else "how many writes are lost is not known"
        super().__init__(
            f"immediate {imm}: a sender failed after {value} writes had landed; {known}; "
            "acknowledge() the counter to go on with it"
        )
        self.imm = imm
        self.value = value
        self.faults = faults
        self.lost = lost


_BY_REASON: dict[str, type[TransferdError]] = {
    "STALE_DESCRIPTOR": StaleDescriptor,
    "PEER_UNREACHABLE": PeerLost,
    "PEER_LOST": PeerLost,
}

_BY_CODE: dict[grpc.StatusCode, type[TransferdError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: Conflict,
    grpc.StatusCode.FAILED_PRECONDITION: Conflict,
    grpc.StatusCode.ABORTED: Conflict,
    grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
    grpc.StatusCode.UNAUTHENTICATED: Unavailable,  # the session behind the token is over
    grpc.StatusCode.RESOURCE_EXHAUSTED: QuotaExceeded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.CANCELLED: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: WaitTimeout,
}

# Words that the fd socket uses, where no gRPC code comes along.
_FD_REASONS: dict[str, type[TransferdError]] = {
    "INVALID_REQUEST": InvalidRequest,
    "ABI_MISMATCH": InvalidRequest,
    "NOT_FOUND": NotFound,
    "CONFLICT": Conflict,
    "ACCESS_DENIED": AccessDenied,
    "TOKEN_UNKNOWN": Unavailable,
    "UNAVAILABLE": Unavailable,
    "DRAINING": Unavailable,
    "QUOTA": QuotaExceeded,
    "SESSIONS": QuotaExceeded,
    "MEMLOCK": QuotaExceeded,
    "COUNTERS": QuotaExceeded,
    "MAILBOX_SLOTS": QuotaExceeded,
    "SHARED_FILES": QuotaExceeded,
    "UID_NOT_ALLOWED": AccessDenied,
    "ALREADY_ATTACHED": Conflict,
    "ATTACH_TIMEOUT": Conflict,
    "NOT_ATTACHED": Unavailable,
    "SESSION_ENDED": Unavailable,
    "STOPPING": Unavailable,
    "MAP_NOT_GRANTED": AccessDenied,
    "MAP_OTHER_HOST": AccessDenied,
    "MAP_OTHER_TENANT": AccessDenied,
    "MAP_NOT_FOUND": NotFound,
    "OPEN_NOT_FOUND": NotFound,
    "GRANT_REVOKED": Conflict,
    "GRANT_EXPIRED": Conflict,
    "MAPS": QuotaExceeded,
    "INTERNAL": Internal,
}


def from_fd_error(reason: str, message: str) -> TransferdError:
    """Makes the error that the fd socket told by its reason word."""
    return _FD_REASONS.get(reason, InvalidRequest)(message, reason=reason)


def from_result(reason: str, message: str) -> TransferdError:
    """Makes the error that the daemon told of one of several grants."""
    return (NotFound if reason == "GRANT_NOT_FOUND" else Conflict)(message, reason=reason)


def from_rpc(error: grpc.RpcError, address: str) -> TransferdError:
    """Makes the error behind a failed call.

    Args:
        error: What grpc raised.
        address: Of the daemon, for people.

    Returns:
        By ErrorInfo.reason where that is narrower, else by the gRPC code.
    """
    code: grpc.StatusCode = error.code()
    message: str = error.details() or code.name
    info = _error_info(error)
    if info is not None:
        cls = _BY_REASON.get(info.reason) or _BY_CODE.get(code, Internal)
        return cls(message, reason=info.reason, values=dict(info.metadata))
    if code is grpc.StatusCode.UNAVAILABLE:
        why = message.splitlines()[0].rsplit("error: ", 1)[-1]
        return Unavailable(f"no daemon answers at {address} ({why}): is `transferd serve` running?")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return Internal(f"the daemon at {address} does not know this call: {message}")
    return _BY_CODE.get(code, Internal)(message)


def _error_info(error: grpc.RpcError) -> error_details_pb2.ErrorInfo | None:
    """Reads ErrorInfo of our domain from a failed call."""
    try:
        status = rpc_status.from_call(cast("grpc.Call", error))
    except (AttributeError, ValueError):  # no trailing metadata, or somebody else's
        return None
    for packed in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if packed.Unpack(info) and info.domain == DOMAIN:
            return info
    return None
