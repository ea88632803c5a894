# SPDX-License-Identifier: Apache-2.0
"""What a benchmark ran on: the host, and its daemon."""

from __future__ import annotations

import os
import platform

from pydantic import BaseModel, ConfigDict

import transferd
from transferd.client import errors
from transferd.client.rpc import Control
from transferd.v1 import admin_pb2

CALL_S = 5.0
WORDS_MAX = 300  # of a warning that is passed on


class Plain(BaseModel):
    """What all parts of the report have: no unknown fields, no changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Rail(Plain):
    """A NIC that is up."""

    name: str
    provider: str
    speed_mbit_per_s: int


class Daemon(Plain):
    """A daemon.

    Attributes:
        boot_epoch: Names its run; the same at both ends: they share one daemon.
    """

    version: str
    provider: str
    peer_address: str
    boot_epoch: str
    tls: bool
    rails: list[Rail]
    warnings: list[str]


class Machine(Plain):
    """A host.

    Attributes:
        daemon: None where its admin service is elsewhere, or refuses.
    """

    host: str
    kernel: str
    cpu: str
    cpus: int
    memory_bytes: int
    python: str
    transferd: str
    daemon: Daemon | None


def machine(address: str) -> Machine:
    """Looks at this host and its daemon."""
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGESIZE")
    return Machine(
        host=platform.node(),
        kernel=platform.release(),
        cpu=_cpu(),
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=pages * page,
        python=platform.python_version(),
        transferd=transferd.__version__,
        daemon=_daemon(address),
    )


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith(("model name", "Model")):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def _daemon(address: str) -> Daemon | None:
    control = Control(address, CALL_S)
    try:
        status = control.call(control.admin.GetStatus, admin_pb2.GetStatusRequest())
        rails = control.call(control.admin.ListRails, admin_pb2.ListRailsRequest()).rails
    except errors.TransferdError:
        return None  # the sessions that come next say whether a daemon answers at all
    finally:
        control.close()
    return Daemon(
        version=status.version,
        provider=status.provider,
        peer_address=status.peer_address,
        boot_epoch=status.boot_epoch.hex(),
        tls=status.tls,
        rails=[
            Rail(name=r.name, provider=r.provider, speed_mbit_per_s=r.speed_mbit_per_s)
            for r in rails
            if r.state == "UP" and r.name != "local"
        ],
        warnings=[warning[:WORDS_MAX] for warning in status.warnings],
    )
