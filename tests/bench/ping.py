# SPDX-License-Identifier: Apache-2.0
"""Calls native/ping.c with a session of the SDK."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import cffi

from bench import build
from transferd.native.client_half import ffi as client_ffi

if TYPE_CHECKING:
    from transferd.client.session import Session

_ffi = cffi.FFI()
_ffi.cdef("""
    struct ping {
        void *client;
        uint64_t region, grant, length, spin_ns, count, counted;
        uint32_t imm, slot, first, _pad;
    };
    int ping_run(const struct ping *ping, uint64_t *called, uint64_t *seen);
""")


def run(
    session: Session,
    region: int,
    far: bytes,
    length: int,
    imm: int,
    *,
    count: int,
    counted: int,
    first: bool,
) -> tuple[list[int], list[int]]:
    """Plays one side of the ping-pong.

    Args:
        session: Attached through shared memory, with ``far`` opened.
        region: Handle of the source.
        far: Descriptor of the other side's memory.
        length: Bytes of a write.
        imm: Counted on both sides.
        count: Writes each way.
        counted: What the counter shows before the first.
        first: Whether this side begins.

    Returns:
        CLOCK_MONOTONIC of each write's call, and of each count's arrival, in ns.

    Raises:
        OSError: A write or a wait failed.
    """
    native: Any = _ffi.dlopen(str(build.ping()))
    arguments: Any = _ffi.new("struct ping *")
    pointer: Any = session.client  # type: ignore[attr-defined]
    arguments.client = _ffi.cast("void *", int(client_ffi.cast("uintptr_t", pointer)))
    arguments.region, arguments.grant = region, session.handles[far]
    arguments.length, arguments.imm, arguments.slot = length, imm, session.slots[imm]
    arguments.spin_ns = session._spin_ns  # type: ignore[attr-defined]
    arguments.first = int(first)
    arguments.count, arguments.counted = count, counted
    called, seen = _ffi.new("uint64_t[]", count), _ffi.new("uint64_t[]", count)
    rc = native.ping_run(arguments, called, seen)
    if rc:
        raise OSError(-rc, f"ping_run: {os.strerror(-rc)}")
    return list(called), list(seen)
