# SPDX-License-Identifier: Apache-2.0
"""What the conformance suite runs on: providers, each with a rail that this host has."""

from __future__ import annotations

import ctypes.util
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from support.tree import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

LOOPBACK = "127.0.0.1"
DEVICES = "/sys/class/infiniband"
NATIVE = ROOT / "build" / "native" / "gcc"
# As deploy/quickstart unpacks it.
LIBFABRIC_2 = ROOT / "build" / "libfabric2" / "libfabric.so.1"
SOFTVERBS = str(NATIVE / "tests" / "libsoftverbs.so")
EFA_FACE = str(NATIVE / "tests" / "efaface" / "libefaface.so")
# What there is to run: cases of native/conformance, C programs of the core, and what clients do by
# two daemons (tests/conformance/test_operations.py), which runs as a whole.
CASES = re.findall(
    r"X\((\w+),", (ROOT / "native" / "conformance" / "cases.h").read_text().split("AS_PROTOTYPE")[0]
)
CORE = (
    "core_write",
    "core_operations",
    "core_count",
    "core_cycles",
    "core_mailbox",
    "armed_wake",
)
PROGRAMS = (*CORE, "canary")
OPERATIONS = "operations"


def nothing_is_missing() -> str | None:
    """Fits a provider that any host can run."""
    return None


@dataclass(frozen=True)
class Provider:
    """One way to run the suite."""

    name: str  # of the parameter of the tests
    provider: str  # as in the configuration
    rail: str
    fabric: str = ""
    library: str = ""
    missing: Callable[[], str | None] = nothing_is_missing  # why this host cannot run it
    environment: dict[str, str] = field(default_factory=dict)
    goals: tuple[str, ...] = ()  # of native/Makefile, that it needs
    device: bool = False  # memory is that of a GPU, which a thread copies in place of its helper
    # Of CASES, PROGRAMS and OPERATIONS those that are not run on it, and why: a case where it has
    # not what that is about, and says so itself.
    left_out: dict[str, str] = field(default_factory=dict)
    # Cases that only some of its devices have something for.
    may_skip: tuple[str, ...] = ()
    # Those that fail by its library's fault, and why.
    known: dict[str, str] = field(default_factory=dict)

    def arguments(self) -> list[str]:
        """Gives those of the program `conformance`."""
        options = ["--fabric", self.fabric] if self.fabric else []
        options += ["--library", self.library] if self.library else []
        options += ["--device"] if self.device else []
        return [*options, self.provider, self.rail]

    def variables(self) -> dict[str, str]:
        """Gives the environment of processes that use it."""
        return {**os.environ, **self.environment}


def configuration(provider: Provider) -> dict[str, Any]:
    """Gives the keys of a daemon's configuration that have it use it."""
    fabric = {"name": provider.fabric, "library": provider.library}
    chosen: dict[str, Any] = {"provider": provider.provider, "rails": [provider.rail]}
    if any(fabric.values()):
        chosen["fabric"] = {key: value for key, value in fabric.items() if value}
    return chosen


def devices(sysfs: str = DEVICES) -> list[str]:
    """Names this host's RDMA devices."""
    return sorted(os.listdir(sysfs)) if os.path.isdir(sysfs) else []


def without_libfabric() -> str | None:
    """Tells why libfabric's provider cannot run here."""
    return None if ctypes.util.find_library("fabric") else "libfabric1 is not installed"


def without_libfabric_2() -> str | None:
    """Tells why the newer libfabric cannot run here."""
    return None if LIBFABRIC_2.exists() else f"{LIBFABRIC_2} is missing: deploy/quickstart test"


def without_devices() -> str | None:
    """Tells why `verbs` cannot run here."""
    return None if devices() else f"no RDMA device is in {DEVICES}"


FIRST_DEVICE = next(iter(devices()), "")
RXM_CLOSES = (
    "libfabric 1.17 and 2.5: rxm crashes in fi_close of an endpoint over verbs that is being "
    "written to with immediates"
)
CLOSED_WHILE_WRITTEN_TO = (
    "close_incoming",
    "close_outgoing",
    "close_counts",
    "close_far_rail",
    "far_never_started",
    "canary",
)

# ---- what is left out ----

ANY_NAME = {"open_unknown": "any name is a rail of it"}
NO_WAIT_FD = dict.fromkeys(
    ("sleep_idle", "sleep_exchange"), "its rails have no wait fd: they are polled by time"
)
UNORDERED = dict.fromkeys(("imm_after_earlier", "close_counts"), "its rails are not ordered")
ONE_RAIL = dict.fromkeys(("close_far_rail", "sleep_exchange"), "both sides are one rail")
ONE_PART = {"write_parts": "a post of it has one part"}
NO_DMABUF = {"memory_dmabuf": "it takes no dma-buf: what it moves a processor of the host copies"}
ENDLESS = {"write_largest": "its largest message is larger than what is tried"}
ONE_PROCESS = {OPERATIONS: "it is a fabric inside of one process, and two daemons are two"}
SIMULATED = {
    **dict.fromkeys(CORE, "what is lost on it is a test's choice: native/tests/test_property.c"),
    **ONE_PROCESS,
    **ANY_NAME,
    **NO_WAIT_FD,
}
GROUPS_OWN = {OPERATIONS: "a daemon has it beside its rails, for GPU memory: tests/integration"}
# What its programs have is memory of the host, with or without a thread for that of a GPU.
ONCE = dict.fromkeys(PROGRAMS, "they run on staged-tcp")
# What is run on it all the same, and is no less.
DEFAULT = {
    **dict.fromkeys(PROGRAMS, "native/tests run on it where they are told of no other"),
    OPERATIONS: "daemons of tests run on it where they are told of no other: tests/integration",
}

