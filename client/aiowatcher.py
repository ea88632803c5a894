# SPDX-License-Identifier: Apache-2.0
"""The asyncio faces of watchers and plans."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from transferd.client.closing import AsyncClosing
from transferd.client.plan import BasePlan, Kept
from transferd.client.watcher import BaseWatcher

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from transferd.client.session import Request

J = TypeVar("J")


class Watcher(BaseWatcher, AsyncClosing):
    """A watcher of a :class:`transferd.aio.Client`: ``async with``. Bumping it never waits."""

    __slots__ = ("_runtime",)

    def __init__(self, runtime: Any, slot: int, device: bool) -> None:
        super().__init__(runtime.session, slot, device)
        self._runtime = runtime

    async def close(self) -> None:
        """Ends the jobs that still wait for it. As :meth:`transferd.Watcher.close`."""
        await self._runtime.run(self._close)


class Plan(BasePlan, AsyncClosing, Generic[J]):
    """A plan of a :class:`transferd.aio.Client`: ``async with``."""

    __slots__ = ("_runtime", "_submit")

    def __init__(
        self, runtime: Any, kept: Kept, submit: Callable[[Request, float | None], Awaitable[J]]
    ) -> None:
        super().__init__(kept)
        self._runtime = runtime
        self._submit = submit

    async def launch(self, *, deadline_s: float | None = None, timeout_s: float | None = None) -> J:
        """Starts the job once more. As :meth:`transferd.Plan.launch`."""
        return await self._submit(self._launch(deadline_s), timeout_s)

    async def close(self) -> None:
        """Has the daemon forget it. As :meth:`transferd.Plan.close`."""
        await self._runtime.run(self._close)
