# SPDX-License-Identifier: Apache-2.0
"""The opener's side: grants of peers that sessions here use.

A descriptor becomes a :class:`RemoteGrant` (once per daemon and grant) and, per session, an
:class:`Open` with a native handle. An open dies when its grant is taken back, its lane breaks or
its peer is lost; its handle then answers why, and the next OpenDescriptors makes a new one.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import TYPE_CHECKING

import structlog

from transferd.daemon import descriptor as descriptors
from transferd.daemon.errors import (
    AccessDenied,
    Conflict,
    Internal,
    InvalidRequest,
    NotFound,
    PeerLost,
    QuotaExceeded,
    StalePeer,
    TimedOut,
    TransferdError,
    from_reason,
)
from transferd.daemon.fences import OpenFences
from transferd.daemon.paths import native_path
from transferd.daemon.peer import STAGED_LANE, LaneKey, LaneState, Open, RemoteGrant, RemoteState
from transferd.daemon.plane import Detail, OpenOptions, PlaneError
from transferd.daemon.stagedpaths import StagedPaths
from transferd.daemon.wire import BATCH_MAX, Loss, Refusal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from transferd.daemon.descriptor import Claim, PeerKey
    from transferd.daemon.lanes import Lanes
    from transferd.daemon.peer import Lane, Peer
    from transferd.daemon.plane import Event, Plane
    from transferd.daemon.session import Session

log = structlog.get_logger("transferd.opens")

DEAD_OPENS_KEPT = 1024  # per session; handles that still answer why they do not work
ATTEMPTS = 3  # a lane or relation may break between two steps of an opening
RETRY_S = 0.2
OPEN_S = 10.0  # all steps of opening at one owner; each call has its own bound


class Opener:
    """All opens of the daemon."""

    def __init__(
        self,
        plane: Plane,
        lanes: Lanes,
        ensure_peer: Callable[[PeerKey, str], Awaitable[Peer]],
        quiet_s: float,
    ) -> None:
        """Takes what it works with.

        Args:
            plane: The data plane.
            lanes: Connections.
            ensure_peer: Gives a connected peer for (identity, address), or raises.
            quiet_s: Longest wait for an open to become quiet.
        """
        self._plane = plane
        self._lanes = lanes
        self._ensure_peer = ensure_peer
        self._quiet_s = quiet_s
        self._by_handle: dict[tuple[int, int], Open] = {}
        self.fences = OpenFences(plane, quiet_s, self.settled)
        self.staged = StagedPaths(lanes)
        lanes.on_hide = self._hide
        lanes.on_dead = self._die

    def __len__(self) -> int:
        return len(self._by_handle)

    # ---- opening ----

    async def open(self, session: Session, raw: Sequence[bytes], where: str) -> list[Open]:
        """Opens descriptors for a session; cached ones cost nothing.

        Args:
            session: For whom.
            raw: Descriptors as the client gave them.
            where: Name of the field, for errors.

        Returns:
            One open for each, in the same order.

        Raises:
            TransferdError: The first refusal, by its reason; others of the call may have been
                opened and stay.
        """
        claims: dict[bytes, Claim] = {}
        for i, one in enumerate(raw):
            if one not in session.by_descriptor and one not in claims:
                claims[one] = _parse(one, f"{where}[{i}]" if len(raw) > 1 else where)
        by_peer: dict[tuple[PeerKey, str], dict[bytes, int]] = {}
        for one, claim in claims.items():
            by_peer.setdefault((claim.owner, claim.address), {})[one] = claim.grant_id
        if by_peer:

            async def of_peer(key: PeerKey, address: str, wanted: dict[bytes, int]) -> None:
                try:
                    async with session.openings, asyncio.timeout(OPEN_S):
                        await self._open_at(session, key, address, wanted)
                except TimeoutError:
                    raise TimedOut(f"opening grants of {address} took over {OPEN_S} s") from None

            results = await asyncio.gather(
                *(of_peer(key, address, wanted) for (key, address), wanted in by_peer.items()),
                return_exceptions=True,
            )
            for failure in results:
                if isinstance(failure, BaseException):
                    raise failure
        return [self._result(session, one) for one in raw]

    @staticmethod
    def _result(session: Session, raw: bytes) -> Open:
        opened = session.by_descriptor.get(raw)
        if opened is None:  # died between its opening and now
            raise PeerLost("the grant's connection broke while it was opened; try again")
        return opened

    async def _open_at(
        self, session: Session, key: PeerKey, address: str, wanted: dict[bytes, int]
    ) -> None:
        """Opens grants of one owner; retries what broke on the way."""
        for attempt in range(ATTEMPTS):
            session.check_open()
            peer = await self._ensure_peer(key, address)
            try:
                await self._open_grants(peer, session, wanted)
                keys = {self._lane_key(session, peer, gid) for gid in wanted.values()}
                lanes = {lane_key: await self._lanes.get(peer, lane_key) for lane_key in keys}
                grants = [peer.remote.get(gid) for gid in wanted.values()]
                if any(self.staged.wanted(session, grant, lanes.values()) for grant in grants):
                    lanes[STAGED_LANE] = await self._lanes.get(peer, STAGED_LANE)
                try:
                    if self._add_all(session, peer, wanted, lanes):
                        return
                finally:
                    if STAGED_LANE in lanes:
                        self._lanes.drop_idle(lanes[STAGED_LANE])
            except (PeerLost, StalePeer):
                if attempt + 1 == ATTEMPTS:
                    raise
        raise PeerLost(f"the connection to {address} keeps breaking; try again later")

    @staticmethod
    def _lane_key(session: Session, peer: Peer, grant_id: int) -> LaneKey:
        grant = peer.remote.get(grant_id)
        isolation = grant.keys.isolation if grant is not None and grant.keys is not None else 0
        return LaneKey(isolation, 0 if session.shared_lanes else session.session_id)

    async def _open_grants(self, peer: Peer, session: Session, wanted: dict[bytes, int]) -> None:
        """Makes sure that the daemon has the grants open and that the session holds them."""
        while True:
            peer.check()
            missing: dict[int, bytes] = {}
            for raw, gid in wanted.items():
                if gid not in peer.remote:
                    missing.setdefault(gid, raw)
            self._start_opening(peer, missing)
            grants = {raw: peer.remote[gid] for raw, gid in wanted.items()}
            busy = {grant.work for grant in grants.values() if grant.work is not None}
            if not busy:
                break
            await asyncio.wait(busy)
            for raw, grant in grants.items():
                if grant.error is not None and grant.raw == raw:
                    raise grant.error
        for raw, grant in grants.items():
            if grant.raw != raw:
                # A grant has one descriptor only, and the owner has confirmed another.
                raise AccessDenied(
                    "the descriptor was not made by its owner; get one from the grant's owner",
                    reason="DESCRIPTOR_FORGED",
                )
            grant.holders.add(session.session_id)

    def _start_opening(self, peer: Peer, wanted: dict[int, bytes]) -> None:
        items = list(wanted.items())
        for start in range(0, len(items), BATCH_MAX):
            batch = [RemoteGrant(gid, raw, peer) for gid, raw in items[start : start + BATCH_MAX]]
            task = peer.tasks.spawn(self._ask_owner(peer, batch), f"open at {peer.address}")
            for grant in batch:
                peer.remote[grant.grant_id] = grant
                grant.work = task

    async def _ask_owner(self, peer: Peer, grants: list[RemoteGrant]) -> None:
        """Opens a batch at its owner; each grant ends OPEN, or is removed with an error."""
        asked_ns = time.monotonic_ns()
        peer.openings += 1
        failure: TransferdError = Internal("the owner's answer was incomplete")
        results: list[object] = []
        try:
            results.extend(await peer.link.open_grants([grant.raw for grant in grants]))
        except TransferdError as error:
            failure = error
        finally:
            peer.openings -= 1
            results.extend([failure] * (len(grants) - len(results)))
            for grant, result in zip(grants, results, strict=False):
                self._answered(peer, grant, result, asked_ns)
            if not peer.openings:
                peer.revoked_early.clear()

    @staticmethod
    def _answered(peer: Peer, grant: RemoteGrant, result: object, asked_ns: int) -> None:
        """Takes the owner's answer for one grant."""
        grant.work = None
        if peer.is_lost:
            grant.error = PeerLost(f"the daemon at {peer.address} was lost; try again")
        elif isinstance(result, TransferdError):
            grant.error = result
        elif isinstance(result, Refusal):
            grant.error = from_reason(result.reason, result.message)
        elif grant.grant_id in peer.revoked_early:
            grant.error = Conflict(
                f"grant {grant.grant_id} was taken back by its owner; ask for a new one",
                reason="GRANT_REVOKED",
            )
        else:
            grant.keys = result  # type: ignore[assignment]
            grant.state = RemoteState.OPEN
            lease_ms = grant.keys.expires_ms if grant.keys is not None else 0
            # From the time of asking: this daemon never believes longer in a grant than its owner
            # does.
            grant.expires_ns = asked_ns + lease_ms * 1_000_000 if lease_ms else 0
            return
        grant.state = RemoteState.ENDED
        if peer.remote.get(grant.grant_id) is grant:
            del peer.remote[grant.grant_id]

    def _add_all(
        self, session: Session, peer: Peer, wanted: dict[bytes, int], lanes: dict[LaneKey, Lane]
    ) -> bool:
        """Makes the native opens; False if something ended meanwhile.

        Awaits nothing: what is checked holds.
        """
        session.check_open()
        for raw, gid in wanted.items():
            grant = peer.remote.get(gid)
            lane = lanes.get(self._lane_key(session, peer, gid))
            if peer.is_lost or lane is None or lane.state is not LaneState.UP:
                return False
            if grant is None or grant.state is not RemoteState.OPEN or grant.raw != raw:
                return False
            if 0 < grant.expires_ns <= time.monotonic_ns():
                raise Conflict(
                    f"grant {gid} has expired; ask its owner for a new one", reason="GRANT_EXPIRED"
                )
            staged = None
            if self.staged.wanted(session, grant, [lane]):
                staged = lanes.get(STAGED_LANE)
                if staged is None or staged.state is not LaneState.UP:
                    return False  # it has got memory of a GPU meanwhile
            known = session.live_opens.get((peer.key, gid))
            opened = known or self._add(session, grant, lane)
            if staged is not None:
                self.staged.join(opened, staged)
            session.by_descriptor[raw] = opened
        return True

    def _add(self, session: Session, grant: RemoteGrant, lane: Lane) -> Open:
        keys = grant.keys
        assert keys is not None
        leading = [path for path in lane.paths if self._lanes.paths.leads_to(path, keys)]
        paths = [path for path in leading if path in lane.paths_up()]
        session.tenant.charge("opens")
        try:
            handle = self._plane.open_add(
                session.handle,
                OpenOptions(
                    paths=tuple(native_path(path, keys) for path in paths),
                    rights=keys.rights,
                    length=keys.length,
                    imm_first=keys.imm_first,
                    imm_count=keys.imm_count,
                    name_space=keys.name_space,
                    expires_ns=grant.expires_ns,
                    device=keys.device,
                    unreached=self.staged.unreached(grant.peer, partial=len(paths) < len(leading)),
                ),
            )
        except PlaneError as error:
            session.tenant.refund("opens")
            raise QuotaExceeded(f"opening a grant: {error.text}", reason="OPENS") from error
        opened = Open(handle, session, grant, lane)
        opened.slots = {path: slot for slot, path in enumerate(paths)}
        self._by_handle[session.handle, handle] = opened
        session.opens[handle] = opened
        session.live_opens[(grant.peer.key, grant.grant_id)] = opened
        grant.opens.add(opened)
        lane.opens.add(opened)
        self._lanes.wanted(lane)
        return opened

    # ---- stopping ----

    def _hide(self, opened: Open) -> None:
        """Takes an open out of its session's caches: nobody finds it for new work. Idempotent."""
        opened.live = False
        session, grant = opened.session, opened.grant
        key = (grant.peer.key, grant.grant_id)
        if session.live_opens.get(key) is opened:
            del session.live_opens[key]
        if session.by_descriptor.get(grant.raw) is opened:
            del session.by_descriptor[grant.raw]

    def _die(self, opened: Open, detail: Detail) -> asyncio.Future[None]:
        """Stops an open; new jobs on it end with `detail`. Idempotent.

        Returns:
            A future that is done once no byte on it can land.
        """
        if opened.quiet is not None:
            return opened.quiet
        self._hide(opened)
        opened.quiet = asyncio.get_running_loop().create_future()
        try:
            self._plane.open_revoke(opened.session.handle, opened.handle, detail)
        except PlaneError as error:  # its session is being freed: nothing is in flight
            log.debug("revoking an open", error=error.text)
            self._settle(opened)
        self._trim(opened.session)
        return opened.quiet

    def _settle(self, opened: Open) -> None:
        """No byte on it can land any more: grant and lane are rid of it. Idempotent."""
        opened.grant.opens.discard(opened)
        for lane in opened.lanes:
            lane.opens.discard(opened)
        if opened.quiet is not None and not opened.quiet.done():
            opened.quiet.set_result(None)
        for lane in opened.lanes:
            self._lanes.drop_idle(lane)

    def _trim(self, session: Session) -> None:
        """Forgets the oldest dead opens of a session, if there are many."""
        dead = len(session.opens) - len(session.live_opens)
        if dead <= DEAD_OPENS_KEPT:
            return
        for opened in list(session.opens.values()):
            if not opened.live and opened.quiet is not None and opened.quiet.done():
                self._forget(opened)
                return

    def _forget(self, opened: Open) -> None:
        """Removes a quiet open from the data plane."""
        if self._by_handle.pop((opened.session.handle, opened.handle), None) is None:
            return
        opened.session.opens.pop(opened.handle, None)
        opened.session.tenant.refund("opens")
        try:
            self._plane.open_remove(opened.session.handle, opened.handle)
        except PlaneError as error:
            log.warning("forgetting an open", error=error.text)

    def on_quiet(self, event: Event) -> None:
        """TFD_EVENT_OPEN_QUIET."""
        opened = self._by_handle.get((event.session, event.id))
        if opened is None or opened.quiet is None:
            return
        self._settle(opened)
        if opened.forget:
            self._forget(opened)

    async def close(self, session: Session, handle: int) -> None:
        """Gives an opened grant back for a session; its jobs on it are cancelled."""
        opened = session.opens.get(handle)
        if opened is None:
            raise NotFound(f"handle: {handle} is not open in this session", reason="OPEN_NOT_FOUND")
        opened.forget = True
        quiet = self._die(opened, Detail.BAD_GRANT)
        if not quiet.done():
            await asyncio.wait([quiet], timeout=self._quiet_s)
        if not quiet.done():
            raise TimedOut(f"jobs on handle {handle} did not stop in {self._quiet_s} s; ask again")
        self._forget(opened)
        if (opened.grant.peer.key, opened.grant.grant_id) not in session.live_opens:
            self._unhold(opened.grant, session.session_id, abandoned=False)

    def isolate(self, session: Session) -> None:
        """The session has memory that may vanish in mid-flight: it leaves shared connections."""
        if not session.shared_lanes:
            return
        session.shared_lanes = False
        for opened in list(session.live_opens.values()):
            self._die(opened, Detail.CONNECTION)

    # ---- giving back ----

    def _unhold(self, grant: RemoteGrant, session_id: int, *, abandoned: bool) -> None:
        """A session does not want a grant any more; with the last one it goes back to its owner."""
        if session_id not in grant.holders:
            return
        grant.holders.discard(session_id)
        if grant.state is not RemoteState.OPEN or grant.peer.is_lost:
            return
        if grant.holders:
            if abandoned:
                self._abandon(grant)
            return
        grant.state = RemoteState.RELEASING
        grant.work = grant.peer.tasks.spawn(
            self._release(grant.peer, [grant], abandoned=abandoned), "release"
        )

    def _abandon(self, grant: RemoteGrant) -> None:
        """Others still use the grant: what the dead session would have written is unknown."""
        keys = grant.keys
        if keys is None:
            return
        for imm in range(keys.imm_first, keys.imm_first + keys.imm_count):
            grant.peer.losses.setdefault((grant.grant_id, imm), (0, 0))
        self._report(grant.peer)

    async def _release(self, peer: Peer, grants: list[RemoteGrant], *, abandoned: bool) -> None:
        """Tells the owner until it has heard it: it must not take us for openers for ever."""
        ids = [grant.grant_id for grant in grants]
        while not peer.is_lost:
            try:
                await self.settled(peer)
                for start in range(0, len(ids), BATCH_MAX):
                    await peer.link.release_grants(
                        ids[start : start + BATCH_MAX], abandoned=abandoned
                    )
                break
            except TransferdError as error:
                log.info(
                    "release not delivered, trying again", peer=peer.address, error=error.message
                )
                await asyncio.sleep(RETRY_S)
        for grant in grants:
            grant.state = RemoteState.ENDED
            grant.work = None
            if peer.remote.get(grant.grant_id) is grant:
                del peer.remote[grant.grant_id]

    async def cut_off(self, session: Session, *, staged: bool) -> None:
        """Destroys connections that a session writes on: the staged ones, or all others."""
        closing = [
            self._lanes.close(lane, Detail.CONNECTION)
            for lane in {lane for opened in session.opens.values() for lane in opened.lanes}
            if (lane.key == STAGED_LANE) == staged
        ]
        if closing:
            await asyncio.wait(closing)

    def drop_session(self, session: Session) -> None:
        """Forgets the opens of a session that is quiet; the data plane frees them with it."""
        for opened in list(session.opens.values()):
            self._hide(opened)
            self._by_handle.pop((session.handle, opened.handle), None)
            session.tenant.refund("opens")
            self._settle(opened)
        session.opens.clear()

    async def release_session(
        self, session: Session, peers: Sequence[Peer], *, clean: bool
    ) -> None:
        """Releases every grant that only this session held; bounded by the call to each owner."""
        waits = []
        for peer in peers:
            last = []
            for grant in list(peer.remote.values()):
                if session.session_id not in grant.holders:
                    continue
                if grant.state is RemoteState.OPEN and grant.holders == {session.session_id}:
                    grant.holders.clear()
                    grant.state = RemoteState.RELEASING
                    last.append(grant)
                else:
                    self._unhold(grant, session.session_id, abandoned=not clean)
            if last:
                task = peer.tasks.spawn(self._release(peer, last, abandoned=not clean), "release")
                for grant in last:
                    grant.work = task
                waits.append(task)
        if waits:
            # The rest of an undelivered release goes on as a task of its peer.
            await asyncio.wait(waits, timeout=self._quiet_s)

    # ---- what owners and the data plane tell ----

    async def revoked(self, peer: Peer, grant_ids: Sequence[int]) -> None:
        """The owner takes grants back; returns when nothing is in flight on them.

        Raises:
            TimedOut: Something still was, when the bound passed.
        """
        waits = []
        for gid in grant_ids:
            grant = peer.remote.get(gid)
            if peer.openings:
                peer.revoked_early.add(gid)
            if grant is None or grant.state is not RemoteState.OPEN:
                continue
            grant.state = RemoteState.ENDED
            del peer.remote[gid]
            over = 0 < grant.expires_ns <= time.monotonic_ns()
            detail = Detail.EXPIRED if over else Detail.REVOKED
            waits += [self._die(opened, detail) for opened in list(grant.opens)]
        pending = [wait for wait in waits if not wait.done()]
        if pending:
            _, late = await asyncio.wait(pending, timeout=self._quiet_s)
            if late:
                raise TimedOut(f"{len(late)} opens did not become quiet in {self._quiet_s} s")
        await self.settled(peer)

    def on_lost(self, event: Event) -> None:
        """TFD_EVENT_LOST: tells the owner."""
        opened = self._by_handle.get((event.session, event.id))
        if opened is None or opened.grant.peer.is_lost:
            return
        peer = opened.grant.peer
        key = (opened.grant.grant_id, event.imm)
        count, units = peer.losses.get(key, (0, 0))
        peer.losses[key] = (count + event.count, units + event.units)
        self._report(peer)

    def _report(self, peer: Peer) -> None:
        if peer.reporting is None:
            peer.reporting = peer.tasks.spawn(self._report_batch(peer), "report losses")

    async def _report_batch(self, peer: Peer) -> None:
        """Tells the oldest losses. Each batch is a task of its own: one can wait for it."""
        try:
            batch = list(itertools.islice(peer.losses.items(), BATCH_MAX))
            for key, _ in batch:
                del peer.losses[key]
            peer.reports_sent += 1
            losses = [Loss(*key, *lost) for key, lost in batch]
            await self._deliver(peer, peer.reports_sent, losses)
        finally:
            peer.reporting = None
        if peer.losses and not peer.is_lost:
            self._report(peer)

    async def _deliver(self, peer: Peer, number: int, losses: list[Loss]) -> None:
        """Repeats one report until it has arrived, unchanged: the owner takes a number once."""
        while not peer.is_lost:
            try:
                await peer.link.report_loss(number, losses)
            except TransferdError as error:
                log.info("loss not delivered, trying again", peer=peer.address, error=error.message)
                await asyncio.sleep(RETRY_S)
            else:
                return

    async def settled(self, peer: Peer) -> None:
        """What ended lands nothing any more, and the owner knows its losses; TimedOut."""
        await self._lanes.paths.heard(peer, self._quiet_s)
        await self.flush_losses(peer)

    async def flush_losses(self, peer: Peer) -> None:
        """Waits, within the bound, until the owner knows all losses so far.

        Those that come meanwhile are in later batches, and not waited for.
        """
        for _ in range(1 + -(-len(peer.losses) // BATCH_MAX)):
            if peer.reporting is not None:
                await asyncio.wait([peer.reporting], timeout=self._quiet_s)

    def peer_lost(self, peer: Peer) -> None:
        """Takes a lost peer's grants out of every cache, at once; its lanes stop the jobs."""
        for grant in peer.remote.values():
            grant.state = RemoteState.ENDED
            for opened in grant.opens:
                self._hide(opened)
        peer.remote.clear()
        peer.losses.clear()


def _parse(raw: bytes, where: str) -> Claim:
    try:
        return descriptors.parse(raw)
    except InvalidRequest as error:
        raise InvalidRequest(where, error.problem, reason=error.reason) from None
