# SPDX-License-Identifier: Apache-2.0
"""From one GPU of a host to another: copies between two client processes, kernels over mappings."""

from __future__ import annotations

import functools
from ctypes import c_int, c_uint64
from typing import TYPE_CHECKING

from bench.gpu_copies import SIZES, flood, plain_copies
from bench.gpu_world import GIB, MIB, World, world
from bench.stats import spread
from bench.turns import in_turn, ratio_row
from transferd.client.cuda import driver as drivers

from support import cuda_peer
from support.gpu import Buffer, Gpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.report import Row
    from bench.topic import Run

KERNEL_BYTES = 256 * MIB
BLOCKS, THREADS, RUNS = 1024, 512, 8
MOVE = b"""
extern "C" __global__ void move(uint4 *to, const uint4 *from, int n)
{
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        to[i] = from[i];
}
"""


def rows(run: Run) -> Iterator[Row]:
    """Measures the bars, where there are two GPUs."""
    names = {size: f"{size // MIB:,} MiB between two processes, two GPUs" for size in SIZES}
    if drivers.load().device_count() < 2:
        for name in names.values():
            run.skip(name, "this machine has one GPU, or CUDA_VISIBLE_DEVICES shows one")
        return
    with world(GIB) as here:
        try:
            plain = Gpu(1).malloc(GIB)
        finally:
            here.gpu.enter()
        here.gpu.driver.peer_enable(here.gpu.driver.context_retain(1))
        with cuda_peer.running(here.socket, "malloc", GIB, device=1) as peer:
            for size, name in names.items():
                yield copies(run, here, peer, plain, size, name)
            kernels(run, here, peer, plain)


def copies(run: Run, here: World, peer: cuda_peer.Peer, plain: Buffer, size: int, what: str) -> Row:
    """Compares with the same by cuMemcpyDtoDAsync between the same devices in one process."""
    count, share = SIZES[size]
    us, them = "SDK, two processes", "plain peer copy, one process"
    measured: dict[str, Callable[[], float]] = {
        us: functools.partial(flood, here, peer.descriptor, size, count),
        them: plain_copies(here.gpu, here.source, plain, size, count),
    }
    for measure in measured.values():
        measure()
    found = in_turn(run, measured, run.turns)
    for name, values in found.items():
        run.beside(f"{what}: {name}", f"{spread(values, 0)} Gbps")
    return ratio_row(f"{what}: ratio to a plain copy", found, us, them, share)


def kernels(run: Run, here: World, peer: cuda_peer.Peer, plain: Buffer) -> None:
    """Says how fast a kernel reads and writes the other GPU by map(), and by a plain pointer."""
    near = here.source.address
    with here.sender.map(peer.descriptor, device=0) as mapped:
        measured: dict[str, Callable[[], float]] = {}
        for name, far in (("map()", int(mapped)), ("a plain peer pointer", plain.address)):
            measured[f"writes by {name}"] = moves(here.gpu, far, near)
            measured[f"reads by {name}"] = moves(here.gpu, near, far)
        for measure in measured.values():
            measure()
        for name, values in in_turn(run, measured, run.turns).items():
            run.beside(f"a kernel {name}, two GPUs", f"{spread(values, 0)} Gbps")


def moves(gpu: Gpu, to: int, from_: int) -> Callable[[], float]:
    """A kernel's copies, timed by the GPU; gives Gbps."""
    kernel, stream = gpu.kernel(MOVE, "move"), gpu.stream()
    first, last = gpu.event(), gpu.event()
    arguments = [c_uint64(to), c_uint64(from_), c_int(KERNEL_BYTES // 16)]

    def measure() -> float:
        gpu.record(first, stream)
        for _ in range(RUNS):
            gpu.launch(kernel, BLOCKS, THREADS, stream, arguments)
        gpu.record(last, stream)
        gpu.sync(stream)
        return KERNEL_BYTES * RUNS * 8 / gpu.elapsed_us(first, last) / 1e3

    return measure
