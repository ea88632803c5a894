# SPDX-License-Identifier: Apache-2.0
"""Sessions without IO: tokens, leases, limits; grants: bounds and life."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transferd.daemon import errors
from transferd.daemon.config import QuotaConfig, TenantConfig
from transferd.daemon.grant import (
    RIGHT_READ,
    RIGHT_WRITE,
    GrantState,
    GrantTable,
    check_grant,
)
from transferd.daemon.policy import Tenant
from transferd.daemon.region import Kind, Memory, Region, check_range
from transferd.daemon.session import (
    Origin,
    Session,
    SessionState,
    SessionTable,
    check_lease,
    check_name,
)

SECOND = 1_000_000_000


def tenant(sessions: int = 10) -> Tenant:
    return Tenant(TenantConfig(name="t", quotas=QuotaConfig(sessions=sessions)))


def opened(table: SessionTable, lease_ms: int = 0, listener: str = "s") -> Session:
    session = table.add(tenant(), Origin(listener, "name", lease_ms=lease_ms), 0)
    table.opened(session, session.session_id + 1000)
    return session


def test_tokens() -> None:
    table = SessionTable(10)
    session = opened(table)
    assert table.by_token(session.token.hex(), "s", 5) is session
    assert session.used_ns == 5
    for token, listener in (
        (session.token.hex(), "other socket"),
        ("00" * 32, "s"),
        ("not hex", "s"),
        ("", "s"),
    ):
        with pytest.raises(errors.Unauthenticated):
            table.by_token(token, listener, 5)
    table.ending(session)
    with pytest.raises(errors.Unauthenticated):
        table.by_token(session.token.hex(), "s", 5)
    with pytest.raises(errors.Unauthenticated):
        session.check_open()


def test_session_without_a_data_plane_has_no_token_yet() -> None:
    table = SessionTable(10)
    session = table.add(tenant(), Origin("s", ""), 0)
    with pytest.raises(errors.Unauthenticated):
        table.by_token(session.token.hex(), "s", 5)


def test_leases() -> None:
    table = SessionTable(10)
    leased, attached = opened(table, lease_ms=1000), opened(table)
    assert table.leases_over(SECOND) == []
    assert table.leases_over(SECOND + 1) == [leased]
    table.by_token(leased.token.hex(), "s", SECOND)
    assert table.leases_over(2 * SECOND) == []
    assert attached not in table.leases_over(10**6 * SECOND)


def test_limits() -> None:
    table = SessionTable(2)
    small = tenant(sessions=1)
    first = table.add(small, Origin("s", ""), 0)
    with pytest.raises(errors.QuotaExceeded) as caught:
        table.add(small, Origin("s", ""), 0)
    assert caught.value.reason == "SESSIONS"
    table.add(tenant(), Origin("s", ""), 0)
    with pytest.raises(errors.QuotaExceeded, match=r"limits\.sessions"):
        table.add(tenant(), Origin("s", ""), 0)
    table.closed(first)
    table.closed(first)
    assert small.used["sessions"] == 0
    assert first.state is SessionState.CLOSED


@pytest.mark.parametrize("name", ["x" * 65, "a\nb", "\x1b[31m", "\u202e"])
def test_names_that_harm_a_terminal(name: str) -> None:
    with pytest.raises(errors.InvalidRequest):
        check_name(name)


@pytest.mark.parametrize("lease_ms", [1, 999, 600_001, (1 << 32) - 1])
def test_leases_out_of_range(lease_ms: int) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        check_lease(lease_ms)
    assert str(lease_ms) in caught.value.message


def region(length: int = 8192, *, writable: bool = True) -> Region:
    session = opened(SessionTable(5))
    memory = Memory(1, -1, length, Kind.MEMFD, sealed=True, writable=writable)
    return Region(1, 7, session, memory, 0, length, "")


U64 = st.integers(0, (1 << 64) - 1)


@given(U64, U64)
def test_file_ranges(offset: int, length: int) -> None:
    memory = Memory(1, -1, 1 << 20, Kind.MEMFD, sealed=True, writable=True)
    try:
        given_length = check_range(memory, offset, length)
    except errors.InvalidRequest:
        assert offset % 4096 or offset >= 1 << 20 or offset + length > 1 << 20
    else:
        assert 0 < given_length <= (1 << 20) - offset


@given(U64, U64, st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 32) - 1))
def test_grant_ranges(offset: int, length: int, first: int, count: int) -> None:
    one = region()
    try:
        given_length = check_grant(one, offset, length, RIGHT_WRITE, first, count)
    except errors.InvalidRequest:
        assert offset + length > 8192 or first >= 1 << 20 or first + count > 1 << 20
    else:
        assert offset + given_length <= 8192
        assert first + count <= 1 << 20


def test_read_only_memory_is_granted_to_readers_alone() -> None:
    with pytest.raises(errors.InvalidRequest, match="read-only"):
        check_grant(region(writable=False), 0, 0, RIGHT_WRITE | RIGHT_READ, 0, 0)
    assert check_grant(region(writable=False), 0, 0, RIGHT_READ, 0, 0)


def test_grant_life() -> None:
    table = GrantTable()
    one = region()
    grant = table.add(one, 0, 10, 1, range(3, 5), 0)
    assert table.usable(grant.grant_id, 0) is grant
    assert (grant.imm_first, grant.imm_count) == (3, 2)
    grant.state = GrantState.ENDING
    with pytest.raises(errors.Conflict) as caught:
        table.usable(grant.grant_id, 0)
    assert caught.value.reason == "GRANT_REVOKED"
    table.remove(grant)
    assert not one.grants
    assert not one.session.grants
    with pytest.raises(errors.Conflict):
        table.usable(grant.grant_id, 0)
    assert table.add(one, 0, 10, 1, range(0), 0).grant_id != grant.grant_id


def test_grant_expiry() -> None:
    table = GrantTable()
    grant = table.add(region(), 0, 10, 1, range(0), 100)
    assert table.usable(grant.grant_id, 99) is grant
    for _ in range(2):
        with pytest.raises(errors.Conflict) as caught:
            table.usable(grant.grant_id, 100)
        assert caught.value.reason == "GRANT_EXPIRED"
        grant.expired = True
        table.remove(grant)  # it is told as expired, not as revoked, afterwards, too
