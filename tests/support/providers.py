# SPDX-License-Identifier: Apache-2.0
"""What the conformance suite runs on: providers, each with a rail that this host has."""

from __future__ import annotations

import ctypes.util
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from support.tree import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

LOOPBACK = "127.0.0.1"
DEVICES = "/sys/class/infiniband"
EFAFACE = str(ROOT / "build" / "native" / "gcc" / "tests" / "efaface" / "libefaface.so")
SOFTVERBS = str(ROOT / "build" / "native" / "gcc" / "tests" / "libsoftverbs.so")


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

    def arguments(self) -> list[str]:
        """Gives those of the program `conformance`."""
        options = ["--fabric", self.fabric] if self.fabric else []
        options += ["--library", self.library] if self.library else []
        return [*options, self.provider, self.rail]

    def variables(self) -> dict[str, str]:
        """Gives the environment of processes that use it."""
        return {**os.environ, **self.environment}


def devices(sysfs: str = DEVICES) -> list[str]:
    """Names this host's RDMA devices."""
    return sorted(os.listdir(sysfs)) if os.path.isdir(sysfs) else []


def without_libfabric() -> str | None:
    """Tells why libfabric's provider cannot run here."""
    return None if ctypes.util.find_library("fabric") else "libfabric1 is not installed"


def without_devices() -> str | None:
    """Tells why `verbs` cannot run here."""
    return None if devices() else f"no RDMA device is in {DEVICES}"


PROVIDERS = (
    Provider("sim", "sim", "sim0"),
    Provider("sim-unordered", "sim", "sim0", fabric="ordered=0,delay_us=300"),
    Provider(
        "sim-narrow",
        "sim",
        "sim0",
        fabric="delay_us=300,again=20,parts=9,imm_depth=900,max_message=200000",
    ),
    Provider("local", "local", "local"),
    Provider("tcp", "tcp", LOOPBACK),
    Provider("libfabric", "libfabric", LOOPBACK, missing=without_libfabric),
    Provider(
        "efa-face",
        "libfabric",
        "rdmap16s27",
        library=EFAFACE,
        goals=("face",),
        missing=without_libfabric,
    ),
    Provider("verbs-double", "verbs", "soft0", library=SOFTVERBS, goals=("softverbs",)),
    Provider("verbs", "verbs", next(iter(devices()), ""), missing=without_devices),
)
