# SPDX-License-Identifier: Apache-2.0
"""Fixtures of this folder, which needs a GPU; without one all of it is skipped, in one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import transferd

from support import gpu as gpus
from support.shared_pair import shared_pair, show_shared_logs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.daemon import DaemonProcess

__all__ = ["shared_pair", "show_shared_logs"]


HERE = Path(__file__).parent
TEST_S = 30


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Tells a failure when it happens: of a run that is cut short it is known, too."""
    if report.failed and report.nodeid.startswith("tests/gpu/"):
        print(f"\n{report.longreprtext}\n{report.capstdout}", file=sys.__stderr__, flush=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU one of our tests stands for all. No test takes longer than its bound."""
    ours = [item for item in items if item.path.parent == HERE]
    for item in ours:
        item.add_marker(pytest.mark.timeout(TEST_S, method="signal"))
    if not ours or not (why := gpus.why_not()):
        return
    config.hook.pytest_deselected(items=ours[1:])
    ours[0].add_marker(pytest.mark.skip(reason=f"{len(ours)} tests need a GPU: {why}"))
    items[:] = [item for item in items if item not in ours[1:]]


@pytest.fixture(scope="session")
def gpu() -> gpus.Gpu:
    """The first GPU; its context is current."""
    return gpus.Gpu()


@pytest.fixture
def sender(
    gpu: gpus.Gpu, shared_pair: tuple[DaemonProcess, DaemonProcess]
) -> Iterator[transferd.Client]:
    """A client of a daemon."""
    with transferd.Client(shared_pair[0].socket, name="sender") as made:
        yield made


@pytest.fixture
def receiver(
    gpu: gpus.Gpu, shared_pair: tuple[DaemonProcess, DaemonProcess]
) -> Iterator[transferd.Client]:
    """Another client of it, in the same process."""
    with transferd.Client(shared_pair[0].socket, name="receiver") as made:
        yield made
