# SPDX-License-Identifier: Apache-2.0
"""The router as engines and their callers see it."""

from __future__ import annotations

import queue
import threading
import time
from typing import TYPE_CHECKING, Any

import grpc

from transferd.client import errors
from transferd.client.closing import Closing
from transferd.kv.router.policy import Choice, Engine, Load
from transferd.kv.router.server import ROLES, from_engine
from transferd.kv.v1 import router_pb2, router_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

CALL_S = 5.0
BACK_OFF_S = (0.05, 2.0)
_OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))


def _engine(message: router_pb2.Engine) -> Engine:
    return Engine(
        message.name,
        ROLES[message.role],
        message.boot,
        message.fingerprint,
        message.address,
        message.page_tokens,
    )


class Router(Closing):
    """Asks a router. A context manager; may be used from several threads."""

    def __init__(self, address: str, timeout_s: float = CALL_S) -> None:
        """Makes the channel; nothing is sent yet.

        Args:
            address: ``host:port`` or ``unix:///path``.
            timeout_s: Bound of each call, which waits for a router that is away.
        """
        self.address = address
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._stub = router_pb2_grpc.KvRouterServiceStub(self._channel)

    def route(
        self, tokens: int, prefix: Sequence[int] = (), exclude: Collection[str] = ()
    ) -> Choice:
        """Asks who serves a prompt.

        Args:
            tokens: Of the prompt.
            prefix: :func:`prefix_hashes` of it, for prefillers that have its beginning.
            exclude: Names of engines that were tried already.

        Raises:
            Unavailable: NO_PREFILLER, NO_DECODER; or the router is away for longer than the bound.
            InvalidRequest: A value is out of range.
        """
        request = router_pb2.RouteRequest(tokens=tokens, prefix=prefix, exclude=exclude)
        answer = self._call(self._stub.Route, request)
        return Choice(_engine(answer.prefiller), _engine(answer.decoder), answer.reused_tokens)

    def engines(self) -> list[tuple[Engine, Load]]:
        """Lists the engines that are there."""
        answer = self._call(self._stub.ListEngines, router_pb2.ListEnginesRequest())
        return [
            (_engine(e.engine), Load(e.load.waiting, e.load.free_pages, e.load.draining))
            for e in answer.engines
        ]

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            # A router that refuses says so at once; one that is away is waited for.
            return method(request, timeout=self._timeout_s, wait_for_ready=True)
        except grpc.RpcError as error:
            raise errors.from_rpc(error, self.address) from None

    def close(self) -> None:
        """Closes the channel. Idempotent."""
        self._channel.close()


class Registration(Closing):
    """Keeps an engine registered, over restarts of the router. A context manager.

    Attributes:
        refused: Why the router did not take the engine, if so; it is tried again all the same.
    """

    def __init__(self, address: str, engine: Engine, load: Callable[[], Load]) -> None:
        """Starts a thread that registers the engine.

        Args:
            address: The router's.
            engine: Who it is.
            load: Tells its load; called by that thread, so it has to be quick.
        """
        self.refused: errors.TransferdError | None = None
        self._address = address
        self._engine = engine
        self._load = load
        self._closed = threading.Event()
        self._registered = threading.Event()
        self._call: Any = None
        self._thread = threading.Thread(target=self._run, name="kv-registration", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> None:
        """Waits until the router has taken the engine.

        Raises:
            WaitTimeout: It has not, in time; the text says why, if it said.
        """
        if not self._registered.wait(timeout_s):
            why = f": {self.refused}" if self.refused else ""
            raise errors.WaitTimeout(
                f"the router at {self._address} has not taken {self._engine.name!r} within "
                f"{timeout_s:g} s{why}"
            )

    def _run(self) -> None:
        back_off = BACK_OFF_S[0]
        while not self._closed.is_set():
            begin = time.monotonic()
            try:
                with grpc.insecure_channel(self._address, options=_OPTIONS) as channel:
                    self._stream(router_pb2_grpc.KvRouterServiceStub(channel))
            except grpc.RpcError as error:
                told = errors.from_rpc(error, self._address)
                self.refused = None if isinstance(told, errors.Unavailable) else told
            self._registered.clear()
            if time.monotonic() - begin > BACK_OFF_S[1]:
                back_off = BACK_OFF_S[0]
            self._closed.wait(back_off)
            back_off = min(2 * back_off, BACK_OFF_S[1])

    def _stream(self, stub: Any) -> None:
        """Holds one stream until it ends; a router that is silent for its own lease ends it."""
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        heard = time.monotonic()

        def messages() -> Iterator[router_pb2.RegisterRequest]:
            yield router_pb2.RegisterRequest(engine=from_engine(self._engine))
            first = answers.get()
            while first is not None and not self._closed.is_set():
                told = self._load()
                yield router_pb2.RegisterRequest(
                    load=router_pb2.Load(
                        waiting=told.waiting, free_pages=told.free_pages, draining=told.draining
                    )
                )
                self._closed.wait(first.interval_ms / 2000)
                if time.monotonic() - heard > first.lease_ms / 1000:
                    call.cancel()

        self._call = call = stub.Register(messages())
        try:
            for answer in call:
                heard = time.monotonic()
                if not self._registered.is_set():
                    self.refused = None
                    self._registered.set()
                    answers.put(answer)
                if self._closed.is_set():
                    call.cancel()
        finally:
            answers.put(None)

    def close(self) -> None:
        """Leaves: the router forgets the engine at once. Idempotent."""
        self._closed.set()
        if self._call is not None:
            self._call.cancel()
        self._thread.join(CALL_S)
