# SPDX-License-Identifier: Apache-2.0
"""The core on real RDMA devices: its C tests over verbs and over libfabric's verbs, in a guest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from support.providers import PROGRAMS, PROVIDERS
from vm import inner

if TYPE_CHECKING:
    from support.providers import Provider
    from vm.guest import Guest

# Beside those of tests/conformance; the last is of the provider alone, by both ways of posting.
BESIDE = ("core_channel", "core_faults", "core_lengths", "core_paths", "verbs")
LONG = {"core_operations", "core_cycles", "canary"}
NAMES = {"verbs": (*PROGRAMS, *BESIDE), "libfabric-verbs": PROGRAMS}
CASES = [
    pytest.param(
        one,
        name,
        id=f"{one.name}-{name}",
        marks=[pytest.mark.long] * (name in LONG or one.provider != "verbs"),
    )
    for one in PROVIDERS
    for name in NAMES.get(one.name, ())
    if name not in one.known and name not in one.left_out
]


@pytest.mark.parametrize(("provider", "name"), CASES)
def test_core(guest: Guest, provider: Provider, name: str) -> None:
    environment = {
        "TFD_TEST_PROVIDER": provider.provider,
        "TFD_TEST_RAIL": "rxe0",
        "TFD_TEST_FABRIC": provider.fabric,
        "TFD_CANARY_RUNS": "8",
    }
    inner.run_program(guest, name, env=environment)
