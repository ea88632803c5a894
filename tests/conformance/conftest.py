# SPDX-License-Identifier: Apache-2.0
"""Each test of this folder that takes `provider` runs once for each provider that the host has."""

from __future__ import annotations

import pytest

from support.providers import PROVIDERS, Provider


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrises by provider; the tests of one run behind each other."""
    if "provider" in metafunc.fixturenames:
        metafunc.parametrize(
            "provider", PROVIDERS, ids=lambda p: p.name, indirect=True, scope="session"
        )


@pytest.fixture(scope="session")
def provider(request: pytest.FixtureRequest) -> Provider:
    """Gives one that this host can run. Others are skipped with the reason, or fail if required."""
    chosen: Provider = request.param
    why = chosen.missing()
    if why is None:
        return chosen
    if chosen.name in request.config.option.require_provider:
        pytest.fail(f"provider {chosen.name} is required, and {why}", pytrace=False)
    pytest.skip(f"{chosen.name}: {why}")
