# SPDX-License-Identifier: Apache-2.0
"""The processes of ``transferd demo kv``: two daemons, a router, engines that come and go."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transferd.client import errors
from transferd.client.demo.daemons import DemoDaemon

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

MODULE = "transferd.client.demo"
START_S = 45.0
STOP_S = 5.0
GUARD_S = 15.0
LOG_LINES = 10


class EngineProcess:
    """A process that takes lines of JSON and whose lines of JSON go into the fleet's queue.

    Attributes:
        name: Of the engine.
        killed: Whether its end is expected.
    """

    def __init__(
        self, name: str, arguments: list[str], log: Path, group: int, events: queue.Queue[Any]
    ) -> None:
        """Starts it."""
        self.name = name
        self.killed = False
        self._log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                # One thread each: they share the processors, and all sums are of one order.
                env={**os.environ, "PYTHONSAFEPATH": "1", "OPENBLAS_NUM_THREADS": "1"},
                process_group=group,
            )
        self._commands: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, args=(events,), daemon=True)
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._reader.start()
        self._writer.start()

    def _read(self, events: queue.Queue[Any]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):  # cut off by a kill
                events.put((self, json.loads(line)))
        events.put((self, {"event": "gone"}))

    def _write(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            while (command := self._commands.get()) is not None:
                pipe.write(json.dumps(command) + "\n")
                pipe.flush()

    def tell(self, **command: Any) -> None:
        """Sends it a command, without waiting; one that is dead does not hear it."""
        self._commands.put(command)

    def kill(self) -> None:
        """Kills it as by ``kill -9``."""
        self.killed = True
        self._process.kill()

    def tail(self) -> str:
        """Tells the end of its log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES:])

    def hang_up(self) -> None:
        """Tells it that there is nothing more to do."""
        self._commands.put(None)

    def close(self) -> None:
        """Waits for its end, within a bound."""
        self.hang_up()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._writer.join(STOP_S)
        self._reader.join(STOP_S)
        if self._process.stdout is not None and not self._reader.is_alive():
            self._process.stdout.close()


class Fleet:
    """All of them; a context manager that leaves nothing behind.

    Should this process die, a guard does the same (kvguard.py). Ctrl-C reaches this process alone.
    """

    def __init__(self) -> None:
        """Makes the folder of sockets and logs, and starts the guard."""
        self._stack = contextlib.ExitStack()
        self._events: queue.Queue[tuple[EngineProcess, dict[str, Any]]] = queue.Queue()
        self._engines: list[EngineProcess] = []
        self._daemons: list[DemoDaemon] = []
        self._group = 0

    def __enter__(self) -> Self:
        folder = tempfile.TemporaryDirectory(prefix="tfd-kv-", dir="/tmp")
        self.folder = Path(self._stack.enter_context(folder))
        self.router = f"unix://{self.folder}/router.sock"
        self._guard = subprocess.Popen(
            [sys.executable, "-m", f"{MODULE}.kvguard", str(self.folder)],
            stdin=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
            process_group=0,
        )
        self._stack.callback(self._end_guard)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for engine in self._engines:
            engine.hang_up()  # all at once; each is waited for below
        self._stack.close()

    def _end_guard(self) -> None:
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        try:
            self._guard.wait(GUARD_S)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()

    def start_daemons(self) -> None:
        """Starts both, and the router; waits until they serve.

        Raises:
            Unavailable: One does not.
        """
        for name in ("a", "b"):
            (self.folder / name).mkdir()
            daemon = DemoDaemon(self.folder / name, self._group)
            self._daemons.append(self._stack.enter_context(daemon))
            if not self._group:
                self._group = daemon.pid
                assert self._guard.stdin is not None
                self._guard.stdin.write(f"{self._group}\n")
                self._guard.stdin.flush()
        self._start_router()
        for daemon in self._daemons:
            daemon.wait_ready()

    def _start_router(self) -> None:
        with (self.folder / "router.log").open("wb") as log:
            router = subprocess.Popen(
                [sys.executable, "-m", "transferd.kv.router", "--listen", self.router],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONSAFEPATH": "1"},
                process_group=self._group,
            )
        self._stack.callback(_end, router)

    def start(self, kind: str, name: str, host: int = -1) -> EngineProcess:
        """Starts an engine: a module of this folder, at one of the daemons or without any."""
        arguments = [f"{MODULE}.{kind}"]
        if host >= 0:
            arguments += [self._daemons[host].address, self.router, name]
        log = self.folder / f"{name}.log"
        engine = EngineProcess(name, arguments, log, self._group, self._events)
        self._engines.append(engine)
        self._stack.callback(engine.close)
        return engine

    def event(self, timeout_s: float) -> tuple[EngineProcess, dict[str, Any]] | None:
        """Takes what an engine has told; None: nothing in this time.

        Raises:
            Unavailable: An engine has failed, or is gone and was not killed.
        """
        try:
            engine, event = self._events.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return None
        if event["event"] == "error":
            raise errors.Unavailable(event["text"])
        if event["event"] == "gone" and not engine.killed:
            raise errors.Unavailable(f"{engine.name} has ended:\n{engine.tail()}")
        return engine, event

    def wait_ready(self, engines: list[EngineProcess]) -> None:
        """Waits until engines have said that they are ready.

        Raises:
            Unavailable: One has failed.
            WaitTimeout: One takes too long.
        """
        missing = {engine.name for engine in engines}
        end = time.monotonic() + START_S
        while missing:
            told = self.event(end - time.monotonic())
            if told is None:
                names = ", ".join(sorted(missing))
                raise errors.WaitTimeout(f"{names} did not start within {START_S:g} s")
            if told[1]["event"] == "ready":
                missing.discard(told[0].name)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
