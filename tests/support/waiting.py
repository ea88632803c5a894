# SPDX-License-Identifier: Apache-2.0
"""Waiting for what another process does, with a bound."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

WAIT_S = 20.0
PAUSE_S = 0.01


def eventually(look: Callable[[], T], what: str, timeout_s: float = WAIT_S) -> T:
    """Looks until what it sees is true.

    Args:
        look: Called again and again; its last answer is part of the failure's text.
        what: Describes the condition, for the failure.
        timeout_s: Bound.

    Returns:
        The first true answer.

    Raises:
        AssertionError: The bound passed.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        seen = look()
        if seen:
            return seen
        if time.monotonic() >= deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what} (last seen: {seen!r})")
        time.sleep(PAUSE_S)  # another process works meanwhile; nothing tells us when
