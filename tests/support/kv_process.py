# SPDX-License-Identifier: Apache-2.0
"""A rank of transferd.kv in a process of its own, to be killed; also that process.

    python kv_process.py prefiller SOCKET                       prints its address, reads commands
    python kv_process.py decoder SOCKET ADDRESS                 prints "ready", reads commands

A command is a line: of a prefiller ``REQUEST SEED LENGTH LAYERS``: it computes so many layers of a
prompt, says "stopped" and waits for the next one, or all of them, and says the first token. Of a
decoder ``REQUEST SEED LENGTH``: it asks, says "asked", and the tokens that it has generated.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import transferd

if TYPE_CHECKING:
    from types import TracebackType

COUNT = 4
WAIT_S = 30.0


def prompt_of(seed: int, length: int) -> list[int]:
    """Makes a prompt."""
    from support.kv_engines import CONFIG

    numbers = random.Random(seed)
    return [numbers.randrange(CONFIG.vocabulary) for _ in range(length)]


class KvProcess:
    """A rank in a process of its own; a context manager that kills it.

    Attributes:
        first: Its first line.
    """

    def __init__(self, role: str, socket: str, *arguments: str) -> None:
        """Starts it, and waits until it is there."""
        tests = Path(__file__).parents[1]
        self._buffer = b""
        self.process = subprocess.Popen(
            [sys.executable, __file__, role, socket, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(tests)},
        )
        self.first = self.line()

    def say(self, *words: object) -> None:
        """Gives it a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(str(word) for word in words).encode() + b"\n")
        self.process.stdin.flush()

    def line(self, timeout_s: float = WAIT_S) -> str:
        """Reads its next line.

        Raises:
            AssertionError: None came, or it ended.
        """
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left = max(0.0, deadline - time.monotonic())
            assert select.select([fd], [], [], left)[0], f"silent for {timeout_s:g} s"
            data = os.read(fd, 65_536)
            assert data, f"it ended with {self.process.wait()}"
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\n")
        return text.decode()

    def kill(self) -> None:
        """Kills it with SIGKILL and reaps it."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> KvProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def prefill(client: transferd.Client) -> None:
    """Is a prefiller."""
    from support.kv_engines import PrefillEngine

    engine = PrefillEngine(client)
    print(engine.rank.address.hex(), flush=True)
    for line in sys.stdin:
        name, seed, length, layers = line.split()
        request, prompt = name.encode(), prompt_of(int(seed), int(length))
        if int(layers) >= engine.config.layers:
            print(engine.prefill(request, prompt), flush=True)
            continue
        engine.begin(request, prompt)
        with engine.rank.step({request: len(prompt)}) as step:

            def layer_done(layer: int, until: int = int(layers)) -> None:
                if layer < until:
                    step.layer_done()

            engine.model.forward(prompt, 0, engine.pages[request], layer_done)
            print("stopped", flush=True)
            sys.stdin.readline()


def decode(client: transferd.Client, address: bytes) -> None:
    """Is a decoder."""
    from support.kv_engines import DecodeEngine

    engine = DecodeEngine(client)
    engine.rank.connect(address, timeout_s=WAIT_S)
    print("ready", flush=True)
    for line in sys.stdin:
        name, seed, length = line.split()
        prompt = prompt_of(int(seed), int(length))
        transfer, pages = engine.ask(name.encode(), address, prompt, COUNT)
        print("asked", flush=True)
        transfer.wait(timeout_s=WAIT_S)
        first = int.from_bytes(transfer.tail, "little")
        print(*engine.generate(prompt, pages, first, COUNT), flush=True)


if __name__ == "__main__":
    with transferd.Client(sys.argv[2]) as own:
        if sys.argv[1] == "prefiller":
            prefill(own)
        else:
            decode(own, bytes.fromhex(sys.argv[3]))
