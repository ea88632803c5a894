# SPDX-License-Identifier: Apache-2.0
"""Real daemons as subprocesses."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import psutil
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from transferd.client.demo.daemons import free_port
from transferd.v1 import admin_pb2, admin_pb2_grpc

from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType

READY_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 20.0
LOOPBACK = "127.0.0.1"
# YAML: keys of every daemon's configuration that a test does not set itself.
CONFIG_ENV = "TRANSFERD_TEST_CONFIG"


def config_of_tests() -> dict[str, Any]:
    """Returns the keys that the environment gives every daemon."""
    keys: dict[str, Any] = yaml.safe_load(os.environ.get(CONFIG_ENV, "") or "{}")
    return keys


def provider_of_tests() -> str:
    """Names the provider that daemons of this run have where a test chooses none."""
    return str(config_of_tests().get("provider", "tcp"))


def keeps_writes_whole() -> bool:
    """Tells whether of two writes to one place one is the last, or each packet for itself."""
    return bool(config_of_tests().get("fabric", {}).get("name") != "efa")


class DaemonProcess:
    """A daemon of its own process, socket and ports.

    Attributes:
        directory: Holds its configuration, sockets and log.
        socket: Address of its gRPC socket, as the SDK takes it.
        peer_address: host:port that other daemons reach it at.
        http_address: host:port of metrics and health.
        prefix: What its command line begins with, as to run it elsewhere.
        environment: Variables that it has beside ours.
    """

    def __init__(self, directory: Path, overrides: Mapping[str, Any] | None = None) -> None:
        """Prepares a daemon; :meth:`start` starts it.

        Args:
            directory: An empty directory, with a short path: it holds sockets.
            overrides: Keys of the configuration file that replace the defaults; None removes one.
        """
        self.directory = directory
        self.socket = f"unix://{directory}/transferd.sock"
        self.peer_address = f"{LOOPBACK}:{free_port()}"
        self.http_address = f"{LOOPBACK}:{free_port()}"
        self.config_path = directory / "config.yaml"
        self.log_path = directory / "daemon.log"
        self.prefix: list[str] = []
        self.environment: dict[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None
        config: dict[str, Any] = {
            "listen": self.socket,
            "peer_listen": self.peer_address,
            "http_listen": self.http_address,
            "log_level": "debug",
        }
        config.update(config_of_tests())
        config.update(overrides or {})
        self.config = {key: value for key, value in config.items() if value is not None}

    @property
    def pid(self) -> int:
        """Process id of the running daemon."""
        assert self._process is not None, "the daemon was not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether its process lives."""
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """Returns what it has logged, over all restarts."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def arguments(self) -> list[str]:
        """Writes its configuration; tells what the interpreter is given."""
        self.config_path.write_text(yaml.safe_dump(self.config))
        return ["-m", "transferd.daemon.main", "serve", "--config", str(self.config_path)]

    def spawn(self) -> subprocess.Popen[bytes]:
        """Starts the process and does not wait until it is ready."""
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*self.prefix, sys.executable, *self.arguments()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                env={**os.environ, "PYTHONSAFEPATH": "1", **self.environment},
            )
        return self._process

    def start(self, timeout_s: float = READY_TIMEOUT_S) -> DaemonProcess:
        """Starts it and waits until it serves.

        Args:
            timeout_s: Longest wait.

        Returns:
            Itself.

        Raises:
            RuntimeError: It ended or was not ready in time; the text has its log.
        """
        process = self.spawn()
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"the daemon ended: {process.returncode}\n{self.log()}")
            if self._ready():
                return self
            # Polled, because the socket does not exist before the daemon has made it.
            time.sleep(0.02)
        self.kill()
        raise RuntimeError(f"the daemon was not ready within {timeout_s} s\n{self.log()}")

    def _ready(self) -> bool:
        path = self.socket.removeprefix("unix://")
        if not Path(path).exists():
            return False
        try:
            with self.channel() as channel:
                request = health_pb2.HealthCheckRequest(service="")
                reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=2)  # type: ignore[attr-defined]
                if reply.status != health_pb2.HealthCheckResponse.SERVING:
                    return False
            self.status()
        except grpc.RpcError:
            return False
        return True

    @contextlib.contextmanager
    def channel(self) -> Iterator[grpc.Channel]:
        """Opens a gRPC channel to its socket; nothing else shares its connection."""
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(self.socket, options=options) as channel:
            yield channel

    def status(self) -> admin_pb2.GetStatusResponse:
        """Asks it for its status."""
        with self.channel() as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            reply: admin_pb2.GetStatusResponse = stub.GetStatus(
                admin_pb2.GetStatusRequest(), timeout=5
            )
        return reply

    def rails(self) -> list[admin_pb2.RailInfo]:
        """Asks it for its rails."""
        with self.channel() as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            reply: admin_pb2.ListRailsResponse = stub.ListRails(
                admin_pb2.ListRailsRequest(), timeout=5
            )
        return list(reply.rails)

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Stops it with SIGTERM.

        Args:
            timeout_s: Longest wait; it is killed after that.

        Returns:
            Its exit status.

        Raises:
            RuntimeError: It did not stop in time.
        """
        assert self._process is not None, "the daemon was not started"
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGABRT)  # faulthandler prints where it hangs
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(2)
            self.kill()
            raise RuntimeError(f"the daemon did not stop in {timeout_s} s\n{self.log()}") from None

    def kill(self) -> None:
        """Kills it with SIGKILL, as a crash would, and reaps it."""
        assert self._process is not None, "the daemon was not started"
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def restart(self) -> DaemonProcess:
        """Starts it again at the same addresses; stops it first if it runs."""
        if self.running:
            assert self.stop() == 0, self.log()
        return self.start()

    def children(self) -> list[psutil.Process]:
        """Lists the processes that it has started and that live."""
        with contextlib.suppress(psutil.NoSuchProcess):
            found: list[psutil.Process] = psutil.Process(self.pid).children(recursive=True)
            return found
        return []

    def __enter__(self) -> DaemonProcess:
        """Starts it unless it runs."""
        return self if self.running else self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops it if it runs, and checks that it ended well and left nothing behind."""
        if not self.running:
            return
        children = self.children()
        status = self.stop()
        if error is not None:
            return  # what the test found comes first
        assert status == 0, f"the daemon ended with {status}\n{self.log()}"
        left = [child for child in children if child.is_running()]
        assert not left, f"the daemon left processes behind: {left}"
        assert not Path(self.socket.removeprefix("unix://")).exists(), "it left its socket behind"


def _stands_still(pid: int) -> bool:
    """Tells whether each thread of a process is stopped (state T in its stat, after its name)."""
    stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


@contextlib.contextmanager
def stopped(daemon: DaemonProcess) -> Iterator[None]:
    """Stops a daemon's process with SIGSTOP; the block begins once all threads stand still."""
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        eventually(lambda: _stands_still(daemon.pid), "all threads of the daemon stand still")
        yield
    finally:
        os.kill(daemon.pid, signal.SIGCONT)


def shared_memory_names() -> set[str]:
    """Lists the POSIX shared memory objects that are ours by name."""
    return {path.name for path in Path("/dev/shm").glob("*transferd*")}
