# SPDX-License-Identifier: Apache-2.0
"""The asyncio face of a mailbox."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from transferd.client import errors
from transferd.client.closing import AsyncClosing
from transferd.client.mailbox import SLICE_S, BaseMailbox

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from transferd.client.mailbox import Inbox


class Mailbox(BaseMailbox, AsyncClosing):
    """A mailbox of a :class:`transferd.aio.Client`: ``async with``, and ``async for``."""

    __slots__ = ("_runtime",)

    def __init__(self, runtime: Any, inbox: Inbox, slots: int, slot_bytes: int) -> None:
        super().__init__(inbox, slots, slot_bytes)
        self._runtime = runtime

    async def receive(self, timeout_s: float | None = None) -> bytes:
        """Takes the oldest message. As :meth:`transferd.Mailbox.receive`."""
        if not self._runtime.session.shared_memory:
            return await self._ask(timeout_s)
        message = await self._watch(timeout_s)
        if getattr(self._inbox, "due", None):
            try:
                await self._runtime.run(self._inbox.settle)
            except BaseException:
                self._put_back(message)
                raise
        return message

    def _put_back(self, message: bytes) -> None:
        """It came when nobody waited for it any more: others who wait have it instead."""
        self._inbox.put_back(message)
        self._runtime.driver.kick()

    async def _watch(self, timeout_s: float | None) -> bytes:
        """Waits in the event loop, by the events of the session."""
        inbox = self._inbox
        found: list[bytes] = []

        def look() -> bool:
            if not found:
                message = inbox.take()
                if message is not None:
                    found.append(message)
            return bool(found)

        if look():
            return found[0]
        try:
            await self._runtime.until(look, timeout_s)
        except TimeoutError:
            if not found:
                raise errors.WaitTimeout(f"no message came within {timeout_s:g} s") from None
        except BaseException:
            if found:
                self._put_back(found[0])
            raise
        return found[0]

    async def _ask(self, timeout_s: float | None) -> bytes:
        """Waits by calls, in a thread; what comes after a cancel is kept for the next."""
        inbox = self._inbox
        end = None if timeout_s is None else time.monotonic() + timeout_s
        asked = False
        while True:
            message: bytes | None = inbox.kept()
            if message is not None:
                return message
            left = SLICE_S if end is None else end - time.monotonic()
            if left <= 0 and asked:
                raise errors.WaitTimeout(f"no message came within {timeout_s:g} s")
            await self._runtime.run_wait(inbox.wait, max(left, 0.0))
            asked = True

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Receives until the mailbox is closed."""
        while True:
            try:
                message = await self.receive()
            except errors.Conflict:
                return
            yield message

    async def close(self) -> None:
        """Ends the mailbox: a fence. As :meth:`transferd.Mailbox.close`."""
        await self._runtime.run(self._inbox.close)
