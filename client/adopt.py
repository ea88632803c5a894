# SPDX-License-Identifier: Apache-2.0
"""Adopting memory that exists already: its pages become shared memory in place, its address stays.

Only whole pages can be shared, so it is right only where those pages hold nothing else: an
allocation that malloc gave a mapping of its own (glibc: from about 128 KiB, at most 32 MiB, on;
more often the larger it is), or a private anonymous mapping. glibc's chunk header says so; anything
that does not show it is refused, with what to do instead.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from transferd.client import errors
from transferd.client.memory import check_near, round_up
from transferd.client.session import PAGE_BYTES
from transferd.native.client_half import ffi, lib

if TYPE_CHECKING:
    from transferd.client.session import Session

# malloc.c of glibc: the word before the pointer is the chunk's size with flags in the low bits; for
# a chunk of its own mapping the word before that is the distance to the mapping's start.
WORD_BYTES = 8
HEADER_BYTES = 2 * WORD_BYTES
IS_MMAPPED = 0x2
FLAG_BITS = 0x7

INSTEAD = "use alloc(), and copy into its view"


class Adopted(NamedTuple):
    """Pages that were made shared once: they can be again, when their session is over."""

    start: int
    length: int
    path: str
    session: weakref.ref[Session]


_adopted: dict[int, Adopted] = {}  # by start
_lock = threading.Lock()


class Mapping(NamedTuple):
    """A line of /proc/self/maps, or several of one kind that follow each other without a gap."""

    start: int
    stop: int
    permissions: str
    path: str
    edges: frozenset[int]  # where its lines begin and end


def buffer_of(memory: Any) -> tuple[int, int]:
    """Tells address and length in bytes of a torch tensor, numpy array or writable buffer.

    Raises:
        InvalidRequest: It is on a GPU, not contiguous, empty, read-only or no buffer at all.
    """
    if hasattr(memory, "data_ptr") and hasattr(memory, "is_contiguous"):
        return _tensor(memory)
    try:
        view = memoryview(memory)
    except TypeError:
        raise errors.InvalidRequest(
            f"register() takes a tensor, array or buffer, not {type(memory).__name__}"
        ) from None
    if not view.c_contiguous:
        raise errors.InvalidRequest("the array is not contiguous; register its base, or a copy")
    if view.readonly:
        raise errors.InvalidRequest(f"the memory is read-only; {INSTEAD}")
    if not view.nbytes:
        raise errors.InvalidRequest("the memory is empty")
    address = int(ffi.cast("uintptr_t", ffi.from_buffer(view.cast("B"))))
    return address, view.nbytes


def _tensor(tensor: Any) -> tuple[int, int]:
    device = str(tensor.device)
    if device != "cpu":
        raise errors.InvalidRequest(
            f"the tensor is on {device}, which is neither host memory nor CUDA: {INSTEAD}"
        )
    if not tensor.is_contiguous():
        raise errors.InvalidRequest("the tensor is not contiguous; register its base, or a copy")
    length = tensor.numel() * tensor.element_size()
    if not length:
        raise errors.InvalidRequest("the tensor is empty")
    return tensor.data_ptr(), length


def mapping_of(address: int, length: int) -> Mapping | None:
    """Finds what holds a range, of one kind throughout.

    The kernel splits a mapping where advice for it differs (numpy asks for huge pages in the
    middle of its arrays), so lines that follow each other count as one.
    """
    found: Mapping | None = None
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            fields = line.split(maxsplit=5)
            start, stop = (int(word, 16) for word in fields[0].split("-"))
            kind = (fields[1], fields[5].strip() if len(fields) > 5 else "")
            if found is not None and found.stop == start and found[2:4] == kind:
                found = Mapping(found.start, stop, *kind, found.edges | {stop})
            elif found is not None and found.start <= address and address + length <= found.stop:
                return found
            else:
                found = Mapping(start, stop, *kind, frozenset((start, stop)))
    return None


def own_pages(address: int, length: int) -> tuple[int, int]:
    """Finds the pages of an allocation that nothing else lives in.

    Returns:
        Start and length of the pages.

    Raises:
        InvalidRequest: They cannot be shown to be its own.
    """
    mapping = mapping_of(address, length)
    if mapping is None:
        raise errors.InvalidRequest(f"the memory is not all mapped in the same way; {INSTEAD}")
    if not mapping.permissions.startswith("rw"):
        raise errors.InvalidRequest(f"the memory is not writable; {INSTEAD}")
    if mapping.permissions[3] == "s":
        return _left_over(mapping, address, length)
    if mapping.path and not mapping.path.startswith("[anon"):
        where = "the heap" if mapping.path == "[heap]" else mapping.path
        raise errors.InvalidRequest(f"the memory is part of {where}; {INSTEAD}")
    if {address, address + round_up(length)} <= mapping.edges:
        return address, round_up(length)
    chunk = _chunk(mapping, address, length)
    if chunk is None:
        raise errors.InvalidRequest(
            "the memory shares its pages with others (malloc gives only large allocations "
            f"pages of their own; this one has {length} bytes); {INSTEAD}"
        )
    return chunk


def _left_over(mapping: Mapping, address: int, length: int) -> tuple[int, int]:
    """Finds pages that a session adopted which is over."""
    with _lock:
        for one in _adopted.values():
            if not one.start <= address <= address + length <= one.start + one.length:
                continue
            if mapping.path == one.path and _is_over(one.session()):
                return one.start, one.length
    raise errors.InvalidRequest(
        "the memory is shared already (a region's own view, or another library's); "
        f"use that region, or {INSTEAD}"
    )


def _is_over(session: Session | None) -> bool:
    if session is None:
        return True
    try:
        session.check_open()
    except errors.Unavailable:
        return True
    return False


def _remember(session: Session, start: int, length: int) -> None:
    mapping = mapping_of(start, length)
    with _lock:
        for one in list(_adopted.values()):  # what was there before is gone
            if one.start < start + length and start < one.start + one.length:
                del _adopted[one.start]
        if mapping is not None:
            _adopted[start] = Adopted(start, length, mapping.path, weakref.ref(session))


def _chunk(mapping: Mapping, address: int, length: int) -> tuple[int, int] | None:
    """Reads glibc's header before an allocation; None unless it is a whole mapping of its own."""
    if address - HEADER_BYTES < mapping.start or address % HEADER_BYTES:
        return None
    before = ctypes.c_uint64.from_address(address - HEADER_BYTES).value
    word = ctypes.c_uint64.from_address(address - WORD_BYTES).value
    if not word & IS_MMAPPED or word & (FLAG_BITS & ~IS_MMAPPED):
        return None
    start = address - HEADER_BYTES - before
    stop = address - HEADER_BYTES + (word & ~FLAG_BITS)
    inside = mapping.start <= start and stop <= mapping.stop and address + length <= stop
    if start % PAGE_BYTES or stop % PAGE_BYTES or not inside:
        return None
    return start, stop - start


def adopt(
    session: Session, memory: Any, near: int | str | None, name: str
) -> tuple[int, memoryview, int]:
    """Shares the pages of existing memory and registers them. Nobody may write to it meanwhile.

    Memory that was adopted for a session which is over is adopted again, with what is in it.

    Returns:
        Handle, bytes, and how far behind the registered start they begin.
    """
    check_near(near)
    session.check_open()
    address, length = buffer_of(memory)
    start, pages_length = own_pages(address, length)
    made = session.memory_create(pages_length)
    try:
        rc = lib.tfd_memory_adopt(ffi.cast("void *", start), pages_length, made.fd)
        if rc:
            raise errors.QuotaExceeded(
                f"the memory cannot be copied into shared pages: {os.strerror(-rc)}",
                reason=errno.errorcode.get(-rc, "INTERNAL"),
            )
        _remember(session, start, pages_length)
        handle = session.memory_register(made, pages_length, name)
    finally:
        os.close(made.fd)
    view = memoryview(ffi.buffer(ffi.cast("char *", address), length))
    return handle, view.cast("B"), address - start