PROVIDERS = (
    Provider(
        "sim",
        "sim",
        "sim0",
        left_out={
            **SIMULATED,
            **NO_DMABUF,
            **ONE_PART,
            **ENDLESS,
            "canary": "nothing is under way on it, which a fence could catch",
        },
    ),
    Provider(
        "sim-unordered",
        "sim",
        "sim0",
        fabric="ordered=0,delay_us=300",
        left_out={**SIMULATED, **NO_DMABUF, **ONE_PART, **ENDLESS, **UNORDERED},
    ),
    Provider(
        "sim-narrow",
        "sim",
        "sim0",
        fabric="delay_us=300,again=20,parts=9,imm_depth=900,max_message=200000",
        left_out={**SIMULATED, **NO_DMABUF},
    ),
    Provider(
        "local",
        "local",
        "local",
        left_out={
            **dict.fromkeys(CORE, "both ends are one domain group: native/tests/test_local*.c"),
            OPERATIONS: "both ends are clients of one daemon",
            **NO_DMABUF,
            **ANY_NAME,
            **ONE_RAIL,
        },
    ),
    Provider("tcp", "tcp", LOOPBACK, left_out={**DEFAULT, **NO_DMABUF, **ENDLESS}),
    Provider("staged-tcp", "staged", LOOPBACK, fabric="tcp", left_out={**NO_DMABUF, **GROUPS_OWN}),
    Provider(
        "staged-tcp-device",
        "staged",
        LOOPBACK,
        fabric="tcp",
        device=True,
        left_out={**NO_DMABUF, **GROUPS_OWN, **ONCE},
    ),
    Provider(
        "staged-verbs-device",
        "staged",
        "soft0",
        fabric="verbs",
        library=SOFTVERBS,
        goals=("softverbs",),
        device=True,
        left_out={**NO_DMABUF, **GROUPS_OWN, **ONCE},
    ),
    Provider(
        "staged-efa-device",
        "staged",
        "rdmap16s27",
        fabric="libfabric",
        library=EFA_FACE,
        missing=without_libfabric,
        goals=("face",),
        device=True,
        left_out={**NO_DMABUF, **GROUPS_OWN, **ONCE},
    ),
    Provider(
        "staged-sim-device",
        "staged",
        "sim0",
        fabric="sim:ordered=0,delay_us=100,again=20,imm_depth=4096",
        device=True,
        left_out={**NO_DMABUF, **SIMULATED, **ONCE},
    ),
    Provider(
        "staged-local-device",
        "staged",
        "local",
        fabric="local",
        device=True,
        left_out={**NO_DMABUF, **GROUPS_OWN, **ONCE, **ANY_NAME, **ONE_RAIL},
    ),
    Provider(
        "libfabric",
        "libfabric",
        LOOPBACK,
        missing=without_libfabric,
        left_out={**NO_DMABUF, **ONE_PART, **ENDLESS},
    ),
    Provider(
        "libfabric-2",
        "libfabric",
        LOOPBACK,
        library=str(LIBFABRIC_2),
        missing=without_libfabric_2,
        environment={"FI_PROVIDER_PATH": "/nonexistent"},  # what it has built in is enough
        left_out={**NO_DMABUF, **ONE_PART, **ENDLESS},
    ),
    Provider(
        "efa-face",
        "libfabric",
        "rdmap16s27",
        library=EFA_FACE,
        missing=without_libfabric,
        goals=("face",),
        left_out={**ONE_PART, **ENDLESS, **UNORDERED},
    ),
    Provider(
        "verbs-double",
        "verbs",
        "soft0",
        library=SOFTVERBS,
        goals=("softverbs",),
        left_out={**ENDLESS, **ONE_PROCESS},
    ),
    Provider(
        "verbs",
        "verbs",
        FIRST_DEVICE,
        missing=without_devices,
        may_skip=(*ENDLESS, *NO_DMABUF),  # soft-RoCE takes none
    ),
    Provider(
        "libfabric-verbs",
        "libfabric",
        FIRST_DEVICE,
        fabric="verbs;ofi_rxm",
        missing=lambda: without_libfabric() or without_devices(),
        left_out={**NO_DMABUF, **ONE_PART},
        may_skip=tuple(ENDLESS),
        known={
            **dict.fromkeys(CLOSED_WHILE_WRITTEN_TO, RXM_CLOSES),
            "close_joining": "libfabric 1.17: rxm over verbs crashes, too, while one is connected",
            "connect_many": "128 endpoints of rxm over verbs are more than 2 GiB of memory hold",
            **dict.fromkeys(("core_write", "core_operations"), RXM_CLOSES),
            "core_cycles": "hundreds of its connections take longer than the test may",
        },
    ),
)
