# SPDX-License-Identifier: Apache-2.0
"""What the data plane does for staging: a part of :class:`.dataplane.DataPlane`."""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Any

import structlog

from transferd.daemon.plane import STAGE_TO_GPU, STAGE_TO_HOST, StageFds, StageStat

if TYPE_CHECKING:
    from collections.abc import Callable

log = structlog.get_logger("transferd.staging")

CLOSE_PAUSE_S = 0.05  # before a connection is closed again that a helper copies for
CLOSE_TRIES_LONG = 150  # some 10 s: a helper that stands still is ended after 3


class StageCalls:
    """The calls, on the native module that whoever inherits them has."""

    _ffi: Any
    _lib: Any
    _core: Any
    _group: int
    _check: Callable[..., None]

    async def _run(self, call: Callable[[], Any]) -> Any:
        """Runs a blocking call to its end."""
        raise NotImplementedError

    async def _close(self, close: Callable[[], int]) -> int:
        """Closes a connection; again, for as long as a helper copies for it (EAGAIN)."""
        tries = 1
        while (rc := await self._run(close)) == -errno.EAGAIN:
            if tries == CLOSE_TRIES_LONG:
                log.warning(
                    "a GPU's helper does not come to an end with copies of a connection that is "
                    "being closed; nobody is told before that their memory is left alone"
                )
            tries += 1
            await asyncio.sleep(CLOSE_PAUSE_S)
        return int(rc)

    async def stage_open(self) -> tuple[int, StageFds]:
        """Makes the rings of a helper that is to be started; the fds are the caller's."""
        stage = self._ffi.new("uint64_t *")
        fds = self._ffi.new("struct tfd_stage_fds *")
        error = self._ffi.new("struct tfd_error *")
        rc = await self._run(
            lambda: self._lib.tfd_stage_open(self._core, self._group, stage, fds, error)
        )
        self._check(rc, "making rings for a GPU's helper", error)
        return int(stage[0]), StageFds(fds.ring_fd, fds.pool_fd, fds.wake_fd)

    async def stage_close(self, stage: int) -> None:
        """A helper has ended: what is under way there fails."""
        rc = await self._run(lambda: self._lib.tfd_stage_close(self._core, self._group, stage))
        self._check(rc, "ending a GPU's helper")

    def stage_memory_set(self, memory: int, stage: int) -> None:
        """A helper has an allocation open."""
        rc = self._lib.tfd_stage_memory_set(self._core, self._group, memory, stage)
        self._check(rc, "staging GPU memory")

    def stage_memory_fail(self, memory: int) -> None:
        """No helper can open it; no error if nobody asks any more."""
        rc = self._lib.tfd_stage_memory_fail(self._core, self._group, memory)
        if rc != -errno.ENOENT:
            self._check(rc, "staging GPU memory")

    def stage_memory_forget(self, memory: int) -> None:
        """No region names it any more. No error if it is forgotten."""
        rc = self._lib.tfd_stage_memory_forget(self._core, self._group, memory)
        if rc != -errno.ENOENT:
            self._check(rc, "staging GPU memory")

    def stage_stat(self, stage: int) -> StageStat:
        """Counts a helper's copies."""
        out = self._ffi.new("struct tfd_stage_info *")
        rc = self._lib.tfd_stage_stat(self._core, self._group, stage, out)
        self._check(rc, "reading a helper's counts")
        return StageStat(
            copies_out=out.copies[STAGE_TO_HOST],
            bytes_out=out.bytes[STAGE_TO_HOST],
            copies_in=out.copies[STAGE_TO_GPU],
            bytes_in=out.bytes[STAGE_TO_GPU],
            failed=out.failed,
        )
