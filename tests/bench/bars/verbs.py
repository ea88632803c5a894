# SPDX-License-Identifier: Apache-2.0
"""The bars of verbs: its cost; a guest beside perftest; two hosts that lose packets and die."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.report import Report
from bench.stats import spread
from bench.topic import Run, measure_all

from vm import image
from vm.errors import Unavailable

if TYPE_CHECKING:
    from bench.options import Options

HERE = {"cost of posting": "verbs_cost"}
IN_GUESTS = {
    "one guest: writes, latency, queue pairs": "verbs_rates",
    "two guests: rails, loss, death": "verbs_hosts",
}


def measure(options: Options) -> Report:
    """Measures everything; a topic that fails is a bar that is missed, and the others are measured.

    Args:
        options: Of the command line.

    Returns:
        A row for each bar that this machine can tell about.
    """
    report = Report("verbs")
    run = Run(options, report)
    measure_all(run, HERE)
    if wanted := [*filter(options.wants, IN_GUESTS)]:
        try:
            image.ensure()
        except Unavailable as error:
            for name in wanted:
                run.skip(f"verbs: {name}", str(error))
        else:
            measure_all(run, IN_GUESTS)
    if loads := options.gate.loads:
        report.beside.append(("other work on this machine, cores", spread(loads)))
    return report
