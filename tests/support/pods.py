# SPDX-License-Identifier: Apache-2.0
"""Processes in namespaces of their own, as pods are that share nothing but the daemon's socket."""

from __future__ import annotations

import functools
import shutil
import subprocess

import pytest

from support.daemon import DaemonProcess
from support.tree import ROOT

# Users, System V and POSIX IPC, processes, and mounts, with shared memory of their own.
PREFIX = (
    "unshare", "--user", "--map-root-user", "--ipc", "--pid", "--fork", "--kill-child", "--mount",
    "--mount-proc", "sh", "-c", 'mount -t tmpfs none /dev/shm && exec "$@"', "--",
)  # fmt: skip


@functools.cache
def why_not() -> str:
    """Why this host makes no such namespaces; empty: it does."""
    if shutil.which("unshare") is None:
        return "unshare (util-linux) is not installed"
    try:
        tried = subprocess.run([*PREFIX, "true"], check=False, capture_output=True, timeout=20)
    except subprocess.TimeoutExpired:
        return "unshare does not come to an end here"
    if tried.returncode:
        return f"this host makes no namespaces: {tried.stderr.decode(errors='replace').strip()}"
    return ""


def prefix() -> tuple[str, ...]:
    """What a command line begins with, to run as a pod; skips the test where there are none."""
    why = why_not()
    if why:
        pytest.skip(why)
    return PREFIX


class PodsDaemon(DaemonProcess):
    """The daemon of :mod:`support.pods_daemon`."""

    def arguments(self) -> list[str]:
        self.environment["PYTHONPATH"] = str(ROOT / "tests")
        return ["-m", "support.pods_daemon", *super().arguments()[2:]]
