# SPDX-License-Identifier: Apache-2.0
"""A request's transfer as the decoder's engine sees it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from transferd.client import errors
from transferd.kv.protocol.actions import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from transferd.kv.decoder import Decoder


class KvFailed(errors.TransferdError):
    """A transfer ended without all of its pages; no byte of it can land any more.

    Attributes:
        outcome: How it ended.
        detail: Why, for people.
    """

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(
            f"the transfer ended as {outcome.name}{f': {detail}' if detail else ''}",
            reason=outcome.name,
        )
        self.outcome = outcome
        self.detail = detail


class Transfer:
    """Pages on their way into a decoder rank, made by :meth:`Decoder.request`.

    Attributes:
        request_id: Of the prefill.
        number: Of this decoder's transfers.
        outcome: How it ended; None while it runs.
        detail: Why, for people.
        tail: Its tail, once it has ended as COMPLETE; empty where there is none.
    """

    __slots__ = (
        "_decoder", "_imm", "_landed", "_layers", "_stages", "_tail_slot", "_targets", "detail",
        "number", "outcome", "request_id", "tail",
    )  # fmt: skip

    def __init__(self, decoder: Decoder, request_id: bytes, tail_slot: int) -> None:
        self._decoder = decoder
        self._tail_slot = tail_slot
        self._imm = 0
        self._targets: tuple[int, ...] = ()
        self._stages: tuple[int, ...] = ()
        self._landed = 0
        self._layers = 0
        self.request_id = request_id
        self.number = 0
        self.outcome: Outcome | None = None
        self.detail = ""
        self.tail = b""

    def __repr__(self) -> str:
        state = f"{self._layers} layers" if self.outcome is None else self.outcome.name
        return f"<Transfer {self.number} of {self.request_id!r}: {state}>"

    @property
    def done(self) -> bool:
        """Whether it has ended, however; its pages are used, or free, then."""
        return self.outcome is not None

    @property
    def layers(self) -> int:
        """How many of the rank's layers, from the first on, are here."""
        return self._layers

    def wait_layers(self, count: int, timeout_s: float | None = None) -> None:
        """Waits until the first layers of this rank are here: they may be used.

        Args:
            count: How many.
            timeout_s: Bound; None: as long as it takes, which is the request's deadline at most.

        Raises:
            KvFailed: It ended without.
            WaitTimeout: The bound passed; the transfer goes on.
        """
        self._wait(lambda: self._layers >= count, timeout_s)
        if self._layers < count:
            self._check()

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until it has ended: all pages and the tail are here.

        Args:
            timeout_s: As for :meth:`wait_layers`.

        Raises:
            KvFailed: It ended otherwise. No byte can land any more: the pages are free.
            WaitTimeout: The bound passed; the transfer goes on.
        """
        self._wait(lambda: False, timeout_s)
        self._check()

    def cancel(self) -> None:
        """Takes it back; :meth:`wait` returns once its pages are free. Idempotent."""
        self._decoder._cancel(self)

    def _check(self) -> None:
        if self.outcome not in (None, Outcome.COMPLETE):
            raise KvFailed(self.outcome, self.detail)

    def _wait(self, enough: Callable[[], bool], timeout_s: float | None) -> None:
        end = None if timeout_s is None else time.monotonic() + timeout_s
        with self._decoder.news:
            while self.outcome is None and not enough():
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    raise errors.WaitTimeout(
                        f"transfer {self.number} has {self._layers} layers after {timeout_s:g} s"
                    )
                self._decoder.news.wait(left)
