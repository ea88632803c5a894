# SPDX-License-Identifier: Apache-2.0
"""Completions that a provider lost, between daemons: the real control plane, fake data planes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from transferd.daemon.plane import Detail, EventType

from support.hosts import Host, Network, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def network() -> AsyncIterator[Network]:
    net = Network()
    yield net
    for host in list(net.hosts.values()):
        await host.aclose()
        host.assert_nothing_left()


async def test_lost_completions_fault_what_a_peer_writes(network: Network) -> None:
    """A connection that broke is no fault by itself: its writer tells what became of its jobs."""
    near, far = Host(network, 7001), Host(network, 7002)
    receiver = await far.session()
    _, descriptor = await far.grant(receiver)
    sender = await near.session()
    for detail, faults in ((Detail.CONNECTION, 0), (Detail.PROVIDER, 1)):
        await near.open(sender, descriptor)
        (conn,) = [conn for conn, outgoing in far.plane.conns.items() if not outgoing]
        far.plane.tell(EventType.CONN_LOST, conn, detail=detail)
        await eventually(lambda: not any(not outgoing for outgoing in far.plane.conns.values()))
        assert far.faults(receiver, 0) == faults
        (path,) = [conn for conn, outgoing in near.plane.conns.items() if outgoing]
        near.plane.tell(EventType.CONN_LOST, path)
        await eventually(lambda: not any(near.plane.conns.values()))
