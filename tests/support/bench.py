# SPDX-License-Identifier: Apache-2.0
"""Both ends of ``transferctl bench``, as people run them, and a target within a test."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

from transferd.client.ctl.bench.target import Target
from transferd.v1 import admin_pb2, admin_pb2_grpc

from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from support.daemon import DaemonProcess

COMMAND = (sys.executable, "-m", "transferd.client.ctl.main", "bench")
MEMORY = 128 << 20
END_S = 60.0


def start(
    *arguments: str,
    log: Path,
    environment: Mapping[str, str] | None = None,
    at: DaemonProcess | None = None,
) -> subprocess.Popen[bytes]:
    """Starts a command whose output goes to a file; Ctrl-C works as from a terminal.

    Args:
        arguments: Of the command.
        log: The file.
        environment: What differs from the test's.
        at: Whose daemon, and whose host, it is on; None: what the arguments say.
    """
    where = () if at is None else ("--socket", at.socket)
    prefix = [] if at is None else at.prefix
    with log.open("wb") as file:
        return subprocess.Popen(
            [*prefix, *COMMAND, *arguments, *where],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, "PYTHONSAFEPATH": "1", **(environment or {})},
            process_group=0,
        )


def bench(
    *arguments: str, log: Path, status: int = 0, environment: Mapping[str, str] | None = None
) -> str:
    """Runs a command to its end; checks its status, returns what it said."""
    process = start(*arguments, log=log, environment=environment)
    try:
        ended = process.wait(END_S)
    finally:
        process.kill()
        process.wait()
    told = log.read_text()
    assert ended == status, told
    assert "Traceback" not in told, told
    return told


@contextlib.contextmanager
def serving(
    daemon: DaemonProcess, log: Path, *arguments: str
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Runs ``--serve``; gives its process and the HOST:PORT that it prints."""
    listen = ("--listen", "127.0.0.1:0")
    process = start("--serve", "--socket", daemon.socket, *listen, *arguments, log=log)
    try:
        found = eventually(
            lambda: re.search(r"--to (127\.0\.0\.1:\d+)\n", log.read_text()), "the address"
        )
        assert found is not None
        yield process, found[1]
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(END_S)
        finally:
            process.kill()


@contextlib.contextmanager
def target(daemon: DaemonProcess, memory: int = MEMORY) -> Iterator[Target]:
    """Runs a target in a thread of the test."""
    with Target(daemon.socket, memory) as made:
        thread = threading.Thread(target=made.serve)
        thread.start()
        try:
            yield made
        finally:
            made.stop()
            thread.join(END_S)
            assert not thread.is_alive()


def sessions(daemon: DaemonProcess) -> list[admin_pb2.SessionInfo]:
    """Lists the sessions of a daemon."""
    with daemon.channel() as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        return list(stub.ListSessions(admin_pb2.ListSessionsRequest(), timeout=5).sessions)


def quiet(*daemons: DaemonProcess) -> None:
    """Waits until daemons hold nothing any more."""
    for daemon in daemons:
        eventually(lambda d=daemon: not sessions(d), "no session")  # type: ignore[misc]
        status = daemon.status()
        assert (status.regions, status.registered_bytes) == (0, 0)


def wait_for_bytes(daemon: DaemonProcess, least: int) -> None:
    """Waits until an initiator at a daemon has sent so much in one session."""
    eventually(
        lambda: any(
            session.bytes_sent >= least and session.name.startswith("bench initiator")
            for session in sessions(daemon)
        ),
        f"{least} bytes are sent",
    )
