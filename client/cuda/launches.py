# SPDX-License-Identifier: Apache-2.0
"""Plans whose launches a stream copies: what is found out once, when the plan is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from transferd.client.session import FLAG_EXACT, OP_READ, OP_SCATTER, OP_WRITE, Request
from transferd.native.client_half import ffi, lib

if TYPE_CHECKING:
    from transferd.client.cuda.allocation import Allocation
    from transferd.client.cuda.mapping import Mapped

FLAG_COPIED = int(lib.TFD_FLAG_COPIED)
_new = ffi.new


class CopiedPlan(NamedTuple):
    """What each launch needs beside the plan's number.

    Attributes:
        source: GPU memory that it reads from; of a read: writes to.
        mapped: Its destinations, in the order of its targets; of a read: where it reads.
        used: The same, each once.
        priority: Of its jobs.
        length: Of a plain write or read, to choose a lane by; 0: of any other.
        stream: Of the caller's, which copies; None: one of ours.
    """

    source: Allocation
    mapped: tuple[Mapped, ...]
    used: tuple[Mapped, ...]
    priority: int
    length: int
    stream: Any

    @staticmethod
    def of(request: Request) -> Request:
        """What the daemon keeps: its counts follow all bytes in any case."""
        return request._replace(flags=request.flags & ~FLAG_EXACT | FLAG_COPIED)

    def places(self, request: Request, table: Any) -> tuple[Any, Any]:
        """Adds the places to a table, or makes one; returns it, and what it points to."""
        if table == ffi.NULL:
            table = _new("struct tfd_client_table *")
        return table, put_places(request, table[0], self.mapped)


def copied_plan(request: Request, mapped: tuple[Mapped, ...], table: bool) -> CopiedPlan:
    """Puts together what launches need of a request whose destinations are mapped."""
    assert request.source is not None
    plain = request.op in (OP_WRITE, OP_READ) and not table
    return CopiedPlan(
        request.source,
        mapped,
        tuple(dict.fromkeys(mapped)),
        request.priority,
        request.length if plain else 0,
        request.stream,
    )


def put_places(request: Request, table: Any, mapped: tuple[Mapped, ...]) -> tuple[Any, Any]:
    """Says where the grants of targets, or members, are mapped; returns what is pointed to."""
    places = _new("uint64_t[]", [one.address for one in mapped])
    ends = _new("uint64_t[]", [one.length for one in mapped])
    table.places, table.ends = places, ends
    if request.op == OP_SCATTER and request.rows is None:
        assert request.source is not None
        table.src_end = request.source.length
    return places, ends
