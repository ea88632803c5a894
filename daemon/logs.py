# SPDX-License-Identifier: Apache-2.0
"""Logs: one event a line, JSON for programs, coloured text for people at a terminal."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from structlog.typing import EventDict, WrappedLogger

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def set_up(level: str, form: str) -> None:
    """Configures logging for the process.

    Args:
        level: Lowest level that is written.
        form: "json", "console", or "auto": console when standard error is a terminal.
    """
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    processors: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if console:
        processors += [
            structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        ]
    else:
        processors += [
            structlog.processors.format_exc_info,
            _short,
            structlog.processors.JSONRenderer(),
        ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    # Libraries (grpc, asyncio) log through the standard module: only what is wrong is of interest.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(name)s: %(message)s")


def _short(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    """Keeps values that come from clients from filling the log."""
    for key, value in event.items():
        if isinstance(value, str) and len(value) > 8192:
            event[key] = value[:8192] + "..."
    return event
