# SPDX-License-Identifier: Apache-2.0
"""Words of the session for streams and kernels: waiting for counts, bumping watchers."""

from __future__ import annotations

from ctypes import c_uint64
from typing import TYPE_CHECKING, Any

from transferd.client import errors
from transferd.native.client_half import ffi, lib

if TYPE_CHECKING:
    from transferd.client.cuda.gpu import Gpu
    from transferd.client.events import Driver

COUNTER_BYTES = int(ffi.sizeof("struct tfd_counter"))
GATE_OFFSET = int(ffi.offsetof("struct tfd_counter", "gate"))
WATCHER_BYTES = int(ffi.sizeof("struct tfd_watcher"))


def to_stream(stream: Any) -> int:
    """Finds the CUstream behind what libraries call a stream.

    Args:
        stream: A number; a stream of torch, cupy, cuda.core or anything with ``__cuda_stream__``.

    Raises:
        InvalidRequest: It is none of them.
    """
    if type(stream) is int and stream >= 0:
        return stream
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        return int((protocol() if callable(protocol) else protocol)[1])
    for name in ("cuda_stream", "ptr", "handle"):  # torch, cupy, numba
        number = getattr(stream, name, None)
        number = getattr(number, "value", number)
        if isinstance(number, int):
            return number
    raise errors.InvalidRequest(
        "stream is a CUstream as a number, or a stream of torch, cupy or cuda.core, not "
        f"{type(stream).__name__}"
    )


def counter_pointer(gpu: Gpu, slot: int) -> int:
    """Tells where the gate of a counter lies for devices."""
    gpu.lend()
    return gate_address(gpu, slot)


def gate_address(gpu: Gpu, slot: int) -> int:
    """As :func:`counter_pointer`, for streams of ours."""
    header = lib.tfd_client_header(gpu.session.client)
    offset = int(header.counter_offset) + slot * COUNTER_BYTES + GATE_OFFSET
    return gpu.segment(gpu.any_device()) + offset


def watcher_pointer(gpu: Gpu, slot: int) -> int:
    """Tells where the word of a watcher lies for devices."""
    gpu.lend()
    return watcher_address(gpu, slot)


def watcher_address(gpu: Gpu, slot: int) -> int:
    """As :func:`watcher_pointer`, for lanes."""
    header = lib.tfd_client_header(gpu.session.client)
    offset = int(header.watcher_offset) + slot * WATCHER_BYTES
    return gpu.segment(gpu.any_device()) + offset


def counter_wait(gpu: Gpu, slot: int, target: int, stream: Any, driver: Driver) -> None:
    """Has a stream wait until the gate of a counter has reached a target.

    What a NIC has written is visible to it then: it flushes, or a thread does before.
    """
    number = to_stream(stream)
    address = counter_pointer(gpu, slot)
    with gpu.entered_by(number) as device:
        gpu.prepare(device)
        if gpu.flusher.relays(device):
            address = gpu.relays.pointer(slot, driver)
        flush = gpu.flusher.need(device).by_stream
        gpu.driver.wait_value(number, address, target, flush=flush)


def watcher_bump(gpu: Gpu, slot: int, n: int, stream: Any) -> None:
    """Has a stream add to a watcher, by a kernel: what a graph replays adds each time."""
    number = to_stream(stream)
    address = watcher_pointer(gpu, slot)
    with gpu.entered_by(number) as device:
        gpu.driver.launch(gpu.kernels(device).bump, number, [c_uint64(address), c_uint64(n)])
