# SPDX-License-Identifier: Apache-2.0
"""Tenants: who, what, how much."""

from __future__ import annotations

import os
from multiprocessing import shared_memory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transferd.daemon import errors
from transferd.daemon import region as regions
from transferd.daemon.config import QuotaConfig, TenantConfig
from transferd.daemon.policy import Tenant


def tenant(**values: object) -> Tenant:
    return Tenant(TenantConfig.model_validate({"name": "t", **values}))


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5)), max_size=60))
def test_limits_are_never_passed(steps: list[tuple[bool, int]]) -> None:
    one = tenant(quotas=QuotaConfig(regions=10))
    held = 0
    for take, amount in steps:
        if not take:
            one.refund("regions", held)
            held = 0
        elif held + amount <= 10:
            one.charge("regions", amount)
            held += amount
        else:
            with pytest.raises(errors.QuotaExceeded) as caught:
                one.charge("regions", amount)
            assert caught.value.reason == "REGIONS"
            assert "quotas.regions" in caught.value.message
        assert one.used["regions"] == held


def test_users() -> None:
    tenant().check_uid(4711)
    tenant(uids=[1, 2]).check_uid(2)
    with pytest.raises(errors.AccessDenied) as caught:
        tenant(uids=[1, 2]).check_uid(3)
    assert caught.value.reason == "UID_NOT_ALLOWED"


def test_leases() -> None:
    tenant(lease_sessions=True).check_lease()
    with pytest.raises(errors.AccessDenied) as caught:
        tenant().check_lease()
    assert caught.value.reason == "LEASE_NOT_ALLOWED"


@pytest.mark.parametrize("name", ["", "/", "//x", "/a/b", "/..", "..", "/a\0b", "/" + "x" * 300])
def test_shared_memory_names_that_are_none(name: str) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        regions.open_shm(name, tenant(shm_paths=True, uids=[os.getuid()]))
    assert caught.value.field == "shm_path"


def test_shared_memory_by_policy() -> None:
    memory = shared_memory.SharedMemory(create=True, size=4096)
    try:
        name = f"/{memory.name.lstrip('/')}"
        os.close(regions.open_shm(name, tenant(shm_paths=True, uids=[os.getuid()])))
        for refused in (tenant(), tenant(shm_paths=True, uids=[os.getuid() + 1])):
            with pytest.raises(errors.AccessDenied) as caught:
                regions.open_shm(name, refused)
            assert caught.value.reason == "SHM_PATH_NOT_ALLOWED"
    finally:
        memory.close()
        memory.unlink()
    with pytest.raises(errors.InvalidRequest, match="shm_open"):
        regions.open_shm(name, tenant(shm_paths=True, uids=[os.getuid()]))


def test_links_in_shared_memory_are_not_followed() -> None:
    link = "/dev/shm/transferd-test-link"
    os.symlink("/etc/passwd", link)
    try:
        with pytest.raises(errors.TransferdError):
            regions.open_shm("/transferd-test-link", tenant(shm_paths=True, uids=[0]))
    finally:
        os.unlink(link)
