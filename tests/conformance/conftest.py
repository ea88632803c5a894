# SPDX-License-Identifier: Apache-2.0
"""Each test of this folder that takes `provider` exists once for each provider that it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.providers import OPERATIONS, PROVIDERS, Provider

HERE = Path(__file__).parent


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrises by provider; the tests of one run behind each other."""
    if "provider" in metafunc.fixturenames:
        metafunc.parametrize(
            "provider", PROVIDERS, ids=lambda p: p.name, indirect=True, scope="session"
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Takes out what a provider leaves out; `test_matrix.py` sees that it is no more.

    Of one that this host cannot run `test_left_out` stays alone, which says why, unless the
    provider is required.
    """
    required = config.option.require_provider
    absent = {one.name for one in PROVIDERS if one.missing() and one.name not in required}
    items[:] = [item for item in items if is_wanted(item, absent)]


def is_wanted(item: pytest.Item, absent: set[str]) -> bool:
    """Whether a test is of no provider, of another folder, or for its provider."""
    callspec = getattr(item, "callspec", None)
    parameters = callspec.params if callspec else {}
    provider = parameters.get("provider")
    if not isinstance(provider, Provider) or HERE not in item.path.parents:
        return True
    if item.name.startswith("test_left_out["):
        return True
    what = parameters.get("case") or parameters.get("program") or OPERATIONS
    return provider.name not in absent and what not in provider.left_out


@pytest.fixture(scope="session")
def provider(request: pytest.FixtureRequest) -> Provider:
    """Gives one that this host can run; fails if it cannot, and has to."""
    chosen: Provider = request.param
    why = chosen.missing()
    if why is None:
        return chosen
    if chosen.name in request.config.option.require_provider:
        pytest.fail(f"provider {chosen.name} is required, and {why}", pytrace=False)
    pytest.skip(f"nothing of {chosen.name}: {why}")
