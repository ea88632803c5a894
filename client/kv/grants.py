# SPDX-License-Identifier: Apache-2.0
"""A decoder rank's grants: made, fenced, revoked by helpers; counters level after a fence."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from transferd.client import errors
from transferd.client.counter import acknowledge_soon
from transferd.client.operations import WritePages

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from transferd.client.grant import Grant
    from transferd.client.memory import Region
    from transferd.kv.cache import Cache
    from transferd.kv.counts import Counts
    from transferd.kv.protocol.actions import Action, Fence
    from transferd.kv.pump import Pump

# How writes to ourselves may end while our daemon lives: its relation with itself is made anew when
# the daemon has stood still for longer than its bounds.
LOST = (errors.JobFailed, errors.PeerLost, errors.WaitTimeout)
TAILS = ":tails"  # no name that a region of a layout has
RETRY_S = 0.2
LEVEL_S = 5.0
LEVEL_TRIES = 256  # with the most counts each: more than any transfer has
LEVEL_MAX = 65_536  # counts that one write to ourselves gives at most


class Grants:
    """One grant of each region for each epoch of a pair, all on the same immediates."""

    def __init__(self, pump: Pump, cache: Cache, tails: Region | None, imms: range) -> None:
        """Makes the counters of all immediates, by a grant of a byte to ourselves.

        Raises:
            QuotaExceeded: COUNTERS.
        """
        self._pump = pump
        self._imms = imms
        self._regions: dict[str, tuple[Region, int]] = {
            name: (region, cache.layout.regions[name]) for name, region in cache.regions.items()
        }
        self._tails = tails
        self._own = [tails] if tails is not None and tails is not cache.tails else []
        if tails is not None:
            self._regions[TAILS] = (tails, tails.length)
        self._spot = pump.client.alloc(4096, name="kv counts")
        self._self = self._spot.grant(0, 1, imms=imms)
        self._made: dict[tuple[int, int], Future[list[Grant]]] = {}

    @property
    def tails_bytes(self) -> int:
        """Of the region of tails."""
        return self._tails.length if self._tails is not None else 0

    @property
    def tails_view(self) -> memoryview:
        """The bytes of the region of tails."""
        assert self._tails is not None
        return self._tails.view

    def make(self, pair: int, epoch: int, granted: Callable[..., list[Action]]) -> None:
        """Grants all regions to a pair; tells the core."""

        def make() -> list[Grant]:
            grants: list[Grant] = []
            names: list[tuple[str, bytes]] = []
            try:
                for name, (region, length) in self._regions.items():
                    rights = {"write"} if region.source is None else {"write", "map"}
                    grants.append(region.grant(0, length, rights=rights, imms=self._imms))
                    names.append((name, grants[-1].descriptor))
            except errors.Unavailable:
                raise
            except errors.TransferdError:
                names = []
            self._pump.post(lambda now: granted(now, pair, epoch, tuple(names)))
            return grants

        self._made[pair, epoch] = self._pump.ask(make)

    def revoke(self, pair: int, epoch: int, revoked: Callable[..., list[Action]]) -> None:
        """Revokes the grants of a pair's epoch, trying until it is done; tells the core."""
        made = self._made.pop((pair, epoch), None)

        def revoke() -> None:
            for grant in made.result() if made is not None else ():
                try:
                    grant.revoke()
                except errors.TransferdError:
                    self._pump.session.check_open()
                    self._pump.later(RETRY_S, lambda: self._pump.ask(revoke))
                    return
            self._pump.post(lambda now: revoked(now, pair, epoch))

        self._pump.ask(revoke)

    def fence(
        self,
        action: Fence,
        counts: Counts,
        faults: Sequence[int],
        done: Callable[[Sequence[int], int, str], None],
    ) -> None:
        """Fences the immediates of a transfer, and makes their counters level.

        Args:
            action: What the core asks for.
            counts: All counters.
            faults: That they had when the transfer began, or that were told since.
            done: Called with the values; or with the pair whose grants could not be fenced, and
                why.
        """
        imms = range(action.imm, action.imm + len(action.bases))
        pairs = {
            grant: pair
            for (pair, _), grants in self._made.items()
            if pair in action.pairs
            for grant in grants.result()  # it has grants: they are made
        }

        def fence() -> None:
            try:
                if pairs:
                    self._pump.client.fence(dict.fromkeys(pairs, imms))
            except errors.FencesFailed as error:
                for grant, one in error.failed.items():
                    if one.reason == "STILL_COPIED":  # others have ended: nothing can land
                        done((), pairs[grant], str(one))
                        return
            except errors.WaitTimeout as error:
                done((), min(action.pairs), str(error))
                return
            finish()

        def finish(*, again: bool = False) -> None:
            try:
                if again:  # what was written to ourselves must not land, or be told lost, later
                    self._self.fence([imms])
                values = self.level(counts, action.imm, action.bases, faults)
            except LOST:
                retry = functools.partial(finish, again=True)
                self._pump.later(RETRY_S, lambda: self._pump.ask(retry))
            else:
                done(values, 0, "")

        self._pump.ask(fence)

    def level(
        self, counts: Counts, imm: int, bases: Sequence[int], faults: Sequence[int]
    ) -> list[int]:
        """Writes counts to ourselves until each value grows: then it is the sum.

        Args:
            counts: All counters.
            imm: The first of some.
            bases: Values that need it not, as long as there was no fault.
            faults: That were seen.

        Returns:
            The values.

        Raises:
            JobFailed, PeerLost, WaitTimeout: A write to ourselves is lost: to be fenced, and tried
                again.
        """
        width = len(bases)
        before = counts.read(imm, width)
        for at, (_, seen) in enumerate(before):
            if seen > faults[at]:
                acknowledge_soon(self._pump.session, imm + at)
        uneven = [
            at for at, (value, seen) in enumerate(before) if value != bases[at] or seen > faults[at]
        ]
        number = 1
        for _ in range(LEVEL_TRIES):
            if not uneven:
                return [value for value, _ in counts.read(imm, width)]
            zeros = bytes(4 * number)
            view = memoryview(zeros).cast("I")
            jobs = self._pump.client.submit(
                WritePages(
                    src=self._spot[0:1],
                    src_pages=view,
                    dst=self._self.descriptor,
                    dst_pages=view,
                    page_bytes=1,
                    imm=imm + at,
                )
                for at in uneven
            )
            for job in jobs:
                job.wait(LEVEL_S)
            now = counts.read(imm, width)
            uneven = [at for at in uneven if now[at][0] == before[at][0]]
            number = min(2 * number, LEVEL_MAX)
        raise errors.Internal("counters are not level after a fence")

    def close(self) -> None:
        """Gives the own memory back; pairs have none any more."""
        for region in (self._spot, *self._own):
            region.close()
