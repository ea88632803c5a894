# SPDX-License-Identifier: Apache-2.0
"""The bar of many sessions, peers and jobs at once, by native/tests/test_scale.c."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from bench.report import Row

if TYPE_CHECKING:
    from bench.report import Report

NATIVE = Path(__file__).resolve().parents[2] / "native"
SESSIONS, PEERS, JOBS = 256, 64, 10_000


def many(report: Report) -> None:
    """Has all jobs in flight at once on the simulated fabric, and states what they take.

    The program ends with an error when a job ends twice or never, or a count is wrong.

    Args:
        report: Gets one row; its value is how many jobs were in flight, 0 after an error.
    """
    subprocess.run(
        ["make", "-s", "-C", str(NATIVE), "check", "TESTS=scale"], check=True, capture_output=True
    )
    done = subprocess.run(
        [str(NATIVE.parent / "build/native/gcc/tests/test_scale")],
        check=False,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "TFD_SESSIONS": str(SESSIONS),
            "TFD_PEERS": str(PEERS),
            "TFD_JOBS": str(JOBS),
        },
    )
    words = dict(word.split("=") for word in done.stdout.split())
    report.rows.append(
        Row(
            f"jobs in flight of {SESSIONS} sessions to {PEERS} peers, all of which end once",
            float(words.get("in_flight", 0)) if done.returncode == 0 else 0.0,
            "",
            ">=",
            JOBS,
            done.stdout.strip() or done.stderr.strip() or f"status {done.returncode}",
        )
    )
