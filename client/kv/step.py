# SPDX-License-Identifier: Apache-2.0
"""Steps of a prefiller's engine, and the watchers that its layers count up."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from transferd.client import errors

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Protocol

    from transferd.client.client import Client
    from transferd.client.watcher import Watcher

    class Owner(Protocol):
        """Whoever makes steps."""

        def step_failed(self, step: Step) -> None:
            """A step has ended without all of its layers."""


class Step:
    """A forward pass, made by :meth:`Prefiller.step`. A context manager.

    Attributes:
        number: Of this rank's steps.
        watcher: What its layers count up, by 1 each.
        base: Its value before the first of them.
        layers: How many this rank has.
        requests: Whose tokens it computes.
    """

    __slots__ = (
        "_bumped",
        "_owner",
        "_watchers",
        "base",
        "layers",
        "number",
        "requests",
        "watcher",
    )

    def __init__(
        self,
        owner: Owner,
        watchers: Watchers,
        number: int,
        watcher: Watcher,
        base: int,
        layers: int,
        requests: tuple[bytes, ...],
    ) -> None:
        self._owner = owner
        self._watchers = watchers
        self._bumped = 0
        self.number = number
        self.watcher = watcher
        self.base = base
        self.layers = layers
        self.requests = requests

    @property
    def computed(self) -> bool:
        """Whether all of its layers are computed."""
        try:
            return self.watcher.value >= self.base + self.layers
        except errors.Conflict:  # closed: it has failed
            return False

    def layer_done(self) -> None:
        """Keys and values of one more layer are in the cache. About a microsecond.

        Raises:
            InvalidRequest: There are no more layers; or kernels count them.
        """
        if self.watcher.device:
            raise errors.InvalidRequest(
                "kernels count the layers of this step, by step.watcher.cuda_bump(stream)"
            )
        if self._bumped >= self.layers:
            raise errors.InvalidRequest(f"this rank has {self.layers} layers, and all are done")
        self._bumped += 1
        self.watcher.bump()

    def __enter__(self) -> Step:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._owner.step_failed(self)
            self._watchers.fail(self)
        elif not self.watcher.device and self._bumped < self.layers:
            self.watcher.bump(self.layers - self._bumped)
            self._bumped = self.layers


class Watchers:
    """The two watchers of a rank: one that its threads count up, one that kernels do.

    Each serves one step after the other; a step's values follow those of the one before.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._watchers: dict[bool, Watcher] = {}
        self._next: dict[bool, int] = {}

    def get(self, device: bool) -> Watcher:
        """Finds a watcher, or takes one."""
        watcher = self._watchers.get(device)
        if watcher is None:
            watcher = self._watchers[device] = self._client.watcher(device=device)
            self._next[device] = 0
        return watcher

    def step(
        self, number: int, layers: int, device: bool, owner: Owner, requests: tuple[bytes, ...]
    ) -> Step:
        """Makes the next step."""
        watcher = self.get(device)
        base = self._next[device]
        self._next[device] = base + layers
        return Step(owner, self, number, watcher, base, layers, requests)

    def fail(self, step: Step) -> None:
        """Ends what waits for layers that will not be computed.

        The watcher of threads is replaced. That of kernels stays, as graphs have it: its next step
        begins where it stands.
        """
        device = step.watcher.device
        if self._watchers.get(device) is not step.watcher:
            return
        if device:
            self._next[device] = step.watcher.value
            return
        del self._watchers[device]
        with contextlib.suppress(errors.WaitTimeout, errors.Unavailable):
            step.watcher.close()

    def close(self) -> None:
        """Gives both back. Idempotent."""
        for watcher in self._watchers.values():
            with contextlib.suppress(errors.WaitTimeout, errors.Unavailable):
                watcher.close()
        self._watchers.clear()
