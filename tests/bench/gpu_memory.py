# SPDX-License-Identifier: Apache-2.0
"""Registering GPU memory: the first touch of an allocation, a second tensor; an owner that dies."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from bench.gpu_world import GIB, MIB, WAIT_S, World, world
from bench.report import Row
from bench.stats import median, spread

from support import cuda_peer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.topic import Run

FIRST_MS, SECOND_US, BACK_S = 5.0, 20.0, 1.0
ROUNDS, TENSORS = 50, 8
HELD = 8 * GIB


def rows(run: Run) -> Iterator[Row]:
    """Measures the bars."""
    with world(MIB) as here:
        yield from registering(run, here)
        yield death(run, here)


def registering(run: Run, here: World) -> list[Row]:
    """Times both touches."""
    first, further, driver = [], [], []
    for _ in range(run.scaled(ROUNDS)):
        buffer = here.gpu.malloc(64 * MIB)
        begin = time.perf_counter()
        region = here.sender.register(buffer)
        first.append((time.perf_counter() - begin) * 1e3)
        parts = [buffer[i * MIB : (i + 1) * MIB] for i in range(1, TENSORS + 1)]
        others = []
        for part in parts:
            begin = time.perf_counter()
            others.append(here.sender.register(part))
            further.append((time.perf_counter() - begin) * 1e6)
        begin = time.perf_counter()
        here.gpu.driver.buffer_id(parts[0].address)
        driver.append((time.perf_counter() - begin) * 1e6)
        for other in others:
            other.close()
        region.close()
        buffer.free()
    run.beside(
        "tensors after the second; the driver's call in it, us",
        f"{spread([t for i, t in enumerate(further) if i % TENSORS], 1)}; {spread(driver, 1)}",
    )
    second = further[::TENSORS]  # right after the first touch, which waits for the daemon
    return [
        Row("first touch of an allocation", median(first), "ms", "<=", FIRST_MS, spread(first)),
        Row("a second tensor in it", median(second), "us", "<=", SECOND_US, spread(second, 1)),
    ]


def death(run: Run, here: World) -> Row:
    """Kills a process whose memory our streams have written to; until the driver has it back."""
    before = here.gpu.free_bytes()
    with cuda_peer.running(here.socket, "malloc", HELD) as peer:
        here.sender.write(here.region, peer.descriptor, imm=1).wait(WAIT_S)
        begin = time.perf_counter()
        peer.process.kill()
        while here.gpu.free_bytes() < before - HELD // 2:
            if time.perf_counter() - begin > WAIT_S:
                break
        took = time.perf_counter() - begin
    del run
    return Row("8 GiB that we have mapped, owner killed: until free", took, "s", "<=", BACK_S)
