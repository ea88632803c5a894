# SPDX-License-Identifier: Apache-2.0
"""The bars of the operations: several rails, fences, exact counts."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from bench import scale
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
RATE = "1gbit"
SIZE, WINDOW, WRITES = 32 * MIB, 4, 8
TWO_RAILS = 1.9
NATIVE = Path(__file__).resolve().parents[3] / "native"
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
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tfd-")))
        network = stack.enter_context(netns.network())
        daemons = []
        for number in range(2):
            directory = place / str(number)
            directory.mkdir()
            host = network.host(rails, RATE)
            daemon = host.daemon(directory, place / "tls", log_level="warning")
            daemons.append(stack.enter_context(daemon))
        yield stack.enter_context(endpoints(daemons, SIZE * WINDOW))


def two_rails(options: Options, report: Report) -> None:
    """Measures what a second rail brings; both pairs of hosts take turns."""
    name = "32 MiB write over two rails of 1 Gbit/s, ratio to one"
    why = netns.missing()
    if why:
        report.skipped.append((name, why))
        return
    count = options.scaled(WRITES)
    with limited_pair(1) as one, limited_pair(2) as two:
        rates: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(max(3, options.turns // 3)):
            for rails, pair in ((1, one), (2, two)):
                rates[rails].append(flood_gbps(*pair, SIZE, WINDOW, count)[0])
    ratios = [b / a for a, b in zip(rates[1], rates[2], strict=True)]
    report.rows.append(
        Row(
            name,
            median(ratios),
            "x",
            ">=",
            TWO_RAILS,
            f"{median(rates[2]):.2f} of {median(rates[1]):.2f} Gbps; ratios {spread(ratios)}",
        )
    )
