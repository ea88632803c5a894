# SPDX-License-Identifier: Apache-2.0
"""/metrics, /livez and /readyz on one port.

The HTTP server has a thread of its own and asks the event loop, bounded: a daemon whose loop hangs
is not alive, and says so.
"""

from __future__ import annotations

import concurrent.futures
import threading
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, TypeVar
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from transferd.daemon.metrics import SnapshotCollector

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable, Iterable

    from prometheus_client.core import Metric

T = TypeVar("T")

ANSWER_S = 2.0  # longest that the event loop may take
CLIENT_S = 5.0  # longest that a client may take for its request
CONNECTIONS_MAX = 32


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not worth a line."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *args: Any) -> None:
        self._slots = threading.BoundedSemaphore(CONNECTIONS_MAX)
        super().__init__(*args)

    def server_bind(self) -> None:
        """Binds without asking DNS for our own name."""
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Takes a connection, if there are not too many."""
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serves one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away in mid-answer is none of our business."""


class HttpServer:
    """The HTTP port."""

    def __init__(
        self,
        family: socket.AddressFamily,
        address: tuple[str, int],
        loop: asyncio.AbstractEventLoop,
        take: Callable[[], list[Metric]],
        ready: Callable[[], str],
    ) -> None:
        """Binds the port; OSError if it is taken.

        Args:
            family: Of the address.
            address: Numeric host, port.
            loop: Where the next two run.
            take: Reads the metrics.
            ready: Says why the daemon is not ready; empty if it is.
        """
        self._loop = loop
        self._ready = ready
        registry = CollectorRegistry(auto_describe=False)
        registry.register(SnapshotCollector(lambda: self._ask(take)))
        self._metrics = make_wsgi_app(registry)
        server_class = type("_BoundServer", (_Server,), {"address_family": family})
        self._server: _Server = server_class(address, _Handler)
        self._server.set_app(self._serve)
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="http", daemon=True, args=(0.2,)
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that was bound."""
        return int(self._server.server_port)

    def _ask(self, question: Callable[[], T]) -> T:
        """Has the event loop answer a question; TimeoutError if it does not."""
        answer: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            try:
                answer.set_result(question())
            except BaseException as error:
                answer.set_exception(error)

        self._loop.call_soon_threadsafe(run)
        return answer.result(ANSWER_S)

    def _serve(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        try:
            if path == "/metrics":
                return list(self._metrics(environ, start_response))
            if path == "/livez":
                self._ask(lambda: None)
                return _text(start_response, "200 OK", "alive")
            if path == "/readyz":
                why = self._ask(self._ready)
                if why:
                    return _text(start_response, "503 Service Unavailable", why)
                return _text(start_response, "200 OK", "ready")
        except TimeoutError:
            return _text(start_response, "503 Service Unavailable", "the daemon's event loop hangs")
        return _text(start_response, "404 Not Found", "there are /metrics, /livez and /readyz")

    def close(self) -> None:
        """Stops; waits for the thread."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _text(start_response: Any, status: str, text: str) -> list[bytes]:
    body = text.encode() + b"\n"
    headers = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))]
    start_response(status, headers)
    return [body]
