# SPDX-License-Identifier: Apache-2.0
"""The bars of GPU memory, topic by topic; on a machine with a GPU (tests/gpu/run)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.apart import measure_on_gpu
from bench.report import Report
from bench.topic import Run

if TYPE_CHECKING:
    from bench.options import Options

# name of the step: module of bench whose rows(run) measures it
TOPICS = {
    "copies between processes": "gpu_copies",
    "two GPUs": "gpu_peers",
    "pages": "gpu_pages",
    "registering, and its end": "gpu_memory",
    "beside GEMMs": "gpu_gemms",
    "streams and kernels": "gpu_streams",
    "staged": "gpu_staged",
}
BOUND_S = 75.0  # of each: a device that hangs is the end of one of them


def measure(options: Options) -> Report:
    """Measures everything; a topic that fails is a bar that is missed, and the others are measured.

    Args:
        options: Of the command line.

    Returns:
        A row for each bar that this machine can tell about.
    """
    report = Report("gpu")
    measure_on_gpu(Run(options, report), TOPICS, BOUND_S)
    return report
