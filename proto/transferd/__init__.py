# SPDX-License-Identifier: Apache-2.0
"""transferd: moves memory between processes, also on different hosts, with one-sided writes.

The package's root lies in ``proto/``, because its folder must carry the name of the protobuf
package; ``transferd.client`` is ``client/``, and so on (``README.md``, ``pyproject.toml``). The
names below are imported from :mod:`transferd.client` when they are first used, so that the daemon
never loads the SDK.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transferd.client import (
        AccessDenied,
        Armed,
        Barrier,
        Client,
        Conflict,
        Counter,
        CounterFault,
        CounterView,
        FencesFailed,
        Grant,
        Imm,
        Internal,
        InvalidRequest,
        Job,
        JobFailed,
        JobPath,
        JobResult,
        JobStatus,
        Mailbox,
        NotFound,
        PeerGroup,
        PeerLost,
        Plan,
        QuotaExceeded,
        Read,
        Region,
        RegionSlice,
        Scatter,
        Send,
        StaleDescriptor,
        TransferdError,
        Unavailable,
        WaitTimeout,
        Watcher,
        Write,
        WritePages,
    )

__version__ = "0.1.0"

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
    "__version__",
]


def __getattr__(name: str) -> object:
    """Imports a name of the SDK on its first use (PEP 562)."""
    if name == "aio":
        return importlib.import_module("transferd.aio")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("transferd.client"), name)


def __dir__() -> list[str]:
    """Lists the public names, imported or not."""
    return sorted([*__all__, "aio"])
