# SPDX-License-Identifier: Apache-2.0
"""A test in guests that failed where a card of QEMU's stands still is skipped, and no other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from vm import conftest
from vm.guest import Guest, Machine

if TYPE_CHECKING:
    from pathlib import Path

STALL = "virtio_net virtio4 eth1: NETDEV WATCHDOG: CPU: 0: transmit queue 0 timed out 5656 ms\n"


def outcome(fixture: str, outcome: str, path: Path = conftest.HERE / "test_ports.py") -> Any:
    """What becomes of a report."""
    item: Any = SimpleNamespace(path=path, location=("", 1, ""), fixturenames=["hosts", fixture])
    report: Any = SimpleNamespace(
        outcome=outcome, longrepr="why it failed", failed=outcome == "failed"
    )
    hook = conftest.pytest_runtest_makereport(item, None)  # type: ignore[arg-type]
    next(hook)
    with pytest.raises(StopIteration) as ended:
        hook.send(report)
    return ended.value.value


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guest:
    folder = tmp_path / "pair2" / "host1-1"
    folder.mkdir(parents=True)
    made = Guest(None, Machine(name="host1"), folder)  # type: ignore[arg-type]
    monkeypatch.setattr(Guest, "latest", {folder.parent / "host1": made})
    monkeypatch.setattr(conftest, "WATCHDOG_S", 0.0)
    return made


def test_a_failure_beside_a_stall(guest: Guest) -> None:
    (guest.folder / "console.log").write_text(STALL)
    report = outcome("vm_pair_of_two_links", "failed")
    assert report.outcome == "skipped"
    assert "host1" in report.longrepr[2]


@pytest.mark.parametrize("fixture", ["vm_pair", "vm_lone"])
def test_a_failure_of_other_guests(guest: Guest, fixture: str) -> None:
    (guest.folder / "console.log").write_text(STALL)
    assert outcome(fixture, "failed").outcome == "failed"


def test_a_failure_without_a_stall(guest: Guest) -> None:
    (guest.folder / "console.log").write_text("GUEST: up\n")
    report = outcome("vm_pair_of_two_links", "failed")
    assert (report.outcome, report.longrepr) == ("failed", "why it failed")


def test_what_passes_passes(guest: Guest, tmp_path: Path) -> None:
    (guest.folder / "console.log").write_text(STALL)
    assert outcome("vm_pair_of_two_links", "passed").outcome == "passed"
    assert outcome("vm_pair_of_two_links", "failed", tmp_path / "test_x.py").outcome == "failed"
