# SPDX-License-Identifier: Apache-2.0
"""Fixtures of this folder, which needs vLLM; without it all of it is skipped, in one line."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support import engines
from support.engines import CALM_S, Pair, transferd_engine
from support.shared_pair import shared_pair, show_shared_logs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.daemon import DaemonProcess
    from support.engines import MakeEngines

__all__ = ["shared_pair", "show_shared_logs"]

HERE = Path(__file__).parent
LOG_SHOWN = 4000
TEST_S = 600  # engines take 30 s to start, each; on a busy machine a minute and more


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks our tests. Without vLLM one of them stands for all."""
    ours = [item for item in items if item.path.parent == HERE]
    for item in ours:
        item.add_marker(pytest.mark.vllm)
        item.add_marker(pytest.mark.timeout(TEST_S, method="signal"))
    if not ours or not (why := engines.why_not()):
        return
    config.hook.pytest_deselected(items=ours[1:])
    ours[0].add_marker(pytest.mark.skip(reason=f"{len(ours)} tests need vLLM: {why}"))
    items[:] = [item for item in items if item not in ours[1:]]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Shows the end of engines' logs with a failure."""
    report = yield
    if report.failed:
        for engine in getattr(item, "vllm_engines", []):
            report.sections.append((f"log of {engine.name}", engine.log()[-LOG_SHOWN:]))
    return report


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The model; the other one is there as well then."""
    engines.make_models()
    return engines.TINY


@pytest.fixture(scope="module")
def pair(tiny: Path, shared_pair: tuple[DaemonProcess, DaemonProcess]) -> Iterator[Pair]:
    """Engines for a whole module, each with a daemon of its own; for tests that kill none."""
    near, far = shared_pair
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tfd-")))
        file = folder / "address"
        made = [
            engines.Engine(
                folder,
                "prefill",
                **transferd_engine(near, address_file=str(file), timeout_s=CALM_S),
            ),
            engines.Engine(
                folder, "decode", **transferd_engine(far, deadline_s=15.0, timeout_s=CALM_S)
            ),
        ]
        made[1].arguments["enable_prefix_caching"] = True
        for engine in made:
            engine.arguments["max_model_len"] = 8000
            stack.callback(engine.kill)
            engine.spawn()
        prefill, decode = (engine.ready() for engine in made)
        yield Pair(prefill, decode, file.read_text())


@pytest.fixture(autouse=True)
def show_pair_logs(request: pytest.FixtureRequest) -> None:
    """Has a failure show the logs of a module's engines."""
    if "pair" in request.fixturenames:
        request.node.vllm_engines = list(request.getfixturevalue("pair")[:2])


@pytest.fixture
def make_engines(
    request: pytest.FixtureRequest, tiny: Path, short_tmp: Path
) -> Iterator[MakeEngines]:
    """Starts engines at once, so that they start side by side."""
    request.node.vllm_engines = []
    with contextlib.ExitStack() as stack:

        def make(**named: dict[str, Any]) -> list[engines.Engine]:
            made = [engines.Engine(short_tmp, name, **values) for name, values in named.items()]
            for engine in made:
                stack.callback(engine.kill)
                request.node.vllm_engines.append(engine.spawn())
            return [engine.ready() for engine in made]

        yield make
