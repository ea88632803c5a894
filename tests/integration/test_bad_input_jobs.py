# SPDX-License-Identifier: Apache-2.0
"""Jobs with wrong values: by the SDK (typed errors), by gRPC, and by raw entries on the ring."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import transferd
from transferd.native.client_half import lib
from transferd.native.names import Detail, JobStatus
from transferd.v1 import transfer_pb2, types_pb2

from support.grpc_session import grpc_session, shm_file
from support.raw_sender import IMM, IMMS, LENGTH, RawSender, raw_sender
from support.raw_session import RawSession
from support.waiting import WAIT_S, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.daemon import DaemonProcess

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = pytest.mark.slow

U64 = (1 << 64) - 1
WRITE, IMMEDIATE = int(lib.TFD_OP_WRITE), int(lib.TFD_OP_IMM)
NO_OP = 1 + max(int(getattr(lib, name)) for name in dir(lib) if name.startswith("TFD_OP_"))


@pytest.fixture
def ring(shared_pair: Pair) -> Iterator[RawSender]:
    with raw_sender(*shared_pair) as sender:
        yield sender
        assert not any(
            sender.target.view
        )  # the source is zero; what is out of bounds lands nowhere


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"op": 0}, Detail.BAD_OP),
        ({"op": NO_OP}, Detail.BAD_OP),
        ({"op": 255}, Detail.BAD_OP),
        ({"flags": 128}, Detail.BAD_FLAGS),
        ({"priority": 2}, Detail.BAD_FLAGS),
        ({"_resv0": 1}, Detail.BAD_FLAGS),
        ({"trigger": 1}, Detail.BAD_FLAGS),
        ({"marks": 1}, Detail.BAD_FLAGS),
        ({"op": IMMEDIATE, "src_region": 0}, Detail.BAD_FLAGS),  # an immediate with a length
        ({"src_region": 0}, Detail.BAD_REGION),
        ({"src_region": U64}, Detail.BAD_REGION),
        ({"dst_grant": 0}, Detail.BAD_GRANT),
        ({"dst_grant": U64}, Detail.BAD_GRANT),
        ({"length": LENGTH + 1}, Detail.SOURCE_BOUNDS),
        ({"src_offset": LENGTH}, Detail.SOURCE_BOUNDS),
        ({"src_offset": U64}, Detail.SOURCE_BOUNDS),
        ({"src_offset": U64, "length": 2}, Detail.SOURCE_BOUNDS),
        ({"src_offset": U64 - 4095, "length": 4096}, Detail.SOURCE_BOUNDS),
        ({"src_offset": LENGTH + 1, "length": 0}, Detail.SOURCE_BOUNDS),
        ({"dst_offset": LENGTH}, Detail.DESTINATION_BOUNDS),
        ({"dst_offset": U64}, Detail.DESTINATION_BOUNDS),
        ({"dst_offset": U64, "length": 2}, Detail.DESTINATION_BOUNDS),
        ({"dst_offset": U64 - 4095, "length": 4096}, Detail.DESTINATION_BOUNDS),
        ({"dst_offset": LENGTH + 1, "length": 0}, Detail.DESTINATION_BOUNDS),
        ({"length": (1 << 40) + 1}, Detail.LENGTH),
        ({"length": U64}, Detail.LENGTH),
        ({"imm": IMMS.start - 1}, Detail.IMM_RANGE),
        ({"imm": IMMS.stop}, Detail.IMM_RANGE),
        ({"imm": (1 << 20) - 1}, Detail.IMM_RANGE),
        ({"imm": 1 << 20}, Detail.IMM_BITS),
        ({"imm": (1 << 20) | IMM}, Detail.IMM_BITS),  # the name space's bits are not the client's
        ({"imm": (1 << 32) - 1}, Detail.IMM_BITS),
    ],
    ids=str,
)
def test_raw_entry(ring: RawSender, fields: dict[str, int], detail: Detail) -> None:
    wanted = {Detail.SOURCE_BOUNDS, Detail.DESTINATION_BOUNDS, detail}
    status, seen = ring.end(**fields)
    assert status is JobStatus.INVALID
    # A length that leaves both is told of either.
    assert seen is detail or ("length" in fields and seen in wanted)
    # The session goes on, and nothing was counted.
    assert ring.end() == (JobStatus.OK, Detail.NONE)
    ring.counter.wait(1, WAIT_S)
    assert tuple(ring.counter.read()) == (1, 0, 0, 0)


def test_raw_entry_at_the_edges(ring: RawSender) -> None:
    """What touches a bound but does not leave it is right, and zero bytes are a count."""
    edges: list[dict[str, int]] = [
        {"length": LENGTH},
        {"length": 0},
        {"length": 0, "src_offset": LENGTH, "dst_offset": LENGTH},
        {"src_offset": LENGTH - 1, "dst_offset": LENGTH - 1},
        {"op": IMMEDIATE, "src_region": 0, "length": 0},
    ]
    for fields in edges:
        assert ring.end(**fields) == (JobStatus.OK, Detail.NONE), fields
    ring.counter.wait(len(edges), WAIT_S)
    assert tuple(ring.counter.read()) == (len(edges), 0, 0, 0)
    for imm in (IMMS.start, IMMS.stop - 1):
        assert ring.end(imm=imm) == (JobStatus.OK, Detail.NONE)


def test_raw_commands(ring: RawSender) -> None:
    nothing = {"src_region": 0, "dst_grant": 0, "length": 0}
    end = ring.end(op=lib.TFD_OP_CANCEL, imm=0, argument=12345, **nothing)
    assert end == (JobStatus.INVALID, Detail.NO_SUCH_JOB)
    end = ring.end(op=lib.TFD_OP_ACKNOWLEDGE, imm=77, **nothing)
    assert end == (JobStatus.INVALID, Detail.BAD_COUNTER)
    end = ring.end(op=lib.TFD_OP_ACKNOWLEDGE, imm=1 << 20, **nothing)
    assert end == (JobStatus.INVALID, Detail.IMM_BITS)


def test_handles_of_another_session(ring: RawSender, shared_pair: Pair) -> None:
    """Handles are valid in their own session only, however well they are guessed."""
    near, _ = shared_pair
    with RawSession(near) as thief:
        entry = {"op": WRITE, "length": 1, "imm": IMM}
        job = thief.submit(src_region=ring.region, dst_grant=ring.grant, **entry)
        assert eventually(lambda: thief.end_of(job), "the job ends") == (
            JobStatus.INVALID, Detail.BAD_GRANT,
        )  # fmt: skip
    assert ring.counter.value == 0


# ---- by gRPC ----


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"src_region": 0}, "BAD_REGION"),
        ({"src_region": U64}, "BAD_REGION"),
        ({"src_offset_bytes": LENGTH + 1}, "SOURCE_BOUNDS"),
        ({"src_offset_bytes": U64, "length_bytes": 2}, "SOURCE_BOUNDS"),
        ({"dst_offset_bytes": LENGTH}, "DESTINATION_BOUNDS"),
        ({"dst_offset_bytes": U64, "length_bytes": 2}, "DESTINATION_BOUNDS"),
        ({"imm": IMMS.stop}, "IMM_RANGE"),
    ],
    ids=str,
)
def test_grpc_job(shared_pair: Pair, fields: dict[str, Any], detail: str) -> None:
    near, far = shared_pair
    with (
        shm_file(LENGTH) as (name, _),
        grpc_session(near) as sender,
        transferd.Client(far.socket) as receiver,
    ):
        descriptor = receiver.alloc(LENGTH).grant(imms=IMMS).descriptor
        good = {
            "src_region": sender.register(name),
            "dst": descriptor,
            "imm": IMM,
            "length_bytes": 1,
        }
        jobs = [
            transfer_pb2.Job(write=transfer_pb2.WriteJob(**values))  # type: ignore[arg-type]
            for values in (good | fields, good)
        ]
        ids = sender.call("transfers.Submit", transfer_pb2.SubmitRequest(jobs=jobs)).job_ids
        bad, right = sender.wait(list(ids))
        assert (bad.status, bad.detail) == (types_pb2.JOB_STATUS_INVALID, detail)
        assert (right.status, right.detail) == (types_pb2.JOB_STATUS_OK, "")
        receiver.counter(IMM).wait(1, WAIT_S)
        assert tuple(receiver.counter(IMM).read()) == (1, 0, 0, 0)


# ---- by the SDK ----


@pytest.fixture(params=[True, False], ids=["ring", "grpc"])
def sdk(request: pytest.FixtureRequest, shared_pair: Pair) -> Iterator[transferd.Client]:
    with transferd.Client(shared_pair[0].socket, shared_memory=request.param) as client:
        yield client


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"imm": 1 << 20}, ["1048576", "20 bits"]),
        ({"imm": -1}, ["-1"]),
        ({"imm": "7"}, ["'7'"]),
        ({"imm": IMM, "dst_offset": -1}, ["dst_offset", "-1"]),
        ({"imm": IMM, "dst_offset": 1 << 64}, ["dst_offset", str(1 << 64)]),
        ({"imm": IMM, "dst_offset": 1.5}, ["dst_offset", "1.5"]),
        ({"imm": IMM, "priority": "urgent"}, ["priority", "'urgent'", "latency"]),
        ({"imm": IMM, "deadline_s": 0}, ["deadline_s", "0"]),
        ({"imm": IMM, "deadline_s": -2}, ["deadline_s", "-2"]),
        ({"imm": IMM, "dst": "text"}, ["descriptor", "str"]),
    ],
    ids=str,
)
def test_sdk_refuses_before_it_submits(
    sdk: transferd.Client, arguments: dict[str, Any], words: list[str]
) -> None:
    region = sdk.alloc(LENGTH)
    arguments = {"dst": region.grant(imms=IMMS).descriptor} | arguments
    with pytest.raises(transferd.InvalidRequest) as caught:
        sdk.write(region, **arguments)
    for word in words:
        assert word in str(caught.value)


def test_sdk_job_that_is_refused_says_why(sdk: transferd.Client, shared_pair: Pair) -> None:
    with transferd.Client(shared_pair[1].socket) as receiver:
        source, target = sdk.alloc(2 * LENGTH), receiver.alloc(LENGTH)
        dst = target.grant(imms=IMMS).descriptor
        cases: list[tuple[dict[str, Any], type[Exception], str, str]] = [
            ({"imm": IMMS.stop}, transferd.AccessDenied, "IMM_RANGE", "outside the grant"),
            (
                {"imm": IMM, "dst_offset": 1},
                transferd.InvalidRequest,
                "DESTINATION_BOUNDS",
                "leave the grant",
            ),
            (
                {"imm": IMM, "dst_offset": U64},
                transferd.InvalidRequest,
                "DESTINATION_BOUNDS",
                "leave the grant",
            ),
        ]
        for arguments, kind, detail, text in cases:
            with pytest.raises(transferd.JobFailed, match=text) as caught:
                sdk.write(source[:LENGTH], dst, **arguments).wait(WAIT_S)
            assert isinstance(caught.value, kind)
            assert caught.value.detail == detail
        with pytest.raises(transferd.InvalidRequest) as bounds:
            source[: 2 * LENGTH + 1]
        assert str(2 * LENGTH) in str(bounds.value)
        source.close()
        with pytest.raises(transferd.InvalidRequest, match="closed"):
            sdk.write(source, dst, imm=IMM)
        assert receiver.counter(IMM).value == 0


def test_sdk_grants_that_are_refused(sdk: transferd.Client) -> None:
    region = sdk.alloc(LENGTH)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"offset": LENGTH + 1}, str(LENGTH + 1)),
        ({"length": LENGTH + 1}, str(LENGTH + 1)),
        ({"offset": -1}, "-1"),
        ({"rights": {"read", "map"}}, "RIGHT_MAP is for GPU memory"),
        ({"rights": {"read", "send"}}, "write"),
        ({"rights": set()}, "write"),
        ({"imms": [1, 3]}, "gap"),
        ({"imms": range(1 << 20, (1 << 20) + 1)}, str(1 << 20)),
        ({"expires_s": 0}, "expires_s"),
        ({"expires_s": -1}, "expires_s"),
    ]
    for arguments, word in cases:
        with pytest.raises(transferd.InvalidRequest) as caught:
            region.grant(**arguments)
        assert word in str(caught.value), arguments
    for length in (0, -1, 1 << 50, 1.5, "1"):
        with pytest.raises(transferd.InvalidRequest):
            sdk.alloc(length)  # type: ignore[arg-type]
    with pytest.raises(transferd.QuotaExceeded) as quota:
        region.grant(imms=range(1 << 19))
    assert quota.value.reason == "COUNTERS"


@pytest.mark.parametrize("imm", [-1, 1 << 20, 1.0, "1", None])
def test_sdk_counters_that_are_refused(sdk: transferd.Client, imm: Any) -> None:
    with pytest.raises(transferd.InvalidRequest):
        sdk.counter(imm)
