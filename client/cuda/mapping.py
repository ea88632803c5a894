# SPDX-License-Identifier: Apache-2.0
"""Other processes' GPU memory, mapped into this one: once for each allocation and device.

A mapping is given back when its owner takes it back (MapRevoked), once the streams that use it are
idle, and with the session.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from typing import TYPE_CHECKING, Any

from transferd.client import errors
from transferd.client.cuda.driver import CudaError
from transferd.client.cuda.workers import Workers
from transferd.native.client_half import lib
from transferd.v1 import attach_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from transferd.client.cuda.driver import Driver
    from transferd.client.cuda.gpu import Gpu
    from transferd.client.cuda.lanes import Lane

# Refusals that stay what they are for a descriptor: it is not to be asked for again.
_FOR_GOOD = frozenset({"MAP_NOT_GRANTED", "MAP_OTHER_HOST", "MAP_OTHER_TENANT"})
# Those that the job itself will tell better.
_FOR_NOW = frozenset({"OPEN_NOT_FOUND", "GRANT_REVOKED", "GRANT_EXPIRED", "MAP_NOT_FOUND"})
# What CUresults mean of a handle.
_GONE = "the grant's memory is gone: its owner freed it before it closed the region"
_OF_HANDLES = {
    1: _GONE,
    400: _GONE,
    201: "the handle is of an allocation of this very process, which CUDA opens in others alone: "
    "have it granted by a Client of this process",
}
REVOKERS = 4  # threads that give mappings back; each waits for streams
POLL_S = 0.0002


class _Opened:
    """An allocation, mapped for one device.

    Attributes:
        address: Where it begins here.
        users: Grants that are reached by it.
        close: Unmaps it.
        waits: Whether that waits for every stream of the device's context.
    """

    __slots__ = ("address", "close", "users", "waits")

    def __init__(self, address: int, close: Callable[[], None], *, waits: bool = False) -> None:
        self.address = address
        self.users = 0
        self.close = close
        self.waits = waits


class Mapped:
    """A grant that this process reaches by its own streams.

    Attributes:
        map_id: The daemon's number.
        address: Of the grant's first byte, for the device.
        length: Bytes of the grant.
        device: Ordinal of the device that it is mapped for.
        revoked: Its owner takes it back: no new use.
    """

    __slots__ = (
        "_active", "_opened", "_pins", "_uses", "address", "allocation", "device", "length",
        "map_id", "revoked",
    )  # fmt: skip

    def __init__(self, opened: _Opened, answer: Any, device: int) -> None:
        self._opened = opened
        self._active = 0  # submissions under way
        self._pins = 0  # pointers that the application holds
        # Of a lane whose copies wait for words the newest value; of others, where all are soon
        # through, 0.
        self._uses: dict[Lane, int] = {}
        self.map_id: int = answer.map_id
        self.allocation: int = answer.allocation
        self.address = opened.address + int(answer.offset_bytes)
        self.length: int = answer.length_bytes
        self.device = device
        self.revoked = False


class Mappings:
    """Those of one session."""

    def __init__(self, gpu: Gpu) -> None:
        """Has none yet."""
        self._gpu = gpu
        self._driver: Driver = gpu.driver
        self._lock = threading.Lock()  # guards what follows, and the counts of each Mapped
        self._by_grant: dict[tuple[bytes, int], Mapped] = {}
        self._by_number: dict[int, Mapped] = {}
        self._opened: dict[tuple[int, int], _Opened] = {}
        self._refused: dict[bytes, str] = {}
        self._opening = threading.Lock()  # held while one is asked for and mapped
        self._revoked_early: set[int] = set()  # told before their answer was read
        self._revokers = Workers(gpu.driver, "transferd-unmap", REVOKERS)
        # For each device one, for what waits for its context: others are unmapped meanwhile.
        self._closers: dict[int, Workers] = {}
        self._closed = False

    def known(self, descriptor: bytes, device: int) -> Mapped | None:
        """Finds a grant that is mapped. Never waits."""
        return self._by_grant.get((descriptor, device))

    def settled(self, descriptor: bytes, device: int) -> bool:
        """Tells whether :meth:`find` would ask nobody."""
        return (descriptor, device) in self._by_grant or descriptor in self._refused

    def refusal(self, descriptor: bytes) -> str:
        """Tells why a grant cannot be mapped."""
        return self._refused.get(descriptor, "it is not mapped")

    def find(self, descriptor: bytes, device: int) -> Mapped | None:
        """Maps a grant for a device; None: it cannot be, and its jobs go by the daemon.

        Raises:
            TransferdError: The daemon did not answer, or the driver refused.
        """
        mapped = self._by_grant.get((descriptor, device))
        if mapped is not None or descriptor in self._refused:
            return mapped
        with self._opening:
            mapped = self._by_grant.get((descriptor, device))
            if mapped is not None or descriptor in self._refused:
                return mapped
            try:
                return self._open(descriptor, device)
            except errors.TransferdError as error:
                if error.reason in _FOR_GOOD:
                    self._refused[descriptor] = str(error)
                elif error.reason not in _FOR_NOW:
                    raise
                return None

    # ---- use ----

    def begin(self, used: Iterable[Mapped]) -> bool:
        """Says that a copy is about to be enqueued; False: one of them is being taken back."""
        with self._lock:
            if self._closed:
                return False
            for mapped in used:
                if mapped.revoked:
                    return False
            for mapped in used:
                mapped._active += 1
            return True

    def end(self, used: Iterable[Mapped], lane: Lane | None, value: int) -> None:
        """It is enqueued as this value of a lane, or was not."""
        with self._lock:
            for mapped in used:
                mapped._active -= 1
                if lane is not None:
                    mapped._uses[lane] = value if lane.armed else 0

    def begin_one(self, mapped: Mapped) -> bool:
        """As :meth:`begin`."""
        with self._lock:
            if self._closed or mapped.revoked:
                return False
            mapped._active += 1
            return True

    def end_one(self, mapped: Mapped, lane: Lane) -> None:
        """As :meth:`end`, of a lane that waits for nothing."""
        with self._lock:
            mapped._active -= 1
            mapped._uses[lane] = 0

    def pin(self, mapped: Mapped) -> bool:
        """The application holds its address; False: it is being taken back."""
        with self._lock:
            if self._closed or mapped.revoked:
                return False
            mapped._pins += 1
            return True

    def unpin(self, mapped: Mapped) -> None:
        """It does so no more."""
        with self._lock:
            mapped._pins -= 1
            last = mapped.revoked and not mapped._pins and not self._closed
        if last:
            self._give_back(mapped)

    # ---- mapping ----

    def _open(self, descriptor: bytes, device: int) -> Mapped:
        gpu = self._gpu
        handle = gpu.session.open(descriptor)
        answer, fds = self._ask(attach_pb2.MapRequest(handle=handle))
        try:
            key = (answer.allocation, device)
            with self._lock:
                opened = self._opened.get(key)
            if opened is None:
                while len(fds) < answer.chunk_count:
                    more, more_fds = self._ask(
                        attach_pb2.MapRequest(map_id=answer.map_id, first_chunk=len(fds))
                    )
                    answer.chunk_bytes.extend(more.chunk_bytes)
                    fds += more_fds
                with self._driver.entered(gpu.context(device)):
                    opened = self._map(answer, fds, device)
        except BaseException:
            self._unmap_tell(answer.map_id)
            raise
        finally:
            for fd in fds:
                os.close(fd)
        return self._keep(Mapped(opened, answer, device), opened, key, descriptor)

    def _keep(
        self, mapped: Mapped, opened: _Opened, key: tuple[int, int], descriptor: bytes
    ) -> Mapped:
        with self._lock:
            opened.users += 1
            self._opened[key] = opened
            self._by_number[mapped.map_id] = mapped
            early = mapped.map_id in self._revoked_early
            self._revoked_early.discard(mapped.map_id)
            if not early:
                self._by_grant[descriptor, mapped.device] = mapped
        if early:
            self.revoke(mapped.map_id)
        return mapped

    def _ask(self, request: Any) -> tuple[Any, list[int]]:
        response, fds = self._gpu.session.ask(attach_pb2.FdRequest(map=request))
        return response.map, fds

    def _map(self, answer: Any, fds: list[int], device: int) -> _Opened:
        driver = self._driver
        owner = self._gpu.device_of(answer.device_uuid)
        own = answer.base if answer.own_process else self._gpu.allocations.own(answer.allocation)
        if own:
            if owner not in (device, -1):
                driver.peer_enable(self._gpu.context(owner))
            return _Opened(own, lambda: None)
        if owner < 0 and not answer.chunk_count:
            raise _not_visible("")
        if answer.chunk_count:
            try:
                return self._map_chunks(list(answer.chunk_bytes), fds, device)
            except CudaError as error:
                if owner < 0:
                    raise _not_visible(f" ({error})") from None
                raise
        try:
            address = driver.ipc_open(answer.ipc_handle)
        except CudaError as error:
            remedy = _OF_HANDLES.get(error.result, "")
            raise driver.error(error.call, error.result, remedy) from None
        context = self._gpu.context(device)

        def close() -> None:
            with driver.entered(context):
                driver.ipc_close(address)

        try:
            self._check_size(address, answer.size_bytes)
        except BaseException:
            close()
            raise
        return _Opened(address, close, waits=True)

    def _check_size(self, address: int, said: int) -> None:
        """Its owner is not believed: a copy past the end would cost this process its context."""
        base, length = self._driver.address_range(address)
        if base + length - address < said:
            raise errors.Conflict(
                f"the grant's memory has {base + length - address} bytes, and was registered with "
                f"{said}: have its owner register what it has",
                reason="MEMORY_SHORTER",
            )

    def _map_chunks(self, sizes: list[int], fds: list[int], device: int) -> _Opened:
        driver = self._driver
        total = sum(sizes)
        base = driver.reserve(total)
        mapped: list[tuple[int, int]] = []

        def close() -> None:
            while mapped:
                driver.chunk_unmap(*mapped.pop())
            driver.unreserve(base, total)

        try:
            for size, fd in zip(sizes, fds, strict=True):
                at = base + sum(length for _, length in mapped)
                chunk = driver.chunk_import(fd)
                try:
                    driver.chunk_map(at, size, chunk)
                finally:
                    driver.chunk_release(chunk)  # it lives as long as it is mapped
                mapped.append((at, size))
            driver.access_set(base, total, device)
        except BaseException:
            with contextlib.suppress(errors.TransferdError):
                close()
            raise
        context = self._gpu.context(device)

        def close_entered() -> None:
            with driver.entered(context):
                close()

        return _Opened(base, close_entered)

    # ---- giving back ----

    def revoke(self, map_id: int) -> None:
        """Its owner takes it back; called by the reader of the fd socket. Does not wait."""
        with self._lock:
            mapped = self._by_number.get(map_id)
            if self._closed:
                return
            if mapped is None:
                self._revoked_early.add(map_id)
                return
            mapped.revoked = True
            self._forget(mapped)
            if not mapped._pins:
                self._revokers.submit(functools.partial(self._give_back, mapped))

    def _forget(self, mapped: Mapped) -> None:
        for key in [key for key, other in self._by_grant.items() if other is mapped]:
            del self._by_grant[key]

    def _give_back(self, mapped: Mapped) -> None:
        while not self._is_idle(mapped) and not self._closed:
            time.sleep(POLL_S)
        with self._lock:
            if self._closed or self._by_number.pop(mapped.map_id, None) is None:
                return
            opened = self._drop(mapped)
            if opened is not None and opened.waits:
                self._closer(mapped.device).submit(
                    functools.partial(self._unmap, opened, mapped.map_id)
                )
                return
        self._unmap(opened, mapped.map_id)

    def _unmap(self, opened: _Opened | None, map_id: int) -> None:
        if opened is not None:
            self._close_opened(opened)
        self._unmap_tell(map_id)

    def _closer(self, device: int) -> Workers:
        """Under the lock."""
        if device not in self._closers:
            self._closers[device] = Workers(self._driver, "transferd-unmap-ipc", 1)
        return self._closers[device]

    def _drop(self, mapped: Mapped) -> _Opened | None:
        """Takes a user from what is opened; tells it if that was the last. Under the lock."""
        opened = mapped._opened
        opened.users -= 1
        if opened.users:
            return None
        for key in [key for key, other in self._opened.items() if other is opened]:
            del self._opened[key]
        return opened

    def _is_idle(self, mapped: Mapped) -> bool:
        """Tells whether no stream of ours will write by it any more."""
        with self._lock:
            if mapped._active:
                return False
            for lane, value in mapped._uses.items():
                if not value:
                    mapped._uses[lane] = lane.last
            uses = list(mapped._uses.items())
        return all(not lib.tfd_lane_settle(lane.native, value) for lane, value in uses)

    @staticmethod
    def _close_opened(opened: _Opened) -> None:
        with contextlib.suppress(errors.TransferdError):  # a context that has failed has none left
            opened.close()

    def _unmap_tell(self, map_id: int) -> None:
        with contextlib.suppress(errors.TransferdError):  # no daemon: it went with the session
            self._gpu.session.ask(
                attach_pb2.FdRequest(unmap=attach_pb2.UnmapRequest(map_id=map_id))
            )

    def shut(self) -> None:
        """Lets nothing begin any more."""
        with self._lock:
            self._closed = True

    def close(self) -> None:
        """Unmaps all; the streams are idle, or their contexts gone. After :meth:`shut`.

        Waits as long as the driver does.
        """
        with self._lock:
            self._by_grant.clear()
            self._by_number.clear()
            opened = list(self._opened.values())
            self._opened.clear()
            closers = list(self._closers.values())
        for workers in (self._revokers, *closers):
            workers.close()
        for one in opened:
            self._close_opened(one)


def _not_visible(said: str) -> errors.Unavailable:
    return errors.Unavailable(
        "the grant's memory is of a GPU that this process does not see: add it to "
        f"CUDA_VISIBLE_DEVICES{said}",
        reason="GPU_NOT_VISIBLE",
    )


class DevicePointer(int):
    """An address of mapped GPU memory; a number, for kernels. Unmapped by :meth:`close`.

    Attributes:
        length: Bytes that the grant is on.
        device: Ordinal of the device that it is mapped for.
    """

    length: int
    device: int
    _close: Callable[[], None]

    @classmethod
    def of(cls, mapped: Mapped, close: Callable[[], None]) -> DevicePointer:
        """Makes one of a mapping; not for users."""
        made = cls(mapped.address)
        made.length = mapped.length
        made.device = mapped.device
        made._close = close
        return made

    def close(self) -> None:
        """Gives it back: no kernel of the application's uses it any more. Idempotent."""
        close, self._close = self._close, lambda: None
        close()

    def __enter__(self) -> DevicePointer:
        """Closed at its end."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
