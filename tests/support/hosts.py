# SPDX-License-Identifier: Apache-2.0
"""Daemons without processes: the real control plane over fake data planes and links in memory.

Every call between two of them passes a :class:`Network`, where a test can hold it, fail it, or
count it.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
from collections import Counter
from typing import TYPE_CHECKING, Any

from transferd.daemon.config import LimitsConfig, QuotaConfig, TenantConfig, TimeoutConfig
from transferd.daemon.descriptor import PeerKey, Sealer
from transferd.daemon.errors import PeerLost, TimedOut
from transferd.daemon.lanes import Lanes
from transferd.daemon.mailboxes import Mailboxes
from transferd.daemon.opens import Opener
from transferd.daemon.owner import Owner
from transferd.daemon.peers import Peers
from transferd.daemon.plane import EventType
from transferd.daemon.policy import Tenant
from transferd.daemon.session import Origin
from transferd.daemon.sessions import Sessions
from transferd.daemon.staging import Staging
from transferd.daemon.transfers import Transfers

from support.fake_plane import PROTOCOL, FakePlane

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transferd.daemon.errors import TransferdError
    from transferd.daemon.grant import Grant
    from transferd.daemon.peer import Peer
    from transferd.daemon.plane import Event, Landed
    from transferd.daemon.region import Region
    from transferd.daemon.session import Session
    from transferd.daemon.wire import GrantFence, GrantKeys, Half, Hello, HelloReply, Loss, Refusal

CALL_S = 0.5  # of calls that a test holds; others are answered, however slow the machine is
PATIENCE_S = 60.0
TIMEOUTS = TimeoutConfig(peer_call=CALL_S, revoke=0.2, quiet=0.5, stop=5.0)
F_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Network:
    """Who is where, and what happens to calls.

    Attributes:
        calls: How often each method was called.
        held: Methods whose calls wait, before they reach the callee, for the event.
        held_answers: The same for their answers.
        dead: Addresses where nobody answers.
    """

    def __init__(self) -> None:
        self.hosts: dict[str, Host] = {}
        self.calls: Counter[str] = Counter()
        self.held: dict[str, asyncio.Event] = {}
        self.held_answers: dict[str, asyncio.Event] = {}
        self.dead: set[str] = set()

    def hold(self, method: str, *, answer: bool = False) -> asyncio.Event:
        """Holds calls of a method, or their answers, until the event is set."""
        event = asyncio.Event()
        (self.held_answers if answer else self.held)[method] = event
        return event

    async def deliver(self, method: str, address: str) -> Host:
        """Carries a call."""
        self.calls[method] += 1
        await asyncio.sleep(0)
        if method in self.held:
            await self.held[method].wait()
        if address in self.dead or address not in self.hosts:
            raise PeerLost(f"{address}: connection refused")
        return self.hosts[address]

    async def back(self, method: str) -> None:
        """Carries an answer."""
        await asyncio.sleep(0)
        if method in self.held_answers:
            await self.held_answers[method].wait()


class MemoryLink:
    """A link of one host to another: does what peerclient and services/peer do."""

    def __init__(
        self, network: Network, own: PeerKey, address: str, failed: Callable[[TransferdError], None]
    ) -> None:
        self._network = network
        self._own = own
        self._address = address
        self._failed = failed
        self._closed = False

    async def _call(self, method: str, work: Callable[[Host], Any]) -> Any:
        from transferd.daemon.errors import TransferdError

        async def whole() -> Any:
            host = await self._network.deliver(method, self._address)
            answer = await host.serving.run(work(host), method)
            await self._network.back(method)
            if self._closed:
                raise PeerLost("the peer was lost")
            return answer

        held = {*self._network.held, *self._network.held_answers}
        try:
            async with asyncio.timeout(CALL_S if method in held else PATIENCE_S):
                return await whole()
        except TimeoutError:
            error: TransferdError = TimedOut(f"{method}: no answer in time")
        except TransferdError as failure:
            error = failure
        self._failed(error)
        raise error

    async def hello(self, hello: Hello, callee: PeerKey) -> HelloReply:
        reply: HelloReply = await self._call(
            "hello", lambda host: host.peers.greeted(hello, callee)
        )
        return reply

    async def connect(self, callee_epoch: bytes, halves: Sequence[Half]) -> list[bytes]:
        async def work(host: Host) -> list[bytes]:
            peer = host.peers.caller(self._own)
            return await peer.tasks.run(host.owner.connect(peer, halves), "connect")

        addresses: list[bytes] = await self._call("connect", work)
        return addresses

    async def disconnect(self, connection_ids: Sequence[int]) -> list[Landed | None]:
        async def work(host: Host) -> list[Landed | None]:
            return await host.owner.disconnect(host.peers.caller(self._own), connection_ids)

        landed: list[Landed | None] = await self._call("disconnect", work)
        return landed

    async def open_grants(self, descriptors: Sequence[bytes]) -> list[GrantKeys | Refusal]:
        async def work(host: Host) -> list[GrantKeys | Refusal]:
            return host.owner.open_for(host.peers.caller(self._own), descriptors)

        results: list[GrantKeys | Refusal] = await self._call("open_grants", work)
        return results

    async def release_grants(self, grant_ids: Sequence[int], *, abandoned: bool) -> None:
        async def work(host: Host) -> None:
            host.owner.release(host.peers.caller(self._own), grant_ids, abandoned=abandoned)

        await self._call("release_grants", work)

    async def revoke_grants(self, grant_ids: Sequence[int], timeout_s: float) -> None:
        async def work(host: Host) -> None:
            peer = host.peers.table.get(self._own)
            if peer is not None:
                await host.opener.revoked(peer, grant_ids)
            await host.peers.buried(self._own)

        await self._call("revoke_grants", work)

    async def fence_grants(self, fences: Sequence[GrantFence], timeout_s: float) -> set[int]:
        async def work(host: Host) -> None:
            peer = host.peers.table.get(self._own)
            if peer is not None:
                await host.opener.fences.fenced(peer, fences)
            await host.peers.buried(self._own)

        await self._call("fence_grants", work)
        return set()

    async def report_loss(self, number: int, losses: Sequence[Loss]) -> None:
        async def work(host: Host) -> None:
            host.owner.report_loss(host.peers.caller(self._own), number, losses)

        await self._call("report_loss", work)

    async def aclose(self) -> None:
        self._closed = True


class Host:
    """One daemon's control plane."""

    def __init__(self, network: Network, port: int, *, rails: Sequence[Any] = ()) -> None:
        from transferd.daemon.tasks import TaskOwner

        self.network = network
        self.address = f"127.0.0.1:{port}"
        self.key = PeerKey(secrets.token_bytes(16), secrets.token_bytes(16))
        self.plane = FakePlane(rails)
        self.serving = TaskOwner(f"host {port}")
        self.sealer = Sealer(self.key, self.address, b"secret of this host")
        self.owner = Owner(self.plane, self.sealer, TIMEOUTS.revoke)
        self.lanes = Lanes(self.plane)
        self.peers = Peers(
            self.plane,
            own=self.key,
            address=self.address,
            heartbeat_port=port,
            limit=100,
            loopback_only=True,
            make_link=lambda address, failed: MemoryLink(network, self.key, address, failed),
        )
        self.opener = Opener(self.plane, self.lanes, self.peers.ensure, TIMEOUTS.quiet)
        self.peers.wire(self.opener, self.owner, self.lanes)
        self.staging = Staging(self.plane, enabled=False)
        self.sessions = Sessions(
            self.plane,
            self.opener,
            self.owner,
            self.peers,
            group=0,
            limits=LimitsConfig(),
            timeouts=TIMEOUTS,
            staging=self.staging,
        )
        self.transfers = Transfers(self.plane)
        self.mailboxes = Mailboxes(self.plane, self.sessions, self.owner, self.transfers)
        self.sessions.on_ending.append(self.transfers.session_ending)
        self.plane.set_handler(self._on_event)
        self.tenant = Tenant(TenantConfig(name="tests", quotas=QuotaConfig()))
        network.hosts[self.address] = self

    def _on_event(self, event: Event) -> None:
        """As transferd.daemon.server does."""
        if event.type == EventType.OPEN_QUIET:
            self.opener.on_quiet(event)
        elif event.type == EventType.FENCE_QUIET:
            self.opener.fences.on_quiet(event)
        elif event.type == EventType.LOST:
            self.opener.on_lost(event)
        elif event.type == EventType.SESSION_QUIET:
            self.sessions.quiet(event.id)
        elif event.type == EventType.SESSION_BROKEN:
            self.sessions.broken(event.id, event.detail)
        elif event.type == EventType.PEER_SILENT:
            self.peers.silent(event.id)
        elif event.type == EventType.CONN_PROVEN:
            self.lanes.paths.proven(event.id)
        elif event.type == EventType.CONN_LOST and not self.lanes.conn_lost(event.id):
            peer = self.owner.conn_lost(event.id, event.detail)
            if peer is not None:
                self.peers.probe(peer)

    # ---- what tests do with it ----

    async def session(self, name: str = "s") -> Session:
        """Opens a session."""
        session, fds = await self.sessions.open(self.tenant, Origin("socket", name))
        for fd in (fds.segment, fds.doorbell, fds.event):
            os.close(fd)
        return session

    async def region(self, session: Session, *, sealed: bool = True) -> Region:
        """Registers 64 KiB."""
        fd = os.memfd_create("m", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(fd, 65_536)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEALS)
        memory = self.sessions.add_memory(session, fd)
        memory.sealed = sealed
        return await self.sessions.register(session, memory.memory_id, offset=0, length=0, name="r")

    async def grant(
        self, session: Session, *, imms: int = 4, expires_ms: int = 0, sealed: bool = True
    ) -> tuple[Grant, bytes]:
        """Grants a whole new region."""
        region = await self.region(session, sealed=sealed)
        grant, descriptor, _ = self.owner.create_grant(
            region,
            offset=0,
            length=0,
            rights=1,
            imm_first=0,
            imm_count=imms,
            expires_ms=expires_ms,
        )
        return grant, descriptor

    async def open(self, session: Session, *descriptors: bytes) -> list[Any]:
        """Opens descriptors as the gRPC service does."""
        work = self.opener.open(session, descriptors, "descriptors")
        return await session.ops.run(work, "open")

    async def end(self, session: Session, *, clean: bool = True) -> None:
        """Ends a session and waits for it."""
        await asyncio.shield(self.sessions.end(session, clean=clean, reason="TEST"))

    def faults(self, session: Session, imm: int) -> int:
        """Faults of a counter."""
        return self.plane.counter_read(session.handle, imm).faults

    def peer(self, other: Host) -> Peer:
        """The living relation with another host."""
        found = self.peers.table.get(other.key)
        assert found is not None, f"{self.address} has no relation with {other.address}"
        return found

    def die(self) -> None:
        """Vanishes without a word."""
        self.network.dead.add(self.address)
        del self.network.hosts[self.address]

    async def aclose(self) -> None:
        """Ends everything."""
        await self.sessions.aclose()
        await self.peers.aclose()
        await self.owner.tasks.idle()

    def assert_nothing_left(self) -> None:
        """Checks that no session left anything behind."""
        assert not self.plane.sessions
        assert not len(self.opener)
        assert not len(self.owner.grants)
        assert not len(self.sessions.table)
        assert set(self.tenant.used.values()) == {0}
        for peer in self.peers.all():
            assert not peer.remote
            assert not peer.opened_here
            assert not peer.losses


async def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Waits for a condition; every event of a fake host is a few loop turns away."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - a condition of many parts has no event
            await asyncio.sleep(0.001)


__all__ = ["PROTOCOL", "Host", "Network", "eventually"]
