# SPDX-License-Identifier: Apache-2.0
"""Daemons for the demo: processes on temporary sockets and free loopback ports."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from transferd.client import errors
from transferd.client.rpc import Control

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType
    from typing import Self

LOOPBACK = "127.0.0.1"
READY_S = 30.0
STOP_S = 15.0
POLL_S = 0.05
PORTS = range(10_000, 32_768)
PORT_TRIES = 100


def free_port() -> int:
    """Finds a port that is free for TCP and UDP: daemons use one number for both.

    It is none of those that the kernel hands out itself (`ip_local_port_range`, from 32768): such a
    one could be taken by any connection before the daemon listens on it.
    """
    for port in random.SystemRandom().sample(PORTS, PORT_TRIES):
        with (
            socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
            contextlib.suppress(OSError),
        ):
            tcp.bind((LOOPBACK, port))
            udp.bind((LOOPBACK, port))
            return port
    raise errors.Unavailable(f"no port of {LOOPBACK} is free for both TCP and UDP")


class DemoDaemon:
    """One daemon; a context manager that stops it.

    Attributes:
        address: For clients.
        pid: Of its process.
    """

    def __init__(self, folder: Path, process_group: int | None = None) -> None:
        """Starts it; :meth:`wait_ready` waits for it.

        Args:
            folder: Exists and is empty; its path is short, as it holds sockets.
            process_group: That it joins; 0: one of its own; None: the caller's, so that Ctrl-C
                reaches it, too.
        """
        self.address = f"unix://{folder}/transferd.sock"
        self._log = folder / "log"
        config = folder / "config.yaml"
        # JSON is YAML, too.
        config.write_text(
            json.dumps({"listen": self.address, "peer_listen": f"{LOOPBACK}:{free_port()}"})
        )
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "transferd.daemon.main", "serve", "--config", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=folder,
                env={**os.environ, "PYTHONSAFEPATH": "1"},
                process_group=process_group,
            )
        self.pid = self._process.pid

    def wait_ready(self) -> None:
        """Waits until it serves.

        Raises:
            Unavailable: It ended, or took too long; with the last of its log.
        """
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise errors.Unavailable(f"a daemon ended at its start:\n{self._tail()}")
            if self._serving():
                return
            time.sleep(POLL_S)
        raise errors.Unavailable(f"a daemon did not serve within {READY_S:g} s:\n{self._tail()}")

    def _serving(self) -> bool:
        if not os.path.exists(self.address.removeprefix("unix://")):
            return False
        control = Control(self.address, POLL_S * 20)
        try:
            stub: Any = health_pb2_grpc.HealthStub(control.channel)
            reply = control.call(stub.Check, health_pb2.HealthCheckRequest())
        except errors.TransferdError:
            return False
        finally:
            control.close()
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-10:])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
