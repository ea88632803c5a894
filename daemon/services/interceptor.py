# SPDX-License-Identifier: Apache-2.0
"""One interceptor: every error becomes a status with details; nothing else leaks out."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError

from transferd.daemon.errors import (
    Internal,
    InvalidRequest,
    TimedOut,
    TransferdError,
    to_status,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

log = structlog.get_logger("transferd.grpc")


def _as_transferd_error(error: Exception, method: str) -> TransferdError:
    """Passes our own errors on, hides the text of all others behind an id that the log knows."""
    if isinstance(error, TransferdError):
        return error
    if isinstance(error, TimeoutError):
        return TimedOut("the daemon did not come to an answer in time; ask again")
    number = secrets.token_hex(4)
    log.error("call failed", method=method, id=number, exc_info=error)
    return Internal(f"the daemon failed; its log says why under id {number}", id=number)


class ErrorMapper(grpc.aio.ServerInterceptor):
    """Maps what handlers raise to google.rpc.Status."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps the handler of a call."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = handler_call_details.method
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                _unary(handler.unary_unary, method),
                _tolerant(handler.request_deserializer),
                handler.response_serializer,
            )
        if handler.stream_stream is not None and method.startswith("/transferd."):
            return grpc.stream_stream_rpc_method_handler(
                _stream(handler.stream_stream, method),
                _tolerant(handler.request_deserializer),
                handler.response_serializer,
            )
        return handler


class _Garbage:
    """Stands for a request that is no message of its type."""


def _tolerant(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Lets garbage through to the handler: grpc would log a traceback for every such request."""

    def parsed(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            return _Garbage()

    return parsed


def _check(request: Any) -> Any:
    if isinstance(request, _Garbage):
        raise InvalidRequest("request", "no message of the call's type; send what its proto says")
    return request


def _unary(call: Callable[..., Awaitable[Any]], method: str) -> Callable[..., Awaitable[Any]]:
    async def mapped(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await call(_check(request), context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await context.abort_with_status(to_status(_as_transferd_error(error, method)))

    return mapped


def _stream(call: Callable[..., AsyncIterator[Any]], method: str) -> Callable[..., Any]:
    async def mapped(
        requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[Any]:
        async def checked() -> AsyncIterator[Any]:
            async for request in requests:
                yield _check(request)

        try:
            async for response in call(checked(), context):
                yield response
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await context.abort_with_status(to_status(_as_transferd_error(error, method)))

    return mapped
