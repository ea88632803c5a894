# SPDX-License-Identifier: Apache-2.0
"""The bars of GPU memory, topic by topic; on a machine with a GPU (tests/gpu/run)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.report import Report
from bench.topic import Run, measure_all

from support import gpu

if TYPE_CHECKING:
    from bench.options import Options

# name of the step: module of bench whose rows(run) measures it
TOPICS = {
    "copies between processes": "gpu_copies",
    "pages": "gpu_pages",
    "streams and kernels": "gpu_streams",
    "registering, and its end": "gpu_memory",
    "beside GEMMs": "gpu_gemms",
}
LATER = "staged GPU to GPU over tcp"


def measure(options: Options) -> Report:
    """Measures everything; a topic that fails is a bar that is missed, and the others are measured.

    Args:
        options: Of the command line.

    Returns:
        A row for each bar that this machine can tell about.
    """
    report = Report("gpu")
    report.skipped.append((LATER, "GPU memory is not staged through host memory"))
    if why := gpu.why_not():
        report.skipped += [(name, why) for name in TOPICS]
        return report
    measure_all(Run(options, report), TOPICS)
    return report
