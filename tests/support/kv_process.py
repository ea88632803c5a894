# SPDX-License-Identifier: Apache-2.0
"""A rank of transferd.kv in a process of its own, to be killed; also that process.

    python kv_process.py prefiller SOCKET                       prints its address, reads commands
    python kv_process.py decoder SOCKET ADDRESS                 prints "ready", reads commands

A command is a line: of a prefiller ``REQUEST SEED LENGTH LAYERS``: it computes so many layers of a
prompt, says "stopped" and waits for the next one, or all of them, and says the first token. Of a
decoder ``REQUEST SEED LENGTH``: it asks, says "asked", and the tokens that it has generated.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import transferd

from support.child import Child

COUNT = 4
WAIT_S = 30.0


def prompt_of(seed: int, length: int) -> list[int]:
    """Makes a prompt."""
    from support.kv_engines import CONFIG

    numbers = random.Random(seed)
    return [numbers.randrange(CONFIG.vocabulary) for _ in range(length)]


class KvProcess(Child):
    """A rank in a process of its own; a context manager that kills it.

    Attributes:
        first: Its first line.
    """

    wait_s = WAIT_S

    def __init__(self, role: str, socket: str, *arguments: str) -> None:
        """Starts it, and waits until it is there."""
        tests = Path(__file__).parents[1]
        super().__init__(
            subprocess.Popen(
                [sys.executable, __file__, role, socket, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(tests)},
            )
        )
        self.first = self.line()

    def say(self, *words: object) -> None:
        """Gives it a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(str(word) for word in words).encode() + b"\n")
        self.process.stdin.flush()


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
