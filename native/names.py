# SPDX-License-Identifier: Apache-2.0
"""How jobs end, by name: the Python face of the tables in abi.h.

The classes are written out for type checkers; tests/unit/test_abi.py holds them against the C
tables.
"""

import enum

from transferd.native.client_half import ffi, lib


class JobStatus(enum.IntEnum):
    """How a job ended (TFD_JOB_STATUS_TABLE)."""

    PENDING = 0
    OK = 1
    CANCELLED = 2
    DEADLINE = 3
    PEER_LOST = 4
    REMOTE_ACCESS = 5
    LOCAL_ACCESS = 6
    INVALID = 7
    QUOTA = 8
    SHUTDOWN = 9


class Detail(enum.IntEnum):
    """Why a job or a session ended (TFD_DETAIL_TABLE)."""

    NONE = 0
    BAD_OP = 1
    BAD_FLAGS = 2
    BAD_REGION = 3
    SOURCE_BOUNDS = 4
    BAD_GRANT = 5
    DESTINATION_BOUNDS = 6
    RIGHTS = 7
    IMM_RANGE = 8
    EXPIRED = 9
    REVOKED = 10
    STALE = 11
    IMM_BITS = 12
    LENGTH = 13
    BROKEN_REGION = 14
    PROVIDER = 15
    HEARTBEAT = 16
    CONNECTION = 17
    BAD_COUNTER = 18
    NO_SUCH_JOB = 19
    SESSION_ENDED = 20
    TABLE = 21
    FENCED = 22
    READ_ONLY = 23
    BAD_MAILBOX = 24
    NO_MEMORY = 25
    CHECKSUM = 26
    BAD_WATCHER = 27
    BAD_PLAN = 28
    DEVICE_MEMORY = 29
    NOT_COPIED = 30
    STILL_COPIED = 31
    STAGING = 32
    ONE_BYTE = 33


def _text(pointer: object) -> str:
    text: str = ffi.string(pointer).decode("ascii")
    return text


def job_status_name(status: int) -> str:
    """Names a status, also one that this version does not know."""
    return _text(lib.tfd_job_status_name(status))


def job_status_text(status: int) -> str:
    """Says a status in a sentence."""
    return _text(lib.tfd_job_status_text(status))


def detail_name(detail: int) -> str:
    """Names a detail, also one that this version does not know."""
    return _text(lib.tfd_detail_name(detail))


def detail_text(detail: int) -> str:
    """Says a detail in a sentence; empty for NONE."""
    return _text(lib.tfd_detail_text(detail))
