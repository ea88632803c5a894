# SPDX-License-Identifier: Apache-2.0
"""The bars of transferd.kv, topic by topic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.apart import measure_on_gpu
from bench.report import Report
from bench.stats import spread
from bench.topic import Run, measure_all

if TYPE_CHECKING:
    from bench.options import Options

# name of the step: module of bench whose rows(run) measures it
TOPICS = {
    "kvbench shapes": "kv_rates",
    "prefillers killed": "kv_killed",
    "aborts in mid-transfer": "kv_aborts",
    "aborts of one of many": "kv_answers",
    "new prefillers": "kv_joins",
    "many requests": "kv_memory",
    "vllm engines": "kv_vllm",
}
GPU_TOPICS = {"steps on a GPU": "kv_gpu"}
GPU_BOUND_S = 140.0  # a device that hangs is the end of it alone


def measure(options: Options) -> Report:
    """Measures everything; a topic that fails is a bar that is missed, and the others are measured.

    Args:
        options: Of the command line.

    Returns:
        A row for each bar that this machine can tell about.
    """
    report = Report("kv")
    run = Run(options, report)
    measure_all(run, TOPICS)
    measure_on_gpu(run, GPU_TOPICS, GPU_BOUND_S)
    if loads := options.gate.loads:
        report.beside.append(("other work on this machine, cores", spread(loads)))
    return report
