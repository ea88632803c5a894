# SPDX-License-Identifier: Apache-2.0
"""Which rails a daemon chooses from a real kernel's RDMA devices, and what stands in its way.

What the provider says of the same faults is in test_refusals.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vm.pair import address

if TYPE_CHECKING:
    from vm.guest import Guest

pytestmark = pytest.mark.long

PROGRAM = Path(__file__).with_name("rails_of.py")
VERBS, AUTO = "provider: verbs", ""
WAIT_S = 300.0
AS_IT_IS = ("true", "true")


def rails(guest: Guest, *steps: tuple[str, str, str]) -> list[dict[str, Any]]:
    """Asks in a guest, after each change (and before it is taken back), which rails it has."""
    command = [sys.executable, str(PROGRAM), json.dumps(steps)]
    done = guest.run(command, timeout_s=WAIT_S, env={"PYTHONSAFEPATH": "1"})
    told: list[dict[str, Any]] = json.loads(done.stdout)
    return told


def test_devices_of_a_real_kernel(guest: Guest) -> None:
    own = f"{address(1)}/24 dev d0"
    explicit, auto, files, down, addresses, after = rails(
        guest,
        (VERBS, *AS_IT_IS),
        (AUTO, *AS_IT_IS),
        (VERBS, "mount -t tmpfs none /dev/infiniband", "umount /dev/infiniband"),
        (VERBS, "ip link set d0 down", f"ip link set d0 up; ip address replace {own}"),
        (VERBS, "ip -4 address flush dev d0", f"ip address add {own}"),
        (VERBS, *AS_IT_IS),
    )
    assert explicit["provider"] == "verbs"
    assert list(explicit["rails"]) == ["rxe0"]
    assert "ACTIVE" in explicit["rails"]["rxe0"]
    assert "on d0" in explicit["rails"]["rxe0"]
    assert (auto["provider"], auto["fallback"]) == ("tcp", "")
    assert auto["unused"]["rxe0"].startswith("RDMA in software")
    for told, said in (
        (files, "/dev/infiniband/uverbs0 is not there; a container has to be given it"),
        (down, "down (port 1 is DOWN)"),
        (addresses, "give d0 an IP address, or set verbs.link_local"),
    ):
        assert said in told["refusal"]
    assert after == explicit


def test_a_kernel_without_soft_roce(guest_without_rxe: Guest) -> None:
    explicit, auto = rails(guest_without_rxe, (VERBS, *AS_IT_IS), (AUTO, *AS_IT_IS))
    assert "/sys/class/infiniband is " in explicit["refusal"]
    assert "soft-RoCE" in explicit["refusal"]
    assert auto["fallback"] == ""
