# SPDX-License-Identifier: Apache-2.0
"""Hosts on which provider verbs cannot run as configured: it says what is wrong and what to do."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vm.guest import Guest

PROGRAM = Path(__file__).with_name("rail_process.py")
MIB = 1 << 20
START_S = 240  # of a daemon: importing gRPC takes long in an emulated machine
ENVIRONMENT = {"PYTHONSAFEPATH": "1"}
# What a container, or a shell, may pin that is not told otherwise.
MEMLOCK = "ulimit -l 512; exec setpriv --bounding-set -ipc_lock --inh-caps -ipc_lock"


def opened(guest: Guest, rail: str = "rxe0", *, wrapper: str = "exec", **verbs: Any) -> str:
    """Opens a rail and registers a MiB; what was said."""
    arguments = [sys.executable, str(PROGRAM), rail, json.dumps(verbs), str(MIB)]
    command = f"{wrapper} {shlex.join(arguments)}"
    return guest.run(command, timeout_s=START_S, env=ENVIRONMENT, cwd="/").stdout


@pytest.fixture
def without_address(guest: Guest) -> Iterator[Guest]:
    """Gives a guest whose card has no IPv4 address, and with it no GID that can be routed."""
    address = guest.run("ip -4 -o addr show dev d0").stdout.split()[3]
    guest.run("ip -4 addr flush dev d0")
    yield guest
    guest.run(f"ip addr add {address} dev d0")


def test_what_was_chosen(guest: Guest) -> None:
    said = opened(guest)
    assert said.startswith("why: rxe0 port 1, GID index ")
    assert " of d0, the first of an IPv4 address" in said
    assert "RoCE v2" in said
    assert "MTU 4096" in said
    assert "Passed over" in said
    assert "fe80::" in said


def test_no_usable_gid(without_address: Guest) -> None:
    said = opened(without_address)
    assert said.startswith("refused: ")
    assert "no RoCE v2 GID that can be routed" in said
    assert "fe80::" in said
    assert "give its interface an IP address" in said
    assert opened(without_address, link_local=True).startswith("why: rxe0 port 1, GID index 0")


def test_a_gid_index_that_there_is_not(guest: Guest) -> None:
    assert "has no GID with index 77" in opened(guest, gid_index=77)


def test_no_such_device(guest: Guest) -> None:
    said = opened(guest, "mlx5_9")
    assert said.startswith("refused: ")
    assert "mlx5_9" in said
    assert "the devices are rxe0" in said


def test_memlock_is_too_small(guest: Guest) -> None:
    said = opened(guest, wrapper=MEMLOCK)
    assert "registering 1048576 bytes failed" in said
    assert "512 KiB" in said
    assert "LimitMEMLOCK=infinity" in said
    assert opened(guest, wrapper="ulimit -l 512; exec").startswith("why: ")  # root may pin anything


def test_a_kernel_without_rxe(guest_without_rxe: Guest) -> None:
    said = opened(guest_without_rxe)
    assert said.startswith("refused: ")
    assert "RDMA" in said
    assert "modprobe" in said
