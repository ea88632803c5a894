# SPDX-License-Identifier: Apache-2.0
"""The owner's side: grants of sessions here, who has opened them, and connections to us.

Ending a grant is a fence: when :meth:`Owner.end_grants` returns, no byte can land by it any more,
because every opener said that it is quiet, or its connections to us were destroyed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from typing import TYPE_CHECKING

import structlog

from transferd.daemon.errors import (
    Conflict,
    InvalidRequest,
    PeerLost,
    QuotaExceeded,
    TransferdError,
)
from transferd.daemon.grant import (
    RIGHT_SEND,
    Grant,
    GrantState,
    GrantTable,
    check_grant,
    grant_over,
    still_copied,
)
from transferd.daemon.maps import Maps
from transferd.daemon.peer import Incoming, is_staged, leads_nowhere_else, pair_staged
from transferd.daemon.plane import ADDRESS_MAX, Detail, PlaneError, RegionKey
from transferd.daemon.region import Kind
from transferd.daemon.tasks import TaskOwner
from transferd.daemon.wire import BATCH_MAX, GrantFence, GrantKeys, Refusal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from transferd.daemon.descriptor import Sealer
    from transferd.daemon.peer import Peer
    from transferd.daemon.plane import Landed, Plane
    from transferd.daemon.region import Region
    from transferd.daemon.session import Session
    from transferd.daemon.wire import Half, Loss

log = structlog.get_logger("transferd.owner")

LANDED_KEPT = 1024  # per peer; of connections that broke here before their writer asked
SPENT_KEPT = 4096  # numbers, per peer; far more than requests that can still be on their way
CONNECTIONS_PER_PEER = 1024  # incoming; a peer is trusted, a runaway one is still bounded
STAGED_PER_PAIR = 2  # of those, by NICs that it pairs; it may not have heard that one is over


class Owner:
    """All grants of the daemon, and all incoming connections.

    Attributes:
        on_deaf: Loses a peer that does not answer a fence; its task ends when no byte of that peer
            can land. Set by who wires the daemon.
        maps: Who has memory of its grants mapped.
    """

    def __init__(self, plane: Plane, sealer: Sealer, revoke_s: float) -> None:
        """Takes what it works with.

        Args:
            plane: The data plane.
            sealer: Makes and checks descriptors.
            revoke_s: How long an opener may take to become quiet before it is cut off.
        """
        self._plane = plane
        self._sealer = sealer
        self._revoke_s = revoke_s
        self.grants = GrantTable()
        self.maps = Maps(self.grants, revoke_s)
        self._by_conn: dict[int, Incoming] = {}
        self.tasks = TaskOwner("owner")
        self.on_deaf: Callable[[Peer], asyncio.Task[None]] = _unset

    # ---- granting ----

    def create_grant(
        self,
        region: Region,
        *,
        offset: int,
        length: int,
        rights: int,
        imm_first: int,
        imm_count: int,
        expires_ms: int,
    ) -> tuple[Grant, bytes, list[int]]:
        """Gives permission on part of a region.

        Returns:
            The grant, its descriptor, and the slots of its counters.

        Raises:
            InvalidRequest: Names the field.
            QuotaExceeded: GRANTS or COUNTERS.
        """
        length = check_grant(region, offset, length, rights, imm_first, imm_count)
        session = region.session
        session.tenant.charge("grants")
        try:
            slots = self._counters(session, imm_first, imm_count)
        except BaseException:
            session.tenant.refund("grants")
            raise
        expires_ns = time.monotonic_ns() + expires_ms * 1_000_000 if expires_ms else 0
        imms = range(imm_first, imm_first + imm_count)
        grant = self.grants.add(region, offset, length, rights, imms, expires_ns)
        if expires_ms:
            grant.timer = asyncio.get_running_loop().call_later(
                expires_ms / 1000, self._expire, grant
            )
        return grant, self._sealer.seal(grant.grant_id), slots

    def grant_mailbox(self, region: Region, mailbox: int, slot_bytes: int) -> tuple[Grant, bytes]:
        """Gives permission to send to a mailbox, which ends with the grant.

        Returns:
            The grant and its descriptor.

        Raises:
            QuotaExceeded: GRANTS.
        """
        region.session.tenant.charge("grants")
        grant = self.grants.add(region, 0, slot_bytes, RIGHT_SEND, range(0), 0)
        grant.mailbox = mailbox
        return grant, self._sealer.seal(grant.grant_id)

    def _counters(self, session: Session, first: int, count: int) -> list[int]:
        if not count:
            return []
        limit = session.tenant.config.quotas.per_session_counters
        try:
            if count > limit:
                raise PlaneError(0, "above the quota")
            return self._plane.counters_add(session.handle, first, count)
        except PlaneError as error:
            raise QuotaExceeded(
                f"imm_count: no room for {count} more counters in this session (it may have "
                f"{limit}); grant fewer "
                "imms, or attach with a larger counter_count",
                reason="COUNTERS",
                limit=limit,
            ) from error

    def _expire(self, grant: Grant) -> None:
        """Runs at expiry: openers stop by their own clocks, and this makes it a fence."""
        if grant.state is GrantState.ACTIVE:
            grant.expired = True
            self.tasks.background(self.end_grants([grant]), f"expire grant {grant.grant_id}")

    # ---- the fence ----

    async def end_grants(self, grants: Iterable[Grant]) -> None:
        """Takes grants back; returns when no byte can land by any of them.

        To be run as an owned task. A grant that is already ending is waited for. Who has mapped
        their memory is asked to unmap it: :meth:`Maps.unmapped` waits for that.
        """
        mine: list[Grant] = []
        others: list[asyncio.Future[None]] = []
        by_peer: dict[Peer, list[Grant]] = {}
        for grant in grants:
            if grant.state is GrantState.ENDING and grant.ended is not None:
                others.append(grant.ended)
            if grant.state is not GrantState.ACTIVE:
                continue
            grant.state = GrantState.ENDING
            grant.ended = asyncio.get_running_loop().create_future()
            mine.append(grant)
            for peer in grant.openers:
                by_peer.setdefault(peer, []).append(grant)
        self.maps.revoke(mine)
        try:
            await asyncio.gather(*(self._fence(peer, held) for peer, held in by_peer.items()))
        finally:
            for grant in mine:
                self._ended(grant)
        for other in others:
            await asyncio.shield(other)

    def _end_mailbox(self, grant: Grant) -> None:
        """Nobody sends any more."""
        try:
            self._plane.mailbox_remove(grant.session.handle, grant.mailbox)
        except PlaneError as error:
            log.error("ending a mailbox", grant=grant.grant_id, error=error.text)
        grant.session.mailboxes.pop(grant.mailbox, None)

    def _ended(self, grant: Grant) -> None:
        if grant.mailbox:
            self._end_mailbox(grant)
        self.grants.remove(grant)
        grant.session.ended_grants.append(grant.grant_id)
        grant.session.tenant.refund("grants")
        if grant.ended is not None and not grant.ended.done():
            grant.ended.set_result(None)

    async def _fence(self, peer: Peer, grants: list[Grant]) -> None:
        """Makes one opener quiet on some grants, or cuts it off."""
        ids = [grant.grant_id for grant in grants]

        async def revoke() -> None:
            for start in range(0, len(ids), BATCH_MAX):
                await peer.link.revoke_grants(ids[start : start + BATCH_MAX], self._revoke_s)

        await self._until_quiet(peer, revoke)

    async def fence_grant(self, grant: Grant, imms: tuple[range, ...]) -> None:
        """Fences immediates of one grant, as :meth:`fence_grants`.

        Raises:
            Conflict: GRANT_REVOKED, STILL_COPIED.
        """
        for error in (await self.fence_grants({grant: imms})).values():
            raise error

    async def fence_grants(
        self, fences: Mapping[Grant, tuple[range, ...]]
    ) -> dict[Grant, TransferdError]:
        """Fences immediates of grants that live on, all at once; to be run as an owned task.

        Returns when no byte can land of what was submitted on them before the call.

        Args:
            fences: For each grant its immediates: ascending, none overlaps another.

        Returns:
            Grants of which something else is to be said: GRANT_REVOKED: it has ended meanwhile, so
            nothing can land by it; STILL_COPIED: a client's own stream may be writing yet.
        """
        async with contextlib.AsyncExitStack() as turns:
            for grant in sorted(fences, key=lambda grant: grant.grant_id):  # none waits in a circle
                await turns.enter_async_context(grant.fencing)
            # Whoever opens a grant from here on submits later than this.
            by_peer: dict[Peer, list[GrantFence]] = {}
            over = {grant: grant.ended for grant in fences if grant.ended is not None}
            for grant in fences.keys() - over.keys():
                for peer in grant.openers:
                    one = GrantFence(grant.grant_id, fences[grant])
                    by_peer.setdefault(peer, []).append(one)
            ends = await asyncio.gather(
                *(self._fence_at(peer, held) for peer, held in by_peer.items()),
                return_exceptions=True,
            )
        failed: dict[Grant, TransferdError] = {}
        for end in ends:
            if isinstance(end, BaseException):
                raise end
            for grant in fences:
                if grant.grant_id in end:
                    failed[grant] = still_copied(grant.grant_id)
        for grant, ended in over.items():
            await asyncio.shield(ended)
            failed[grant] = grant_over(grant.grant_id)
        return failed

    async def _fence_at(self, peer: Peer, fences: list[GrantFence]) -> set[int]:
        """Makes one opener quiet on some immediates; gives the grants that are still copied to."""
        copied: set[int] = set()

        async def fence() -> None:
            copied.update(await peer.link.fence_grants(fences, self._revoke_s))

        await self._until_quiet(peer, fence)
        return copied

    async def _until_quiet(self, peer: Peer, ask: Callable[[], Awaitable[None]]) -> None:
        """Asks an opener to become quiet; cuts it off if it does not."""
        try:
            peer.check()
            await ask()
        except TransferdError as error:
            log.warning(
                "opener did not become quiet; ending the relation with it",
                peer=peer.address,
                error=error.message,
            )
            # Destroying its connections alone is not enough: it has not heard that the grants are
            # gone, and would make new connections and write by them. A lost relation has to be
            # begun anew, from the descriptors.
            await asyncio.shield(self.on_deaf(peer))

    async def cut_off(self, peer: Peer) -> None:
        """Destroys every connection by which a peer writes to us; complete when it returns."""
        for incoming in list(peer.incoming.values()):
            self._close(incoming)
        while peer.closing:
            await asyncio.wait(set(peer.closing))

    def _fault(self, grant: Grant) -> None:
        """Writes by this grant cannot be trusted to arrive any more."""
        if not grant.imm_count or not grant.session.handle:
            return
        try:
            self._plane.counters_fault(
                grant.session.handle, grant.imm_first, grant.imm_count, lost=0
            )
        except PlaneError as error:  # the session is being freed: nobody waits
            log.debug("faulting counters", error=error.text)

    # ---- what openers ask ----

    def open_for(self, peer: Peer, descriptors: Sequence[bytes]) -> list[GrantKeys | Refusal]:
        """Opens grants for a peer. Awaits nothing, so a grant cannot start to end in between."""
        return [self._open_one(peer, raw) for raw in descriptors]

    def _open_one(self, peer: Peer, raw: bytes) -> GrantKeys | Refusal:
        now_ns = time.monotonic_ns()
        try:
            grant = self.grants.usable(self._sealer.verify(raw), now_ns)
            keys = self._keys(grant, now_ns)
        except TransferdError as error:
            return Refusal(error.reason, error.message)
        except PlaneError as error:
            return Refusal("GRANT_REVOKED", f"the grant's memory is going away: {error.text}")
        grant.openers[peer] = None
        peer.opened_here.add(grant.grant_id)
        return keys

    def _keys(self, grant: Grant, now_ns: int) -> GrantKeys:
        session = grant.session
        if grant.mailbox:
            keys = [RegionKey(grant.mailbox, 0)] * len(self._plane.rails)
        else:
            keys = self._plane.region_keys(session.handle, grant.region.handle)
        left_ms = max((grant.expires_ns - now_ns) // 1_000_000, 1) if grant.expires_ns else 0
        return GrantKeys(
            grant_id=grant.grant_id,
            length=grant.length,
            rights=grant.rights,
            imm_first=grant.imm_first,
            imm_count=grant.imm_count,
            name_space=self._plane.session_name_space(session.handle),
            rails=tuple(RegionKey(key.key, key.address + grant.offset) for key in keys),
            expires_ms=left_ms,
            # The daemon itself copies messages, and bears memory that goes away.
            isolation=0 if grant.mailbox else grant.region.isolation,
            device=grant.region.memory.kind is Kind.CUDA,
        )

    def release(self, peer: Peer, grant_ids: Sequence[int], *, abandoned: bool) -> None:
        """A peer gives opens back; `abandoned`: whoever used them died without a word."""
        for gid in grant_ids:
            grant = self.grants.get(gid)
            if grant is None or peer not in grant.openers:
                continue
            if abandoned:
                self._fault(grant)
            if grant.state is GrantState.ACTIVE:
                del grant.openers[peer]
                peer.opened_here.discard(gid)

    def report_loss(self, peer: Peer, number: int, losses: Sequence[Loss]) -> None:
        """A writer tells of writes that will not land; what it has not opened it cannot fault."""
        if number <= peer.reports_taken:  # its answer was lost: it was taken before
            return
        peer.reports_taken = number
        for loss in losses:
            grant = self.grants.get(loss.grant_id)
            if grant is None or peer not in grant.openers:
                continue
            if not grant.imm_first <= loss.imm < grant.imm_first + grant.imm_count:
                continue
            try:
                self._plane.counters_fault(
                    grant.session.handle, loss.imm, 1, loss.count, loss.units, peer.number
                )
            except PlaneError as error:
                log.debug("faulting a counter", error=error.text)

    # ---- connections to us ----

    async def connect(self, peer: Peer, halves: Sequence[Half]) -> list[bytes]:
        """Makes our halves of a peer's connections. To be run as an owned task.

        All or none, but for those by a rail that takes none now, as one that is down. A connection
        that stands as it is asked for is answered as it was before: whoever did not hear the answer
        may ask again.

        Returns:
            Their addresses; empty: that rail takes none.

        Raises:
            TransferdError: Names what is wrong.
        """
        self._check_halves(peer, halves)
        async with peer.connecting:
            peer.check()
            protocols = tuple(rail.protocol for rail in self._plane.rails)
            pairs = len(pair_staged(peer.protocols, protocols))
            _check_room(peer, halves, STAGED_PER_PAIR * pairs)
            made: list[Incoming] = []
            addresses: list[bytes] = []
            refused = None
            try:
                for half in halves:
                    try:
                        addresses.append(await self._accept(peer, half, made))
                    except PlaneError as error:
                        self._refused(peer, error)
                        addresses.append(b"")
                        refused = error
                if refused is not None and not any(addresses):
                    raise refused
                for half, address in zip(halves, addresses, strict=True):
                    if address:  # one may have been destroyed while others were made
                        _check_unspent(peer, half)
                peer.check()
            except PlaneError as error:
                await self._undo(made)
                raise PeerLost(f"connecting: {error.text}", reason="CONNECT_FAILED") from error
            except BaseException:
                await self._undo(made)
                raise
            return addresses

    def _check_halves(self, peer: Peer, halves: Sequence[Half]) -> None:
        rails = self._plane.rails
        seen = set()
        for i, half in enumerate(halves):
            field = f"connections[{i}]"
            if half.connection_id in seen:
                raise InvalidRequest(
                    f"{field}.connection_id", f"{half.connection_id} is there twice"
                )
            seen.add(half.connection_id)
            if half.callee_rail >= len(rails):
                raise InvalidRequest(
                    f"{field}.callee_rail",
                    f"there is no rail {half.callee_rail}; this daemon has {len(rails)}",
                    reason="PROTOCOL_MISMATCH",
                )
            spoken = rails[half.callee_rail].protocol
            if spoken != half.protocol:
                raise InvalidRequest(
                    f"{field}.protocol",
                    f"rail {half.callee_rail} speaks {spoken}, and not {half.protocol}; use the "
                    "same provider and version",
                    reason="PROTOCOL_MISMATCH",
                )
            if leads_nowhere_else(spoken) and not peer.loopback:
                raise InvalidRequest(
                    f"{field}.callee_rail",
                    f"rail {half.callee_rail} copies within this daemon and leads nowhere else",
                )
            if not 1 <= len(half.address) <= ADDRESS_MAX:
                raise InvalidRequest(
                    f"{field}.address",
                    f"has {len(half.address)} bytes; that of a half has 1 to {ADDRESS_MAX}",
                )

    async def _accept(self, peer: Peer, half: Half, made: list[Incoming]) -> bytes:
        """Makes our half; tells its address."""
        old = peer.incoming.get(half.connection_id)
        if old is not None:
            if old.half != half:
                raise Conflict(
                    f"connection {half.connection_id} stands, and was asked for with another "
                    "address or rail; give a new one a number of its own",
                    reason="CONNECTION_EXISTS",
                )
            return old.address
        _check_unspent(peer, half)
        conn, address = await self._plane.conn_open(half.callee_rail, peer.number, outgoing=False)
        incoming = Incoming(conn, peer, half, address)
        # Known from here on: whoever cuts the peer off finds it.
        peer.incoming[half.connection_id] = incoming
        self._by_conn[conn] = incoming
        made.append(incoming)
        try:
            await self._plane.conn_start(conn, half.address)
        except PlaneError as error:
            if error.errno != errno.EPROTO:
                made.remove(incoming)
                await self._close(incoming)
                raise
            raise InvalidRequest(
                "connections.address", error.text, reason="PROTOCOL_MISMATCH"
            ) from error
        return address

    @staticmethod
    def _refused(peer: Peer, error: PlaneError) -> None:
        """Says that a rail takes no connection: where it has no room, to whoever can make some."""
        level = log.info
        if error.errno == errno.ENOSPC and not peer.told_full:
            level, peer.told_full = log.warning, True
        level("a rail takes no connection", peer=peer.address, error=error.text)

    async def _undo(self, made: list[Incoming]) -> None:
        for incoming in made:
            await self._close(incoming)

    def _close(self, incoming: Incoming) -> asyncio.Task[None]:
        """Destroys a receiving half; idempotent; done means that no byte lands by it."""
        if incoming.closing is None:
            peer, number = incoming.peer, incoming.half.connection_id
            del peer.incoming[number]
            _spend(peer, number)
            self._by_conn.pop(incoming.conn, None)
            incoming.closing = self.tasks.spawn(self._destroy(incoming), "close connection")
            incoming.peer.closing.add(incoming.closing)
            incoming.closing.add_done_callback(incoming.peer.closing.discard)
        return incoming.closing

    async def _destroy(self, incoming: Incoming) -> None:
        """Destroys a half and keeps what had landed by it, for the writer to ask."""
        landed = await self._plane.conn_close(incoming.conn, Detail.CONNECTION)
        kept = incoming.peer.landed
        kept[incoming.half.connection_id] = landed
        while len(kept) > LANDED_KEPT:
            del kept[next(iter(kept))]

    async def disconnect(self, peer: Peer, connection_ids: Sequence[int]) -> list[Landed | None]:
        """A peer writes no more on its halves; ours go. Tells what has landed by each, if known."""
        for i in connection_ids:
            if i in peer.incoming:
                self._close(peer.incoming[i])
            _spend(peer, i)  # also one that is still being made
        while peer.closing:
            await asyncio.wait(set(peer.closing))
        # Kept: the answer may be lost, and the peer asks again.
        return [peer.landed.get(i) for i in connection_ids]

    def conn_lost(self, conn: int, detail: int) -> Peer | None:
        """The provider reported a connection broken; tells whose it was.

        With ``PROVIDER`` immediates that came by it were lost here: their writer takes them for
        landed, so nobody but us can tell those who wait for them.
        """
        incoming = self._by_conn.get(conn)
        if incoming is None:
            return None
        self._close(incoming)
        if detail == Detail.PROVIDER:
            for gid in incoming.peer.opened_here:
                if (grant := self.grants.get(gid)) is not None:
                    self._fault(grant)
        return incoming.peer

    async def peer_lost(self, peer: Peer) -> None:
        """Ends what a lost peer holds of us: its connections, then the trust of who waits."""
        await self.cut_off(peer)
        self._plane.counters_settle(peer.number)
        for gid in list(peer.opened_here):
            grant = self.grants.get(gid)
            if grant is not None and grant.openers.pop(peer, 0) is None:
                self._fault(grant)
        peer.opened_here.clear()


def _check_room(peer: Peer, halves: Sequence[Half], most_staged: int) -> None:
    """Bounds what one peer can hold; of the staging pools, so that others have the rest.

    Raises:
        QuotaExceeded: CONNECTIONS.
    """
    held = [incoming.half for incoming in peer.incoming.values()]
    held += [half for half in halves if half.connection_id not in peer.incoming]
    staged = sum(is_staged(half.protocol) for half in held)
    if len(held) > CONNECTIONS_PER_PEER or staged > most_staged:
        raise QuotaExceeded(
            f"{peer.address} would have {len(held)} connections to this daemon, {staged} of them "
            f"staged; it may have {CONNECTIONS_PER_PEER}, and {most_staged}",
            reason="CONNECTIONS",
        )


def _spend(peer: Peer, number: int) -> None:
    """The connection with a number is over, or was never made; keeps the latest of them."""
    peer.spent.pop(number, None)
    peer.spent[number] = None
    while len(peer.spent) > SPENT_KEPT:
        del peer.spent[next(iter(peer.spent))]


def _check_unspent(peer: Peer, half: Half) -> None:
    """Refuses the number of a connection that is over: the request is an old one."""
    if half.connection_id in peer.spent:
        raise Conflict(
            f"connection {half.connection_id} of {peer.address} is over; give a new one a number "
            "of its own",
            reason="CONNECTION_OVER",
        )


def _unset(peer: Peer) -> asyncio.Task[None]:
    raise RuntimeError(f"nobody loses {peer.address}")
