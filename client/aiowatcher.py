# SPDX-License-Identifier: Apache-2.0
"""The asyncio face of a watcher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transferd.client.watcher import BaseWatcher

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self


class Watcher(BaseWatcher):
    """A watcher of a :class:`transferd.aio.Client`: ``async with``. Bumping it never waits."""

    __slots__ = ("_runtime",)

    def __init__(self, runtime: Any, slot: int, device: bool) -> None:
        super().__init__(runtime.session, slot, device)
        self._runtime = runtime

    async def close(self) -> None:
        """Ends the jobs that still wait for it. As :meth:`transferd.Watcher.close`."""
        await self._runtime.run(self._close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
