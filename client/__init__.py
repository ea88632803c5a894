# SPDX-License-Identifier: Apache-2.0
"""The SDK of transferd. ``import transferd`` offers the same names."""

from transferd.client.client import Client
from transferd.client.counter import Counter
from transferd.client.errors import (
    AccessDenied,
    Conflict,
    CounterFault,
    FencesFailed,
    Internal,
    InvalidRequest,
    JobFailed,
    NotFound,
    PeerLost,
    QuotaExceeded,
    StaleDescriptor,
    TransferdError,
    Unavailable,
    WaitTimeout,
)
from transferd.client.grant import Grant
from transferd.client.job import Imm, Job, Write
from transferd.client.mailbox import Mailbox, Send
from transferd.client.memory import Region, RegionSlice
from transferd.client.operations import Barrier, PeerGroup, Read, Scatter, WritePages
from transferd.client.plan import Plan
from transferd.client.session import CounterView, JobPath, JobResult
from transferd.client.watcher import Armed, Watcher
from transferd.native.names import JobStatus

__all__ = [
    "AccessDenied",
    "Armed",
    "Barrier",
    "Client",
    "Conflict",
    "Counter",
    "CounterFault",
    "CounterView",
    "FencesFailed",
    "Grant",
    "Imm",
    "Internal",
    "InvalidRequest",
    "Job",
    "JobFailed",
    "JobPath",
    "JobResult",
    "JobStatus",
    "Mailbox",
    "NotFound",
    "PeerGroup",
    "PeerLost",
    "Plan",
    "QuotaExceeded",
    "Read",
    "Region",
    "RegionSlice",
    "Scatter",
    "Send",
    "StaleDescriptor",
    "TransferdError",
    "Unavailable",
    "WaitTimeout",
    "Watcher",
    "Write",
    "WritePages",
]
