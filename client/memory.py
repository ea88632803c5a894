# SPDX-License-Identifier: Apache-2.0
"""Memory that jobs read from and grants let others write to.

:func:`allocate` makes new memory; :func:`adopt` takes a tensor or array that exists already, in
place.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
from typing import TYPE_CHECKING, Any

from transferd.client import errors
from transferd.client.closing import Closing
from transferd.client.grant import Grant, to_expires_ms, to_imms, to_rights
from transferd.client.session import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import DTypeLike, NDArray

    from transferd.client.cuda.allocation import Allocation
    from transferd.client.cuda.arrays import DeviceArray
    from transferd.client.session import Session

LENGTH_MAX = 1 << 40
NUMA_NODES = "/sys/devices/system/node"


def check_near(near: int | str | None) -> None:
    """Checks a placement: None, a NUMA node's number, or "numa:N".

    There is one domain group, so all lead there.

    Raises:
        InvalidRequest: No such node.
    """
    if near is None:
        return
    match = re.fullmatch(r"(?:numa:)?(\d+)", str(near)) if not isinstance(near, bool) else None
    if match is None:
        raise errors.InvalidRequest(f'near is a NUMA node, as 0 or "numa:0", or None, not {near!r}')
    node = int(match[1])
    if node and not os.path.isdir(f"{NUMA_NODES}/node{node}"):
        raise errors.InvalidRequest(f"near: this host has no NUMA node {node}")


def round_up(length: int) -> int:
    """Rounds up to whole pages."""
    return -(-length // PAGE_BYTES) * PAGE_BYTES


class RegionSlice:
    """Part of a region: ``region[a:b]``.

    Attributes:
        region: The region.
        start: First byte, in what is registered.
        length: Bytes.
        source: As of the region.
    """

    __slots__ = ("_offset", "length", "region", "source", "start")

    def __init__(self, region: BaseRegion, offset: int, length: int) -> None:
        self.region = region
        self._offset = offset
        self.start = region.start + offset
        self.length = length
        self.source = region.source

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return f"<RegionSlice [{self._offset}:{self._offset + self.length}] of {self.region!r}>"

    def __getitem__(self, part: slice) -> RegionSlice:
        """Narrows the slice further."""
        first, last = slice_bounds(part, self.length)
        return RegionSlice(self.region, self._offset + first, last - first)

    def open_handle(self) -> int:
        """The region's handle, for jobs."""
        return self.region.open_handle()

    @property
    def view(self) -> memoryview:
        """The bytes, writable, without a copy."""
        return self.region.view[self._offset : self._offset + self.length]

    def numpy(self, dtype: DTypeLike = "uint8") -> NDArray[Any]:
        """The bytes as a numpy array of one dimension, without a copy."""
        return view_as_numpy(self.view, dtype)

    def torch(self, dtype: Any = None) -> Any:
        """The bytes as a torch tensor of one dimension, without a copy; uint8 by default."""
        return view_as_torch(self.view, dtype)


def slice_bounds(part: slice, length: int) -> tuple[int, int]:
    """Checks ``[a:b]``; unlike with sequences, what lies outside is an error.

    Raises:
        InvalidRequest: Step, type or bounds.
    """
    if not isinstance(part, slice) or part.step not in (None, 1):
        raise errors.InvalidRequest(f"a part of a region is region[a:b] in bytes, not [{part!r}]")
    first = 0 if part.start is None else part.start
    last = length if part.stop is None else part.stop
    if not isinstance(first, int) or not isinstance(last, int):
        raise errors.InvalidRequest(f"region[a:b] takes numbers of bytes, not [{first!r}:{last!r}]")
    first, last = (at + length if at < 0 else at for at in (first, last))
    if not 0 <= first <= last <= length:
        raise errors.InvalidRequest(
            f"[{part.start}:{part.stop}] is not inside the {length} bytes", reason="SOURCE_BOUNDS"
        )
    return first, last


