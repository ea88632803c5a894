# SPDX-License-Identifier: Apache-2.0
"""Other libraries that do the same, where they are installed: NIXL (UCX) and Mooncake."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any, Self

from bench import build
from bench.random_pages import Shape
from bench.stats import median

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

VENV = build.OUT / "peers"
PYTHON = VENV / "bin" / "python"
REQUIREMENTS = (
    "nixl==1.5.1",
    "nixl-cu12==1.5.1",
    "mooncake-transfer-engine-non-cuda==0.3.13",
    "numpy",
)
MODULES = {"nixl_write": "nixl._api", "mooncake_write": "mooncake.engine"}
NIXL_TCP, NIXL_SHM, NIXL_CMA = (
    f"NIXL 1.5.1 UCX {transport}" for transport in ("tcp", "shm", "cma")
)
MOONCAKE_TCP = "Mooncake TE 0.3.13 tcp"
TCP = (MOONCAKE_TCP, NIXL_TCP)
# name: ways to run it, of which the better counts: NIXL's sender with a thread that makes
# progress, as by default, and without
PEERS: dict[str, Sequence[tuple[str, ...]]] = {
    MOONCAKE_TCP: [("mooncake_write",)],
    NIXL_TCP: [("nixl_write", "tcp", "thread"), ("nixl_write", "tcp")],
    NIXL_SHM: [("nixl_write", "shm", "thread"), ("nixl_write", "shm")],
    NIXL_CMA: [("nixl_write", "cma", "thread"), ("nixl_write", "cma")],
}
RUNS = 3
ANSWER_S, END_S = 60, 20


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


def missing(name: str) -> str:
    """Tells why a peer cannot run; empty when it can."""
    if not PYTHON.exists():
        return "not installed (--install-peers)"
    module = MODULES[PEERS[name][0][0]]
    tried = subprocess.run(
        [str(PYTHON), "-c", f"import {module}"], capture_output=True, text=True, check=False
    )
    return "" if tried.returncode == 0 else (tried.stderr.strip().splitlines() or ["?"])[-1]


class Peer:
    """A pair of processes that write over one connection; stopped while they have nothing to do.

    Their threads poll for ever, and would take the cores from what is measured beside them.
    """

    def __init__(self, length: int, program: str, *arguments: str) -> None:
        tests = str(build.BENCH.parent)
        self._process = subprocess.Popen(
            [str(PYTHON), "-m", f"bench.peer_programs.{program}", str(length), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": tests, "PYTHONSAFEPATH": "1"},
            start_new_session=True,  # a group that is stopped as one
        )
        try:
            self._answer()
        except RuntimeError:
            self._end()
            raise
        self._signal(signal.SIGSTOP)

    def gbps(self, shape: Shape, window: int, jobs: int) -> float:
        """Measures once.

        Raises:
            RuntimeError: It failed.
        """
        load = {
            "page": shape.page,
            "pages": shape.pages,
            "set_bytes": shape.set_bytes,
            "window": window,
            "jobs": jobs,
        }
        self._signal(signal.SIGCONT)
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(load) + "\n")
            self._process.stdin.flush()
            answer = self._answer()
        except BrokenPipeError:
            raise RuntimeError("it ended") from None
        finally:
            self._signal(signal.SIGSTOP)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return float(answer["gbps"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        patience = threading.Timer(ANSWER_S, self._signal, (signal.SIGKILL,))
        patience.start()
        try:
            for line in self._process.stdout:
                if line.startswith("{"):
                    answer: dict[str, Any] = json.loads(line)
                    return answer
        finally:
            patience.cancel()
        raise RuntimeError(f"it ended, or did not answer within {ANSWER_S} s")

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _end(self) -> None:
        self._signal(signal.SIGCONT)
        try:
            self._process.communicate(timeout=END_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.communicate()
        self._signal(signal.SIGKILL)  # the receiving process, where the other died before it

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()


@contextlib.contextmanager
def started(
    names: Sequence[str], length: int, say: Callable[[str], None]
) -> Iterator[dict[str, list[Peer]]]:
    """Runs peers.

    Args:
        names: Which.
        length: Bytes of memory of each side.
        say: Told why a peer is left out.

    Yields:
        Those that are there, by name; each in all ways to run it.
    """
    with contextlib.ExitStack() as stack:
        running = {}
        for name in names:
            if why := missing(name):
                say(f"{name}: {why}")
                continue
            try:
                running[name] = [stack.enter_context(Peer(length, *way)) for way in PEERS[name]]
            except RuntimeError as error:
                say(f"{name}: {error}")
        yield running


def best_gbps(ways: Sequence[Peer], shape: Shape, windows: Sequence[int], jobs: int) -> float:
    """Measures a peer at the best of its ways and of some numbers of jobs in flight.

    Raises:
        RuntimeError: It failed.
    """
    return max(
        median([way.gbps(shape, window, jobs) for _ in range(RUNS)])
        for way in ways
        for window in windows
    )


def measure(size: int, window: int, count: int, say: Callable[[str], None]) -> dict[str, float]:
    """Measures all peers over tcp that are there, at the better of one and ``window`` in flight.

    Args:
        size: Bytes of a write.
        window: Writes in flight.
        count: Number of writes.
        say: Told why a peer is left out.

    Returns:
        Gbps by name; medians.
    """
    shape = Shape(size, 1, size * window)
    found = {}
    with started(TCP, shape.set_bytes, say) as running:
        for name, ways in running.items():
            try:
                found[name] = best_gbps(ways, shape, (1, window), count)
            except RuntimeError as error:
                say(f"{name}: {error}")
    return found
