# SPDX-License-Identifier: Apache-2.0
"""Other libraries that do the same over tcp, where they are installed: NIXL (UCX) and Mooncake."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from bench import build
from bench.stats import median

if TYPE_CHECKING:
    from collections.abc import Callable

VENV = build.OUT / "peers"
PYTHON = VENV / "bin" / "python"
PROGRAMS = build.BENCH / "peer_programs"
REQUIREMENTS = (
    "nixl==1.5.1",
    "nixl-cu12==1.5.1",
    "mooncake-transfer-engine-non-cuda==0.3.13",
    "numpy",
)
# name: (program, module that must import)
PEERS = {
    "Mooncake TE 0.3.13 tcp": ("mooncake_write.py", "mooncake.engine"),
    "NIXL 1.5.1 UCX tcp": ("nixl_write.py", "nixl._api"),
}
RUNS = 3
TIMEOUT_S = 120


def install() -> None:
    """Installs the peers into an environment of their own.

    Raises:
        subprocess.CalledProcessError: No network, or no such packages.
    """
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    pip = [str(PYTHON), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    # Their dependencies are gigabytes that a transfer of host memory does not need.
    subprocess.run([*pip, "--no-deps", *REQUIREMENTS], check=True)


def missing(module: str) -> str:
    """Tells why a peer cannot run; empty when it can."""
    if not PYTHON.exists():
        return "not installed (--install-peers)"
    tried = subprocess.run(
        [str(PYTHON), "-c", f"import {module}"], capture_output=True, text=True, check=False
    )
    return "" if tried.returncode == 0 else (tried.stderr.strip().splitlines() or ["?"])[-1]


def gbps(program: str, size: int, window: int, count: int) -> float:
    """Measures one peer once.

    Raises:
        RuntimeError: It failed.
    """
    command = [str(PYTHON), str(PROGRAMS / program), str(size), str(window), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it said nothing"])[-1])
    return float(json.loads(lines[-1])["gbps"])


def measure(size: int, window: int, count: int, say: Callable[[str], None]) -> dict[str, float]:
    """Measures all peers that are there; each at the better of one and ``window`` in flight.

    Args:
        size: Bytes of a write.
        window: Writes in flight.
        count: Number of writes.
        say: Told why a peer is left out.

    Returns:
        Gbps by name; medians.
    """
    found = {}
    for name, (program, module) in PEERS.items():
        why = missing(module)
        if why:
            say(f"{name}: {why}")
            continue
        try:
            found[name] = max(
                median([gbps(program, size, flying, count) for _ in range(RUNS)])
                for flying in (1, window)
            )
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            say(f"{name}: {error}")
    return found
