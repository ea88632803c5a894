# SPDX-License-Identifier: Apache-2.0
"""The C programs that test the core, each on every provider between hosts."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from support.native_programs import make

if TYPE_CHECKING:
    from support.providers import Provider

pytestmark = pytest.mark.slow

PROGRAMS = (
    "core_write",
    "core_operations",
    "core_count",
    "core_cycles",
    "core_mailbox",
    "armed_wake",
    "canary",
)
# With other programs of the core's own.
NOT_BETWEEN_HOSTS = {
    "local": "both ends are one domain group: native/tests/test_local*.c",
    "sim": "what is lost on it is a test's choice: native/tests/test_property.c",
}
SECONDS = 300


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("program", PROGRAMS)
def test_core(request: pytest.FixtureRequest, program: str, provider: Provider) -> None:
    if program in provider.known:
        request.applymarker(pytest.mark.xfail(reason=provider.known[program], strict=False))
    if provider.provider in NOT_BETWEEN_HOSTS and program != "canary":
        pytest.skip(f"{provider.name}: {NOT_BETWEEN_HOSTS[provider.provider]}")
    if provider.name == "sim":
        pytest.skip("sim: nothing is under way on it, which a fence could catch")
    built = make("all", *provider.goals, f"TESTS={program}") / "tests" / f"test_{program}"
    environment = provider.variables() | {
        "TFD_TEST_PROVIDER": provider.provider,
        "TFD_TEST_RAIL": provider.rail,
        "TFD_TEST_FABRIC": provider.fabric,
        "TFD_TEST_LIBRARY": provider.library,
        "TFD_CANARY_RUNS": "8",
    }
    ended = subprocess.run(
        [built], check=False, capture_output=True, text=True, env=environment, timeout=SECONDS
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