def view_as_numpy(view: memoryview, dtype: DTypeLike) -> NDArray[Any]:
    """Makes an array over a view; numpy is imported only here."""
    import numpy as np

    kind = np.dtype(dtype)
    if len(view) % kind.itemsize:
        raise errors.InvalidRequest(f"{len(view)} bytes are no whole number of {kind} elements")
    return np.frombuffer(view, dtype=kind)


def view_as_torch(view: memoryview, dtype: Any) -> Any:
    """Makes a tensor over a view; torch is imported only here."""
    import torch

    kind = torch.uint8 if dtype is None else dtype
    if len(view) % kind.itemsize:
        raise errors.InvalidRequest(f"{len(view)} bytes are no whole number of {kind} elements")
    if not len(view):
        return torch.empty(0, dtype=kind)
    return torch.frombuffer(view, dtype=kind)


class BaseRegion:
    """What both faces of a region have.

    Attributes:
        handle: The daemon's number for it.
        start: Bytes of what is registered before its first byte: of adopted memory, of GPU memory.
        length: Bytes.
        name: Shown by transferctl.
        source: The allocation of GPU memory; None for host memory.
    """

    __slots__ = (
        "_closed", "_grants", "_owner", "_session", "_view", "handle", "length", "name", "source",
        "start",
    )  # fmt: skip

    def __init__(
        self,
        session: Session,
        handle: int,
        view: memoryview | None,
        *,
        start: int = 0,
        length: int = 0,
        name: str = "",
        owner: object = None,
        source: Allocation | None = None,
    ) -> None:
        """Makes the region; not for users.

        Args:
            session: That registered it.
            handle: From the daemon.
            view: Its bytes; None: the host cannot read them.
            start: See the class.
            length: See the class; without a view.
            name: See the class.
            owner: Kept alive as long as the region: whoever frees the memory.
            source: See the class.
        """
        self._session = session
        self._view = view
        self._owner = owner
        self._closed = False
        self.handle = handle
        self.start = start
        self.length = length if view is None else len(view)
        self.name = name
        self.source = source
        self._grants: list[int] = []  # of GPU memory: other regions have the same handle

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name or self.handle}: {self.length} bytes>"

    def __getitem__(self, part: slice) -> RegionSlice:
        """Names a part, as the source of a job: ``region[a:b]`` in bytes."""
        first, last = slice_bounds(part, self.length)
        return RegionSlice(self, first, last - first)

    @property
    def without_nics(self) -> str:
        """Of GPU memory: why no NIC reaches it by itself; empty: some do, or it is host memory."""
        return "" if self.source is None else self.source.without_nics

    def open_handle(self) -> int:
        """The handle, for jobs; raises once the region is closed."""
        if self._closed:
            raise errors.InvalidRequest(f"{self!r} is closed", reason="BAD_REGION")
        return self.handle

    @property
    def view(self) -> memoryview:
        """The bytes, writable, without a copy.

        Raises:
            InvalidRequest: It is GPU memory.
        """
        if self._view is None:
            raise errors.InvalidRequest(
                f"{self!r} is GPU memory, which the host cannot read: use the tensor that was "
                "registered",
                reason="DEVICE_MEMORY",
            )
        return self._view

    def numpy(self, dtype: DTypeLike = "uint8") -> NDArray[Any]:
        """The bytes as a numpy array of one dimension, without a copy."""
        return view_as_numpy(self.view, dtype)

    def torch(self, dtype: Any = None) -> Any:
        """The bytes as a torch tensor of one dimension, without a copy; uint8 by default."""
        return view_as_torch(self.view, dtype)

    def _grant(
        self,
        offset: int,
        length: int | None,
        rights: Iterable[str],
        imms: Iterable[int],
        expires_s: float | None,
    ) -> tuple[int, bytes, range, int]:
        handle = self.open_handle()
        chosen_rights = to_rights(rights)
        chosen = to_imms(imms)
        expires_ms = to_expires_ms(expires_s)
        if not isinstance(offset, int) or offset < 0:  # as a slice it would count from the end
            raise errors.InvalidRequest(f"offset is a number of bytes from 0 on, not {offset!r}")
        if length is not None and (not isinstance(length, int) or length < 1):
            raise errors.InvalidRequest(f"length is a number of bytes from 1 on, not {length!r}")
        first, last = slice_bounds(
            slice(offset, None if length is None else offset + length), self.length
        )
        if first == last:
            raise errors.InvalidRequest("a grant has at least one byte")
        grant_id, descriptor = self._session.grant_create(
            handle, self.start + first, last - first, chosen_rights, chosen, expires_ms
        )
        if self.source is not None:
            self._grants.append(grant_id)
        return grant_id, descriptor, chosen, last - first

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._session.closed:
            return
        if self.source is not None:
            try:
                self._close_device(self.source)
            except BaseException:  # STILL_MAPPED, as a rule: another call tries again
                self._closed = False
                raise
            return
        # Not found, or no daemon: it went with the session.
        with contextlib.suppress(errors.NotFound, errors.Unavailable):
            self._session.region_remove(self.handle)

    def _close_device(self, source: Allocation) -> None:
        while self._grants:
            with contextlib.suppress(errors.NotFound, errors.Unavailable):
                self._session.grant_revoke(self._grants[-1])
            self._grants.pop()
        with contextlib.suppress(errors.Unavailable):  # it went with the session
            self._session.gpu().allocations.give_back(source)


