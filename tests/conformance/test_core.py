# SPDX-License-Identifier: Apache-2.0
"""The C programs that test the core, each on every provider that does not leave it out."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from support.native_programs import make
from support.providers import PROGRAMS

if TYPE_CHECKING:
    from support.providers import Provider

pytestmark = pytest.mark.slow

SECONDS = 300


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("program", PROGRAMS)
def test_core(request: pytest.FixtureRequest, program: str, provider: Provider) -> None:
    if program in provider.known:
        request.applymarker(pytest.mark.xfail(reason=provider.known[program], strict=False))
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
