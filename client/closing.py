# SPDX-License-Identifier: Apache-2.0
"""Context managers that close what they have given."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Self


class Closing:
    """``with``: closed at its end, however it ends."""

    __slots__ = ()

    @abstractmethod
    def close(self) -> None:
        """Ends it. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClosing:
    """``async with``: closed at its end, however it ends."""

    __slots__ = ()

    @abstractmethod
    async def close(self) -> None:
        """Ends it. Idempotent."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
