# SPDX-License-Identifier: Apache-2.0
"""The core on real RDMA devices: its C tests over provider verbs, in a guest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vm import inner

if TYPE_CHECKING:
    from vm.guest import Guest

VERBS = {"TFD_TEST_PROVIDER": "verbs", "TFD_TEST_RAIL": "rxe0"}


@pytest.mark.parametrize(
    "name",
    [
        "core_channel",
        "core_faults",
        "core_lengths",
        "core_mailbox",
        "core_operations",
        "core_paths",
        "core_write",
    ],
)
def test_verbs(guest: Guest, name: str) -> None:
    inner.run_program(guest, name, env=VERBS)
