# SPDX-License-Identifier: Apache-2.0
"""Daemons whose GPUs are none, and clients with memory of those: what is staged between them."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from transferd.client.cuda import driver as drivers
from transferd.v1 import admin_pb2, admin_pb2_grpc

from support.daemon import DaemonProcess
from support.softcuda import Faults, SoftCuda, library
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator


def gpu_config(path: str = "") -> dict[str, Any]:
    """Configuration of a daemon that stages by the double of libcuda, or another library."""
    return {"staging": "on", "library": path or library()}


def faults_of(daemon: DaemonProcess) -> Faults:
    """What the helpers of a daemon shall meet; made before it is started."""
    directory = daemon.directory / "faults"
    directory.mkdir(exist_ok=True)
    return Faults(directory)


@contextlib.contextmanager
def staged_pair(
    gpu: dict[str, Any] | None = None, **overrides: Any
) -> Iterator[tuple[DaemonProcess, DaemonProcess]]:
    """Runs two daemons that stage, on GPUs that are none if `gpu` is left out."""
    base = Path(tempfile.mkdtemp(prefix="tfd-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, base, ignore_errors=True)
        made = []
        for name in "ab":
            (base / name).mkdir()
            made.append(DaemonProcess(base / name, {"gpu": gpu or gpu_config(), **overrides}))
            made[-1].environment |= faults_of(made[-1]).environment
            stack.enter_context(made[-1].start())
        yield made[0], made[1]


@contextlib.contextmanager
def soft_driver() -> Iterator[SoftCuda]:
    """Has the SDK in this process, and in those that it starts, open the double."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(drivers.LIBRARY_VARIABLE, library())
        patch.setattr(drivers, "_loaded", [])
        yield SoftCuda()


def gpus(daemon: DaemonProcess) -> list[admin_pb2.GpuInfo]:
    """What a daemon has to do with GPUs."""
    with daemon.channel() as channel:
        stub: Any = admin_pb2_grpc.AdminServiceStub(channel)
        return list(stub.ListGpus(admin_pb2.ListGpusRequest(), timeout=10).gpus)


def helper_pid(daemon: DaemonProcess) -> int:
    """Process of its one helper, once that can copy."""
    return eventually(lambda: next((g.pid for g in gpus(daemon) if g.state == "READY"), 0), "ready")
