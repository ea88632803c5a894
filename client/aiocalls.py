# SPDX-License-Identifier: Apache-2.0
"""The calls of an asyncio Client for operations with tables, for reading, and for messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from transferd.client.aiomailbox import Mailbox
from transferd.client.aiowatcher import Plan, Watcher
from transferd.client.mailbox import Send, open_inbox
from transferd.client.operations import (
    Barrier,
    PeerGroup,
    Read,
    Scatter,
    WritePages,
    open_group,
)
from transferd.client.plan import keep
from transferd.client.watcher import Armed, take_watcher

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transferd.client.memory import BaseRegion, RegionSlice
    from transferd.client.operations import Operation
    from transferd.client.session import Request

J = TypeVar("J")


class AsyncCalls(Generic[J]):
    """What :class:`transferd.aio.Client` inherits; the same as :class:`transferd.Client` has."""

    _runtime: Any

    async def _submit(self, requests: Sequence[Request], timeout_s: float | None) -> list[J]:
        """Submits what one call of the session takes."""
        raise NotImplementedError

    async def _submit_one(self, request: Request, timeout_s: float | None) -> J:
        (part,) = self._runtime.session.parts([request])
        return (await self._submit(part, timeout_s))[0]

    async def write_pages(
        self,
        src: BaseRegion | RegionSlice,
        src_pages: Any,
        dst: bytes,
        dst_pages: Any,
        page_bytes: int,
        *,
        imm: int,
        src_stride: int | None = None,
        dst_stride: int | None = None,
        src_offset: int = 0,
        dst_offset: int = 0,
        count: str = "page",
        exact: bool = False,
        checksum: bool = False,
        priority: str = "bulk",
        deadline_s: float | None = None,
        stream: Any = None,
        timeout_s: float | None = None,
    ) -> J:
        """Writes pages of a region to pages of a grant. As :meth:`transferd.Client.write_pages`."""
        spec = WritePages(
            src=src,
            src_pages=src_pages,
            dst=dst,
            dst_pages=dst_pages,
            page_bytes=page_bytes,
            imm=imm,
            src_stride=src_stride,
            dst_stride=dst_stride,
            src_offset=src_offset,
            dst_offset=dst_offset,
            count=count,
            exact=exact,
            checksum=checksum,
            priority=priority,
            deadline_s=deadline_s,
            stream=stream,
        )
        return await self._submit_one(spec.request(), timeout_s)

    async def peer_group(self, descriptors: Sequence[bytes]) -> PeerGroup:
        """Opens descriptors ahead. As :meth:`transferd.Client.peer_group`."""
        runtime = self._runtime
        group: PeerGroup = await runtime.run(open_group, runtime.session, descriptors)
        return group

    async def scatter(
        self,
        src: BaseRegion | RegionSlice,
        targets: Any,
        *,
        imm: int,
        group: PeerGroup | None = None,
        checksum: bool = False,
        priority: str = "bulk",
        deadline_s: float | None = None,
        stream: Any = None,
        timeout_s: float | None = None,
    ) -> J:
        """Writes parts of a region into several grants. As :meth:`transferd.Client.scatter`."""
        spec = Scatter(
            src=src,
            targets=targets,
            imm=imm,
            group=group,
            checksum=checksum,
            priority=priority,
            deadline_s=deadline_s,
            stream=stream,
        )
        return await self._submit_one(spec.request(), timeout_s)

    async def barrier(
        self,
        group: PeerGroup | Sequence[bytes],
        *,
        imm: int,
        priority: str = "bulk",
        deadline_s: float | None = None,
        timeout_s: float | None = None,
    ) -> J:
        """Counts 1 at every member of a group. As :meth:`transferd.Client.barrier`."""
        spec = Barrier(group=group, imm=imm, priority=priority, deadline_s=deadline_s)
        return await self._submit_one(spec.request(), timeout_s)

    async def read(
        self,
        src: bytes,
        dst: BaseRegion | RegionSlice,
        src_offset: int = 0,
        *,
        priority: str = "bulk",
        deadline_s: float | None = None,
        stream: Any = None,
        timeout_s: float | None = None,
    ) -> J:
        """Reads from a grant into a region. As :meth:`transferd.Client.read`."""
        spec = Read(
            src=src,
            dst=dst,
            src_offset=src_offset,
            priority=priority,
            deadline_s=deadline_s,
            stream=stream,
        )
        return await self._submit_one(spec.request(), timeout_s)

    async def mailbox(self, slots: int = 64, slot_bytes: int = 4096) -> Mailbox:
        """Makes a mailbox. As :meth:`transferd.Client.mailbox`."""
        runtime = self._runtime
        inbox = await runtime.run(open_inbox, runtime.session, slots, slot_bytes)
        return Mailbox(runtime, inbox, slots, slot_bytes)

    async def send(
        self,
        dst: bytes,
        data: Any,
        *,
        deadline_s: float | None = None,
        timeout_s: float | None = None,
    ) -> J:
        """Sends a message to a mailbox. As :meth:`transferd.Client.send`."""
        spec = Send(dst=dst, data=data, deadline_s=deadline_s)
        return await self._submit_one(spec.request(), timeout_s)

    async def watcher(self, *, device: bool = False) -> Watcher:
        """Takes a watcher. As :meth:`transferd.Client.watcher`."""
        runtime = self._runtime
        return Watcher(runtime, take_watcher(runtime.session), device)

    async def arm(
        self, watcher: Watcher, value: int, job: Operation, *, timeout_s: float | None = None
    ) -> J:
        """Submits a job that a watcher starts. As :meth:`transferd.Client.arm`."""
        spec = Armed(watcher=watcher, value=value, job=job)
        return await self._submit_one(spec.request(), timeout_s)

    async def plan(
        self, job: Operation, *, table: bool = False, timeout_s: float | None = None
    ) -> Plan[J]:
        """Has the daemon keep a job. As :meth:`transferd.Client.plan`."""
        runtime = self._runtime
        kept = await runtime.run(keep, runtime.session, job, table, timeout_s)
        return Plan(runtime, kept, self._submit_one)
