# SPDX-License-Identifier: Apache-2.0
"""The sessions of this process: a forked child has none of them, and its exit ends them."""

from __future__ import annotations

import atexit
import os
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transferd.client.session import Session

_living: weakref.WeakSet[Session] = weakref.WeakSet()  # weak, so that it keeps none alive


def add(session: Session) -> None:
    """Adds one that is being made."""
    _living.add(session)


def _after_fork_in_child() -> None:
    for session in list(_living):
        session.orphan()
    _living.clear()


def _at_exit() -> None:
    """Ends sessions that nobody has closed, while threads still run and can be waited for."""
    for session in list(_living):
        session.close()


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_at_exit)
