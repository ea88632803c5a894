# SPDX-License-Identifier: Apache-2.0
"""What NICs write into GPU memory: what has to come between a count and work that relies on it.

The data goes to one device, the completion that is counted to another, and the GPU may see them in
any order, unless it says otherwise (native/README.md, When data is visible before its count).
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from typing import TYPE_CHECKING

from transferd.client import errors
from transferd.client.cuda.driver import NOT_READY
from transferd.client.cuda.streams import gate_address
from transferd.v1 import attach_pb2

if TYPE_CHECKING:
    from transferd.client.cuda.driver import Driver
    from transferd.client.cuda.gpu import Gpu

log = logging.getLogger("transferd")
ORDERING_OWNER = 100  # CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER; ALL_DEVICES is above it
OPTION_HOST, OPTION_MEMOPS = 1, 2  # CUflushGPUDirectRDMAWritesOptions
FLUSH_S = 10.0


class Need(enum.IntEnum):
    """CudaFlush of the protocol: what a device needs before counts of a NIC's writes are good."""

    NOT_NEEDED = attach_pb2.CUDA_FLUSH_NOT_NEEDED
    STREAM = attach_pb2.CUDA_FLUSH_STREAM
    HOST = attach_pb2.CUDA_FLUSH_HOST
    STREAM_OR_HOST = attach_pb2.CUDA_FLUSH_STREAM_OR_HOST
    IMPOSSIBLE = attach_pb2.CUDA_FLUSH_IMPOSSIBLE

    def word(self) -> str:
        """Its name in the protocol."""
        name: str = attach_pb2.CudaFlush.Name(self)
        return name

    @property
    def by_stream(self) -> bool:
        """Whether a stream's wait can flush."""
        return self in (Need.STREAM, Need.STREAM_OR_HOST)

    @property
    def by_host(self) -> bool:
        """Whether a thread can flush."""
        return self in (Need.HOST, Need.STREAM_OR_HOST)


def need_of(driver: Driver, device: int) -> Need:
    """Asks a device."""
    ordering, options = driver.flush_needs(device)
    if ordering >= ORDERING_OWNER:
        return Need.NOT_NEEDED
    by_host = bool(options & OPTION_HOST) and driver.can_flush
    if options & OPTION_MEMOPS:
        return Need.STREAM_OR_HOST if by_host else Need.STREAM
    return Need.HOST if by_host else Need.IMPOSSIBLE


class Flusher:
    """That of one session. Safe to use from several threads.

    Attributes:
        devices: Those that NICs write to and that have to be flushed; as a rule there are none.
        reads: Whether reads land in memory of one of them: their jobs' ends count for that.
    """

    def __init__(self, gpu: Gpu) -> None:
        """Has nothing to flush yet."""
        self._gpu = gpu
        self._driver = gpu.driver
        self._needs: dict[int, Need] = {}
        self._lock = threading.Lock()  # guards the writes of devices, and the streams' use
        self._streams: dict[int, int] = {}
        self.devices: dict[int, Need] = {}
        self.reads = False

    def need(self, device: int) -> Need:
        """Tells what a device needs."""
        need = self._needs.get(device)
        if need is None:
            need = self._needs[device] = need_of(self._driver, device)
            if need is Need.IMPOSSIBLE:
                log.warning(
                    "GPU %d: no NIC writes into its memory, nor reads it: it neither orders what "
                    "NICs write (GPU_DIRECT_RDMA_WRITES_ORDERING is NONE) nor can it be flushed "
                    "(GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS is 0)",
                    device,
                )
        return need

    def reached(self, device: int) -> Flusher | None:
        """NICs reach memory of this device from now on; None: nothing has to be flushed for it."""
        need = self.need(device)
        if need is Need.NOT_NEEDED:
            return None
        if device not in self.devices:
            with self._lock:
                self.devices = {**self.devices, device: need}
        return self

    def relays(self, device: int) -> bool:
        """Tells whether a stream of this device has to wait for a thread that flushes."""
        return self.need(device) is Need.HOST and device in self.devices

    def host(self) -> None:
        """Flushes, for a thread that has seen a count: what it launches from now on sees the data.

        Raises:
            CudaError: A context is lost.
            Unavailable: FLUSH_LATE.
        """
        for device, need in self.devices.items():
            with self._driver.entered(self._gpu.context(device)):
                if need.by_host:
                    self._driver.flush_writes()
                else:
                    self._host_by_stream(device)

    def _host_by_stream(self, device: int) -> None:
        """Has a stream of ours wait, with a flush, for what is so already."""
        driver = self._driver
        with self._lock:
            if device not in self._streams:
                self._streams[device] = driver.stream_create()
            stream = self._streams[device]
            driver.wait_value(stream, gate_address(self._gpu, 0), 0, flush=True)
            end = time.monotonic() + FLUSH_S
            while (result := driver.stream_result(stream)) == NOT_READY:
                if time.monotonic() > end:
                    raise errors.Unavailable(
                        f"GPU {device} has not flushed what NICs wrote within {FLUSH_S:g} s: it "
                        "hangs, or a stream that waits holds up its queue "
                        "(CUDA_DEVICE_MAX_CONNECTIONS)",
                        reason="FLUSH_LATE",
                    )
                time.sleep(0)
        if result:
            raise driver.error("flushing what NICs wrote", result)

    def close(self) -> None:
        """Ends its streams."""
        for device, stream in self._streams.items():
            with self._driver.entered(self._gpu.context(device)):
                self._driver.stream_destroy(stream)
        self._streams.clear()
