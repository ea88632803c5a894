# SPDX-License-Identifier: Apache-2.0
"""The bars of the operations: several rails, fences, exact counts."""

from __future__ import annotations

import contextlib
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bench import fences, scale
from bench.limited import limited_daemons
from bench.pair import endpoints
from bench.report import Report, Row
from bench.stats import median, spread
from bench.writes import flood_gbps

from support import netns

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.options import Options
    from bench.pair import Endpoint

MIB = 1 << 20
SIZE, WINDOW, WRITES = 32 * MIB, 4, 8
TWO_RAILS = 1.9
PAGE = 64 << 10
PAIRS = 4
NATIVE = Path(__file__).resolve().parents[3] / "native"
UNEQUAL = Path(__file__).resolve().parents[2] / "integration" / "test_rails.py"
OPERATIONS = 1_000_000


def measure(options: Options) -> Report:
    """Measures everything.

    Args:
        options: Of the command line.

    Returns:
        A row for each bar that this machine can tell about.
    """
    report = Report("operations")
    with options.step("simulated operations") as wanted:
        if wanted:
            simulated(options, report)
    with options.step("many sessions and peers") as wanted:
        if wanted:
            scale.many(report)
    with options.step("two limited rails") as wanted:
        if wanted:
            two_rails(options, report)
    with options.step("unequal rails") as wanted:
        if wanted:
            unequal_rails(report)
    for name, run in (
        ("canaries in the core", fences.native_canaries),
        ("canaries through daemons", fences.daemon_canaries),
        ("canaries, opener stopped", fences.stopped_canaries),
        ("fences answered, idle", fences.idle_answers),
        ("fences answered, loaded", fences.loaded_answers),
    ):
        with options.step(name) as wanted:
            if wanted:
                run(options, report)
    return report


def simulated(options: Options, report: Report) -> None:
    """Runs random operations on the simulated fabric; it ends at the first wrong count."""
    subprocess.run(
        ["make", "-s", "-C", str(NATIVE), "check", "TESTS=property"],
        check=True,
        capture_output=True,
    )
    seed = str(random.SystemRandom().randrange(1 << 32))
    done = subprocess.run(
        [str(NATIVE.parent / "build/native/gcc/tests/test_property")],
        check=False,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "TFD_OPERATIONS": str(options.scaled(OPERATIONS)),
            "TFD_SEED": seed,
        },
    )
    counts = dict(word.split("=") for word in done.stdout.split())
    report.rows.append(
        Row(
            "simulated operations without a wrong count, a job that ended twice or never",
            float(counts.get("operations", 0)),
            "",
            ">=",
            OPERATIONS,
            done.stdout.strip() or done.stderr.strip() or f"status {done.returncode}",
        )
    )


@contextlib.contextmanager
def limited_pair(rails: int) -> Iterator[tuple[Endpoint, Endpoint]]:
    """Runs two hosts with so many rails of 1 Gbit/s, and a client process at each."""
    with limited_daemons(rails) as hosts, endpoints(hosts, SIZE * WINDOW) as pair:
        yield pair


def two_rails(options: Options, report: Report) -> None:
    """Measures what a second rail brings; both pairs of hosts take turns."""
    names = {
        0: "32 MiB write over two rails of 1 Gbit/s, ratio to one",
        PAGE: f"the same in pages of {PAGE >> 10} KiB, ratio to one",
    }
    if why := netns.missing():
        report.skipped += [(name, why) for name in names.values()]
        return
    count = options.scaled(WRITES)
    rates: dict[tuple[int, int], list[float]] = {(n, page): [] for n in (1, 2) for page in names}
    with limited_pair(1) as one, limited_pair(2) as two:
        for _ in range(max(3, options.turns // 3)):
            for (rails, page), measured in rates.items():
                pair = one if rails == 1 else two
                measured.append(flood_gbps(*pair, SIZE, WINDOW, count, page=page)[0])
    for page, name in names.items():
        single, double = rates[1, page], rates[2, page]
        ratios = [b / a for a, b in zip(single, double, strict=True)]
        report.rows.append(
            Row(
                name,
                median(ratios),
                "x",
                ">=",
                TWO_RAILS,
                f"{median(double):.2f} of {median(single):.2f} Gbps; ratios {spread(ratios)}",
            )
        )


def unequal_rails(report: Report) -> None:
    """Runs the tests of hosts with different numbers of rails: bytes, counts, rails used."""
    name = "pairs of hosts with 1 and 2, 2 and 2, 2 and 3, 4 and 1 rails, all correct both ways"
    if why := netns.missing():
        report.skipped.append((name, why))
        return
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(UNEQUAL)],
        check=False,
        capture_output=True,
        text=True,
        cwd=NATIVE.parent,
    )
    last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]
    passed = re.match(r"(\d+) passed", last) if done.returncode == 0 else None
    report.rows.append(Row(name, float(passed[1] if passed else 0), "", ">=", PAIRS, last))
