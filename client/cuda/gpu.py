# SPDX-License-Identifier: Apache-2.0
"""What a session has of GPUs: contexts, kernels, memory, streams. Made on first use."""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import TYPE_CHECKING, Any

from transferd.client import errors
from transferd.client.cuda import driver as drivers
from transferd.client.cuda import modules
from transferd.client.cuda.allocation import Allocations
from transferd.client.cuda.arrays import device_array
from transferd.client.cuda.copier import Copier
from transferd.client.cuda.flush import Flusher
from transferd.client.cuda.lanes import TURNS_MIN, Lanes
from transferd.client.cuda.mapping import DevicePointer, Mappings
from transferd.client.cuda.relay import Relays
from transferd.client.cuda.workers import bounded
from transferd.native.client_half import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transferd.client.cuda.allocation import Allocation
    from transferd.client.cuda.arrays import DeviceArray
    from transferd.client.ring import RingSession

CLOSE_S = 10.0  # how long the streams' work is waited for at the end
LEAVE_S = 2.0  # and then the driver, which may wait for streams that are not ours
# Segments that streams or kernels may still look at: mapped and registered until the process ends.
_left: list[Any] = []


class Gpu:
    """Of one session. Safe to use from several threads.

    Attributes:
        session: Whose.
        driver: The seam.
        daemon: Life of the daemon: what it numbers is so in that alone.
        allocations: Memory of this process.
        mappings: Memory of others.
        lanes: Streams.
        flusher: Of what NICs write.
        relays: Words for streams that cannot flush by themselves.
        fault: What has failed a context; empty: nothing has.
    """

    def __init__(self, session: RingSession) -> None:
        """Opens the driver.

        Raises:
            Unavailable: There is none that is of use.
        """
        self.session = session
        self.driver = drivers.load()
        self.daemon = bytes(ffi.buffer(lib.tfd_client_header(session.client).boot_epoch))
        self._lock = threading.RLock()  # guards what follows
        self._contexts: dict[int, int] = {}
        self._kernels: dict[int, modules.Kernels] = {}
        self._prepared: set[int] = set()
        self._uuids: dict[bytes, int] = {}
        self._segment = 0
        self._lent = False
        self.fault = ""
        self.flusher = Flusher(self)
        self.relays = Relays(self)
        self.allocations = Allocations(self)
        self.mappings = Mappings(self)
        self.lanes = Lanes(self)
        self.copier = Copier(self)

    # ---- devices ----

    def context(self, device: int) -> int:
        """Gives the primary context of a device, which is kept until the session ends."""
        context = self._contexts.get(device)
        if context is not None:
            return context
        with self._lock:
            if device not in self._contexts:
                self._contexts[device] = self.driver.context_retain(device)
            return self._contexts[device]

    def device_of(self, uuid: bytes) -> int:
        """Finds a device by its UUID; -1: this process does not see it."""
        with self._lock:
            if not self._uuids:
                self._uuids = {
                    self.driver.device_uuid(i): i for i in range(self.driver.device_count())
                }
            return self._uuids.get(uuid, -1)

    def any_device(self) -> int:
        """Chooses a device whose context is there already, before making one."""
        with self._lock:
            if self._contexts:
                return next(iter(self._contexts))
        current = self.driver.current_device()
        return current if current >= 0 else 0

    @contextlib.contextmanager
    def entered_by(self, stream: int) -> Iterator[int]:
        """Makes the context of a stream current; yields its device."""
        device = self.driver.current_device()
        if device >= 0:
            with self._entered_stream(stream) as device:
                yield device
            return
        with self.driver.entered(self.context(0)), self._entered_stream(stream) as device:
            yield device

    @contextlib.contextmanager
    def _entered_stream(self, stream: int) -> Iterator[int]:
        with self.driver.entered(self.driver.stream_context(stream)):
            yield self.driver.current_device()

    def prepare(self, device: int) -> None:
        """Does ahead, on the first use of a device, what the driver may wait for streams for.

        From then on some may wait for words: of this session, or for what it is to do. What fails
        is tried again by whatever needs it, which tells.
        """
        if device in self._prepared:
            return
        with self._lock:
            if device not in self._prepared:
                self._prepared.add(device)
                for call in (self.kernels, self.segment):
                    with contextlib.suppress(errors.TransferdError):
                        call(device)

    def kernels(self, device: int) -> modules.Kernels:
        """Gives the kernels of a device: see :func:`modules.kernels`."""
        kernels = self._kernels.get(device)
        if kernels is None:
            kernels = self._kernels[device] = modules.kernels(self.driver, device)
        return kernels

    def segment(self, device: int) -> int:
        """Registers the session's segment with CUDA, once; tells where devices see it."""
        if self._segment:
            return self._segment
        with self._lock:
            if not self._segment:
                self.session.check_open()
                header = lib.tfd_client_header(self.session.client)
                address = int(ffi.cast("uintptr_t", header))
                with self.driver.entered(self.context(device)):
                    self.driver.host_register(address, int(header.segment_bytes))
                    self._registered = address
                    self._segment = self.driver.host_pointer(address)
            return self._segment

    def lend(self) -> None:
        """Words of the segment go to streams or kernels of the application's.

        Nobody knows when they look at them for the last time, and memory that is gone would cost
        them their context.
        """
        if not self._lent:
            self._keep_segment()
            self.prepare(self.any_device())

    def segment_pointer(self, at: Any) -> int:
        """Tells where a part of the segment lies for devices; it is lent to kernels."""
        self.lend()
        begin = int(ffi.cast("uintptr_t", lib.tfd_client_header(self.session.client)))
        return self.segment(self.any_device()) + int(ffi.cast("uintptr_t", at)) - begin

    def _keep_segment(self) -> None:
        if not self._lent:
            self._lent = True
            _left.append(self.session.client)

    # ---- memory ----

    def register(self, array: DeviceArray, name: str) -> Allocation:
        """Finds, or shares and registers, the allocation that an array is part of."""
        allocation = self.allocations.take(array, name)
        self.prepare(allocation.device)
        if allocation.users == 1 and (again := device_array(array.memory)) is not None:
            # A thread that has slept for the daemon finds its processor's caches cold. What the
            # next tensor takes is gone through once, in less than a hundredth of that time.
            self.allocations.give_back(self.allocations.take(again, name))
        return allocation

    def warm(self, descriptors: Iterable[bytes]) -> None:
        """Does ahead what the first copies would: maps, loads kernels, makes streams."""
        with self._lock:
            devices = list(self._contexts)
        for device in devices:
            for priority in (0, 1):
                self.lanes.of(device, priority, TURNS_MIN)
            for descriptor in descriptors:
                self.mappings.find(descriptor, device)

    def map(self, descriptor: bytes, device: int | None) -> DevicePointer:
        """Maps a grant for the application's own kernels.

        Raises:
            AccessDenied: It cannot be mapped; the message says why.
        """
        chosen = self.any_device() if device is None else device
        self.prepare(chosen)
        mapped = self.mappings.find(descriptor, chosen)
        if mapped is None or not self.mappings.pin(mapped):
            raise errors.AccessDenied(
                f"the grant cannot be mapped: {self.mappings.refusal(descriptor)}",
                reason="NOT_MAPPED",
            )
        return DevicePointer.of(mapped, lambda: self.mappings.unpin(mapped))

    # ---- its end ----

    def failed(self, device: int, result: int) -> None:
        """A context is lost."""
        error = self.driver.error("a copy", result)
        self.fault = f"device {device}: {error}"

    def close(self) -> None:
        """Ends all work of streams, then unmaps and unregisters, within bounds. Idempotent.

        Unmapping waits for every stream of the context, of whomever. So a thread does it, which is
        left behind if it takes long: it holds what is still mapped and registered.
        """
        self.relays.release()
        self.mappings.shut()
        quiet = self.lanes.close(CLOSE_S)
        if not quiet:  # what a stream may still write to stays as it is
            self._keep_segment()
            return
        leave = functools.partial(self._leave, self.session.client)
        bounded(self.driver, "transferd-cuda-end", leave, LEAVE_S)

    def _leave(self, _client: Any) -> None:
        """Has the client, whose segment is unmapped when nobody has it any more."""
        self.lanes.destroy()
        self.mappings.close()
        with contextlib.suppress(errors.TransferdError):
            self.flusher.close()
        with contextlib.suppress(errors.TransferdError):
            self._unregister()
        for device in self._contexts:
            with contextlib.suppress(errors.TransferdError):
                self.driver.context_release(device)

    def _unregister(self) -> None:
        if self._segment and not self._lent:
            with self.driver.entered(next(iter(self._contexts.values()))):
                self.driver.host_unregister(self._registered)
