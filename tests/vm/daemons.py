# SPDX-License-Identifier: Apache-2.0
"""Daemons in guests: as on two hosts, each with its certificate and on its own RDMA devices."""

from __future__ import annotations

import shutil
import signal
import sys
from typing import TYPE_CHECKING, Any

import yaml

from transferd.daemon import certs

from vm.errors import VmError
from vm.guest import SHARE
from vm.pair import ROLES, address

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from vm.guest import Guest, Process
    from vm.pair import Pair

PEER_PORT = 7471
HTTP_PORTS = 2000  # above those for peers
# Bounds; alone a daemon starts in 20 s, because imports are slow in an emulated machine.
READY_S = 240.0
STOP_S = 60.0
# Asks every half second, and starts no program for it: that would take the daemon's time.
READY = """
ready() {
    exec 3<>/dev/tcp/127.0.0.1/$PORT || return
    printf 'GET /readyz HTTP/1.0\\r\\n\\r\\n' >&3
    read -r _ status _ <&3 && [[ $status == 200 ]]
}
exec 4<> <(:)
until (ready) 2>/dev/null; do read -rt 0.5 -u 4; done
"""


class GuestDaemon:
    """A daemon of a guest.

    Attributes:
        guest: Where it runs.
        name: What its files and those of its clients are named after.
        socket: Address of its gRPC socket, as the SDK takes it in that guest.
        config: Its configuration; what is changed counts from the next start.
    """

    def __init__(
        self,
        guest: Guest,
        overrides: Mapping[str, Any] | None = None,
        *,
        tls: Path | None = None,
        name: str = "transferd",
        port: int = PEER_PORT,
    ) -> None:
        """Prepares a daemon; :meth:`start` starts it.

        Args:
            guest: Where; on the cards of a pair's guest it listens and opens rails by default.
            overrides: Keys of the configuration file that replace ours; None removes one.
            tls: A folder of the host for the certificates of all daemons of a pair; None: no TLS.
            name: Of its own in that guest. The default is where clients look by default.
            port: For other daemons; of its own in that guest.
        """
        role = guest.machine.role
        self.guest = guest
        self.name = name
        self.socket = f"unix:///run/{name}/transferd.sock"
        self._http_port = port + HTTP_PORTS
        config: dict[str, Any] = {
            "listen": self.socket,
            "peer_listen": f"{address(role)}:{port}",
            "http_listen": f"127.0.0.1:{self._http_port}",
            "provider": "verbs",
            "rails": [f"rxe{number}" for number in range(len(guest.machine.nics))],
            "tls": None if tls is None else self._certificates(tls),
            **(overrides or {}),
        }
        self.config = {key: value for key, value in config.items() if value is not None}
        self._process: Process | None = None

    def _certificates(self, tls: Path) -> dict[str, str]:
        """Gives the guest its certificate, made once for each name."""
        name = self.guest.name
        files = [tls / f"{name}.crt", tls / f"{name}.key", tls / "ca.crt"]
        if not files[0].exists():
            nics = range(len(self.guest.machine.nics))
            addresses = [address(self.guest.machine.role, nic) for nic in nics]
            certs.make(tls, name, [name, *addresses])
        folder = self.guest.share / "tls"
        folder.mkdir(exist_ok=True)
        for file in files:
            shutil.copy(file, folder)
        keys = ("cert", "key", "ca")
        return {key: f"{SHARE}/tls/{file.name}" for key, file in zip(keys, files, strict=True)}

    @property
    def process(self) -> Process:
        """Its process."""
        assert self._process is not None, "the daemon was not started"
        return self._process

    @property
    def running(self) -> bool:
        """Whether its process lives."""
        return self._process is not None and self.guest.alive and self._process.running

    def log(self) -> str:
        """What it has logged since its last start, also after its guest's death."""
        return self.process.stdout + self.process.stderr

    def start(self) -> GuestDaemon:
        """Starts it, and does not wait until it is ready."""
        file = f"{self.name}.yaml"
        (self.guest.share / file).write_text(yaml.safe_dump(self.config))
        command = [sys.executable, "-m", "transferd.daemon.main", "serve"]
        self._process = self.guest.spawn(
            [*command, "--config", f"{SHARE}/{file}"], env={"PYTHONSAFEPATH": "1"}
        )
        return self

    def wait_ready(self, timeout_s: float = READY_S) -> GuestDaemon:
        """Waits until it serves.

        Raises:
            VmError: It ended or was not ready in time; the text has its log.
            GuestDied: The guest ended.
        """
        probe = self.guest.spawn(READY, env={"PORT": str(self._http_port)})
        decided = self.guest.pump(
            lambda: probe.status is not None or self.process.status is not None, timeout_s
        )
        if decided and probe.status is not None:
            return self
        probe.kill()
        why = "ended" if decided else f"was not ready within {timeout_s:g} s"
        raise VmError(f"{self._who} {why}\n{self.log()[-8000:]}")

    @property
    def _who(self) -> str:
        return f"daemon {self.name} of {self.guest.name}"

    def stop(self) -> None:
        """Stops it with SIGTERM; see :meth:`wait_stopped`."""
        self.process.signal(signal.SIGTERM)
        self.wait_stopped()

    def wait_stopped(self) -> None:
        """Waits until it has stopped, as it was told.

        Raises:
            VmError: It ended with another status than 0; the text has its log.
            CommandTimeout: It did not stop in time.
        """
        status = self.process.wait(STOP_S).status
        if status != 0:
            raise VmError(f"{self._who} ended with {status}\n{self.log()[-8000:]}")

    def kill(self) -> None:
        """Kills it with SIGKILL, as a crash would, if it runs."""
        if self.running:
            self.process.kill()


class Daemons:
    """A daemon in each guest of a pair; ``daemons[1]`` and ``daemons[2]`` run on those of now."""

    def __init__(self, pair: Pair, tls: Path, **overrides: Any) -> None:
        """Prepares them; :meth:`boot` starts them.

        Args:
            pair: Their guests.
            tls: As of :class:`GuestDaemon`.
            overrides: Of both configurations.
        """
        self.pair = pair
        self._tls = tls
        self._overrides = overrides
        self._made: dict[int, GuestDaemon] = {}

    def __getitem__(self, role: int) -> GuestDaemon:
        """The daemon of this guest."""
        return self._made[role]

    def prepare(self) -> Daemons:
        """Boots guests that do not run; their daemons are not started yet, so may be configured."""
        self.pair.boot()
        for role in ROLES:
            old = self._made.get(role)
            if old is None or old.guest is not self.pair[role]:
                self._made[role] = GuestDaemon(self.pair[role], self._overrides, tls=self._tls)
        return self

    def boot(self) -> Daemons:
        """Boots guests that do not run, and starts daemons that do not; waits until all serve.

        Raises:
            VmError: A daemon did not start.
        """
        self.prepare()
        fresh = [daemon.start() for daemon in self._made.values() if not daemon.running]
        for daemon in fresh:
            daemon.wait_ready()
        return self

    def close(self) -> None:
        """Stops those that run.

        Raises:
            VmError: One did not end well; the text has its log.
        """
        running = [daemon for daemon in self._made.values() if daemon.running]
        for daemon in running:
            daemon.process.signal(signal.SIGTERM)
        for daemon in running:
            daemon.wait_stopped()
