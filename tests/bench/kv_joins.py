# SPDX-License-Identifier: Apache-2.0
"""From a new prefiller's Register until its first pages have come to a decoder."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from bench.kv_caches import CacheShape
from bench.kv_pair import WAIT_S, decoder
from bench.kv_prefiller import PrefillerProcess
from bench.pair import daemons
from bench.report import Row
from bench.stats import spread
from transferd.client import errors
from transferd.client.demo.daemons import free_port
from transferd.kv.router import Choice, Engine, Load, Registration, Router

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.kv_pair import BenchDecoder
    from bench.topic import Run

ROUNDS, BOUND_S = 10, 1.0
SHAPE = CacheShape(layers=16, page_tokens=16, item_bytes=1024, pages=64, tail_bytes=4)
TOKENS = 256
POLL_S = 0.001


def rows(run: Run) -> list[Row]:
    """Adds a prefiller, with a daemon of its own that nobody knows yet, again and again."""
    took = []
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(router())
        (far,) = stack.enter_context(daemons(1, provider="tcp"))
        here = stack.enter_context(decoder(far.socket, SHAPE, stages=SHAPE.layers, slots=8))
        asking = stack.enter_context(Router(address))
        engine = Engine("decoder", "decoder", here.rank.boot, b"bench", b"", SHAPE.page_tokens)
        joined = stack.enter_context(Registration(address, engine, lambda: Load()))
        joined.wait(WAIT_S)
        for number in range(run.scaled(ROUNDS)):
            with (
                daemons(1, provider="tcp") as (near,),
                PrefillerProcess(near.socket, SHAPE) as there,
            ):
                run.gate.wait()
                took.append(one_join(here, there, asking, number))
            gone(asking, f"prefiller {number}")
    return [
        Row(
            "from Register to the first page of a new prefiller, at a daemon that is new, too",
            max(took),
            "s",
            "<=",
            BOUND_S,
            f"the largest; {spread(took, 3)} of {len(took)}",
        )
    ]


@contextlib.contextmanager
def router() -> Iterator[str]:
    """Runs a router in a process of its own."""
    address = f"127.0.0.1:{free_port()}"
    command = (sys.executable, "-m", "transferd.kv.router", "--listen", address)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()
            yield address
        finally:
            process.terminate()


def one_join(here: BenchDecoder, there: PrefillerProcess, asking: Router, number: int) -> float:
    """Tells the seconds from the new one's Register until a decoder has its first layer."""
    name = f"prefiller {number}"
    there.tell("register", router=asking.address, name=name)
    choice = route(asking)
    assert choice.prefiller.name == name, choice
    request = f"request {number}"
    transfer, pages = here.ask(request, choice.prefiller.address, TOKENS)
    there.tell("begin", ids=[request], tokens=TOKENS, seed=number, fill=True)
    there.tell("step", ids=[request], tokens=TOKENS, layers=1)
    transfer.wait_layers(1, WAIT_S)
    end = time.monotonic()
    begin: float = there.answer()["at"]
    there.answer(), there.answer()
    there.ask("rest")
    transfer.wait(WAIT_S)
    if not here.cache.holds(pages, number):
        raise AssertionError(f"{transfer} has other bytes than were computed")
    here.cache.give_back(pages)
    return end - begin


def route(asking: Router) -> Choice:
    """Asks until there is a prefiller."""
    end = time.monotonic() + WAIT_S
    while True:
        try:
            return asking.route(TOKENS)
        except errors.Unavailable:
            if time.monotonic() > end:
                raise
        time.sleep(POLL_S)


def gone(asking: Router, name: str) -> None:
    """Waits until the router has forgotten a prefiller."""
    end = time.monotonic() + WAIT_S
    while any(engine.name == name for engine, _ in asking.engines()):
        if time.monotonic() > end:
            raise TimeoutError(f"the router still has {name}, which has died")
        time.sleep(POLL_S)
