# SPDX-License-Identifier: Apache-2.0
"""How long gRPC calls take."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import transferd
from bench.stats import median
from transferd.v1 import transfer_pb2, types_pb2

if TYPE_CHECKING:
    from support.daemon import DaemonProcess

BATCH = 1000
JOB_BYTES = 4096
WAIT_MS = 30_000
WARM_UP = 20


@dataclass(frozen=True, slots=True)
class SubmitTimes:
    """Medians in milliseconds: of one job, and of one call of 1,000; the second also p-max."""

    one_ms: float
    batch_ms: float
    one_worst_ms: float
    batch_worst_ms: float


def submit_times(
    sender: DaemonProcess, receiver: DaemonProcess, ones: int, batches: int
) -> SubmitTimes:
    """Times TransferService.Submit from the call to its answer; jobs write between two daemons.

    Args:
        sender: Daemon that is called.
        receiver: Daemon that they write to.
        ones: Number of calls of one job.
        batches: Number of calls of 1,000.

    Raises:
        transferd.TransferdError: A call failed.
        RuntimeError: A job did not end OK.
    """
    with transferd.Client(receiver.socket) as far, transferd.Client(sender.socket) as client:
        descriptor = far.alloc(JOB_BYTES).grant(imms=range(1)).descriptor
        region = client.alloc(JOB_BYTES)
        client.warm(descriptor)
        job = transfer_pb2.Job(
            write=transfer_pb2.WriteJob(
                src_region=region.open_handle(), dst=descriptor, length_bytes=JOB_BYTES, imm=0
            )
        )
        control = client._session.control

        def timed(jobs: int) -> float:
            request = transfer_pb2.SubmitRequest(jobs=[job] * jobs)
            begin = time.perf_counter()
            ids = control.call(control.transfers.Submit, request).job_ids
            took = time.perf_counter() - begin
            wait = transfer_pb2.WaitJobsRequest(job_ids=ids, timeout_ms=WAIT_MS)
            ends = control.call(control.transfers.WaitJobs, wait).jobs
            if any(end.status != types_pb2.JOB_STATUS_OK for end in ends):
                raise RuntimeError("a job submitted over gRPC did not end OK")
            return took * 1e3

        for _ in range(WARM_UP):
            timed(1)
        timed(BATCH)
        one = [timed(1) for _ in range(ones)]
        batch = [timed(BATCH) for _ in range(batches)]
    return SubmitTimes(median(one), median(batch), max(one), max(batch))