class Region(BaseRegion, Closing):
    """A region of a :class:`transferd.Client`; a context manager that deregisters it."""

    __slots__ = ()

    def grant(
        self,
        offset: int = 0,
        length: int | None = None,
        rights: Iterable[str] = ("write",),
        imms: Iterable[int] = (),
        expires_s: float | None = None,
    ) -> Grant:
        """Gives others the right to write into part of the region.

        Args:
            offset: First byte.
            length: Bytes; None: up to the region's end.
            rights: Of "write", "read" and "map". With "map", processes of the same host and tenant
                map GPU memory and copy into it by their own streams; it exposes the whole
                allocation that the tensor is part of.
            imms: Immediates that the holders may bump, without gaps; each gets a counter now.
            expires_s: How long the grant lasts; None: until it is revoked.

        Returns:
            The grant; its ``descriptor`` is what the holders need.

        Raises:
            InvalidRequest: A value is out of range.
            QuotaExceeded: Not so many counters are left.
        """
        return Grant(self._session, *self._grant(offset, length, rights, imms, expires_s))

    def close(self) -> None:
        """Revokes its grants and deregisters it; no byte can land in it afterwards. Idempotent.

        The memory itself lives as long as views of it do.
        """
        self._close()


def allocate(
    session: Session, length: int, near: int | str | None, name: str
) -> tuple[int, memoryview]:
    """Makes and registers new memory, zeroed.

    Returns:
        Handle and bytes.
    """
    if not isinstance(length, int) or isinstance(length, bool) or not 0 < length <= LENGTH_MAX:
        raise errors.InvalidRequest(f"a region has 1 to {LENGTH_MAX} bytes, not {length!r}")
    check_near(near)
    session.check_open()
    rounded = round_up(length)
    memory = session.memory_create(rounded)
    try:
        view = memoryview(mmap.mmap(memory.fd, rounded))[:length]
        handle = session.memory_register(memory, rounded, name)
    finally:
        os.close(memory.fd)
    return handle, view


def register_device(
    session: Session, array: DeviceArray, near: int | str | None, name: str
) -> Allocation:
    """Registers GPU memory; gives the allocation that it is part of."""
    if near is not None:
        check_near(near)
    session.check_open()
    return session.gpu().register(array, name)
