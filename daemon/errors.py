# SPDX-License-Identifier: Apache-2.0
"""Every error that leaves the daemon, and the one mapping of them to gRPC.

The only module that knows gRPC status codes. A message says what was wrong, with which value, and
what to do; ``reason`` is the word that programs look at. How a *job* ended is never an error of a
call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

DOMAIN = "transferd"
RETRY_DELAY_S = 0.1  # what RetryInfo advises: a peer's restart takes longer, a full ring less

Code = grpc.StatusCode


class TransferdError(Exception):
    """Something a caller is told.

    Attributes:
        code: gRPC status code of the class.
        reason: UPPER_SNAKE word; an instance may carry a narrower one than its class.
        message: One or two sentences for people.
        values: What the message speaks of, as strings.
    """

    code: Code = Code.INTERNAL
    reason: str = "INTERNAL"

    def __init__(self, message: str, *, reason: str = "", **values: object) -> None:
        super().__init__(message)
        self.message = message
        if reason:
            self.reason = reason
        self.values = {key: str(value) for key, value in values.items()}


class InvalidRequest(TransferdError):
    """A field of the request is wrong; ``field`` is its path."""

    code = Code.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"

    def __init__(self, field: str, problem: str, *, reason: str = "", **values: object) -> None:
        super().__init__(f"{field}: {problem}", reason=reason, field=field, **values)
        self.field = field
        self.problem = problem


class NotFound(TransferdError):
    """What the request names does not exist in this session."""

    code = Code.NOT_FOUND
    reason = "NOT_FOUND"


class Conflict(TransferdError):
    """The request does not fit the present state; the caller has to change something first."""

    code = Code.FAILED_PRECONDITION
    reason = "CONFLICT"


class AccessDenied(TransferdError):
    """Policy says no."""

    code = Code.PERMISSION_DENIED
    reason = "ACCESS_DENIED"


class Unauthenticated(TransferdError):
    """The call carries no token, or one that names no living session."""

    code = Code.UNAUTHENTICATED
    reason = "TOKEN_UNKNOWN"


class QuotaExceeded(TransferdError):
    """A limit is reached; ``reason`` names it."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "QUOTA"


class StaleDescriptor(TransferdError):
    """The descriptor's owner has restarted; a new one is needed."""

    code = Code.FAILED_PRECONDITION
    reason = "STALE_DESCRIPTOR"


class StalePeer(TransferdError):
    """Between daemons: the callee does not know the caller (any more), or is another than meant."""

    code = Code.FAILED_PRECONDITION
    reason = "STALE_PEER"


class PeerLost(TransferdError):
    """The far daemon died, restarted or cannot be reached; asking again may work."""

    code = Code.UNAVAILABLE
    reason = "PEER_UNREACHABLE"


class Unavailable(TransferdError):
    """The daemon cannot serve this now."""

    code = Code.UNAVAILABLE
    reason = "UNAVAILABLE"


class TimedOut(TransferdError):
    """A bound passed before the answer was known."""

    code = Code.DEADLINE_EXCEEDED
    reason = "TIMED_OUT"


class Internal(TransferdError):
    """A fault of the daemon; the log has the rest under ``id``."""


def _detail(error: TransferdError) -> Iterable[object]:
    """Yields the google.rpc messages that go with the class of an error."""
    yield error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.values)
    if isinstance(error, InvalidRequest):
        yield error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(
                    field=error.field, description=error.problem, reason=error.reason
                )
            ]
        )
    elif error.code is Code.RESOURCE_EXHAUSTED:
        yield error_details_pb2.QuotaFailure(
            violations=[
                error_details_pb2.QuotaFailure.Violation(
                    subject=error.reason.lower(), description=error.message
                )
            ]
        )
    elif error.code is Code.FAILED_PRECONDITION:
        yield error_details_pb2.PreconditionFailure(
            violations=[
                error_details_pb2.PreconditionFailure.Violation(
                    type=error.reason, subject=DOMAIN, description=error.message
                )
            ]
        )
    elif error.code is Code.UNAVAILABLE:
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromMicroseconds(int(RETRY_DELAY_S * 1e6))
        yield info


def to_status(error: TransferdError) -> grpc.Status:
    """Makes what ``context.abort_with_status`` takes.

    Args:
        error: What happened.

    Returns:
        The code, the message and the details: ErrorInfo always, others by class.
    """
    number: int = error.code.value[0]
    status = status_pb2.Status(code=number, message=error.message)
    for message in _detail(error):
        packed = AnyMessage()
        packed.Pack(message)  # type: ignore[arg-type]
        status.details.append(packed)
    return rpc_status.to_status(status)


# What a peer's reason word becomes again on this side; anything else is PeerLost.
_BY_REASON: dict[str, type[TransferdError]] = {
    "STALE_PEER": StalePeer,
    "STALE_DESCRIPTOR": StaleDescriptor,
    "PROTOCOL_MISMATCH": Conflict,
    "GRANT_REVOKED": Conflict,
    "GRANT_EXPIRED": Conflict,
    "DESCRIPTOR_FORGED": AccessDenied,
}


def from_reason(reason: str, message: str) -> TransferdError:
    """Makes the error that a peer told by its reason word.

    Args:
        reason: UPPER_SNAKE word.
        message: The peer's sentence.

    Returns:
        An error of the class that belongs to the word.
    """
    if reason == "DESCRIPTOR_INVALID":
        return InvalidRequest("descriptor", message, reason=reason)
    cls = _BY_REASON.get(reason)
    if cls is None:
        return PeerLost(message, peer_reason=reason)
    return cls(message, reason=reason)


def from_rpc(call: grpc.RpcError, what: str) -> TransferdError:
    """Makes the error behind a failed call to a peer.

    Args:
        call: What grpc raised.
        what: The call, for people.

    Returns:
        The peer's own error where it told one; PeerLost where the peer could not be reached;
        TimedOut.
    """
    code: Code = call.code()
    text = call.details() or code.name
    reason = _reason_of(call)
    if reason:
        return from_reason(reason, text)
    if code is Code.DEADLINE_EXCEEDED:
        return TimedOut(f"{what}: no answer in time")
    return PeerLost(f"{what}: {text}")


def _reason_of(call: grpc.RpcError) -> str:
    """Reads ErrorInfo.reason of our domain from a failed call; empty where there is none."""
    try:
        status = rpc_status.from_call(call)  # type: ignore[arg-type]
    except ValueError:  # a status that contradicts the trailing metadata: not ours
        return ""
    for packed in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if packed.Unpack(info) and info.domain == DOMAIN:
            return str(info.reason)
    return ""


def values_of(error: TransferdError) -> Mapping[str, str]:
    """Tells the fields for a log line about an error."""
    return {"reason": error.reason, **error.values}
