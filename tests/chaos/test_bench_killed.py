# SPDX-License-Identifier: Apache-2.0
"""transferctl bench whose other end, or whose daemon, dies in the middle; and Ctrl-C."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from transferd.client.ctl.bench.report import Report

from support.bench import END_S, quiet, serving, sessions, start, wait_for_bytes
from support.waiting import eventually

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from conftest import MakeDaemon

    from support.daemon import DaemonProcess

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

HEARTBEAT = {"interval": 0.25, "timeout": 2.0}
LEARNED_S = 2.0 + 6.0  # the timeout, asking whether the target lives, and two busy cores
LARGE = 8 << 20


@pytest.fixture
def pair(make_daemon: MakeDaemon) -> Pair:
    return make_daemon(heartbeat=HEARTBEAT), make_daemon(heartbeat=HEARTBEAT)


def begin(near: DaemonProcess, where: str, tmp_path: Path) -> subprocess.Popen[bytes]:
    """Starts an initiator; returns once its first row is done and its second is far from it."""
    process = start(
        *("--to", where, "--socket", near.socket, "--sizes", f"4K,{LARGE}", "--in-flight", "2"),
        *("--iterations", "2000", "--json", str(tmp_path / "report.json")),
        log=tmp_path / "near",
    )
    wait_for_bytes(near, 5000 * 4096 + 2 * LARGE)
    return process


def ended(process: subprocess.Popen[bytes], status: int, tmp_path: Path) -> Report:
    """Waits for an initiator's end; its first row has to be there."""
    try:
        assert process.wait(END_S) == status, (tmp_path / "near").read_text()
    finally:
        process.kill()
        process.wait()
    told = (tmp_path / "near").read_text()
    assert "Traceback" not in told
    assert "4 KiB" in told
    report = Report.model_validate_json((tmp_path / "report.json").read_text())
    assert [row.size_bytes for row in report.rows] == [4096]
    assert not report.complete
    return report


@pytest.mark.parametrize(
    "how",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGINT, marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, marks=pytest.mark.long),
    ],
)
def test_the_target_dies(pair: Pair, tmp_path: Path, how: signal.Signals) -> None:
    near, far = pair
    with serving(far, tmp_path / "far") as (target, where):
        process = begin(near, where, tmp_path)
        target.send_signal(how)
        at_s = time.monotonic()
        report = ended(process, 1, tmp_path)
        assert time.monotonic() - at_s < LEARNED_S
        assert "the target is gone" in report.error
    quiet(near, far)


@pytest.mark.long
def test_the_targets_daemon_dies(pair: Pair, tmp_path: Path) -> None:
    near, far = pair
    with serving(far, tmp_path / "far") as (target, where):
        process = begin(near, where, tmp_path)
        far.kill()
        at_s = time.monotonic()
        report = ended(process, 1, tmp_path)
        assert time.monotonic() - at_s < LEARNED_S
        assert "the target is gone" in report.error
        assert target.wait(END_S) == 1  # without its daemon it is no use
        assert "Traceback" not in (tmp_path / "far").read_text()
    quiet(near)


@pytest.mark.long
def test_the_initiators_daemon_dies(pair: Pair, tmp_path: Path) -> None:
    near, far = pair
    with serving(far, tmp_path / "far") as (_, where):
        process = begin(near, where, tmp_path)
        near.kill()
        ended(process, 1, tmp_path)
        # The target stays, for others, and holds nothing for the one that is gone.
        eventually(lambda: "is gone" in (tmp_path / "far").read_text(), "it is noticed")
        assert [session.name for session in sessions(far)] == ["bench target"]
    quiet(far)


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_the_initiator_is_interrupted(pair: Pair, tmp_path: Path, how: signal.Signals) -> None:
    near, far = pair
    with serving(far, tmp_path / "far", "--once") as (target, where):
        process = begin(near, where, tmp_path)
        process.send_signal(how)
        assert ended(process, 130, tmp_path).error == "interrupted"
        assert target.wait(END_S) == 0
    quiet(near, far)


def test_the_initiator_is_killed(pair: Pair, tmp_path: Path) -> None:
    near, far = pair
    with serving(far, tmp_path / "far") as (_, where):
        process = begin(near, where, tmp_path)
        process.kill()
        process.wait()
        eventually(lambda: "is gone" in (tmp_path / "far").read_text(), "it is noticed")
        eventually(lambda: len(sessions(far)) == 1, "its sessions are ended")
        eventually(lambda: not sessions(near), "its workers have ended", END_S)
    quiet(near, far)


@pytest.mark.long
def test_a_worker_is_killed(pair: Pair, tmp_path: Path) -> None:
    near, far = pair
    with serving(far, tmp_path / "far", "--once") as (target, where):
        process = begin(near, where, tmp_path)
        (worker,) = (s for s in sessions(near) if s.name == "bench initiator 0")
        os.kill(worker.pid, signal.SIGKILL)
        assert "ended with status -9" in ended(process, 1, tmp_path).error
        assert target.wait(END_S) == 0
    quiet(near, far)
