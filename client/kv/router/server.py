# SPDX-License-Identifier: Apache-2.0
"""The router's gRPC service over its policy."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from transferd.client import errors
from transferd.kv.router.policy import DECODER, PREFILLER, Engine, Fleet, Load
from transferd.kv.v1 import router_pb2, router_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SERVICE = router_pb2.DESCRIPTOR.services_by_name["KvRouterService"].full_name
NAME_MAX = 128
BOOT_BYTES = 16
FINGERPRINT_MAX = 64
ADDRESS_MAX = 64 << 10
PAGE_TOKENS_MAX = 1 << 20
PREFIX_MAX = 65_536
EXCLUDE_MAX = 256
ENGINES_MAX = 4096
ROLES = {
    router_pb2.ENGINE_ROLE_PREFILLER: PREFILLER,
    router_pb2.ENGINE_ROLE_DECODER: DECODER,
}
ROLE_NUMBERS = {name: number for number, name in ROLES.items()}
_CODES = {
    errors.InvalidRequest: code_pb2.INVALID_ARGUMENT,
    errors.Conflict: code_pb2.ALREADY_EXISTS,
    errors.QuotaExceeded: code_pb2.RESOURCE_EXHAUSTED,
    errors.Unavailable: code_pb2.UNAVAILABLE,
}


async def _abort(context: Any, error: errors.TransferdError) -> None:
    """Ends a call with the error, its reason in google.rpc.ErrorInfo."""
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain="transferd"))
    code = _CODES.get(type(error), code_pb2.INTERNAL)
    status = status_pb2.Status(code=code, message=str(error), details=[detail])
    await context.abort_with_status(rpc_status.to_status(status))


def _check(what: str, *, good: bool, got: object) -> None:
    if not good:
        raise errors.InvalidRequest(f"{what}; got {got}", reason="ENGINE")


def to_engine(message: router_pb2.Engine) -> Engine:
    """Checks what an engine says of itself.

    Raises:
        InvalidRequest: ENGINE: a field is out of range.
    """
    name = message.name
    _check(
        f"name is a printable text of 1 to {NAME_MAX} characters",
        good=0 < len(name) <= NAME_MAX and name.isprintable(),
        got=repr(name[:NAME_MAX]),
    )
    _check("role is prefiller or decoder", good=message.role in ROLES, got=message.role)
    sizes = len(message.boot), len(message.fingerprint), len(message.address)
    _check(f"boot has {BOOT_BYTES} bytes", good=sizes[0] == BOOT_BYTES, got=sizes[0])
    _check(
        f"fingerprint has 1 to {FINGERPRINT_MAX} bytes",
        good=0 < sizes[1] <= FINGERPRINT_MAX,
        got=sizes[1],
    )
    _check(f"address has at most {ADDRESS_MAX} bytes", good=sizes[2] <= ADDRESS_MAX, got=sizes[2])
    role = ROLES[message.role]
    _check(
        f"page_tokens is a number from 1 to {PAGE_TOKENS_MAX} for a prefiller",
        good=role == DECODER or 0 < message.page_tokens <= PAGE_TOKENS_MAX,
        got=message.page_tokens,
    )
    return Engine(
        name, role, message.boot, message.fingerprint, message.address, message.page_tokens
    )


def from_engine(engine: Engine) -> router_pb2.Engine:
    """Makes the message of an engine."""
    return router_pb2.Engine(
        name=engine.name,
        role=ROLE_NUMBERS[engine.role],
        boot=engine.boot,
        fingerprint=engine.fingerprint,
        address=engine.address,
        page_tokens=engine.page_tokens,
    )


class RouterService(router_pb2_grpc.KvRouterServiceServicer):
    """The three calls. All run in one event loop, which guards the fleet."""

    def __init__(self, fleet: Fleet, interval_s: float) -> None:
        """Serves a fleet.

        Args:
            fleet: Its engines.
            interval_s: Engines tell their load at least this often.
        """
        self._fleet = fleet
        self._answer = router_pb2.RegisterResponse(
            interval_ms=round(interval_s * 1000), lease_ms=round(fleet.lease_s * 1000)
        )

    async def Register(
        self, request_iterator: AsyncIterator[router_pb2.RegisterRequest], context: Any
    ) -> AsyncIterator[router_pb2.RegisterResponse]:
        """Keeps one engine known for as long as its stream lives and is not silent."""
        member = None
        try:
            while True:
                async with asyncio.timeout(self._fleet.lease_s):
                    message = await anext(request_iterator, None)
                if message is None:
                    return
                now = time.monotonic()
                if member is None:
                    if not message.HasField("engine"):
                        raise errors.InvalidRequest(
                            "the first message of a stream describes the engine", reason="ENGINE"
                        )
                    if len(self._fleet) >= ENGINES_MAX:
                        raise errors.QuotaExceeded(
                            f"{ENGINES_MAX} engines are registered", reason="ENGINES"
                        )
                    member = self._fleet.join(to_engine(message.engine), now)
                elif not message.HasField("load"):
                    raise errors.InvalidRequest(
                        "messages after the first tell the load", reason="ENGINE"
                    )
                else:
                    load = message.load
                    told = Load(load.waiting, load.free_pages, load.draining)
                    self._fleet.report(member, told, now)
                yield self._answer
        except errors.TransferdError as error:
            await _abort(context, error)
        except TimeoutError:
            silent = errors.Unavailable(
                f"nothing came for {self._fleet.lease_s:g} s", reason="LEASE"
            )
            await _abort(context, silent)
        finally:
            if member is not None:
                self._fleet.leave(member)

    async def Route(
        self, request: router_pb2.RouteRequest, context: Any
    ) -> router_pb2.RouteResponse:
        """Chooses who serves a prompt."""
        try:
            if not request.tokens:
                raise errors.InvalidRequest("tokens is at least 1; got 0", reason="TOKENS")
            for what, count, most in (
                ("prefix", len(request.prefix), PREFIX_MAX),
                ("exclude", len(request.exclude), EXCLUDE_MAX),
            ):
                if count > most:
                    raise errors.InvalidRequest(
                        f"{what} has at most {most} elements; got {count}", reason=what.upper()
                    )
            choice = self._fleet.route(
                request.tokens, list(request.prefix), set(request.exclude), time.monotonic()
            )
        except errors.TransferdError as error:
            await _abort(context, error)
            raise  # abort has raised: for those who read types
        return router_pb2.RouteResponse(
            prefiller=from_engine(choice.prefiller),
            decoder=from_engine(choice.decoder),
            reused_tokens=choice.reused_tokens,
        )

    async def ListEngines(
        self, request: router_pb2.ListEnginesRequest, context: Any
    ) -> router_pb2.ListEnginesResponse:
        """Lists the engines."""
        now = time.monotonic()
        self._fleet.expire(now)
        return router_pb2.ListEnginesResponse(
            engines=[
                router_pb2.ListEnginesResponse.Entry(
                    engine=from_engine(member.engine),
                    load=router_pb2.Load(
                        waiting=member.load.waiting,
                        free_pages=member.load.free_pages,
                        draining=member.load.draining,
                    ),
                    silent_ms=round((now - member.heard) * 1000),
                    assigned=member.work - member.load.waiting,
                )
                for member in self._fleet
            ]
        )


async def serve(listen: str, interval_s: float, lease_s: float, started: Any = None) -> None:
    """Serves until it is cancelled.

    Args:
        listen: ``host:port`` or ``unix:///path``.
        interval_s: Engines tell their load at least this often.
        lease_s: Without a message for this long an engine is forgotten.
        started: Called with the address once it serves.

    Raises:
        Unavailable: The address cannot be listened on.
    """
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    service = RouterService(Fleet(lease_s), interval_s)
    router_pb2_grpc.add_KvRouterServiceServicer_to_server(service, server)
    states = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(states, server)
    reflection.enable_server_reflection(
        (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise errors.Unavailable(f"cannot listen on {listen}: {error}", reason="LISTEN") from None
    await server.start()
    for name in ("", SERVICE):
        await states.set(name, health_pb2.HealthCheckResponse.SERVING)
    if started is not None:
        host = listen.rpartition(":")[0]
        started(listen if listen.startswith("unix:") else f"{host}:{port}")
    try:
        await server.wait_for_termination()
    finally:
        with contextlib.suppress(asyncio.CancelledError):
            await server.stop(0)
