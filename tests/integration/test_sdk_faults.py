# SPDX-License-Identifier: Apache-2.0
"""The SDK when its own daemon dies; more of deaths in tests/chaos."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

import transferd
from transferd.native.names import JobStatus

if TYPE_CHECKING:
    from support.daemon import DaemonProcess

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

WAIT_S = 20.0


def test_own_daemon_dies(daemon: DaemonProcess) -> None:
    with transferd.Client(daemon.socket) as client:
        region = client.alloc(4096)
        grant = region.grant(imms=[1])
        assert client.write(region, grant.descriptor, imm=1).wait(WAIT_S) is JobStatus.OK
        counter = client.counter(1)
        killer = threading.Timer(0.1, daemon.kill)
        killer.start()
        started = time.monotonic()
        with pytest.raises(transferd.Unavailable):
            counter.wait(2, WAIT_S)
        assert time.monotonic() - started < 0.1 + 1.0 + 1.5  # the timer, the bound, busy cores
        with pytest.raises(transferd.Unavailable):
            client.write(region, grant.descriptor, imm=1)
        with pytest.raises(transferd.Unavailable):
            client.alloc(4096)
        assert counter.value == 1
    killer.join()
    daemon.restart()
    with transferd.Client(daemon.socket) as client:
        client.alloc(4096)


def test_daemon_stops_cleanly_under_a_client(daemon: DaemonProcess) -> None:
    with transferd.Client(daemon.socket) as client:
        counter = client.counter(1)
        stopper = threading.Timer(0.1, daemon.stop)
        stopper.start()
        with pytest.raises(transferd.Unavailable):
            counter.wait(1, WAIT_S)
    stopper.join()
    daemon.start()
