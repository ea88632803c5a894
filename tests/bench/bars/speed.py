# SPDX-License-Identifier: Apache-2.0
"""The bars of small things, of many at once, and of memory that triggers, topic by topic."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from bench.bars import main
from bench.quiet import Gate
from bench.report import Report, Row
from bench.stats import spread
from bench.topic import Run, measure_all

if TYPE_CHECKING:
    from bench.options import Options

# name of the step: module of bench whose rows(run) measures it
TOPICS = {
    "pages over tcp": "pages",
    "submitting": "submission",
    "worker": "worker_cost",
    "armed jobs": "armed",
    "peers beside us": "peer_table",
    "same daemon": "local_path",
    "many at once": "fairness",
}
MAIN = "main-job bars"


def measure(options: Options) -> Report:
    """Measures everything; a topic that fails is a bar that is missed, and the others are measured.

    Args:
        options: Of the command line.

    Returns:
        A row for each bar that this machine can tell about.
    """
    report = Report("speed")
    measure_all(Run(options, report), TOPICS)
    if options.wants(MAIN):
        main_job(options, report)
    if loads := options.gate.loads:
        report.beside.append(("other work on this machine, cores", spread(loads)))
    return report


def main_job(options: Options, report: Report) -> None:
    """Runs all steps of ``main``, as they are there."""
    found = main.measure(replace(options, only=(), gate=Gate()))
    missed = [row.bar for row in found.rows if not row.ok]
    report.rows.append(
        Row(
            "main-job bars that still hold",
            len(found.rows) - len(missed),
            "",
            ">=",
            len(found.rows),
            f"missed: {'; '.join(missed)}" if missed else "each row follows",
        )
    )
    report.rows += found.rows
    report.skipped += found.skipped
    report.beside += found.beside
