# SPDX-License-Identifier: Apache-2.0
"""Tasks that have an owner: nothing in the daemon runs that nobody waits for."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

T = TypeVar("T")
log = structlog.get_logger("transferd.tasks")


class TaskOwner:
    """Owns tasks that run to their end on their own, and waits for them when it closes.

    Unlike a TaskGroup it outlives a failed child: in a daemon one session's failure must not cancel
    the others. What fails is logged here, so no exception goes unseen.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, work: Coroutine[Any, Any, T], what: str) -> asyncio.Task[T]:
        """Starts work in the background.

        Args:
            work: What to run.
            what: A name for logs.

        Returns:
            The task; whoever awaits it should shield it.
        """
        task = asyncio.get_running_loop().create_task(work, name=f"{self._name}: {what}")
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        # Retrieved here so that asyncio does not complain; callers that await see it all the same.
        if not task.cancelled():
            task.exception()

    def background(self, work: Coroutine[Any, Any, Any], what: str) -> None:
        """Starts work that nobody else awaits; its failure is logged."""
        self.spawn(work, what).add_done_callback(_log_failure)

    async def run(self, work: Coroutine[Any, Any, T], what: str) -> T:
        """Runs work to its end even if the caller is cancelled in the meantime.

        What has begun to change native state is thereby never left half done: a client that dies
        ends its call, not the work.
        """
        return await asyncio.shield(self.spawn(work, what))

    async def idle(self) -> None:
        """Waits until every task has ended."""
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    async def aclose(self) -> None:
        """Cancels every task and waits for all."""
        for task in list(self._tasks):
            task.cancel()
        await self.idle()


def _log_failure(task: asyncio.Task[Any]) -> None:
    if task.cancelled() or task.exception() is None:
        return
    log.error("background task failed", task=task.get_name(), exc_info=task.exception())


async def settle(calls: Sequence[Callable[[], Coroutine[Any, Any, Any]]]) -> list[BaseException]:
    """Runs several calls at once, all to their end, and returns what failed."""
    results = await asyncio.gather(*(call() for call in calls), return_exceptions=True)
    return [result for result in results if isinstance(result, BaseException)]
