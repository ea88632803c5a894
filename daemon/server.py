# SPDX-License-Identifier: Apache-2.0
"""The daemon put together: start, run, stop.

A start that fails raises StartError with one sentence that says what to do, and leaves nothing
behind. A stop ends the sessions first (peers are told, fences hold), then the servers, the
relations, and the data plane last.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

import transferd
from transferd.daemon import identity, tls
from transferd.daemon.config import split_host_port
from transferd.daemon.dataplane import DataPlane
from transferd.daemon.descriptor import Sealer
from transferd.daemon.fdsocket import FdServer
from transferd.daemon.lanes import Lanes
from transferd.daemon.listeners import (
    ClientServices,
    Listener,
    bind_tcp,
    bind_unix,
    make_listener,
    make_peer_server,
    set_all_serving,
)
from transferd.daemon.mailboxes import Mailboxes
from transferd.daemon.opens import Opener
from transferd.daemon.owner import Owner
from transferd.daemon.peerclient import GrpcLink
from transferd.daemon.peers import Peers
from transferd.daemon.plane import Detail, EventType, PlaneError, RailState
from transferd.daemon.policy import Tenant
from transferd.daemon.rails import any_up, is_staged, open_rails, warnings
from transferd.daemon.services.admin import AdminService, Facts
from transferd.daemon.services.auth import Authenticator
from transferd.daemon.services.mailbox import MailboxService
from transferd.daemon.services.peer import PeerService
from transferd.daemon.services.region import RegionService
from transferd.daemon.services.session import SessionService
from transferd.daemon.services.transfer import TransferService
from transferd.daemon.sessions import Sessions
from transferd.daemon.sockets import (
    SocketPlace,
    StartError,
    check_port_free,
    numeric_address,
    port_message,
)
from transferd.daemon.staging import Staging
from transferd.daemon.tasks import TaskOwner
from transferd.daemon.transfers import Transfers
from transferd.peer.v1 import peer_pb2_grpc

if TYPE_CHECKING:
    import grpc.aio

    from transferd.daemon.config import Config
    from transferd.daemon.http import HttpServer
    from transferd.daemon.identity import Identity
    from transferd.daemon.plane import Event
    from transferd.daemon.tls import Credentials
    from transferd.daemon.topology import Choice

log = structlog.get_logger("transferd")

TICK_S = 0.5  # leases are over at most this late
SWEEP_TICKS = 20
GRACE_S = 0.5
SOCKET_NAME = "transferd.sock"


class Server:
    """One daemon."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._started_ns = time.monotonic_ns()
        self._undo = contextlib.AsyncExitStack()
        self._tasks = TaskOwner("server")
        self._listeners: list[Listener] = []
        self._fd_servers: list[FdServer] = []
        self._tls: Credentials | None = None
        self._identity: Identity
        self._plane: DataPlane
        self._owner: Owner
        self._opener: Opener
        self._lanes: Lanes
        self._peers: Peers
        self._sessions: Sessions
        self._transfers: Transfers
        self._staging: Staging
        self._facts: Facts

    # ---- starting ----

    async def start(self) -> None:
        """Starts everything.

        Raises:
            StartError: One sentence that says what to do; nothing is left behind.
        """
        try:
            places = self._take_places()
            self._check_ports()
            self._tls = tls.load(self._config.tls) if self._config.tls else None
            self._identity = identity.load(self._config.state_dir)
            _raise_file_limit()
            await self._start_plane()
            self._wire()
            await self._start_peer_server()
            await self._start_listeners(places)
            self._start_http()
        except PlaneError as error:
            await self._undo.aclose()
            raise StartError(error.text) from error
        except BaseException:
            await self._undo.aclose()
            raise
        self._tasks.background(self._tick(), "tick")
        self._say_ready()

    def _take_places(self) -> dict[str, SocketPlace]:
        """Locks the Unix sockets' paths, by tenant; "" is `listen` where no tenant has it."""
        paths: dict[str, Path] = {}
        for tenant in self._config.effective_tenants():
            directory = tenant.socket_dir
            own = Path(directory) / SOCKET_NAME if directory else self._config.socket_path
            paths[tenant.name] = own
        if self._config.socket_path not in paths.values():
            paths[""] = self._config.socket_path
        admin = self._config.admin_listen
        if admin is not None and admin.startswith("unix:"):
            paths["admin"] = Path(admin.removeprefix("unix://"))
        places = {}
        for name, path in paths.items():
            places[name] = SocketPlace(path)
            self._undo.callback(places[name].release)
        return places

    def _check_ports(self) -> None:
        config = self._config
        check_port_free("peer_listen", config.peer_listen, socket.SOCK_STREAM)
        check_port_free("peer_listen (UDP, heartbeats)", config.peer_listen, socket.SOCK_DGRAM)
        for key in ("http_listen", "listen_tcp"):
            address = getattr(config, key)
            if address is not None:
                check_port_free(key, address, socket.SOCK_STREAM)
        if config.admin_listen is not None and not config.admin_listen.startswith("unix:"):
            check_port_free("admin_listen", config.admin_listen, socket.SOCK_STREAM)

    async def _start_plane(self) -> None:
        config = self._config
        key = self._identity.key
        self._plane = DataPlane.open(
            daemon_id=key.daemon_id,
            boot_epoch=key.boot_epoch,
            spin_us=round(config.spin * 1e6),
            busy=config.polling == "busy",
            max_sessions=config.limits.sessions,
            copy_s=config.timeouts.revoke / 2,  # before whoever waits for an opener cuts it off
        )
        self._undo.push_async_callback(self._plane.aclose)
        self._group, choice = await open_rails(self._plane, config)
        host, port = split_host_port(config.peer_listen)
        _, numeric = numeric_address("peer_listen", host, port)
        self._plane.heartbeat_open(
            numeric,
            port,
            round(config.heartbeat.interval * 1000),
            round(config.heartbeat.timeout * 1000),
        )
        rail = self._plane.rails[0]
        self._facts = Facts(
            own=key,
            started_ns=self._started_ns,
            peer_address=config.advertised,
            tls=self._tls is not None,
            provider=rail.protocol.replace("/", " "),
            warnings=tuple(self._warnings(choice)),
            rails=choice,
            verbs=config.verbs if choice.provider == "verbs" else None,
        )

    def _warnings(self, choice: Choice) -> list[str]:
        found = [*self._plane.warnings, *warnings(self._config, choice)]
        if self._tls is None:
            found.append(
                "Development mode: peers are not authenticated, so only this host is served; "
                "give a tls section."
            )
        return found

    def _wire(self) -> None:
        """Makes the cores and joins them."""
        config, plane = self._config, self._plane
        own = self._identity.key
        sealer = Sealer(own, config.advertised, self._identity.secret)
        credentials = self._tls.client if self._tls else None
        self._owner = Owner(plane, sealer, config.timeouts.revoke)
        self._lanes = Lanes(plane)
        self._peers = Peers(
            plane,
            own=own,
            address=config.advertised,
            heartbeat_port=split_host_port(config.peer_listen)[1],
            limit=config.limits.peers,
            loopback_only=self._tls is None,
            make_link=lambda address, on_failure: GrpcLink(
                own, address, credentials, config.timeouts.peer_call, on_failure
            ),
        )
        self._opener = Opener(plane, self._lanes, self._peers.ensure, config.timeouts.quiet)
        self._peers.wire(self._opener, self._owner, self._lanes)
        staged = is_staged(config, self._facts.rails)
        self._staging = Staging(plane, enabled=staged, library=config.gpu.library)
        self._undo.push_async_callback(self._staging.aclose)
        self._sessions = Sessions(
            plane,
            self._opener,
            self._owner,
            self._peers,
            group=self._group,
            limits=config.limits,
            timeouts=config.timeouts,
            staging=self._staging,
        )
        self._transfers = Transfers(plane)
        self._mailboxes = Mailboxes(plane, self._sessions, self._owner, self._transfers)
        self._sessions.on_ending.append(self._transfers.session_ending)
        plane.set_handler(self._on_event)

    def _on_event(self, event: Event) -> None:
        """Hands an event of the data plane to who deals with it."""
        if event.type == EventType.OPEN_QUIET:
            self._opener.on_quiet(event)
        elif event.type == EventType.FENCE_QUIET:
            self._opener.fences.on_quiet(event)
        elif event.type == EventType.LOST:
            self._opener.on_lost(event)
        elif event.type == EventType.SESSION_QUIET:
            self._sessions.quiet(event.id)
        elif event.type == EventType.SESSION_BROKEN:
            self._sessions.broken(event.id, event.detail)
        elif event.type == EventType.REGION_BROKEN:
            self._sessions.region_broken(event.session, event.id)
        elif event.type == EventType.PEER_SILENT:
            self._peers.silent(event.id)
        elif event.type == EventType.STAGE_NEEDED:
            self._staging.needed(event.id)
        elif event.type == EventType.STAGE_SILENT:
            self._staging.silent(event.id)
        elif event.type == EventType.RAIL_STATE:
            self._rail_changed(event.id, RailState(event.count))
        elif event.type == EventType.CONN_PROVEN:
            self._lanes.paths.proven(event.id)
        elif event.type == EventType.CONN_LOST and not self._lanes.conn_lost(event.id):
            peer = self._owner.conn_lost(event.id, event.detail)
            if peer is not None:
                self._peers.probe(peer)

    def _rail_changed(self, number: int, state: RailState) -> None:
        """Says so; its connections end by events of their own, and come back with it."""
        say = log.info if state is RailState.UP else log.warning
        say("a rail has changed", rail=self._plane.rails[number].name, state=state.name)

    async def _start_peer_server(self) -> None:
        servicer = PeerService(self._peers, self._owner, self._opener)
        server = make_peer_server(servicer, peer_pb2_grpc.add_PeerServiceServicer_to_server)
        credentials = self._tls.server if self._tls else None
        bind_tcp(server, "peer_listen", self._config.peer_listen, credentials)
        self._undo.push_async_callback(_stop_server, server)
        await server.start()

    async def _start_listeners(self, places: dict[str, SocketPlace]) -> None:
        config = self._config
        mode = int(config.socket_mode, 8)
        admin = AdminService(
            self._facts,
            self._plane,
            self._sessions,
            self._owner,
            self._opener,
            self._peers,
            self._staging,
        )
        shared_admin = admin if config.admin_listen is None else None
        for tenant_config in config.effective_tenants():
            tenant = Tenant(tenant_config)
            place = places[tenant.name]
            own = place.path == config.socket_path
            name = str(place.path)
            listener = make_listener(self._services(tenant, name), shared_admin if own else None)
            bind_unix(listener.server, place.path, mode)
            self._add(listener)
            fd_server = FdServer(place.fd_path, mode, name, tenant, self._sessions, self._plane)
            fd_server.start()
            self._fd_servers.append(fd_server)
            self._undo.push_async_callback(fd_server.aclose)
            if own and config.listen_tcp is not None:
                tcp = make_listener(self._services(tenant, config.listen_tcp), None)
                bind_tcp(
                    tcp.server,
                    "listen_tcp",
                    config.listen_tcp,
                    self._tls.server if self._tls else None,
                )
                self._add(tcp)
        if "" in places and shared_admin is not None:
            listener = make_listener(None, shared_admin)
            bind_unix(listener.server, places[""].path, mode)
            self._add(listener)
        if config.admin_listen is not None:
            self._add(self._admin_listener(config.admin_listen, admin, places, mode))
        for listener in self._listeners:
            await listener.start()

    def _admin_listener(
        self, address: str, admin: AdminService, places: dict[str, SocketPlace], mode: int
    ) -> Listener:
        listener = make_listener(None, admin)
        if "admin" in places:
            bind_unix(listener.server, places["admin"].path, mode)
        else:
            bind_tcp(
                listener.server, "admin_listen", address, self._tls.server if self._tls else None
            )
        return listener

    def _add(self, listener: Listener) -> None:
        self._listeners.append(listener)
        self._undo.push_async_callback(listener.stop, GRACE_S)

    def _services(self, tenant: Tenant, listener: str) -> ClientServices:
        auth = Authenticator(self._sessions.table, listener)
        epoch = self._identity.key.boot_epoch
        return ClientServices(
            SessionService(self._sessions, self._plane, tenant, auth, epoch),
            RegionService(self._sessions, self._owner, self._opener, auth),
            TransferService(self._transfers, self._opener, self._plane, auth),
            MailboxService(self._mailboxes, auth),
        )

    def _start_http(self) -> None:
        if self._config.http_listen is None:
            return
        # Imported here: a daemon without the port does without the libraries.
        from transferd.daemon.http import HttpServer
        from transferd.daemon.metrics import Snapshot

        host, port = split_host_port(self._config.http_listen)
        family, numeric = numeric_address("http_listen", host, port)
        snapshot = Snapshot(
            transferd.__version__,
            self._facts,
            self._plane,
            self._sessions,
            self._owner,
            self._opener,
            self._peers,
            self._lanes,
            self._staging,
        )
        loop = asyncio.get_running_loop()
        try:
            http = HttpServer(family, (numeric, port), loop, snapshot.take, self._not_ready)
        except OSError as error:
            raise StartError(port_message("http_listen", self._config.http_listen, error)) from None
        self._undo.push_async_callback(_close_http, http)

    def _not_ready(self) -> str:
        """Says why the daemon should get no clients; empty if it should."""
        if self._sessions.stopping:
            return "stopping"
        return "" if any_up(self._plane.rail_stats()) else "no rail is up"

    def _say_ready(self) -> None:
        for warning in self._facts.warnings:
            log.warning(warning)
        log.info(
            "ready",
            version=transferd.__version__,
            listen=self._config.listen,
            peers_at=self._config.advertised,
            daemon=str(self._identity.key),
            provider=self._facts.provider,
            rails=[rail.name for rail in self._plane.rails],
        )
        _notify_systemd("READY=1")

    # ---- running and stopping ----

    async def _tick(self) -> None:
        count = 0
        while True:
            await asyncio.sleep(TICK_S)
            count += 1
            self._sessions.reap_leases()
            if count % SWEEP_TICKS == 0:
                self._peers.sweep(time.monotonic_ns())

    async def stop(self) -> None:
        """Stops everything; bounded by timeouts.stop.

        Raises:
            TimeoutError: Something did not end within the bound.
        """
        _notify_systemd("STOPPING=1")
        async with asyncio.timeout(self._config.timeouts.stop):
            await set_all_serving(self._listeners, serving=False)
            for fd_server in self._fd_servers:
                fd_server.stop_listening()
            await self._sessions.aclose()
            for peer in self._peers.all():
                for lane in list(peer.lanes.values()):
                    self._lanes.close(lane, Detail.CONNECTION)
            await asyncio.gather(*(peer.tasks.idle() for peer in self._peers.all()))
            await self._tasks.aclose()
            await self._peers.aclose()
            await self._owner.tasks.idle()
            await self._undo.aclose()


