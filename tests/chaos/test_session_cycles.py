# SPDX-License-Identifier: Apache-2.0
"""Sessions that come and go leave nothing behind."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import psutil
import pytest

import transferd

from support.grpc_session import grpc_session
from support.levels import back_to, level
from support.raw_session import RawSession
from support.waiting import WAIT_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.daemon import DaemonProcess

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

TIMES = 100
IMM = 1
GROWTH_BYTES = 24 << 20  # of the process; a lost segment a time would be hundreds of MiB


def whole(near: DaemonProcess, far: DaemonProcess) -> None:
    """Opens, moves, closes cleanly."""
    with transferd.Client(near.socket) as sender, transferd.Client(far.socket) as receiver:
        source, target = sender.alloc(1 << 20), receiver.alloc(1 << 20)
        grant = target.grant(imms=[IMM])
        sender.write(source, grant.descriptor, imm=IMM).wait(WAIT_S)
        receiver.counter(IMM).wait(1, WAIT_S)


def torn(near: DaemonProcess, far: DaemonProcess) -> None:
    """Lets the fd sockets close without a word, sender and receiver at once."""
    with RawSession(near), RawSession(far):
        pass


def leased(near: DaemonProcess, far: DaemonProcess) -> None:
    """Opens and closes by gRPC alone."""
    with grpc_session(near), grpc_session(far):
        pass


@pytest.mark.parametrize("cycle", [pytest.param(whole, marks=pytest.mark.long), torn, leased])
def test_no_growth(
    shared_pair: Pair, cycle: Callable[[DaemonProcess, DaemonProcess], None]
) -> None:
    for _ in range(10):  # what is made once and kept is there after this
        cycle(*shared_pair)
    before = [level(daemon) for daemon in shared_pair]
    for daemon, held in zip(shared_pair, before, strict=True):
        back_to(daemon, held._replace(sessions=0, regions=0, registered_bytes=0, opened=0, maps=0))
    resident = [psutil.Process(daemon.pid).memory_info().rss for daemon in shared_pair]
    started = time.monotonic()
    for _ in range(TIMES):
        cycle(*shared_pair)
    assert time.monotonic() - started < TIMES * 0.25  # each takes a few ms
    for daemon, held, rss in zip(shared_pair, before, resident, strict=True):
        back_to(daemon, held._replace(sessions=0, regions=0, registered_bytes=0, opened=0, maps=0))
        assert psutil.Process(daemon.pid).memory_info().rss < rss + GROWTH_BYTES
