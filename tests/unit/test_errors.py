# SPDX-License-Identifier: Apache-2.0
"""Errors on the wire: the reason always, and the details that belong to the class."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2 as details
from google.rpc import status_pb2

from transferd.daemon import errors

CASES: list[tuple[errors.TransferdError, grpc.StatusCode, type | None]] = [
    (
        errors.InvalidRequest("a.b[2]", "wrong"),
        grpc.StatusCode.INVALID_ARGUMENT,
        details.BadRequest,
    ),
    (errors.NotFound("x"), grpc.StatusCode.NOT_FOUND, None),
    (errors.Conflict("x"), grpc.StatusCode.FAILED_PRECONDITION, details.PreconditionFailure),
    (errors.AccessDenied("x"), grpc.StatusCode.PERMISSION_DENIED, None),
    (errors.Unauthenticated("x"), grpc.StatusCode.UNAUTHENTICATED, None),
    (errors.QuotaExceeded("x"), grpc.StatusCode.RESOURCE_EXHAUSTED, details.QuotaFailure),
    (errors.StaleDescriptor("x"), grpc.StatusCode.FAILED_PRECONDITION, details.PreconditionFailure),
    (errors.PeerLost("x"), grpc.StatusCode.UNAVAILABLE, details.RetryInfo),
    (errors.Unavailable("x"), grpc.StatusCode.UNAVAILABLE, details.RetryInfo),
    (errors.TimedOut("x"), grpc.StatusCode.DEADLINE_EXCEEDED, None),
    (errors.Internal("x"), grpc.StatusCode.INTERNAL, None),
]


def unpack(status: grpc.Status) -> status_pb2.Status:
    (value,) = (v for k, v in status.trailing_metadata if k == "grpc-status-details-bin")
    return status_pb2.Status.FromString(value)


@pytest.mark.parametrize(("error", "code", "detail"), CASES)
def test_status(error: errors.TransferdError, code: grpc.StatusCode, detail: type | None) -> None:
    status = errors.to_status(error)
    assert status.code is code
    rich = unpack(status)
    info = details.ErrorInfo()
    assert rich.details[0].Unpack(info)
    assert (info.reason, info.domain) == (error.reason, "transferd")
    assert len(rich.details) == (1 if detail is None else 2)
    if detail is not None:
        assert rich.details[1].Is(detail.DESCRIPTOR)  # type: ignore[attr-defined]


def test_every_class_has_a_case() -> None:
    classes = {cls for cls in vars(errors).values() if isinstance(cls, type)}
    known = {
        cls
        for cls in classes
        if issubclass(cls, errors.TransferdError) and cls is not errors.TransferdError
    }
    assert known - {type(case[0]) for case in CASES} == {errors.StalePeer}


def test_bad_request_names_the_field() -> None:
    rich = unpack(errors.to_status(errors.InvalidRequest("jobs[2].write.imm", "too big")))
    bad = details.BadRequest()
    assert rich.details[1].Unpack(bad)
    assert bad.field_violations[0].field == "jobs[2].write.imm"
    assert rich.message == "jobs[2].write.imm: too big"


@pytest.mark.parametrize(
    ("reason", "cls"),
    [
        ("STALE_PEER", errors.StalePeer),
        ("STALE_DESCRIPTOR", errors.StaleDescriptor),
        ("GRANT_REVOKED", errors.Conflict),
        ("GRANT_EXPIRED", errors.Conflict),
        ("PROTOCOL_MISMATCH", errors.Conflict),
        ("DESCRIPTOR_FORGED", errors.AccessDenied),
        ("DESCRIPTOR_INVALID", errors.InvalidRequest),
        ("SOMETHING_NEW", errors.PeerLost),
    ],
)
def test_reasons_of_peers_become_errors_again(
    reason: str, cls: type[errors.TransferdError]
) -> None:
    error = errors.from_reason(reason, "text")
    assert type(error) is cls
    if cls is not errors.PeerLost:
        assert error.reason == reason
