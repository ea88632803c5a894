# SPDX-License-Identifier: Apache-2.0
"""Runs in a guest: starts and signals processes as the host says, over a virtio-serial port.

Both sides write lines of JSON. The host: start, signal, input, resize; the guest: ready, exit,
output. What a process prints goes to files in the folder that both share, so that it outlives the
guest and no process waits for the host to read; only terminals go over the port.

The standard library alone, and little of it: an import takes long in an emulated machine.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import struct
import subprocess
import termios
from pathlib import Path
from typing import Any

PORT_NAME = "agent"
CHUNK = 65536


def find_port() -> str:
    """Finds the device of our port; udev, which would name it, does not run here."""
    for name in Path("/sys/class/virtio-ports").glob("*/name"):
        if name.read_text().strip() == PORT_NAME:
            return f"/dev/{name.parent.name}"
    raise SystemExit("GUEST: the port to the host is missing")


class Agent:
    """The processes that the host has started."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._poll = select.poll()
        self._poll.register(port, select.POLLIN)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._terminals: dict[int, int] = {}
        self._by_pidfd: dict[int, int] = {}
        self._by_terminal: dict[int, int] = {}

    def serve(self) -> None:
        """Serves until the host closes the port."""
        self._send(event="ready")
        pending = b""
        while True:
            for fd, _ in self._poll.poll():
                if fd in self._by_pidfd:
                    self._ended(fd)
                elif fd in self._by_terminal:
                    self._printed(fd)
                elif fd == self._port:
                    data = os.read(self._port, CHUNK)
                    if not data:
                        return
                    *lines, pending = (pending + data).split(b"\n")
                    for line in lines:
                        self._obey(json.loads(line))

    def _obey(self, order: dict[str, Any]) -> None:
        number = order["id"]
        try:
            if order["op"] == "start":
                self._start(number, order)
            elif order["op"] == "signal":
                self._signal(number, order["signal"])
            elif order["op"] == "input":
                os.write(self._terminals[number], base64.b64decode(order["data"]))
            elif order["op"] == "resize":
                resize(self._terminals[number], order["rows"], order["columns"])
        except (OSError, KeyError) as error:
            if order["op"] == "start":
                self._send(event="exit", id=number, status=127, error=str(error))

    def _start(self, number: int, order: dict[str, Any]) -> None:
        environment = {**os.environ, **order["env"]}
        if order["rows"]:
            process = self._start_on_terminal(number, order, environment)
        else:
            with open(order["stdout"], "wb") as out, open(order["stderr"], "wb") as err:
                process = subprocess.Popen(
                    order["argv"],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    cwd=order["cwd"],
                    env=environment,
                    start_new_session=True,
                )
        self._processes[number] = process
        pidfd = os.pidfd_open(process.pid)
        self._by_pidfd[pidfd] = number
        self._poll.register(pidfd, select.POLLIN)

    def _start_on_terminal(
        self, number: int, order: dict[str, Any], environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        ours, theirs = os.openpty()
        resize(ours, order["rows"], order["columns"])
        process = subprocess.Popen(
            order["argv"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=order["cwd"],
            env=environment,
            start_new_session=True,
            # The terminal of its session, so that Ctrl-C reaches what runs in it.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self._terminals[number] = ours
        self._by_terminal[ours] = number
        self._poll.register(ours, select.POLLIN)
        return process

    def _signal(self, number: int, which: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._processes[number].pid, which)

    def _printed(self, fd: int) -> None:
        try:
            data = os.read(fd, CHUNK)
        except OSError:  # EIO: nobody has the terminal open any more
            data = b""
        number = self._by_terminal[fd]
        if data:
            self._send(event="output", id=number, data=base64.b64encode(data).decode())
            return
        self._poll.unregister(fd)
        del self._by_terminal[fd], self._terminals[number]
        os.close(fd)

    def _ended(self, pidfd: int) -> None:
        number = self._by_pidfd.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        status = self._processes.pop(number).wait()
        self._send(event="exit", id=number, status=status)

    def _send(self, **message: Any) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self._port, data) :]


def resize(terminal: int, rows: int, columns: int) -> None:
    """Tells a terminal how large its window is."""
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def main() -> None:
    """Serves the host."""
    Agent(os.open(find_port(), os.O_RDWR)).serve()


if __name__ == "__main__":
    main()
