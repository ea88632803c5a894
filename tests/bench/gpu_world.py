# SPDX-License-Identifier: Apache-2.0
"""What the topics of GPU memory share: a daemon, two clients in one process, the kernel to beat."""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import transferd
from bench.pair import daemons

from support.gpu import Buffer, Gpu

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transferd import Client, Grant, Region

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
WAIT_S = 30.0
# As a user would write it by hand: a block a page, 16 bytes a thread, the table in mapped memory.
BY_HAND = b"""
extern "C" __global__ void pages(uint4 *const *d, const uint4 *const *s, int n)
{
    const uint4 *a = s[blockIdx.x];
    uint4 *b = d[blockIdx.x];
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        b[i] = a[i];
}
"""


@dataclass
class World:
    """Two clients of one daemon in this process, each with a buffer.

    Attributes:
        gpu: The first GPU.
        socket: Of the daemon.
        sender: A client; source and region are its memory.
        receiver: The other; target and grant are its memory.
    """

    gpu: Gpu
    socket: str
    sender: Client
    receiver: Client
    source: Buffer
    target: Buffer
    region: Region
    grant: Grant


@contextlib.contextmanager
def world(length: int) -> Iterator[World]:
    """Makes one, with buffers of so many bytes."""
    gpu = Gpu()
    with daemons(1) as (daemon,), contextlib.ExitStack() as stack:
        sender = stack.enter_context(transferd.Client(daemon.socket))
        receiver = stack.enter_context(transferd.Client(daemon.socket))
        source, target = gpu.malloc(length), gpu.malloc(length)
        stack.callback(target.free)
        stack.callback(source.free)
        stack.callback(receiver.close)
        stack.callback(sender.close)
        grant = receiver.register(target).grant(rights={"write", "map"}, imms=range(16))
        yield World(
            gpu, daemon.socket, sender, receiver, source, target, sender.register(source), grant
        )


class ByHand:
    """The hand-written kernel over given pages."""

    def __init__(self, made: World, src: np.ndarray, dst: np.ndarray, page: int) -> None:
        gpu = made.gpu
        self._gpu = gpu
        self._count = len(src)
        self._kernel = gpu.kernel(BY_HAND, "pages")
        table = gpu.pinned(16 * self._count)
        raw = (ctypes.c_char * table.length).from_address(table.address)
        words = np.frombuffer(memoryview(raw).cast("B"), np.uint64)
        words[: self._count] = dst.astype(np.uint64) * page + made.target.address
        words[self._count :] = src.astype(np.uint64) * page + made.source.address
        self._arguments: list[Any] = [
            ctypes.c_uint64(table.address),
            ctypes.c_uint64(table.address + 8 * self._count),
            ctypes.c_int(page // 16),
        ]

    def launch(self, stream: int) -> None:
        """Enqueues it."""
        self._gpu.launch(self._kernel, self._count, 256, stream, self._arguments)


def permutations(count: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Pages in random order, on both sides."""
    order = np.random.default_rng(seed)
    return order.permutation(count), order.permutation(count)
