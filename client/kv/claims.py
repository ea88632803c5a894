# SPDX-License-Identifier: Apache-2.0
"""Whose immediates are whose: two decoders on the same ones would count each other's pages."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from transferd.client import errors

if TYPE_CHECKING:
    from transferd.client.client import Client

_lock = threading.Lock()
_claimed: WeakKeyDictionary[Client, set[range]] = WeakKeyDictionary()


def claim(client: Client, imms: range) -> None:
    """Takes immediates of a Client for one decoder.

    Raises:
        Conflict: IMMS: another one has some of them.
    """
    with _lock:
        others = _claimed.setdefault(client, set())
        for other in others:
            if imms.start < other.stop and other.start < imms.stop:
                raise errors.Conflict(
                    f"immediates {imms.start} to {imms.stop - 1} are not this decoder's alone: "
                    f"another one of this Client has {other.start} to {other.stop - 1}; give "
                    f"first_imm={max(each.stop for each in others)}",
                    reason="IMMS",
                )
        others.add(imms)


def give_back(client: Client, imms: range) -> None:
    """Lets others have them."""
    with _lock:
        _claimed[client].discard(imms)