async def _stop_server(server: grpc.aio.Server) -> None:
    await server.stop(GRACE_S)


async def _close_http(http: HttpServer) -> None:
    # Its threads may wait for an answer of this very loop.
    await asyncio.to_thread(http.close)


def _raise_file_limit() -> None:
    """Sessions need a handful of fds each; the usual soft limit of 1,024 is there for select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _notify_systemd(state: str) -> None:
    """Tells systemd, if it started us (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.connect(address)
        sock.sendall(state.encode())


def _stop_on_signal(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """Has SIGTERM and SIGINT stop the daemon, whoever handled them before."""
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
        loop.add_signal_handler(number, stop.set)


async def serve(config: Config) -> int:
    """Runs a daemon until SIGTERM or SIGINT.

    Args:
        config: What to run.

    Returns:
        Exit status: 0 after a clean stop.

    Raises:
        StartError: It could not start.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    _stop_on_signal(loop, stop)
    server = Server(config)
    await server.start()
    # libfabric's shm provider has handlers of its own for these, which end the process at once.
    _stop_on_signal(loop, stop)
    await stop.wait()
    log.info("stopping")
    try:
        await server.stop()
    except TimeoutError:
        log.error("not everything ended in time", bound_s=config.timeouts.stop)
        return 1
    log.info("stopped")
    return 0
